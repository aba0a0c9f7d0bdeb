"""The numpy twin of every kernel: what the kernels must compute, written to be read.

The kernels are tested against these functions. :func:`native` also serves the kernels themselves: it turns every input that
they do not take as it is into one that they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

AxisWindow = tuple[int, int, int, int, int]
"""(taps, stride, dilation, pad, outputs) of a kernel along one spatial axis."""

_PACKED = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}


def native(array: Any, name: str) -> NDArray[Any]:
    """The array in native byte order, aligned, and of a dtype that the kernels take; values unchanged.

    Raises
    ------
    TypeError
        The dtype is not of real numbers (object, string, complex, date), or the array is masked.
    ValueError
        The object is no array (ragged lists).
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array, expected one whose elements all count (its .data or .compressed())")
    try:
        array = np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name}: not an array: {error}") from None
    dtype = array.dtype
    if dtype.kind == "b":
        return np.asarray(array, dtype=np.uint8)
    if issubclass(dtype.type, (np.float16, np.float32, np.float64)) or dtype.char in "bBhHiIlLqQ":
        return np.require(array, dtype=dtype.newbyteorder("="), requirements="A")
    if dtype.name == "bfloat16":
        return np.require(array, requirements="A")
    if dtype.type is np.longdouble:
        return np.asarray(array, dtype=np.float64)
    if dtype.name in _PACKED:
        return np.asarray(array, dtype=_PACKED[dtype.name])
    if dtype.name.startswith(("float8", "float6", "float4")):
        return np.asarray(array, dtype=np.float32)
    raise TypeError(f"{name}: dtype {dtype}, expected integers, booleans or real numbers")


def unpacked(data: NDArray[np.uint8], shape: tuple[int, ...], signed: bool) -> NDArray[Any]:
    """Integers of two to a byte, the first in the low half, as int8, or uint8 where unsigned."""
    halves = np.stack([data & 15, data >> 4], axis=-1).ravel()[: int(np.prod(shape))].reshape(shape)
    return ((halves ^ 8).astype(np.int8) - np.int8(8)) if signed else halves


def channel_sums(sample: ArrayLike, channel_axis: int = -1) -> NDArray[Any]:
    """Sum over every axis but one: Python integers of integer samples, float64 of others.

    Parameters
    ----------
    sample : array_like
        Rank >= 1.
    channel_axis : int
        The axis that is kept.

    Returns
    -------
    ndarray, (C,), object or float64
    """
    sample = np.asarray(sample)
    rows = np.moveaxis(sample, channel_axis, -1).reshape(-1, sample.shape[channel_axis])
    if sample.dtype.kind in "iub" and sample.dtype.itemsize < 8:
        return np.asarray(np.add.reduce(rows, axis=0, dtype=np.int64).astype(object))
    if sample.dtype.kind in "iu":
        return np.asarray(np.add.reduce(rows.astype(object), axis=0))
    return np.asarray(np.add.reduce(rows, axis=0, dtype=np.float64))


def tap_sums(sample: ArrayLike, windows: Sequence[AxisWindow], channel_axis: int = 1) -> NDArray[Any]:
    """What each kernel tap sees, summed over samples and output positions; zeros outside the sample.

    Parameters
    ----------
    sample : array_like
        (N, C, *S), or with the channels along `channel_axis`.
    windows : sequence of (taps, stride, dilation, pad, outputs)
        One per spatial axis.

    Returns
    -------
    ndarray, (*K, C), object or float64
    """
    sample = np.moveaxis(np.asarray(sample), channel_axis, -1)
    sums = np.empty((*(window[0] for window in windows), sample.shape[-1]), dtype=object)
    for tap in np.ndindex(sums.shape[:-1]):
        positions = [_positions(k, window, size) for k, window, size in zip(tap, windows, sample.shape[1:])]
        seen = sample[np.ix_(range(len(sample)), *positions)] if all(map(len, positions)) else sample[:0]
        sums[tap] = channel_sums(seen)
    return sums if sample.dtype.kind in "iub" else sums.astype(np.float64)


def _positions(tap: int, window: AxisWindow, size: int) -> list[int]:
    _, stride, dilation, pad, outputs = window
    at = (output * stride + tap * dilation - pad for output in range(outputs))
    return [position for position in at if 0 <= position < size]


def mean_from_sums(integers: NDArray[Any] | None, reals: NDArray[np.float64] | None, count: int) -> NDArray[np.float64]:
    """Sums over a count, in float64.

    Parameters
    ----------
    integers : ndarray, (L,), int64 or object, or None
        Exact sums.
    reals : ndarray, (2, L), float64, or None
        Sums and what rounding took from them.
    count : int
        Positions summed over.
    """
    total: Any = 0.0 if integers is None else integers.astype(np.float64)
    if reals is not None:
        error = reals[1] if np.isfinite(reals[0]).all() else np.where(np.isfinite(reals[0]), reals[1], 0.0)
        total = total + (reals[0] + error)
    return np.asarray(total / count, dtype=np.float64)


