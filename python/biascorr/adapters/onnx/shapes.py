"""Types and shapes of tensors that onnx infers without running the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import onnx
from onnx import helper, shape_inference

from biascorr.adapters.onnx.operators import CONTRIBUTED, operator_of

_KNOWN_VALUES = 64
"""Elements that a constant may have to count as a shape or axes, whose values shape inference needs."""

Types: TypeAlias = Mapping[str, onnx.TypeProto.Tensor]
"""Element types and shapes of tensors by name."""

Shapes: TypeAlias = Mapping[str, tuple[int | None, ...]]
"""Shapes of tensors by name; None for an axis of any size."""


def inferred_types(model: onnx.ModelProto) -> Types:
    """Element types and shapes of tensors by name, as far as they are known: onnx may fail where onnxruntime does not."""
    inferred = model.graph
    with contextlib.suppress(Exception):  # of its own, which has no base but this
        inferred = shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    values: Iterable[onnx.ValueInfoProto] = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type for value in values}


def known_shapes(types: Types) -> dict[str, tuple[int | None, ...]]:
    """Shapes of tensors by name; those of unknown rank are left out."""
    return {name: _shape(tensor) for name, tensor in types.items() if tensor.HasField("shape")}


def first_size(types: Types, name: str) -> onnx.TensorShapeProto.Dimension | None:
    """The size of axis 0 of a tensor, a number or a name that stands for one; None where neither is known."""
    axes = types[name].shape.dim if name in types else []
    return axes[0] if len(axes) and axes[0].WhichOneof("value") else None


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[int | None, ...]:
    return tuple(axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else None for axis in tensor.shape.dim)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large constants as inputs, so that inference copies no weights and has no limit of 2 GB."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    in_nodes = {node.output[0]: node.attribute[0].t for node in model.graph.node if operator_of(node) == "Constant"}
    large = {name: each for name, each in (tensors | in_nodes).items() if math.prod(each.dims) > _KNOWN_VALUES}
    declared = {value.name for value in model.graph.input}
    weights = [
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in large.items()
        if name not in declared
    ]
    graph = helper.make_graph(
        [
            _inferable(node, tensors | in_nodes)
            for node in model.graph.node
            if not (operator_of(node) == "Constant" and node.output[0] in large)
        ],
        "shapes",
        [*model.graph.input, *weights],
        list(model.graph.output),
        [tensor for name, tensor in tensors.items() if name not in large],
        value_info=list(model.graph.value_info),
    )
    return helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version)


def _inferable(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> onnx.NodeProto:
    """A node that onnx knows: Cast for a quantizer of onnxruntime, which is of the type of its zero point or step."""
    index = {"QuantizeLinear": 2, "DequantizeLinear": 1}.get(operator_of(node))
    if index is None or node.domain != CONTRIBUTED or index >= len(node.input) or node.input[index] not in constants:
        return node
    return helper.make_node("Cast", node.input[:1], node.output, node.name, to=constants[node.input[index]].data_type)
