"""Arrays that are hard to walk: the same values in every memory layout that numpy can describe."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
SMALL_FLOATS = ["float8_e4m3fn", "float8_e5m2", "int4", "uint4"]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def random_array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Values over the whole range of an integer dtype, standard normal ones of a real dtype."""
    rng = np.random.default_rng(seed)
    target = dtype_of(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if target.kind in "iu":
        info = np.iinfo(target)
        return rng.integers(info.min, info.max, shape, dtype=target, endpoint=True)
    if dtype in ("int4", "uint4"):
        return rng.integers(*((-8, 8) if dtype == "int4" else (0, 16)), shape).astype(target)
    return (rng.standard_normal(shape) + 0.5).astype(target)


def _strided(array: Array) -> Array:
    """Every second element of a larger array along each axis."""
    larger = np.zeros([2 * size + 1 for size in array.shape], array.dtype)
    view = larger[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def _sliced(array: Array) -> Array:
    """The middle of a larger array: rows are contiguous, nothing else is."""
    larger = np.zeros([size + 3 for size in array.shape], array.dtype)
    view = larger[tuple(slice(1, size + 1) for size in array.shape)]
    view[...] = array
    return view


def _reversed(array: Array) -> Array:
    backwards = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[backwards])[backwards]


def _channels_first(array: Array) -> Array:
    """Stored channels first, seen channels last."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, -1, min(1, array.ndim - 1))), min(1, array.ndim - 1), -1)


def _misaligned(array: Array) -> Array:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _byte_swapped(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder()) if array.dtype.isbuiltin == 1 else array


def _read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def _memory_mapped(array: Array) -> Array:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "array"
        array.tofile(path)
        return np.memmap(path, array.dtype, "r", shape=array.shape)


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels_first": _channels_first,
    "sliced": _sliced,
    "strided": _strided,
    "reversed": _reversed,
    "misaligned": _misaligned,
    "byte_swapped": _byte_swapped,
    "read_only": _read_only,
    "memory_mapped": _memory_mapped,
}
"""Each takes an array and returns one of equal values, laid out differently."""
