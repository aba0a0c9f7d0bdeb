"""The roles of ONNX operators between layers: normalizations, activations, what passes channels on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from biascorr.adapters.onnx.folded import folded_of
from biascorr.adapters.onnx.graph import Graph, attributes
from biascorr.adapters.onnx.limits import limits_channels
from biascorr.adapters.onnx.shapes import Shapes, Types, first_size
from biascorr.graph.axes import Order
from biascorr.graph.operations import (
    Activation,
    ActivationType,
    BatchNorm,
    Bound,
    ChannelPreserving,
    Facts,
    Leaky,
    Role,
    SpatialEffect,
)

_CHANNEL_AXIS = 1
"""Where ONNX has the channels of whatever has some."""

_OTHER = {
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish", "PRelu", "Selu", "Shrink",
    "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Activations that do more than limit values to constants, or do not show it."""

_OF_ANY_ORDER = ("Max", "Min")
"""Operators whose constant may be before the tensor that they limit to it."""

_WITH_PARAMETERS = ("BatchNormalization", "Clip", "Max", "Min", "PRelu", "Pad", "Reshape")
"""Operators whose role depends on their constants."""

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")

_UNLIMITED = float(np.finfo(np.float32).max)
"""The default bound where it is an attribute: beyond it, values are not limited."""


def facts_of(graph: Graph, nodes: Mapping[str, onnx.NodeProto]) -> Facts:
    """The facts about the named nodes of a graph."""
    acting = {name: node for name, node in nodes.items() if _acts_on_a_tensor(node, graph)}
    parameters = (_parameters(node, graph) for node in acting.values() if node.op_type in _WITH_PARAMETERS)
    graph.compute(name for names in parameters if names is not None for name in names if name)
    found = {name: _role(name, node, graph, graph.types, graph.shapes) for name, node in acting.items()}
    return Facts({name: role for name, role in found.items() if role is not None}, graph.shapes, folded_of(graph))


def _role(name: str, node: onnx.NodeProto, graph: Graph, types: Types, shapes: Shapes) -> Role | None:
    if node.op_type == "BatchNormalization":
        return _batch_norm(name, node, graph)
    if _is_leaky(node, graph):
        return Leaky()
    activation = _activation(node, graph, shapes)
    if activation is not None:
        return Activation(activation, _CHANNEL_AXIS, limits_channels(graph))
    if node.op_type in ("Dropout", "Identity") and _is_identity(node, graph, shapes):
        return ChannelPreserving(SpatialEffect.NONE)
    if _is_identity(node, graph, shapes):
        return ChannelPreserving(SpatialEffect.NONE, _CHANNEL_AXIS, _CHANNEL_AXIS)
    if _is_average(node, graph, shapes):
        return ChannelPreserving(SpatialEffect.AVERAGE, _CHANNEL_AXIS, _CHANNEL_AXIS)
    if _is_padding(node, graph, shapes):
        return ChannelPreserving(SpatialEffect.PADDING, _CHANNEL_AXIS, _CHANNEL_AXIS)
    if _is_flatten(node, graph, types, shapes):
        return ChannelPreserving(SpatialEffect.FLATTEN, _CHANNEL_AXIS, _CHANNEL_AXIS, Order.REPEATED)
    return None


