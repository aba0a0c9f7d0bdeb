"""Which layers follow each other so that a channel between them can be scaled: by 1/s before, by s after.

    first -> (ReLU, clip, LeakyReLU, PReLU, identity, zero padding, average over all positions, flatten)* -> second

Each of these gives s * f(x / s) = f(x) for s > 0, a clip once its bounds are scaled too. Nothing else may read the output of
the first layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from biascorr.graph.axes import Channels
from biascorr.graph.batch_norms import Neighbours
from biascorr.graph.layer import Layer, without_later_calls
from biascorr.graph.network import Network
from biascorr.graph.operations import Activation, ActivationType, ChannelPreserving, Leaky, Operation, SpatialEffect
from biascorr.graph.reasons import Reason, ReasonCode


@dataclass(frozen=True, eq=False)
class Link:
    """Two layers, the second of which alone reads the output of the first.

    Parameters
    ----------
    first, second : Layer
        The layers.
    between : sequence of str
        The operations between them, by name, in their order.
    tensors : mapping from str to Channels
        The output of the first layer and of each operation, and where the channels of the first layer are in it.
    """

    first: Layer
    second: Layer
    between: Sequence[str]
    tensors: Mapping[str, Channels]

    @property
    def channels(self) -> Channels:
        """Where the channels of the first layer are in the input of the second."""
        return list(self.tensors.values())[-1]


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers that are equalized together: all but the ends have one input and one output channel per group.

    Parameters
    ----------
    links : sequence of Link
        Each starts where the one before ends.
    """

    links: Sequence[Link]

    @property
    def layers(self) -> list[Layer]:
        return [self.links[0].first, *(link.second for link in self.links)]


def is_depthwise(layer: Layer) -> bool:
    """Whether each output channel reads one input channel of its own."""
    taps = math.prod(size for letter, size in zip(layer.layout, layer.weights.shape) if letter in "DHW")
    return layer.channels == layer.input_channels and math.prod(layer.weights.shape) == layer.channels * taps


def is_inner(link: Link) -> bool:
    """Whether a chain can go on after the second layer: each channel of the first is still one of its own."""
    return is_depthwise(link.second) and link.second.channels == link.first.channels


def find_links(network: Network) -> tuple[list[Link], dict[str, Reason]]:
    """All links, in the order of their first layers; and by the names of the other layers, why nothing can follow them."""
    finder = _Finder(network)
    links, reasons = [], {}
    for layer in without_later_calls(network.layers):
        found = finder.link(layer)
        if isinstance(found, Link):
            links.append(found)
        else:
            reasons[layer.name] = found
    return links, reasons


def chains_of(links: Sequence[Link]) -> Iterator[Chain]:
    """Pairs, and longer chains through depthwise layers, in the order of their first layers."""
    following = {link.first.name: link for link in links}
    inside = {link.second.name for link in links if is_inner(link)} & set(following)
    for link in links:
        if link.first.name not in inside:
            chain = [link]
            while chain[-1].second.name in inside:
                chain.append(following[chain[-1].second.name])
            yield Chain(chain)


def unfit(layer: Layer) -> Reason | None:
    """Why a layer cannot have other weights; None where it can."""
    if layer.weight_step is not None:
        return ReasonCode.WEIGHTS_QUANTIZED()
    if layer.shares_weights:
        return ReasonCode.WEIGHTS_SHARED()
    if not math.prod(layer.weights.shape):
        return ReasonCode.NO_WEIGHTS()
    return None if np.isfinite(np.asarray(layer.weights)).all() else ReasonCode.WEIGHTS_INFINITE()


class _Finder:
    def __init__(self, network: Network) -> None:
        self._neighbours = Neighbours(network)
        self._facts = self._neighbours.facts
        self._layers = {layer.name: layer for layer in network.layers}
        self._unfit: dict[str, Reason | None] = {}

    def link(self, first: Layer) -> Link | Reason:
        """The link that starts with a layer, or why there is none."""
        if reason := self._unfitness(first):
            return reason
        between: list[Operation] = []
        tensors = {first.output: self._neighbours.output_channels(first)}
        while True:
            tensor = between[-1].outputs[0] if between else first.output
            readers = self._neighbours.readers(tensor)
            if len(readers) != 1:
                return ReasonCode.SEVERAL_READERS() if readers else ReasonCode.NO_READERS()
            operation = readers[0]
            if operation is None:
                return ReasonCode.IS_OUTPUT()
            if operation.name in self._layers:
                return self._linked(Link(first, self._layers[operation.name], [each.name for each in between], tensors), tensor)
            after = self._after(first, between, tensors[tensor], operation)
            if isinstance(after, Reason):
                return after
            between.append(operation)
            tensors[operation.outputs[0]] = after

    def _unfitness(self, layer: Layer) -> Reason | None:
        if layer.name not in self._unfit:
            self._unfit[layer.name] = unfit(layer)
        return self._unfit[layer.name]

    def _linked(self, link: Link, tensor: str) -> Link | Reason:
        second = link.second
        if reason := self._unfitness(second):
            return ReasonCode.NEXT_LAYER(layer=second.first_call, reason=reason)
        channels = Channels(link.channels.axis, link.channels.rank or second.rank, link.channels.order)
        if tensor != second.input or not channels.is_along(second.channel_axis) or second.input_channels % link.first.channels:
            return ReasonCode.OTHER_CHANNELS(layer=second.name)
        return link

    def _after(self, first: Layer, between: Sequence[Operation], channels: Channels, operation: Operation) -> Channels | Reason:
        """Where the channels are after an operation, or why they cannot be scaled through it."""
        role = self._facts.roles.get(operation.name)
        if isinstance(role, Activation) and role.type.bounds is not None:
            return self._limited(first, between, channels, operation, role) or channels
        if isinstance(role, Leaky):
            return channels
        preserving = self._facts.preserving(operation.name, *SpatialEffect)
        if preserving is None:
            return ReasonCode.OPERATION_MIXES(operation=operation.name)
        if preserving.channel_axis is None or preserving.output_axis is None:
            return channels
        if not channels.is_along(preserving.channel_axis):
            return ReasonCode.OPERATION_AXIS(operation=operation.name, axis=preserving.channel_axis)
        return channels.moved(preserving.output_axis, self._facts.rank(operation.outputs[0]), preserving.order)

    def _limited(
        self, first: Layer, between: Sequence[Operation], channels: Channels, operation: Operation, activation: Activation
    ) -> Reason | None:
        """Why an activation between layers cannot limit each channel to a bound of its own; None where it can, or need not."""
        if not is_scaled(activation.type):
            return None
        if operation.is_shared:
            return ReasonCode.BOUND_SHARED(operation=operation.name)
        if any(isinstance(self._facts.roles.get(each.name), ChannelPreserving) for each in between):
            return ReasonCode.BOUND_IN_OTHER_SHAPE(operation=operation.name)
        counts = {len(bound) for bound in activation.type.bounds or () if isinstance(bound, tuple)}
        if counts and not (channels.is_along(activation.channel_axis) and counts == {first.channels}):
            return ReasonCode.BOUND_AXIS(operation=operation.name)
        return None if activation.can_limit_channels else ReasonCode.BOUND_PER_CHANNEL(operation=operation.name)


def is_scaled(activation: ActivationType) -> bool:
    """Whether scaled values need other bounds."""
    return activation.bounds is not None and any(
        np.any(np.isfinite(bound) & np.not_equal(bound, 0)) for bound in activation.bounds
    )
