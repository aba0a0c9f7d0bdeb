"""Cross-layer scaling: each channel between two layers gets the same range in both.

    pair      S = sqrt(r1 / r2)                                  W1 /= S, b1 /= S, W2 *= S
    triple    t = (r1 r2 r3)^(1/3), S12 = r1 / t, S23 = t / r3   the middle one depthwise: W2 *= S12 / S23, b2 /= S23
    longer    t = (r1 ... rn)^(1/n), each S the one before it times r / t

r1[c] is the largest absolute weight of output channel c, r2[c] that of input channel c; S[c] = 1 where a range is 0, and
where the bias divided by it would be no number of its type. Scales of one chain change ranges of the next, so sweeps over all
chains are repeated until nothing moves.

Training leaves channels with ranges of 1e-20 or so: S would make their constant activation 1e10 times as large, and one scale
for all activations worthless. What passes through them is less than float32 resolves, so their r1 becomes 0.

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1
and appendix A.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.arguments import checked_integer
from biascorr.channel_scale import channel_ranges
from biascorr.equalization.chains import Chain, Link, chains_of, find_links, is_inner, is_scaled
from biascorr.equalization.folding import scaled_weights, with_statistics
from biascorr.graph.axes import Channels
from biascorr.graph.layer import Layer, LazyArray
from biascorr.graph.network import EditableNetwork, Edits
from biascorr.graph.operations import ActivationType, BatchNorm, Bound, Facts
from biascorr.graph.reasons import Reason, ReasonCode

Factors = NDArray[np.float64]

_SETTLED = 1e-6
"""Relative change of all factors in one sweep that counts as none."""

_MOST_SWEEPS = 1000
"""A chain of 20 layers settles in some hundred."""

_SILENT = 2.0**-32
"""Part of the strongest channel that counts as nothing: numbers in float32 have 24 bits."""

_SIGMAS = 6.0
"""Standard deviations from their mean up to which outputs have to stay finite."""

_LEAST_GAIN = 0.25
"""Bits that a chain must gain for a clip in it to get a bound for each channel, which runtimes do not fuse with the layer."""


@dataclass(frozen=True, eq=False)
class ScaledChain:
    """A chain whose channels were scaled.

    Parameters
    ----------
    chain : Chain
        Its layers, as they were before.
    factors : sequence of ndarray, (C,), float64
        For each link, what its channels were divided by before it and multiplied by after it.
    bits : float
        By how much the ranges of its layers shrank, all together: a bit is half the range of one of them.
    limits : sequence of str
        The activations whose bounds were scaled, by name.
    silent : ndarray, (C,), bool
        The channels through which something goes, but less than float32 resolves beside the strongest one. They are not
        scaled, and their weights in the first layer become 0.
    ranges : sequence of (ndarray, ndarray), (O,) each, float64
        For each layer, the greatest magnitude of each output channel's weights, before and after.
    """

    chain: Chain
    factors: Sequence[Factors]
    bits: float
    limits: Sequence[str]
    silent: NDArray[np.bool_]
    ranges: Sequence[tuple[Factors, Factors]]


class _Scaled:
    """A layer and the factors that its channels are to be multiplied by; 0 where nothing goes through."""

    def __init__(self, layer: Layer, norm: BatchNorm | None) -> None:
        self.layer = layer
        self._limits = np.finfo(layer.weights.dtype)
        self.output, self.input = np.ones(layer.channels), np.ones(layer.input_channels)
        self._known: dict[str, tuple[Factors, Factors]] = {}
        self._largest = self._largest_values(norm)

    def _largest_values(self, norm: BatchNorm | None) -> Factors:
        """The largest bias of each output channel, or output as its statistics `norm` tell, (C,), in magnitude."""
        aligned = self.layer.along_channels(np.zeros(self.layer.channels))
        biases = aligned if self.layer.bias is None else aligned + np.abs(self.layer.bias)
        largest = np.moveaxis(biases, self.layer.output_axis, 0).reshape(self.layer.channels, -1).max(axis=1)
        if norm is not None and len(norm.beta) == len(largest):
            largest = np.maximum(largest, np.abs(norm.beta) + _SIGMAS * norm.gamma)
        return np.asarray(largest)

    def overflows(self, factors: Factors) -> NDArray[np.bool_]:
        """Where biases or outputs divided by these, beside what they were before, would be beyond the numbers of their type."""
        return np.asarray(self._largest * self.output / factors > self._limits.max)

    def underflows(self, axis: str, factors: Factors) -> NDArray[np.bool_]:
        """Where weights multiplied by these would lose bits: a channel that counts, on either side, would be subnormal."""
        own, tiny = self.ranges(axis), self._limits.tiny
        counts = float(own.max(initial=0.0)) * self._limits.eps
        least = counts
        if np.any((own >= tiny) & (least * factors < tiny)):
            other = self.ranges("I" if axis == "O" else "O")
            least = other.min(initial=np.inf, where=other >= max(counts, tiny))
        return np.asarray((own >= tiny) & (np.minimum(own, least) * factors < tiny))

    def ranges(self, axis: str) -> Factors:
        """The ranges of its output ("O") or input ("I") channels as scaled so far."""
        own, other = (self.output, self.input) if axis == "O" else (self.input, self.output)
        known = self._known.get(axis)
        if known is None or not np.array_equal(known[0], other):
            layer = self.layer
            found = channel_ranges(np.asarray(layer.weights), layer.layout, axis=axis, groups=layer.groups, factors=other)
            known = self._known[axis] = (other.copy(), found)
        return np.asarray(own * known[1])

    def output_ranges(self) -> tuple[Factors, Factors]:
        """The ranges of its output channels as they were, and as scaled so far."""
        layer, weights = self.layer, np.asarray(self.layer.weights)
        before, after = (
            channel_ranges(weights, layer.layout, axis="O", groups=layer.groups, factors=factors)
            for factors in (None, self.input)
        )
        return before, np.asarray(self.output * after)

    @property
    def weights(self) -> LazyArray:
        return scaled_weights(self.layer, output_factors=self.output.copy(), input_factors=self.input.copy())


def scale(
    network: EditableNetwork,
    iterations: int | None = None,
    progress: Callable[[int, int | None], None] = lambda *_: None,
    wanted: Sequence[Sequence[str]] | None = None,
) -> tuple[EditableNetwork, list[ScaledChain], dict[str, Reason]]:
    """A network with the channels of these sets of layers, or of all that follow each other, scaled.

    Parameters
    ----------
    network : EditableNetwork
        Float.
    iterations : int, optional
        Sweeps; None: until they change nothing.
    progress : callable
        Called with the sweeps done and how many there are (None if unknown).
    wanted : sequence of sequences of str, optional
        Layers that follow each other, by name; those inside a set have one input and one output channel per group.

    Returns
    -------
    network : EditableNetwork
        Gives out the same, to rounding.
    chains : list of ScaledChain
        The chains that were scaled.
    left : dict from str to Reason
        By the names of layers whose output channels are as they were, why.

    Raises
    ------
    ValueError
        Wanted layers cannot be scaled together.
    """
    links, left = find_links(network)
    if wanted is None:
        chains = list(chains_of(_worthwhile(network.facts(), links, left)))
    else:
        chains = [_chain_from_names(names, links, left) for names in wanted]
    scaler = Scaler(chains, network.facts())
    if not scaler.settle(iterations, progress) and iterations is None:
        warnings.warn(f"ranges have not settled after {_MOST_SWEEPS} sweeps", stacklevel=3)
    return (*scaler.scaled(network), left)


def check_iterations(iterations: int | None) -> None:
    """Raises ValueError where these are no sweeps, nor None."""
    if iterations is not None:
        checked_integer("iterations", iterations, 1, otherwise="None")


def _worthwhile(facts: Facts, links: Sequence[Link], left: dict[str, Reason]) -> list[Link]:
    """The links but those with bounds to scale in chains that gain little by it."""
    worthwhile = []
    for chain in chains_of(links):
        limits = {
            link.first.name: [name for name, each in _limits_of(facts, link).items() if not _is_per_channel(each)]
            for link in chain.links
        }
        scaler = Scaler([chain], facts)
        scaler.sweep()
        gained = sum(scaler.bits) if any(limits.values()) else np.inf
        for link in chain.links:
            if gained < _LEAST_GAIN and limits[link.first.name]:
                left[link.first.name] = ReasonCode.LITTLE_GAIN(operations=", ".join(limits[link.first.name]), bits=gained)
            else:
                worthwhile.append(link)
    return worthwhile


def _is_per_channel(activation: ActivationType) -> bool:
    """Whether an activation has a bound for each channel already."""
    return any(isinstance(bound, tuple) for bound in activation.bounds or ())


def _limits_of(facts: Facts, link: Link) -> dict[str, ActivationType]:
    """The activations between two layers whose bounds are to be scaled, by name."""
    found = {name: facts.activation(name) for name in link.between}
    return {name: each.type for name, each in found.items() if each is not None and is_scaled(each.type)}


def _chain_from_names(names: Sequence[str], links: Sequence[Link], left: Mapping[str, Reason]) -> Chain:
    following = {link.first.name: link for link in links}
    chain = []
    for first, second in itertools.pairwise(names):
        link = following.get(first)
        if link is None or link.second.name != second:
            reason = left.get(
                first, "no layer of this name" if link is None else ReasonCode.FOLLOWED_BY(layer=link.second.name)
            )
            raise ValueError(f"cls_sets: {first} and {second} cannot be scaled together: {first}: {reason}")
        chain.append(link)
    inner = [link.second.name for link in chain[:-1] if not is_inner(link)]
    if not chain or inner:
        unfit = f"{inner[0]} is no depthwise layer with the channels of the one before it" if inner else ""
        raise ValueError(f"cls_sets: {', '.join(names)}: {unfit or 'expected two layers or more'}")
    return Chain(chain)


class Scaler:
    """Factors of chains, found sweep by sweep.

    Parameters
    ----------
    chains : sequence of Chain
        No link is in two of them.
    facts : Facts
        Of the network that they are in.
    """

    def __init__(self, chains: Sequence[Chain], facts: Facts) -> None:
        self._chains = chains
        self._facts = facts
        self._layers = {
            layer.name: _Scaled(layer, facts.statistics.get(layer.output)) for chain in chains for layer in chain.layers
        }
        self._factors = {link.first.name: np.ones(link.first.channels) for chain in chains for link in chain.links}
        self._before = [self._range_in_bits(chain) for chain in chains]
        self._silent = [_silent_channels(self._ranges(chain)) for chain in chains]
        for chain, silent in zip(chains, self._silent):
            self._layers[chain.layers[0].name].output[silent] = 0.0

    @property
    def bits(self) -> list[float]:
        """The gain of each chain; see :class:`ScaledChain`."""
        return [before - self._range_in_bits(chain) for chain, before in zip(self._chains, self._before)]

    def sweep(self) -> float:
        """Equalizes each chain once; returns the largest change of a factor, as a logarithm."""
        return max((self._equalize(chain) for chain in self._chains), default=0.0)

    def settle(self, iterations: int | None, progress: Callable[[int, int | None], None]) -> bool:
        """So many sweeps, or as many as change anything; returns whether the last one changed next to nothing."""
        change = np.inf
        for done in range(1, (iterations or _MOST_SWEEPS) + 1):
            change = self.sweep()
            progress(done, iterations)
            if change < _SETTLED and iterations is None:
                break
        return change < _SETTLED

    def scaled(self, network: EditableNetwork) -> tuple[EditableNetwork, list[ScaledChain]]:
        """A network with the factors found, and what became of each chain."""
        links = [link for chain in self._chains for link in chain.links]
        edits = Edits(
            {name: layer.weights for name, layer in self._layers.items()},
            {link.first.name: self._divided(link, link.first.bias) for link in links if link.first.bias is not None},
            {name: bounds for link in links for name, bounds in self._limits(link)},
            statistics={name: norm for link in links for name, norm in self._statistics(link)},
        )
        done = [
            ScaledChain(
                chain,
                [self._factors[link.first.name] for link in chain.links],
                bits,
                [name for link in chain.links for name in _limits_of(self._facts, link)],
                silent,
                [self._layers[layer.name].output_ranges() for layer in chain.layers],
            )
            for chain, bits, silent in zip(self._chains, self.bits, self._silent)
        ]
        return network.edited(edits), done

    def _equalize(self, chain: Chain) -> float:
        layers = [self._layers[layer.name] for layer in chain.layers]
        found = factors_from_ranges(self._ranges(chain))
        kept = np.any([_is_lost(*each) for each in zip(chain.links, layers, layers[1:], found)], axis=0)
        steps = [np.where(kept, 1.0, step) for step in found]
        for link, first, second, step in zip(chain.links, layers, layers[1:], steps):
            self._factors[link.first.name] *= step
            first.output /= step
            second.input *= link.channels.spread(step, len(second.input))
        return max(float(np.abs(np.log(step)).max(initial=0.0)) for step in steps)

    def _ranges(self, chain: Chain) -> list[Factors]:
        """The ranges of each layer, (C,)."""
        ranges = [self._layers[chain.layers[0].name].ranges("O")]
        for link in chain.links:
            found = self._layers[link.second.name].ranges("I")
            ranges.append(link.channels.gathered(found, link.first.channels).max(axis=1))
        return ranges

    def _range_in_bits(self, chain: Chain) -> float:
        """The range of all its layers together; those without any range do not count."""
        largest = [float(ranges.max(initial=0.0)) for ranges in self._ranges(chain)]
        return float(sum(np.log2(each) for each in largest if each > 0))

    def _divided(self, link: Link, values: NDArray[Any]) -> NDArray[np.float64]:
        """Values that are aligned with the output of the first layer, scaled with it."""
        return np.asarray(values / link.first.along_channels(self._factors[link.first.name]))

    def _limits(self, link: Link) -> Iterator[tuple[str, tuple[NDArray[Any], NDArray[Any]]]]:
        """The bounds of the activations of a link, scaled."""
        for name, activation in _limits_of(self._facts, link).items():
            if activation.bounds:
                low, high = (self._divided(link, _aligned(link.first, bound)) for bound in activation.bounds)
                yield name, (low, high)

    def _statistics(self, link: Link) -> Iterator[tuple[str, BatchNorm]]:
        """The statistics of the tensors of a link, scaled."""
        for name, norm, channels in known_statistics(self._facts, link):
            factors = channels.spread(self._factors[link.first.name], len(norm.beta))
            yield name, with_statistics(norm, norm.beta / factors, norm.gamma / factors)


def _is_lost(link: Link, first: _Scaled, second: _Scaled, step: Factors) -> NDArray[np.bool_]:
    """Where dividing the channels of a link by these before it, and multiplying them after it, leaves the numbers of a type."""
    after = second.underflows("I", link.channels.spread(step, len(second.input)))
    return np.asarray(
        first.overflows(step) | first.underflows("O", 1 / step) | link.channels.gathered(after, len(step)).any(axis=1)
    )


def _silent_channels(ranges: Sequence[Factors]) -> NDArray[np.bool_]:
    """From the ranges of the layers of a chain, (C,) each; their product is what a channel passes on of its input."""
    with np.errstate(divide="ignore"):
        passed = np.log2(np.stack(ranges)).sum(axis=0)
    return np.asarray(np.isfinite(passed) & (passed < passed.max(initial=-np.inf) + np.log2(_SILENT)))


def _aligned(layer: Layer, bound: Bound) -> NDArray[np.float64]:
    """Aligned with the output of a layer."""
    return layer.along_channels(np.asarray(bound)) if isinstance(bound, tuple) else np.asarray(bound)


def known_statistics(facts: Facts, link: Link) -> Iterator[tuple[str, BatchNorm, Channels]]:
    """The tensors between two layers whose statistics are known, and where the channels of the first layer are in them."""
    for name, channels in link.tensors.items():
        norm = facts.statistics.get(name)
        if norm is not None and len(norm.beta) % link.first.channels == 0:
            yield name, norm, channels


def factors_from_ranges(ranges: Sequence[Factors]) -> list[Factors]:
    """S of each link of a chain, (C,), from the ranges of its layers, (C,) each; 1 where one of them is 0.

    Examples
    --------
    >>> factors_from_ranges([np.array([8.0, 1.0]), np.array([2.0, 0.0])])
    [array([2., 1.])]
    """
    with np.errstate(divide="ignore"):
        logs = np.log(np.stack(ranges))
    logs = np.where(np.isfinite(logs).all(axis=0), logs, 0.0)
    return list(np.exp(np.cumsum(logs - logs.mean(axis=0), axis=0)[:-1]))
