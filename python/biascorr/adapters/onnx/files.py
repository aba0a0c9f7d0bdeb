"""ONNX models in and out of files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import helper
from onnx.checker import ValidationError
from onnx.external_data_helper import ExternalDataInfo, convert_model_to_external_data, load_external_data_for_tensor

_PACKED = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
"""Bits of types that ONNX stores several of in a byte."""

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may have; beyond, tensors go to a file beside the model."""


def load(model: Any, name: str) -> onnx.ModelProto:
    """A copy of a model with all its tensors in memory.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        The model; external data is read from the folder of a path.
    name : str
        What errors call it.

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
        return _with_data(loaded, None, name)
    if isinstance(model, (bytes, bytearray)):
        return _with_data(_parse(bytes(model), name), None, name)
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"{name}: {type(model).__name__}, expected a path, bytes or an onnx.ModelProto")
    path = Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    return _with_data(_parse(path.read_bytes(), f"{name}: {path}"), path.parent, f"{name}: {path}")


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ValueError(f"{name}: not an ONNX model, or a truncated one") from None
    if not model.graph.node and not model.graph.output:
        raise ValueError(f"{name}: not an ONNX model: it has no graph")
    return model


def _with_data(model: onnx.ModelProto, folder: Path | None, name: str) -> onnx.ModelProto:
    external = [tensor for tensor in _tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        return model
    if folder is None:
        raise ValueError(f"{name}: tensor {external[0].name} is in an external file; give the path of the model")
    for tensor in external:
        try:
            _check_location(tensor, folder)
            load_external_data_for_tensor(tensor, str(folder))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: tensor {tensor.name}: {error}") from None
        except (ValueError, ValidationError) as error:
            raise ValueError(f"{name}: tensor {tensor.name}: {error}") from None
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def _check_location(tensor: onnx.TensorProto, folder: Path) -> None:
    info = ExternalDataInfo(tensor)
    file = (folder / info.location).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"external data {info.location} is outside the model's folder")
    if not file.is_file():
        raise FileNotFoundError(f"external data {info.location} is missing")
    size, length = _bytes_of(tensor), info.length
    if length is not None and length != size:
        raise ValueError(f"external data {info.location} has {length} bytes for it, expected {size}")
    if (info.offset or 0) + size > file.stat().st_size:
        raise ValueError(f"external data {info.location} is truncated")


def _bytes_of(tensor: onnx.TensorProto) -> int:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    bits = _PACKED.get(dtype.name, 8 * dtype.itemsize)
    return int(-(-math.prod(tensor.dims) * bits // 8))


def save(model: onnx.ModelProto, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a model, whole or not at all; a model over 2 GB with its tensors in `<path>.data` beside it.

    Raises
    ------
    FileExistsError
        The file exists and `force` is not set.
    OSError
        It cannot be written; nothing is left behind.
    """
    path = Path(path)
    if fits_in_a_message(model):
        with _whole_file(path, force) as temporary:
            temporary.write_bytes(model.SerializeToString())
        return
    data = path.with_name(path.name + ".data")
    with (
        _whole_file(path, force) as temporary,
        _whole_file(data, force) as temporary_data,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".biascorr-") as folder,
    ):
        write_with_external_data(model, Path(folder) / path.name)
        (Path(folder) / data.name).replace(temporary_data)
        (Path(folder) / path.name).replace(temporary)


def fits_in_a_message(model: onnx.ModelProto) -> bool:
    """Whether protobuf can write the model in one piece."""
    try:
        return bool(model.ByteSize() <= PROTOBUF_LIMIT)
    except EncodeError:
        return False


def write_with_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model whose tensors go to `<path>.data`; both are overwritten."""
    external = onnx.ModelProto()
    external.CopyFrom(model)
    convert_model_to_external_data(external, location=f"{path.name}.data", convert_attribute=True)
    onnx.save(external, path)


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
