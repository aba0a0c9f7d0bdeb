"""A sweep: a network run stage by stage over shards of the samples, whose measurements are merged.

for stage in sweep.stages:
    measurements = sweep.measure(stage)
    for layer in stage.layers:
        sweep.shift(layer, ...)     # from what was measured
outputs = sweep.outputs()
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from numpy.typing import NDArray

from biascorr.calibration.samples import SampleMeans, Samples
from biascorr.graph.layer import Layer
from biascorr.graph.network import Feeds, Network, Shift
from biascorr.sweep.measurements import Measured, Measurements, Wanted
from biascorr.sweep.plan import Stage, plan_stages
from biascorr.sweep.shard import Shard

T = TypeVar("T")

LayerValues = dict[str, list[NDArray[Any]]]
"""Some values of the outputs of layers, by name, batch by batch."""

DEPTH = 8
"""Layers measured in one stage where nothing is corrected: more hold more activations of a batch at once."""

_LARGE = 64 << 20
"""Bytes of weights beyond which a network is not run at once: onnxruntime keeps a copy of those that run."""

_MANY = 2000
"""Operations beyond which a network is not run at once: what onnxruntime takes to prepare them grows faster than they do."""


def local_shards(network: Network, samples: Samples, threads: int, batches: Sequence[int]) -> list[Shard]:
    """The shards that run these batches on this machine: one, with threads."""
    return [Shard(network, samples, batches, threads)]


class Sweep:
    """One sweep of a network.

    Parameters
    ----------
    network : Network
        The network that runs.
    layers : sequence of Layer
        The layers that end stages.
    shards : sequence of Shard
        The shards that run the stages, each over other batches, in the order of the batches.
    wanted : Wanted
        The measurements to make of the layers.
    depth : int
        Layers on one path that are measured in one stage; 1 where they are corrected.
    """

    def __init__(
        self, network: Network, layers: Sequence[Layer], shards: Sequence[Shard], wanted: Wanted, *, depth: int = 1
    ) -> None:
        *self.stages, self._last = plan_stages(network, layers, depth)
        self._shards = shards
        self._wanted = wanted
        self._shifts: dict[str, NDArray[Any]] = {}

    @property
    def prepared(self) -> float:
        """Seconds in which the network was made ready to run, so far."""
        return sum(shard.prepared for shard in self._shards)

    def measure(self, stage: Stage) -> dict[str, Measured]:
        """Runs a stage, after those before it; the measurements of its layers by name."""
        found = self._measured(stage)
        are_measured = self._wanted.outputs or self._wanted.inputs
        return {layer.name: found.of(layer, self._wanted) for layer in stage.layers if are_measured}

    def values(self, stage: Stage) -> LayerValues:
        """Runs a stage, after those before it; some values of the outputs of its layers by name, batch by batch."""
        found = self._measured(stage).values
        return {layer.name: found[layer.output] for layer in stage.layers}

    def _measured(self, stage: Stage) -> Measurements:
        found = Measurements()
        for part in self._of_each(lambda shard: shard.measure(stage, self._wanted, self._shifts)):
            found.merge(part)
        return found

    def measure_activated(self, stage: Stage, shifts: Mapping[str, Shift]) -> dict[str, SampleMeans]:
        """The means after the activations of layers, by name, were these shifts added to the layers' outputs."""
        found = {}
        for layer in stage.layers:
            if layer.name in self._wanted.activated and layer.name in shifts:
                tensor, shift = self._wanted.activated[layer.name], shifts[layer.name]
                parts = self._of_each(functools.partial(Shard.measure_activated, layer=layer, tensor=tensor, shift=shift))
                found[layer.name] = SampleMeans.joined([part for each in parts for part in each])
        return found

    def shift(self, layer: Layer, change: Shift) -> None:
        """Changes the bias of a layer of the stage that was measured last, for all stages that follow."""
        self._shifts[layer.output] = layer.along_channels(change)

    def outputs(self) -> Iterator[tuple[int, Feeds]]:
        """The outputs of the model for each batch, after all stages."""
        for shard in self._shards:
            yield from shard.outputs(self._last, self._shifts)

    def _of_each(self, work: Callable[[Shard], T]) -> list[T]:
        """The results of all shards, in their order; they work at the same time."""
        if len(self._shards) == 1:
            return [work(self._shards[0])]
        with ThreadPoolExecutor(len(self._shards)) as pool:
            return list(pool.map(work, self._shards))

    def finish(self) -> None:
        """Drops the live tensors, where the outputs were not asked for."""
        for shard in self._shards:
            shard.drop(self._last)


def outputs_of(network: Network, samples: Samples, batches: Sequence[int], threads: int) -> Iterator[tuple[int, Feeds]]:
    """Outputs of a network for some batches; in stages where it is too large to run at once."""
    weights = sum(math.prod(layer.weights.shape) * layer.weights.dtype.itemsize for layer in network.layers)
    layers = network.layers if weights > _LARGE or len(network.operations) > _MANY else []
    sweep = Sweep(network, layers, local_shards(network, samples, threads, batches), Wanted(outputs=False), depth=DEPTH)
    for stage in sweep.stages:
        sweep.measure(stage)
    yield from sweep.outputs()
