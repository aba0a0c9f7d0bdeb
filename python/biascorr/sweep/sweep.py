"""A sweep: a network run stage by stage over shards of the samples, whose measurements are merged.

for stage in sweep.stages:
    measurements = sweep.measure(stage)
    for layer in stage.layers:
        sweep.shift(layer, ...)     # from what was measured
sweep.finish()
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from biascorr.calibration.samples import SampleMeans
from biascorr.graph.layer import Layer
from biascorr.graph.network import Feeds, Network, Shift
from biascorr.sweep.measurements import Measured, Measurements, Wanted
from biascorr.sweep.plan import Stage, SweepPlan
from biascorr.sweep.shard import Shard, Shards

DEPTH = 8
"""Layers measured in one stage where nothing is corrected: more hold more activations of a batch at once."""

_LARGE = 64 << 20
"""Bytes of weights beyond which a network is not run at once: onnxruntime keeps a copy of those that run."""

_MANY = 2000
"""Operations beyond which a network is not run at once: what onnxruntime takes to prepare them grows faster than they do."""


class Sweep:
    """One sweep of a network.

    Parameters
    ----------
    network : Network
        The network that runs.
    layers : sequence of Layer
        The layers that end stages.
    shards : Shards
        The shards that run the stages.
    batches : sequence of int
        The batches that are swept.
    wanted : Wanted
        The measurements to make of the layers.
    depth : int
        Layers on one path that are measured in one stage; 1 where they are corrected.
    is_beside : bool
        Whether another sweep of tensors with the same names goes on at the same time.

    Attributes
    ----------
    shifts : dict from str to ndarray
        The change of each layer's output so far, by the name of the tensor and aligned with it.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[Layer],
        shards: Shards,
        batches: Sequence[int],
        wanted: Wanted,
        *,
        depth: int = 1,
        is_beside: bool = False,
    ) -> None:
        self.plan = SweepPlan(network, tuple(layer.name for layer in layers), wanted, depth, is_beside)
        self.stages = self.plan.stages()[:-1]  # the last one is for the outputs
        self.batches = batches
        self.shifts: dict[str, NDArray[Any]] = {}
        self._shards = shards

    def measure(self, stage: Stage) -> dict[str, Measured]:
        """Runs a stage, after those before it; the measurements of its layers by name."""
        wanted = self.plan.wanted
        found = self._shards.merged(
            stage_measurements, self.batches, self.plan, stage.number, self.shifts, merge=Measurements.merge
        )
        are_measured = wanted.outputs or wanted.inputs
        return {layer.name: (found or Measurements()).of(layer, wanted) for layer in stage.layers if are_measured}

    def measure_activated(self, stage: Stage, shifts: Mapping[str, Shift]) -> dict[str, SampleMeans]:
        """The means after the activations of layers, by name, were these shifts added to the layers' outputs."""
        found = {}
        for layer in stage.layers:
            if layer.name in self.plan.wanted.activated and layer.name in shifts:
                arguments = self.plan, stage.number, self.shifts, layer.name, shifts[layer.name]
                found[layer.name] = SampleMeans.joined([*self._shards.each(activated_means, self.batches, *arguments)])
        return found

    def shift(self, layer: Layer, change: Shift) -> None:
        """Changes the bias of a layer of the stage that was measured last, for all stages that follow."""
        self.shifts[layer.output] = layer.along_channels(change)

    def outputs(self) -> Iterator[tuple[int, Feeds]]:
        """The outputs of the model for each batch, after all stages."""
        return self._shards.each(final_outputs, self.batches, self.plan, self.shifts)

    def finish(self) -> None:
        """Drops the live tensors."""
        self._shards.finish(self.plan)


def stage_measurements(
    shard: Shard, batches: Sequence[int], plan: SweepPlan, stage: int, shifts: Mapping[str, NDArray[Any]]
) -> Iterator[Measurements]:
    """Runs a stage on a shard and measures it, batch by batch."""
    return shard.cut(plan, batches).measure(stage, shifts)


def activated_means(
    shard: Shard,
    batches: Sequence[int],
    plan: SweepPlan,
    stage: int,
    shifts: Mapping[str, NDArray[Any]],
    layer: str,
    shift: Shift,
) -> Iterator[SampleMeans]:
    """The means after the activation of a layer of a stage on a shard, were a shift added to its output, batch by batch."""
    cut = shard.cut(plan, batches)
    cut.run_to(stage + 1, shifts)
    return cut.measure_activated(cut.layer(stage, layer), plan.wanted.activated[layer], shift)


def final_outputs(
    shard: Shard, batches: Sequence[int], plan: SweepPlan, shifts: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[int, Feeds]]:
    """The outputs of a network on a shard, after all stages of a sweep."""
    return shard.cut(plan, batches).outputs(shifts)


def outputs_of(shard: Shard, network: Network, batches: Sequence[int]) -> Iterator[tuple[int, Feeds]]:
    """Outputs of a network for some batches of a shard; in stages where it is too large to run at once."""
    weights = sum(math.prod(layer.weights.shape) * layer.weights.dtype.itemsize for layer in network.layers)
    layers = network.layers if weights > _LARGE or len(network.operations) > _MANY else []
    plan = SweepPlan(network, tuple(layer.name for layer in layers), Wanted(outputs=False), DEPTH)
    try:
        yield from final_outputs(shard, batches, plan, {})
    finally:
        shard.finish(plan.name)
