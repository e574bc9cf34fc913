"""The pickle of a PyTorch file, read without running it.

A pickle is a program that builds its content by calling functions by name.
Python's unpickler is not used: even if it may look up no names, a few bytes make
it take all memory (through a large memo index) or crash (by hashing deeply nested
tuples as a key). This reader knows only the instructions and names that tensors
need; any other is an error.
"""

import math
import pickletools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from gpt_neo_sampling._types import Shape
from gpt_neo_sampling.checkpoint.base import CheckpointError

_MOST_DIMS = 64  # PyTorch's
_STORAGES = {  # PyTorch's class: dtype, bytes of an element
    "BFloat16Storage": ("bfloat16", 2),
    "BoolStorage": ("bool", 1),
    "ByteStorage": ("uint8", 1),
    "CharStorage": ("int8", 1),
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "IntStorage": ("int32", 4),
    "LongStorage": ("int64", 8),
    "ShortStorage": ("int16", 2),
}


class Storage(NamedTuple):
    dtype: str
    itemsize: int
    key: str
    size: int  # in elements


class Tensor(NamedTuple):
    storage: Storage
    offset: int  # in elements, and so are the strides
    shape: Shape
    strides: tuple[int, ...]


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of stored elements from a tensor's first to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if all(shape) else 0


def read_pickle(file: IO[bytes], path: Path) -> tuple[Any, set[Storage]]:
    """(content of the pickle at the file's position, the storages that it names).

    The content may be text, numbers, `Tensor`s, lists, tuples, and dicts with keys that
    are text or whole numbers (as in an optimizer's state).

    Args:
      file: open for reading bytes; afterwards at the end of the pickle.
      path: of that file, for messages.

    Raises:
      CheckpointError: for a name that tensors do not need.
      Exception: any, for a damaged pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: set[Storage] = set()

    def pop_to_mark() -> list[Any]:
        begin = marks.pop()
        values = stack[begin:]
        del stack[begin:]
        return values

    def pop(n: int) -> list[Any]:
        values = stack[-n:]
        del stack[-n:]
        return values

    argument: Any
    for instruction, argument, _ in pickletools.genops(file):
        match instruction.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction.name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"T": tuple, "L": list, "D": dict}[instruction.name[6]]())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(instruction.name[-1]))))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = pop_to_mark()
                stack[-1].extend(values)
            case "SETITEM":
                pair = pop(2)
                _set_items(stack[-1], [pair])
            case "SETITEMS":
                values = pop_to_mark()
                _set_items(stack[-1], zip(values[::2], values[1::2]))
            case "GLOBAL":
                module, name = argument.split(" ", 1)
                stack.append(_named(module, name, path))
            case "STACK_GLOBAL":
                module, name = pop(2)
                stack.append(_named(module, name, path))
            case "REDUCE":
                function, arguments = pop(2)
                if function not in _FUNCTIONS.values():
                    raise ValueError("it calls something that is not a function")
                stack.append(function(*arguments))
            case "BUILD":  # attributes of an OrderedDict, which tensors do not need
                stack.pop()
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
                storages.add(stack[-1])
            case other:
                raise ValueError(f"it has the instruction {other}, which tensors do not need")
    (value,) = stack
    return value, storages


def _named(module: Any, name: Any, path: Path) -> Any:
    """The stand-in for a function or class of PyTorch's."""
    if not (isinstance(module, str) and isinstance(name, str)):  # before it is hashed or printed
        raise ValueError("it has a name that is not text")
    if (module, name) in _FUNCTIONS:
        return _FUNCTIONS[module, name]
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    raise CheckpointError(
        f"{path} asks for {module}.{name}, which tensors do not need, and is not run; "
        "allowed: a dict of tensors (if you trust the file, convert it to safetensors)"
    )


def _set_items(target: Any, pairs: Iterable[Any]) -> None:
    for key, value in pairs:
        if not isinstance(target, dict) or type(key) not in (str, int):
            raise ValueError(f"it has a {type(key).__name__} in place of a tensor's name")
        target[key] = value


def _ordered_dict(items: Iterable[Any] = ()) -> dict[str | int, Any]:
    result: dict[str | int, Any] = {}
    _set_items(result, items)
    return result


def _storage(reference: Any) -> Storage:
    kind, storage_type, key, _device, size, *view = reference
    known = kind == "storage" and storage_type in _STORAGES.values()
    if not known or not isinstance(key, str) or not _is_size(size) or any(v is not None for v in view):
        raise ValueError("it has an unknown kind of storage")
    dtype, itemsize = storage_type
    return Storage(dtype, itemsize, key, size)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_gradient_and_hooks: object) -> Tensor:
    is_complete = isinstance(storage, Storage) and len(shape) == len(strides) <= _MOST_DIMS
    if not is_complete or not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("it has a tensor without a storage, offset, shape and strides")
    if offset + span(shape, strides) > storage.size:
        raise ValueError(f"it has a tensor that ends after its storage {storage.key}")
    if math.prod(shape) > storage.size:  # strides of 0 allow any size
        raise ValueError(f"it has a tensor that is larger than its storage {storage.key}")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_gradient_and_hooks: object) -> Any:
    return value


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "Counter"): _first,  # of a dict, as in a learning rate schedule
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
}


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
