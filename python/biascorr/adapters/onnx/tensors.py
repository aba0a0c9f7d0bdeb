"""The values of a model's tensors, apart from the model: read where they lie, never copied with it.

A model is light once its large tensors are detached: each has a key in place of its values (as the location of external data),
and the values are an array, which may be a part of a memory-mapped file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from biascorr.adapters.onnx.operators import operator_of
from biascorr.graph.travel import is_by_reference


class Values(dict[str, NDArray[Any]]):
    """Values of detached tensors by key: of their dtype and shape, or as bytes; some of them parts of mapped files.

    A mapped file that is changed while it is in use would change the model, and one that is cut would end the process.
    """

    def __init__(self, values: Mapping[str, NDArray[Any]] | None = None) -> None:
        super().__init__(values or {})
        self._files: dict[Path, tuple[int, ...]] = dict(values._files) if isinstance(values, Values) else {}

    def map(self, file: Path) -> NDArray[np.uint8]:
        """The bytes of a file, read when they are needed."""
        self._files[file] = _state_of(file)
        return np.asarray(np.memmap(file, np.uint8, "r"))

    def check(self) -> None:
        """Raises ValueError where a mapped file was changed; one that was removed or replaced is still there for us."""
        for file, state in self._files.items():
            now = _state_of(file)
            if now and now[0] == state[0] and now != state:
                raise ValueError(f"{file}: changed since the model was loaded")

    def __reduce__(self) -> tuple[Any, ...]:
        """The arrays; references to those that are mapped, where these are asked for."""
        self.check()
        return _arrived, ({key: self._reference(array) or array for key, array in self.items()},)

    def _reference(self, array: NDArray[Any]) -> _Reference | None:
        """Where an array is mapped from; None where it is not, its file is gone, or it is to travel itself."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if not (is_by_reference() and isinstance(owner, np.memmap) and array.flags.c_contiguous):
            return None
        file = Path(owner.filename or "")
        state = self._files.get(file)
        if not state or state != _state_of(file):
            return None
        return _Reference(file, state[1:], array.ctypes.data - owner.ctypes.data, array.dtype, array.shape)


class _Reference(NamedTuple):
    """A part of a file in place of an array: the file, its size and time, and where and what the array is in it."""

    file: Path
    state: tuple[int, ...]
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def _arrived(sent: Mapping[str, NDArray[Any] | _Reference]) -> Values:
    """The values that were pickled. Raises ValueError or FileNotFoundError where a file is another here, or is missing."""
    values = Values()
    files: dict[Path, NDArray[np.uint8]] = {}
    for key, each in sent.items():
        if not isinstance(each, _Reference):
            values[key] = each
            continue
        if each.file not in files:
            _check_file(each)
            files[each.file] = values.map(each.file)
        size = math.prod(each.shape) * each.dtype.itemsize
        values[key] = files[each.file][each.offset : each.offset + size].view(each.dtype).reshape(each.shape)
    return values


def _check_file(reference: _Reference) -> None:
    label = f"{reference.file}: the values of a network that was sent by reference are in this file, which is"
    remedy = "let both machines see one file, or send the network with its values"
    found = _state_of(reference.file)[1:]
    if not found:
        raise FileNotFoundError(f"{label} missing here; {remedy}")
    if found != reference.state:
        raise ValueError(
            f"{label} another one here: {found[0]} bytes, changed at {found[1]} ns, expected {reference.state[0]} "
            f"bytes, changed at {reference.state[1]} ns; {remedy}"
        )


