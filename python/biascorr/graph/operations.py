"""Operations of a network, and the roles that some of them play between layers."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.axes import Order


class Kind(enum.Enum):
    """The kinds of operations that the engine tells apart when it runs them."""

    QUANTIZE = enum.auto()
    """Quantizes."""
    DEQUANTIZE = enum.auto()
    """Dequantizes; a sweep stores its integer input instead of its output."""
    SHAPE = enum.auto()
    """Gives out the shape of its input, whose values do not matter."""
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
        Its kind.
    is_lasting : bool
        Whether what it makes are arrays, which can be held; else it is made anew wherever it is read.
    is_shared : bool
        Whether other operations of the graph are calls of the same object, so that it cannot be edited on its own.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: Kind = Kind.OTHER
    is_lasting: bool = True
    is_shared: bool = False


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
        Added to the variance.
    channel_axis : int
        The axis that its channels are on, counted from either end.
    """

    name: str
    beta: NDArray[np.float64]
    gamma: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    epsilon: float
    channel_axis: int = 1


Bound: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True)
class ActivationType:
    """The function of an activation, which acts on each value.

    `ActivationType.no_activation`, `relu` and `relu6` limit it to their bounds; :meth:`clip` makes one with any other bounds;
    `ActivationType.other` is every other function.

    Parameters
    ----------
    name : str
        "no_activation", "relu", "relu6", "clip" or "other".
    bounds : (bound, bound) or None
        The limits of values, infinite where there is none: each a number, or a tuple with one for each channel. None
        for "other".
    """

    name: str
    bounds: tuple[Bound, Bound] | None

    no_activation: ClassVar[ActivationType]
    relu: ClassVar[ActivationType]
    relu6: ClassVar[ActivationType]
    other: ClassVar[ActivationType]

    @classmethod
    def clip(cls, low: Bound, high: Bound) -> ActivationType:
        """The activation that limits values to these bounds.

        Examples
        --------
        >>> ActivationType.clip(0.0, 6.0) is ActivationType.relu6
        True
        >>> ActivationType.clip(-1.0, 1.0)
        ActivationType(name='clip', bounds=(-1.0, 1.0))
        """
        low, high = (bound if isinstance(bound, float) else _bound(np.asarray(bound)) for bound in (low, high))
        named = (cls.no_activation, cls.relu, cls.relu6)
        return next((each for each in named if each.bounds == (low, high)), cls("clip", (low, high)))

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return self != ActivationType.no_activation

    def then(self, following: ActivationType) -> ActivationType:
        """Both, one after the other, as one activation."""
        if not self.acts or not following.acts:
            return self if self.acts else following
        if self.bounds is None or following.bounds is None:
            return ActivationType.other
        low, high = (_bound(np.clip(bound, *following.bounds)) for bound in self.bounds)
        return ActivationType.clip(low, high)


def _bound(values: NDArray[np.float64]) -> Bound:
    """One for all channels, where they have the same."""
    return float(values.flat[0]) if np.all(values == values.flat[0]) else tuple(values.tolist())


ActivationType.no_activation = ActivationType("no_activation", (-math.inf, math.inf))
ActivationType.relu = ActivationType("relu", (0.0, math.inf))
ActivationType.relu6 = ActivationType("relu6", (0.0, 6.0))
ActivationType.other = ActivationType("other", None)


@dataclass(frozen=True)
class Activation:
    """An operation that limits values, or another function of each value.

    Parameters
    ----------
    type : ActivationType
        The function.
    channel_axis : int
        The axis that bounds per channel belong to, counted from either end.
    can_limit_channels : bool
        Whether :class:`~biascorr.graph.network.Edits` can give it a bound for each channel along that axis.
    """

    type: ActivationType
    channel_axis: int
    can_limit_channels: bool


@dataclass(frozen=True)
class Leaky:
    """An operation that multiplies negative values with constants and keeps others: LeakyReLU, PReLU."""


class SpatialEffect(enum.Enum):
    """The effect of an operation on the positions of each channel."""

    NONE = enum.auto()
    """Each keeps its value: Identity, Dropout, a reshape of one value per channel."""
    AVERAGE = enum.auto()
    """They are averaged."""
    PADDING = enum.auto()
    """Zeros are put around them."""
    FLATTEN = enum.auto()
    """They become elements along one axis with the channels."""


@dataclass(frozen=True)
class ChannelPreserving:
    """An operation that keeps the channels of a tensor apart.

    Parameters
    ----------
    effect : SpatialEffect
        Its effect on the positions of each channel.
    channel_axis : int or None
        The axis of its input that has the channels, counted from either end; None where it passes on any axis as it is.
    output_axis : int or None
        The axis of its output that has them.
    order : Order or None
        How a flatten lays them out along that axis; None otherwise.
    """

    effect: SpatialEffect
    channel_axis: int | None = None
    output_axis: int | None = None
    order: Order | None = None


Role: TypeAlias = BatchNorm | Activation | Leaky | ChannelPreserving


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts about the operations and tensors of a network, known before it runs.

    Parameters
    ----------
    roles : mapping from str to Role
        The roles of operations, by name. Each reads the tensor that it acts on as its first input, and what it makes of it is
        its first output.
    shapes : mapping from str to tuple of int or None
        Shapes of tensors; None for an axis that may have any size.
    statistics : mapping from str to BatchNorm
        Statistics of tensors that batch normalizations made or read before they became part of layers: each is one that would
        leave the tensor as it is.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    statistics: Mapping[str, BatchNorm] = field(default_factory=dict)

    def rank(self, tensor: str) -> int | None:
        """Axes of a tensor; None where that is not known."""
        shape = self.shapes.get(tensor)
        return None if shape is None else len(shape)

    def batch_norm(self, operation: str) -> BatchNorm | None:
        """The batch normalization that an operation is."""
        role = self.roles.get(operation)
        return role if isinstance(role, BatchNorm) else None

    def activation(self, operation: str) -> Activation | None:
        """The activation that an operation is."""
        role = self.roles.get(operation)
        return role if isinstance(role, Activation) else None

    def preserving(self, operation: str, *effects: SpatialEffect) -> ChannelPreserving | None:
        """The operation as one that keeps channels apart, where it has one of these effects."""
        role = self.roles.get(operation)
        return role if isinstance(role, ChannelPreserving) and role.effect in effects else None
