"""Where the bias of a layer is kept, and how a shift is added to it.

A bias is an input of the layer, or the constant of an Add that alone reads the layer's output, directly or behind a
QuantizeLinear and DequantizeLinear. Either is float, or integers behind DequantizeLinear, which are rounded again with
their own step. A layer with neither gets a bias: an input of a Conv or Gemm, quantized as ONNX quantizers do it where the
layer is quantized; an Add behind a MatMul.

Operators with quantized weights inside keep theirs as they do: int32 in the steps of their products, 8 bits in a QLinearAdd.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx.graph import Graph, attributes
from biascorr.adapters.onnx.lowering import bias_steps
from biascorr.adapters.onnx.quantizers import Dequantizer, dequantizer_of
from biascorr.graph.network import BiasChange, Layer

_OWN_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "MatMulNBits": 5}
"""Operators with an input for a bias of real numbers, or of integers behind DequantizeLinear."""

_INTEGER_BIAS = {"QLinearConv": 8, "QGemm": 6}
"""Operators with an input for a bias in int32, in the steps of their products."""

_ADDS = {"Add": (0, 1), "QLinearAdd": (0, 3)}
"""Operators that add, and the inputs that they add."""

_RESHAPES = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that keep the values of a tensor and their order."""

_CLAMPED = "left as it is: it has no bias, and its quantized output is clamped at 0"
_ADDED = "it had no bias; one was added"


def add_to_bias(graph: Graph, node: onnx.NodeProto, layer: Layer, shift: NDArray[Any]) -> BiasChange:
    """Adds a shift, (channels,) in real units, to the bias of a layer. See :class:`BiasChange`."""
    if node.op_type in _INTEGER_BIAS:
        return _add_to_products(graph, node, layer, shift)
    factor = attributes(node).get("beta", 1.0)  # of a Gemm: y = alpha A B + beta C
    index = _OWN_BIAS.get(node.op_type)
    if index is not None and index < len(node.input) and node.input[index]:
        change = _add_to_constant(graph, node, index, shift / factor)
        return BiasChange(_per_channel(change.applied, 0) * factor, change.note)
    if node.op_type == "Gemm":
        change = _add_input(graph, node, layer, shift / factor)
        return BiasChange(change.applied * factor, change.note)
    axes_behind = -1 - layer.output_axis
    aligned = shift.reshape(-1, *[1] * axes_behind)
    add = _following_add(graph, node)
    if add is not None:
        change = _add_to_constant(graph, *add, aligned)
        return BiasChange(_per_channel(change.applied, axes_behind), change.note)
    if _is_clamped(graph, node):
        return BiasChange(np.zeros(layer.channels), _CLAMPED)
    if layer.window is None:
        return _insert_add(graph, node, layer, aligned)
    return _add_input(graph, node, layer, shift)


def biased_output(graph: Graph, node: onnx.NodeProto) -> str:
    """The output of a layer of real numbers with its bias in it."""
    reader, _ = reader_of_bias(graph, node) or (node, None)
    return str(reader.output[0])


def reader_of_bias(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """What adds the bias of a layer of real numbers, and as which of its inputs; None where the layer has no bias."""
    if len(node.input) > 2 and node.input[2]:
        return node, 2
    return None if node.op_type == "Gemm" else _following_add(graph, node)


def bias_of(graph: Graph, node: onnx.NodeProto, axes_behind: int) -> NDArray[Any] | None:
    """The bias of a layer of real numbers, its axes aligned with the last ones of the output; None where it has none.

    Parameters
    ----------
    graph : Graph
        What the layer is in.
    node : onnx.NodeProto
        The layer.
    axes_behind : int
        Axes of its output behind that of the channels.
    """
    reader, index = reader_of_bias(graph, node) or (node, None)
    if index is None:
        return None
    bias = graph.value(reader.input[index])
    if node.op_type == "Gemm":
        return np.asarray(bias * attributes(node).get("beta", 1.0))
    return bias.reshape(-1, *[1] * axes_behind) if reader is node else bias


def set_bias(graph: Graph, node: onnx.NodeProto, layer: Layer, bias: NDArray[Any]) -> None:
    """Replaces the bias of a layer of real numbers by another, aligned with the last axes of its output.

    Where it is smaller than what was there, it is repeated; a layer without a bias gets one.
    """
    adds = reader_of_bias(graph, node)
    if adds is None and node.op_type == "MatMul":
        _insert_add(graph, node, layer, bias)
        return
    reader, index = adds or (node, 2)
    if adds is not None and (reader is not node or node.op_type == "Gemm"):
        bias = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, graph.value(reader.input[index]).shape))
    if node.op_type == "Gemm":
        bias = bias / attributes(node).get("beta", 1.0)
    elif reader is node:
        bias = bias.reshape(-1)
    graph.set_constant(reader, index, bias.astype(layer.weights.dtype), f"{node.output[0]}_bias")


