"""ONNX models in and out of files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo

from biascorr.adapters.onnx.tensors import (
    LARGE,
    Values,
    attach,
    bytes_of,
    detach,
    is_sound,
    key_of,
    main_tensors,
    raw_of,
    whole_model,
)
from biascorr.adapters.onnx.texts import check_texts
from biascorr.adapters.onnx.wire import without_values
from biascorr.whole_file import check_output, kind_of, mode_of, whole_file

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may have; beyond, tensors go to a file beside the model."""

_ALIGNMENT = 4096
"""Alignment of tensors in a file beside the model, so that they can be mapped into memory as they are."""


PROVENANCE = "biascorr"
"""The key of metadata that says how a model was made."""


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
        raise TypeError(f"{name}: {type(model).__name__}, expected a path, bytes or an onnx.ModelProto, or a keras.Model")
    path = Path(model)
    loaded, arrays = _taken_apart(path, name)
    return _detached(loaded, path, f"{name}: {path}", arrays)


def sizes_by_file(path: Path, name: str) -> dict[Path, int]:
    """The files that a model is in, with the bytes that it has in each: its own one, and those of its external data.

    Raises as :func:`load`.
    """
    sizes = {path: path.stat().st_size if path.is_file() else 0}
    for tensor, file, _ in _external(_from_file(path, name), path, f"{name}: {path}"):
        sizes[file] = sizes.get(file, 0) + bytes_of(tensor)
    return sizes


def _from_file(path: Path, name: str) -> onnx.ModelProto:
    """The model as it is in its file, without its external data."""
    _check_file(path, name)
    return _parse(path.read_bytes(), f"{name}: {path}")


