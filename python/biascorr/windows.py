"""How a kernel moves over the spatial axes of its input, and the sums that each of its taps sees.

convolution               tap k of output position j sees input position j * stride - pad + k * dilation
transposed convolution    tap k of input position i adds to output position i * stride + k * dilation - pad
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.reference import AxisWindow

TapSums = tuple[NDArray[Any] | None, NDArray[np.float64] | None]
"""Sums of integers (L,), of real numbers (2, L); one of them."""


@dataclass(frozen=True)
class Window:
    """How a kernel moves over the spatial axes of its input, one entry per axis.

    Parameters
    ----------
    taps, strides, dilations : tuple of int
        Size of the kernel; input positions between outputs; input positions between taps.
    pads : tuple of (int, int)
        Zeros before and after the input. Not read where `auto_pad` is set.
    auto_pad : str
        "SAME_UPPER" or "SAME_LOWER" pad for ceil(size / stride) outputs, the odd zero after or before; otherwise "NOTSET".
    """

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    auto_pad: str = "NOTSET"

    @property
    def sees_every_tap(self) -> bool:
        """Whether every output position sees real input at every tap, whatever the shape of the input."""
        if self.auto_pad != "NOTSET":
            return all(taps == 1 for taps in self.taps)
        return not any(map(any, self.pads))

    def along(self, shape: Sequence[int]) -> list[AxisWindow]:
        """(taps, stride, dilation, pad, outputs) along each axis of an input with this spatial shape."""
        windows = []
        for size, taps, stride, dilation, pads in zip(shape, self.taps, self.strides, self.dilations, self.pads):
            reach = (taps - 1) * dilation + 1
            if self.auto_pad != "NOTSET":
                total = max((-(-size // stride) - 1) * stride + reach - size, 0)
                before = total - total // 2 if self.auto_pad == "SAME_LOWER" else total // 2
                pads = (before, total - before)
            outputs = max((size + sum(pads) - reach) // stride + 1, 0)
            windows.append((taps, stride, dilation, pads[0], outputs))
        return windows

    def tap_sums(self, sample: NDArray[Any], channel_axis: int, space: Sequence[int]) -> tuple[TapSums, bool]:
        """The sums that each tap sees of a sample of this spatial shape; whether they are of float64."""
        return _kernels.tap_sums(sample, channel_axis, self.along(space))

    def seen(self, space: Sequence[int]) -> tuple[NDArray[np.float64], int]:
        """How many output positions see a real input position, for each tap, (*K,); and how many there are."""
        windows = self.along(space)
        counts = [_positions_seen(window, size) for window, size in zip(windows, space)]
        return functools.reduce(np.multiply.outer, counts), math.prod(window[-1] for window in windows)


@dataclass(frozen=True)
class TransposedWindow:
    """How the kernel of a transposed convolution spreads its input over the output, one entry per axis.

    Tap k of input position i adds to output position i * stride + k * dilation - pad, if there is one.

    Parameters
    ----------
    taps, strides, dilations : tuple of int
        Size of the kernel; output positions between inputs; output positions between taps.
    pads : tuple of (int, int)
        Output positions cut off before and after. Not read where `auto_pad` or `output_shape` is set.
    output_padding : tuple of int
        Output positions added after.
    output_shape : tuple of int, optional
        How many output positions are left; what is cut off is then spread evenly, the odd one before unless `auto_pad` is
        "SAME_UPPER".
    auto_pad : str
        "SAME_UPPER" or "SAME_LOWER" cut to size * stride positions where there are more, the odd one after or before; otherwise
        "NOTSET".
    """

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    output_padding: tuple[int, ...]
    output_shape: tuple[int, ...] | None = None
    auto_pad: str = "NOTSET"

    @property
    def sees_every_tap(self) -> bool:
        """Whether every output position gets something from every tap, whatever the shape of the input."""
        single = all(taps == stride == 1 for taps, stride in zip(self.taps, self.strides))
        return single and not any(self.output_padding) and self.output_shape is None

    def along(self, shape: Sequence[int]) -> list[tuple[list[tuple[int, int]], int]]:
        """Along each axis of an input of this spatial shape: (first, end) of the inputs that each tap spreads; the outputs."""
        axes = []
        for axis, (size, taps, stride, dilation) in enumerate(zip(shape, self.taps, self.strides, self.dilations)):
            reach = (size - 1) * stride + (taps - 1) * dilation + 1 + self.output_padding[axis]
            pad, outputs = self._cut(axis, reach, size * stride)
            offsets = [pad - tap * dilation for tap in range(taps)]
            bounds = [(-(-offset // stride), (offset + outputs - 1) // stride + 1) for offset in offsets]
            spread = [(min(max(first, 0), size), min(max(end, 0), size)) for first, end in bounds]
            axes.append(([(first, max(first, end)) for first, end in spread], outputs))
        return axes

    def _cut(self, axis: int, reach: int, same: int) -> tuple[int, int]:
        """Output positions that are cut off before, and those that are left of `reach`."""
        if self.output_shape is None and self.auto_pad == "NOTSET":
            return self.pads[axis][0], max(reach - sum(self.pads[axis]), 0)
        wanted = min(same, reach) if self.output_shape is None else self.output_shape[axis]
        total = max(reach - wanted, 0)
        return total // 2 if self.auto_pad == "SAME_UPPER" else total - total // 2, wanted

    def tap_sums(self, sample: NDArray[Any], channel_axis: int, space: Sequence[int]) -> tuple[TapSums, bool]:
        """The sums that each tap spreads of a sample of this spatial shape; whether they are of float64."""
        channels_last = np.moveaxis(np.asarray(sample), channel_axis, -1)
        spread = [bounds for bounds, _ in self.along(space)]
        regions = list(itertools.product(*spread))
        sums = {region: _sums_of_region(channels_last, region) for region in dict.fromkeys(regions)}
        integers, reals = zip(*(sums[region][0] for region in regions))
        return (_joined(integers), _joined(reals)), sums[regions[0]][1]

    def seen(self, space: Sequence[int]) -> tuple[NDArray[np.float64], int]:
        """How many output positions each tap adds a real input position to, (*K,); and how many there are."""
        axes = self.along(space)
        counts = [np.array([end - first for first, end in bounds], dtype=np.float64) for bounds, _ in axes]
        return functools.reduce(np.multiply.outer, counts), math.prod(outputs for _, outputs in axes)


def _joined(parts: Iterable[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present, axis=-1) if present else None


def _sums_of_region(channels_last: NDArray[Any], region: Sequence[tuple[int, int]]) -> tuple[TapSums, bool]:
    part = channels_last[(slice(None), *(slice(*bounds) for bounds in region))]
    if part.size == 0:
        part = np.zeros_like(channels_last, shape=(1, channels_last.shape[-1]))
    sums, _, wide = _kernels.channel_sums([part], -1, 0, None)
    return sums, wide


@functools.lru_cache(maxsize=256)
def positions_seen(window: Window | TransposedWindow, space: tuple[int, ...]) -> tuple[NDArray[np.float64], int]:
    """See :meth:`Window.seen`; batch after batch has the same shape."""
    return window.seen(space)


def _positions_seen(window: AxisWindow, size: int) -> NDArray[np.float64]:
    """How many output positions see a real input position, for each tap."""
    taps, stride, dilation, pad, outputs = window
    at = np.arange(outputs) * stride - pad + np.arange(taps)[:, None] * dilation
    return np.asarray(((at >= 0) & (at < size)).sum(axis=1), dtype=np.float64)
