"""The vocabulary: what a quantizer is, and how real numbers meet its grid.

    q = clip(round(r * scale) + zero_point, qmin, qmax)          r = (q - zero_point) / scale

`scale` multiplies on the way in: steps per unit, the reciprocal of the scale ("step") of ONNX, TFLite and torch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr import _kernels, reference
from biascorr.arguments import checked_integer

QUANT_MODES = ("tf", "tf_enhanced")
"""How the range of weights is found; see :meth:`Quantization.from_weights`."""


class BiasCorrectionType(enum.Enum):
    """How biases are corrected."""

    NONE = "none"
    """Biases stay as they are."""
    REGULAR = "regular"
    """By the mean of each layer's input, all layers in one pass."""
    ITERATIVE = "iterative"
    """By the mean of each layer's input, measured after upstream layers were quantized and corrected."""


@dataclass(frozen=True, eq=False)
class Quantization:
    """An affine quantizer with the signed range -2^(bits-1) .. 2^(bits-1)-1.

    Parameters
    ----------
    scale : float or array_like, (C,)
        Steps per unit, positive; one, or one per channel of the last axis. With more axes: one per block of an array of as many
        axes, see :func:`fake_quantize`.
    zero_point : int or array_like, (C,)
        The quantized value of 0.
    bits : int
        2 to 32.

    Raises
    ------
    ValueError
        The scale is not positive and finite; the zero point is not integral; their shapes differ; bits is out of range.

    Examples
    --------
    >>> q = Quantization(scale=255.12458585747225, zero_point=-128)
    >>> q.dequantize(np.array([-128, 127, 0], dtype=np.int8))
    array([0.        , 0.99951166, 0.50171566], dtype=float32)
    >>> Quantization.from_step(0.5).quantize([-0.75, 0.2, 1e9])
    array([ -2,   0, 127], dtype=int8)
    """

    scale: Any = 1.0
    zero_point: Any = 0
    bits: int = 8

    def __post_init__(self) -> None:
        scale, zero_point = _affine_parameters(self)
        checked_integer("bits", self.bits, 2, 32)
        object.__setattr__(self, "scale", _frozen(scale))
        object.__setattr__(self, "zero_point", _frozen(zero_point.astype(np.int64)))
        object.__setattr__(self, "bits", int(self.bits))

    @classmethod
    def from_step(cls, step: ArrayLike, zero_point: ArrayLike = 0, bits: int = 8) -> Quantization:
        """The quantizer whose neighbouring values are `step` apart (the ONNX convention of a scale)."""
        step = np.asarray(step, dtype=np.float64)
        if not (np.isfinite(step) & (step > 0)).all():
            raise ValueError(f"step: {step}, expected positive and finite")
        return _of_known_unit(cls, 1.0 / step, zero_point, bits)

    @classmethod
    def from_range(cls, min: ArrayLike, max: ArrayLike, bits: int = 8, asymmetric: bool = True) -> Quantization:  # noqa: A002
        """The quantizer whose grid spans a range, widened to contain 0 (DFQ, arXiv 1906.04721, section 3).

        Parameters
        ----------
        min, max : float or array_like, (C,)
            The range, in real units.
        bits : int
            2 to 32.
        asymmetric : bool
            Spread all 2^bits values over the range; otherwise the zero point is 0 and max(abs(min), abs(max)) is
            2^(bits-1)-1 steps from it. An empty range (0, 0) has scale 1.

        Examples
        --------
        >>> Quantization.from_range(-1, 2)
        Quantization(scale=85.0, zero_point=-43, bits=8)
        >>> Quantization.from_range(-1, 2, asymmetric=False)
        Quantization(scale=63.5, zero_point=0, bits=8)
        """
        low, high = np.asarray(min, dtype=np.float64), np.asarray(max, dtype=np.float64)
        checked_integer("bits", bits, 2, 32)
        if not (np.isfinite(low) & np.isfinite(high)).all() or (low > high).any():
            raise ValueError(f"min, max: {low}, {high}, expected finite and min <= max")
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        half = 2 ** (bits - 1)
        steps = 2 * half - 1 if asymmetric else half - 1
        with np.errstate(over="ignore", invalid="ignore"):  # a scale of 0 or inf is an error of the constructor
            span = high - low if asymmetric else np.maximum(-low, high)
            scale = np.divide(steps, span, out=np.ones_like(span), where=span > 0)
            zero_point = -half - np.rint(low * scale) if asymmetric else np.zeros_like(scale)
        return _of_known_unit(cls, scale, np.where(span > 0, zero_point, 0.0), bits)

    @classmethod
    def from_weights(
        cls, weights: ArrayLike, bits: int = 8, *, axis: int | None = None, asymmetric: bool = False, mode: str = "tf_enhanced"
    ) -> Quantization:
        """The quantizer whose grid spans the range of weights, or that part of it which loses least.

        Parameters
        ----------
        weights : array_like
            Real units, any shape.
        bits : int
            2 to 32.
        axis : int, optional
            The axis whose elements have a grid each, and for :func:`fake_quantize` too; None: one grid for all.
        asymmetric : bool
            As in :meth:`from_range`.
        mode : "tf_enhanced" or "tf"
            "tf": the range from the least to the greatest weight. "tf_enhanced": of this range and narrower ones (k/100 of a
            symmetric one; otherwise k/16 of its width, 0 being at j/20 of that), the one with the least sum of squared errors
            for a histogram of the weights in 512 buckets, saturation being counted three times. What is rare and far from all
            the rest is given up for a finer grid.

        Raises
        ------
        TypeError
            The dtype is not of real numbers.
        ValueError
            bits is out of range; the mode is unknown; the weights have no such axis; a weight is nan or inf; the weights are so
            large or so small that float64 has no scale for them.

        Notes
        -----
        Zero is on every grid. Weights of which there are none, or all 0, have scale 1. The result depends on neither memory
        layout nor threads.

        Examples
        --------
        >>> Quantization.from_weights([-1.0, 2.0], mode="tf").step
        0.015748031496062992
        >>> weights = np.append(np.linspace(-1, 1, 10_000), 4.0)
        >>> Quantization.from_weights(weights, bits=4, mode="tf").step
        0.5714285714285714
        >>> Quantization.from_weights(weights, bits=4).step
        0.13714285714285715
        """
        checked_integer("bits", bits, 2, 32)
        if mode not in QUANT_MODES:
            raise ValueError(f"mode: {mode!r}, expected {' or '.join(map(repr, QUANT_MODES))}")
        rows = _contiguous_reals(_rows(reference.native(weights, "weights"), axis))
        ranges = _kernels.quantization_range(rows, bits, asymmetric, mode == "tf_enhanced")
        low, high = ranges[0] if axis is None else ranges.T
        return cls.from_range(low, high, bits, asymmetric)

    @property
    def step(self) -> Any:
        """Distance between neighbouring values: 1 / scale."""
        return 1.0 / self.scale

    def quantize(self, array: ArrayLike) -> NDArray[Any]:
        """Integers nearest to real values: half to even, saturating, int8, int16 or int32 by `bits`.

        Raises ValueError on nan and on a per-channel scale whose length is not that of the last axis, TypeError on dtypes
        that are not of real numbers.
        """
        array = _contiguous_reals(array)
        return _kernels.quantize(array, _grids(self, array, -1))

    def dequantize(self, array: ArrayLike) -> NDArray[Any]:
        """Real values of quantized ones: float32 for integers of up to 16 bits, else float64."""
        array = np.require(reference.native(array, "array"), requirements="C")
        if array.dtype.kind not in "iu" or array.dtype.itemsize > 4:
            check_channels(self.scale, self.zero_point, array.shape[-1] if array.ndim else 1)
            return reference.dequantize(array, self.scale, self.zero_point)
        return _kernels.dequantize(array, _grids(self, array, -1))

    def fake_quantize(self, array: ArrayLike) -> NDArray[Any]:
        """Real values moved to the nearest on the grid; see :func:`fake_quantize`."""
        return fake_quantize(array, self)

    def __reduce__(self) -> tuple[Any, ...]:
        values = self.scale, self.zero_point, self.bits
        return (_of_known_unit, (Quantization, *values)) if "has_known_unit" in vars(self) else (Quantization, values)

    def __repr__(self) -> str:
        scale, zero_point = (np.asarray(x).tolist() for x in (self.scale, self.zero_point))
        return f"Quantization(scale={scale}, zero_point={zero_point}, bits={self.bits})"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Quantization) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        scale, zero_point = np.asarray(self.scale), np.asarray(self.zero_point)
        return scale.shape, scale.tobytes(), zero_point.shape, zero_point.tobytes(), self.bits


