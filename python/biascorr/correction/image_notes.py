"""Remarks on images as samples: the range of their values, and whether the network was trained with such values.

    spread[c]  = std of the first layer's output y[c] over these images / std that the batch normalization after it has for y[c]

The median over channels is near 1 (0.8 to 1.3 with photographs) where images are scaled as for training. Scaled otherwise by a
factor of 2, as between the usual conventions, they move it as much; which preset brings it back to 1 is found by trying.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.images import Images
from biascorr.calibration.samples import Samples
from biascorr.graph.batch_norms import Neighbours
from biascorr.graph.layer import Layer
from biascorr.graph.network import Feeds, Network

_ENOUGH, _MOST = 4, 32
"""Images that say something, and that are looked at."""

_OFF = 1.8
"""A spread of more, or of less than its inverse, is not by chance: conventions differ by 1.9 at least (measured)."""

_CLOSE = 1.4
"""A preset with which the spread is so near to 1 is likely the right one."""


def image_notes(network: Network, samples: Samples) -> list[str]:
    """The range of the values of images, where samples are some; whether the float network was trained with others."""
    if samples.images is None:
        return []
    return [samples.images.note, *_scaling_note(network, samples.images, samples)]


def _scaling_note(network: Network, images: Images, samples: Samples) -> list[str]:
    known = _first_layer(network)
    if known is None:
        return []
    layer, expected = known
    batches = [*itertools.islice(samples.feeds(), _MOST)]
    if sum(len(next(iter(feeds.values()))) for feeds in batches) < _ENOUGH:
        return []
    compute = network.part(batches[0], [layer.output])
    found = _spread(compute, batches, layer, expected)
    if 1 / _OFF <= found <= _OFF or not np.isfinite(found):
        return []
    spreads = {
        preset: _spread(compute, ({name: change(array) for name, array in feeds.items()} for feeds in batches), layer, expected)
        for preset, change in images.other_presets().items()
    }
    best = min(spreads, key=lambda preset: abs(np.log(spreads[preset])), default=None)
    is_close = best is not None and 1 / _CLOSE <= spreads[best] <= _CLOSE
    remedy = f" preset={best!r} (--preset {best}) would make it {spreads[best]:.3g}" if best is not None and is_close else ""
    return [
        f"with these images, values after {layer.name} spread {found:.3g} times as wide as in training, says the batch "
        f"normalization there: are they scaled as for training?{remedy}"
    ]


def _first_layer(network: Network) -> tuple[Layer, NDArray[np.float64]] | None:
    """The first layer, and the standard deviation of its output in training, (C,); None where the network does not have it."""
    if not network.layers:
        return None
    layer = network.layers[0]
    neighbours = Neighbours(network)
    norm = neighbours.around(layer).output_bn
    if norm is None:
        return None
    if neighbours.facts.statistics.get(layer.output) is norm:  # folded: those of the output that the layer now has
        return layer, np.abs(norm.gamma)
    return layer, np.sqrt(norm.variance + norm.epsilon)


def _spread(compute: Callable[[Feeds], Feeds], batches: Iterable[Feeds], layer: Layer, expected: NDArray[np.float64]) -> float:
    """The median over channels of how much wider than expected the output of a layer spreads."""
    outputs = [np.moveaxis(compute(feeds)[layer.output], layer.output_axis, -1) for feeds in batches]
    values = np.concatenate([output.reshape(-1, output.shape[-1]).astype(np.float64) for output in outputs])
    alive = expected > 0
    return float(np.median(values.std(axis=0)[alive] / expected[alive])) if alive.any() else np.nan
