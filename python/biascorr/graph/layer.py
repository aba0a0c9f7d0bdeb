"""A layer: a linear operator with constant weights, which may be read only where they are needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from biascorr.graph.axes import aligned
from biascorr.quantization import Quantization
from biascorr.windows import TransposedWindow, Window


class LazyArray:
    """An array that is made each time it is read, so that weights of gigabytes are never held all at once.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : dtype
        Its dtype.
    read : callable
        Makes the array; the result is not changed by who reads it.

    Examples
    --------
    >>> lazy = LazyArray((2,), np.dtype("float32"), lambda: np.array([1.0, 2.0], np.float32))
    >>> np.asarray(lazy)
    array([1., 2.], dtype=float32)
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[], NDArray[Any]]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._read = read

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        array = self._read()
        wanted = array.dtype if dtype is None else np.dtype(dtype)
        return array.astype(wanted, copy=bool(copy))


Constant: TypeAlias = NDArray[Any] | LazyArray
"""An array, or what becomes one by ``np.asarray``; shape and dtype are known without reading it."""


@dataclass(frozen=True)
class WeightFormat:
    """How quantized weights are stored.

    Parameters
    ----------
    dtype : str
        Of the codes: "int8", "uint4", "float8_e4m3fn".
    scales : str
        What has a scale of its own: "tensor", "channel" or "block".
    block_size : int
        Weights of a block; 0 where there are none.
    """

    dtype: str
    scales: str
    block_size: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 0


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear operator with constant weights: y = gain * (weights x input) + bias.

    Parameters
    ----------
    name, op : str
        The name that reports give it, and its operator.
    weights : ndarray or LazyArray
        The weights in real units, fake-quantized ones in a quantized network; read by ``np.asarray``.
    layout : str
        The axes of the weights, as :class:`~biascorr.MeanBiasCorrector` names them.
    input : str
        The tensor it reads.
    input_quantization : Quantization or None
        The quantization of that tensor, where it holds quantized values.
    channel_axis : int
        Axis of the input that the weights contract, counted from either end.
    output : str
        The tensor it makes, bias included, before any activation.
    output_axis : int
        Axis of the output that the bias belongs to, from the end (negative).
    groups : int
        Groups of a convolution.
    window : Window, TransposedWindow or None
        How a convolution's kernel moves; None for a matrix product.
    gain : float
        A constant factor on the product (alpha of a Gemm).
    weight_step : ndarray, LazyArray or None
        Distance between neighbouring quantized weights, broadcastable to the weights; None where it is not known.
    bias : ndarray or None
        The bias in real units, its axes aligned with the last ones of the output; None where the layer has none.
    shares_weights : bool
        Whether something else reads the same weights, another call of the layer among them.
    call_of : str or None
        Name of the layer that this is a later call of, with the same weights and the same bias; None where it is the first
        call, or the only one.
    weight_format : WeightFormat or None
        How the weights are stored, where they are quantized and that is known.
    """

    name: str
    op: str
    weights: Constant
    layout: str
    input: str
    input_quantization: Quantization | None
    channel_axis: int
    output: str
    output_axis: int
    groups: int = 1
    window: Window | TransposedWindow | None = None
    gain: float = 1.0
    weight_step: Constant | None = None
    bias: NDArray[Any] | None = None
    shares_weights: bool = False
    call_of: str | None = None
    weight_format: WeightFormat | None = None

    @property
    def first_call(self) -> str:
        """Name of the first call of this layer, which has the weights and the bias: its own name but for a later call."""
        return self.name if self.call_of is None else self.call_of

    @property
    def channels(self) -> int:
        """Output channels, of all groups."""
        return self._size_of("OMGC") * (self.groups if self.layout.startswith("I") else 1)

    @property
    def input_channels(self) -> int:
        """Channels that it reads, of all groups."""
        return self._size_of("IGC") * (1 if self.layout.startswith("I") else self.groups)

    def _size_of(self, letters: str) -> int:
        return math.prod(size for letter, size in zip(self.layout, self.weights.shape) if letter in letters)

    def along_channels(self, values: NDArray[Any]) -> NDArray[Any]:
        """One value for each output channel, its axes aligned with the last ones of the output."""
        return aligned(values, self.output_axis)

    @property
    def rank(self) -> int | None:
        """Axes of its input and output; None where only the network knows."""
        return None if self.window is None else len(self.window.taps) + 2

    @property
    def sees_every_tap(self) -> bool:
        """Whether each output position sums over all taps of real input: none is padding, none is left out."""
        return self.window is None or self.window.sees_every_tap


def without_later_calls(layers: Iterable[Layer]) -> list[Layer]:
    """Each layer once, however often it is called."""
    return [layer for layer in layers if layer.call_of is None]
