"""Edits of a float TFLite graph: other weights, biases and limits. It has no normalization that could be taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from biascorr.adapters.tflite.bias import Bias
from biascorr.adapters.tflite.graph import Editor, Graph, Operator, operator
from biascorr.adapters.tflite.lowering import Lowered
from biascorr.adapters.tflite.products import Product
from biascorr.adapters.tflite.tensors import shape_of, tensor_like
from biascorr.graph.layer import Constant
from biascorr.graph.network import Edits

_LIMITED = {(0.0, np.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}
"""The activations that limit values to numbers."""


def edited(lowered: Lowered, edits: Edits) -> Graph:
    """The graph with these edits. Raises ValueError for what is not in it, or has another shape."""
    graph, products = lowered.graph, lowered.products
    editor = Editor(graph)
    for name, weights in edits.weights.items():
        _set_weights(editor, graph, _product(products, name), weights)
    for name, bias in edits.biases.items():
        product = _product(products, name)
        if np.size(bias) != product.channels:
            raise ValueError(f"layer {name}: bias of shape {np.shape(bias)}, expected {(product.channels,)}")
        Bias(graph, product).set(editor, np.asarray(bias, dtype=np.float64).reshape(-1))
    operators = {graph.names[each.outputs[0]]: each for each in graph.operators if each.outputs}
    for name, (low, high) in edits.limits.items():
        _limit(editor, lowered, operators, name, (np.asarray(low), np.asarray(high)))
    return editor.graph()


def _product(products: Mapping[str, Product], name: str) -> Product:
    if name not in products:
        raise ValueError(f"edits: {name!r} is no layer of the model")
    return products[name]


def _set_weights(editor: Editor, graph: Graph, product: Product, weights: Constant) -> None:
    if tuple(weights.shape) != product.shape:
        raise ValueError(f"layer {graph.names[product.output]}: weights of shape {weights.shape}, expected {product.shape}")
    tensor = graph.tensors[product.weights]
    values = np.asarray(weights).astype(np.float32, copy=False).reshape(tensor.shape)
    if graph.is_stored(product.weights) and graph.is_own(product.weights) and tensor.type == schema.TensorType.FLOAT32:
        editor.store(product.weights, values)
        return
    index = editor.add_constant(values, f"{graph.names[product.weights]}/edited")
    editor.set_input(product.operator, product.operator.inputs.index(product.weights), index)


def _limit(
    editor: Editor, lowered: Lowered, operators: Mapping[str, Operator], name: str, limits: tuple[NDArray[Any], NDArray[Any]]
) -> None:
    """Limits what an activation gives out, by the activation itself and what follows it: MAXIMUM and MINIMUM."""
    product = lowered.products[lowered.fused[name]] if name in lowered.fused else None
    if product is None and name not in operators:
        raise ValueError(f"edits: {name!r} is no operation of the model")
    changed = operators[name] if product is None else product.last
    numbers = tuple(float(each.flat[0]) if each.size and np.all(each == each.flat[0]) else None for each in limits)
    first = _LIMITED.get(numbers) or ("RELU" if numbers[0] == 0.0 else None)  # type: ignore[arg-type]
    rank = len(shape_of(lowered.graph.tensors[changed.outputs[0]]))
    left = _beyond(limits, numbers, first, rank)
    if product is not None:
        editor.set_options(changed, fusedActivationFunction=getattr(schema.ActivationFunctionType, first or "NONE"))
    elif first is not None:
        editor.replace(changed, operator(first, changed.inputs[:1], changed.outputs))
    else:
        kind, bound = left.pop(0) if left else ("MAXIMUM", _row(limits[0], rank))
        constant = editor.add_constant(bound, f"{name}/{kind.lower()}")
        editor.replace(changed, operator(kind, [changed.inputs[0], constant], changed.outputs, schema.MaximumMinimumOptionsT()))
    if left:
        _follow(editor, lowered.graph, changed, left)


def _beyond(
    limits: tuple[NDArray[Any], NDArray[Any]], numbers: tuple[float | None, ...], first: str | None, rank: int
) -> list[tuple[str, NDArray[np.float32]]]:
    """The limits that an activation does not set."""
    is_set = [first is not None, first is not None and (first != "RELU" or numbers[1] == np.inf)]
    ends = zip(("MAXIMUM", "MINIMUM"), limits, is_set)
    return [(kind, _row(limit, rank)) for kind, limit, done in ends if not done and np.isfinite(limit).any()]


def _row(limit: NDArray[Any], rank: int) -> NDArray[np.float32]:
    """A bound as it broadcasts to a tensor of so many axes, channels last; with fewer, litert-quantizer fails at MAXIMUM."""
    largest = np.finfo(np.float32).max
    shape = (*[1] * (rank - 1), -1) if limit.size > 1 else ()
    return np.asarray(np.clip(limit, -largest, largest), dtype=np.float32).reshape(shape)


def _follow(editor: Editor, graph: Graph, changed: Operator, left: list[tuple[str, NDArray[np.float32]]]) -> None:
    """Puts limits after an operator, whose readers read what they make."""
    source, before = changed.outputs[0], changed
    added = []
    for kind, bound in left:
        name = f"{graph.names[changed.outputs[0]]}/{kind.lower()}"
        constant = editor.add_constant(bound, f"{name}/bound")
        made = editor.add_tensor(tensor_like(graph.tensors[changed.outputs[0]], name))
        added.append(operator(kind, [source, constant], [made], schema.MaximumMinimumOptionsT()))
        editor.insert_after(before, added[-1])
        source, before = made, added[-1]
    editor.redirect(changed.outputs[0], source, *added[:1])
