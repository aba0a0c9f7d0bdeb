"""How near the output of each layer is to that of its float layer, before and after correction.

SQNR = 10 log10(sum r^2 / sum (q - r)^2)  in dB, of some values of a few samples: r of the float layer, q of the quantized one
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.progress import Work
from biascorr.graph.network import Network
from biascorr.sweep.measurements import Measurements, Wanted
from biascorr.sweep.plan import SweepPlan
from biascorr.sweep.shard import Shard, Shards, Shifted
from biascorr.sweep.sweep import DEPTH

_BATCHES = 4
"""Batches that are run: with thousands of values of each, the ratio is known to some tenths of a dB."""

Energies = dict[str, tuple[float, float]]
"""Signal and noise of the output of each layer, by name, as far as it can be compared."""


def layer_errors(
    reference: Network,
    networks: Sequence[Shifted],
    layers: Mapping[str, str],
    shards: Shards,
    batches: Sequence[int],
    work: Work,
) -> list[dict[str, float | None]]:
    """The SQNR of each layer of some networks in dB, by name; None where outputs cannot be compared.

    Parameters
    ----------
    reference : Network
        Float.
    networks : sequence of Shifted
        The networks that are compared with it.
    layers : mapping from str to str
        The name of the float layer of each of their layers.
    shards : Shards
        The shards that run the networks.
    batches : sequence of int
        Those of which the first ones are run.
    work : Work
        What is told of batches that are done.
    """
    batches = batches[:_BATCHES]
    parts = []
    with work.doing("errors", len(batches) * (1 + len(networks))) as advance:
        for part in shards.each(layer_energies, batches, reference, networks, layers):
            parts.append(part)
            advance(1 / len(batches))
    return [{name: _sqnr([part[k][name] for part in parts]) for name in parts[0][k]} for k in range(len(networks))]


def layer_energies(
    shard: Shard, batches: Sequence[int], reference: Network, networks: Sequence[Shifted], layers: Mapping[str, str]
) -> Iterator[list[Energies]]:
    """The signal and the noise of the layers of each network, batch by batch."""
    expected = _values(shard, batches, reference, set(layers.values()))
    found = [_values(shard, batches, each.network, set(layers)) for each in networks]
    for k in range(len(batches)):
        yield [{name: _energies(expected[layers[name]][k], values[name][k]) for name in values} for values in found]


def _values(shard: Shard, batches: Sequence[int], network: Network, names: set[str]) -> dict[str, list[NDArray[Any]]]:
    """Some values of the outputs of layers by name, batch by batch."""
    layers = [layer for layer in network.layers if layer.name in names]
    plan = SweepPlan(network, tuple(layer.name for layer in layers), Wanted(outputs=False, values=True), DEPTH)
    cut, found = shard.cut(plan, batches), Measurements()
    for stage in cut.stages[:-1]:
        for part in cut.measure(stage.number, {}):
            found.merge(part)
    shard.finish(plan.name)
    return {layer.name: found.values[layer.output] for layer in layers}


def _energies(expected: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    r, q = expected.astype(np.float64), found.astype(np.float64)
    return (0.0, 0.0) if r.shape != q.shape else (float(np.square(r).sum()), float(np.square(q - r).sum()))


def _sqnr(energies: Sequence[tuple[float, float]]) -> float | None:
    signal, noise = (sum(each) for each in zip(*energies))
    ratio = signal / noise if noise > 0 else 0.0
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else None