def channel_mean(samples: Sequence[ArrayLike], scale: ArrayLike, zero_point: ArrayLike) -> NDArray[np.float64]:
    """(sum / count - zero_point) / scale over every axis but the last of all samples together, (C,), in float64."""
    sums = [channel_sums(sample) for sample in samples]
    count = sum(np.size(sample) for sample in samples) // len(sums[0])
    mean = np.add.reduce(sums, axis=0).astype(np.float64) / count
    return np.asarray((mean - zero_point) / np.asarray(scale, dtype=np.float64), dtype=np.float64)


def merge_reals(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of two unevaluated sums (2, L) as one (Knuth, TAOCP vol. 2, 4.2.2, TwoSum)."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = first[0] + second[0]
        rounded = total - first[0]
        error = (first[0] - (total - rounded)) + (second[0] - rounded)
        return np.stack([total, first[1] + second[1] + error])


def quantize(array: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, bits: int) -> NDArray[Any]:
    """clip(round(r * scale) + zero_point) in float64, as the smallest signed integers that hold `bits`."""
    q = _grid(array, scale, zero_point, bits)
    if np.isnan(q).any():
        raise ValueError("array: contains nan, which has no quantized value")
    return q.astype(f"int{8 if bits <= 8 else 16 if bits <= 16 else 32}")


def dequantize(array: ArrayLike, scale: ArrayLike, zero_point: ArrayLike) -> NDArray[Any]:
    """(q - zero_point) / scale in float64, as float32 for integers of up to 16 bits, else float64."""
    array = np.asarray(array)
    r = np.subtract(array, zero_point, dtype=np.float64) / np.asarray(scale, dtype=np.float64)
    return np.asarray(r, dtype=np.result_type(array.dtype, np.float32))


def fake_quantize(array: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, bits: int) -> NDArray[Any]:
    """The nearest values on the grid, in the dtype of the array."""
    array = np.asarray(array)
    r = np.subtract(_grid(array, scale, zero_point, bits), zero_point) / np.asarray(scale, dtype=np.float64)
    return np.asarray(r, dtype=array.dtype)


def _grid(array: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, bits: int) -> NDArray[np.float64]:
    half = 2.0 ** (bits - 1)
    with np.errstate(over="ignore"):
        steps = np.multiply(array, scale, dtype=np.float64)
    return np.asarray(np.clip(np.rint(steps) + zero_point, -half, half - 1))


_SPACE = "DHW"
_CANONICAL = str.maketrans({"C": "G", "M": "O"})


def weight_error(
    weights: ArrayLike, fake_quantized_weights: ArrayLike, mean: ArrayLike, groups: int, layout: str
) -> NDArray[np.float64]:
    """shift[g*O+o] = sum over s, i of (W - Wq)[s,i,g,o] * mean[(s,) g*I+i], in float64.

    Parameters
    ----------
    weights, fake_quantized_weights : array_like
        Of one shape, axes as in `layout`.
    mean : array_like
        (G*I,) or (*K, G*I).
    groups : int
        How many groups the axis O counts (I, where the layout starts with it); 1 where the layout has a group axis.
    layout : str
        A letter per axis: O or M, I, G or C, and D, H, W.

    Returns
    -------
    ndarray, (G*O,), float64
    """
    error = np.subtract(weights, fake_quantized_weights, dtype=np.float64)
    layout = layout.translate(_CANONICAL)
    if "G" not in layout:
        axis = 0 if layout[0] == "I" else layout.index("O")
        error = error.reshape(*error.shape[:axis], groups, error.shape[axis] // groups, *error.shape[axis + 1 :])
        layout = f"{layout[:axis]}G{layout[axis:]}"
    if "I" not in layout:
        error, layout = error[..., None], f"{layout}I"
    size = dict(zip(layout, error.shape))
    mean = np.asarray(mean, dtype=np.float64)
    taps = "".join(letter for letter in layout if letter in _SPACE) if mean.ndim > 1 else ""
    mean = mean.reshape(*mean.shape[:-1], size["G"], size["I"])
    return np.asarray(np.einsum(f"{layout},{taps}GI->GO", error, mean).ravel())


def output_channels(shape: Sequence[int], groups: int, layout: str) -> NDArray[np.intp]:
    """The output channel g*O+o of each weight, in a shape that broadcasts to theirs; arguments as in :func:`weight_error`."""
    layout = layout.translate(_CANONICAL)
    along = {
        letter: np.arange(size).reshape([-1 if at == letter else 1 for at in layout]) for letter, size in zip(layout, shape)
    }
    outputs = shape[layout.index("O")]
    if "G" in layout:
        return np.asarray(along["G"] * outputs + along["O"])
    if layout[0] == "I":
        return np.asarray(along["I"] // (shape[0] // groups) * outputs + along["O"])
    return np.asarray(along["O"])
