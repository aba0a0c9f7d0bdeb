"""High-bias fold: what a channel is always above moves into the biases of the next layer.

    c = max(0, beta - 3 gamma) behind ReLU, else beta           b1 -= c, b2[o] += sum over i of K2[o,i] * c[i]

beta and gamma are the mean and standard deviation of the first layer's output, as a batch normalization told them before it
was folded; K2 is the sum of W2 over the taps of its kernel. Without an activation this is exact. Behind ReLU it is where the
output is above c: for all but one in 741 values of a normal distribution. Real outputs are not normal, so where there are
samples, c is at most the least output that they give.

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.equalization.chains import Link, find_links
from biascorr.equalization.folding import as_folded, bias_of, response
from biascorr.equalization.scaling import known_of
from biascorr.graph.batch_norms import acts
from biascorr.graph.network import ActivationType, BatchNorm, Edits, Feeds, Network

_SIGMAS = 3.0
"""Standard deviations that the output keeps above what is absorbed."""


@dataclass(frozen=True, eq=False)
class Absorption:
    """What moved from the bias of one layer to that of the next.

    Parameters
    ----------
    first, second : str
        The layers.
    absorbed : ndarray, (C,), float64
        Of each output channel of the first.
    """

    first: str
    second: str
    absorbed: NDArray[np.float64]


def absorb_high_biases(
    network: Network, wanted: Collection[tuple[str, str]] | None = None, batches: Callable[[], Iterable[Feeds]] = tuple
) -> tuple[Network, list[Absorption], dict[str, str]]:
    """A network whose high biases are absorbed by the layers behind.

    Parameters
    ----------
    network : Network
        Float, its batch normalizations folded.
    wanted : collection of (str, str), optional
        Layers that follow each other; None: all.
    batches : callable
        Gives the samples.

    Returns
    -------
    network : Network
        Gives out nearly the same; to rounding, for the samples.
    absorptions : list of Absorption
        What moved.
    left : dict from str to str
        By the names of layers with high biases that stay, why.
    """
    biases: dict[str, NDArray[Any]] = {}
    folded: dict[str, BatchNorm] = {}
    absorptions, left = [], {}
    found = {}
    for link in find_links(network)[0]:
        high = _high_bias(network, link)
        if not np.any(high) or (wanted is not None and (link.first.name, link.second.name) not in wanted):
            continue
        if reason := _obstacle(network, link):
            left[link.first.name] = reason
        else:
            found[link] = high
    for link, high in _never_cut(network, found, batches()).items():
        first, second = link.first, link.second
        behind = np.repeat(high, second.input_channels // first.channels)
        biases[first.name] = biases.get(first.name, bias_of(first)) - first.along_channels(high)
        biases[second.name] = biases.get(second.name, bias_of(second)) + second.along_channels(response(second, behind))
        for tensor, norm in known_of(network, link):
            folded[tensor] = as_folded(norm.name, norm.beta - np.repeat(high, len(norm.beta) // len(high)), norm.gamma)
        absorptions.append(Absorption(first.name, second.name, high))
    return network.edited(Edits(biases=biases, folded=folded)) if absorptions else network, absorptions, left


def _never_cut(
    network: Network, found: Mapping[Link, NDArray[np.float64]], batches: Iterable[Feeds]
) -> dict[Link, NDArray[np.float64]]:
    """High biases, those in front of activations at most as high as what samples have there; the links that have any."""
    tensors = {link.first.output: link for link in found if acting(network, link)}
    limited, compute = dict(found), None
    for feeds in batches if tensors else ():
        compute = compute or network.part(feeds, list(tensors))
        for name, array in compute(feeds).items():
            least = np.fmin.reduce(np.moveaxis(array, 1, 0).reshape(array.shape[1], -1), axis=1, initial=np.inf)
            limited[tensors[name]] = np.clip(least, 0.0, limited[tensors[name]])
    return {link: high for link, high in limited.items() if np.any(high)}


def _high_bias(network: Network, link: Link) -> NDArray[np.float64]:
    """c of the first layer of a link; zeros where nothing is known of its output."""
    norm = network.surroundings.folded.get(link.first.output)
    if norm is None or len(norm.beta) != link.first.channels:
        return np.zeros(link.first.channels)
    if not acting(network, link):
        return norm.beta
    return np.maximum(0.0, norm.beta - _SIGMAS * norm.gamma)


def acting(network: Network, link: Link) -> list[str]:
    """The activations between two layers that do anything."""
    kinds = network.surroundings
    activations = ((name, kinds.activations.get(name, ActivationType.no_activation)) for name in link.between)
    return [name for name, activation in activations if acts(activation) or name in kinds.leaky]


def _obstacle(network: Network, link: Link) -> str:
    """Why the bias of a link's first layer has to stay; empty where it can move."""
    kinds = network.surroundings
    for name in acting(network, link):
        if name not in kinds.leaky and kinds.activations[name] != ActivationType.relu:
            return f"{name} limits it to bounds that would move"
    if not link.second.sees_every_tap or any(name in kinds.paddings for name in link.between):
        return f"{link.second.name} reads padding too, which would be shifted"
    return ""
