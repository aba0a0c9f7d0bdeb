"""The texts in a model: names, and the equations of products."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx

from biascorr.adapters.onnx.operators import operator_of
from biascorr.adapters.onnx.origin import all_nodes

_EQUATION = re.compile(rb"[A-Za-z.,> -]*")
"""Of an Einsum: onnxruntime does not come to an end with others, such as tabs."""


def check_texts(model: onnx.ModelProto, name: str) -> None:
    """Raises ValueError where a name is no text, or onnxruntime must not see an equation."""
    graph = model.graph
    tensors = (each.name for each in (*graph.input, *graph.output, *graph.value_info, *graph.initializer))
    _check_names((model.producer_name, model.producer_version, *tensors), name)
    for node in all_nodes(model):
        attributes = {attribute.name: attribute for attribute in node.attribute}
        _check_names((node.name, node.op_type, node.domain, *node.input, *node.output, *attributes), name)
        equation = attributes.get("equation") if operator_of(node) == "Einsum" else None
        if equation is not None and not _EQUATION.fullmatch(equation.s):
            raise ValueError(f"{name}: node {node.name}: equation {equation.s!r}, expected letters, commas, dots and ->")


def _check_names(names: Iterable[str | bytes], name: str) -> None:
    for each in names:
        if isinstance(each, bytes):  # what protobuf gives then
            raise ValueError(f"{name}: not an ONNX model, or a damaged one: {each!r} is no text in UTF-8")