def _of_known_unit(kind: type[Quantization], scale: ArrayLike, zero_point: ArrayLike, bits: int) -> Quantization:
    """One that is made of a step or a range, whose scale is no step by mistake."""
    quantization = kind(scale, zero_point, bits)
    vars(quantization)["has_known_unit"] = True
    return quantization


def fake_quantize(
    array: ArrayLike,
    quantization: Quantization,
    *,
    axis: int = -1,
    block_size: int | None = None,
    rng: np.random.Generator | None = None,
) -> NDArray[Any]:
    """Quantize and dequantize: the values that a quantized tensor can stand for, nearest to those given.

    Parameters
    ----------
    array : array_like
        Real units, any shape. nan stays nan.
    quantization : Quantization
        The grid.
    axis : int
        The axis that a per-channel scale or zero point belongs to, or that is divided into blocks.
    block_size : int, optional
        Elements of a block along `axis` that share a grid. Scale, and zero point unless it is one for all, then have the shape
        of the array with ceil(length / block_size) along `axis`, as ONNX stores them.
    rng : numpy.random.Generator, optional
        Makes the rounding stochastic: up with the probability of the fraction, else down, so that errors are 0 on average. A
        number is drawn for each element, in C order: a generator of equal seed gives equal values, whatever the memory layout
        and the number of threads.

    Returns
    -------
    ndarray
        The same shape and floating dtype; float32 for integers of up to 16 bits, float64 for larger ones. Computed in
        float64 and rounded once.

    Raises
    ------
    TypeError
        The dtype is not of real numbers.
    ValueError
        A per-channel scale or zero point has another length than the axis, or a blocked one another shape than the blocks.

    Examples
    --------
    >>> fake_quantize([0.1, 0.26], Quantization(scale=4))
    array([0.  , 0.25])
    >>> fake_quantize([0.1, 0.26, 0.6], Quantization(scale=[[4, 1]]), block_size=2)
    Traceback (most recent call last):
    ...
    ValueError: scale: shape (1, 2), expected (2,): an array of shape (3,) with blocks of 2 along axis 0
    """
    given = getattr(array, "dtype", np.dtype(np.float64))
    narrow = given.itemsize < 4 and given.name.startswith(("float", "bfloat"))
    array = _contiguous_reals(np.asarray(array, dtype=np.float64) if narrow else array)
    axis = _checked_axis(axis, array.ndim)
    if block_size is None and rng is None:
        result: NDArray[Any] = _kernels.fake_quantize_array(array, _grids(quantization, array, axis))
    else:
        scale, zero_point = _aligned(quantization, array.shape, axis, block_size)
        result = reference.fake_quantize(array, scale, zero_point, quantization.bits, rng)
    return result.astype(given) if narrow else result


