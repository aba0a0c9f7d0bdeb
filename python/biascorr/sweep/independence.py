"""Whether the samples of a batch depend on each other, and where they are in the tensors of a network: found by running it.

A first axis of any size may be that of samples; but it may be time, or a matrix that is transposed. So a batch is run whole,
and its first and last sample alone: where a sample alone gives other values than in the batch, the batch is one sample.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.samples import SampleMeans, Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import Network
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.sweep import DEPTH, Sweep, local_shards

_TOLERANCE = 1e-3
"""Part of the largest value by which one sample may differ alone and in a batch: kernels for other sizes round otherwise."""


class Samplewise(enum.Enum):
    """How a batch can be taken apart."""

    FIRST_AXIS = enum.auto()
    """Each measured tensor has its samples along the first axis, too."""
    INPUTS = enum.auto()
    """Samples do not depend on each other, but tensors have them elsewhere: each has to run alone."""
    NOT_AT_ALL = enum.auto()
    """Samples depend on each other: a batch is one."""


def take_apart(network: Network, samples: Samples, threads: int) -> None:
    """Takes the batches of some samples apart as far as the network allows, and chooses the samples that are scored."""
    how = samplewise(network, samples, threads)
    if how is Samplewise.NOT_AT_ALL:
        samples.join()
    elif how is Samplewise.INPUTS:
        samples.cut()
    samples.choose_scored()


def samplewise(network: Network, samples: Samples, threads: int) -> Samplewise:
    """How the batches of some samples can be taken apart, by the first that has several; see :class:`Samplewise`."""
    batch = next((batch for batch, size in enumerate(samples.sizes) if size > 1), None)
    if batch is None:
        return Samplewise.FIRST_AXIS
    count, (whole,) = samples.sizes[batch], samples.feeds([batch])
    with Storage(samples.storage.free) as storage:
        probes = Samples(storage)
        probes.add(whole, count)
        for part in (np.s_[:1], np.s_[-1:]):
            probes.add({name: array[part] for name, array in whole.items()}, 1)
        shards = local_shards(network, probes, threads, range(probes.batches))
        sweep, first = Sweep(network, network.layers, shards, Wanted(), depth=DEPTH), True
        try:
            for stage in sweep.stages:
                first &= all(_is_along_first_axis(each.output, count) for each in sweep.measure(stage).values())
            together, *alone = (outputs for _, outputs in sweep.outputs())
        except ValueError:  # a sample alone is not what the network takes
            return Samplewise.NOT_AT_ALL
        if not all(_is_apart(together[name], *(each[name] for each in alone)) for name in network.outputs):
            return Samplewise.NOT_AT_ALL
    return Samplewise.FIRST_AXIS if first else Samplewise.INPUTS


def _is_along_first_axis(found: SampleMeans, count: int) -> bool:
    """From the means of a batch, and of its first and last sample."""
    if len(found.means) != count + 2:
        return False
    same = _are_close(found.means[[0, count - 1]], found.means[count:])
    return same and bool((found.positions[[0, count - 1]] == found.positions[count:]).all())


def _is_apart(together: Any, first: Any, last: Any) -> bool:
    """Whether the output for a batch starts with that of its first sample along some axis, and ends with that of the last."""
    if not all(isinstance(each, np.ndarray) for each in (together, first, last)):
        return True  # nothing that is measured
    return any(
        _are_close(together.take(range(first.shape[axis]), axis), first)
        and _are_close(together.take(range(-last.shape[axis], 0), axis), last)
        for axis in range(together.ndim)
        if first.ndim == last.ndim == together.ndim and max(first.shape[axis], last.shape[axis]) <= together.shape[axis]
        if first.shape[axis] < together.shape[axis] or not together.size
    )


def _are_close(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.shape != other.shape or one.dtype.kind not in "fiub":
        return np.array_equal(one, other)
    values, expected = one.astype(np.float64), other.astype(np.float64)
    scale = np.abs(values).max(initial=0.0, where=np.isfinite(values))
    return np.allclose(values, expected, _TOLERANCE, _TOLERANCE * scale, equal_nan=True)
