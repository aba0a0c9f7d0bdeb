"""How far the weights of each channel reach, and weights with their channels scaled.

    range[c] = max over all other axes of |W| * factor             the factor of the channel on the other side
    scaled   = (W * output_factor[o]) * input_factor[i]

Cross-layer equalization and the folding of batch normalizations are made of these. Source: Nagel et al., "Data-Free
Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr import _kernels, reference


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
    return _kernels.channel_ranges(
        _checked_weights(weights), layout, axis == "O", _checked_groups(groups), _factors(factors, "factors")
    )


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
    weights = _checked_weights(weights)
    factors = _factors(output_factors, "output_factors"), _factors(input_factors, "input_factors")
    scaled = _kernels.scaled_channels(weights, layout, _checked_groups(groups), *factors)
    if scaled.dtype == weights.dtype:
        return scaled
    with np.errstate(over="ignore"):  # as in the kernel
        return scaled.astype(weights.dtype.newbyteorder("="), copy=False)


def _checked_weights(weights: ArrayLike) -> NDArray[Any]:
    if isinstance(weights, np.ndarray) and weights.dtype.char in "fd":
        return weights
    weights = reference.native(weights, "weights")
    if weights.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"weights: dtype {weights.dtype}, expected floating point")
    return weights


def _checked_groups(groups: int) -> int:
    if isinstance(groups, bool) or not isinstance(groups, (int, np.integer)):
        raise TypeError(f"groups: {type(groups).__name__}, expected an integer")
    if not 1 <= groups < 2**31:
        raise ValueError(f"groups: {groups}, expected at least 1 and below 2^31")
    return int(groups)


def _factors(factors: ArrayLike | None, name: str) -> NDArray[np.float64] | None:
    if factors is None:
        return None
    if not (isinstance(factors, np.ndarray) and factors.dtype.char == "d"):
        factors = reference.native(factors, name)
    checked = np.asarray(factors, dtype=np.float64, order="C")
    if checked.ndim != 1:
        raise ValueError(f"{name}: {checked.ndim} axes, expected one")
    return checked
