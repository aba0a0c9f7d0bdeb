"""A graph with other constants in its layers, and without operations that have become part of them.

Nodes and initializers that became dead are removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import helper

from biascorr.adapters.onnx.bias import bias_of
from biascorr.adapters.onnx.folded import folded_of, keep_folded
from biascorr.adapters.onnx.graph import Graph, named_nodes, weight_index
from biascorr.adapters.onnx.limits import limited, set_limits
from biascorr.adapters.onnx.operators import operator_of
from biascorr.adapters.onnx.shapes import inferred_types
from biascorr.graph.axes import aligned
from biascorr.graph.layer import Constant, Layer
from biascorr.graph.network import Edits
from biascorr.graph.operations import BatchNorm

_ACTIVATIONS = ("Clip", "LeakyRelu", "Max", "Min", "PRelu", "Relu")
"""Operators that may be before an activation that limits values, and keep the type of what they read."""


def edit(
    graph: Graph, nodes: Mapping[str, onnx.NodeProto], layers: Sequence[Layer], limiting: Collection[str], edits: Edits
) -> None:
    """Edits a graph in place.

    Parameters
    ----------
    graph : Graph
        The graph that is edited.
    nodes : mapping
        Its nodes by name. They keep their names.
    layers : sequence of Layer
        Its layers.
    limiting : collection of str
        Its activations that limit values.
    edits : Edits
        The edits to make.

    Raises
    ------
    ValueError
        There is no such layer, activation or operation; weights or a bias of another shape than the layer's; limits that
        cross or that the opset cannot say; an operation that cannot be removed; metadata of ours that somebody changed.
    """
    known = {layer.name: layer for layer in layers}
    computed = [name for name, node in nodes.items() if not graph.is_constant(node.output[0])]
    _check_names("weights", edits.weights, known, "layer")
    _check_names("biases", edits.biases, known, "layer")
    _check_names("limits", edits.limits, limiting, "activation that limits values")
    _check_names("removed", edits.removed, computed, "operation")
    position = {output: k for k, node in enumerate(nodes.values()) for output in node.output}
    folded = folded_of(graph)
    read, types = graph.read(), _types(graph, layers) if edits.limits else {}
    for name, weights in edits.weights.items():
        _set_weights(graph, nodes[name], known[name], weights)
    for name, bias in edits.biases.items():
        bias_of(graph, nodes[name], known[name].output_axis).set(known[name], _aligned(known[name], bias))
    unlimited = [name for name, limits in edits.limits.items() if not _set_limits(graph, nodes[name], name, limits, types)]
    renamed: dict[str, str] = {}
    for name in dict.fromkeys([*unlimited, *edits.removed]):
        renamed |= _remove(graph, nodes[name], name)
    graph.remove_dead(read)
    _keep_names(graph, nodes)
    _keep_statistics(graph, [folded, edits.statistics], renamed, position)


def _check_names(what: str, names: Iterable[str], known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: {name!r} is no {kind} of the model")


def _set_weights(graph: Graph, node: onnx.NodeProto, layer: Layer, weights: Constant) -> None:
    if tuple(weights.shape) != layer.weights.shape:
        raise ValueError(f"layer {layer.name}: weights of shape {weights.shape}, expected {layer.weights.shape}")
    if layer.weight_step is not None and operator_of(node) == "MatMulNBits":
        raise ValueError(f"layer {layer.name}: its weights are quantized, expected a float layer")
    index = weight_index(node, graph)
    name = node.input[index]
    array = np.asarray(weights).astype(layer.weights.dtype, copy=False).reshape(graph.constant(name).shape)
    graph.set_constant(node, index, array, f"{name}_edited")


def _aligned(layer: Layer, bias: NDArray[Any]) -> NDArray[Any]:
    """A bias of real numbers whose axes are the last ones of the output."""
    channels = aligned(np.empty(layer.channels), layer.output_axis).shape
    own = channels if layer.bias is None else layer.bias.shape
    if bias.shape == (layer.channels,):
        return aligned(bias, layer.output_axis)
    if bias.shape not in (own, np.broadcast_shapes(own, channels)):
        raise ValueError(f"layer {layer.name}: bias of shape {bias.shape}, expected {(layer.channels,)} or {own}")
    return bias


def _types(graph: Graph, layers: Sequence[Layer]) -> dict[str, np.dtype[Any]]:
    """The types of tensors, as far as they are known."""
    types = {name: tensor.elem_type for name, tensor in inferred_types(graph.model).items() if tensor.elem_type}
    dtypes = {name: np.dtype(helper.tensor_dtype_to_np_dtype(each)) for name, each in types.items()}
    dtypes |= {layer.output: layer.weights.dtype for layer in layers}
    for node in graph.nodes:
        known = [dtypes[name] for name in node.input if name in dtypes]
        if operator_of(node) in _ACTIVATIONS and known:
            dtypes.setdefault(node.output[0], known[0])
    return dtypes


def _set_limits(
    graph: Graph, node: onnx.NodeProto, name: str, limits: tuple[ArrayLike, ArrayLike], types: Mapping[str, np.dtype[Any]]
) -> bool:
    tensor = limited(graph, node)
    if tensor not in types:
        raise ValueError(f"{name}: the type of {tensor}, which it limits, is not known")
    return set_limits(graph, node, name, limits, types[tensor])


def _remove(graph: Graph, node: onnx.NodeProto, name: str) -> dict[str, str]:
    """Lets the readers of a node's first output read its input; returns the name that is gone, and the one in its place."""
    source, output = limited(graph, node), node.output[0]
    for other in filter(None, node.output[1:]):
        if graph.is_read(other):
            raise ValueError(f"{name}: it cannot be removed: its output {other} is read too")
    graph.redirect(output, source)
    if output not in graph.outputs and not graph.is_captured(output):
        graph.remove(node)
        return {output: source}
    if source in graph.producer and source not in graph.outputs and not graph.is_captured(source):
        graph.remove(node)
        graph.rename(source, output)
        return {source: output}
    graph.replace(node, "Identity", [source])
    return {}


def _keep_names(graph: Graph, nodes: Mapping[str, onnx.NodeProto]) -> None:
    """Names those without a name that would be called otherwise than before: by another operator or output."""
    found = {id(node): name for name, node in named_nodes(graph.nodes).items()}
    for name, node in nodes.items():
        if found.get(id(node), name) != name:
            node.name = name


def _keep_statistics(
    graph: Graph, statistics: Iterable[Mapping[str, BatchNorm]], renamed: Mapping[str, str], position: Mapping[str, int]
) -> None:
    """Keeps statistics of tensors; where two have become one, those of the later one."""
    known = {}
    for entries in statistics:
        for tensor in sorted(entries, key=lambda name: position.get(name, -1)):
            name = tensor
            while name in renamed:
                name = renamed[name]
            known[name] = entries[tensor]
    keep_folded(graph, {name: norm for name, norm in known.items() if graph.has(name)})
