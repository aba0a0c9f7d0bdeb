"""Batch normalizations become part of the layers around them.

    layer, then batch norm    W'[o] = W[o] * g[o]       b'[o] = beta[o] - (mean[o] - b[o]) * g[o]
    batch norm, then layer    W'[:,i] = W[:,i] * g[i]   b'[o] = b[o] + sum over i of K[o,i] * (beta[i] - mean[i] * g[i])

g = gamma / sqrt(variance + epsilon), K = the sum of W over the taps of its kernel. The second is exact only where no padding is
among what the layer reads.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv 1712.05877, section 3.2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.channel_scale import scaled_channels
from biascorr.equalization.chains import unfit
from biascorr.graph.batch_norms import Neighbours
from biascorr.graph.network import BatchNorm, Edits, Layer, Network, Operation


@dataclass(frozen=True)
class Fold:
    """A batch normalization that became part of a layer.

    Parameters
    ----------
    layer, batch_norm : str
        Their names.
    is_behind : bool
        Whether the batch normalization was behind the layer; else it was before it.
    """

    layer: str
    batch_norm: str
    is_behind: bool


Wanted = Collection[tuple[str, str]]
"""Layers and batch normalizations, by name."""


def fold_batch_norms(network: Network, wanted: Wanted | None = None) -> tuple[Network, list[Fold], dict[str, str]]:
    """A network with these batch normalizations, or with all that can be, folded into layers.

    Returns
    -------
    network : Network
        Gives out the same, to rounding.
    folds : list of Fold
        In topological order.
    left : dict from str to str
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


class _Folder:
    """Folds batch normalizations that do not depend on each other."""

    def __init__(self, network: Network, wanted: Wanted | None) -> None:
        self._neighbours = Neighbours(network)
        self._wanted = wanted
        self._norms = network.surroundings.batch_norms
        self._inputs = {operation.name: operation.inputs[0] for operation in network.operations if operation.inputs}
        self._operations = [each for each in network.operations if each.name in self._norms]
        self._known = network.surroundings.folded
        self._layers = {layer.name: layer for layer in network.layers}
        self._makers = {layer.output: layer for layer in network.layers}
        self.left: dict[str, str] = {}

    def folds(self) -> list[Fold]:
        """At most one fold of each layer."""
        found: list[Fold] = []
        busy: set[str] = set()
        for operation in self._operations:
            if not self._neighbours.readers(operation.outputs[0]):
                self.left[operation.name] = "nothing reads what it makes"
                continue
            new = self._backward(operation) or self._forward(operation)
            if new:
                self.left.pop(operation.name, None)
            if not busy.intersection(fold.layer for fold in new):
                busy.update(fold.layer for fold in new)
                found += new
        return found

    def edits(self, folds: Collection[Fold]) -> Edits:
        weights, biases, folded = {}, {}, {}
        for fold in folds:
            layer, norm, tensor = self._layers[fold.layer], self._norms[fold.batch_norm], self._inputs[fold.batch_norm]
            fold_in = _folded_behind if fold.is_behind else _folded_before
            weights[layer.name], biases[layer.name] = fold_in(layer, norm)
            if fold.is_behind:
                folded[tensor] = as_folded(norm.name, norm.beta, norm.gamma)
            elif tensor not in self._known:
                nearest = self._known.get(layer.input, norm)  # another one that became part of the layer
                folded[tensor] = as_folded(nearest.name, norm.mean, np.sqrt(norm.variance))
        return Edits(weights, biases, removed={fold.batch_norm for fold in folds}, folded=folded)

    def _backward(self, operation: Operation) -> list[Fold]:
        """Into the layer before it."""
        layer = self._makers.get(self._inputs[operation.name])
        if layer is None:
            self.left[operation.name] = "no layer makes what it reads, or not only layers read what it makes"
        elif self._neighbours.readers(layer.output) != [operation]:
            self.left[operation.name] = f"something else reads the output of {layer.name} too"
        elif reason := self._mismatch(layer, layer.output_axis, layer.output, layer.channels, operation):
            self.left[operation.name] = reason
        else:
            return self._if_wanted([Fold(layer.name, operation.name, True)])
        return []

    def _forward(self, operation: Operation) -> list[Fold]:
        """Into all layers behind it."""
        folds, tensor = [], operation.outputs[0]
        for reader in self._neighbours.readers(tensor):
            layer = self._layers.get(reader.name) if reader is not None else None
            if layer is None or layer.input != tensor:
                return []
            if reason := self._mismatch(layer, layer.channel_axis, tensor, layer.input_channels, operation):
                self.left[operation.name] = reason
                return []
            if not layer.sees_every_tap and np.any(_offset(self._norms[operation.name])):
                self.left[operation.name] = f"{layer.name} behind it reads padding too, which would be shifted"
                return []
            folds.append(Fold(layer.name, operation.name, False))
        return self._if_wanted(folds)

    def _mismatch(self, layer: Layer, axis: int, tensor: str, channels: int, operation: Operation) -> str:
        """Why a layer cannot take a batch normalization in; empty where it can."""
        if reason := unfit(layer):
            return f"{layer.name}: {reason}"
        size = len(self._norms[operation.name].beta)
        if not self._neighbours.is_along_axis_1(layer, axis, tensor) or channels != size:
            return f"the channels of {layer.name} are not along axis 1"
        if not np.isfinite([*_gain(self._norms[operation.name]), *_offset(self._norms[operation.name])]).all():
            return "its parameters are not finite"
        return ""

    def _if_wanted(self, folds: list[Fold]) -> list[Fold]:
        """All of them or none: a batch normalization that is folded into some of its readers only would have to stay."""
        if self._wanted is None or all((fold.layer, fold.batch_norm) in self._wanted for fold in folds):
            return folds
        self.left[folds[0].batch_norm] = "not among the given pairs"
        return []


