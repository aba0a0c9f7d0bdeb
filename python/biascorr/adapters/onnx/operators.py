"""Which operator a node is: a type means something only in its domain. What operators do; what is inside a node."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import onnx

LAYERS = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
"""Operators that are layers where their weights are constant."""

POINTWISE = {
    "Abs", "Add", "BatchNormalization", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "QuickGelu", "Relu", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Operators that activations are made of: each element of the output depends on one element of each input."""

COPIES = {
    "Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators after which weights are the same in another form."""

DYNAMIC = {"ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
"""Operators whose input is quantized when they run, with a step that depends on it."""

RECURRENT = {"DynamicQuantizeLSTM", "GRU", "LSTM", "RNN"}
"""Operators whose weights act on what they made before."""

WEIGHTED = {
    "DeformConv", "FusedConv", "FusedGemm", "FusedMatMul", "FusedMatMulActivation", "GemmFastGelu", "GemmFloat8", "MatMulBnb4",
    "MatMulFpQ4", "MatMulNBits", "MoE", "NhwcConv", "NhwcFusedConv", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul",
    "QMoE", "QOrderedMatMul", "TransposeMatMul", "ai.onnx.ml::LinearClassifier", "ai.onnx.ml::LinearRegressor", *DYNAMIC,
    *RECURRENT,
}  # fmt: skip
"""Operators that multiply with weights and are not corrected; some of them only in forms that are not lowered."""

UNWEIGHTED = {
    *POINTWISE, *COPIES, "And", "BiasAdd", "BiasGelu", "BiasSplitGelu", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    "Compress", "Concat", "CumSum", "DFT", "EmbedLayerNormalization", "Equal", "Expand", "FastGelu", "Fmod", "FusedElementwise",
    "Gather", "GatherBlockQuantized", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "GridSample",
    "GroupNormalization", "GroupQueryAttention", "If", "InstanceNormalization", "LayerNormalization", "Less", "LessOrEqual",
    "Loop", "MaxRoiPool", "MaxUnpool", "Mean", "MeanVarianceNormalization", "Mod", "MultiHeadAttention", "NonMaxSuppression",
    "Not", "OneHot", "Or", "Pad", "QLinearAdd", "QLinearConcat", "QLinearMul", "QLinearWhere", "RMSNormalization", "Range",
    "Resize", "RoiAlign", "RotaryEmbedding", "STFT", "Scan", "Scatter", "ScatterElements", "ScatterND", "SequenceInsert",
    "Shape", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Slice", "Split",
    "Sum", "TensorScatter", "Tile", "TopK", "Unique", "Upsample", "Where", "Xor",
}  # fmt: skip
"""Operators that may read a constant matrix without multiplying with it: others that do are taken for layers."""

COLLECTING = {
    "LabelEncoder", "Optional", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "SequenceMap", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "ai.onnx.ml::LabelEncoder",
    "ai.onnx.ml::ZipMap",
}  # fmt: skip
"""Operators that may make no array of numbers: a sequence, a map, what may be missing, text."""

GIVING = ("ConcatFromSequence", "DequantizeLinear", "OptionalGetElement", "SequenceAt")
"""Operators that make an array of what is none."""

CONTRIBUTED = "com.microsoft"
"""The domain of onnxruntime's own operators."""

_SAME = ("DequantizeLinear", "QLinearConv", "QuantizeLinear")
"""Operators of that domain that do what those of the same name in ONNX do."""


_GRAPH = onnx.AttributeProto.GRAPH

_PLAIN = frozenset(
    getattr(onnx.AttributeProto, name) for name in ("FLOAT", "INT", "STRING", "TENSOR", "FLOATS", "INTS", "STRINGS", "TENSORS")
)
"""Types of attributes in which there is no graph."""


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


def subgraphs(node: onnx.NodeProto) -> Sequence[onnx.GraphProto]:
    """The graphs inside a node: bodies of loops, branches."""
    found = list[onnx.GraphProto]()
    for attribute in node.attribute:
        kind = attribute.type
        if kind == _GRAPH:
            found.append(attribute.g)
        elif kind not in _PLAIN:  # a list of graphs, or of a type that is not given
            found.extend(attribute.graphs)
    return found
