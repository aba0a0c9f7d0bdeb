"""What is around the layers of an ONNX graph: normalizations, activations, what passes values or their means on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, shape_inference

from biascorr.model.network import ActivationType, BatchNorm, Surroundings
from biascorr.onnx.graph import Graph, attributes

_OTHER = {
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish", "PRelu", "Selu", "Shrink",
    "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Activations that do more than limit values to constants, or do not show it."""

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")

_UNLIMITED = float(np.finfo(np.float32).max)
"""What a bound is by default where it is an attribute: beyond it, values are not limited."""

_KNOWN_VALUES = 64
"""Elements that a constant may have to count as a shape or axes, whose values shape inference needs."""

Shapes: TypeAlias = Mapping[str, tuple[int | None, ...]]
"""Shapes of tensors by name; None for an axis of any size."""


def surroundings_of(graph: Graph, nodes: Mapping[str, onnx.NodeProto]) -> Surroundings:
    """Of the named nodes of a graph."""
    acting = {name: node for name, node in nodes.items() if _acts_on_a_tensor(node, graph)}
    parameters = (_parameters(node, graph) for node in acting.values() if node.op_type in ("BatchNormalization", "Clip"))
    graph.values(name for names in parameters if names is not None for name in names if name)
    shapes = _shapes(graph.model)
    return Surroundings(
        _recognised(acting, lambda name, node: _batch_norm(name, node, graph)),
        _recognised(acting, lambda _, node: _activation(node, graph)),
        {name for name, node in acting.items() if _is_identity(node, graph, shapes)},
        {name for name, node in acting.items() if _is_average(node, graph, shapes)},
        shapes,
    )


def _recognised(nodes: Mapping[str, onnx.NodeProto], recognise: Callable[[str, onnx.NodeProto], Any]) -> dict[str, Any]:
    found = ((name, recognise(name, node)) for name, node in nodes.items())
    return {name: each for name, each in found if each is not None}


def _acts_on_a_tensor(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether its operator is one of ONNX, and its first input depends on those of the model."""
    return node.domain in ("", "ai.onnx") and bool(node.input) and not graph.is_constant(node.input[0])


def _parameters(node: onnx.NodeProto, graph: Graph) -> list[str] | None:
    """The inputs of a node behind its first; None where they are not all constant."""
    names = list(node.input[1:])
    return names if all(not name or graph.is_constant(name) for name in names) else None


def _batch_norm(name: str, node: onnx.NodeProto, graph: Graph) -> BatchNorm | None:
    if node.op_type != "BatchNormalization":
        return None
    given, parameters = attributes(node), _parameters(node, graph)
    trains = given.get("training_mode", 0) or any(node.output[1:])  # up to opset 13 only its outputs tell
    if trains or not given.get("spatial", 1) or parameters is None:
        return None
    gamma, beta, mean, variance = (graph.value(each).astype(np.float64) for each in parameters)
    return BatchNorm(name, beta, gamma, mean, variance, given.get("epsilon", 1e-5))


def _activation(node: onnx.NodeProto, graph: Graph) -> ActivationType | None:
    if node.op_type == "Relu":
        return ActivationType.relu
    bounds = _clip_bounds(node, graph) if node.op_type == "Clip" else None
    if bounds is not None:
        return ActivationType.clip(min(bounds), bounds[1])  # where they cross, the upper one counts
    return ActivationType.other if node.op_type in _OTHER else None


def _clip_bounds(node: onnx.NodeProto, graph: Graph) -> tuple[float, float] | None:
    """Attributes before opset 11, inputs from there on; None where they are computed at run time."""
    names = _parameters(node, graph)
    if names is None:
        return None
    given = attributes(node) | {key: graph.value(name).item() for key, name in zip(("min", "max"), names) if name}
    low, high = float(given.get("min", -math.inf)), float(given.get("max", math.inf))
    return -math.inf if low <= -_UNLIMITED else low, math.inf if high >= _UNLIMITED else high


def _is_identity(node: onnx.NodeProto, graph: Graph, shapes: Shapes) -> bool:
    if node.op_type == "Dropout":
        trains = node.input[2] if len(node.input) > 2 else ""
        return not trains or (graph.is_constant(trains) and not graph.value(trains))
    if node.op_type in _RESHAPES:
        before, after = (shapes.get(name, ()) for name in (node.input[0], node.output[0]))
        return _is_row_of_channels(before) and _is_row_of_channels(after) and before[1] == after[1]
    return node.op_type == "Identity"


def _is_row_of_channels(shape: tuple[int | None, ...]) -> bool:
    """Whether each sample has one value per channel, along axis 1."""
    return len(shape) > 1 and shape[1] is not None and all(size == 1 for size in shape[2:])


def _is_average(node: onnx.NodeProto, graph: Graph, shapes: Shapes) -> bool:
    if node.op_type != "ReduceMean":
        return node.op_type == "GlobalAveragePool"
    parameters, rank = _parameters(node, graph), len(shapes.get(node.input[0], ()))
    if parameters is None:
        return False
    axes = graph.value(parameters[0]).tolist() if any(parameters) else attributes(node).get("axes", [])
    return bool(axes) and rank > 0 and all(axis % rank > 1 for axis in axes)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    inferred = shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    values: Iterable[onnx.ValueInfoProto] = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: _shape(value) for value in values if value.type.tensor_type.HasField("shape")}


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large constants as inputs, so that inference copies no weights and has no limit of 2 GB."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    in_nodes = {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    large = {name: each for name, each in (tensors | in_nodes).items() if math.prod(each.dims) > _KNOWN_VALUES}
    declared = {value.name for value in model.graph.input}
    weights = [
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in large.items()
        if name not in declared
    ]
    graph = helper.make_graph(
        [node for node in model.graph.node if not (node.op_type == "Constant" and node.output[0] in large)],
        "shapes",
        [*model.graph.input, *weights],
        list(model.graph.output),
        [tensor for name, tensor in tensors.items() if name not in large],
        value_info=list(model.graph.value_info),
    )
    return helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version)
