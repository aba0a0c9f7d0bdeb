"""Which batch normalizations and activations are around the layers of a network.

BatchNorm -> [activation] -> layer          tells the mean of what the layer reads
layer -> BatchNorm -> [activation]          tells the mean of what it makes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.adapters.loading import network_from_model
from biascorr.graph.network import ActivationType, BatchNorm, Bound, Layer, Network, Operation


@dataclass(frozen=True, eq=False)
class ConvBnInfoType:
    """The batch normalizations around a layer.

    Parameters
    ----------
    input_bn, output_bn : BatchNorm or None
        The one that makes what the layer reads, and the one that reads what the layer makes.
    in_activation_type : ActivationType
        What is between `input_bn` and the layer.
    out_activation_type : ActivationType
        What reads `output_bn`: `ActivationType.other` also where its readers differ in this.
    """

    input_bn: BatchNorm | None = None
    output_bn: BatchNorm | None = None
    in_activation_type: ActivationType = ActivationType.no_activation
    out_activation_type: ActivationType = ActivationType.no_activation


def find_all_convs_bn_with_activation(model: Any) -> dict[str, ConvBnInfoType]:
    """The batch normalizations around the convolutions and matrix products of a float model.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        The model, which is not changed.

    Returns
    -------
    dict from str to ConvBnInfoType
        By the name of the layer, in topological order; layers without any batch normalization around them are left out.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError, ValueError
        As :func:`biascorr.correct`, of its model.

    Notes
    -----
    Batch normalizations that :func:`biascorr.fold_all_batch_norms` or :func:`biascorr.equalize_model` have made part of layers
    are found too, with the statistics that their outputs have now: scaled, and without what was absorbed.

    `input_bn` is found through ReLU, Clip with constant bounds, Min and Max with constants, Identity, Dropout, an average over
    all positions and a reshape of such averages, whatever else reads the tensors in between. Anything else in between ends the
    search: the mean of what the layer reads would not follow from the batch normalization.

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     network (float[N,1,8] x) => (float[N,1,8] y)
    ...     <float[1] beta = {0.5}, float[1] gamma = {2.0}, float[1] mean = {0.0}, float[1] var = {1.0}, float[1,1,1] w = {3.0}>
    ...     { n = BatchNormalization(x, gamma, beta, mean, var)  r = Relu(n)  [layer] y = Conv(r, w) }''')
    >>> info = find_all_convs_bn_with_activation(model)["layer"]
    >>> info.input_bn.beta, info.in_activation_type.name
    (array([0.5]), 'relu')
    """
    return batch_norms_around_layers(network_from_model(model, "model"))


def batch_norms_around_layers(network: Network) -> dict[str, ConvBnInfoType]:
    """See :func:`find_all_convs_bn_with_activation`."""
    neighbours = Neighbours(network)
    found = {layer.name: neighbours.around(layer) for layer in network.layers}
    return {name: info for name, info in found.items() if info.input_bn is not None or info.output_bn is not None}


def brought_up_to_date(infos: Mapping[str, ConvBnInfoType], network: Network) -> dict[str, ConvBnInfoType]:
    """What is around layers, by name: as it is in the network where that has the batch normalization folded, else as given."""
    surroundings = network.surroundings
    folded = {norm.name for norm in surroundings.folded.values()} - set(surroundings.batch_norms)
    found = batch_norms_around_layers(network)
    return {
        name: info if info.input_bn is None or info.input_bn.name not in folded else found.get(name, ConvBnInfoType())
        for name, info in infos.items()
    }


class Neighbours:
    """Who makes and who reads each tensor of a network."""

    def __init__(self, network: Network) -> None:
        self._kinds = network.surroundings
        self._outputs = set(network.outputs)
        self._maker = {tensor: operation for operation in network.operations for tensor in operation.outputs[:1]}
        self._readers: dict[str, list[Operation]] = {}
        for operation in network.operations:
            for tensor in operation.inputs:
                self._readers.setdefault(tensor, []).append(operation)

    def around(self, layer: Layer) -> ConvBnInfoType:
        input_bn, in_activation = self._before(layer)
        output_bn, out_activation = self._behind(layer)
        return ConvBnInfoType(input_bn, output_bn, in_activation, out_activation)

    def readers(self, tensor: str) -> list[Operation | None]:
        """What reads a tensor, None for the caller of the model."""
        return [*([None] if tensor in self._outputs else []), *self._readers.get(tensor, ())]

    def is_along_axis_1(self, layer: Layer, axis: int, tensor: str) -> bool:
        """Whether this axis, counted from either end, has the channels of a batch normalization; no where that is not known."""
        rank = len(self._kinds.shapes.get(tensor, ())) if layer.window is None else len(layer.window.taps) + 2
        return 1 in (axis, axis + rank)

    def _before(self, layer: Layer) -> tuple[BatchNorm | None, ActivationType]:
        """From the layer back through activations, and averages of what they give out, not of what they read."""
        kinds, nothing = self._kinds, (None, ActivationType.no_activation)
        if not self.is_along_axis_1(layer, layer.channel_axis, layer.input):
            return nothing
        tensor, activation = layer.input, ActivationType.no_activation
        while (maker := self._maker.get(tensor)) is not None and self._norm_of(tensor) is None:
            if maker.name in kinds.activations:
                activation = _composed(kinds.activations[maker.name], activation)
            elif maker.name not in kinds.identities and (acts(activation) or maker.name not in kinds.averages):
                return nothing
            tensor = maker.inputs[0]
        norm = self._norm_of(tensor)
        return nothing if norm is None or activation == ActivationType.other else (norm, activation)

    def _norm_of(self, tensor: str) -> BatchNorm | None:
        """The batch normalization that tells what a tensor is like."""
        maker = self._maker.get(tensor)
        made = None if maker is None else self._kinds.batch_norms.get(maker.name)
        return made or self._kinds.folded.get(tensor)

    def _behind(self, layer: Layer) -> tuple[BatchNorm | None, ActivationType]:
        nothing = (None, ActivationType.no_activation)
        if not self.is_along_axis_1(layer, layer.output_axis, layer.output):
            return nothing
        if layer.output in self._kinds.folded:
            return self._kinds.folded[layer.output], self._activation_behind(layer.output)
        readers = [each for each in self._readers_of(layer.output) if each is not None]
        norms = [reader for reader in readers if reader.name in self._kinds.batch_norms]
        if len(norms) != 1:
            return nothing
        return self._kinds.batch_norms[norms[0].name], self._activation_behind(norms[0].outputs[0])

    def _activation_behind(self, tensor: str) -> ActivationType:
        """What is applied to a tensor by all that read it."""
        readers = list(self._readers_of(tensor))
        activations = {ActivationType.no_activation if each is None else self._activation(each) for each in readers}
        if len(activations) != 1:
            return ActivationType.other if activations else ActivationType.no_activation
        found = activations.pop()
        if len(readers) != 1 or readers[0] is None or not acts(found):
            return found
        return _composed(self._activation_behind(readers[0].outputs[0]), found)

    def _activation(self, operation: Operation) -> ActivationType:
        return self._kinds.activations.get(operation.name, ActivationType.no_activation)

    def _readers_of(self, tensor: str) -> Iterator[Operation | None]:
        """What reads the values of a tensor, None for the caller of the model."""
        for operation in self.readers(tensor):
            if operation is not None and operation.name in self._kinds.identities:
                yield from self._readers_of(operation.outputs[0])
            else:
                yield operation


def acts(activation: ActivationType) -> bool:
    """Whether an activation does anything."""
    return activation != ActivationType.no_activation


def _composed(first: ActivationType, then: ActivationType) -> ActivationType:
    """What two activations do, one behind the other."""
    if not acts(first) or not acts(then):
        return first if acts(first) else then
    if first.bounds is None or then.bounds is None:
        return ActivationType.other
    low, high = (np.clip(bound, *then.bounds) for bound in first.bounds)
    return ActivationType.clip(_bound(low), _bound(high))


def _bound(values: NDArray[np.float64]) -> Bound:
    """One for all channels, where they have the same."""
    return float(values.flat[0]) if np.all(values == values.flat[0]) else tuple(values.tolist())
