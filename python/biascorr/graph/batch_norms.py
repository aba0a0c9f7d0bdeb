"""Which batch normalizations and activations are around the layers of a network.

BatchNorm -> [activation] -> layer          gives the mean of the layer's input
layer -> BatchNorm -> [activation]          gives the mean of the layer's output
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from biascorr.graph.axes import Channels
from biascorr.graph.layer import Layer
from biascorr.graph.network import Network
from biascorr.graph.operations import Activation, ActivationType, BatchNorm, Leaky, Operation, SpatialEffect


@dataclass(frozen=True, eq=False)
class ConvBnInfoType:
    """The batch normalizations around a layer.

    Parameters
    ----------
    input_bn, output_bn : BatchNorm or None
        The one that makes the layer's input, and the one that reads its output.
    in_activation_type : ActivationType
        The activation between `input_bn` and the layer.
    out_activation_type : ActivationType
        The activation that reads `output_bn`: `ActivationType.other` also where its readers differ in this.
    """

    input_bn: BatchNorm | None = None
    output_bn: BatchNorm | None = None
    in_activation_type: ActivationType = ActivationType.no_activation
    out_activation_type: ActivationType = ActivationType.no_activation

    @property
    def gives_input_mean(self) -> bool:
        """Whether the mean of the layer's input follows from its statistics."""
        return self.input_bn is not None and self.in_activation_type.bounds is not None


def batch_norms_around_layers(network: Network) -> dict[str, ConvBnInfoType]:
    """By the name of the layer, in topological order; layers without any batch normalization around them are left out.

    Of a layer of several calls, before it and after it, what all calls have there; nothing where they differ.
    """
    neighbours = Neighbours(network)
    calls: dict[str, list[ConvBnInfoType]] = {}
    for layer in network.layers:
        calls.setdefault(layer.first_call, []).append(neighbours.around(layer))
    return _with_any({name: _common(infos) for name, infos in calls.items()})


def batch_norms_around_calls(network: Network) -> dict[str, ConvBnInfoType]:
    """As :func:`batch_norms_around_layers`, but each call of a layer by its own name, with what is around it."""
    neighbours = Neighbours(network)
    return _with_any({layer.name: neighbours.around(layer) for layer in network.layers})


def _with_any(infos: Mapping[str, ConvBnInfoType]) -> dict[str, ConvBnInfoType]:
    return {name: info for name, info in infos.items() if info.input_bn is not None or info.output_bn is not None}


def _common(infos: Sequence[ConvBnInfoType]) -> ConvBnInfoType:
    """What is the same around all calls of a layer."""
    input_bn, in_activation = _same([(info.input_bn, info.in_activation_type) for info in infos])
    output_bn, out_activation = _same([(info.output_bn, info.out_activation_type) for info in infos])
    return ConvBnInfoType(input_bn, output_bn, in_activation, out_activation)


def _same(sides: Sequence[tuple[BatchNorm | None, ActivationType]]) -> tuple[BatchNorm | None, ActivationType]:
    """The first batch normalization and activation, where all have the same statistics and function."""
    norm, activation = sides[0]
    is_same = all(_have_same_statistics(norm, other) and activation == function for other, function in sides[1:])
    return sides[0] if is_same else _NOTHING


def _have_same_statistics(one: BatchNorm | None, other: BatchNorm | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.beta, other.beta) and np.array_equal(np.abs(one.gamma), np.abs(other.gamma))


def with_current_statistics(infos: Mapping[str, ConvBnInfoType], network: Network) -> dict[str, ConvBnInfoType]:
    """The batch normalizations around layers, by name: those that the network has folded with their statistics there."""
    facts = network.facts()
    present = {name for name, role in facts.roles.items() if isinstance(role, BatchNorm)}
    folded = {norm.name for norm in facts.statistics.values()} - present
    found = batch_norms_around_layers(network)
    return {
        name: info if info.input_bn is None or info.input_bn.name not in folded else found.get(name, ConvBnInfoType())
        for name, info in infos.items()
    }


_NOTHING = (None, ActivationType.no_activation)


