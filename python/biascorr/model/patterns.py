"""Which batch normalizations and activations are around the layers of a network.

BatchNorm -> [activation] -> layer          tells the mean of what the layer reads
layer -> BatchNorm -> [activation]          tells the mean of what it makes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from biascorr.model.loading import network_from_model
from biascorr.model.network import ActivationType, BatchNorm, Layer, Network, Operation


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
    `input_bn` is found through ReLU, Clip with constant bounds, Identity, Dropout, an average over all positions and a reshape
    of such averages, whatever else reads the tensors in between. Anything else in between ends the search: the mean of what
    the layer reads would not follow from the batch normalization.

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
    neighbours = _Neighbours(network)
    found = {layer.name: neighbours.around(layer) for layer in network.layers}
    return {name: info for name, info in found.items() if info.input_bn is not None or info.output_bn is not None}


class _Neighbours:
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

    def _before(self, layer: Layer) -> tuple[BatchNorm | None, ActivationType]:
        """From the layer back through at most one activation, and averages of what it gives out, not of what it reads."""
        kinds, nothing = self._kinds, (None, ActivationType.no_activation)
        maker = self._maker.get(layer.input) if self._is_along_axis_1(layer, layer.channel_axis, layer.input) else None
        activation = None
        while maker is not None and maker.name not in kinds.batch_norms:
            if activation is None and maker.name in kinds.activations:
                activation = kinds.activations[maker.name]
            elif maker.name not in kinds.identities and (activation is not None or maker.name not in kinds.averages):
                return nothing
            maker = self._maker.get(maker.inputs[0])
        if maker is None or activation == ActivationType.other:
            return nothing
        return kinds.batch_norms[maker.name], activation or ActivationType.no_activation

    def _behind(self, layer: Layer) -> tuple[BatchNorm | None, ActivationType]:
        kinds, nothing = self._kinds, (None, ActivationType.no_activation)
        if not self._is_along_axis_1(layer, layer.output_axis, layer.output):
            return nothing
        norms = [reader for reader in self._readers_of(layer.output) if reader is not None and reader.name in kinds.batch_norms]
        if len(norms) != 1:
            return nothing
        readers = (None if each is None else kinds.activations.get(each.name) for each in self._readers_of(norms[0].outputs[0]))
        activations = {each or ActivationType.no_activation for each in readers}
        activation = activations.pop() if len(activations) == 1 else ActivationType.other
        return kinds.batch_norms[norms[0].name], activation

    def _readers_of(self, tensor: str) -> Iterator[Operation | None]:
        """What reads the values of a tensor, None for the caller of the model."""
        if tensor in self._outputs:
            yield None
        for operation in self._readers.get(tensor, ()):
            if operation.name in self._kinds.identities:
                yield from self._readers_of(operation.outputs[0])
            else:
                yield operation

    def _is_along_axis_1(self, layer: Layer, axis: int, tensor: str) -> bool:
        """Whether this axis, counted from either end, has the channels of a batch normalization; no where that is not known."""
        rank = len(self._kinds.shapes.get(tensor, ())) if layer.window is None else len(layer.window.taps) + 2
        return 1 in (axis, axis + rank)
