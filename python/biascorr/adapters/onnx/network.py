"""An ONNX model as a :class:`~biascorr.graph.network.Network`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx import files
from biascorr.adapters.onnx.bias import add_to_bias, bias_of, biased_output, reader_of_bias
from biascorr.adapters.onnx.edits import edit
from biascorr.adapters.onnx.graph import Graph, attributes, captured, named_nodes, subgraph_nodes, weight_index
from biascorr.adapters.onnx.lowering import lowered
from biascorr.adapters.onnx.quantizers import dequantizer_of, insert_fake_quantizer
from biascorr.adapters.onnx.runtime import Runner, session
from biascorr.adapters.onnx.surroundings import surroundings_of
from biascorr.calibration.data import ModelInput
from biascorr.calibration.storage import Buffers
from biascorr.graph.network import BiasChange, Edits, Feeds, Kind, Layer, LayerReport, Operation, Surroundings
from biascorr.quantization import Quantization
from biascorr.statistics import TransposedWindow, Window

_SPACE = {1: "W", 2: "HW", 3: "DHW"}

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_POINTWISE = {
    "Abs", "Add", "BatchNormalization", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "QuickGelu", "Relu", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Operators that activations are made of: each element of the output depends on one element of each input."""

_COPIES = {
    "Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators behind which weights are the same in another form."""

_WEIGHTED = {
    "ConvInteger", "DeformConv", "DynamicQuantizeMatMul", "FusedConv", "FusedGemm", "FusedMatMul", "FusedMatMulActivation",
    "GRU", "GemmFastGelu", "GemmFloat8", "LSTM", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "MoE", "NhwcConv", "NhwcFusedConv", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul", "QMoE",
    "QOrderedMatMul", "RNN", "TransposeMatMul",
}  # fmt: skip
"""Operators that multiply with weights and are not corrected; some of them only in forms that are not lowered."""


class OnnxNetwork:
    """A model, indexed, with its layers.

    What computes is the model with quantizers around layers of real numbers in place of operators that have quantized weights
    inside; what is corrected and saved is the model as it was given.

    Parameters
    ----------
    model : onnx.ModelProto
        Owned by this object, which edits its biases.
    name : str
        What errors call the model.
    """

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self._original = Graph(model)
        self._original_nodes = named_nodes(model)
        rewritten = lowered(model)
        self._graph = self._original if rewritten is None else Graph(rewritten)
        self._nodes = named_nodes(self._graph.model)
        self._name = name
        self.inputs = _inputs(model, name)
        self.outputs = [value.name for value in model.graph.output]
        self.operations = _operations(self._nodes, self._graph)
        self.layers: list[Layer] = []
        self.left_alone: list[LayerReport] = []
        self._graph.values(name for node in self._nodes.values() for name in _constants_of(node, self._graph))
        for node_name, node in self._nodes.items():
            found = self._layer(node_name, node)
            if isinstance(found, Layer):
                self.layers.append(found)
            elif found is not None:
                self.left_alone.append(LayerReport(node_name, node.op_type, reason=found))

    @classmethod
    def load(cls, model: Any, name: str) -> OnnxNetwork:
        """From a path, bytes or a ModelProto; see :func:`biascorr.adapters.onnx.files.load` for the errors."""
        loaded = files.load(model, name)
        session(loaded, name)  # refuses what is no valid model before anything is read from it
        return cls(loaded, name)

    @property
    def model(self) -> onnx.ModelProto:
        return self._original.model

    @property
    def order(self) -> Sequence[str]:
        """Names of all nodes, in topological order."""
        return list(self._nodes)

    @functools.cached_property
    def surroundings(self) -> Surroundings:
        return surroundings_of(self._graph, self._nodes)

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        files.save(self.model, path, force=force)

    def part(
        self, given: Feeds, wanted: Sequence[str], *, threads: int = 0, buffers: Buffers | None = None
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        computed = [name for name in wanted if name not in given]
        if not computed:
            return lambda feeds: {name: feeds[name] for name in wanted}
        values = [helper.make_tensor_value_info(name, _element_type(array), None) for name, array in given.items()]
        running = session(self._graph.part(values, computed), self._name, threads=threads)
        runner = Runner(running, computed, self._name, buffers)

        def compute(feeds: Feeds) -> dict[str, NDArray[Any]]:
            results = dict(zip(computed, runner(feeds)))
            return {name: feeds[name] if name in feeds else results[name] for name in wanted}

        return compute

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> OnnxNetwork:
        graph, nodes = self._copy_of_what_computes()
        position = {name: k for k, name in enumerate(nodes)}
        moved: dict[tuple[str, Quantization], str] = {}
        for name in sorted(quantizations, key=position.__getitem__):
            node, index = nodes[name], _activation_index(nodes[name], graph)
            key = node.input[index], quantizations[name]
            if key not in moved:
                dtype = graph.value(_weights_of(node, graph)).dtype
                moved[key] = insert_fake_quantizer(graph, key[0], dtype, key[1], node)
            graph.set_input(node, index, moved[key])
        return OnnxNetwork(graph.model, self._name)

    def edited(self, edits: Edits) -> OnnxNetwork:
        graph, nodes = self._copy_of_what_computes()
        limiting = [name for name in edits.limits if self._limits(name)]
        edit(graph, nodes, self.layers, limiting, edits)
        return OnnxNetwork(graph.model, self._name)

    def _limits(self, name: str) -> bool:
        activation = self.surroundings.activations.get(name)
        return activation is not None and activation.bounds is not None

    def copy(self) -> OnnxNetwork:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return OnnxNetwork(model, self._name)

    def _copy_of_what_computes(self) -> tuple[Graph, dict[str, onnx.NodeProto]]:
        """To be edited, and its nodes by name."""
        model = onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        return Graph(model), named_nodes(model)

    def add_to_bias(self, layer: Layer, shift: NDArray[Any]) -> BiasChange:
        change = add_to_bias(self._original, self._original_nodes[layer.name], layer, shift)
        if self._graph is not self._original:
            add_to_bias(self._graph, self._nodes[layer.name], layer, change.applied)
        return change

    def _layer(self, name: str, node: onnx.NodeProto) -> Layer | str | None:
        """The layer that a node is, the reason why it cannot be corrected, or None if it has no weights."""
        layers = {*_LAYERS, *_WEIGHTED}
        if any(inner.op_type in layers for inner in subgraph_nodes(node)):
            return "its subgraphs have layers, which are not corrected"
        if any(inner.op_type in layers for inner in self._graph.function_nodes(node)):
            return "its function has layers, which are not corrected"
        if self._graph.is_constant(node.output[0]):
            return None
        if node.op_type in _WEIGHTED:
            return "operator is not supported"
        if node.op_type == "MatMul":
            return self._matmul(name, node)
        if node.op_type not in _LAYERS:
            return None
        for what, given in zip(("weights are", "its bias is"), node.input[1:3]):
            if given and not self._graph.is_constant(given):
                return f"{what} computed at run time"
        return self._gemm(name, node) if node.op_type == "Gemm" else self._conv(name, node)

    def _conv(self, name: str, node: onnx.NodeProto) -> Layer | str:
        weights = self._graph.value(node.input[1])
        rank = weights.ndim - 2
        if rank not in _SPACE:
            return f"{rank} spatial axes, expected 1 to 3"
        given = attributes(node)
        transposed = node.op_type == "ConvTranspose"
        layout = f"{'IO' if transposed else 'OI'}{_SPACE[rank]}"
        window = (_transposed_window if transposed else _window)(given, weights.shape[2:])
        return self._found(name, node, weights, layout, 1, -rank - 1, groups=given.get("group", 1), window=window)

    def _gemm(self, name: str, node: onnx.NodeProto) -> Layer | str:
        given = attributes(node)
        if given.get("beta", 1.0) == 0.0:
            return "its bias has no effect (beta is 0)"
        layout = "OI" if given.get("transB", 0) else "IO"
        axis = 0 if given.get("transA", 0) else 1
        return self._found(name, node, self._graph.value(node.input[1]), layout, axis, -1, gain=given.get("alpha", 1.0))

    def _matmul(self, name: str, node: onnx.NodeProto) -> Layer | str | None:
        """x W contracts the last axis of x, W x the one before."""
        index = weight_index(node, self._graph)
        if not self._graph.is_constant(node.input[index]):
            return None
        weights = self._graph.value(node.input[index])
        if weights.ndim < 2 or any(size != 1 for size in weights.shape[:-2]):
            return f"weights of shape {weights.shape} are not one matrix"
        weights = weights.reshape(weights.shape[-2:])
        layout, axis = ("IO", -1) if index == 1 else ("OI", -2)
        return self._found(name, node, weights, layout, axis, axis)

    def _found(
        self,
        name: str,
        node: onnx.NodeProto,
        weights: NDArray[Any],
        layout: str,
        channel_axis: int,
        output_axis: int,
        **more: Any,
    ) -> Layer:
        """A layer, with what is found the same way for all operators."""
        index = weight_index(node, self._graph)
        tensor, quantization = self._read(node.input[1 - index])
        return Layer(
            name,
            node.op_type,
            weights,
            layout,
            tensor,
            quantization,
            channel_axis,
            biased_output(self._graph, node),
            output_axis,
            weight_step=self._weight_step(node.input[index], weights),
            bias=bias_of(self._graph, node, -1 - output_axis),
            shares_weights=_shares_weights(node, self._graph),
            **more,
        )

    def _weight_step(self, name: str, weights: NDArray[Any]) -> NDArray[Any] | None:
        dequantizer = dequantizer_of(self._graph, name)
        if dequantizer is None:
            return None
        steps = dequantizer.steps_of(self._graph.value(name).shape)
        return steps.reshape(steps.shape[steps.ndim - weights.ndim :])

    def _read(self, name: str) -> tuple[str, Quantization | None]:
        """What a layer reads: quantized values and what they stand for where they are dequantized just before it."""
        dequantizer = dequantizer_of(self._graph, name)
        if dequantizer is None or dequantizer.step.size != 1 or self._graph.is_constant(name):
            return name, None
        step, zero_point = float(dequantizer.step.item()), int(dequantizer.zero_point.item())
        return dequantizer.quantized, Quantization.from_step(step, zero_point)


def _window(given: Mapping[str, Any], taps: tuple[int, ...]) -> Window:
    """From the attributes of a Conv."""
    return Window(taps, *_moves(given, len(taps)))


def _transposed_window(given: Mapping[str, Any], taps: tuple[int, ...]) -> TransposedWindow:
    """From the attributes of a ConvTranspose."""
    strides, dilations, pads, auto_pad = _moves(given, len(taps))
    padding = tuple(given.get("output_padding", [0] * len(taps)))
    shape = tuple(given["output_shape"][-len(taps) :]) if given.get("output_shape") else None
    return TransposedWindow(taps, strides, dilations, pads, padding, shape, auto_pad)


def _moves(given: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...], str]:
    """Strides, dilations, pads and auto_pad of a convolution."""
    pads = given.get("pads", [0] * 2 * rank)
    auto_pad = given.get("auto_pad", b"NOTSET").decode()
    valid = auto_pad == "VALID"
    return (
        tuple(given.get("strides", [1] * rank)),
        tuple(given.get("dilations", [1] * rank)),
        ((0, 0),) * rank if valid else tuple(zip(pads[:rank], pads[rank:])),
        "NOTSET" if valid else auto_pad,
    )


def _operations(nodes: Mapping[str, onnx.NodeProto], graph: Graph) -> list[Operation]:
    operations, known = [], {value.name for value in graph.model.graph.input if value.name not in graph.initializers}
    for name, node in nodes.items():
        if not graph.is_constant(node.output[0]):
            inputs = tuple(dict.fromkeys(each for each in (*node.input, *captured(node)) if each in known))
            outputs = tuple(output for output in node.output if output)
            operations.append(Operation(name, inputs, outputs, _kind(node)))
            known.update(outputs)
    return operations


def _kind(node: onnx.NodeProto) -> Kind:
    kinds = {"QuantizeLinear": Kind.QUANTIZE, "DequantizeLinear": Kind.DEQUANTIZE}
    return kinds.get(node.op_type, Kind.POINTWISE if node.op_type in _POINTWISE else Kind.OTHER)


def _element_type(array: NDArray[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def _inputs(model: onnx.ModelProto, name: str) -> list[ModelInput]:
    defaults = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in defaults]
    for value in inputs:
        if not value.type.tensor_type.elem_type:
            raise ValueError(f"{name}: input {value.name} is not a tensor")
    return [_input(value) for value in inputs]


def _input(value: onnx.ValueInfoProto) -> ModelInput:
    tensor = value.type.tensor_type
    sizes = [axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in tensor.shape.dim]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return ModelInput(value.name, dtype, tuple(sizes) if tensor.HasField("shape") else None)


def _activation_index(node: onnx.NodeProto, graph: Graph) -> int:
    return 1 - weight_index(node, graph)


def _constants_of(node: onnx.NodeProto, graph: Graph) -> Iterator[str]:
    """The weights of a layer and its bias, where they are constant."""
    if node.op_type not in _LAYERS or not graph.is_constant(_weights_of(node, graph)):
        return
    yield _weights_of(node, graph)
    adds = reader_of_bias(graph, node)
    if adds is not None and graph.is_constant(adds[0].input[adds[1]]):
        yield adds[0].input[adds[1]]


def _shares_weights(node: onnx.NodeProto, graph: Graph) -> bool:
    name = _weights_of(node, graph)
    while graph.only_reader(name) is node:
        maker = graph.producer.get(name)
        if maker is None or maker.op_type not in _COPIES:
            return False
        node, name = maker, maker.input[0]
    return True


def _weights_of(node: onnx.NodeProto, graph: Graph) -> str:
    return str(node.input[weight_index(node, graph)])
