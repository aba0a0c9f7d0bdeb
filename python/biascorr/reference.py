"""The numpy twin of every kernel: what the kernels must compute, written to be read.

The kernels are tested against these functions. :func:`native` also serves the kernels themselves: it turns every input that
they do not take as it is into one that they do.
"""

from __future__ import annotations

import functools
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
    """The sums that each kernel tap sees, over samples and output positions; zeros outside the sample.

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
    """Sums over a count, in float64, of which rounding takes little more than half a unit in the last place.

    Parameters
    ----------
    integers : ndarray, (L,), int64 or object, or None
        Exact sums.
    reals : ndarray, (2, L), float64, or None
        Sums and what rounding took from them.
    count : int
        Positions summed over.
    """
    parts = [part for part in (None if integers is None else _two_parts(integers), reals) if part is not None]
    total, error = functools.reduce(merge_reals, parts)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = total / count
        product, rest = _product(rounded, float(count))
        mean = rounded + ((total - product) - rest + error) / count
    return np.asarray(np.where(np.isfinite(mean), mean, rounded), dtype=np.float64)


def _two_parts(integers: NDArray[Any]) -> NDArray[np.float64]:
    """Integers as the unevaluated sums (2, L) of the nearest float64 and of the rest."""
    rounded = integers.astype(np.float64)
    rest = [int(integer) - int(near) for integer, near in zip(integers, rounded)] if np.any(abs(rounded) >= 2.0**53) else 0
    return np.stack([rounded, np.broadcast_to(np.asarray(rest, dtype=np.float64), rounded.shape)])


def _product(first: NDArray[np.float64], second: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The product and what rounding took from it (Dekker, Numerische Mathematik 18, 1971)."""
    (high, low), (second_high, second_low) = map(_halves, (first, np.float64(second)))
    product = first * second
    return product, ((high * second_high - product) + high * second_low + low * second_high) + low * second_low


def _halves(x: Any) -> tuple[Any, Any]:
    shifted = x * (2.0**27 + 1.0)
    high = shifted - (shifted - x)
    return high, x - high


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


BUCKETS = 512
"""Buckets of the histogram that a search of ranges looks at."""
SATURATION_COST = 3.0
"""Weight of a squared error outside a range, relative to one inside."""


def quantization_range(weights: ArrayLike, bits: int, asymmetric: bool, search: bool) -> NDArray[np.float64]:
    """The least and the greatest value that the grid of each channel has to have.

    Parameters
    ----------
    weights : array_like, (C, M)
        A channel per row.
    bits : int
        2 to 32.
    asymmetric : bool
        0 may be anywhere on the grid; else it is in the middle.
    search : bool
        Of several ranges, the one of least cost for a histogram of the weights; else the observed range.

    Returns
    -------
    ndarray, (C, 2), float64

    Raises
    ------
    ValueError
        A weight is nan or inf.

    Notes
    -----
    The observed range [min(W, 0), max(W, 0)] is the first candidate. The others are, widest first: k/100 of the reach
    max(abs(W)) of a symmetric grid; or k/16 of the observed width with 0 at j/20 of it, clamped into the observed range. k = 0
    leaves no grid. Of equal costs the first wins. The cost is the sum over 512 equal buckets from the least to the greatest
    weight of count * (centre - q)^2, q being the nearest point of the grid, and of three times that where the centre is outside
    the range. Equal weights have no buckets, and keep the observed range, which their grid holds exactly.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(weights).all():
        raise ValueError("weights: contains nan or inf, expected finite numbers")
    low, high = weights.min(axis=1, initial=0.0), weights.max(axis=1, initial=0.0)
    observed = np.stack([low, high], axis=1)
    if not search:
        return observed
    ranges = [_least_cost(row, limits, bits, asymmetric) for row, limits in zip(weights, observed)]
    return np.reshape(ranges, observed.shape)


def _least_cost(
    weights: NDArray[np.float64], observed: NDArray[np.float64], bits: int, asymmetric: bool
) -> NDArray[np.float64]:
    buckets = _histogram(weights)
    if buckets is None:
        return observed
    ranges = np.concatenate([observed[None], _narrower(observed[0], observed[1], asymmetric)])
    half = 2.0 ** (bits - 1)
    low, high = ranges.T
    with np.errstate(divide="ignore", over="ignore"):
        scale = (2 * half - 1) / (high - low) if asymmetric else (half - 1) / np.maximum(high, -low)
    ranges, low, scale = (values[np.isfinite(scale)] for values in (ranges, low, scale))
    first = np.rint(low * scale) if asymmetric else np.full_like(scale, -half)
    costs = _costs(*buckets, scale[:, None], first[:, None], first[:, None] + (2 * half - 1))
    return np.asarray(ranges[np.argmin(costs)] if costs.size else observed)


def _histogram(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Centres and counts of the buckets that are not empty, and empty ones up to the next multiple of 8."""
    least, greatest = weights.min(initial=np.inf), weights.max(initial=-np.inf)
    with np.errstate(divide="ignore", over="ignore"):
        width = (greatest - least) / BUCKETS
        per_unit = 1.0 / width
    if not (per_unit > 0 and np.isfinite(per_unit)):
        return None
    index = np.minimum(((weights - least) * per_unit).astype(np.int64), BUCKETS - 1)
    counts = np.bincount(index, minlength=BUCKETS)
    filled = np.flatnonzero(counts)
    padding = (0, -len(filled) % 8)
    return np.pad(least + (filled + 0.5) * width, padding), np.pad(counts[filled].astype(np.float64), padding)


