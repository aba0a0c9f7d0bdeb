"""Batch normalizations become part of the layers around them.

    layer, then batch norm    W'[o] = W[o] * g[o]       b'[o] = beta[o] - (mean[o] - b[o]) * g[o]
    batch norm, then layer    W'[:,i] = W[:,i] * g[i]   b'[o] = b[o] + sum over i of K[o,i] * (beta[i] - mean[i] * g[i])

g = gamma / sqrt(variance + epsilon), K = the sum of W over the taps of its kernel. The second is exact only where no padding is
among what the layer reads.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv 1712.05877, section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.channel_scale import channel_ranges, scaled_channels
from biascorr.equalization.chains import unfit
from biascorr.graph.axes import Channels
from biascorr.graph.batch_norms import Neighbours
from biascorr.graph.layer import Layer, LazyArray
from biascorr.graph.network import EditableNetwork, Edits
from biascorr.graph.operations import BatchNorm, Operation
from biascorr.graph.reasons import Reason, ReasonCode


@dataclass(frozen=True)
class Fold:
    """A batch normalization that became part of a layer.

    Parameters
    ----------
    layer, batch_norm : str
        Their names.
    is_after : bool
        Whether the batch normalization was after the layer; else it was before it.
    """

    layer: str
    batch_norm: str
    is_after: bool


Wanted = Collection[tuple[str, str]]
"""Layers and batch normalizations, by name."""


def fold_batch_norms(
    network: EditableNetwork, wanted: Wanted | None = None
) -> tuple[EditableNetwork, list[Fold], dict[str, Reason]]:
    """A network with these batch normalizations, or with all that can be, folded into layers.

    Returns
    -------
    network : EditableNetwork
        Gives out the same, to rounding.
    folds : list of Fold
        In topological order.
    left : dict from str to Reason
        By the names of the other batch normalizations, why they stay.
    """
    folds: list[Fold] = []
    while True:
        folder = _Folder(network, wanted)
        found = folder.folds()
        if not found:
            return network, folds, folder.left
        network = network.edited(folder.edits(found))
        folds += found


def foldable_batch_norms(network: EditableNetwork) -> dict[str, str]:
    """The batch normalizations that can be folded into layers as they are, each with one of these layers; nothing is made."""
    return {fold.batch_norm: fold.layer for fold in _Folder(network, None).folds()}


class _Folder:
    """Folds batch normalizations that do not depend on each other."""

    def __init__(self, network: EditableNetwork, wanted: Wanted | None) -> None:
        self._neighbours = Neighbours(network)
        self._wanted = wanted
        facts = self._neighbours.facts
        self._norms = {name: role for name, role in facts.roles.items() if isinstance(role, BatchNorm)}
        self._operations = [each for each in network.operations if each.name in self._norms]
        self._inputs = {operation.name: operation.inputs[0] for operation in self._operations}
        self._known = facts.statistics
        self._layers = {layer.name: layer for layer in network.layers}
        self._makers = {layer.output: layer for layer in network.layers}
        self.left: dict[str, Reason] = {}

    def folds(self) -> list[Fold]:
        """At most one fold of each layer."""
        found: list[Fold] = []
        busy: set[str] = set()
        for operation in self._operations:
            if not self._neighbours.readers(operation.outputs[0]):
                self.left[operation.name] = ReasonCode.NORM_UNREAD()
                continue
            if operation.is_shared:
                self.left[operation.name] = ReasonCode.NORM_SHARED()
                continue
            new = self._backward(operation) or self._forward(operation)
            if new:
                self.left.pop(operation.name, None)
            if not busy.intersection(fold.layer for fold in new):
                busy.update(fold.layer for fold in new)
                found += new
        return found

    def edits(self, folds: Collection[Fold]) -> Edits:
        weights, biases, statistics = {}, {}, {}
        for fold in folds:
            layer, norm, tensor = self._layers[fold.layer], self._norms[fold.batch_norm], self._inputs[fold.batch_norm]
            weights[layer.name], biases[layer.name] = _folded(layer, norm, fold.is_after)
            if fold.is_after:
                statistics[tensor] = with_statistics(norm, norm.beta, norm.gamma)
            elif tensor not in self._known:
                nearest = self._known.get(layer.input, norm)  # another one that became part of the layer
                statistics[tensor] = with_statistics(replace(norm, name=nearest.name), norm.mean, np.sqrt(norm.variance))
        return Edits(weights, biases, removed={fold.batch_norm for fold in folds}, statistics=statistics)

    def _backward(self, operation: Operation) -> list[Fold]:
        """Into the layer before it."""
        layer = self._makers.get(self._inputs[operation.name])
        if layer is None:
            self.left[operation.name] = ReasonCode.NORM_NOT_AFTER_LAYER()
        elif self._neighbours.readers(layer.output) != [operation]:
            self.left[operation.name] = ReasonCode.NORM_OUTPUT_SHARED(layer=layer.first_call)
        else:
            fold = Fold(layer.name, operation.name, True)
            reason = self._mismatch(fold, self._neighbours.output_channels(layer), layer.channels)
            if reason is None:
                return self._if_wanted([fold])
            self.left[operation.name] = reason
        return []

    def _forward(self, operation: Operation) -> list[Fold]:
        """Into all layers after it."""
        folds, tensor = [], operation.outputs[0]
        for reader in self._neighbours.readers(tensor):
            layer = self._layers.get(reader.name) if reader is not None else None
            if layer is None or layer.input != tensor:
                return []
            fold = Fold(layer.name, operation.name, False)
            if reason := self._mismatch(fold, self._neighbours.input_channels(layer), layer.input_channels):
                self.left[operation.name] = reason
                return []
            if not layer.sees_every_tap and np.any(_offset(self._norms[operation.name])):
                self.left[operation.name] = ReasonCode.NORM_BEFORE_PADDING(layer=layer.name)
                return []
            folds.append(fold)
        return self._if_wanted(folds)

    def _mismatch(self, fold: Fold, channels: Channels, count: int) -> Reason | None:
        """Why a layer cannot take a batch normalization in; None where it can."""
        layer, norm = self._layers[fold.layer], self._norms[fold.batch_norm]
        if reason := unfit(layer):
            return ReasonCode.NORM_LAYER_UNFIT(layer=layer.first_call, reason=reason)
        if not channels.is_along(norm.channel_axis) or count != len(norm.beta):
            return ReasonCode.NORM_OTHER_AXIS(layer=layer.name, axis=norm.channel_axis)
        if not np.isfinite([*_gain(norm), *_offset(norm)]).all():
            return ReasonCode.NORM_NOT_FINITE()
        if not _is_held(layer, norm, fold.is_after):
            return ReasonCode.NORM_BEYOND_DTYPE(layer=layer.name, dtype=layer.weights.dtype)
        return None

    def _if_wanted(self, folds: list[Fold]) -> list[Fold]:
        """All of them or none: a batch normalization that is folded into some of its readers only would have to stay."""
        if self._wanted is None or all((fold.layer, fold.batch_norm) in self._wanted for fold in folds):
            return folds
        self.left[folds[0].batch_norm] = ReasonCode.NORM_NOT_WANTED()
        return []


def with_statistics(norm: BatchNorm, beta: NDArray[np.float64], gamma: NDArray[np.float64]) -> BatchNorm:
    """The statistics of a tensor that a batch normalization is known of: one that would leave the tensor as it is."""
    return BatchNorm(norm.name, beta, np.abs(gamma), beta, np.square(gamma), 0.0, norm.channel_axis)


def _gain(norm: BatchNorm) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(norm.gamma / np.sqrt(norm.variance + norm.epsilon))


def _offset(norm: BatchNorm) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(norm.beta - norm.mean * _gain(norm))


def _folded(layer: Layer, norm: BatchNorm, is_after: bool) -> tuple[LazyArray, NDArray[np.float64]]:
    """Weights and bias of a layer that takes in the batch normalization after it, or the one before it."""
    gain = _gain(norm)
    if is_after:
        bias = bias_of(layer) * layer.along_channels(gain) + layer.along_channels(_offset(norm))
        return scaled_weights(layer, output_factors=gain), np.asarray(bias)
    bias = bias_of(layer) + layer.along_channels(response(layer, _offset(norm)))
    return scaled_weights(layer, input_factors=gain), np.asarray(bias)


def _is_held(layer: Layer, norm: BatchNorm, is_after: bool) -> bool:
    """Whether the type of a layer holds what a fold would make of it: nothing infinite, no channel that counts subnormal."""
    limits, gain = np.finfo(layer.weights.dtype), np.abs(_gain(norm))
    largest = np.abs(_folded(layer, norm, is_after)[1]).max()
    for axis in "OI":
        is_own = (axis == "O") == is_after
        ranges = functools.partial(channel_ranges, np.asarray(layer.weights), layer.layout, axis=axis, groups=layer.groups)
        before = ranges()
        after = before * gain if is_own else ranges(factors=gain)
        if np.any((after > 0) & (after < limits.tiny) & (before >= max(limits.tiny, limits.eps * before.max()))):
            return False
        largest = max(largest, after.max())
    return bool(largest <= limits.max)


def scaled_weights(layer: Layer, **factors: NDArray[np.float64]) -> LazyArray:
    """The weights of a layer with their channels scaled by `output_factors` and `input_factors`, when they are read."""

    def read() -> NDArray[Any]:
        return scaled_channels(np.asarray(layer.weights), layer.layout, groups=layer.groups, **factors)

    return LazyArray(layer.weights.shape, layer.weights.dtype, read)


def response(layer: Layer, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The output of a layer for input channels that are constant: gain * sum over i of K[o,i] * values[i], (channels,)."""
    weights = np.asarray(layer.weights)
    nothing = np.broadcast_to(np.zeros((), weights.dtype), weights.shape)
    sums = _kernels.weight_error(weights, nothing, values, layer.groups, layer.layout, True)
    return np.asarray(layer.gain * sums)


def bias_of(layer: Layer) -> NDArray[np.float64]:
    """The bias of a layer; zeros where it has none."""
    if layer.bias is None:
        return layer.along_channels(np.zeros(layer.channels))
    return layer.bias.astype(np.float64)
