"""The float network swept beside the quantized one, so that matched layers can be compared value by value.

    s <- s - sum g e / (sum g^2 + least * count)        e = f(y + s) - f(y float),  g = slope of f at y + s

One step of Gauss and Newton towards the shift s of each channel that makes the squared error after the activation f least; sums
are over the positions of all samples, f is the float layer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.layer import Layer
from biascorr.graph.network import Network, Shift
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.plan import Stage
from biascorr.sweep.shard import Shard, in_order
from biascorr.sweep.sweep import Sweep

T = TypeVar("T")
R = TypeVar("R")

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
    samples : Samples
        The samples, in whose storage the live tensors of the quantized network are.
    batches : sequence of int
        The batches that are swept.
    storage : Storage
        Where those of the float one are held.
    threads : int
        Threads that it may use.
    """

    def __init__(
        self,
        reference: Network,
        pairs: Mapping[str, Layer],
        activated: Mapping[str, str],
        samples: Samples,
        batches: Sequence[int],
        storage: Storage,
        threads: int,
    ) -> None:
        self._reference = reference
        self._pairs = pairs
        self._activated = activated
        self._samples = samples
        self._batches = batches
        self._float = samples.beside(storage)
        self._threads = threads
        layers = list({layer.name: layer for layer in pairs.values()}.values())
        shard = Shard(reference, self._float, self._batches, threads)
        self._sweep = Sweep(reference, layers, [shard], Wanted(outputs=False))
        self._prepared = 0.0

    @property
    def prepared(self) -> float:
        """Seconds in which the network was made ready to run, so far."""
        return self._sweep.prepared + self._prepared

    def is_beside(self, stages: Sequence[Stage]) -> bool:
        """Whether the layers of each stage of the quantized network are those of a stage here, in the same order."""
        theirs = [{self._pairs[layer.name].name for layer in stage.layers} for stage in stages]
        return theirs == [{layer.name for layer in stage.layers} for stage in self._sweep.stages]

    def measure(self, stage: int) -> None:
        """Runs a stage, after those before it."""
        self._sweep.measure(self._sweep.stages[stage])

    def refined(self, layer: Layer, shift: Shift, steps: int) -> Shift:
        """A better shift of a layer of the last stage; the same where it has no activation."""
        expected, tensor = self._pairs[layer.name], self._activated.get(layer.name)
        ours, theirs = ([(each.output, batch) for batch in self._batches] for each in (layer, expected))
        is_live = all(one in self._samples.storage and other in self._float.storage for one, other in zip(ours, theirs))
        if tensor is None or not is_live or any(map(self._differs, ours, theirs)):
            return shift
        workers = max(1, min(len(ours), self._threads))
        given = {expected.output: self._float.storage[theirs[0]]}
        start = time.monotonic()
        compute = self._reference.part(given, [tensor], threads=max(1, self._threads // workers))
        self._prepared += time.monotonic() - start

        def activated(values: NDArray[Any]) -> NDArray[Any]:
            return compute({expected.output: values})[tensor]

        def sums(pair: tuple[NDArray[Any], NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            y, goal = pair
            moved = y + layer.along_channels(shift).astype(y.dtype)
            found = activated(moved)
            moved += difference
            slope = _rows(activated(moved), layer.output_axis)
            found = _rows(found, layer.output_axis)
            slope -= found
            slope *= 1 / difference
            return _dots(slope, found - _rows(goal, layer.output_axis)), _dots(slope, slope)

        def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
            return list(in_order(function, items, workers, alone=self._threads == 1))

        goals = each(lambda key: activated(self._float.storage[key]), theirs)
        count = sum(goal.size for goal in goals) // layer.channels
        square = np.mean([np.mean(np.square(self._float.storage[key], dtype=np.float64)) for key in theirs])
        difference = goals[0].dtype.type(_DIFFERENCE * np.sqrt(square) + 1e-30)
        for _ in range(steps):
            errors, squares = zip(*each(sums, zip((self._samples.storage[key] for key in ours), goals)))
            shift = shift - sum(errors) / (sum(squares) + _LEAST_SLOPE * max(1, count))
        return shift

    def _differs(self, ours: tuple[str, int], theirs: tuple[str, int]) -> bool:
        one, other = self._samples.storage[ours], self._float.storage[theirs]
        return one.shape != other.shape or one.dtype != other.dtype or one.dtype.kind != "f" or not one.size


def _dots(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of products of each channel."""
    return np.asarray(np.einsum("nc,nc->c", one, other), dtype=np.float64)


def _rows(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """The values of each position, (positions, channels)."""
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
