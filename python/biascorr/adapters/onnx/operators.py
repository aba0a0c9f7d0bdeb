"""Which operator a node is: a type means something only in its domain. What is inside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx

LAYERS = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
"""Operators that are layers where their weights are constant."""

CONTRIBUTED = "com.microsoft"
"""The domain of onnxruntime's own operators."""

_SAME = ("DequantizeLinear", "QLinearConv", "QuantizeLinear")
"""Operators of that domain that do what those of the same name in ONNX do."""


def operator_of(node: onnx.NodeProto) -> str:
    """The operator of a node: its bare type where it is one of ONNX, or one that only onnxruntime has; else with its domain."""
    return _operator(node.domain, node.op_type)


@functools.cache
def _operator(domain: str, op_type: str) -> str:
    is_known = domain in ("", "ai.onnx") or (domain == CONTRIBUTED and (op_type in _SAME or not onnx.defs.has(op_type)))
    return op_type if is_known else f"{domain}::{op_type}"


def subgraph_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """All nodes inside the subgraphs of a node."""
    for graph in subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from subgraph_nodes(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node: bodies of loops, branches."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
