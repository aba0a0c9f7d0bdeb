"""Where an ONNX model comes from; see :mod:`biascorr.graph.origin`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx

from biascorr.adapters.onnx.operators import DYNAMIC, operator_of, subgraph_nodes

_FORMS = {
    "QDQ": {"QuantizeLinear", "DequantizeLinear"},
    "QOperator": {"QGemm", "QLinearAdd", "QLinearConv", "QLinearMatMul"},
    "MatMulNBits": {"MatMulNBits"},
    "dynamic": {*DYNAMIC, "DynamicQuantizeLinear", "DynamicQuantizeLSTM"},
}
"""The forms of quantization, and the operators that each is told by."""

_PRODUCERS = {"onnx.quantize": "onnxruntime.quantization", "quark": "Quark", "vai_q_onnx": "Vitis AI Quantizer"}
"""What quantizers call themselves in a model, at the start, and their names."""

_OF_NNCF = "dq_output_"
"""What NNCF calls the output of its dequantizers, at the start."""

_OF_N_BITS = re.compile(r"_Q\d+G?$")
"""What onnxruntime appends to the names of products that it quantizes to few bits."""

_WITHOUT_VERSION = {"onnxruntime.quantization"}
"""Quantizers whose version in a model is always the same."""


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a model, those inside others and in functions among them."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        yield node
        yield from subgraph_nodes(node)


def format_of(model: onnx.ModelProto) -> str:
    """The format with its versions: "ONNX, opset 17, IR 8"."""
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), None)
    return ", ".join(["ONNX", *([f"opset {opset}"] if opset else []), f"IR {model.ir_version}"])


def quantization_of(nodes: Iterable[onnx.NodeProto]) -> str | None:
    """The forms of quantization that are in it."""
    operators = {operator_of(node) for node in nodes}
    return ", ".join(form for form, own in _FORMS.items() if own & operators) or None


def producer_of(model: onnx.ModelProto) -> str | None:
    """What wrote a model, with its version."""
    return " ".join(each for each in (model.producer_name, model.producer_version) if each) or None


def quantizer_of(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> str | None:
    """What quantized a model, by what it calls itself, or by the names that it gives tensors and nodes."""
    name = next((own for start, own in _PRODUCERS.items() if model.producer_name.startswith(start)), None)
    if name is not None:
        return name if name in _WITHOUT_VERSION else f"{name} {model.producer_version}".strip()
    for node in nodes:
        if operator_of(node) == "DequantizeLinear" and node.output[0].startswith(_OF_NNCF):
            return "NNCF"
        if operator_of(node) == "MatMulNBits" and _OF_N_BITS.search(node.name):
            return "onnxruntime.quantization"
    return None
