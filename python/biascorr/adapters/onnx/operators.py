"""Which operator a node is: a type means something only in its domain."""

from __future__ import annotations

import functools

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
