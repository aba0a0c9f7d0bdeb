"""Quantizers in a graph: DequantizeLinear nodes, r = (q - zero_point) * step, and what moves a tensor to a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx.graph import Graph, attributes
from biascorr.adapters.onnx.operators import operator_of
from biascorr.quantization import Quantization

_INTEGERS = ("int8", "uint8", "int16", "uint16")
"""Types of quantized values whose sums are exact, and that onnxruntime hands over."""


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

    @property
    def is_even(self) -> bool:
        """Whether all values are of one grid with the same distance between neighbours, in integers that numpy has."""
        return self.step.size == 1 and bool(self.step.all()) and self.zero_point.dtype.name in _INTEGERS

    def is_coarser(self, graph: Graph) -> bool:
        """Whether constant values may be rounded to less than the steps say: to floats, or before by other quantizers."""
        return _is_float(graph.constant(self.quantized).dtype) or self._earlier(graph) is not None

    def _earlier(self, graph: Graph) -> Dequantizer | None:
        """The dequantizer of the values that were quantized again."""
        quantizer = graph.producer.get(self.quantized)
        is_again = quantizer is not None and operator_of(quantizer) == "QuantizeLinear"
        return dequantizer_of(graph, quantizer.input[0]) if quantizer is not None and is_again else None

    def spacings(self, graph: Graph, shape: Sequence[int]) -> NDArray[Any]:
        """The distance between each constant value and its neighbours, of all quantizers together that it went through."""
        codes, earlier = graph.value(self.quantized), self._earlier(graph)
        spacings = np.broadcast_to(self.steps_of(shape), tuple(shape))
        if _is_float(codes.dtype):
            spacings = spacings * _spacings_of_floats(codes)
        return spacings if earlier is None else spacings + earlier.spacings(graph, shape)

    def steps_of(self, shape: Sequence[int]) -> NDArray[Any]:
        """The steps, broadcastable to values of this shape: in float64, in their own type where there is one for each value."""
        if not self._fits(shape):
            raise ValueError(
                f"{self.node.output[0]}: scales of shape {self.step.shape} along axis {self.axis} of {tuple(shape)}"
            )
        if self.block_size:
            blocks = np.arange(shape[self.axis]) // self.block_size
            return np.asarray(self.step.take(blocks, self.axis))
        aligned = [1] * len(shape)
        if self.step.size > 1:
            aligned[self.axis] = -1
        return self.step.astype(np.float64).reshape(aligned)

    def _fits(self, shape: Sequence[int]) -> bool:
        """Whether values of this shape have a step each."""
        if self.step.size == 1 and not self.block_size:
            return True
        if not -len(shape) <= self.axis < len(shape):
            return False
        length = shape[self.axis]
        if self.block_size:
            return self.step.ndim == len(shape) and self.step.shape[self.axis] == -(-length // self.block_size)
        return self.step.size == length


def dequantizer_of(graph: Graph, name: str) -> Dequantizer | None:
    """The dequantizer that makes a tensor; None where there is none, or one with a step that is below 0 or not finite."""
    node = graph.producer.get(name)
    if node is None or operator_of(node) != "DequantizeLinear":
        return None
    parameters = [parameter for parameter in node.input[1:] if parameter]
    if not all(map(graph.is_constant, parameters)):
        return None
    step, *rest = (graph.value(parameter) for parameter in parameters)
    step = step if step.dtype.isbuiltin == 1 else step.astype(np.float32)  # of a type that numpy has not
    given = attributes(node)
    block_size = given.get("block_size", 0)
    if (step.size > 1 and step.ndim != 1 and not block_size) or not (np.isfinite(step) & (step >= 0)).all():
        return None
    zero_point = rest[0] if rest else np.zeros((), dtype=_type_of_codes(graph, node.input[0]))
    axis = given.get("axis", 1) if step.size > 1 or block_size else 0
    return Dequantizer(node, step, zero_point, axis, block_size)


def range_of(graph: Graph, node: onnx.NodeProto) -> tuple[float, float] | None:
    """The least and the greatest value that a node moves to one grid of integers; None where it is no such quantizer."""
    if operator_of(node) != "QuantizeLinear" or not all(map(graph.is_constant, filter(None, node.input[1:]))):
        return None
    step = graph.value(node.input[1])
    zero_point = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
    if step.size != 1 or zero_point.dtype.name not in _INTEGERS:
        return None
    limits = np.iinfo(zero_point.dtype)
    low, high = (float((end - int(zero_point.item())) * step.item()) for end in (limits.min, limits.max))
    return low, high


def _type_of_codes(graph: Graph, name: str) -> np.dtype[Any]:
    """The type of values that have no zero point: what quantizes them knows it, or they are taken for int32."""
    if graph.is_constant(name):
        return graph.constant(name).dtype
    quantizer = graph.producer.get(name)
    if quantizer is None or operator_of(quantizer) != "QuantizeLinear":
        return np.dtype(np.int32)
    to = attributes(quantizer).get("output_dtype", 0)
    if len(quantizer.input) > 2 and quantizer.input[2]:
        return graph.constant(quantizer.input[2]).dtype if graph.is_constant(quantizer.input[2]) else np.dtype(np.int32)
    return np.dtype(helper.tensor_dtype_to_np_dtype(to)) if to else np.dtype(np.uint8)


def _spacings_of_floats(codes: NDArray[Any]) -> NDArray[Any]:
    """The distance between each value of a float type of few bits and its neighbours."""
    info: Any = ml_dtypes.finfo(codes.dtype)  # type: ignore[no-untyped-call]
    exponents = np.frexp(np.abs(codes.astype(np.float32)))[1] - 1 - info.nmant
    return np.asarray(np.maximum(np.ldexp(np.float32(1), exponents), np.float32(info.smallest_subnormal)))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name.startswith("float")  # what numpy has not is of no kind of its own


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