def as_folded(name: str, beta: NDArray[np.float64], gamma: NDArray[np.float64]) -> BatchNorm:
    """What a batch normalization tells of a tensor that it has become part of: it would leave the tensor as it is."""
    return BatchNorm(name, beta, np.abs(gamma), beta, np.square(gamma), 0.0)


def _gain(norm: BatchNorm) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(norm.gamma / np.sqrt(norm.variance + norm.epsilon))


def _offset(norm: BatchNorm) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(norm.beta - norm.mean * _gain(norm))


def _folded_behind(layer: Layer, norm: BatchNorm) -> tuple[NDArray[Any], NDArray[np.float64]]:
    gain = _gain(norm)
    weights = scaled_channels(layer.weights, layer.layout, groups=layer.groups, output_factors=gain)
    bias = bias_of(layer) * layer.along_channels(gain) + layer.along_channels(_offset(norm))
    return weights, np.asarray(bias)


def _folded_before(layer: Layer, norm: BatchNorm) -> tuple[NDArray[Any], NDArray[np.float64]]:
    weights = scaled_channels(layer.weights, layer.layout, groups=layer.groups, input_factors=_gain(norm))
    return weights, np.asarray(bias_of(layer) + layer.along_channels(response(layer, _offset(norm))))


def response(layer: Layer, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a layer makes of input channels that are constant: gain * sum over i of K[o,i] * values[i], (channels,)."""
    nothing = np.broadcast_to(np.zeros((), layer.weights.dtype), layer.weights.shape)
    sums = _kernels.weight_error(layer.weights, nothing, values, layer.groups, layer.layout, True)
    return np.asarray(layer.gain * sums)


def bias_of(layer: Layer) -> NDArray[np.float64]:
    """Of a layer; zeros where it has none."""
    if layer.bias is None:
        return layer.along_channels(np.zeros(layer.channels))
    return layer.bias.astype(np.float64)
