"""Each kernel beside its numpy twin, under one signature: what the tests compare and the benchmark times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import Quantization, _kernels, channel_scale, fake_quantize, reference


@dataclass(frozen=True)
class Comparison:
    """A kernel, its twin, and how far they may differ.

    Parameters
    ----------
    fast, twin : callable
        Same arguments, same result.
    rtol : float
        Relative to the mean absolute value summed over; 0 means the same bits.
    """

    fast: Callable[..., Any]
    twin: Callable[..., Any]
    rtol: float


def totals(sums: tuple[NDArray[Any] | None, NDArray[Any] | None]) -> NDArray[Any]:
    """The kernel's sums as the twin gives them: Python integers, or float64."""
    integers, reals = sums
    return integers.astype(object) if integers is not None else reference.mean_from_sums(None, reals, 1)


def _channel_sums(sample: Any, channel_axis: int = -1) -> NDArray[Any]:
    sums, _, _ = _kernels.channel_sums([sample], channel_axis, 0, None)
    return totals(sums)


def _channel_mean(samples: Any, scale: Any, zero_point: Any) -> NDArray[Any]:
    return _kernels.channel_mean(samples, -1, np.ravel(scale).tolist(), np.ravel(zero_point).tolist())


def _tap_sums(sample: Any, windows: Sequence[reference.AxisWindow], channel_axis: int = 1) -> NDArray[Any]:
    sums, _ = _kernels.tap_sums(sample, channel_axis, windows)
    return totals(sums).reshape(*(window[0] for window in windows), -1)


def _quantize(array: Any, scale: Any, zero_point: Any, bits: int) -> NDArray[Any]:
    return Quantization(scale, zero_point, bits).quantize(array)


def _dequantize(array: Any, scale: Any, zero_point: Any) -> NDArray[Any]:
    return Quantization(scale, zero_point).dequantize(array)


def _fake_quantize(array: Any, scale: Any, zero_point: Any, bits: int) -> NDArray[Any]:
    return fake_quantize(array, Quantization(scale, zero_point, bits))


def _quantization_range(weights: Any, bits: int, asymmetric: bool, search: bool) -> NDArray[Any]:
    dtype = np.float64 if weights.dtype == np.float64 else np.float32
    return _kernels.quantization_range(np.require(weights, dtype, "CA"), bits, asymmetric, search)


def _weight_error(weights: Any, fake_quantized: Any, mean: Any, groups: int, layout: str) -> NDArray[Any]:
    return _kernels.weight_error(weights, fake_quantized, np.asarray(mean, dtype=np.float64), groups, layout, True)


def _channel_ranges(weights: Any, layout: str, axis: str, groups: int = 1, factors: Any = None) -> NDArray[Any]:
    return channel_scale.channel_ranges(weights, layout, axis=axis, groups=groups, factors=factors)


def _scaled_channels(weights: Any, layout: str, groups: int, outputs: Any, inputs: Any) -> NDArray[Any]:
    return channel_scale.scaled_channels(weights, layout, groups=groups, output_factors=outputs, input_factors=inputs)


COMPARISONS = {
    "channel_sums": Comparison(_channel_sums, reference.channel_sums, 1e-13),
    "channel_mean": Comparison(_channel_mean, reference.channel_mean, 1e-7),
    "tap_sums": Comparison(_tap_sums, reference.tap_sums, 1e-13),
    "quantization_range": Comparison(_quantization_range, reference.quantization_range, 0),
    "quantize": Comparison(_quantize, reference.quantize, 0),
    "dequantize": Comparison(_dequantize, reference.dequantize, 0),
    "fake_quantize": Comparison(_fake_quantize, reference.fake_quantize, 0),
    "channel_ranges": Comparison(_channel_ranges, reference.channel_ranges, 0),
    "scaled_channels": Comparison(_scaled_channels, reference.scaled_channels, 0),
    "weight_error": Comparison(_weight_error, reference.weight_error, 1e-13),
}
