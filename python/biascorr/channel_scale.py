"""How far the weights of each channel reach, and weights with their channels scaled.

    range[c] = max over all other axes of |W| * factor             the factor of the channel on the other side
    scaled   = (W * output_factor[o]) * input_factor[i]

Cross-layer equalization and the folding of batch normalizations are made of these. Weights are read once, block by block in the
order that they lie in memory; all arithmetic is float64, rounded once. Source: Nagel et al., "Data-Free
Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr import _kernels, reference
from biascorr.arguments import checked_groups

_BLOCK = 1 << 17
"""Weights worked on at a time: in float64 they are 1 MB, which stays in the cache."""
_SHORT = 64
"""Up to so many weights in a row, a loop of numpy takes longer to start than to run."""


def channel_ranges(
    weights: ArrayLike, layout: str, *, axis: str, groups: int = 1, factors: ArrayLike | None = None
) -> NDArray[np.float64]:
    """The greatest magnitude of each channel's weights.

    Parameters
    ----------
    weights : array_like
        Axes as in `layout`, any strides, floating point. Not modified.
    layout : str
        Names the axes of the weights as in :class:`~biascorr.MeanBiasCorrector`: "OIHW", "IOHW", "HWIGO", "HWCM", "OI", ...
    axis : str
        "O": a range for each output channel g*O+o. "I": for each input channel g*I+i.
    groups : int
        How many groups the axis O counts; I, where the layout starts with it.
    factors : array_like, optional
        One for each channel of the other side, at least 0: the ranges that weights scaled by these would have.

    Returns
    -------
    ndarray, (G*O,) or (G*I,), float64
        nan for a channel in which one is, 0 for one that has no weights.

    Raises
    ------
    TypeError
        The weights are not floating point; the factors are not of real numbers; layout or groups is of another type.
    ValueError
        An unknown axis; the layout has unknown letters or another rank than the weights; the groups do not divide the channels;
        there is another number of factors than of channels, or one is below 0 or not finite.

    Notes
    -----
    Exact without factors, and within 1 ulp of float64 with them: the same bits whatever the strides and the number of threads.

    Examples
    --------
    >>> weights = np.array([[0.5, -4.0], [1.0, 2.0]])
    >>> channel_ranges(weights, "OI", axis="O")
    array([4., 2.])
    >>> channel_ranges(weights, "OI", axis="O", factors=[1.0, 0.25])
    array([1., 1.])
    """
    if axis not in ("O", "I"):
        raise ValueError(f"axis: {axis!r}, expected 'O' or 'I'")
    weights, groups, factors = _checked_weights(weights), checked_groups(groups), _factors(factors, "factors")
    count = dict(zip("OI", _kernels.channel_counts(weights.shape, layout, groups)))
    other = "I" if axis == "O" else "O"
    _check_count(factors, "factors", count[other])
    _check_magnitudes(factors)
    ranges = np.zeros(count[axis])
    weights, letters = _split(weights, layout, groups)
    order = sorted(range(weights.ndim), key=lambda k: -abs(weights.strides[k]))
    kept = [letters[k] in ("G", axis) for k in order]
    raised = _along(ranges, weights.shape, letters, axis).transpose(order)
    scale = None if factors is None else _broadcast(factors, weights, letters, other).transpose(order)
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(weights.transpose(order).shape):
            part = np.abs(_reals(weights.transpose(order)[block]))
            if scale is not None:
                part = np.multiply(part, scale[block], dtype=np.float64)
            own = raised[tuple(each if keep else slice(None) for each, keep in zip(block, kept))]
            np.maximum(own, _greatest(part, kept), out=own)
    return ranges


def scaled_channels(
    weights: ArrayLike,
    layout: str,
    *,
    groups: int = 1,
    output_factors: ArrayLike | None = None,
    input_factors: ArrayLike | None = None,
) -> NDArray[Any]:
    """The weights times the factors of their channels.

    Parameters
    ----------
    weights, layout, groups
        As in :func:`channel_ranges`.
    output_factors, input_factors : array_like, optional
        One for each output channel g*O+o and input channel g*I+i; 1 where they are None.

    Returns
    -------
    ndarray
        A new array of the shape and dtype of the weights, in C order and native byte order:
        (weights * output_factor) * input_factor in float64, rounded once.

    Raises
    ------
    TypeError, ValueError
        As :func:`channel_ranges`, but for factors of any value.

    Examples
    --------
    >>> scaled_channels([[0.5, -4.0], [1.0, 2.0]], "OI", output_factors=[1.0, 2.0], input_factors=[2.0, 0.25])
    array([[ 1., -1.],
           [ 4.,  1.]])
    """
    weights, groups = _checked_weights(weights), checked_groups(groups)
    factors = {"O": _factors(output_factors, "output_factors"), "I": _factors(input_factors, "input_factors")}
    counts = _kernels.channel_counts(weights.shape, layout, groups)
    for name, each, count in zip(("output_factors", "input_factors"), factors.values(), counts):
        _check_count(each, name, count)
    scaled = np.empty(weights.shape, weights.dtype.newbyteorder("="))
    out, letters = _split(scaled, layout, groups)
    weights, _ = _split(weights, layout, groups)
    scales = [_broadcast(each, weights, letters, axis) for axis, each in factors.items() if each is not None]
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(weights.shape):
            part = weights[block]
            for scale in scales:
                part = np.multiply(_reals(part), scale[block], dtype=np.float64)
            out[block] = part
    return scaled


def _split(weights: NDArray[Any], layout: str, groups: int) -> tuple[NDArray[Any], str]:
    """A view with axes of groups (G), outputs (O) and inputs (I) of a group, and of space, and their letters."""
    letters = layout.translate(str.maketrans("CM", "GO"))
    if "G" not in letters:
        axis = 0 if letters[0] == "I" else letters.index("O")
        size = weights.shape[axis]
        weights = weights.reshape(*weights.shape[:axis], groups, size // groups, *weights.shape[axis + 1 :])
        letters = f"{letters[:axis]}G{letters[axis:]}"
    return (weights, letters) if "I" in letters else (weights[..., None], f"{letters}I")


def _along(values: NDArray[np.float64], shape: Sequence[int], letters: str, axis: str) -> NDArray[np.float64]:
    """Values of the channels g*O+o, or g*I+i, as a view that broadcasts against the split weights."""
    size = dict(zip(letters, shape))
    by_group = values.reshape(size["G"], size[axis])
    if letters.index("G") > letters.index(axis):
        by_group = by_group.T
    return by_group.reshape([size[letter] if letter in ("G", axis) else 1 for letter in letters])


def _broadcast(factors: NDArray[np.float64], weights: NDArray[Any], letters: str, axis: str) -> NDArray[np.float64]:
    """The factor of each weight; repeated along a few inner taps, which numpy's loops would be too short for."""
    along = _along(factors, weights.shape, letters, axis)
    last = max(letters.index("G"), letters.index(axis))
    taps = weights.shape[last + 1 :]
    if 1 < math.prod(taps) < _SHORT:
        along = np.broadcast_to(along, (*along.shape[: last + 1], *taps)).copy()
    return np.broadcast_to(along, weights.shape)


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Indices of an array block by block, in the order of its axes."""
    inner = list(itertools.accumulate(reversed(shape[1:]), lambda size, length: size * max(length, 1), initial=1))[::-1]
    lengths = [max(1, _BLOCK // size) for size in inner]
    starts = [range(0, size, length) for size, length in zip(shape, lengths)]
    for at in itertools.product(*starts):
        yield tuple(slice(start, start + length) for start, length in zip(at, lengths))


def _greatest(part: NDArray[Any], kept: Sequence[bool]) -> NDArray[Any]:
    """The greatest along the axes that are not kept: the outer ones first, whose rows numpy compares as a whole."""
    reduced = [k for k, keep in enumerate(kept) if not keep]
    last = max(k for k, keep in enumerate(kept) if keep)
    for axes in (tuple(k for k in reduced if k < last), tuple(k for k in reduced if k > last)):
        if axes:
            part = part.max(axis=axes, keepdims=True)
    return part


def _reals(weights: NDArray[Any]) -> NDArray[Any]:
    """As float32 where they are narrower."""
    return weights.astype(np.float32) if weights.dtype.itemsize < 4 else weights


def _check_count(factors: NDArray[np.float64] | None, name: str, channels: int) -> None:
    if factors is not None and len(factors) != channels:
        raise ValueError(f"{name}: {len(factors)} values, expected {channels}, one for each channel")


def _check_magnitudes(factors: NDArray[np.float64] | None) -> None:
    if factors is None:
        return
    wrong = np.flatnonzero(~((factors >= 0) & np.isfinite(factors)))
    if len(wrong):
        raise ValueError(f"factors[{wrong[0]}]: {factors[wrong[0]]}, expected a finite number of at least 0")


def _checked_weights(weights: ArrayLike) -> NDArray[Any]:
    if type(weights) is np.ndarray and weights.dtype.char in "fd":
        return weights
    weights = reference.native(weights, "weights")
    if weights.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"weights: dtype {weights.dtype}, expected floating point")
    return weights


def _factors(factors: ArrayLike | None, name: str) -> NDArray[np.float64] | None:
    if factors is None:
        return None
    if not (isinstance(factors, np.ndarray) and factors.dtype.char == "d"):
        factors = reference.native(factors, name)
    checked = np.asarray(factors, dtype=np.float64, order="C")
    if checked.ndim != 1:
        raise ValueError(f"{name}: {checked.ndim} axes, expected one")
    return checked
