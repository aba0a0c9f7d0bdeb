"""Means of a layer's input: measured per channel, measured per kernel tap, or expected of a clipped normal distribution.

    channel mean        E[x][c]    = (sum / count - zero_point) / scale
    tap mean            E[x][k, c] = (sum[k, c] - zero_point * seen[k]) / (scale * outputs)
    clipped normal      E[clip(x, a, b)],  x ~ N(beta, gamma^2)

Sums of integers are exact; sums of real numbers are compensated (double-double between blocks). The affine map of quantized
samples is applied once, at the end.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr import _kernels
from biascorr.quantization import Quantization, affine_parameters, check_channels
from biascorr.reference import mean_from_sums, merge_reals, native
from biascorr.windows import TransposedWindow, Window, positions_seen


class _Sums(NamedTuple):
    """Sums of samples: exact ones of integers, compensated ones of real numbers; either may still be missing."""

    integers: NDArray[Any] | None = None
    reals: NDArray[np.float64] | None = None
    wide: bool = False

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            _both(self.integers, other.integers, _exact), _both(self.reals, other.reals, merge_reals), self.wide or other.wide
        )

    @property
    def dtype(self) -> type[np.floating[Any]]:
        return np.float64 if self.wide else np.float32


def _both(first: Any, second: Any, add: Callable[[Any, Any], Any]) -> Any:
    return second if first is None else first if second is None else add(first, second)


_SAFE = 1 << 62
"""Below this the sum of two int64 cannot overflow."""


def _exact(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    small = first.dtype != object and second.dtype != object
    if not small or max(abs(int(f(x))) for x in (first, second) for f in (np.min, np.max)) >= _SAFE:
        first, second = first.astype(object), second.astype(object)
    return np.asarray(first + second)


class _Seen(NamedTuple):
    """What an accumulator has seen: a value, so that it changes as a whole."""

    sums: _Sums = _Sums()
    channels: int | None = None
    samples: int = 0
    positions: int = 0
    by_tap: Any = 0.0

    def plus(self, other: _Seen) -> _Seen:
        if None not in (self.channels, other.channels) and self.channels != other.channels:
            raise ValueError(f"other: {other.channels} channels, expected {self.channels}")
        return _Seen(
            self.sums.plus(other.sums),
            self.channels or other.channels,
            self.samples + other.samples,
            self.positions + other.positions,
            self.by_tap + other.by_tap,
        )


class _Accumulator:
    """Adds up what it sees: several threads may add at once, and what interrupts one leaves all of a sample or nothing."""

    def __init__(self) -> None:
        self._seen = _Seen()
        self._locks: dict[int, threading.Lock] = {}

    @property
    def has_integers_alone(self) -> bool:
        """Whether all samples so far were integers."""
        return self._seen.sums.integers is not None and self._seen.sums.reals is None

    def _add(self, seen: _Seen) -> None:
        with self._locks.setdefault(os.getpid(), threading.Lock()):  # a forked child may find that of its parent taken
            self._seen = self._seen.plus(seen)

    @staticmethod
    def _of_collections(samples: Any, empty: Any, channel_axis: int) -> _Seen:
        """What is seen of dask collections by such an accumulator."""
        from biascorr.dask_sums import summed

        found: _Seen = summed(samples, empty, channel_axis)._seen
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_locks": {}}


def _is_in_dask(samples: Any) -> bool:
    """Whether samples are in dask collections, which nobody has who has not imported dask."""
    if "dask" not in sys.modules:
        return False
    from biascorr.dask_sums import has_collections

    return has_collections(samples)


class ChannelMean(_Accumulator):
    """The mean of samples per channel, as an accumulator: update with samples, merge with others, ask for the mean.

    Parameters
    ----------
    channel_axis : int
        The axis of each sample that is not averaged over; the last by default, 1 for channels-first samples.

    Notes
    -----
    Merging the parts of integer samples in any grouping and order gives the same bits as one pass. Picklable. Several threads
    may update one; real numbers are then summed in the order in which they come.

    Examples
    --------
    >>> first, second = ChannelMean(), ChannelMean()
    >>> first.update(np.array([[[[0, 10], [2, 20]]]]))
    >>> second.update(np.array([[[[4, 30]]]]))
    >>> first.merge(second)
    >>> first.mean(), first.count
    (array([ 2., 20.], dtype=float32), 3)
    """

    def __init__(self, *, channel_axis: int = -1) -> None:
        super().__init__()
        self._channel_axis = channel_axis

    @property
    def count(self) -> int:
        """Positions averaged over, of all samples together."""
        return self._seen.positions

    def __repr__(self) -> str:
        _, channels, samples, count, _ = self._seen
        seen = f"{channels} channels, {_number(samples, 'sample')}, {_number(count, 'position')}"
        return f"<ChannelMean along axis {self._channel_axis}: {'nothing yet' if channels is None else seen}>"

    def update(self, sample: Any) -> None:
        """Adds one sample, (N, *S, C) in quantized steps or real units.

        A dask collection is computed and adds all of its samples, as an accumulator that has seen them; see
        :func:`prepare_input_mean`.

        Raises
        ------
        TypeError
            The dtype is not of real numbers, integers or booleans.
        ValueError
            The sample is 0-dimensional or has no elements, or another number of channels than those before.
        """
        if _is_in_dask(sample):
            found = self._of_collections(sample, ChannelMean(channel_axis=self._channel_axis), self._channel_axis)
            self._add(found._replace(samples=1) if hasattr(type(sample), "chunks") else found)  # an array is one sample
            return
        _, channels, samples, _, _ = self._seen
        sums, count, wide = _kernels.channel_sums([sample], self._channel_axis, samples, channels)
        channels = next(part.shape[-1] for part in sums if part is not None)
        self._add(_Seen(_Sums(*sums, wide), channels, 1, count))

    def merge(self, other: ChannelMean) -> None:
        """Adds what another accumulator has seen. ValueError if its number of channels differs."""
        self._add(other._seen)

    def mean(self, quantization: Any = None) -> NDArray[Any]:
        """The mean of all positions of all samples.

        Parameters
        ----------
        quantization : Quantization, optional
            Any object with `scale` (steps per unit) and `zero_point`, both scalar or (C,). None: the samples are real
            numbers; integer samples are averaged as they are.

        Returns
        -------
        ndarray, (C,)
            In real units; float64 if any sample was float64, else float32.

        Raises
        ------
        ValueError
            There were no samples; the quantization is invalid or has another number of channels.
        """
        sums, channels, _, count, _ = self._seen
        if channels is None:
            raise ValueError("samples: none given, at least one is needed")
        mean = mean_from_sums(sums.integers, sums.reals, count)
        if quantization is not None:
            scale, zero_point = _scale_and_zero_point(quantization, channels)
            mean = (mean - zero_point) / scale
        return _rounded(mean, sums.dtype)


def prepare_input_mean(calibration_input: Iterable[Any], quantization: Any) -> NDArray[Any]:
    """The mean of a layer's input per channel, over every axis but the last of all samples together.

    Parameters
    ----------
    calibration_input : iterable of ndarray, each (N, *S, C); dask collection
        Samples, channels last, of any rank >= 1; shapes may differ in all but C. Any integer, boolean or floating dtype,
        those of ml_dtypes included. An iterator is consumed once, one sample in memory at a time; an
        array is one sample. A dask array of any chunks is one sample too; a bag has samples, so has a list of delayed ones;
        all are summed where they are, by the scheduler that is in use, and only sums come here.
    quantization : Quantization or None
        The quantization of the samples: any object with `scale` (steps per unit) and `zero_point`, both scalar or (C,).
        None: the samples are real numbers; integer samples are averaged as they are.

    Returns
    -------
    ndarray, (C,)
        In real units; float64 if any sample is float64, else float32.

    Raises
    ------
    TypeError
        The dtype of a sample is not of real numbers, integers or booleans.
    ValueError
        A sample is 0-dimensional, has no elements, or has another number of channels than the first; there are no samples; the
        quantization is invalid or has another number of channels.

    Warns
    -----
    UserWarning
        The scale is below 1, and all means are beyond the range of the integers: likely it is a step, not steps per unit.

    Notes
    -----
    Each position weighs the same. Integers are summed exactly. nan and inf propagate as in numpy. The mean of a dask collection
    has the bits of that of the same samples in numpy (an array in C order), however it is divided and whoever computes it.

    Examples
    --------
    >>> prepare_input_mean([np.array([[[[0, 10], [2, 20]]]]), np.array([[[[4, 30]]]])], None)
    array([ 2., 20.], dtype=float32)
    """
    if isinstance(calibration_input, np.ndarray):
        calibration_input = [calibration_input]
    is_in_dask = _is_in_dask(calibration_input)
    if not is_in_dask and (type(calibration_input) is list or type(calibration_input) is tuple):
        scale, zero_point = _affine(quantization)
        mean = _kernels.channel_mean(calibration_input, -1, scale, zero_point)
        if quantization is not None and (scale if type(scale) is float else scale[0]) < _FEW_STEPS:
            _warn_of_a_step(mean, quantization, all(_is_integer(sample) for sample in calibration_input))
        return mean
    means = ChannelMean()
    for sample in [calibration_input] if is_in_dask else _one_by_one(calibration_input):
        means.update(sample)
    mean = means.mean(quantization)
    if quantization is not None:
        _warn_of_a_step(mean, quantization, means.has_integers_alone)
    return mean


_FEW_STEPS = 1.0
"""Steps per unit, below which a scale may be meant as a step: what 8 bits hold reaches beyond 128 then."""


def _is_integer(sample: Any) -> bool:
    return isinstance(sample, np.ndarray) and sample.dtype.kind in "iu"


def _warn_of_a_step(mean: NDArray[Any], quantization: Any, are_integers: bool) -> None:
    """Warns where all means, but those of silent channels, are beyond the integers themselves: the scale likely is a step.

    Not where it was made of a range or a step: activations of some thousands have such scales.
    """
    if getattr(quantization, "has_known_unit", False):
        return
    bits = getattr(quantization, "bits", 8)
    audible = mean[mean != 0]
    is_small = np.max(quantization.scale) < _FEW_STEPS
    if is_small and are_integers and audible.size and (np.abs(audible) > 2**bits).all():
        scale, zero_point = (np.asarray(value).tolist() for value in (quantization.scale, quantization.zero_point))
        warnings.warn(
            f"quantization: scale {scale}: all means are beyond {2**bits}, the range of {bits} bits; a scale is in steps per "
            f"unit: if this is a step, as ONNX, TFLite and torch store it, use Quantization.from_step({scale}, {zero_point})",
            stacklevel=3,
        )


def _one_by_one(samples: Iterable[Any]) -> Iterable[Any]:
    """The samples, each of which may be gone when the next one is asked for: a subclass of list may fill one buffer again."""
    if isinstance(samples, (list, tuple)) and type(samples).__iter__ in (list.__iter__, tuple.__iter__):
        return map(samples.__getitem__, range(len(samples)))
    return samples


def _affine(quantization: Any) -> tuple[Any, Any]:
    """Scale and zero point as the kernel takes them: one value each, or a list of one per channel."""
    if quantization is None:
        return 1.0, 0.0
    if type(quantization) is Quantization and type(quantization.scale) is float and type(quantization.zero_point) is int:
        return quantization.scale, quantization.zero_point  # checked when it was made
    scale, zero_point = affine_parameters(quantization)
    return scale.tolist(), zero_point.tolist()


class TapMean(_Accumulator):
    """The mean of what each kernel tap sees, zeros of the padding included: exact for any padding, stride and dilation.

    Of a transposed convolution it is the mean of what each tap adds to the output.

    Parameters
    ----------
    window : Window or TransposedWindow
        How the kernel moves.
    channel_axis : int
        Channel axis of the samples, (N, C, *S) by default.
    """

    def __init__(self, window: Window | TransposedWindow, *, channel_axis: int = 1) -> None:
        super().__init__()
        self._window = window
        self._channel_axis = channel_axis

    @property
    def count(self) -> int:
        """Output positions averaged over, of all samples together."""
        return self._seen.positions

    def __repr__(self) -> str:
        _, channels, _, outputs, _ = self._seen
        seen = f"{channels} channels, {_number(outputs, 'output position')}"
        return f"<TapMean of {self._window}: {'nothing yet' if channels is None else seen}>"

    def update(self, sample: Any) -> None:
        """Adds one batch, (N, C, *S) in quantized steps or real units, of any spatial size.

        A dask collection is computed, and adds all of its batches.

        Raises ValueError where its rank is not that of the window, or its number of channels not that of those before.
        """
        if _is_in_dask(sample):
            empty = TapMean(self._window, channel_axis=self._channel_axis)
            self._add(self._of_collections(sample, empty, self._channel_axis))
            return
        shape = np.shape(sample)
        axis, rank = self._channel_axis, len(self._window.taps) + 2
        if len(shape) != rank or not -rank <= axis < rank or axis % rank == 0:
            raise ValueError(f"sample: shape {shape}, expected {rank} axes with the channels along axis {axis} after the batch")
        if self._seen.channels not in (None, shape[axis]):
            raise ValueError(f"sample: {shape[axis]} channels, expected {self._seen.channels} as in those before")
        space = [size for k, size in enumerate(shape) if k not in (0, axis % rank)]
        sums, wide = self._window.tap_sums(sample, axis, space)
        by_tap, outputs = positions_seen(self._window, tuple(space))
        self._add(_Seen(_Sums(*sums, wide), shape[axis], 1, shape[0] * outputs, shape[0] * by_tap[..., None]))

    def merge(self, other: TapMean) -> None:
        """Adds what another accumulator of the same window has seen. ValueError if its number of channels differs."""
        self._add(other._seen)

    def mean(self, quantization: Any = None) -> NDArray[Any]:
        """The mean in real units, (*K, C): float64 if any sample was float64, else float32."""
        sums, _, _, outputs, by_tap = self._seen
        if outputs == 0:
            raise ValueError("samples: none with an output position, at least one is needed")
        mean = mean_from_sums(sums.integers, sums.reals, outputs).reshape(*self._window.taps, -1)
        if quantization is not None:
            scale, zero_point = _scale_and_zero_point(quantization, mean.shape[-1])
            mean = (mean - zero_point * (by_tap / outputs)) / scale
        return _rounded(mean, sums.dtype)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _rounded(mean: NDArray[np.float64], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # beyond float32 is inf, as in the kernel
        return mean.astype(dtype, copy=False)


def _scale_and_zero_point(quantization: Any, channels: int) -> tuple[Any, Any]:
    scale, zero_point = affine_parameters(quantization)
    check_channels(scale, zero_point, channels)
    return scale, zero_point


def clipped_normal_mean(
    beta: ArrayLike, gamma: ArrayLike, low: ArrayLike = -np.inf, high: ArrayLike = np.inf
) -> NDArray[np.float64]:
    """E[clip(x, low, high)] for x ~ N(beta, gamma^2).

    Parameters
    ----------
    beta, gamma : array_like, (C,)
        Mean and standard deviation; the sign of gamma does not matter, 0 means x = beta.
    low, high : array_like, () or (C,)
        The bounds: (0, inf) is ReLU, (0, 6) ReLU6.

    Returns
    -------
    ndarray, (C,), float64

    Raises
    ------
    ValueError
        Shapes differ; low > high, or they are neither numbers nor of the shape of beta.

    Notes
    -----
    beta (Phi(t_b) - Phi(t_a)) + abs(gamma) (phi(t_a) - phi(t_b)) + a Phi(t_a) + b (1 - Phi(t_b)) with
    t = (bound - beta) / abs(gamma): arXiv 1906.04721, appendix C.

    Examples
    --------
    >>> clipped_normal_mean([0.0, 7.0], [1.0, -1.0], 0.0, 6.0).round(6)
    array([0.398942, 5.916685])
    """
    beta, gamma = (np.asarray(native(x, name), dtype=np.float64) for name, x in (("beta", beta), ("gamma", gamma)))
    gamma = np.abs(gamma)
    if beta.shape != gamma.shape:
        raise ValueError(f"beta, gamma: shapes {beta.shape} and {gamma.shape}, expected equal")
    low, high = (np.asarray(bound, dtype=np.float64) for bound in (low, high))
    if not all(bound.shape in ((), beta.shape) for bound in (low, high)):
        raise ValueError(f"low, high: shapes {low.shape} and {high.shape}, expected () or {beta.shape} as of beta")
    if not (low <= high).all():
        raise ValueError(f"low, high: {low}, {high}, expected low <= high")
    spread = np.where(gamma == 0, 1.0, gamma)
    with np.errstate(over="ignore", invalid="ignore"):  # a bound that many deviations away is at infinity
        below, density_low = _tail_and_density((low - beta) / spread)
        above, density_high = _tail_and_density((beta - high) / spread)
        mean = beta * (1.0 - below - above) + gamma * (density_low - density_high)
    for bound, beyond in ((low, below), (high, above)):
        mean += np.where(np.isfinite(bound), bound, 0.0) * beyond
    certain = (gamma == 0) | (np.isinf(beta) & np.isfinite(gamma)) | (low == high)
    return np.where(certain, np.clip(beta, low, high), mean)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _tail_and_density(t: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Phi(t) and phi(t) of the standard normal distribution."""
    return 0.5 * _erfc(-t / math.sqrt(2.0)), np.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
