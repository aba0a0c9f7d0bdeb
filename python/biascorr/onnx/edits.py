"""A graph with other constants in its layers, and without operations that have become part of them.

What only served what an edit replaced is taken out: constants, and the nodes that computed them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from biascorr.model.network import Edits, Layer
from biascorr.onnx.bias import set_bias
from biascorr.onnx.graph import Graph, named_nodes, weight_index


def edit(graph: Graph, nodes: Mapping[str, onnx.NodeProto], layers: Sequence[Layer], edits: Edits) -> None:
    """Edits a graph in place.

    Parameters
    ----------
    graph : Graph
        What is edited.
    nodes : mapping
        Its nodes by name. They keep their names.
    layers : sequence of Layer
        Its layers.
    edits : Edits
        What is to be different.

    Raises
    ------
    ValueError
        There is no such layer or operation; weights or a bias of another shape than the layer's; an operation cannot be
        removed.
    """
    known, read = {layer.name: layer for layer in layers}, graph.read()
    _check_names("weights", edits.weights, known, "layer")
    _check_names("biases", edits.biases, known, "layer")
    computed = [name for name, node in nodes.items() if not graph.is_constant(node.output[0])]
    _check_names("removed", edits.removed, computed, "operation")
    for name, weights in edits.weights.items():
        _set_weights(graph, nodes[name], known[name], weights)
    for name, bias in edits.biases.items():
        set_bias(graph, nodes[name], known[name], _aligned(known[name], bias))
    for name in edits.removed:
        _remove(graph, nodes[name], name)
    graph.remove_unread(read)
    _keep_names(graph, nodes)


def _check_names(what: str, names: Iterable[str], known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: {name!r} is no {kind} of the model")


def _set_weights(graph: Graph, node: onnx.NodeProto, layer: Layer, weights: NDArray[Any]) -> None:
    if weights.shape != layer.weights.shape:
        raise ValueError(f"layer {layer.name}: weights of shape {weights.shape}, expected {layer.weights.shape}")
    index = weight_index(node, graph)
    name = node.input[index]
    array = weights.astype(layer.weights.dtype).reshape(graph.value(name).shape)
    graph.set_constant(node, index, array, f"{name}_edited")


def _aligned(layer: Layer, bias: NDArray[Any]) -> NDArray[Any]:
    """A bias of real numbers whose axes are the last ones of the output."""
    channels = (layer.channels, *[1] * (-1 - layer.output_axis))
    own = channels if layer.bias is None else layer.bias.shape
    if bias.shape == (layer.channels,):
        return bias.reshape(channels)
    if bias.shape not in (own, np.broadcast_shapes(own, channels)):
        raise ValueError(f"layer {layer.name}: bias of shape {bias.shape}, expected {(layer.channels,)} or {own}")
    return bias


def _remove(graph: Graph, node: onnx.NodeProto, name: str) -> None:
    """Lets what reads the first output of a node read its input."""
    source, output = next(each for each in node.input if not graph.is_constant(each)), node.output[0]
    for other in filter(None, node.output[1:]):
        if other in graph.read():
            raise ValueError(f"{name}: it cannot be removed: its output {other} is read too")
    graph.redirect(output, source)
    if output not in graph.outputs and not graph.is_captured(output):
        graph.remove(node)
    elif source in graph.producer and source not in graph.outputs and not graph.is_captured(source):
        graph.remove(node)
        graph.rename(source, output)
    else:
        graph.replace(node, "Identity", [source])


def _keep_names(graph: Graph, nodes: Mapping[str, onnx.NodeProto]) -> None:
    """Names those without a name that would be called otherwise than before: by another operator or output."""
    found = {id(node): name for name, node in named_nodes(graph.model).items()}
    for name, node in nodes.items():
        if found.get(id(node), name) != name:
            node.name = name
