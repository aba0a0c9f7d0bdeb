"""Measurements of the layers of a stage: means of outputs per sample, means of inputs; parts of the batches are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.samples import SampleMeans, Samples
from biascorr.graph.layer import Layer
from biascorr.graph.network import Feeds
from biascorr.statistics import ChannelMean, TapMean

InputMean: TypeAlias = ChannelMean | TapMean

_VALUES = 4096
"""Values of an output that are kept of a batch: enough for the ratio of signal and noise to a tenth of a dB."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Measurements of a layer, all layers before it corrected.

    Parameters
    ----------
    output : SampleMeans
        Of its output; without channels, and of all samples as one, where its means were not asked for: it has positions then.
    activated : SampleMeans or None
        Of the tensor after its activation; None where that was not asked for.
    input : ndarray or None
        Its mean input, (C,) or (*K, C); None where that was not asked for, or no sample has elements.
    """

    output: SampleMeans
    activated: SampleMeans | None
    input: NDArray[Any] | None

    def joined(self, later: Measured) -> Measured:
        """With those of batches that follow, without mean inputs."""
        activated = [each.activated for each in (self, later) if each.activated is not None]
        return Measured(
            SampleMeans.joined([self.output, later.output]), SampleMeans.joined(activated) if activated else None, None
        )


@dataclass(frozen=True, eq=False)
class Wanted:
    """The measurements that are wanted of the layers of a stage.

    Parameters
    ----------
    outputs, inputs, values : bool
        Their mean outputs, their mean inputs, some values of their outputs.
    activated : mapping from str to str
        The tensors after their activations, by layer name.
    """

    outputs: bool = True
    inputs: bool = False
    values: bool = False
    activated: Mapping[str, str] = field(default_factory=dict)

    def axes(self, layers: Sequence[Layer]) -> dict[str, int]:
        """The tensors whose means are wanted, and the axes of their channels."""
        axes = {layer.output: layer.output_axis for layer in layers if self.outputs}
        after = [layer for layer in layers if layer.name in self.activated]
        return axes | {self.activated[layer.name]: layer.output_axis for layer in after}

    def tensors(self, layers: Sequence[Layer]) -> list[str]:
        """The tensors that are measured."""
        outputs = [layer.output for layer in layers if self.values]
        return [*self.axes(layers), *outputs, *(layer.input for layer in layers if self.inputs)]


@dataclass(frozen=True, eq=False)
class Measurements:
    """Measurements of some batches.

    Parameters
    ----------
    means : dict from str to list of SampleMeans
        Of tensors by name, in the order of the batches.
    inputs : dict
        Means of inputs, by what is averaged: several layers may read one tensor in the same way.
    values : dict from str to list of ndarray
        Some values of outputs, at the same positions in tensors of the same size, by name, in the order of the batches.
    """

    means: dict[str, list[SampleMeans]] = field(default_factory=dict)
    inputs: dict[Any, InputMean] = field(default_factory=dict)
    values: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    @classmethod
    def of_batch(cls, layers: Sequence[Layer], wanted: Wanted, tensors: Feeds, samples: Samples, batch: int) -> Measurements:
        """Measures one batch."""
        found = cls({name: [samples.means(tensors[name], axis, batch)] for name, axis in wanted.axes(layers).items()})
        for layer in layers if wanted.values else ():
            found.values[layer.output] = [_thinned(tensors[layer.output])]
        averaged = {_averaged(layer): layer for layer in layers if wanted.inputs}
        for key, layer in averaged.items():
            if tensors[layer.input].size:
                found.inputs[key] = empty_mean(layer)
                found.inputs[key].update(tensors[layer.input])
        return found

    def merge(self, later: Measurements) -> None:
        """Adds those of the batches that follow."""
        for name, means in later.means.items():
            self.means.setdefault(name, []).extend(means)
        for name, values in later.values.items():
            self.values.setdefault(name, []).extend(values)
        for key, mean in later.inputs.items():
            known: Any = self.inputs.setdefault(key, mean)
            if known is not mean:
                known.merge(mean)

    def of(self, layer: Layer, wanted: Wanted) -> Measured:
        """The measurements of a layer."""
        activated, mean = wanted.activated.get(layer.name), self.inputs.get(_averaged(layer))
        count = 0 if mean is None else mean.count
        return Measured(
            SampleMeans.joined(self.means[layer.output]) if wanted.outputs else _without_channels(count),
            None if activated is None else SampleMeans.joined(self.means[activated]),
            mean.mean(layer.input_quantization) if mean is not None and count else None,
        )


def _thinned(array: NDArray[Any]) -> NDArray[Any]:
    """Some values of a tensor, whose memory is written again, the same ones of another of its size."""
    if array.size <= _VALUES:
        return array.flatten()
    return array.reshape(-1)[np.random.default_rng(0).integers(0, array.size, _VALUES)]


def _without_channels(positions: int) -> SampleMeans:
    return SampleMeans(np.zeros((1, 0)), np.array([positions]))


def empty_mean(layer: Layer) -> InputMean:
    """An accumulator of the mean input of a layer."""
    if layer.window is None:
        return ChannelMean(channel_axis=layer.channel_axis)
    return TapMean(layer.window, channel_axis=layer.channel_axis)


def _averaged(layer: Layer) -> tuple[Any, ...]:
    return layer.input, layer.channel_axis, layer.window
