"""What the engine knows of a model: its layers, and what can be asked of the network they are in."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr.calibration.data import ModelInput
from biascorr.calibration.storage import Buffers
from biascorr.quantization import Quantization
from biascorr.statistics import TransposedWindow, Window

Feeds = Mapping[str, NDArray[Any]]
"""Tensors of one batch by name."""


class Kind(enum.Enum):
    """What the engine has to know of an operation."""

    QUANTIZE = enum.auto()
    DEQUANTIZE = enum.auto()
    """Its input is smaller than its output and says as much."""
    POINTWISE = enum.auto()
    """Each element of its output depends on the same elements of its inputs and on constants: activations, above all."""
    OTHER = enum.auto()


@dataclass(frozen=True)
class Operation:
    """A node of the graph that depends on the inputs of the model.

    Parameters
    ----------
    name : str
        Of the node, as layers are named.
    inputs, outputs : tuple of str
        The tensors it reads, constants left out, and makes.
    kind : Kind
        What is known of it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: Kind = Kind.OTHER


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear operator with constant weights: y = gain * (weights x input) + bias.

    Parameters
    ----------
    name, op : str
        Of the node: what the report calls it, and its operator.
    weights : ndarray
        What the operator multiplies with, in real units; fake-quantized ones in a quantized network.
    layout : str
        The axes of the weights, as :class:`~biascorr.MeanBiasCorrector` names them.
    input : str
        The tensor it reads.
    input_quantization : Quantization or None
        Where the tensor holds quantized values: what they stand for.
    channel_axis : int
        Axis of the input that the weights contract.
    output : str
        The tensor that it makes, bias included, before any activation.
    output_axis : int
        Axis of the output that the bias belongs to, from the end (negative).
    groups : int
        Groups of a convolution.
    window : Window, TransposedWindow or None
        How a convolution's kernel moves; None for a matrix product.
    gain : float
        A constant factor on the product (alpha of a Gemm).
    weight_step : ndarray or None
        Distance between neighbouring quantized weights, broadcastable to the weights; None where it is not known.
    bias : ndarray or None
        What is added to the product, in real units, its axes aligned with the last ones of the output; None where nothing is.
    shares_weights : bool
        Whether something else reads the same weights.
    """

    name: str
    op: str
    weights: NDArray[Any]
    layout: str
    input: str
    input_quantization: Quantization | None
    channel_axis: int
    output: str
    output_axis: int
    groups: int = 1
    window: Window | TransposedWindow | None = None
    gain: float = 1.0
    weight_step: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None
    shares_weights: bool = False

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
        return values.reshape(-1, *[1] * (-1 - self.output_axis))

    @property
    def sees_every_tap(self) -> bool:
        """Whether each output position sums over all taps of real input: none is padding, none is left out."""
        return self.window is None or self.window.sees_every_tap


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A batch normalization with its statistics fixed: y = gamma * (x - mean) / sqrt(variance + epsilon) + beta.

    Parameters
    ----------
    name : str
        Of the node, as layers are named.
    beta, gamma, mean, variance : ndarray, (C,), float64
        Of each channel. The output is taken to be normal, with mean beta and standard deviation abs(gamma).
    epsilon : float
        What the variance is increased by.
    """

    name: str
    beta: NDArray[np.float64]
    gamma: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    epsilon: float


Bound: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True)
class ActivationType:
    """What an activation does to each value.

    `ActivationType.no_activation`, `relu` and `relu6` limit it to their bounds; :meth:`clip` makes one with any other bounds;
    `ActivationType.other` is every other function.

    Parameters
    ----------
    name : str
        "no_activation", "relu", "relu6", "clip" or "other".
    bounds : (bound, bound) or None
        What values are limited to, infinite where there is no limit: each a number, or a tuple with one for each channel along
        axis 1. None for "other".
    """

    name: str
    bounds: tuple[Bound, Bound] | None

    no_activation: ClassVar[ActivationType]
    relu: ClassVar[ActivationType]
    relu6: ClassVar[ActivationType]
    other: ClassVar[ActivationType]

    @classmethod
    def clip(cls, low: Bound, high: Bound) -> ActivationType:
        """What limits values to these bounds.

        Examples
        --------
        >>> ActivationType.clip(0.0, 6.0) is ActivationType.relu6
        True
        >>> ActivationType.clip(-1.0, 1.0)
        ActivationType(name='clip', bounds=(-1.0, 1.0))
        """
        named = (cls.no_activation, cls.relu, cls.relu6)
        return next((each for each in named if each.bounds == (low, high)), cls("clip", (low, high)))


