from collections.abc import Sequence
from typing import Any

from numpy import float64
from numpy.typing import NDArray

__all__ = [
    "build_info",
    "channel_counts",
    "channel_mean",
    "channel_sums",
    "dequantize",
    "fake_quantize_array",
    "get_num_threads",
    "quantization_range",
    "quantize",
    "set_num_threads",
    "tap_sums",
    "weight_error",
    "weight_error_from_grids",
    "work_alone",
]

_Sums = tuple[NDArray[Any] | None, NDArray[float64] | None]
_Grids = tuple[NDArray[float64], NDArray[float64], int, int, int]
_WeightGrids = tuple[NDArray[float64], NDArray[float64], int, Sequence[int] | None, tuple[int, int] | None]

def channel_sums(samples: Sequence[Any], channel_axis: int, first: int, channels: int | None) -> tuple[_Sums, int, bool]: ...
def channel_mean(
    samples: Sequence[Any], channel_axis: int, scale: float | Sequence[float], zero_point: float | Sequence[float]
) -> NDArray[Any]: ...
def tap_sums(sample: Any, channel_axis: int, windows: Sequence[tuple[int, int, int, int, int]]) -> tuple[_Sums, bool]: ...
def weight_error(
    weights: Any, fake_quantized_weights: Any, mean: NDArray[float64], groups: int, layout: str, wide: bool
) -> NDArray[Any]: ...
def weight_error_from_grids(
    weights: NDArray[Any], grids: _WeightGrids, mean: NDArray[float64], groups: int, layout: str
) -> NDArray[Any]: ...
def channel_counts(shape: Sequence[int], layout: str, groups: int) -> tuple[int, int]: ...
def quantization_range(weights: NDArray[Any], bits: int, asymmetric: bool, search: bool) -> NDArray[float64]: ...
def quantize(array: NDArray[Any], grids: _Grids) -> NDArray[Any]: ...
def dequantize(array: NDArray[Any], grids: _Grids) -> NDArray[Any]: ...
def fake_quantize_array(array: NDArray[Any], grids: _Grids) -> NDArray[Any]: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def work_alone() -> None: ...
def build_info() -> tuple[str, str, str]: ...
