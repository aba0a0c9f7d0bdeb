"""TFLite files: read and checked before LiteRT sees them, written whole or not at all."""

from __future__ import annotations

import bisect
import contextlib
import copy
import hashlib
import io
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from biascorr.adapters.frameworks import IDENTIFIER, Framework, check_suffix
from biascorr.adapters.tflite.tensors import bytes_of, dtype_of, grid_of, indices, name_of, scales_of_blocks, shape_of
from biascorr.whole_file import kind_of, whole_file

LIMIT = 2**31
"""Offsets in a flatbuffer have 32 bits, one of them the sign."""

_ALIGNMENT = 16
"""Bytes that the schema aligns buffers to, which the generated code does not."""

PROVENANCE = "biascorr.json"
"""The file that says how a model was made, in the archive of associated files that the format allows behind a model."""

DAMAGED = (
    AssertionError, AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError, struct.error
)  # fmt: skip
"""What is raised, by the generated code too, at files that are cut off or changed."""


def load(model: Any, name: str) -> tuple[bytes, Any]:
    """The bytes of a model, given by its path or themselves, and what is in them, which is valid.

    Raises
    ------
    FileNotFoundError
        The file is missing.
    OSError
        It is no file.
    TypeError
        It is neither bytes nor a path.
    ValueError
        It is damaged, or too large.
    """
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        name = f"{name}: {path}"
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such file")
        if not path.is_file():
            raise OSError(f"{name}: {kind_of(path)}")
        size = path.stat().st_size
    else:
        path, size = None, len(model)
    if size >= LIMIT:
        raise ValueError(f"{name}: {size} bytes, expected less than 2 GB, which is what a flatbuffer can have")
    content = bytes(model) if path is None else path.read_bytes()
    if content[4:8] != IDENTIFIER:
        raise ValueError(f"{name}: no TFLite model, which has {IDENTIFIER.decode()} at its bytes 4 to 8; is the file whole?")
    try:
        if _has_repeated_tables(content):
            raise ValueError("its tables are in it more than once")
        parsed = schema.ModelT.InitFromPackedBuf(_Bounded(content), 0)
        for buffer, raw in zip(parsed.buffers or [], _buffers(parsed, content)):
            buffer.data = raw
        found = next(_errors(parsed), None) or _join_buffers(parsed, content)
    except DAMAGED as error:
        raise ValueError(
            f"{name}: a damaged or truncated TFLite file of {len(content)} bytes, copy or convert it again: {error}"
        ) from error
    if found:
        raise ValueError(f"{name}: a damaged TFLite file: {found}")
    return content, parsed


def _has_repeated_tables(content: bytes) -> bool:
    """Whether vectors have more entries, of 4 bytes each, than the file has room for: then reading it has hardly an end."""
    model, room = schema.Model.GetRootAs(_Bounded(content), 0), len(content) // 4
    graphs = [model.Subgraphs(k) for k in range(model.SubgraphsLength())]
    signatures = [model.SignatureDefs(k) for k in range(model.SignatureDefsLength())]
    entries = sum(each.TensorsLength() + each.OperatorsLength() for each in graphs)
    entries += sum(each.InputsLength() + each.OutputsLength() for each in signatures)
    if entries > room:
        return True
    sparsities = (each.Tensors(k).Sparsity() for each in graphs for k in range(each.TensorsLength()))
    return bool(entries + sum(each.DimMetadataLength() for each in sparsities if each is not None) > room)


def _buffers(model: Any, content: bytes) -> list[NDArray[np.uint8] | None]:
    """The bytes of each buffer, some of which lie behind the flatbuffer."""
    found: list[NDArray[np.uint8] | None] = []
    for buffer in model.buffers or []:
        raw = buffer.data
        if raw is None or not len(raw):
            raw = None
            if buffer.offset > 1 and buffer.size:  # 0: none; 1: in a file of its own
                if buffer.offset + buffer.size > len(content):
                    raise ValueError(f"buffer {len(found)} ends at byte {buffer.offset + buffer.size} of {len(content)}")
                raw = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
        found.append(raw)
    return found


