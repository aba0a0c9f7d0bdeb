"""The tensor behind the activation of a layer: what those that read the layer see of its output."""

from __future__ import annotations

from collections.abc import Mapping

from biascorr.graph.network import Kind, Layer, Network

_CODES = (Kind.QUANTIZE, Kind.DEQUANTIZE)


def activated_pairs(
    reference: Network, quantized: Network, pairs: Mapping[str, tuple[Layer, Layer]]
) -> dict[str, tuple[str, str]]:
    """By layer name, the tensors behind the activations of a float layer and of its quantized counterpart.

    A layer without an activation has none, nor has one whose output is read without it too. An activation that the quantizer
    took over (the Relu before a QuantizeLinear that saturates at 0) is behind that.
    """
    found = {}
    for name, (float_layer, layer) in pairs.items():
        expected = _behind(reference, float_layer, nonlinear=True)
        computed = _behind(quantized, layer, nonlinear=True) or _behind(quantized, layer, nonlinear=False)
        if expected is not None and computed is not None:
            found[name] = (expected, computed)
    return found


def _behind(network: Network, layer: Layer, *, nonlinear: bool) -> str | None:
    """The first tensor that follows from the output of a layer element by element and that something else reads."""
    bends = {layer.output: False}  # tensor -> whether it is more than the output, quantized or not
    codes: set[str] = set()
    read = set(network.outputs)
    for operation in network.operations:
        if operation.kind is not Kind.OTHER and operation.inputs and all(name in bends for name in operation.inputs):
            bent = operation.kind not in _CODES or any(bends[name] for name in operation.inputs)
            bends.update(dict.fromkeys(operation.outputs, bent))
            codes.update(operation.outputs if operation.kind is Kind.QUANTIZE else ())
        else:
            read.update(operation.inputs)
    exits = [name for name in bends if name in read]
    if layer.output in exits or any(name in codes for name in exits) or (nonlinear and not all(bends[name] for name in exits)):
        return None
    return exits[0] if exits else None