def _is_clamped(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether the output is quantized to values of one sign: maybe in place of a Relu, before which biases belong."""
    if node.op_type != "QLinearMatMul":
        return False
    zero_point = graph.value(node.input[7])
    limits = np.iinfo(zero_point.dtype)
    return zero_point.item() in (limits.min, limits.max)


def _per_channel(change: NDArray[Any], axes_behind: int) -> NDArray[Any]:
    """The change of each channel, where a bias has other axes too."""
    channels = np.moveaxis(change, -1 - axes_behind, 0)
    return np.asarray(channels.reshape(len(channels), -1).mean(axis=1))


def _following_add(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """The Add or QLinearAdd of a constant that alone reads the output, and which of its inputs the constant is."""
    name = node.output[0]
    reader = graph.only_reader(name)
    for quantizer in ("QuantizeLinear", "DequantizeLinear"):
        if reader is not None and reader.op_type == quantizer:
            name = reader.output[0]
            reader = graph.only_reader(name)
    if reader is None or reader.op_type not in _ADDS:
        return None
    first, second = _ADDS[reader.op_type]
    index = second if reader.input[first] == name else first
    return (reader, index) if graph.is_constant(reader.input[index]) else None


def _add_to_constant(graph: Graph, node: onnx.NodeProto, index: int, shift: NDArray[Any]) -> BiasChange:
    if node.op_type == "QLinearAdd":
        values, steps = (graph.value(node.input[k]) for k in (index, index + 1))
        corrected, change = _rounded(values, steps.astype(np.float64).reshape(()), shift)
        graph.set_constant(node, index, corrected, f"{node.output[0]}_bias")
        return change
    reader, at = _reader_of_source(graph, node, index, shift)
    dequantizer = dequantizer_of(graph, reader.input[at])
    values = graph.value(node.input[index])
    if dequantizer is not None and _holds_integers(graph, dequantizer.quantized):
        return _add_to_integers(graph, reader, at, dequantizer, shift, values.shape)
    corrected = (values + shift).astype(values.dtype)
    shape = corrected.shape if reader is node else graph.value(reader.input[at]).shape
    graph.set_constant(reader, at, corrected.reshape(shape), f"{node.output[0]}_bias")
    return BiasChange(np.subtract(corrected, values, dtype=np.float64))


def _holds_integers(graph: Graph, name: str) -> bool:
    return graph.is_constant(name) and graph.value(name).dtype.kind in "iu"


def _reader_of_source(graph: Graph, node: onnx.NodeProto, index: int, shift: NDArray[Any]) -> tuple[onnx.NodeProto, int]:
    """What reads a constant of a node before it is reshaped for it, and as which of its inputs.

    The node itself where others read the constant too, or where it must grow to hold a shift.
    """
    shape = graph.value(node.input[index]).shape
    reader, at = node, index
    while np.broadcast_shapes(shape, shift.shape) == shape and graph.only_reader(reader.input[at]) is reader:
        source = graph.producer.get(reader.input[at])
        if source is None or source.op_type not in _RESHAPES:
            break
        reader, at = source, 0
    return reader, at


def _add_to_integers(
    graph: Graph, node: onnx.NodeProto, index: int, dequantizer: Dequantizer, shift: NDArray[Any], shape: tuple[int, ...]
) -> BiasChange:
    """Adds to integers that the node reads dequantized, and that are added in this shape."""
    values = graph.value(dequantizer.quantized)
    steps = dequantizer.steps_of(np.atleast_1d(values).shape)
    if shape != values.shape:
        steps = np.broadcast_to(steps, values.shape).reshape(shape)
    corrected, change = _rounded(values.reshape(shape), steps, shift)
    own = dequantizer.node
    if graph.only_reader(node.input[index]) is not node:
        own = _copy_of(graph, own, node, index)
    kept = corrected if corrected.size != values.size else corrected.reshape(values.shape)
    graph.set_constant(own, 0, kept, f"{node.output[0]}_bias_quantized")
    return change


def _add_to_products(graph: Graph, node: onnx.NodeProto, layer: Layer, shift: NDArray[Any]) -> BiasChange:
    """Adds to the int32 bias of an operator that sums products of integers."""
    index = _INTEGER_BIAS[node.op_type]
    exists = index < len(node.input) and node.input[index]
    values = graph.value(node.input[index]) if exists else np.zeros(layer.channels, np.int32)
    corrected, change = _rounded(values, bias_steps(graph, node), shift)
    graph.set_constant(node, index, corrected, f"{node.output[0]}_bias_quantized")
    note = change.note if exists else "; ".join(filter(None, (_ADDED, change.note)))
    return BiasChange(_per_channel(change.applied, 0), note)


def _rounded(values: NDArray[Any], steps: NDArray[Any], shift: NDArray[Any]) -> tuple[NDArray[Any], BiasChange]:
    """Integers after a shift in real units, within the limits of their type."""
    limits = np.iinfo(values.dtype)
    wanted = values + np.rint(shift / steps)
    corrected = np.clip(wanted, limits.min, limits.max)
    saturated = np.count_nonzero(wanted != corrected)
    note = f"{values.dtype} bias saturates in {saturated} of {corrected.size} channels" if saturated else ""
    return corrected.astype(values.dtype), BiasChange((corrected - values) * steps, note)


def _copy_of(graph: Graph, dequantizer: onnx.NodeProto, node: onnx.NodeProto, index: int) -> onnx.NodeProto:
    """A dequantizer of this node's own, where others read the one it has."""
    copy = onnx.NodeProto()
    copy.CopyFrom(dequantizer)
    copy.name = graph.fresh_name(f"{dequantizer.name}_own") if dequantizer.name else ""
    copy.output[0] = graph.fresh_name(f"{node.output[0]}_bias")
    graph.set_input(node, index, copy.output[0])
    return graph.insert(copy, node, after=False)


def _add_input(graph: Graph, node: onnx.NodeProto, layer: Layer, shift: NDArray[Any]) -> BiasChange:
    name = f"{node.output[0]}_bias"
    dequantizers = [dequantizer_of(graph, each) for each in node.input[:2]]
    steps = [step for each in dequantizers if each is not None and (step := _steps_of_channels(each, layer)) is not None]
    if len(steps) < 2:
        bias = shift.astype(layer.weights.dtype)
        graph.set_input(node, 2, graph.add_initializer(name, bias))
        return BiasChange(bias.astype(np.float64), _ADDED)
    step = np.asarray(functools.reduce(np.multiply, steps), dtype=np.float32)
    limits = np.iinfo(np.int32)
    values = np.clip(np.rint(shift / step.astype(np.float64)), limits.min, limits.max).astype(np.int32)
    constants = {"_quantized": values, "_scale": step, "_zero_point": np.zeros(step.shape, np.int32)}
    inputs = [graph.add_initializer(name + suffix, array) for suffix, array in constants.items()]
    output = graph.fresh_name(name)
    dequantize = helper.make_node("DequantizeLinear", inputs, [output], f"{output}_DequantizeLinear")
    if step.size > 1:
        dequantize.attribute.append(helper.make_attribute("axis", 0))
    graph.set_input(node, 2, output)
    graph.insert(dequantize, node, after=False)
    return BiasChange(values * step.astype(np.float64), _ADDED)


def _steps_of_channels(dequantizer: Dequantizer, layer: Layer) -> NDArray[Any] | None:
    """One step, or one for each output channel of all groups; None where the steps belong to something else."""
    if dequantizer.block_size:
        return None
    if dequantizer.step.size == 1:
        return dequantizer.step.reshape(())
    times, rest = divmod(layer.channels, dequantizer.step.size)
    return np.tile(dequantizer.step, times) if rest == 0 and times in (1, layer.groups) else None


def _insert_add(graph: Graph, node: onnx.NodeProto, layer: Layer, bias: NDArray[Any]) -> BiasChange:
    """An Add behind a node: it takes over the name of the output, so that nothing else changes.

    Behind an operator with a quantized output it stands between quantizers with that output's own step.
    """
    output, bias = node.output[0], bias.astype(layer.weights.dtype)
    constant = graph.add_initializer(f"{output}_bias", bias)
    node.name = layer.name  # of a node without one, the layer would change its name with the output
    graph.give_up_output(node, f"{output}_before_bias")
    add = helper.make_node("Add", [node.output[0], constant], [output], graph.fresh_name(f"{output}_add_bias"))
    new = [add]
    if node.op_type == "QLinearMatMul":
        add.input[0], add.output[0] = (graph.fresh_name(f"{output}_{what}") for what in ("real", "biased"))
        dequantize = helper.make_node("DequantizeLinear", [node.output[0], *node.input[6:8]], [add.input[0]])
        new = [dequantize, add, helper.make_node("QuantizeLinear", [add.output[0], *node.input[6:8]], [output])]
    for each in new:
        node = graph.insert(each, node, after=True)
    return BiasChange(bias.astype(np.float64).ravel(), _ADDED)