def _state_of(file: Path) -> tuple[int, ...]:
    """Number, size and time of a file; nothing where it is gone."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


LARGE = 1 << 10
"""Bytes of a tensor below which it stays in the model."""

_PREFIX = "biascorr:"

_EXPLICIT = "explicit"
"""A tensor that said itself that its values are in the model says so again when they are."""

_BITS = {
    "BFLOAT16": 16, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
    "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2,
}  # fmt: skip
"""Bits of the types that numpy has not."""

_count = itertools.count()


def is_packed(data_type: int) -> bool:
    """Whether ONNX stores several values of this type in a byte."""
    return _BITS.get(onnx.TensorProto.DataType.Name(data_type), 8) < 8


def is_foreign(data_type: int) -> bool:
    """Whether it is a type of numbers that numpy has not: of few bits, or bfloat16."""
    try:
        return helper.tensor_dtype_to_np_dtype(data_type).isbuiltin != 1
    except KeyError:  # unknown, which onnxruntime refuses, or not given
        return False


def bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes that its values take in ONNX. Raises ValueError where its type is unknown."""
    try:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        bits = _BITS.get(name) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):
        raise ValueError(f"tensor {tensor.name}: unknown data type {tensor.data_type}") from None
    return int(-(-math.prod(tensor.dims) * bits // 8))


def main_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and the values of Constant nodes, those of subgraphs left out."""
    yield from graph.initializer
    for node in graph.node:
        if operator_of(node) == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def key_of(tensor: onnx.TensorProto) -> str | None:
    """The key of a detached tensor; None where its values are in the model."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return location if location.startswith(_PREFIX) else None


def attach(tensor: onnx.TensorProto, array: NDArray[Any], values: Values) -> None:
    """Makes an array the values of a tensor that has a type and dimensions, and is otherwise empty."""
    key = next(key for key in (f"{_PREFIX}{k}" for k in _count) if key not in values)  # one that was sent has keys already
    values[key] = array
    if tensor.HasField("data_location"):
        tensor.external_data.add(key=_EXPLICIT, value="")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=key)


def detach(model: onnx.ModelProto, values: Values) -> None:
    """Detaches the large tensors of a model whose values are in it as bytes."""
    for tensor in main_tensors(model.graph):
        if tensor.HasField("raw_data") and not tensor.external_data:
            array = np.frombuffer(tensor.raw_data, dtype=np.uint8)
            if array.size < LARGE or not is_sound(tensor, array.size):  # onnxruntime says what is wrong
                continue
            tensor.ClearField("raw_data")
            attach(tensor, array, values)


def is_sound(tensor: onnx.TensorProto, size: int) -> bool:
    """Whether it has so many bytes by its type and dimensions."""
    try:
        return bytes_of(tensor) == size
    except ValueError:
        return False


def tensor_of(array: NDArray[Any], name: str, values: Values) -> onnx.TensorProto:
    """A tensor with these values, detached where it is large."""
    array = np.asarray(array)
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    if array.nbytes < LARGE or is_packed(data_type):
        return numpy_helper.from_array(np.asarray(array, order="C"), name)
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=array.shape)
    attach(tensor, np.ascontiguousarray(array), values)
    return tensor


def array_of(tensor: onnx.TensorProto, values: Values) -> NDArray[Any]:
    """The values of a tensor; without a copy where it is detached."""
    key = key_of(tensor)
    if key is None:
        return numpy_helper.to_array(tensor)
    values.check()
    array = values[key]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if array.dtype == dtype and array.shape == tuple(tensor.dims):
        return array
    if is_packed(tensor.data_type):
        return numpy_helper.to_array(whole_tensor(tensor, values))
    return array.view(np.uint8).reshape(-1).view(dtype).reshape(tuple(tensor.dims))


def raw_of(tensor: onnx.TensorProto, values: Values) -> NDArray[np.uint8]:
    """The values of a detached tensor as bytes."""
    values.check()
    array = values[key_of(tensor) or ""]
    return array.reshape(-1).view(np.uint8)


def whole_tensor(tensor: onnx.TensorProto, values: Values) -> onnx.TensorProto:
    """A copy of a tensor with its values in it."""
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if key_of(tensor) is not None:
        copy.ClearField("data_location")
        if any(entry.key == _EXPLICIT for entry in copy.external_data):
            copy.data_location = onnx.TensorProto.DEFAULT
        del copy.external_data[:]
        copy.raw_data = raw_of(tensor, values).tobytes()
    return copy


def whole_model(model: onnx.ModelProto, values: Values) -> onnx.ModelProto:
    """A copy of a model with all values in it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in main_tensors(copy.graph):
        if key_of(tensor) is not None:
            tensor.CopyFrom(whole_tensor(tensor, values))
    return copy