def _narrower(low: Any, high: Any, asymmetric: bool) -> NDArray[np.float64]:
    """The candidates other than the observed range, (L, 2), widest first."""
    if not asymmetric:
        reach = max(high, -low) * (np.arange(99, 0, -1) / 100)
        return np.stack([-reach, reach], axis=1)
    width = ((high - low) * (np.arange(16, 0, -1) / 16))[:, None]
    below = width * (np.arange(21) / 20)
    return np.stack([np.maximum(low, -below).ravel(), np.minimum(high, width - below).ravel()], axis=1)


def _costs(centres: NDArray[np.float64], counts: NDArray[np.float64], scale: Any, first: Any, last: Any) -> NDArray[np.float64]:
    """One cost per scale, summed in eight lanes, then pair by pair."""
    step = 1.0 / scale
    with np.errstate(over="ignore"):
        error = centres - np.clip(np.rint(centres * scale), first, last) * step
        outside = (centres < first * step) | (centres > last * step)
        terms = counts * np.where(outside, SATURATION_COST, 1.0) * (error * error)
    lanes = functools.reduce(np.add, np.moveaxis(terms.reshape(len(terms), -1, 8), 1, 0))
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.asarray(lanes[:, 0])


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


def fake_quantize(
    array: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, bits: int, rng: np.random.Generator | None = None
) -> NDArray[Any]:
    """The nearest values on the grid, or with a generator one of the two nearest, in the dtype of the array."""
    array = np.asarray(array)
    r = np.subtract(_grid(array, scale, zero_point, bits, rng), zero_point) / np.asarray(scale, dtype=np.float64)
    return np.asarray(r, dtype=array.dtype)


def _grid(
    array: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, bits: int, rng: np.random.Generator | None = None
) -> NDArray[np.float64]:
    half = 2.0 ** (bits - 1)
    with np.errstate(over="ignore"):
        steps = np.multiply(array, scale, dtype=np.float64)
    rounded = np.rint(steps) if rng is None else np.floor(steps + rng.random(steps.shape))
    return np.asarray(np.clip(rounded + zero_point, -half, half - 1))


_SPACE = "DHW"
_CANONICAL = str.maketrans({"C": "G", "M": "O"})


