"""The protocols that an adapter fulfils, one per ability: read and run a network, add to its biases, edit it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr.graph.layer import Constant, Layer
from biascorr.graph.operations import BatchNorm, Facts, Operation
from biascorr.graph.reasons import LayerReport, Reason, ReasonCode
from biascorr.quantization import Quantization

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
"""Tensors of one batch by name."""

Shift: TypeAlias = NDArray[np.float64]
"""A shift that is added to the bias of a layer, (channels,), in real units."""


@dataclass(frozen=True)
class ModelInput:
    """An input of a model.

    Parameters
    ----------
    name : str
        Its name.
    dtype : numpy dtype
        Of its elements.
    shape : tuple of int or None, or None
        Its axes, None where one may have any size; None where even the rank is unknown.
    symbols : tuple of str
        The names that the model gives its axes, empty ones where it gives none; nothing where it gives no axis a name.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None
    symbols: tuple[str, ...] = ()


class Allocator(Protocol):
    """Gives memory for results, so that it can be used again."""

    def take(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any values."""


@dataclass(frozen=True, eq=False)
class BiasChange:
    """The change of a bias by a shift.

    Parameters
    ----------
    applied : ndarray, (channels,), float64, or None
        The change in real units, after rounding to the bias's format; None where the bias cannot be changed.
    reasons : tuple of Reason
        Remarks: a saturated value, a bias that did not exist before; why the bias cannot be changed.
    """

    applied: Shift | None
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, eq=False)
class Edits:
    """The differences between a copy of a network and the original; all else is as it was.

    Parameters
    ----------
    weights : mapping from str to Constant
        Of layers, by name, in their own layouts. Those of a layer of several calls are given once, by the name of the first.
    biases : mapping from str to ndarray
        Of layers, by name, as the weights: (channels,), or of the shape of the bias that was there. A layer without one gets
        one.
    limits : mapping from str to (array_like, array_like)
        New limits of activations, by the name of the operation: each a number or an array that broadcasts to its
        tensor, infinite where there is no limit.
    removed : collection of str
        Operations whose first output is to be their first input. Outputs of the model keep their names.
    statistics : mapping from str to BatchNorm
        Statistics of tensors, by their names before the edits; see :class:`Facts`. Those of other tensors stay.
    """

    weights: Mapping[str, Constant] = field(default_factory=dict)
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    limits: Mapping[str, tuple[ArrayLike, ArrayLike]] = field(default_factory=dict)
    removed: Collection[str] = ()
    statistics: Mapping[str, BatchNorm] = field(default_factory=dict)


class Network(Protocol):
    """A model of some framework that can be read and run. Layers are in topological order.

    A layer that is called several times is there once per call, or not at all: each by the name of its own operation, with its
    own input, window and output; all with the same weights and the same bias. `call_of` of the later ones names the first.

    It can be pickled: what it was made of travels, and it is made again, to compute the same bits; see
    :mod:`biascorr.graph.travel`.
    """

    @property
    def inputs(self) -> Sequence[ModelInput]:
        """The inputs that a batch must have."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of the outputs of the model."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers that can be corrected."""

    @property
    def unsupported(self) -> Sequence[LayerReport]:
        """The layers that cannot, with the reasons."""

    @property
    def order(self) -> Sequence[str]:
        """Names of all layers, unsupported ones among them, in topological order; other names may stand between."""

    @property
    def operations(self) -> Sequence[Operation]:
        """All nodes that depend on the inputs, in topological order."""

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that it computes from; found when it is first asked for.

        The same in every process, whatever the model was read from, and other where a weight, an attribute, a quantizer or the
        graph is. How a file says that it was made does not count.
        """

    def facts(self) -> Facts:
        """Facts about operations and tensors; found at the first call."""

    def part(
        self, given: Feeds, wanted: Sequence[str], *, threads: int = 0, allocator: Allocator | None = None
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """Prepares the computation of the wanted tensors from given ones, of which an example is needed for their dtypes.

        The result may be called from several threads at once, each call with so many threads (0: all there are). What it
        computes is written into memory of the allocator, where there is one.
        """


class BiasNetwork(Network, Protocol):
    """A network whose biases can be changed."""

    @property
    def model(self) -> Any:
        """The framework's own model."""

    def check(self) -> None:
        """Raises ValueError where the framework's own runtime does not take the model."""

    def deployed(self, *, threads: int = 0, optimized: bool = True) -> Callable[[Feeds], dict[str, Any]]:
        """Prepares the model to run as it is saved, by its own runtime as users have it; gives the outputs of a batch.

        With optimizations, products of integers may be summed as fast as a CPU can, where it may saturate; and without, which
        still may use other arithmetic than :meth:`part`.
        """

    def bias_change(self, layer: Layer, shift: Shift) -> BiasChange:
        """The change that adding a shift to a layer's bias would make; a layer without one would get one.

        Of a layer of several calls, this is asked for the first.
        """

    def with_shifts(self, shifts: Mapping[str, Shift]) -> BiasNetwork:
        """A copy with these shifts added to the biases of layers, by name.

        Of a layer of several calls, the first has the shift of the one bias; later ones may be there too, with the same shift,
        which is not added again.
        """

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Writes the model, whole or not at all; an existing file is kept unless `force`."""


class TracedNetwork(BiasNetwork, Protocol):
    """A network whose files have a place for how they were made."""

    keeps_provenance: bool

    def save(self, path: str | PathLike[str], *, force: bool = False, provenance: str | None = None) -> None:
        """Writes the model as :meth:`BiasNetwork.save`, with its provenance in place of any before."""


class EditableNetwork(BiasNetwork, Protocol):
    """A network whose weights, bounds and operations can be changed."""

    def edited(self, edits: Edits) -> EditableNetwork:
        """A copy with these edits. Layers keep their names."""

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> EditableNetwork:
        """A copy in which layers, by name, read their input moved to a grid: one scale and zero point, up to 16 bits.

        Each call of a layer has its own. Other readers of the same tensors are as before. The layers keep their names.
        """


class RenamableNetwork(BiasNetwork, Protocol):
    """A network whose inputs have no names of their own."""

    def with_input_names(self, names: Sequence[str]) -> BiasNetwork:
        """The same network, whose inputs are called so."""


def is_network(model: Any) -> bool:
    """Whether an adapter has made this."""
    return all(hasattr(type(model), name) for name in ("part", "facts"))


def is_traced(network: Network) -> TypeGuard[TracedNetwork]:
    """Whether its files have a place for how they were made."""
    return bool(getattr(network, "keeps_provenance", False))


def require_biases(network: Network, name: str) -> BiasNetwork:
    """The network, as one whose biases can be changed. Raises TypeError, with the name, where they cannot."""
    return cast(BiasNetwork, _checked(network, ("with_shifts",), f"{name}: the biases of such a model cannot be changed"))


_EDITS = ("edited", "with_quantizers")


def is_editable(network: Network) -> bool:
    """Whether its weights, bounds and operations can be changed."""
    return all(hasattr(network, method) for method in _EDITS)


def keeps_batch_norms(network: Network) -> bool:
    """Whether models of its kind can have batch normalizations, or statistics of those that were folded."""
    return bool(getattr(network, "keeps_batch_norms", True))


def arithmetic_of(network: Network) -> str:
    """How the arithmetic of its own runtime may differ from that of :meth:`Network.part`; empty where that is not known."""
    return str(getattr(network, "arithmetic", ""))


def versions_of(network: Network) -> Mapping[str, str]:
    """The versions of Python, numpy and the packages that read and run it, by their names."""
    packages = {name: sys.modules.get(name) for name in getattr(network, "packages", ())}
    found = {name: str(getattr(package, "__version__", "unknown")) for name, package in packages.items() if package is not None}
    return {"python": platform.python_version(), "numpy": np.__version__, **found}


def input_ranges(network: Network) -> Mapping[str, tuple[float, float]]:
    """The least and the greatest value of inputs that it quantizes first, by name, as far as that is known."""
    return cast(Mapping[str, tuple[float, float]], getattr(network, "input_ranges", {}))


def is_renamable(network: Network) -> TypeGuard[RenamableNetwork]:
    """Whether its inputs may be called otherwise."""
    return hasattr(network, "with_input_names")


def require_edits(network: Network, name: str, purpose: str) -> EditableNetwork:
    """The network, as one that can be edited. Raises TypeError, with the name and the purpose, where it cannot."""
    return cast(EditableNetwork, _checked(network, _EDITS, f"{name}: {purpose} needs a model whose weights can be changed"))


def require_float(network: Network, name: str, remedy: str) -> None:
    """Raises ValueError, with the name and the remedy, where a layer has quantized weights."""
    for layer in network.layers:
        if layer.weight_step is not None:
            raise ValueError(f"{name}: layer {layer.name} has quantized weights; {remedy}")
    for report in network.unsupported:
        if any(reason.code is ReasonCode.DYNAMIC for reason in report.reasons):
            raise ValueError(f"{name}: layer {report.name} is quantized when it runs; {remedy}")


def _checked(network: Network, methods: Sequence[str], message: str) -> Network:
    for method in methods:
        if not hasattr(network, method):
            raise TypeError(f"{message}; {type(network).__name__} has no method {method!r}")
    return network