ActivationType.no_activation = ActivationType("no_activation", (-math.inf, math.inf))
ActivationType.relu = ActivationType("relu", (0.0, math.inf))
ActivationType.relu6 = ActivationType("relu6", (0.0, 6.0))
ActivationType.other = ActivationType("other", None)


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The operations around the layers, by name, as far as they tell what a layer reads.

    Each reads the tensor that it acts on as its first input and gives out what it makes of it as its first output.

    Parameters
    ----------
    batch_norms : mapping from str to BatchNorm
        Their channels are along axis 1.
    activations : mapping from str to ActivationType
        What limits values, and other functions of each value.
    limitable : collection of str
        The activations that can limit each channel along axis 1 to another value; see :class:`Edits`.
    identities : collection of str
        What gives out its input, each channel where it was along axis 1.
    averages : collection of str
        What averages over positions, each channel where it was along axis 1.
    leaky : collection of str
        What multiplies negative values with constants and keeps others: LeakyReLU, PReLU.
    paddings : collection of str
        What pads with zeros along other axes than 0 and 1.
    flattens : collection of str
        What makes one axis of all but the first: each channel along axis 1 becomes as many neighbours as it had positions.
    folded : mapping from str to BatchNorm
        What is known of tensors because batch normalizations that made or read them have become part of layers: each is one
        that would leave the tensor as it is, with channels along axis 1.
    shapes : mapping from str to tuple of int or None
        Shapes of tensors, as far as they are known before the network runs; None for an axis that may have any size.
    """

    batch_norms: Mapping[str, BatchNorm]
    activations: Mapping[str, ActivationType]
    limitable: Collection[str]
    identities: Collection[str]
    averages: Collection[str]
    leaky: Collection[str]
    paddings: Collection[str]
    flattens: Collection[str]
    folded: Mapping[str, BatchNorm]
    shapes: Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True, eq=False)
class Edits:
    """What is different in a copy of a network; all else is as it was.

    Parameters
    ----------
    weights : mapping from str to ndarray
        Of layers, by name, in their own layouts.
    biases : mapping from str to ndarray
        Of layers, by name: (channels,), or of the shape of the bias that was there. A layer without one gets one.
    limits : mapping from str to (array_like, array_like)
        What an activation limits values to, by the name of the operation: each a number or an array that broadcasts to its
        tensor, infinite where there is no limit.
    removed : collection of str
        Operations whose first output is to be their first input.
    folded : mapping from str to BatchNorm
        What is known of tensors, by their names before the edits; see :class:`Surroundings`. What was known of others stays.
    """

    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    limits: Mapping[str, tuple[ArrayLike, ArrayLike]] = field(default_factory=dict)
    removed: Collection[str] = ()
    folded: Mapping[str, BatchNorm] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Parameters
    ----------
    name, op : str
        The layer and its operator.
    method : str or None
        How its bias was corrected, with the strength; with "hybrid", which of its two. None: it was left alone.
    channels : int or None
        Output channels; None where the layer was not understood.
    shift_before, shift_after : float or None
        Mean over channels of the absolute shift that the method found, in real units: before it was added to the bias, and what
        is left of it after rounding to the bias's own format. 0 where the weights are not quantized; None where it was left
        alone for another reason.
    reason : str
        Why the layer was left alone, or what is worth knowing about its bias; else empty.
    """

    name: str
    op: str
    method: str | None = None
    channels: int | None = None
    shift_before: float | None = None
    shift_after: float | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class BiasChange:
    """What became of a shift that was added to a bias.

    Parameters
    ----------
    applied : ndarray, (channels,), float64
        The change of the bias in real units, after rounding to its format.
    note : str
        What is worth knowing: a saturated value, a bias that did not exist before.
    """

    applied: NDArray[Any]
    note: str = ""


class Network(Protocol):
    """A model of some framework, as the engine sees it. Layers are in topological order."""

    @property
    def model(self) -> Any:
        """The framework's own model."""

    @property
    def inputs(self) -> Sequence[ModelInput]:
        """What a batch must have."""

    @property
    def order(self) -> Sequence[str]:
        """Names of layers, those left alone among them, in topological order; other names may stand between."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers that can be corrected."""

    @property
    def left_alone(self) -> Sequence[LayerReport]:
        """The layers that cannot, with the reasons."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of what the model gives out."""

    @property
    def operations(self) -> Sequence[Operation]:
        """All nodes that depend on the inputs, in topological order."""

    @property
    def surroundings(self) -> Surroundings:
        """What is around the layers."""

    def part(
        self, given: Feeds, wanted: Sequence[str], *, threads: int = 0, buffers: Buffers | None = None
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """What computes the wanted tensors from given ones, of which an example is needed for their dtypes.

        May be called from several threads at once, each call with so many threads (0: all there are). What it computes is
        written into the buffers, where there are any.
        """

    def copy(self) -> Network:
        """A network of its own, to change its biases."""

    def edited(self, edits: Edits) -> Network:
        """A copy with these edits. Layers keep their names."""

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> Network:
        """A copy in which layers, by name, read their input moved to a grid: one scale and zero point, up to 16 bits.

        Other readers of the same tensors are as before. The layers keep their names.
        """

    def add_to_bias(self, layer: Layer, shift: NDArray[Any]) -> BiasChange:
        """Adds a shift, (channels,) in real units, to the bias of a layer; a layer without one gets one."""

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Writes the model, whole or not at all; an existing file is kept unless `force`."""
