"""The index of a TensorFlow checkpoint, checked before TensorFlow reads it.

TensorFlow's reader aborts the process if a shape in the index is invalid. The format is LevelDB's table
(github.com/google/leveldb, doc/table_format.md) of BundleEntryProto by tensor name.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_MOST_DIMS = 8
_LONGEST_NAME = 4096  # bytes; without a bound, a million names that share a million bytes would take hours


def check_index(path: Path) -> None:
    """Raises ValueError or LookupError for an index that would crash TensorFlow."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto

    for name, value in entries(path.read_bytes()):
        if not name:  # the header
            continue
        try:
            entry = BundleEntryProto.FromString(value)
        except DecodeError as e:
            raise ValueError(str(e)) from None
        sizes = [dim.size for dim in entry.shape.dim]
        extents = [n for s in entry.slices for extent in s.extent for n in (extent.start, extent.length)]
        if len(sizes) > _MOST_DIMS or min([*sizes, *extents, 0]) < 0 or math.prod(max(n, 1) for n in sizes) >= 2**60:
            raise ValueError(f"the shape of {name.decode(errors='replace')} is {sizes}")


def entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of each entry of a table, in order; all are bytes."""
    footer = table[-_FOOTER_BYTES:]
    if len(table) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:]) != (_MAGIC,):
        raise ValueError("it is not a TensorFlow table")
    end = 0
    for _, handle in _block(table, *_numbers(footer, 4)[2:4]):
        begin, size = _numbers(handle, 2)[:2]
        if begin < end:  # naming one block many times would take forever
            raise ValueError("its blocks overlap")
        yield from _block(table, begin, size)
        end = begin + size


def _block(table: bytes, begin: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of each entry of a block. A key is stored without the prefix that it shares with the one before.

    At the block's restarts keys are stored whole. TensorFlow starts reading there, so they must be at entries.
    """
    block = table[begin : begin + size]
    if len(block) < max(size, 4) or table[begin + size] != 0:
        raise ValueError("one of its blocks is cut short or compressed")
    (n_restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (n_restarts + 1)
    if end < 0:
        raise ValueError("one of its blocks is cut short")
    first, *restarts = struct.unpack(f"<{n_restarts}I", block[end:-4]) or (0,)
    block, starts = block[:end], set()
    at, key = 0, b""
    while at < len(block):
        begin_of_entry = at
        shared, own, length, at = _numbers(block, 3, at)
        if shared > len(key) or shared + own > _LONGEST_NAME:
            raise ValueError(f"one of its names has {shared + own} bytes")
        if not shared:
            starts.add(begin_of_entry)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length
    if first != 0 or not starts.issuperset(restarts):
        raise ValueError("one of its blocks has a restart inside an entry")


def _numbers(data: bytes, count: int, at: int = 0) -> list[int]:
    """`count` numbers of seven bits a byte, least significant first, followed by the position after them."""
    numbers = []
    for _ in range(count):
        number = 0
        for shift in range(0, 70, 7):
            number |= (data[at] & 127) << shift
            at += 1
            if data[at - 1] < 128:
                break
        else:
            raise ValueError("one of its numbers has no end")
        numbers.append(number)
    return [*numbers, at]
