"""ONNX models in and out of files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, convert_model_to_external_data, load_external_data_for_model

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
        _check_location(tensor, folder, name)
    load_external_data_for_model(model, str(folder))
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


def _check_location(tensor: onnx.TensorProto, folder: Path, name: str) -> None:
    info = ExternalDataInfo(tensor)
    file = (folder / info.location).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: tensor {tensor.name}: external data {info.location} is outside the model's folder")
    if not file.is_file():
        raise FileNotFoundError(f"{name}: tensor {tensor.name}: external data {info.location} is missing")
    if (info.offset or 0) + (info.length or 0) > file.stat().st_size:
        raise ValueError(f"{name}: tensor {tensor.name}: external data {info.location} is truncated")


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
    if model.ByteSize() <= PROTOBUF_LIMIT:
        with _whole_file(path, force) as temporary:
            temporary.write_bytes(model.SerializeToString())
        return
    data = path.with_name(path.name + ".data")
    external = onnx.ModelProto()
    external.CopyFrom(model)
    convert_model_to_external_data(external, location=data.name)
    with (
        _whole_file(path, force) as temporary,
        _whole_file(data, force) as temporary_data,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".biascorr-") as folder,
    ):
        onnx.save(external, Path(folder) / path.name)
        (Path(folder) / data.name).replace(temporary_data)
        (Path(folder) / path.name).replace(temporary)


@contextlib.contextmanager
def _whole_file(path: Path, force: bool) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; it is only overwritten when forced")
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
            os.link(temporary, path)  # unlike a rename, fails where somebody was faster
    except FileExistsError:
        raise FileExistsError(f"{path} exists; it is only overwritten when forced") from None
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
