"""Tensors of a TFLite model: their types, their grids, and real numbers from what is stored.

real = (code - zero_point) * scale          one scale, or one for each index along an axis
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

DTYPES: dict[int, np.dtype[Any]] = {
    schema.TensorType.FLOAT32: np.dtype(np.float32),
    schema.TensorType.FLOAT16: np.dtype(np.float16),
    schema.TensorType.FLOAT64: np.dtype(np.float64),
    schema.TensorType.INT8: np.dtype(np.int8),
    schema.TensorType.INT16: np.dtype(np.int16),
    schema.TensorType.INT32: np.dtype(np.int32),
    schema.TensorType.INT64: np.dtype(np.int64),
    schema.TensorType.UINT8: np.dtype(np.uint8),
    schema.TensorType.UINT16: np.dtype(np.uint16),
    schema.TensorType.UINT32: np.dtype(np.uint32),
    schema.TensorType.UINT64: np.dtype(np.uint64),
    schema.TensorType.BOOL: np.dtype(np.bool_),
    schema.TensorType.COMPLEX64: np.dtype(np.complex64),
    schema.TensorType.COMPLEX128: np.dtype(np.complex128),
}
"""The types that numpy has."""

PACKED = {schema.TensorType.INT4: 4, getattr(schema.TensorType, "INT2", -1): 2}
"""Signed types of fewer bits than a byte, of which the first is in the lowest bits; int2 came with LiteRT 2.1."""

_CODES = (schema.TensorType.INT8, schema.TensorType.UINT8, schema.TensorType.INT16)
"""The types that activations are quantized to."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The real numbers that codes stand for.

    Parameters
    ----------
    scale, zero_point : ndarray, (1,) or (C,), float64 and int64
        The distance of neighbours, and the code of 0.
    axis : int
        The axis that several of them belong to.
    """

    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    axis: int

    def along(self, values: NDArray[Any], rank: int) -> NDArray[Any]:
        """Scales or zero points as they broadcast to a tensor of so many axes."""
        if len(values) == 1:
            return values.reshape((1,) * rank)
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(rank)])

    def real(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """Codes as real numbers."""
        zero, scale = (self.along(each, codes.ndim) for each in (self.zero_point, self.scale))
        return np.asarray((codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32), dtype=np.float32)

    def codes(self, real: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Real numbers as the nearest codes of a type; nan becomes 0."""
        zero, scale = (self.along(each, real.ndim) for each in (self.zero_point, self.scale))
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(np.nan_to_num(np.round(real / scale)) + zero, limits.min, limits.max), dtype=dtype)


def dtype_of(tensor: Any) -> np.dtype[Any] | None:
    """The type of the elements of a tensor; None where numpy has none."""
    return np.dtype(np.int8) if tensor.type in PACKED else DTYPES.get(tensor.type)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape that a tensor has in the file."""
    return tuple(map(int, tensor.shape)) if tensor.shape is not None else ()


def axes_of(tensor: Any) -> tuple[int | None, ...]:
    """The shape of a tensor, None for axes of any size."""
    given = tensor.shapeSignature if tensor.shapeSignature is not None and len(tensor.shapeSignature) else tensor.shape
    return tuple(None if size < 0 else int(size) for size in given) if given is not None else ()


def name_of(tensor: Any) -> str:
    """The name of a tensor in the file."""
    return (tensor.name or b"").decode(errors="backslashreplace")


def bytes_of(tensor: Any) -> int | None:
    """Bytes that the elements of a constant take; None where that is not known."""
    dtype = dtype_of(tensor)
    count = int(np.prod(shape_of(tensor), dtype=object))
    if dtype is None:
        return None
    return -(-count * PACKED[tensor.type] // 8) if tensor.type in PACKED else count * dtype.itemsize


def values_of(tensor: Any, raw: NDArray[np.uint8]) -> NDArray[Any]:
    """The elements of a constant tensor, from its bytes."""
    dtype, shape = dtype_of(tensor), shape_of(tensor)
    assert dtype is not None  # what reads values knows their type
    if tensor.type in PACKED:
        return _unpacked(raw, PACKED[tensor.type], int(np.prod(shape))).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape)


def _unpacked(raw: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    shifts = np.arange(0, 8, bits)
    fields = (np.frombuffer(raw, np.uint8)[:, None] >> shifts).ravel()[:count] & (2**bits - 1)
    return np.asarray(fields.astype(np.int8) - 2**bits * (fields >= 2 ** (bits - 1)), dtype=np.int8)


def grid_of(tensor: Any) -> Grid | None:
    """The grid of a quantized tensor; None for one of real numbers, and for integers that stand for themselves."""
    quantization = tensor.quantization
    if quantization is None or quantization.scale is None or not len(quantization.scale):
        return None
    dtype = dtype_of(tensor)
    if dtype is None or dtype.kind not in "iu":
        return None
    scale = np.asarray(quantization.scale, dtype=np.float64)
    given = quantization.zeroPoint
    zero = np.zeros(len(scale), np.int64) if given is None or not len(given) else np.asarray(given, dtype=np.int64)
    return Grid(scale, np.broadcast_to(zero, scale.shape), int(quantization.quantizedDimension))


def scales_of_blocks(tensor: Any) -> tuple[int, ...]:
    """The tensors that have the scales and zero points of weights that are quantized in blocks."""
    details = None if tensor.quantization is None else tensor.quantization.details
    return tuple(index for name in ("scales", "zeroPoints") if (index := getattr(details, name, -1)) >= 0)


def grid_of_codes(tensor: Any) -> Grid | None:
    """The grid of quantized activations; None of any other tensor."""
    grid = grid_of(tensor) if tensor.type in _CODES else None
    return grid if grid is not None and len(grid.scale) == 1 else None


def has_codes(tensor: Any) -> bool:
    """Whether a tensor holds quantized activations."""
    return grid_of_codes(tensor) is not None


def tensor_like(tensor: Any, name: str) -> Any:
    """A tensor of real numbers of the same shape."""
    made = schema.TensorT()
    made.name, made.type, made.hasRank = name.encode(), schema.TensorType.FLOAT32, True
    made.shape, made.shapeSignature = tensor.shape, tensor.shapeSignature
    return made


def indices(vector: Any) -> list[int]:
    """A vector of the file as a list; empty where it is left out."""
    return [] if vector is None else [int(index) for index in vector]


def type_of(dtype: np.dtype[Any]) -> int:
    """The type of the schema for elements of this one."""
    return next(code for code, each in DTYPES.items() if each == dtype)


def real_tensor(shape: tuple[int, ...], name: str) -> Any:
    """A tensor of real numbers."""
    made = schema.TensorT()
    made.name, made.type, made.hasRank, made.shape = name.encode(), schema.TensorType.FLOAT32, True, np.array(shape, np.int32)
    return made


def type_name(tensor: Any) -> str:
    """The type of a tensor as the schema calls it."""
    return next((name for name, code in vars(schema.TensorType).items() if code == tensor.type), "unknown")
