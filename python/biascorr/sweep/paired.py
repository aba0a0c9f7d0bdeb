"""The float network swept beside the quantized one, so that matched layers can be compared value by value.

    s <- s - sum g e / (sum g^2 + least * count)        e = f(y + s) - f(y float),  g = slope of f at y + s

One step of Gauss and Newton towards the shift s of each channel that makes the squared error after the activation f least; sums
are over the positions of all samples, f is the float layer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.layer import Layer
from biascorr.graph.network import Network, Shift
from biascorr.sweep.cut import Cut, in_order
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.plan import Stage, SweepPlan
from biascorr.sweep.shard import Shard, Shards
from biascorr.sweep.sweep import Sweep

_LEAST_SLOPE = 0.02
"""Mean squared slope that is added to each channel's: one that is flat almost everywhere is not moved far."""

_DIFFERENCE = 0.01
"""Part of the root of the mean square of a tensor over which a slope is taken."""


class PairedSweep:
    """A sweep of the float network, stage by stage with that of the quantized one.

    Parameters
    ----------
    reference : Network
        Float.
    pairs : mapping from str to Layer
        The float layer of each layer that is corrected, by the name of the latter.
    activated : mapping from str to str
        The float tensors after activations, by the same names.
    ours : Sweep
        That of the quantized network.
    shards : Shards
        The shards that run both.
    """

    def __init__(
        self, reference: Network, pairs: Mapping[str, Layer], activated: Mapping[str, str], ours: Sweep, shards: Shards
    ) -> None:
        self._pairs = pairs
        self._activated = activated
        self._ours = ours
        self._shards = shards
        layers = list({layer.name: layer for layer in pairs.values()}.values())
        self._sweep = Sweep(reference, layers, shards, ours.batches, Wanted(outputs=False), is_beside=True)

    def is_beside(self) -> bool:
        """Whether the layers of each stage of the quantized network are those of a stage here, in the same order."""
        theirs = [{self._pairs[layer.name].name for layer in stage.layers} for stage in self._ours.stages]
        return theirs == [{layer.name for layer in stage.layers} for stage in self._sweep.stages]

    def refined(self, stage: Stage, layer: Layer, shift: Shift, steps: int) -> Shift:
        """A better shift of a layer of a stage that was measured last; the same where it has no activation."""
        tensor = self._activated.get(layer.name)
        if tensor is None:
            return shift
        pair = Pair(self._ours.plan, self._sweep.plan, stage.number, layer.name, self._pairs[layer.name].name, tensor)
        arguments = pair, self._ours.shifts
        goals = [*self._shards.each(goals_of, self._ours.batches, *arguments)]
        if not all(goal.is_comparable for goal in goals):
            return shift
        count = sum(goal.size for goal in goals) // layer.channels
        difference = _DIFFERENCE * np.sqrt(np.mean([goal.square for goal in goals])) + 1e-30
        for _ in range(steps):
            of = *arguments, shift, float(difference)
            found = self._shards.merged(gauss_newton_sums, self._ours.batches, *of, merge=Sums.add)
            assert found is not None
            shift = shift - found.errors / (found.squares + _LEAST_SLOPE * max(1, count))
        return shift

    def finish(self) -> None:
        """Drops the live tensors."""
        self._sweep.finish()


@dataclass(frozen=True)
class Pair:
    """A layer of the quantized network, and the float one beside it.

    Parameters
    ----------
    ours, theirs : SweepPlan
        The sweeps.
    stage : int
        The stage of both that makes their outputs.
    layer, expected : str
        The layers.
    activated : str
        The float tensor after the activation.
    """

    ours: SweepPlan
    theirs: SweepPlan
    stage: int
    layer: str
    expected: str
    activated: str


@dataclass(frozen=True)
class Goal:
    """What is known of the outputs of a pair for a batch.

    Parameters
    ----------
    is_comparable : bool
        Whether they can be compared value by value.
    size : int
        Values.
    square : float
        The mean square of the float one.
    """

    is_comparable: bool
    size: int = 0
    square: float = 0.0


@dataclass
class Sums:
    """What a step towards a shift is made of.

    Parameters
    ----------
    errors, squares : ndarray, (C,), float64
        The sums of g e and of g^2.
    """

    errors: NDArray[np.float64]
    squares: NDArray[np.float64]

    def add(self, later: Sums) -> None:
        """Adds those of the batches that follow."""
        self.errors = self.errors + later.errors
        self.squares = self.squares + later.squares


def goals_of(shard: Shard, batches: Sequence[int], pair: Pair, shifts: Mapping[str, NDArray[Any]]) -> Iterator[Goal]:
    """What is known of the outputs of a pair, batch by batch."""
    (ours, layer), (theirs, expected) = _at(shard, batches, pair, shifts)
    for batch in batches:
        one, other = ours.live(layer, batch), theirs.live(expected, batch)
        if one is None or other is None or _differ(one, other):
            yield Goal(False)
        else:
            yield Goal(True, other.size, float(np.mean(np.square(other, dtype=np.float64))))


def gauss_newton_sums(
    shard: Shard, batches: Sequence[int], pair: Pair, shifts: Mapping[str, NDArray[Any]], shift: Shift, difference: float
) -> Iterator[Sums]:
    """The sums of g e and of g^2 of each channel, batch by batch; slopes are taken over a difference."""
    (ours, layer), (theirs, expected) = _at(shard, batches, pair, shifts)
    workers = max(1, min(len(batches), shard.threads))
    example = theirs.live(expected, batches[0])
    assert example is not None
    compute = theirs.part({expected.output: example}, [pair.activated], workers)
    step = example.dtype.type(difference)

    def activated(values: NDArray[Any]) -> NDArray[Any]:
        return compute({expected.output: values})[pair.activated]

    def sums(batch: int) -> Sums:
        y, goal = ours.live(layer, batch), theirs.activated(expected, batch, activated)
        assert y is not None
        moved = y + layer.along_channels(shift).astype(y.dtype)
        found = activated(moved)
        moved += step
        slope = _rows(activated(moved), layer.output_axis)
        found = _rows(found, layer.output_axis)
        slope -= found
        slope *= 1 / step
        return Sums(_dots(slope, found - _rows(goal, layer.output_axis)), _dots(slope, slope))

    yield from in_order(sums, batches, workers, alone=shard.threads == 1)


def _at(
    shard: Shard, batches: Sequence[int], pair: Pair, shifts: Mapping[str, NDArray[Any]]
) -> tuple[tuple[Cut, Layer], tuple[Cut, Layer]]:
    """Both cuts after the stage of a pair, and its layers."""
    ours, theirs = shard.cut(pair.ours, batches), shard.cut(pair.theirs, batches)
    ours.run_to(pair.stage + 1, shifts)
    theirs.run_to(pair.stage + 1, {})
    return (ours, ours.layer(pair.stage, pair.layer)), (theirs, theirs.layer(pair.stage, pair.expected))


def _differ(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.shape != other.shape or one.dtype != other.dtype or one.dtype.kind != "f" or not one.size


def _dots(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of products of each channel."""
    return np.asarray(np.einsum("nc,nc->c", one, other), dtype=np.float64)


def _rows(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """The values of each position, (positions, channels)."""
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
