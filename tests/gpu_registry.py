"""What TensorFlow's kernel registry says of a graph on a GPU; no GPU is needed.

TensorFlow's Linux packages register the GPU's kernels on any machine: for which dtypes there is one, and which of its
arguments lie in the host's memory. What such a kernel takes is copied from the GPU, which is waited for.
"""

import collections
import functools
import typing

from gpt_neo_sampling._compat import tf

LOOPS, BRANCHES = ("While", "StatelessWhile"), ("If", "StatelessIf")
COMPILED = "_XlaMustCompile"  # the attribute of a call that XLA compiles


class Finding(typing.NamedTuple):
    """An operation type, and tensors that it takes, as "int32[8,64]"."""

    op: str
    tensors: tuple[str, ...]

    def __str__(self):
        return f"{self.op}({', '.join(self.tensors)})"


class Report(typing.NamedTuple):
    """Of all that is run for some tensors, functions that are called included; Counters of Findings.

    no_kernel: operations that a GPU has no kernel for.
    on_host: operations that take more than a few numbers in host memory, constants not counted.
    not_compilable: operations within what XLA compiles that it cannot compile for a GPU.
    launched, compiled: how many operations TensorFlow launches one by one, and how many XLA compiles.
    """

    no_kernel: collections.Counter
    on_host: collections.Counter
    not_compilable: collections.Counter
    launched: int
    compiled: int


def report(fetches, few):
    """The Report of what is run for tf.Tensors; `few` is how many numbers may lie in host memory."""
    launched, compiled = _operations(fetches)
    found = Report(*(collections.Counter() for _ in range(3)), len(launched), len(compiled))
    for op in launched:
        kernel = _kernel(op, "GPU") or _kernel(op, "DEFAULT")
        if kernel is None:
            found.no_kernel[_finding(op, op.inputs)] += 1
            continue
        large = [t for t in _taken_on_host(op, kernel) if t.shape.num_elements() not in range(few + 1)]
        if large:
            found.on_host[_finding(op, large)] += 1
    for op in compiled:
        if _kernel(op, "XLA_GPU_JIT") is None:
            found.not_compilable[_finding(op, op.inputs)] += 1
    return found


def _operations(fetches):
    """(launched, compiled): the operations that make tf.Tensors, those of the functions that they call too."""
    found, called = ([], []), set()

    def walk(operations, is_compiled):
        for op in operations:
            if op.type not in ("Placeholder", "NoOp"):
                found[is_compiled].append(op)
            inside = is_compiled or (COMPILED in op.node_def.attr and op.get_attr(COMPILED))
            for attribute in op.node_def.attr.values():
                name = attribute.func.name
                if name and (name, inside) not in called:
                    called.add((name, inside))
                    function = _function(op.graph, name)
                    if op.type in LOOPS:
                        _note_constants(op, function)
                    walk(_ahead_of([t.op for t in function.outputs] + list(function.control_outputs)), inside)

    walk(_ahead_of([t.op for t in fetches]), False)
    return found


def _ahead_of(operations):
    """These operations and all that they need."""
    found, waiting = dict.fromkeys(operations), list(operations)
    while waiting:
        op = waiting.pop()
        needed = [t.op for t in op.inputs] + list(op.control_inputs)
        waiting += (new := [other for other in dict.fromkeys(needed) if other not in found])
        found.update(dict.fromkeys(new))
    return list(found)


def _function(graph, name):
    """The FuncGraph of a function that a graph calls, which it or one around it holds."""
    while name not in graph._functions:
        graph = graph.outer_graph
    return graph._functions[name].graph


def _taken_on_host(op, kernel):
    """The inputs that are no constants and that a kernel takes from host memory."""
    found, rest = [], list(op.inputs)
    if op.type in LOOPS + BRANCHES:  # of which TensorFlow makes a Switch for each tensor
        found = [t for t in op.inputs if _is_carried_on_host(t.dtype)]
    for argument in () if found else op.op_def.input_arg:
        n = 1
        if argument.number_attr:
            n = op.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            n = len(op.get_attr(argument.type_list_attr))
        if argument.name in kernel.host_memory_arg:
            found += rest[:n]
        rest = rest[n:]
    return [t for t in found if not _is_constant(t.op)]


def _note_constants(loop, body):
    """Marks those of a loop's variables that are constants, in a function that it calls."""
    for outer, inner, after in zip(loop.inputs, body.inputs, body.outputs):
        if inner is after and _is_constant(outer.op):
            _constants.add(inner.op)


_constants = set()  # placeholders that stand for one


@functools.cache
def _is_constant(op):
    """Whether it gives the same in every run."""
    if op.type == "Const" or op in _constants:
        return True
    return bool(op.inputs) and not op.op_def.is_stateful and all(_is_constant(t.op) for t in op.inputs)


@functools.cache
def _is_carried_on_host(dtype):
    kernels = [k for k in _registered("Switch") if k.device_type in ("GPU", "DEFAULT") and _takes(k, {"T": [dtype]})]
    return all("data" in k.host_memory_arg for k in kernels)


def _kernel(op, device_type):
    """The kernel of a device type that serves an operation's dtypes, or None."""
    types = {}
    for name, value in op.node_def.attr.items():
        found = [value.type] if value.HasField("type") else list(value.list.type)
        types[name] = [tf.as_dtype(t) for t in found]
    kernels = [k for k in _registered(op.type) if k.device_type == device_type and _takes(k, types)]
    return max(kernels, key=lambda k: k.priority, default=None)


def _takes(kernel, types):
    """Whether it serves {attribute: its dtypes}."""
    return all(
        {t.as_datatype_enum for t in types[c.name]} <= set(c.allowed_values.list.type) for c in kernel.constraint
    )


@functools.cache
def _registered(op_type):
    from tensorflow.python.framework import kernels

    return list(kernels.get_registered_kernels_for_op(op_type).kernel)


def _finding(op, tensors):
    return Finding(op.type, tuple(map(_shown, tensors)))


def _shown(tensor):
    shape = "?" if tensor.shape.rank is None else ",".join("?" if n is None else str(n) for n in tensor.shape.as_list())
    return f"{tensor.dtype.name}[{shape}]"
