"""Serialized models taken apart without protobuf, which copies large values several times: the model without them, and these.

    ModelProto.graph = 7        GraphProto.initializer = 5        TensorProto.raw_data = 9

Source: onnx.proto, and the encoding at protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9

Bytes: TypeAlias = memoryview | bytes


class _Field(NamedTuple):
    """A field of a message: its number, whether it has a length, where it starts, and where its value starts and ends."""

    number: int
    is_long: bool
    at: int
    start: int
    stop: int


def without_values(data: memoryview, least: int) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The serialized model without the raw data of initializers of so many bytes and more; where each of these starts and ends.

    Raises ValueError where it is no model, or one that is serialized in an unusual way.
    """
    found = [field for field in _fields(data, 0, len(data)) if field.number == _GRAPH]
    if len(found) != 1 or not found[0].is_long:
        raise ValueError("not one graph")
    graph, places, count = found[0], dict[int, tuple[int, int]](), 0
    pieces, kept = list[Bytes](), graph.start
    for tensor in _fields(data, graph.start, graph.stop):
        if tensor.number != _INITIALIZER:
            continue
        raw = [field for field in _fields(data, tensor.start, tensor.stop) if field.number == _RAW_DATA]
        if len(raw) == 1 and raw[0].is_long and raw[0].stop - raw[0].start >= least:
            places[count] = raw[0].start, raw[0].stop
            rest = [data[tensor.start : raw[0].at], data[raw[0].stop : tensor.stop]]
            pieces += [data[kept : tensor.at], *_message(_INITIALIZER, rest)]
            kept = tensor.stop
        count += 1
    pieces.append(data[kept : graph.stop])
    return b"".join([data[: graph.at], *_message(_GRAPH, pieces), data[graph.stop :]]), places


def _message(number: int, pieces: Sequence[Bytes]) -> list[Bytes]:
    return [_encoded(number << 3 | 2), _encoded(sum(map(len, pieces))), *pieces]


def _fields(data: memoryview, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        tag, start = _varint(data, at, end)
        kind, stop = tag & 7, start
        if kind == 2:
            size, start = _varint(data, start, end)
            stop = start + size
        elif kind == 0:
            _, stop = _varint(data, start, end)
        elif kind in (1, 5):
            stop = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if stop > end:
            raise ValueError("truncated")
        yield _Field(tag >> 3, kind == 2, at, start, stop)
        at = stop


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for k in range(min(10, end - at)):
        byte = data[at + k]
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, at + k + 1
    raise ValueError("truncated")


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