class Neighbours:
    """The makers and readers of the tensors of a network."""

    def __init__(self, network: Network) -> None:
        self.facts = network.facts()
        self._outputs = set(network.outputs)
        self._maker = {tensor: operation for operation in network.operations for tensor in operation.outputs[:1]}
        self._readers: dict[str, list[Operation]] = {}
        for operation in network.operations:
            for tensor in operation.inputs:
                self._readers.setdefault(tensor, []).append(operation)

    def around(self, layer: Layer) -> ConvBnInfoType:
        """The batch normalizations and activations around a layer."""
        input_bn, in_activation = self._before(layer)
        output_bn, out_activation = self._after(layer)
        return ConvBnInfoType(input_bn, output_bn, in_activation, out_activation)

    def readers(self, tensor: str) -> list[Operation | None]:
        """The operations that read a tensor, and None for the caller of the model."""
        return [*([None] if tensor in self._outputs else []), *self._readers.get(tensor, ())]

    def input_channels(self, layer: Layer) -> Channels:
        """Where the channels of a layer's input are."""
        return Channels(layer.channel_axis, layer.rank or self.facts.rank(layer.input))

    def output_channels(self, layer: Layer) -> Channels:
        """Where the channels of a layer's output are."""
        return Channels(layer.output_axis, layer.rank or self.facts.rank(layer.output))

    def _before(self, layer: Layer) -> tuple[BatchNorm | None, ActivationType]:
        """From the layer back through activations, and averages of their outputs, not of their inputs."""
        tensor, activation, channels = layer.input, ActivationType.no_activation, self.input_channels(layer)
        while (maker := self._maker.get(tensor)) is not None and self._statistics_of(tensor) is None:
            found = self.facts.activation(maker.name)
            preserving = self.facts.preserving(maker.name, SpatialEffect.NONE, SpatialEffect.AVERAGE)
            if found is not None:
                if not _fits(found, channels):
                    return _NOTHING
                activation = found.type.then(activation)
            elif preserving is None or (preserving.effect is SpatialEffect.AVERAGE and activation.acts):
                return _NOTHING
            elif preserving.channel_axis is not None and preserving.output_axis is not None:
                if not channels.is_along(preserving.output_axis):
                    return _NOTHING
                channels = Channels(preserving.channel_axis, self.facts.rank(maker.inputs[0]))
            tensor = maker.inputs[0]
        norm = self._statistics_of(tensor)
        is_known = norm is not None and channels.is_along(norm.channel_axis) and activation != ActivationType.other
        return (norm, activation) if is_known else _NOTHING

    def _statistics_of(self, tensor: str) -> BatchNorm | None:
        """The batch normalization that gives the statistics of a tensor."""
        maker = self._maker.get(tensor)
        made = None if maker is None else self.facts.batch_norm(maker.name)
        return made or self.facts.statistics.get(tensor)

    def _after(self, layer: Layer) -> tuple[BatchNorm | None, ActivationType]:
        channels = self.output_channels(layer)
        norm, tensor = self.facts.statistics.get(layer.output), layer.output
        if norm is None:
            readers = [each for each in self._value_readers(layer.output) if each is not None]
            found = [each for each in readers if self.facts.batch_norm(each.name) is not None]
            if len(found) != 1:
                return _NOTHING
            norm, tensor = self.facts.batch_norm(found[0].name), found[0].outputs[0]
        if norm is None or not channels.is_along(norm.channel_axis):
            return _NOTHING
        return norm, self._activation_after(tensor)

    def _activation_after(self, tensor: str) -> ActivationType:
        """The activation that all readers of a tensor apply to it."""
        readers = list(self._value_readers(tensor))
        activations = {ActivationType.no_activation if each is None else self._type_of(each) for each in readers}
        if len(activations) != 1:
            return ActivationType.other if activations else ActivationType.no_activation
        found = activations.pop()
        if len(readers) != 1 or readers[0] is None or not found.acts:
            return found
        return found.then(self._activation_after(readers[0].outputs[0]))

    def _type_of(self, operation: Operation) -> ActivationType:
        role = self.facts.roles.get(operation.name)
        if isinstance(role, Leaky):
            return ActivationType.other
        return role.type if isinstance(role, Activation) else ActivationType.no_activation

    def _value_readers(self, tensor: str) -> Iterator[Operation | None]:
        """The operations that read the values of a tensor, None for the caller of the model."""
        for operation in self.readers(tensor):
            if operation is not None and self.facts.preserving(operation.name, SpatialEffect.NONE):
                yield from self._value_readers(operation.outputs[0])
            else:
                yield operation


def _fits(activation: Activation, channels: Channels) -> bool:
    """Whether bounds per channel are those of these channels."""
    per_channel = any(isinstance(bound, tuple) for bound in activation.type.bounds or ())
    return not per_channel or channels.is_along(activation.channel_axis)
