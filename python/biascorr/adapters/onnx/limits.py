"""Activations that limit values, as the cheapest operators of an opset.

    0 and no upper limit     Relu
    two numbers              Clip
    anything else            Max or Relu, then Min, each only where it is needed

All of them let nan through. A Clip has both bounds, infinite ones too: its own defaults would limit infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import helper

from biascorr.adapters.onnx.graph import Graph

_CLIP_OF_FLOAT64 = 12
"""The opset since which onnxruntime limits float64 by a Clip."""

_CLIP_WITH_INPUTS = 11
"""The opset that made the bounds of a Clip inputs."""

_BROADCASTING = 8
"""The opset that let Max and Min broadcast."""

Operators = list[tuple[str, Sequence[NDArray[Any]]]]
"""Operators with their bounds, each after the one before it."""


def limits_channels(graph: Graph) -> bool:
    """Whether the opset can say a limit for each channel."""
    return graph.opset >= _BROADCASTING


def limited(graph: Graph, node: onnx.NodeProto) -> str:
    """The tensor that an activation acts on: a Max or Min may have its constant first."""
    return str(next(name for name in node.input if not graph.is_constant(name)))


def set_limits(
    graph: Graph, node: onnx.NodeProto, name: str, limits: tuple[ArrayLike, ArrayLike], dtype: np.dtype[Any]
) -> bool:
    """Lets an activation limit its tensor to other values; False, and nothing is done, where it would not limit it at all.

    Parameters
    ----------
    graph : Graph
        The graph that it is in.
    node : onnx.NodeProto
        The activation, which becomes the first of the operators; the last makes the tensor that it made.
    name : str
        The name that errors give it.
    limits : (array_like, array_like)
        Numbers, or arrays that broadcast to the tensor; infinite where there is no limit.
    dtype : dtype
        Of the tensor.

    Raises
    ------
    ValueError
        The lower limit is above the upper one, or one is nan; the model's opset cannot say the limits.
    """
    low, high = (_bound(limit, dtype) for limit in limits)
    if not np.all(low <= high):
        raise ValueError(f"{name}: limits {low} and {high}, expected the first to be at most the second")
    operators = _operators(graph.opset, low, high)
    if not limits_channels(graph) and any(op in ("Max", "Min") for op, _ in operators):
        raise ValueError(f"{name}: such limits need opset {_BROADCASTING} or newer, the model has {graph.opset}")
    source, output = limited(graph, node), node.output[0]
    for k, (op, bounds) in enumerate(operators):
        if k:
            graph.give_up_output(node, f"{output}_limited")
            following = helper.make_node(op, [node.output[0]], [output], graph.fresh_name(f"{name}_{op}"))
            source, node = node.output[0], graph.insert(following, node, after=True)
        _write(graph, node, op, source, bounds)
    return bool(operators)


def _bound(limit: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A limit in the type of its tensor; a number where all its elements are the same."""
    with np.errstate(over="ignore"):  # beyond the greatest number of the type, nothing is limited
        bound = np.asarray(limit, dtype=np.float64).astype(dtype)
    return bound.flat[:1].reshape(()) if bound.size and (bound == bound.flat[0]).all() else bound


def _operators(opset: int, low: NDArray[Any], high: NDArray[Any]) -> Operators:
    has_low, has_high = bool((low != -np.inf).any()), bool((high != np.inf).any())
    is_relu = low.ndim == 0 and low == 0
    clips = low.ndim == high.ndim == 0 and (low.dtype != np.float64 or opset >= _CLIP_OF_FLOAT64)
    if clips and (has_high or (has_low and not is_relu)):
        return [("Clip", (low, high))]
    lower: Operators = [("Relu", ())] if is_relu else [("Max", (low,))]
    upper: Operators = [("Min", (high,))]
    return lower * has_low + upper * has_high


def _write(graph: Graph, node: onnx.NodeProto, op: str, source: str, bounds: Sequence[NDArray[Any]]) -> None:
    """Makes a node this operator."""
    if op == "Clip" and graph.opset < _CLIP_WITH_INPUTS:
        low, high = map(float, bounds)
        graph.replace(node, op, [source], min=low, max=high)
        return
    base = f"{node.output[0]}_{op}_by"
    graph.replace(node, op, [source, *(graph.add_initializer(base, bound) for bound in bounds)])
