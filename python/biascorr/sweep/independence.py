"""Whether the samples of a batch depend on each other, and where they are in the tensors of a network: found by running it.

A first axis of any size may be that of samples; but it may be time, or a matrix that is transposed. So a batch is run whole,
and its first and last sample alone: where a sample alone gives other values than in the batch, the batch is one sample. Where
the network takes whole batches only, one of the first sample alone, as often as there are samples, has to give its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.batching import Batching, assumed, candidate_axes
from biascorr.calibration.samples import SampleMeans, Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import Feeds, ModelInput, Network
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.shard import OneShard
from biascorr.sweep.sweep import DEPTH, Sweep

_TOLERANCE = 1e-3
"""Part of the largest value by which one sample may differ alone and in a batch: kernels for other sizes round otherwise."""


class BatchingFinder:
    """Finds how the batches of a network are taken apart, by the first one that has several samples.

    Parameters
    ----------
    network : Network
        The network.
    inputs : sequence of ModelInput
        The inputs that samples have to fit, its own or those of another form of it.
    storage : Storage
        Whose memory can be used.
    threads : int
        Threads that run the network.
    """

    def __init__(self, network: Network, inputs: Sequence[ModelInput], storage: Storage, threads: int) -> None:
        self._network = network
        self._inputs = inputs
        self._storage = storage
        self._threads = threads
        self._found: Batching | None = None

    def __call__(self, feeds: Feeds) -> Batching:
        """The batching for batches like this one."""
        known = assumed(self._inputs)
        if self._found is None and known.size(feeds) > 1:
            self._found = self._find(feeds)
        return self._found or known

    def _find(self, feeds: Feeds) -> Batching:
        for axes in candidate_axes(self._inputs):
            tried = assumed(self._inputs, axes)
            if tried.size(feeds) > 1:
                found = (tried.can_be_cut and self._cut(tried, feeds)) or self._whole(tried, feeds)
                if found is not None:
                    return found
        return Batching({})

    def _cut(self, tried: Batching, feeds: Feeds) -> Batching | None:
        """With samples that can run alone; None where they cannot, or give other values then."""
        size = tried.size(feeds)
        parts = [(tried.rows(feeds, rows), 1) for rows in (np.s_[:1], np.s_[-1:])]
        return self._compared(tried, [(feeds, size), *parts], [0, size - 1])

    def _whole(self, tried: Batching, feeds: Feeds) -> Batching | None:
        """With samples that run in whole batches; None where they give other values beside others."""
        size = tried.size(feeds)
        places = [0] * size
        return self._compared(replace(tried, can_be_cut=False), [(feeds, size), (tried.rows(feeds, places), size)], places)

    def _compared(self, tried: Batching, batches: Sequence[tuple[Feeds, int]], places: Sequence[int]) -> Batching | None:
        """Whether later batches, one after the other, give the values of the first one's samples at these places."""
        size, is_first = batches[0][1], True
        with Storage(self._storage.free) as storage:
            probes = Samples(storage)
            for batch in batches:
                probes.add(*batch)
            shards = OneShard(probes, self._threads)
            sweep = Sweep(self._network, self._network.layers, shards, range(probes.batches), Wanted(), depth=DEPTH)
            try:
                for stage in sweep.stages:
                    is_first &= all(_is_along_first_axis(each.output, size, places) for each in sweep.measure(stage).values())
                together, *others = (outputs for _, outputs in sweep.outputs())
            except ValueError:  # a sample alone is not what the network takes
                return None
        for name in self._network.outputs:
            axes = _axes_of_samples(together[name], [outputs[name] for outputs in others], size)
            if not axes:
                return None
            is_first &= 0 in axes
        return replace(tried, is_along_first_axis=is_first)


def _is_along_first_axis(found: SampleMeans, size: int, places: Sequence[int]) -> bool:
    """From the means of a batch, and of its samples at these places."""
    if len(found.means) != size + len(places):
        return False
    same = _are_close(found.means[places], found.means[size:])
    return same and bool((found.positions[places] == found.positions[size:]).all())


def _axes_of_samples(together: Any, others: Sequence[Any], size: int) -> list[int | None]:
    """The axes along which an output for a batch has its samples, the first one only if in equal parts.

    The others are the outputs for its first and its last sample, or for a batch of the first alone. None stands for no axis:
    what samples share, and what is not measured.
    """
    if not all(isinstance(each, np.ndarray) for each in (together, *others)):
        return [None]
    if all(_are_close(together, each) for each in others):
        return [None]
    if any(each.ndim != together.ndim for each in others):
        return []
    if len(others) == 1:
        return [axis for axis in range(together.ndim) if _repeats_first(together, others[0], axis, size)]
    axes = [axis for axis in range(together.ndim) if _has_ends(together, others[0], others[1], axis)]
    return [axis if axis or all(len(each) * size == len(together) for each in others) else None for axis in axes]


def _has_ends(together: NDArray[Any], first: NDArray[Any], last: NDArray[Any], axis: int) -> bool:
    """Whether a tensor starts with that of the first sample along an axis, and ends with that of the last."""
    fits = first.shape[axis] < together.shape[axis] and last.shape[axis] <= together.shape[axis]
    return (
        (fits or not together.size)
        and _are_close(together.take(range(first.shape[axis]), axis), first)
        and _are_close(together.take(range(-last.shape[axis], 0), axis), last)
    )


def _repeats_first(together: NDArray[Any], other: NDArray[Any], axis: int, size: int) -> bool:
    """Whether another tensor is the part of the first sample again and again, along an axis."""
    if other.shape != together.shape or together.shape[axis] % size:
        return False
    first = together.take(range(together.shape[axis] // size), axis)
    return _are_close(np.concatenate([first] * size, axis), other)


def _are_close(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.shape != other.shape or one.dtype.kind not in "fiub":
        return np.array_equal(one, other)
    values, expected = one.astype(np.float64), other.astype(np.float64)
    scale = np.abs(values).max(initial=0.0, where=np.isfinite(values))
    return np.allclose(values, expected, _TOLERANCE, _TOLERANCE * scale, equal_nan=True)
