"""What is around the layers of an ONNX graph: normalizations, activations, what passes values or their means on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from biascorr.adapters.onnx.folded import folded_of
from biascorr.adapters.onnx.graph import Graph, attributes
from biascorr.adapters.onnx.limits import limits_channels
from biascorr.adapters.onnx.shapes import Shapes, Types, first_size, inferred_types, known_shapes
from biascorr.graph.network import ActivationType, BatchNorm, Bound, Surroundings

_OTHER = {
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish", "PRelu", "Selu", "Shrink",
    "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Activations that do more than limit values to constants, or do not show it."""

_OF_ANY_ORDER = ("Max", "Min")
"""Operators whose constant may be before the tensor that they limit to it."""

_WITH_PARAMETERS = ("BatchNormalization", "Clip", "Max", "Min", "PRelu", "Pad", "Reshape")
"""Operators whose constants tell what they are."""

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")

_UNLIMITED = float(np.finfo(np.float32).max)
"""What a bound is by default where it is an attribute: beyond it, values are not limited."""


def surroundings_of(graph: Graph, nodes: Mapping[str, onnx.NodeProto]) -> Surroundings:
    """Of the named nodes of a graph."""
    acting = {name: node for name, node in nodes.items() if _acts_on_a_tensor(node, graph)}
    parameters = (_parameters(node, graph) for node in acting.values() if node.op_type in _WITH_PARAMETERS)
    graph.values(name for names in parameters if names is not None for name in names if name)
    types = inferred_types(graph.model)
    shapes = known_shapes(types)
    activations = _recognised(acting, lambda _, node: _activation(node, graph, shapes))
    return Surroundings(
        batch_norms=_recognised(acting, lambda name, node: _batch_norm(name, node, graph)),
        activations=activations,
        limitable=list(activations) if limits_channels(graph) else [],
        identities={name for name, node in acting.items() if _is_identity(node, graph, shapes)},
        averages={name for name, node in acting.items() if _is_average(node, graph, shapes)},
        leaky={name for name, node in acting.items() if _is_leaky(node, graph)},
        paddings={name for name, node in acting.items() if _is_padding(node, graph, shapes)},
        flattens={name for name, node in acting.items() if _is_flatten(node, graph, types, shapes)},
        folded={name: norm for name, norm in folded_of(graph.model).items() if graph.has(name)},
        shapes=shapes,
    )


def _recognised(nodes: Mapping[str, onnx.NodeProto], recognise: Callable[[str, onnx.NodeProto], Any]) -> dict[str, Any]:
    found = ((name, recognise(name, node)) for name, node in nodes.items())
    return {name: each for name, each in found if each is not None}


def _acts_on_a_tensor(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether its operator is one of ONNX, and its first input, or any of a Max or Min, depends on those of the model."""
    tensors = node.input if node.op_type in _OF_ANY_ORDER else node.input[:1]
    return node.domain in ("", "ai.onnx") and not all(map(graph.is_constant, tensors))


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
    """What a Max or Min limits one tensor to: a number, or one for each channel along axis 1; None for anything else."""
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
    pads = np.reshape(given["pads"], (2, -1))  # in front and behind
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
    """Of sizes that are all known, else 0."""
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