def _join_buffers(model: Any, content: bytes) -> str | None:
    """Lets all that has the same bytes of the file be in one buffer; an error where buffers overlap otherwise."""
    first: dict[tuple[int, int], int] = {}
    joined = {
        index: first.setdefault((place_of(content, index), len(buffer.data)), index)
        for index, buffer in enumerate(model.buffers or [])
        if buffer.data is not None
    }
    tensors = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors or []]
    for each in (*tensors, *(model.metadata or [])):
        each.buffer = joined.get(each.buffer, each.buffer)
    places = sorted(first)
    overlaps = (following for (start, size), (following, _) in itertools.pairwise(places) if start + size > following)
    return next((f"two buffers have the byte {place}" for place in overlaps), None)


def _errors(model: Any) -> Iterator[str]:
    """What LiteRT must not meet."""
    if not model.subgraphs:
        yield "it has no subgraph"
    for subgraph in model.subgraphs or []:
        yield from _errors_in_tensors(subgraph, model.buffers or [])
        yield from _errors_in_operators(subgraph, model)
    for signature in model.signatureDefs or []:
        if not 0 <= signature.subgraphIndex < len(model.subgraphs):
            yield f"signature {_text(signature.signatureKey)}: subgraph {signature.subgraphIndex} of {len(model.subgraphs)}"
            continue
        count = len(model.subgraphs[signature.subgraphIndex].tensors or [])
        for each in (*(signature.inputs or []), *(signature.outputs or [])):
            if each.name is None or not 0 <= each.tensorIndex < count:
                yield f"signature {_text(signature.signatureKey)}: tensor {each.tensorIndex} of {count}"


def _text(name: bytes | None) -> str:
    return (name or b"").decode(errors="backslashreplace")


def _errors_in_tensors(subgraph: Any, buffers: Sequence[Any]) -> Iterator[str]:
    for index, tensor in enumerate(subgraph.tensors or []):
        name, shape = f"tensor {index} ({name_of(tensor)})", shape_of(tensor)
        if any(size < 0 for size in shape):
            yield f"{name} has shape {shape}"
            continue
        if not 0 <= tensor.buffer < max(1, len(buffers)):
            yield f"{name} is in buffer {tensor.buffer} of {len(buffers)}"
            continue
        size, raw = bytes_of(tensor), buffers[tensor.buffer].data if buffers else None
        if size is not None and size >= LIMIT:
            yield f"{name} of shape {shape} would take {size} bytes"
        if raw is not None and size is not None and tensor.sparsity is None and len(raw) != size:
            yield f"{name} of shape {shape} has {len(raw)} bytes, expected {size}"
        yield from (f"{name} {error}" for error in _errors_in_grid(tensor, shape))
        if any(scales >= len(subgraph.tensors) for scales in scales_of_blocks(tensor)):
            yield f"{name} has scales in a tensor that is none of {len(subgraph.tensors)}"


def _errors_in_grid(tensor: Any, shape: tuple[int, ...]) -> Iterator[str]:
    scales, zeros = (
        (0, 0) if tensor.quantization is None else map(_length, (tensor.quantization.scale, tensor.quantization.zeroPoint))
    )
    if scales and zeros not in (0, 1, scales):
        yield f"has {scales} scales and {zeros} zero points"
        return
    grid = grid_of(tensor)
    if grid is None:
        return
    if not (np.isfinite(grid.scale).all() and (grid.scale >= 0).all()):
        yield "has a scale that is negative or not finite"
    limits = np.iinfo(dtype_of(tensor) or np.int64)
    if ((grid.zero_point < limits.min) | (grid.zero_point > limits.max)).any():
        yield f"has a zero point that is no {limits.dtype}"
    if len(grid.scale) > 1 and not (0 <= grid.axis < len(shape) and shape[grid.axis] == len(grid.scale)):
        yield f"of shape {shape} has {len(grid.scale)} scales along axis {grid.axis}"


def _length(vector: Any) -> int:
    return 0 if vector is None else len(vector)


