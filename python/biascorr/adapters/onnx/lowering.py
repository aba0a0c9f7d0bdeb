"""Operators with quantized weights inside, written as their arithmetic: quantizers around a layer of real numbers.

    QLinearConv                  DequantizeLinear, Conv, QuantizeLinear
    QLinearMatMul                DequantizeLinear, MatMul, QuantizeLinear
    QGemm                        DequantizeLinear, Gemm, QuantizeLinear unless its output is real
    QLinearAdd of a constant     DequantizeLinear, Add, QuantizeLinear, where it holds the bias of a QLinearMatMul

A QLinearMatMul that has no bias yet, but can get one, is requantized: between DequantizeLinear and the second QuantizeLinear is
where it is going to be added, so that what is measured is rounded as often as what is saved.

The tensors between operators keep their names, and a layer has the name of the operator that it is written for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx.bias import gets_quantized_bias
from biascorr.adapters.onnx.graph import Graph, attributes, named_nodes
from biascorr.adapters.onnx.operators import operator_of
from biascorr.adapters.onnx.quantizers import bias_steps
from biascorr.adapters.onnx.tensors import Values

_AXIS_OF_DEQUANTIZER = 13
"""The opset that gave DequantizeLinear a step per channel."""

_Operand = tuple[list[onnx.NodeProto], str]
"""The nodes that make a real tensor, and its name."""

PACKED_BITS = (2, 4, 8)
"""Bits of MatMulNBits that divide a byte."""


def lowered(model: onnx.ModelProto, values: Values) -> Graph | None:
    """A copy of a model without operators that can be written in others; None where it has none."""
    if not any(operator_of(node) in _LOWERINGS for node in model.graph.node):
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy, Values(values))
    lowering = _Lowering(graph)
    nodes = {name: lowering.nodes_for(name, node) for name, node in named_nodes(graph.nodes).items()}
    if all(written is None for written in nodes.values()):
        return None
    copy.graph.ClearField("node")
    for node, written in zip(model.graph.node, nodes.values()):
        copy.graph.node.extend([node] if written is None else written)
    return Graph(copy, graph.values)


class _Lowering:
    """Writes the nodes of one graph, whose initializers it adds to."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def nodes_for(self, name: str, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """The nodes that a node is written as; None where it stays as it is."""
        lowering = _LOWERINGS.get(operator_of(node))
        return None if lowering is None else lowering(self, name, node)

    def _conv(self, name: str, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        x, w, y, bias = node.input[:3], node.input[3:6], node.input[6:8], _input(node, 8)
        given = attributes(node)
        if given.pop("channels_last", 0) or not self._are_constant(*x[1:], *w, *y, bias):
            return None
        channels = self._graph.value(w[0]).shape[0]
        operands = [self._real(x), self._real(w, 0), self._real_bias(node, bias, channels)]
        return self._layer(name, "Conv", given, operands, node, y)

    def _matmul(self, name: str, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        a, b, y = node.input[:3], node.input[3:6], node.input[6:8]
        constant = [self._graph.is_constant(each[0]) for each in (a, b)]
        if not self._are_constant(*a[1:], *b[1:], *y) or not any(constant):
            return None
        steps = [(self._graph.value(each[1]), known) for each, known in zip((a, b), constant)]
        if self._graph.value(y[0]).size > 1 or any(step.ndim > 1 or (step.size > 1 and not known) for step, known in steps):
            return None
        operands = [
            self._real(each, self._graph.value(each[0]).ndim - axis if known else None)
            for each, known, axis in zip((a, b), constant, (2, 1))
        ]
        *nodes, layer, quantize = self._layer(name, "MatMul", {}, operands, node, y)
        requantized = self._requantized(layer, quantize.input[1:]) if gets_quantized_bias(self._graph, node) else []
        return [*nodes, layer, *requantized, quantize]

    def _requantized(self, layer: onnx.NodeProto, parameters: Sequence[str]) -> list[onnx.NodeProto]:
        """Quantizes and dequantizes the output of a layer, which keeps its name after that."""
        output = layer.output[0]
        layer.output[0], codes = self._fresh(layer, "before_bias"), self._fresh(layer, "codes_before_bias")
        return [
            helper.make_node("QuantizeLinear", [layer.output[0], *parameters], [codes]),
            helper.make_node("DequantizeLinear", [codes, *parameters], [output]),
        ]

    def _gemm(self, name: str, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        a, b, c, y = node.input[:3], node.input[3:6], _input(node, 6), node.input[7:9]
        without_zero_point = any(y) and not _input(node, 8)
        if without_zero_point or not self._are_constant(*a[1:], *b, c, *y):
            return None
        given = attributes(node)
        axis = 0 if given.get("transB", 0) else 1
        channels = self._graph.value(b[0]).shape[axis]
        operands = [self._real(a), self._real(b, axis), self._real_bias(node, c, channels)]
        return self._layer(name, "Gemm", given, operands, node, y)

    def _add(self, name: str, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        sides = node.input[:3], node.input[3:6]
        made_by = [self._graph.producer.get(each[0]) for each in sides]
        follows = any(each is not None and operator_of(each) == "QLinearMatMul" for each in made_by)
        if not follows or not any(self._graph.is_constant(each[0]) for each in sides):
            return None
        y = [node.input[6], _input(node, 7) or self._zero_of(sides)]
        if not self._are_constant(*sides[0][1:], *sides[1][1:], *y):
            return None
        return self._layer(name, "Add", {}, [self._real(each) for each in sides], node, y)

    def _layer(
        self,
        name: str,
        op: str,
        given: Mapping[str, Any],
        operands: Sequence[_Operand],
        node: onnx.NodeProto,
        quantizer: Sequence[str],
    ) -> list[onnx.NodeProto]:
        """An operator on real operands, and what quantizes its output."""
        dequantizers = [each for nodes, _ in operands for each in nodes]
        inputs = [each for _, each in operands]
        if not any(quantizer):
            return [*dequantizers, helper.make_node(op, inputs, list(node.output), name, **given)]
        output = self._fresh(node, "real")
        layer = helper.make_node(op, inputs, [output], name, **given)
        quantize = helper.make_node("QuantizeLinear", [output, *self._parameters(quantizer)], list(node.output))
        return [*dequantizers, layer, quantize]

    def _real(self, quantized: Sequence[str], axis: int | None = None) -> _Operand:
        """The dequantizer of a tensor given with its step and zero point; the axis that several steps belong to."""
        tensor, *parameters = quantized
        step = self._graph.value(parameters[0])
        if step.size > 1 and self._graph.opset < _AXIS_OF_DEQUANTIZER:
            return [], self._real_constant(tensor, parameters, axis)
        output = self._graph.fresh_name(f"{tensor}_real")
        node = helper.make_node("DequantizeLinear", [tensor, *self._parameters(parameters)], [output])
        if step.size > 1:
            node.attribute.append(helper.make_attribute("axis", axis))
        return [node], output

    def _real_constant(self, tensor: str, parameters: Sequence[str], axis: int | None) -> str:
        values = self._graph.value(tensor)
        shape = [-1 if k == axis else 1 for k in range(values.ndim)]
        step, zero_point = (self._graph.value(each).astype(np.float32).reshape(shape) for each in parameters)
        return self._graph.add_initializer(f"{tensor}_real", (values.astype(np.float32) - zero_point) * step)

    def _real_bias(self, node: onnx.NodeProto, bias: str, channels: int) -> _Operand:
        """The bias of an operator, of zeros where it has none."""
        real = self._graph.value(bias) * bias_steps(self._graph, node) if bias else np.zeros(channels)
        return [], self._graph.add_initializer(f"{node.output[0]}_real_bias", real.astype(np.float32))

    def _parameters(self, given: Sequence[str]) -> list[str]:
        """Step and zero point in one shape."""
        step, *zero_points = (each for each in given if each)
        shape = self._graph.value(step).shape
        for k, zero_point in enumerate(zero_points):
            value = self._graph.value(zero_point)
            if value.shape != shape:
                same = np.full(shape, value.item()) if value.size == 1 else value.reshape(shape)
                zero_points[k] = self._graph.add_initializer(f"{zero_point}_of_{step}", same.astype(value.dtype))
        return [step, *zero_points]

    def _zero_of(self, sides: Sequence[Sequence[str]]) -> str:
        """A zero of the type of a constant among these."""
        constant = next(each[0] for each in sides if self._graph.is_constant(each[0]))
        return self._graph.add_initializer(f"{constant}_zero", np.zeros((), self._graph.value(constant).dtype))

    def _are_constant(self, *names: str) -> bool:
        return all(not name or self._graph.is_constant(name) for name in names)

    def _fresh(self, node: onnx.NodeProto, what: str) -> str:
        return self._graph.fresh_name(f"{node.output[0]}_{what}")


_LOWERINGS = {
    "QLinearConv": _Lowering._conv,
    "QLinearMatMul": _Lowering._matmul,
    "QGemm": _Lowering._gemm,
    "QLinearAdd": _Lowering._add,
}


def weights_of_n_bits(
    given: Mapping[str, Any], packed: NDArray[Any], scales: NDArray[Any], zero_points: NDArray[Any] | None
) -> NDArray[Any]:
    """The weights of a MatMulNBits node in real units, (K, N), from its attributes and inputs.

    Each row of the packed ones is an output channel: blocks along K, padded to whole ones, the first value in the lowest bits.
    """
    rows, bits, block = given["N"], given["bits"], given["block_size"]
    codes = _unpacked(packed.reshape(rows, -1), bits).reshape(rows, -1, block)
    blocks = codes.shape[1]
    if zero_points is None:
        middles = np.full((1, 1, 1), 2 ** (bits - 1), np.float32)
    elif zero_points.dtype == np.uint8:
        middles = _unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks, None].astype(np.float32)
    else:
        middles = zero_points.reshape(rows, blocks, 1).astype(np.float32)
    real = codes.astype(np.float32)
    real -= middles
    real *= scales.reshape(rows, blocks, 1).astype(np.float32)
    return real.reshape(rows, -1)[:, : given["K"]].T.astype(scales.dtype, copy=False)


def steps_of_n_bits(given: Mapping[str, Any], scales: NDArray[Any]) -> NDArray[Any]:
    """The largest distance between neighbouring weights of each output channel of a MatMulNBits node, (1, N)."""
    return np.asarray(np.abs(scales).reshape(given["N"], -1).max(axis=1)[None])


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[Any]:
    """Values of some bits along the last axis of bytes."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray((packed[..., None] >> shifts & (2**bits - 1)).reshape(*packed.shape[:-1], -1))


def _input(node: onnx.NodeProto, index: int) -> str:
    """The name of an optional input, empty where it is missing."""
    return str(node.input[index]) if index < len(node.input) else ""
