"""Where the bias of a layer is kept, and how a shift is added to it.

A bias is an input of the layer, or the constant of an Add that alone reads the layer's output, directly or behind a
QuantizeLinear and DequantizeLinear. Either is float, or integers behind DequantizeLinear, which are rounded again with
their own step. A layer with neither gets a bias: an input of a Conv or Gemm, quantized as ONNX quantizers do it where the
layer is quantized; an Add behind a MatMul.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.model.network import BiasChange, Layer
from biascorr.onnx.graph import Graph, attributes
from biascorr.onnx.quantizers import Dequantizer, dequantizer_of

_ADDED = "it had no bias; one was added"


def add_to_bias(graph: Graph, node: onnx.NodeProto, layer: Layer, shift: NDArray[Any]) -> BiasChange:
    """Adds a shift, (channels,) in real units, to the bias of a layer. See :class:`BiasChange`."""
    if len(node.input) > 2 and node.input[2]:
        factor = attributes(node).get("beta", 1.0)  # of a Gemm: y = alpha A B + beta C
        change = _add_to_constant(graph, node, 2, shift / factor)
        return BiasChange(_per_channel(change.applied, 0) * factor, change.note)
    if node.op_type == "Gemm":
        factor = attributes(node).get("beta", 1.0)
        change = _add_input(graph, node, layer, shift / factor)
        return BiasChange(change.applied * factor, change.note)
    axes_behind = len(layer.layout) - 2 if layer.window is not None else int(layer.channel_axis == -2)
    aligned = shift.reshape(-1, *[1] * axes_behind)
    add = _following_add(graph, node)
    if add is not None:
        change = _add_to_constant(graph, *add, aligned)
        return BiasChange(_per_channel(change.applied, axes_behind), change.note)
    if node.op_type == "MatMul":
        return _insert_add(graph, node, aligned.astype(layer.weights.dtype))
    return _add_input(graph, node, layer, shift)


def biased_output(graph: Graph, node: onnx.NodeProto) -> str:
    """The output of a layer with its bias in it."""
    has_own = node.op_type == "Gemm" or (len(node.input) > 2 and node.input[2])
    add = None if has_own else _following_add(graph, node)
    return str(node.output[0] if add is None else add[0].output[0])


def _per_channel(change: NDArray[Any], axes_behind: int) -> NDArray[Any]:
    """The change of each channel, where a bias has other axes too."""
    channels = np.moveaxis(change, -1 - axes_behind, 0)
    return np.asarray(channels.reshape(len(channels), -1).mean(axis=1))


def _following_add(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """The Add of a constant that alone reads the output, and which of its inputs the constant is."""
    name = node.output[0]
    reader = graph.only_reader(name)
    if reader is not None and reader.op_type == "QuantizeLinear":
        reader = graph.only_reader(reader.output[0])
        if reader is not None and reader.op_type == "DequantizeLinear":
            name = reader.output[0]
            reader = graph.only_reader(name)
    if reader is None or reader.op_type != "Add":
        return None
    index = 1 if reader.input[0] == name else 0
    return (reader, index) if graph.is_constant(reader.input[index]) else None


def _add_to_constant(graph: Graph, node: onnx.NodeProto, index: int, shift: NDArray[Any]) -> BiasChange:
    dequantizer = dequantizer_of(graph, node.input[index])
    if dequantizer is not None and graph.is_constant(dequantizer.quantized):
        values = graph.value(dequantizer.quantized)
        if values.dtype.kind in "iu":
            return _add_to_integers(graph, node, index, dequantizer, shift)
    values = graph.value(node.input[index])
    corrected = (values + shift).astype(values.dtype)
    graph.set_constant(node, index, corrected, f"{node.output[0]}_bias")
    return BiasChange(np.subtract(corrected, values, dtype=np.float64))


def _add_to_integers(
    graph: Graph, node: onnx.NodeProto, index: int, dequantizer: Dequantizer, shift: NDArray[Any]
) -> BiasChange:
    values = graph.value(dequantizer.quantized)
    steps = dequantizer.steps_of(max(values.ndim, 1))
    limits = np.iinfo(values.dtype)
    wanted = values + np.rint(shift / steps)
    corrected = np.clip(wanted, limits.min, limits.max)
    own = dequantizer.node
    if graph.only_reader(node.input[index]) is not node:
        own = _copy_of(graph, own, node, index)
    graph.set_constant(own, 0, corrected.astype(values.dtype), f"{node.output[0]}_bias_quantized")
    saturated = np.count_nonzero(wanted != corrected)
    note = f"{values.dtype} bias saturates in {saturated} of {corrected.size} channels" if saturated else ""
    return BiasChange((corrected - values) * steps, note)


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
    if dequantizer.step.size == 1:
        return dequantizer.step.reshape(())
    times, rest = divmod(layer.channels, dequantizer.step.size)
    return np.tile(dequantizer.step, times) if rest == 0 and times in (1, layer.groups) else None


def _insert_add(graph: Graph, node: onnx.NodeProto, bias: NDArray[Any]) -> BiasChange:
    """An Add behind a node: it takes over the name of the output, so that nothing else changes."""
    output = node.output[0]
    constant = graph.add_initializer(f"{output}_bias", bias)
    node.output[0] = graph.fresh_name(f"{output}_before_bias")
    add = helper.make_node("Add", [node.output[0], constant], [output], graph.fresh_name(f"{output}_add_bias"))
    graph.producer[node.output[0]] = node
    graph.insert(add, node, after=True)
    return BiasChange(bias.astype(np.float64).ravel(), _ADDED)
