"""Reads the text of compiled programs: what is a kernel, in which loops and branches, what travels between cores."""

import collections
import re
import typing

import numpy as np


class Collective(typing.NamedTuple):
    """One collective of a compiled program, as one core runs it."""

    opcode: str
    dtype: str  # XLA's name: "f32", "s32"
    shape: tuple
    bytes: int
    loops: int  # how many while bodies it stands in
    branches: int  # how many branches, of which not all are taken, it stands in
    source: str  # the TensorFlow operation that it was made from


class Kernel(typing.NamedTuple):
    """An instruction outside of fusions that makes an array, but for collectives."""

    cycles: int | None  # None where the compiler gives none
    opcode: str
    loops: int
    branches: int
    source: str


class OneByOne(typing.NamedTuple):
    """An operation that a TPU runs entry by entry, alone or in a fusion."""

    opcode: str  # "scatter", "sort", "gather", or the target of a custom call
    entries: int  # entries that are sorted; slices that are gathered, or scattered
    loops: int
    branches: int
    source: str


# What moves no data by itself, and copies that go on beside other work.
_NO_KERNEL = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all opt-barrier partition-id "
    "replica-id copy-start copy-done slice-start slice-done async-start async-update async-done".split()
)
_COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
_COLLECTIVE = re.compile(rf"(?:ragged-)?({_COLLECTIVES})(?:-start)?$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?[\]})]) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]+m[0-9]+\w*)?)\[([0-9,]*)\]")


def computations(text):
    """({computation: lines of its instructions}, the name of the entry)."""
    found, entry, lines = {}, None, None
    for line in text.splitlines():
        begin = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if begin:
            lines = found.setdefault(begin.group(2), [])
            entry = begin.group(2) if begin.group(1) else entry
        elif lines is not None:
            lines.append(line)
    return found, entry


def instructions(text, into_fusions=False):
    """Yields (opcode, its type, line, loops, branches) of all that the entry reaches.

    What a fusion or an asynchronous instruction calls is one kernel, and left out but for `into_fusions`.
    """
    found, entry = computations(text)
    depth, waiting = {entry: (0, 0)}, collections.deque([entry])
    while waiting:  # XLA has no recursion
        name = waiting.popleft()
        loops, branches = depth[name]
        for line in found.get(name, []):
            if re.search(r" (fusion|async-(start|update|done))\(", line) and not into_fusions:
                continue
            for role, called in _CALLED.findall(line):
                inner = loops + (role in ("body", "condition")), branches + ("_computation" in role)
                for callee in re.findall(r"[\w.-]+", called):
                    known = depth.get(callee, (-1, -1))
                    deepest = max(known[0], inner[0]), max(known[1], inner[1])
                    if deepest != known:
                        depth[callee] = deepest
                        waiting.append(callee)
    for name, place in depth.items():
        for line in found.get(name, []):
            parts = _INSTRUCTION.match(line)
            if parts:
                yield parts.group(3), parts.group(2), line, *place


def collectives(text):
    """Yields a `Collective` for each array that one moves, in no set order."""
    for opcode, kind, line, loops, branches in instructions(text, into_fusions=True):
        found = _COLLECTIVE.match(opcode)
        for dtype, shape in arrays(kind) if found else ():
            size = int(np.prod(shape, dtype=np.int64)) * _item_size(dtype)
            yield Collective(found.group(1), dtype, shape, size, loops, branches, _source(line))


def kernels(text):
    """Yields each `Kernel` of a program that was compiled for a TPU."""
    for opcode, kind, line, loops, branches in instructions(text):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles:
            yield Kernel(int(cycles.group(1)), opcode, loops, branches, _source(line))
        elif opcode not in _NO_KERNEL and not _is_collective(opcode) and "AllocateBuffer" not in line:
            if any(shape for _, shape in arrays(kind)):  # others are single numbers, for the scalar unit
                yield Kernel(None, opcode, loops, branches, _source(line))


def one_by_one(text):
    """Yields each `OneByOne` of a program that was compiled for a TPU."""
    for opcode, kind, line, loops, branches in instructions(text, into_fusions=True):
        shape = (arrays(kind) or [("", ())])[0][1]
        entries = int(np.prod(shape, dtype=np.int64))
        place = loops, branches, _source(line)
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if opcode == "sort":
            yield OneByOne("sort", entries, *place)
        elif opcode == "gather":
            sizes = re.search(r"slice_sizes=\{([0-9,]*)\}", line).group(1)
            yield OneByOne("gather", entries // int(np.prod([int(n) for n in sizes.split(",") if n])), *place)
        elif opcode == "scatter":
            yield OneByOne("scatter", _scattered(text, line), *place)
        elif target and re.search("topk|sort", target.group(1), re.IGNORECASE):
            yield OneByOne(target.group(1), entries, *place)


def _scattered(text, line):
    """How many slices a scatter of n arrays writes: its operands are n arrays, the indices, n updates."""
    operands = re.findall(r"[\w.-]+", re.search(r" scatter\(([^)]*)\)", line).group(1))
    update = operands[-1]
    kind = re.search(rf"%?{re.escape(update)} = ([^=]*?)(?: [a-z-]+)\(", text).group(1)
    size = int(np.prod(arrays(kind)[0][1], dtype=np.int64))
    window = re.search(r"update_window_dims=\{([0-9,]*)\}", line).group(1)
    shape = arrays(kind)[0][1]
    return size // int(np.prod([shape[int(d)] for d in window.split(",") if d], dtype=np.int64))


def arrays(kind):
    """[(dtype, shape), …] of an array's or a tuple's type."""
    return [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in _ARRAY.findall(kind)]


def _is_collective(opcode):
    return re.match(rf"(?:ragged-)?(?:{_COLLECTIVES})(?:-start|-done)?$", opcode)


def _source(line):
    source = re.search(r'op_name="([^"]*)"', line)
    return source.group(1) if source else ""


def _item_size(dtype):
    """Bytes of XLA's "f32", "bf16", "pred" …"""
    return 1 if dtype == "pred" else int(re.search(r"[0-9]+", dtype).group()) // 8
