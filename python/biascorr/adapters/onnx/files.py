"""ONNX models in and out of files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo

from biascorr.adapters.onnx.tensors import LARGE, Values, attach, bytes_of, detach, key_of, main_tensors, raw_of, whole_model

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may have; beyond, tensors go to a file beside the model."""

_ALIGNMENT = 4096
"""Alignment of tensors in a file beside the model, so that they can be mapped into memory as they are."""


def load(model: Any, name: str) -> tuple[onnx.ModelProto, Values]:
    """A copy of a model, and the values of its large tensors, those of external data where they lie in their file.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        The model; external data is read from the folder of a path.
    name : str
        The name that errors give it.

    Raises
    ------
    FileNotFoundError
        The file or its external data is missing.
    TypeError
        It is none of the above.
    ValueError
        It is not an ONNX model, or its external data is outside its folder or too short.
    """
    if isinstance(model, onnx.ModelProto):
        loaded = onnx.ModelProto()
        loaded.CopyFrom(model)
        return _detached(loaded, None, name)
    if isinstance(model, (bytes, bytearray)):
        return _detached(_parse(bytes(model), name), None, name)
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"{name}: {type(model).__name__}, expected a path, bytes or an onnx.ModelProto")
    path = Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    return _detached(_parse(path.read_bytes(), f"{name}: {path}"), path.parent, f"{name}: {path}")


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ValueError(f"{name}: not an ONNX model, or a truncated one") from None
    if not model.graph.node and not model.graph.output:
        raise ValueError(f"{name}: not an ONNX model: it has no graph")
    return model


def _detached(model: onnx.ModelProto, folder: Path | None, name: str) -> tuple[onnx.ModelProto, Values]:
    values = Values()
    _read_external(model, folder, name, values)
    detach(model, values)
    light = onnx.ModelProto()
    light.CopyFrom(model)  # protobuf frees what was detached with the model that it was in
    return light, values


def _read_external(model: onnx.ModelProto, folder: Path | None, name: str, values: Values) -> None:
    """Attaches what is in files beside the model: large tensors where they lie, small ones and those of subgraphs as copies."""
    main = {id(tensor): tensor for tensor in main_tensors(model.graph)}
    files: dict[Path, NDArray[np.uint8]] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if folder is None:
            raise ValueError(f"{name}: tensor {tensor.name} is in an external file; give the path of the model")
        try:
            raw = _external_bytes(tensor, folder, files, values)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: tensor {tensor.name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: tensor {tensor.name}: {error}") from None
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        if id(tensor) in main and raw.size >= LARGE:
            attach(tensor, raw, values)
        else:
            tensor.raw_data = raw.tobytes()


def _external_bytes(
    tensor: onnx.TensorProto, folder: Path, files: dict[Path, NDArray[np.uint8]], values: Values
) -> NDArray[np.uint8]:
    """The values of a tensor in its file, which is mapped into memory."""
    file, offset = _located(tensor, folder)
    size = bytes_of(tensor)
    if size and file not in files:
        files[file] = values.map(file)
    return files[file][offset : offset + size] if size else np.zeros(0, np.uint8)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def _located(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int]:
    """The file that has the values of a tensor, and where they start in it."""
    info = ExternalDataInfo(tensor)
    file = (folder / info.location).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"external data {info.location} is outside the model's folder")
    if not file.is_file():
        raise FileNotFoundError(f"external data {info.location} is missing")
    size, length, offset = bytes_of(tensor), info.length, info.offset or 0
    if length is not None and length != size:
        raise ValueError(f"external data {info.location} has {length} bytes for it, expected {size}")
    if offset < 0 or offset + size > file.stat().st_size:
        raise ValueError(f"external data {info.location} is truncated")
    return file, offset


def save(model: onnx.ModelProto, values: Values, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a model, whole or not at all; a model over 2 GB with its tensors in `<path>.data` beside it.

    Raises
    ------
    FileExistsError
        The file exists and `force` is not set.
    OSError
        It cannot be written; nothing is left of it.
    """
    path = Path(path)
    if _fits_in_a_message(model):
        with _whole_file(path, force) as temporary:
            temporary.write_bytes(whole_model(model, values).SerializeToString())
        return
    external, values = onnx.ModelProto(), Values(values)
    external.CopyFrom(model)
    detach(external, values)
    data = path.with_name(path.name + ".data")
    with _whole_file(path, force) as temporary, _whole_file(data, force) as temporary_data:
        _write_values(external, values, temporary_data, data.name)
        light = onnx.ModelProto()
        light.CopyFrom(external)
        temporary.write_bytes(light.SerializeToString())


def _fits_in_a_message(model: onnx.ModelProto) -> bool:
    """Whether protobuf can write the model with its values in one piece."""
    detached = sum(bytes_of(tensor) for tensor in main_tensors(model.graph) if key_of(tensor) is not None)
    try:
        return bool(model.ByteSize() + detached <= PROTOBUF_LIMIT)
    except EncodeError:
        return False


def _write_values(model: onnx.ModelProto, values: Values, path: Path, location: str) -> None:
    """Writes the values of detached tensors to a file, which the model calls by its location from then on."""
    with path.open("wb") as file:
        for tensor in main_tensors(model.graph):
            if key_of(tensor) is None:
                continue
            raw = raw_of(tensor, values)
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            entries = {"location": location, "offset": str(file.tell()), "length": str(raw.nbytes)}
            del tensor.external_data[:]
            tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items())
            file.write(raw.data)  # unlike `tofile`, says so where the disk is full


@contextlib.contextmanager
def _whole_file(path: Path, force: bool) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    if path.exists() and not force:
        raise _existing(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        if force:
            temporary.replace(path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Unlike a rename, fails where somebody else was faster; where files cannot be linked, a rename has to do."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise _existing(path) from None
    except OSError:
        if path.exists():
            raise _existing(path) from None
        temporary.replace(path)


def _existing(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; it is only overwritten when forced")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
