"""Which layers follow each other so that a channel between them can be scaled: by 1/s before, by s behind.

    first -> (ReLU, clip, LeakyReLU, PReLU, identity, zero padding, average over all positions, flatten)* -> second

Each of these gives s * f(x / s) = f(x) for s > 0, a clip once its bounds are scaled too. Nothing else may read what the first
layer makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from biascorr.graph.batch_norms import Neighbours
from biascorr.graph.network import ActivationType, Layer, Network, Operation


@dataclass(frozen=True, eq=False)
class Link:
    """Two layers, the second of which alone reads what the first makes.

    Parameters
    ----------
    first, second : Layer
        Output channel c of the first becomes the same number of input channels of the second, next to each other.
    between : sequence of str
        The operations between them, by name, in their order.
    """

    first: Layer
    second: Layer
    between: Sequence[str]


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
    return layer.channels == layer.input_channels and layer.weights.size == layer.channels * taps


def is_inner(link: Link) -> bool:
    """Whether a chain can go on behind the second layer: each channel of the first is still one of its own."""
    return is_depthwise(link.second) and link.second.channels == link.first.channels


def find_links(network: Network) -> tuple[list[Link], dict[str, str]]:
    """All links, in the order of their first layers; and by the names of the other layers, why nothing can follow them."""
    finder = _Finder(network)
    links, reasons = [], {}
    for layer in network.layers:
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


def unfit(layer: Layer) -> str:
    """Why a layer cannot have other weights; empty where it can."""
    if layer.weight_step is not None:
        return "its weights are quantized"
    if layer.shares_weights:
        return "its weights are used elsewhere too"
    if not layer.weights.size:
        return "it has no weights"
    return "" if np.isfinite(layer.weights).all() else "its weights are not finite"


class _Finder:
    def __init__(self, network: Network) -> None:
        self._kinds = network.surroundings
        self._neighbours = Neighbours(network)
        self._layers = {layer.name: layer for layer in network.layers}

    def link(self, first: Layer) -> Link | str:
        """What follows a layer, or why nothing can."""
        if reason := unfit(first):
            return reason
        between: list[Operation] = []
        while True:
            readers = self._neighbours.readers(between[-1].outputs[0] if between else first.output)
            if len(readers) != 1:
                return "several operations read its output" if readers else "nothing reads its output"
            if readers[0] is None:
                return "its output is an output of the model"
            if readers[0].name in self._layers:
                return self._linked(first, between, self._layers[readers[0].name])
            if reason := self._obstacle(first, between, readers[0]):
                return reason
            between.append(readers[0])

    def _linked(self, first: Layer, between: Sequence[Operation], second: Layer) -> Link | str:
        if reason := unfit(second):
            return f"followed by {second.name}: {reason}"
        if not self._has_same_channels(first, between, second):
            return f"followed by {second.name}, which reads other channels"
        return Link(first, second, [operation.name for operation in between])

    def _has_same_channels(self, first: Layer, between: Sequence[Operation], second: Layer) -> bool:
        tensor = between[-1].outputs[0] if between else first.output
        if tensor != second.input:
            return False
        if first.output_axis == second.channel_axis and not any(map(self._is_along_axis_1, between)):
            return True
        is_along_axis_1 = self._neighbours.is_along_axis_1
        return is_along_axis_1(first, first.output_axis, first.output) and is_along_axis_1(
            second, second.channel_axis, second.input
        )

    def _is_along_axis_1(self, operation: Operation) -> bool:
        """Whether an operation is known to keep channels apart only along axis 1."""
        return operation.name not in self._kinds.activations and operation.name not in self._kinds.leaky

    def _obstacle(self, first: Layer, between: Sequence[Operation], operation: Operation) -> str:
        """Why channels cannot be scaled through an operation."""
        kinds = self._kinds
        activation = kinds.activations.get(operation.name)
        if activation is not None and activation.bounds is not None:
            return self._obstacle_to_bounds(first, between, operation) if is_scaled(activation) else ""
        if operation.name in kinds.leaky:
            return ""
        passing = (kinds.identities, kinds.paddings, kinds.averages, kinds.flattens)
        if not any(operation.name in names for names in passing):
            return f"{operation.name} reads its output, behind which a scaled channel is not the same"
        if self._neighbours.is_along_axis_1(first, first.output_axis, first.output):
            return ""
        return f"{operation.name} reads its output, whose channels are not along axis 1"

    def _obstacle_to_bounds(self, first: Layer, between: Sequence[Operation], operation: Operation) -> str:
        """Why an activation between layers cannot limit each channel to a bound of its own."""
        if any(map(self._is_along_axis_1, between)):
            return f"{operation.name} limits its output in another shape"
        bounds = self._kinds.activations[operation.name].bounds or ()
        counts = {len(bound) for bound in bounds if isinstance(bound, tuple)}
        is_along_axis_1 = self._neighbours.is_along_axis_1(first, first.output_axis, first.output)
        if counts and not (is_along_axis_1 and counts == {first.channels}):
            return f"{operation.name} limits its output along another axis"
        if operation.name not in self._kinds.limitable:
            return f"{operation.name} cannot limit each channel to a bound of its own in this model"
        return ""


def is_scaled(activation: ActivationType) -> bool:
    """Whether what an activation limits values to is another number for scaled values."""
    return activation.bounds is not None and any(
        np.any(np.isfinite(bound) & np.not_equal(bound, 0)) for bound in activation.bounds
    )
