"""Quantizers in a graph: DequantizeLinear nodes, r = (q - zero_point) * step, and what moves a tensor to a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx.graph import Graph, attributes
from biascorr.adapters.onnx.operators import operator_of
from biascorr.quantization import Quantization


@dataclass(frozen=True, eq=False)
class Dequantizer:
    """A DequantizeLinear node with constant parameters.

    Parameters
    ----------
    node : onnx.NodeProto
        The node.
    step : ndarray, (), (C,), or of the rank of the values
        Real units between neighbouring values (ONNX calls it scale): one, one per channel, or one per block; 0 where quantizers
        found nothing but zeros.
    zero_point : ndarray
        The quantized value of 0.
    axis : int
        The axis that several steps belong to, or that is divided into blocks.
    block_size : int
        Values of a block along the axis; 0 where there are no blocks.
    """

    node: onnx.NodeProto
    step: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int
    block_size: int = 0

    @property
    def quantized(self) -> str:
        """The tensor of quantized values."""
        return str(self.node.input[0])

    def steps_of(self, shape: Sequence[int]) -> NDArray[Any]:
        """The steps, broadcastable to values of this shape: in float64, in their own type where there is one for each value."""
        if self.block_size:
            blocks = np.arange(shape[self.axis]) // self.block_size
            return np.asarray(self.step.take(blocks, self.axis))
        aligned = [1] * len(shape)
        if self.step.size > 1:
            aligned[self.axis] = -1
        return self.step.astype(np.float64).reshape(aligned)


def dequantizer_of(graph: Graph, name: str) -> Dequantizer | None:
    """The dequantizer that makes a tensor; None where there is none, or one with a step that is below 0 or not finite."""
    node = graph.producer.get(name)
    if node is None or operator_of(node) != "DequantizeLinear":
        return None
    parameters = [parameter for parameter in node.input[1:] if parameter]
    if not all(map(graph.is_constant, parameters)):
        return None
    step, *rest = (graph.value(parameter) for parameter in parameters)
    given = attributes(node)
    block_size = given.get("block_size", 0)
    if (step.size > 1 and step.ndim != 1 and not block_size) or not (np.isfinite(step) & (step >= 0)).all():
        return None
    zero_point = rest[0] if rest else np.zeros((), dtype=np.int32)
    axis = given.get("axis", 1) if step.size > 1 or block_size else 0
    return Dequantizer(node, step, zero_point, axis, block_size)


def bias_steps(graph: Graph, node: onnx.NodeProto) -> NDArray[np.float64]:
    """The step of the int32 bias of a QLinearConv or QGemm, () or (channels,): that of its products."""
    steps = [graph.value(node.input[index]).astype(np.float64) for index in (1, 4)]
    product = np.asarray(steps[0].reshape(()) * steps[1] * attributes(node).get("alpha", 1.0))
    return product.reshape(()) if product.size == 1 else product


def insert_fake_quantizer(
    graph: Graph, tensor: str, dtype: np.dtype[Any], quantization: Quantization, before: onnx.NodeProto
) -> str:
    """The tensor moved to a grid, round(clip(x * scale)) / scale, by nodes before one that reads it.

    They take any number of bits in any opset, where QuantizeLinear and Round have fewer. The clip has the bounds of
    q - zero_point. Adding 1.5 * 2^23 leaves float32 no room for a fraction, so that it rounds to integers, half to even.
    """
    wide = dtype == np.float64
    integers_only = 1.5 * 2.0 ** (52 if wide else 23)
    least = -(2 ** (quantization.bits - 1)) - quantization.zero_point
    greatest = least + 2**quantization.bits - 1
    scale = quantization.scale
    steps = [("Mul", scale), ("Max", least), ("Min", greatest), ("Add", integers_only), ("Sub", integers_only), ("Div", scale)]
    narrow = dtype not in (np.float32, np.float64)  # whose arithmetic has no room for the numbers of large grids
    tensor = _insert_cast(graph, tensor, np.dtype(np.float32), before) if narrow else tensor
    for op, value in steps:
        constant = graph.add_initializer(f"{tensor}_{op}_by", np.asarray(value, np.float64 if wide else np.float32))
        tensor = _insert(graph, helper.make_node(op, [tensor, constant], [f"{tensor}_{op}"]), before)
    return _insert_cast(graph, tensor, dtype, before) if narrow else tensor


def _insert_cast(graph: Graph, tensor: str, dtype: np.dtype[Any], before: onnx.NodeProto) -> str:
    to = helper.np_dtype_to_tensor_dtype(dtype)
    return _insert(graph, helper.make_node("Cast", [tensor], [f"{tensor}_Cast"], to=to), before)


def _insert(graph: Graph, node: onnx.NodeProto, before: onnx.NodeProto) -> str:
    """The output of the node, under a fresh name."""
    node.output[0] = graph.fresh_name(node.output[0])
    node.name = graph.fresh_name(f"{node.output[0]}_node")
    graph.insert(node, before, after=False)
    return str(node.output[0])