def _check_file(path: Path, name: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    if not path.is_file():
        raise OSError(f"{name}: {path}: {kind_of(path)}")


def _taken_apart(path: Path, name: str) -> tuple[onnx.ModelProto, dict[int, NDArray[np.uint8]]]:
    """As :func:`_from_file`, without the values of large initializers; these, by their indices, copied once.

    A file that is not serialized as usual is read whole, by protobuf.
    """
    _check_file(path, name)
    light, arrays = None, dict[int, NDArray[np.uint8]]()
    with (
        contextlib.suppress(OSError, ValueError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
        contextlib.suppress(ValueError),  # and forgotten, as it keeps parts of the file from being closed
    ):
        light, places = without_values(data, LARGE)
        arrays = {index: np.array(data[start:stop]) for index, (start, stop) in places.items()}
    if light is None:
        return _from_file(path, name), {}
    return _parse(light, f"{name}: {path}"), arrays


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ValueError(f"{name}: not an ONNX model, or a truncated one{_remedy(name)}") from None
    if not model.graph.node and not model.graph.output:
        raise ValueError(f"{name}: not an ONNX model: it has no graph{_remedy(name)}")
    return model


_EXPORTERS = dict.fromkeys((".pt", ".pth", ".pt2", ".safetensors"), "torch.onnx.export") | {".pb": "tf2onnx"}
"""What writes an ONNX model of what is in files with other suffixes."""


def _remedy(name: str) -> str:
    exporter = _EXPORTERS.get(Path(name).suffix.lower())
    return f"; {exporter} makes one" if exporter else ""


def _detached(
    model: onnx.ModelProto, path: Path | None, name: str, arrays: Mapping[int, NDArray[np.uint8]] | None = None
) -> tuple[onnx.ModelProto, Values]:
    """With the values of initializers that are not in the model, by their indices."""
    check_texts(model, name)
    values = Values()
    _read_external(model, path, name, values)
    for index, array in (arrays or {}).items():
        tensor = model.graph.initializer[index]
        if tensor.external_data or not is_sound(tensor, array.size):  # onnxruntime says what is wrong
            tensor.raw_data = array.tobytes()
        else:
            attach(tensor, array, values)
    detach(model, values)
    light = onnx.ModelProto()
    light.CopyFrom(model)  # protobuf frees what was detached with the model that it was in
    return light, values


def _read_external(model: onnx.ModelProto, path: Path | None, name: str, values: Values) -> None:
    """Attaches what is in files beside the model: large tensors where they lie, small ones and inner ones as copies."""
    main = {id(tensor): tensor for tensor in main_tensors(model.graph)}
    files: dict[Path, NDArray[np.uint8]] = {}
    for tensor, file, offset in _external(model, path, name):
        size = bytes_of(tensor)
        if size and file not in files:
            files[file] = values.map(file)
        raw = files[file][offset : offset + size] if size else np.zeros(0, np.uint8)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        if id(tensor) in main and raw.size >= LARGE:
            attach(tensor, raw, values)
        else:
            tensor.raw_data = raw.tobytes()


def _external(model: onnx.ModelProto, path: Path | None, name: str) -> Iterator[tuple[onnx.TensorProto, Path, int]]:
    """The tensors that are in other files, with the file and where they start in it."""
    for tensor in all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if path is None:
            raise ValueError(f"{name}: tensor {tensor.name} is in an external file; give the path of the model")
        label = f"{name}: tensor {tensor.name}"
        try:
            file, offset = _located(tensor, path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{label}: {error}") from None
        except (OSError, RuntimeError) as error:  # a name that is too long, or links that go round in circles
            raise OSError(f"{label}: {getattr(error, 'strerror', None) or error}") from None
        except ValueError as error:
            raise ValueError(f"{label}: {str(error).removeprefix(f'tensor {tensor.name}: ')}") from None
        yield tensor, file, offset


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model: of its graph, of graphs inside, and of its functions."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        if attribute.HasField("sparse_tensor"):
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        yield from attribute.tensors
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors_of_graph(graph)


def _located(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int]:
    """The file that has the values of a tensor, and where they start in it: beside the model, or beside what it is a link to.

    Caches keep models and their data as links into one folder.
    """
    info = _described(tensor)
    folders = list(dict.fromkeys([path.parent.resolve(), path.resolve().parent]))
    places = [(folder / info.location).resolve() for folder in (path.parent, *folders[1:])]
    is_inside = ".." not in Path(info.location).parts and not Path(info.location).is_absolute()
    inside = [place for place in places if is_inside and any(place.is_relative_to(folder) for folder in folders)]
    if not inside:
        raise ValueError(f"external data {info.location} is outside the model's folder")
    file = next((place for place in inside if place.exists()), None)
    if file is None:
        raise FileNotFoundError(f"external data {info.location} is missing")
    if not file.is_file():
        raise OSError(f"external data {info.location}: {kind_of(file)}")
    if tensor.data_type == onnx.TensorProto.STRING or any(size < 0 for size in tensor.dims):
        raise ValueError(f"external data {info.location}: of text, or a negative size, expected an array of numbers")
    size, length, offset = bytes_of(tensor), info.length, info.offset or 0
    if length is not None and length != size:
        raise ValueError(f"external data {info.location} has {length} bytes for it, expected {size}")
    if offset < 0 or offset + size > file.stat().st_size:
        raise ValueError(f"external data {info.location} is truncated")
    return file, offset


def _described(tensor: onnx.TensorProto) -> ExternalDataInfo:
    try:
        return ExternalDataInfo(tensor)
    except ValueError as error:
        raise ValueError(f"external data that is described wrongly: {error}") from None


@contextlib.contextmanager
def with_provenance(model: onnx.ModelProto, text: str | None) -> Iterator[None]:
    """A model has this provenance until the block ends, in place of any other; None: it is as it was.

    Nothing else of it is touched, nor copied, as it may have gigabytes.
    """
    if text is None:
        yield
        return
    before = onnx.ModelProto(metadata_props=model.metadata_props)
    others = [entry for entry in before.metadata_props if entry.key != PROVENANCE]
    del model.metadata_props[:]
    model.metadata_props.extend([*others, onnx.StringStringEntryProto(key=PROVENANCE, value=text)])
    try:
        yield
    finally:
        del model.metadata_props[:]
        model.metadata_props.extend(before.metadata_props)


def save(model: onnx.ModelProto, values: Values, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a model, whole or not at all; a model over 2 GB with its tensors in a file beside it.

    That file has a name of its own each time, and the model is written last: whenever this ends, a model has the tensors that
    it was written with. Those of a model that was overwritten are removed after that.

    Raises
    ------
    FileExistsError
        The file exists and `force` is not set.
    OSError
        It cannot be written; nothing is left of it.
    """
    if _fits_in_a_message(model):
        with whole_file(path, force=force) as temporary:
            temporary.write_bytes(whole_model(model, values).SerializeToString())
        return
    place = check_output(path, force=force)
    external, values = onnx.ModelProto(), Values(values)
    external.CopyFrom(model)
    detach(external, values)
    data = place.with_name(f"{_stem(place)}.{secrets.token_hex(4)}.data")
    try:
        with whole_file(data, mode=mode_of(place)) as temporary:
            _write_values(external, values, temporary, data.name)
        light = onnx.ModelProto()
        light.CopyFrom(external)
        before = _own_data(place)
        with whole_file(path, force=force) as temporary:
            temporary.write_bytes(light.SerializeToString())
    except BaseException:
        if data not in _own_data(place):
            data.unlink(missing_ok=True)
        raise
    for old in before:
        if not _is_read(old):
            old.unlink(missing_ok=True)


def _is_read(data: Path) -> bool:
    """Whether a model beside it still refers to it: a copy of the one that it was written with."""
    try:
        return any(data.name.encode() in each.read_bytes() for each in data.parent.glob("*.onnx") if each.is_file())
    except OSError:
        return True


def _own_data(path: Path) -> set[Path]:
    """The data files that were written here for the model that is at this path, if there is one."""
    try:
        own = {each.name: each for each in path.parent.iterdir() if _is_data_of(path, each.name)}
        model = _parse(path.read_bytes(), str(path)) if own else onnx.ModelProto()
    except (OSError, ValueError):  # there is none, or none that can be read
        return set()
    entries = (entry for tensor in all_tensors(model) for entry in tensor.external_data if entry.key == "location")
    return {own[entry.value] for entry in entries if entry.value in own}


def _is_data_of(path: Path, name: str) -> bool:
    stem = _stem(path)
    return name.startswith(stem) and re.fullmatch(r"\.[0-9a-f]{8}\.data", name[len(stem) :]) is not None


def _stem(path: Path) -> str:
    """What the names of its data files start with: a part of its own, as names may be 255 bytes long."""
    return path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")


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