def _errors_in_operators(subgraph: Any, model: Any) -> Iterator[str]:
    count, codes = len(subgraph.tensors or []), model.operatorCodes or []
    ends = [*indices(subgraph.inputs), *indices(subgraph.outputs)]
    if any(not 0 <= index < count for index in ends):
        yield f"an input or output of subgraph {_text(subgraph.name)} is none of its {count} tensors"
        return
    made: dict[int, int] = dict.fromkeys(indices(subgraph.inputs), -1)
    all_made = {index for operator in subgraph.operators or [] for index in indices(operator.outputs)}
    for position, operator in enumerate(subgraph.operators or []):
        inputs, outputs = indices(operator.inputs), indices(operator.outputs)
        if not 0 <= operator.opcodeIndex < len(codes):
            yield f"operator {position} has code {operator.opcodeIndex} of {len(codes)}"
        inner = indices(operator.intermediates)
        if any(not -1 <= index < count for index in inputs) or any(not 0 <= index < count for index in (*outputs, *inner)):
            yield f"operator {position} reads or makes tensors that are none of {count}"
            continue
        late = [index for index in inputs if index in all_made and index not in made]
        if late:
            yield f"operator {position} reads tensor {late[0]} before it is made"
        is_twice = len(set(outputs)) < len(outputs) or not made.keys().isdisjoint(outputs)
        if is_twice or any(_is_constant(subgraph.tensors[index], model) for index in outputs):
            yield f"operator {position} makes a tensor that is there already"
        made.update(dict.fromkeys(outputs, position))
    for index in indices(subgraph.outputs):
        tensor = subgraph.tensors[index]
        if index not in made and not tensor.isVariable and not _is_constant(tensor, model):
            yield f"output {index} ({name_of(tensor)}) of subgraph {_text(subgraph.name)} is made by nothing"


def _is_constant(tensor: Any, model: Any) -> bool:
    return bool(model.buffers) and _length(model.buffers[tensor.buffer].data) > 0


class _AlignedBuffer(schema.BufferT):  # type: ignore[misc]
    """A buffer whose data is aligned as the schema asks for."""

    def Pack(self, builder: Any) -> Any:  # noqa: N802  (of the generated code)
        data = None
        if self.data is not None and len(self.data):
            raw = np.ascontiguousarray(self.data).view(np.uint8).reshape(-1)
            builder.StartVector(1, len(raw), _ALIGNMENT)
            builder.head = builder.head - len(raw)
            builder.Bytes[builder.head : builder.head + len(raw)] = raw.data
            data = builder.EndVector()
        schema.BufferStart(builder)
        if data is not None:
            schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


def packed(model: Any) -> bytes:
    """A model as a flatbuffer. Raises ValueError where it would have 2 GB."""
    size = sum(len(buffer.data) + 2 * _ALIGNMENT for buffer in model.buffers if buffer.data is not None)
    if size >= LIMIT:
        raise ValueError(f"the model would take {size} bytes, expected less than 2 GB, which is what a flatbuffer can have")
    buffers = [_AlignedBuffer(buffer.data) for buffer in model.buffers]
    return _finished(model, buffers, size)


