"""The tensor after the activation of a layer: what those that read the layer see of its output."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from biascorr.graph.layer import Layer
from biascorr.graph.network import Network
from biascorr.graph.operations import Kind

_CODES = (Kind.QUANTIZE, Kind.DEQUANTIZE)


def activated_pairs(
    reference: Network, quantized: Network, pairs: Mapping[str, tuple[Layer, Layer]]
) -> dict[str, tuple[str, str]]:
    """By layer name, the tensors after the activations of a float layer and of the quantized one that it became.

    A layer without an activation has none, nor has one whose output is read without it too. An activation that the quantizer
    took over (the Relu before a QuantizeLinear that saturates at 0) is after that.
    """
    before, after = _Successors(reference), _Successors(quantized)
    found = {}
    for name, (float_layer, layer) in pairs.items():
        expected = before.activated(float_layer, nonlinear=True)
        computed = after.activated(layer, nonlinear=True) or after.activated(layer, nonlinear=False)
        if expected is not None and computed is not None:
            found[name] = (expected, computed)
    return found


class _Successors:
    """The operations that follow each tensor."""

    def __init__(self, network: Network) -> None:
        self._operations = list(network.operations)
        self._outputs = set(network.outputs)
        self._readers: dict[str, list[int]] = {}
        for index, operation in enumerate(self._operations):
            for tensor in operation.inputs:
                self._readers.setdefault(tensor, []).append(index)

    def activated(self, layer: Layer, *, nonlinear: bool) -> str | None:
        """The first tensor that follows from the output of a layer element by element and that something else reads."""
        bends = {layer.output: False}  # tensor -> whether it is more than the output, quantized or not
        codes: set[str] = set()
        read: set[str] = set()
        following = list(self._readers.get(layer.output, ()))
        heapq.heapify(following)
        last = -1
        while following:
            index = heapq.heappop(following)
            if index == last:
                continue
            last, operation = index, self._operations[index]
            if operation.kind in (Kind.OTHER, Kind.SHAPE) or not all(name in bends for name in operation.inputs):
                read.update(operation.inputs)
                continue
            bent = operation.kind not in _CODES or any(bends[name] for name in operation.inputs)
            bends.update(dict.fromkeys(operation.outputs, bent))
            codes.update(operation.outputs if operation.kind is Kind.QUANTIZE else ())
            for output in operation.outputs:
                for reader in self._readers.get(output, ()):
                    heapq.heappush(following, reader)
        exits = [name for name in bends if name in read or name in self._outputs]
        is_seen_without = layer.output in exits or any(name in codes for name in exits)
        if is_seen_without or (nonlinear and not all(bends[name] for name in exits)):
            return None
        return exits[0] if exits else None
