"""How near the output of each layer is to that of its float layer, before and after correction.

SQNR = 10 log10(sum r^2 / sum (q - r)^2)  in dB, of some values of a few samples: r of the float layer, q of the quantized one
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.progress import Work
from biascorr.calibration.samples import Samples
from biascorr.graph.network import Network
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.sweep import DEPTH, LayerValues, Sweep, local_shards

_BATCHES = 4
"""Batches that are run: with thousands of values of each, the ratio is known to some tenths of a dB."""


def layer_errors(
    reference: Network,
    networks: Iterable[Network],
    layers: Mapping[str, str],
    samples: Samples,
    batches: Sequence[int],
    threads: int,
    work: Work,
) -> list[dict[str, float | None]]:
    """The SQNR of each layer of some networks in dB, by name; None where outputs cannot be compared.

    Parameters
    ----------
    reference : Network
        Float.
    networks : iterable of Network
        The networks that are compared with it.
    layers : mapping from str to str
        The name of the float layer of each of their layers.
    samples : Samples
        The samples.
    batches : sequence of int
        Those of which the first ones are run.
    threads : int
        Threads that run the networks.
    work : Work
        What is told of batches that are done.
    """
    expected = _values(reference, set(layers.values()), samples, batches, threads, work)
    found = (_values(network, set(layers), samples, batches, threads, work) for network in networks)
    return [{name: _sqnr(expected[layers[name]], values[name]) for name in values} for values in found]


def _values(
    network: Network, names: set[str], samples: Samples, batches: Sequence[int], threads: int, work: Work
) -> LayerValues:
    layers = [layer for layer in network.layers if layer.name in names]
    shards = local_shards(network, samples, threads, batches[:_BATCHES])
    sweep, found = Sweep(network, layers, shards, Wanted(outputs=False, values=True), depth=DEPTH), LayerValues()
    with work.doing("errors", len(batches[:_BATCHES])) as advance:
        for stage in sweep.stages:
            found |= sweep.values(stage)
            advance(1 / len(sweep.stages))
    sweep.finish()
    return found


def _sqnr(expected: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> float | None:
    pairs = [(r.astype(np.float64), q.astype(np.float64)) for r, q in zip(expected, found) if r.shape == q.shape]
    signal = sum(float(np.square(r).sum()) for r, _ in pairs)
    noise = sum(float(np.square(q - r).sum()) for r, q in pairs)
    ratio = signal / noise if noise > 0 else 0.0
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else None
