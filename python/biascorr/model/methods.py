"""How the shift of each layer is found.

`mean`: one forward pass through the quantized network measures the mean input of every layer per kernel tap; the shift is the
weight error times that mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.correctors import MeanBiasCorrector
from biascorr.model.network import Feeds, Layer, Network
from biascorr.statistics import ChannelMean, TapMean

Progress = Callable[[int], None]
"""Called after each batch with the number of batches done."""


def input_means(
    network: Network, layers: Sequence[Layer], batches: Iterable[Feeds], progress: Progress | None
) -> tuple[dict[str, NDArray[Any]], int]:
    """The mean input of each layer by name, (C,) or (*K, C), and the number of batches, from one pass that keeps no activation.

    Raises ValueError where there are no batches.
    """
    means: dict[Any, ChannelMean | TapMean] = {}
    for layer in layers:
        means.setdefault(_what_is_averaged(layer), _empty_mean(layer))
    names = list(dict.fromkeys(layer.input for layer in layers))
    done, compute = 0, None
    for done, feeds in enumerate(batches, start=1):
        compute = compute or network.part(feeds, names)
        tensors = compute(feeds)
        for (name, *_), mean in means.items():
            mean.update(tensors[name])
        if progress is not None:
            progress(done)
    if done == 0:
        raise ValueError("data: no samples, at least one is needed")
    by_layer = {layer.name: means[_what_is_averaged(layer)].mean(layer.input_quantization) for layer in layers}
    return by_layer, done


def _what_is_averaged(layer: Layer) -> tuple[Any, ...]:
    return layer.input, layer.channel_axis, layer.window


def _empty_mean(layer: Layer) -> ChannelMean | TapMean:
    if layer.window is None:
        return ChannelMean(channel_axis=layer.channel_axis)
    return TapMean(layer.window, channel_axis=layer.channel_axis)


def mean_shift(layer: Layer, weights: NDArray[Any], input_mean: NDArray[Any]) -> NDArray[np.float64]:
    """The shift of a quantized layer against the same layer with its float `weights`, (channels,) in real units."""
    corrector = MeanBiasCorrector(input_mean, groups=layer.groups, layout=layer.layout)
    shift = corrector.calculate(weights.astype(np.float64), layer.weights)
    return np.asarray(layer.gain * shift, dtype=np.float64)