def packed_in_front(model: Any) -> bytes:
    """A model as a flatbuffer with its buffers behind it, which takes no memory but for the result, and less time."""
    sizes = [0 if buffer.data is None else len(buffer.data) for buffer in model.buffers]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])

    def front(length: int) -> bytes:
        return _finished(model, [_behind(length + start, size) for start, size in zip(starts.tolist(), sizes)])

    length = -(-len(front(1 << 30)) // _ALIGNMENT) * _ALIGNMENT  # offsets take the same room, whatever they are
    parts: list[Any] = [front(length).ljust(length, b"\0")]
    for buffer, size in zip(model.buffers, sizes):
        parts += [memoryview(buffer.data), bytes(-size % _ALIGNMENT)] if size else []
    return b"".join(parts)


def _behind(start: int, size: int) -> Any:
    """A buffer of so many bytes behind the flatbuffer."""
    return schema.BufferT(None, start, size) if size else schema.BufferT()


def _finished(model: Any, buffers: Sequence[Any], size: int = 0) -> bytes:
    made = copy.copy(model)
    made.buffers = list(buffers)
    builder = flatbuffers.Builder(size + (1 << 16))
    builder.Finish(made.Pack(builder), IDENTIFIER)
    return bytes(memoryview(builder.Bytes)[builder.Head() :])


def save(content: bytes, path: str | os.PathLike[str], *, force: bool = False, provenance: str | None = None) -> None:
    """Writes a file, whole or not at all; raises as :func:`biascorr.whole_file.whole_file`.

    Provenance is put into the archive behind the model, in place of any before; there is one then, if there was none. All other
    bytes stay. Where there is an archive that cannot be read, it has no provenance.
    """
    check_suffix(path, Framework.TFLITE)
    others = None if provenance is None else _archived(content)
    with whole_file(path, force=force) as temporary, temporary.open("wb") as file:
        if provenance is None or others is None:
            file.write(content)
            return
        start, comment, entries = others
        file.write(memoryview(content)[:start])
        with zipfile.ZipFile(file, "w") as archive:  # its entries say where they are in the whole file
            archive.comment = comment
            for entry, data in entries:
                archive.writestr(entry, data)
            archive.writestr(zipfile.ZipInfo(PROVENANCE), provenance)


def digest_of(content: bytes) -> str:
    """SHA-256, in hexadecimal, of a file, and of what is in the archive behind it but for provenance."""
    start, comment, entries = _archived(content) or (len(content), b"", [])
    digest = hashlib.sha256(memoryview(content)[:start])
    for entry, data in entries:
        digest.update(f"{entry.filename!r} {len(data)}:".encode(errors="backslashreplace") + data)
    digest.update(comment)
    return digest.hexdigest()


def _archived(content: bytes) -> tuple[int, bytes, list[tuple[zipfile.ZipInfo, bytes]]] | None:
    """Where the archive behind a model starts, its comment and its files, but for provenance; None where it cannot be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            start = min((entry.header_offset for entry in entries), default=len(content))
            kept = [(entry, archive.read(entry)) for entry in entries if entry.filename != PROVENANCE]
            return start, archive.comment if entries else b"", kept
    except zipfile.BadZipFile:
        return len(content), b"", []
    except _NO_ARCHIVE:
        return None


def place_of(content: bytes, index: int) -> int:
    """Where the bytes of a buffer are in a file."""
    buffer = schema.Model.GetRootAs(content, 0).Buffers(index)
    return int(buffer._tab.Vector(buffer._tab.Offset(4)) if buffer.DataLength() else buffer.Offset())


def with_tail(content: bytes, given: bytes) -> bytes:
    """A file with what is behind the flatbuffer of another one: an archive of labels, or anything else."""
    tail = given[_end_of(given) :]
    if not tail.strip(b"\0"):
        return content
    with contextlib.suppress(*_NO_ARCHIVE):
        return content + _moved_archive(tail, len(content))
    return content + tail


_NO_ARCHIVE = (EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)
"""What is raised at archives that are damaged, or encrypted."""


def _moved_archive(tail: bytes, start: int) -> bytes:
    """An archive whose entries say where they are in a file that it is put behind."""
    made = io.BytesIO()
    made.seek(start)
    with zipfile.ZipFile(io.BytesIO(tail)) as archive:
        entries = archive.infolist()
        made.write(tail[: min((entry.header_offset for entry in entries), default=0)])
        with zipfile.ZipFile(made, "w") as moved:
            moved.comment = archive.comment
            for entry in entries:
                moved.writestr(entry, archive.read(entry))
    return bytes(made.getvalue()[start:])


def _end_of(content: bytes) -> int:
    """Where the flatbuffer ends and what is behind it starts: no shorter part of the file can be read."""
    behind = max((each.offset + each.size for each in schema.ModelT.InitFromPackedBuf(content, 0).buffers or []), default=0)
    last = max(0, len(content) - _ALIGNMENT)
    start = 0 if _is_readable(content, last) else last  # most files have nothing behind
    return max(behind, bisect.bisect_left(range(len(content)), True, start, key=lambda end: _is_readable(content, end)))


def _is_readable(content: bytes, end: int) -> bool:
    try:
        schema.ModelT.InitFromPackedBuf(_Bounded(content[:end]), 0)
    except DAMAGED:
        return False
    return True


class _Bounded(bytes):
    """Bytes that cannot be sliced beyond their end, as others can, so that no text is cut off unnoticed."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.stop is not None and key.stop > len(self):
            raise IndexError(f"byte {key.stop} of {len(self)}")
        return super().__getitem__(key)