def weight_error(
    weights: ArrayLike, fake_quantized_weights: ArrayLike, mean: ArrayLike, groups: int, layout: str
) -> NDArray[np.float64]:
    """shift[g*O+o] = sum over s, i of (W - Wq)[s,i,g,o] * mean[(s,) g*I+i], in float64.

    The difference of float32 weights is float32, which is exact near equality: between half and twice the weight.

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
    single = all(getattr(each, "dtype", None) == np.float32 for each in (weights, fake_quantized_weights))
    error = np.subtract(weights, fake_quantized_weights, dtype=np.float32 if single else np.float64).astype(
        np.float64, copy=False
    )
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


def _steps_along(shape: Sequence[int], layout: str) -> dict[str, NDArray[np.intp]]:
    """0, 1, 2, ... along the axis of each letter."""
    return {
        letter: np.arange(size).reshape([-1 if at == letter else 1 for at in layout]) for letter, size in zip(layout, shape)
    }


def output_channels(shape: Sequence[int], groups: int, layout: str) -> NDArray[np.intp]:
    """The output channel g*O+o of each weight, in a shape that broadcasts to theirs; arguments as in :func:`weight_error`."""
    layout = layout.translate(_CANONICAL)
    along = _steps_along(shape, layout)
    outputs = shape[layout.index("O")]
    if "G" in layout:
        return np.asarray(along["G"] * outputs + along["O"])
    if layout[0] == "I":
        return np.asarray(along["I"] // (shape[0] // groups) * outputs + along["O"])
    return np.asarray(along["O"])


def input_channels(shape: Sequence[int], groups: int, layout: str) -> NDArray[np.intp]:
    """The input channel g*I+i of each weight, as :func:`output_channels` gives the output channel."""
    layout = layout.translate(_CANONICAL)
    along = _steps_along(shape, layout)
    within: Any = along.get("I", 0)
    inputs = shape[layout.index("I")] if "I" in layout else 1
    if "G" in layout:
        return np.asarray(along["G"] * inputs + within)
    if layout[0] == "I":
        return np.asarray(within)
    return np.asarray(along["O"] // max(shape[layout.index("O")] // groups, 1) * inputs + within)


def channel_count(shape: Sequence[int], groups: int, layout: str, axis: str) -> int:
    """Output channels of all groups, or input channels with axis "I"."""
    layout = layout.translate(_CANONICAL)
    size = dict(zip(layout, shape))
    per_axis, counts_all = size.get(axis, 1), axis == ("I" if layout[0] == "I" else "O")
    return per_axis * size.get("G", 1 if counts_all else groups)


def channel_ranges(
    weights: ArrayLike, layout: str, axis: str, groups: int = 1, factors: ArrayLike | None = None
) -> NDArray[np.float64]:
    """max |W| * factor over all other axes, in float64; 0 of a channel without weights.

    Parameters
    ----------
    weights : array_like
        Axes as in `layout`.
    layout, groups
        As in :func:`weight_error`.
    axis : str
        "O" for a range per output channel, "I" per input channel.
    factors : array_like, optional
        One per channel of the other side.

    Returns
    -------
    ndarray, (G*O,) or (G*I,), float64
    """
    weights = np.asarray(weights)
    sides = output_channels(weights.shape, groups, layout), input_channels(weights.shape, groups, layout)
    own, other = sides if axis == "O" else sides[::-1]
    scale = 1.0 if factors is None else np.asarray(factors, dtype=np.float64)[other]
    ranges = np.zeros(channel_count(weights.shape, groups, layout, axis))
    with np.errstate(over="ignore", invalid="ignore"):
        np.maximum.at(ranges, np.broadcast_to(own, weights.shape), np.abs(weights.astype(np.float64)) * scale)
    return ranges


def scaled_channels(
    weights: ArrayLike,
    layout: str,
    groups: int = 1,
    output_factors: ArrayLike | None = None,
    input_factors: ArrayLike | None = None,
) -> NDArray[Any]:
    """(W * output_factor) * input_factor in float64, in the dtype of the weights and C order; arguments as above."""
    weights = np.asarray(weights)
    scaled = weights.astype(np.float64)
    with np.errstate(over="ignore"):
        for factors, channels in ((output_factors, output_channels), (input_factors, input_channels)):
            if factors is not None:
                scaled = scaled * np.asarray(factors, dtype=np.float64)[channels(weights.shape, groups, layout)]
        return np.ascontiguousarray(scaled.astype(weights.dtype.newbyteorder("=")))