def _acts_on_a_tensor(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether its operator is one of ONNX, and its first input, or any of a Max or Min, depends on those of the model."""
    tensors = node.input if node.op_type in _OF_ANY_ORDER else node.input[:1]
    return node.domain in ("", "ai.onnx") and not all(map(graph.is_constant, tensors))


def _parameters(node: onnx.NodeProto, graph: Graph) -> list[str] | None:
    """The inputs of a node after its first; None where they are not all constant."""
    names = list(node.input[1:])
    return names if all(not name or graph.is_constant(name) for name in names) else None


def _batch_norm(name: str, node: onnx.NodeProto, graph: Graph) -> BatchNorm | None:
    given, parameters = attributes(node), _parameters(node, graph)
    trains = given.get("training_mode", 0) or any(node.output[1:])  # up to opset 13 only its outputs tell
    if trains or not given.get("spatial", 1) or parameters is None:
        return None
    gamma, beta, mean, variance = (graph.value(each).astype(np.float64) for each in parameters)
    return BatchNorm(name, beta, gamma, mean, variance, given.get("epsilon", 1e-5))


def _activation(node: onnx.NodeProto, graph: Graph, shapes: Shapes) -> ActivationType | None:
    if node.op_type == "Relu":
        return ActivationType.relu
    if node.op_type in _OF_ANY_ORDER:
        bound = _bound(node, graph, shapes)
        both = (bound, math.inf) if node.op_type == "Max" else (-math.inf, bound)
        return ActivationType.other if bound is None else ActivationType.clip(*both)
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


def _bound(node: onnx.NodeProto, graph: Graph, shapes: Shapes) -> Bound | None:
    """The limit that a Max or Min sets one tensor: a number, or one for each channel along axis 1; None for anything else."""
    constants = [name for name in node.input if graph.is_constant(name)]
    if len(node.input) != 2 or len(constants) != 1:
        return None
    bound = graph.value(constants[0]).astype(np.float64)
    shape = shapes.get(next(name for name in node.input if name not in constants))
    if np.isnan(bound).any() or bound.ndim > (1 if shape is None else len(shape)):
        return None
    if bound.size == 1:
        return float(bound.item())
    if shape is None or len(shape) < 2 or shape[1] not in (None, bound.size):
        return None
    aligned = (1,) * (len(shape) - bound.ndim) + bound.shape
    return tuple(bound.ravel().tolist()) if aligned[1] == bound.size else None


def _is_leaky(node: onnx.NodeProto, graph: Graph) -> bool:
    return node.op_type == "LeakyRelu" or (node.op_type == "PRelu" and graph.is_constant(node.input[1]))


def _is_padding(node: onnx.NodeProto, graph: Graph, shapes: Shapes) -> bool:
    given, names = attributes(node), _parameters(node, graph)
    if node.op_type != "Pad" or names is None or given.get("mode", b"constant") != b"constant":
        return False
    given |= {key: graph.value(name) for key, name in zip(("pads", "value", "axes"), names) if name}
    pads = np.reshape(given["pads"], (2, -1))  # before and after
    axes = np.asarray(given.get("axes", range(pads.shape[1])))
    rank = len(shapes.get(node.input[0], ()))
    outer = np.where(axes < 0, axes + rank, axes) < 2  # where the rank is not known, any from the end may be one of these
    return not np.any(given.get("value", 0.0)) and not pads[:, outer].any()


def _is_flatten(node: onnx.NodeProto, graph: Graph, types: Types, shapes: Shapes) -> bool:
    before, after = (shapes.get(name, ()) for name in (node.input[0], node.output[0]))
    if node.op_type == "Flatten":
        axis = attributes(node).get("axis", 1)
        return axis == 1 or (len(before) > 1 and axis + len(before) == 1)
    if node.op_type != "Reshape":
        return False
    if _keeps_first_axis(node, graph):
        return True
    samples = first_size(types, node.input[0])
    same_samples = samples is not None and samples == first_size(types, node.output[0])
    return len(before) > 1 and len(after) == 2 and (same_samples or _product(before[1:]) == after[1] != 0)


def _product(sizes: Sequence[int | None]) -> int:
    """The product of sizes that are all known, else 0."""
    return math.prod(size or 0 for size in sizes)


def _keeps_first_axis(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether a Reshape makes two axes, and says of the first that it stays."""
    if not graph.is_constant(node.input[1]) or attributes(node).get("allowzero", 0):
        return False
    shape = graph.value(node.input[1]).tolist()
    return len(shape) == 2 and shape[0] == 0


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