def _aligned(quantization: Any, shape: tuple[int, ...], axis: int, block_size: int | None) -> list[NDArray[np.float64]]:
    """Scale and zero point, so that they broadcast against an array of this shape."""
    if block_size is None:
        parameters = affine_parameters(quantization)
        check_channels(*parameters, shape[axis] if shape else 1)
        return [x.reshape([-1 if k == axis else 1 for k in range(len(shape))]) if x.size > 1 else x for x in parameters]
    blocked = _blocked_shape(quantization, shape, axis, block_size)
    repeats = min(block_size, shape[axis])
    kept = tuple(slice(length) for length in shape)
    parameters = _affine_parameters(quantization)
    return [np.repeat(np.broadcast_to(x, blocked), repeats, axis=axis)[kept] for x in parameters]


def _rows(weights: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """(C, M): a row per index along an axis, or one in all."""
    if axis is None:
        return weights.reshape(1, -1)
    axis = _checked_axis(axis, weights.ndim)
    weights = np.moveaxis(np.atleast_1d(weights), axis, 0)
    return weights.reshape(len(weights), weights.size // max(len(weights), 1))


def _checked_axis(axis: int, ndim: int) -> int:
    if not -max(ndim, 1) <= axis < max(ndim, 1):
        raise ValueError(f"axis: {axis}, the array has {ndim} axes")
    return axis % max(ndim, 1)


def _blocked_shape(quantization: Any, shape: tuple[int, ...], axis: int, block_size: Any) -> tuple[int, ...]:
    """The shape that scale and zero point must have, one value a block; raises ValueError where they have another."""
    block_size = checked_integer("block_size", block_size, 1)
    if not shape:
        raise ValueError(f"block_size: {block_size}, the array has no axes")
    blocked = (*shape[:axis], -(-shape[axis] // block_size), *shape[axis + 1 :])
    for name in ("scale", "zero_point"):
        found = np.shape(getattr(quantization, name))
        if found not in ((), blocked):
            blocks = f"an array of shape {shape} with blocks of {block_size} along axis {axis}"
            raise ValueError(f"{name}: shape {found}, expected {blocked}: {blocks}")
    return blocked


def weight_grids(quantization: Any, shape: tuple[int, ...], axis: int | None, block_size: int | None) -> tuple[Any, ...]:
    """The grids of weights as the kernel takes them.

    Returns
    -------
    scale, zero_point : ndarray, (L,), float64
        One value, or one per grid.
    strides : list of int, or None
        Grids from one element of each axis, or block of it, to the next; None where there is one for each output channel.
    blocks : (int, int), or None
        The axis that is divided, and elements of a block.
    """
    scale, zero_point = _affine_parameters(quantization)
    if axis is not None:
        axis = _checked_axis(axis, len(shape))
    strides: list[int] | None = [0] * len(shape)
    blocks = None
    if axis is not None and block_size is not None:
        blocked = _blocked_shape(quantization, shape, axis, block_size)
        if max(scale.ndim, zero_point.ndim) > 0:
            strides = [int(np.prod(blocked[k + 1 :])) for k in range(len(shape))]
            blocks = axis, int(block_size)
    elif max(scale.ndim, zero_point.ndim) > 1:
        raise ValueError(f"scale, zero_point: {scale.ndim} and {zero_point.ndim} axes, expected at most 1, or a block_size")
    elif scale.size == zero_point.size == 1:
        pass
    elif axis is None:
        strides = None
    else:
        check_channels(scale, zero_point, shape[axis])
        strides = [int(k == axis) for k in range(len(shape))]
    return scale.ravel(), zero_point.ravel(), strides, blocks


_LARGEST = 2.0**50
"""Zero points up to here leave f64 room for every step of a grid."""


def check_channels(scale: Any, zero_point: Any, channels: int) -> None:
    """Raises ValueError where either has neither one value nor one per channel."""
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if np.size(values) not in (1, channels):
            raise ValueError(f"{name}: {np.size(values)} values, expected 1 or {channels}, the number of channels")


def affine_parameters(quantization: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and zero point of any object that has both attributes, one value or one per channel each, as float64, checked."""
    scale, zero_point = _affine_parameters(quantization)
    if scale.ndim > 1 or zero_point.ndim > 1:
        raise ValueError(f"scale, zero_point: {scale.ndim} and {zero_point.ndim} axes, expected at most 1")
    return scale, zero_point


def _affine_parameters(quantization: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same, one value per block included."""
    try:
        scale = np.asarray(quantization.scale, dtype=np.float64)
        zero_point = np.asarray(quantization.zero_point, dtype=np.float64)
    except AttributeError:
        found = repr(quantization) if isinstance(quantization, (int, float)) else type(quantization).__name__
        raise TypeError(
            f"quantization: {found}, expected Quantization(scale, zero_point), whose scale is in steps per unit; "
            "Quantization.from_step(step, zero_point) takes a step, as ONNX, TFLite and torch store it"
        ) from None
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"scale: {scale}, expected positive and finite")
    if not (np.isfinite(zero_point) & (np.rint(zero_point) == zero_point) & (np.abs(zero_point) <= _LARGEST)).all():
        raise ValueError(f"zero_point: {zero_point}, expected integers of no more than 2^50")
    if 0 in (scale.size, zero_point.size):
        raise ValueError("scale, zero_point: no values, expected one, or one per channel")
    if scale.ndim and zero_point.ndim and scale.shape != zero_point.shape:
        raise ValueError(f"scale, zero_point: shapes {scale.shape} and {zero_point.shape}, expected equal")
    return scale, zero_point


def _frozen(values: NDArray[Any]) -> Any:
    if values.ndim == 0:
        return values.item()
    values = values.copy()
    values.flags.writeable = False
    return values


def _contiguous_reals(array: ArrayLike) -> NDArray[Any]:
    array = reference.native(array, "array")
    wide = array.dtype.itemsize >= (8 if array.dtype.kind == "f" else 4)
    return np.require(array, dtype=np.float64 if wide else np.float32, requirements="C")


def _grids(quantization: Quantization, array: NDArray[Any], axis: int) -> tuple[Any, ...]:
    channels = array.shape[axis] if array.ndim else 1
    inner = int(np.prod(array.shape[axis:][1:])) if array.ndim else 1
    scale, zero_point = affine_parameters(quantization)
    return np.atleast_1d(scale), np.atleast_1d(zero_point), quantization.bits, channels, inner
