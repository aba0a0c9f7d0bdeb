"""High-bias fold: the part of a bias that no activation ever cuts moves into the biases of the next layer.

    c = max(0, beta - 3 gamma) before ReLU, else beta           b1 -= c, b2[o] += sum over i of K2[o,i] * c[i]

beta and gamma are the mean and standard deviation of the first layer's output, as a batch normalization gave them before it
was folded; K2 is the sum of W2 over the taps of its kernel. Without an activation this is exact. Before ReLU it is where the
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
from biascorr.equalization.folding import bias_of, response, with_statistics
from biascorr.equalization.scaling import known_statistics
from biascorr.graph.network import EditableNetwork, Edits, Feeds, Network
from biascorr.graph.operations import Activation, ActivationType, BatchNorm, Facts, Leaky, SpatialEffect
from biascorr.graph.reasons import Reason, ReasonCode

_SIGMAS = 3.0
"""Standard deviations that the output keeps above the folded bias."""


@dataclass(frozen=True, eq=False)
class HighBias:
    """The part of the bias of one layer that moved to the next.

    Parameters
    ----------
    first, second : str
        The layers.
    folded : ndarray, (C,), float64
        Of each output channel of the first.
    """

    first: str
    second: str
    folded: NDArray[np.float64]


def fold_high_biases(
    network: EditableNetwork,
    wanted: Collection[tuple[str, str]] | None = None,
    batches: Callable[[], Iterable[Feeds]] = tuple,
    threads: int = 0,
) -> tuple[EditableNetwork, list[HighBias], dict[str, Reason]]:
    """A network whose high biases are folded into the next layers.

    Parameters
    ----------
    network : EditableNetwork
        Float, its batch normalizations folded.
    wanted : collection of (str, str), optional
        Layers that follow each other; None: all.
    batches : callable
        Gives the samples.
    threads : int
        Threads that run the network; 0: all there are.

    Returns
    -------
    network : EditableNetwork
        Gives out nearly the same; to rounding, for the samples.
    high_biases : list of HighBias
        The biases that moved.
    left : dict from str to Reason
        By the names of layers with high biases that stay, why.
    """
    facts = network.facts()
    biases: dict[str, NDArray[Any]] = {}
    statistics: dict[str, BatchNorm] = {}
    folded, left = [], {}
    found = {}
    for link in find_links(network)[0]:
        high = _high_bias(facts, link)
        if not np.any(high) or (wanted is not None and (link.first.name, link.second.name) not in wanted):
            continue
        if reason := _obstacle(facts, link):
            left[link.first.name] = reason
        else:
            found[link] = high
    for link, high in _never_cut(network, found, batches(), threads).items():
        first, second = link.first, link.second
        moved = second.along_channels(response(second, link.channels.spread(high, second.input_channels)))
        lower = biases.get(first.name, bias_of(first)) - first.along_channels(high)
        higher = biases.get(second.name, bias_of(second)) + moved
        if max(np.abs(lower).max(), np.abs(higher).max()) > np.finfo(second.weights.dtype).max:
            left[first.name] = ReasonCode.BIAS_BEYOND_DTYPE(dtype=second.weights.dtype)
            continue
        biases[first.name], biases[second.name] = lower, higher
        for tensor, norm, channels in known_statistics(facts, link):
            statistics[tensor] = with_statistics(norm, norm.beta - channels.spread(high, len(norm.beta)), norm.gamma)
        folded.append(HighBias(first.name, second.name, high))
    return network.edited(Edits(biases=biases, statistics=statistics)) if folded else network, folded, left


def _never_cut(
    network: Network, found: Mapping[Link, NDArray[np.float64]], batches: Iterable[Feeds], threads: int
) -> dict[Link, NDArray[np.float64]]:
    """High biases, those before activations at most as high as the least output of the samples; the links that have any."""
    facts = network.facts()
    links = {link.first.output: link for link in found if acting(facts, link)}
    limited, compute = dict(found), None
    for feeds in batches if links else ():
        compute = compute or network.part(feeds, list(links), threads=threads)
        for name, array in compute(feeds).items():
            channels_first = np.moveaxis(array, links[name].first.output_axis, 0)
            least = np.fmin.reduce(channels_first.reshape(len(channels_first), -1), axis=1, initial=np.inf)
            limited[links[name]] = np.clip(least, 0.0, limited[links[name]])
    return {link: high for link, high in limited.items() if np.any(high)}


def _high_bias(facts: Facts, link: Link) -> NDArray[np.float64]:
    """c of the first layer of a link; zeros where nothing is known of its output."""
    norm = facts.statistics.get(link.first.output)
    if norm is None or len(norm.beta) != link.first.channels:
        return np.zeros(link.first.channels)
    if not acting(facts, link):
        return norm.beta
    return np.maximum(0.0, norm.beta - _SIGMAS * norm.gamma)


def acting(facts: Facts, link: Link) -> dict[str, Activation | Leaky]:
    """The activations between two layers that do anything, by name."""
    roles = {name: facts.roles.get(name) for name in link.between}
    return {
        name: role
        for name, role in roles.items()
        if isinstance(role, Leaky) or (isinstance(role, Activation) and role.type.acts)
    }


def _obstacle(facts: Facts, link: Link) -> Reason | None:
    """Why the bias of a link's first layer has to stay; None where it can move."""
    for name, role in acting(facts, link).items():
        if isinstance(role, Activation) and role.type != ActivationType.relu:
            return ReasonCode.BOUNDS_WOULD_MOVE(operation=name)
    if not link.second.sees_every_tap or any(facts.preserving(name, SpatialEffect.PADDING) for name in link.between):
        return ReasonCode.READS_PADDING(layer=link.second.name)
    return None
