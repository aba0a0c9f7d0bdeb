"""An ONNX model as a network; see :mod:`biascorr.graph.network`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.frameworks import Framework, check_suffix
from biascorr.adapters.onnx import files
from biascorr.adapters.onnx.bias import Bias, bias_of, constant_bias
from biascorr.adapters.onnx.digest import digest_of
from biascorr.adapters.onnx.edits import edit
from biascorr.adapters.onnx.folded import folded_of, keep_folded
from biascorr.adapters.onnx.functions import called_by, check_functions
from biascorr.adapters.onnx.graph import Graph, attributes, captured, named_nodes, weight_index
from biascorr.adapters.onnx.lowering import PACKED_BITS, lowered, steps_of_n_bits, weights_of_n_bits
from biascorr.adapters.onnx.operators import (
    COLLECTING,
    COPIES,
    DYNAMIC,
    GIVING,
    LAYERS,
    POINTWISE,
    RECURRENT,
    UNWEIGHTED,
    WEIGHTED,
    operator_of,
    subgraph_nodes,
    subgraphs,
)
from biascorr.adapters.onnx.origin import all_nodes, format_of, producer_of, quantization_of, quantizer_of
from biascorr.adapters.onnx.quantizers import dequantizer_of, insert_fake_quantizer, range_of
from biascorr.adapters.onnx.roles import facts_of
from biascorr.adapters.onnx.runtime import Optimizations, Runner, Session, check
from biascorr.adapters.onnx.tensors import Values, is_foreign, whole_model
from biascorr.graph.layer import Constant, Layer, LazyArray, WeightFormat
from biascorr.graph.network import Allocator, BiasChange, Edits, Feeds, ModelInput, Shift
from biascorr.graph.operations import Facts, Kind, Operation
from biascorr.graph.origin import Origin
from biascorr.graph.reasons import LayerReport, Reason, ReasonCode
from biascorr.quantization import Quantization
from biascorr.windows import TransposedWindow, Window

_SPACE = {1: "W", 2: "HW", 3: "DHW"}


class OnnxNetwork:
    """A model, indexed, with its layers.

    The model that runs has quantizers around layers of real numbers in place of operators that have quantized activations
    inside; what is corrected and saved is the model as it was given.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; owned by this object, which does not change it.
    values : mapping
        The values of its detached tensors.
    name : str
        The name that errors give the model.
    """

    keeps_provenance = True

    packages = ("onnx", "onnxruntime")
    arithmetic = "8-bit products may saturate there, which quantizers avoid with 7-bit weights (reduce_range)"

    def __init__(self, model: onnx.ModelProto, values: Values, name: str) -> None:
        self._original = Graph(model, values)
        self._graph = lowered(model, values) or self._original
        self._original_nodes = named_nodes(self._original.nodes)
        self._nodes = named_nodes(self._graph.nodes)
        self._name = name
        self._facts: Facts | None = None
        self._whole: onnx.ModelProto | None = None
        self._digest: str | None = None
        self.inputs = _inputs(model, name)
        self.outputs = [value.name for value in model.graph.output]
        types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        self._foreign = {name: to for name, to in types.items() if is_foreign(to)}
        self.operations = _operations(self._nodes, self._graph)
        self.layers: list[Layer] = []
        self.unsupported: list[LayerReport] = []
        self._graph.compute(name for node in self._nodes.values() for name in self._small_constants(node))
        for node_name, node in self._nodes.items():
            found = self._layer(node_name, node)
            if isinstance(found, Layer):
                self.layers.append(found)
            elif found is not None:
                self.unsupported.append(LayerReport(node_name, operator_of(node), reasons=(found,)))

    @classmethod
    def load(cls, model: Any, name: str) -> OnnxNetwork:
        """From a path, bytes or a ModelProto; see :func:`biascorr.adapters.onnx.files.load` for the errors."""
        loaded, values = files.load(model, name)
        check_functions(loaded, name)
        check(loaded, values, name)  # refuses what is no valid model before anything is read from it
        with _fitting(name):
            found = cls(loaded, values, name)
            for layer in found.layers:
                _check_layer(layer)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self._original.model.SerializeToString(), self._original.values, self._name)

    @property
    def digest(self) -> str:
        """SHA-256 of the model as it was given, but for its provenance and texts for people."""
        if self._digest is None:
            self._digest = digest_of(self._original.model, self._original.values)
        return self._digest

    @property
    def model(self) -> onnx.ModelProto:
        """The model with all its tensors in it, made when it is first asked for."""
        if self._whole is None:
            self._whole = whole_model(self._original.model, self._original.values)
        return self._whole

    def taken_apart(self) -> tuple[onnx.ModelProto, Values]:
        """A copy of the model without its large tensors, and the values of these."""
        model = onnx.ModelProto()
        model.CopyFrom(self._original.model)
        return model, Values(self._original.values)

    @functools.cached_property
    def input_ranges(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest value of inputs that are quantized before anything else, to one grid of integers."""
        quantizers = {each.name: self._graph.only_reader(each.name) for each in self.inputs}
        ranges = {name: range_of(self._graph, node) for name, node in quantizers.items() if node is not None}
        return {name: found for name, found in ranges.items() if found is not None}

    @property
    def origin(self) -> Origin:
        """The format of the model, and who made it."""
        model = self._original.model
        nodes = list(all_nodes(model))
        with _fitting(self._name):
            outputs = [_input(value) for value in model.graph.output if value.type.tensor_type.elem_type]
        return Origin(format_of(model), quantization_of(nodes), quantizer_of(model, nodes), producer_of(model), outputs)

    @property
    def op_types(self) -> set[str]:
        """The operators of its nodes."""
        return {node.op_type for node in self._original.nodes}

    @property
    def order(self) -> Sequence[str]:
        """Names of all nodes, in topological order."""
        return list(self._nodes)

    def facts(self) -> Facts:
        """Facts about operations and tensors; inferred at the first call."""
        if self._facts is None:
            with _fitting(self._name):
                self._facts = facts_of(self._graph, self._nodes)
        return self._facts

    def save(self, path: str | PathLike[str], *, force: bool = False, provenance: str | None = None) -> None:
        """Writes the model, whole or not at all; with what was changed in :attr:`model` since.

        Provenance is metadata, with the key :data:`biascorr.adapters.onnx.files.PROVENANCE`.
        """
        check_suffix(path, Framework.ONNX)
        model, values = (self._original.model, self._original.values) if self._whole is None else (self._whole, Values())
        with files.with_provenance(model, provenance):
            files.save(model, values, path, force=force)

    def part(
        self, given: Feeds, wanted: Sequence[str], *, threads: int = 0, allocator: Allocator | None = None
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """Prepares a session that computes the wanted tensors."""
        computed = [name for name in dict.fromkeys(wanted) if name not in given]
        if not computed:
            return lambda feeds: {name: feeds[name] for name in wanted}
        types = {name: self._foreign.get(name) or _element_type(array) for name, array in given.items()}
        inputs = [helper.make_tensor_value_info(name, to, None) for name, to in types.items()]
        model = self._graph.part(inputs, computed)
        for output in model.graph.output:
            if output.name in self._foreign:
                output.type.tensor_type.elem_type = self._foreign[output.name]
        session = Session(model, self._graph.values, self._name, threads=threads)
        runner = Runner(session, computed, allocator)

        def compute(feeds: Feeds) -> dict[str, NDArray[Any]]:
            results = dict(zip(computed, runner(feeds)))
            return {name: feeds[name] if name in feeds else results[name] for name in wanted}

        return compute

    def deployed(self, *, threads: int = 0, optimized: bool = True) -> Callable[[Feeds], dict[str, Any]]:
        """Prepares a session of the model as it is saved, with all optimizers of onnxruntime or none."""
        model, values = onnx.ModelProto(), self._original.values
        model.CopyFrom(self._original.model)
        optimizations = Optimizations.DEFAULT if optimized else Optimizations.NONE
        session = Session(model, values, self._name, threads=threads, optimizations=optimizations)
        return lambda feeds: dict(zip(self.outputs, session.run(self.outputs, feeds)))

    def check(self) -> None:
        """Raises ValueError where onnxruntime does not take the model."""
        for optimizations in (Optimizations.NONE, Optimizations.DEFAULT):
            check(self._original.model, self._original.values, self._name, optimizations)

    def bias_change(self, layer: Layer, shift: Shift) -> BiasChange:
        """The change that adding a shift to the bias of a layer would make."""
        return bias_of(self._original, self._original_nodes[layer.name], layer.output_axis).change(layer, shift)

    def with_shifts(self, shifts: Mapping[str, Shift]) -> OnnxNetwork:
        """A copy with these shifts added to the biases of layers.

        They are to keep means as they are, so what is known of these stays.
        """
        graph, nodes = _copy(self._original)
        read = graph.read()
        folded = folded_of(graph)
        biases = {layer: bias_of(graph, nodes[layer.name], layer.output_axis) for layer in self.layers if layer.name in shifts}
        writers = [bias.prepare(layer, shifts[layer.name]) for layer, bias in biases.items()]
        for write in writers:
            write()
        graph.remove_dead(read)
        if folded:
            keep_folded(graph, folded)
        if graph.is_rewired or self._graph is not self._original:
            return OnnxNetwork(graph.model, graph.values, self._name)
        return self._with_biases(graph, nodes, biases)

    def _with_biases(self, graph: Graph, nodes: dict[str, onnx.NodeProto], biases: Mapping[Layer, Bias]) -> OnnxNetwork:
        """This network with a graph whose biases alone are others: what was found of its nodes holds."""
        other = OnnxNetwork.__new__(OnnxNetwork)  # copy.copy would make it anew, as from a pickle
        vars(other).update(vars(self))
        other._original = other._graph = graph
        other._original_nodes = other._nodes = nodes
        other._facts = other._whole = other._digest = None
        other.layers = [replace(layer, bias=biases[layer].read()) if layer in biases else layer for layer in self.layers]
        return other

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> OnnxNetwork:
        """A copy in which layers read their input moved to a grid."""
        graph, nodes = _copy(self._graph)
        moved: dict[tuple[str, Quantization], str] = {}
        for name, node in nodes.items():
            if name in quantizations:
                index = 1 - weight_index(node, graph)
                key = node.input[index], quantizations[name]
                if key not in moved:
                    dtype = graph.constant(node.input[1 - index]).dtype
                    moved[key] = insert_fake_quantizer(graph, key[0], dtype, key[1], node)
                graph.set_input(node, index, moved[key])
        return OnnxNetwork(graph.model, graph.values, self._name)

    def edited(self, edits: Edits) -> OnnxNetwork:
        """A copy with these edits."""
        graph, nodes = _copy(self._graph)
        limiting = [name for name in edits.limits if self._limits(name)]
        edit(graph, nodes, self.layers, limiting, edits)
        return OnnxNetwork(graph.model, graph.values, self._name)

    def _limits(self, name: str) -> bool:
        activation = self.facts().activation(name)
        return activation is not None and activation.type.bounds is not None

    def _small_constants(self, node: onnx.NodeProto) -> Iterator[str]:
        """The constants of a layer that are read at once, where they are computed."""
        if operator_of(node) in LAYERS and self._graph.is_constant(_weights_of(node, self._graph)):
            bias = constant_bias(self._graph, node)
            if bias is not None:
                yield bias

    def _layer(self, name: str, node: onnx.NodeProto) -> Layer | Reason | None:
        """The layer that a node is, the reason why it cannot be corrected, or None if it has no weights."""
        layers = {*LAYERS, *WEIGHTED}
        if any(operator_of(inner) in layers for inner in subgraph_nodes(node)):
            return ReasonCode.LAYERS_IN_SUBGRAPH()
        if not layers.isdisjoint(self._graph.called_operators(node)):
            return ReasonCode.LAYERS_IN_FUNCTION()
        if self._graph.is_constant(node.output[0]):
            return None
        operator = operator_of(node)
        if operator == "MatMulNBits":
            return self._matmul_n_bits(name, node)
        if operator in RECURRENT or operator in DYNAMIC:
            return ReasonCode.RECURRENT() if operator in RECURRENT else ReasonCode.DYNAMIC()
        if operator in ("Einsum", "MatMul"):
            return self._matmul(name, node) if operator == "MatMul" else self._einsum(name, node)
        if operator not in LAYERS:
            return ReasonCode.OPERATOR_UNSUPPORTED() if operator in WEIGHTED or self._reads_matrix(node) else None
        for reason, given in zip((ReasonCode.WEIGHTS_COMPUTED(), ReasonCode.BIAS_COMPUTED()), node.input[1:3]):
            if given and not self._graph.is_constant(given):
                return reason
        return self._gemm(name, node) if operator == "Gemm" else self._conv(name, node)

    def _reads_matrix(self, node: onnx.NodeProto) -> bool:
        """Whether an operator that could multiply with it reads a constant matrix."""
        if operator_of(node) in UNWEIGHTED or called_by(node) in self._graph.functions:
            return False
        constants = [self._graph.constant(each) for each in node.input if each and self._graph.is_constant(each)]
        return any(sum(size > 1 for size in each.shape) > 1 and each.dtype.kind not in "biUSO" for each in constants)

    def _conv(self, name: str, node: onnx.NodeProto) -> Layer | Reason:
        weights = self._graph.constant(node.input[1])
        rank = len(weights.shape) - 2
        if rank not in _SPACE:
            return ReasonCode.SPATIAL_AXES(count=rank)
        given = attributes(node)
        transposed = operator_of(node) == "ConvTranspose"
        layout = f"{'IO' if transposed else 'OI'}{_SPACE[rank]}"
        window = (_transposed_window if transposed else _window)(given, weights.shape[2:])
        return self._found(name, node, weights, layout, 1, -rank - 1, groups=given.get("group", 1), window=window)

    def _gemm(self, name: str, node: onnx.NodeProto) -> Layer | Reason:
        given = attributes(node)
        if given.get("beta", 1.0) == 0.0:
            return ReasonCode.BIAS_WITHOUT_EFFECT()
        layout = "OI" if given.get("transB", 0) else "IO"
        axis = 0 if given.get("transA", 0) else 1
        weights = self._graph.constant(node.input[1])
        return self._found(name, node, weights, layout, axis, -1, gain=given.get("alpha", 1.0))

    def _matmul(self, name: str, node: onnx.NodeProto) -> Layer | Reason | None:
        """x W contracts the last axis of x, W x the one before."""
        index = weight_index(node, self._graph)
        if not self._graph.is_constant(node.input[index]):
            return None
        weights = self._graph.constant(node.input[index])
        shape = weights.shape
        if len(shape) < 2 or any(size != 1 for size in shape[:-2]):
            return ReasonCode.NOT_ONE_MATRIX(shape=shape)
        if len(shape) > 2:
            batched = weights
            weights = LazyArray(shape[-2:], weights.dtype, lambda: np.asarray(batched).reshape(shape[-2:]))
        if index == 1:
            return self._found(name, node, weights, "IO", -1, -1)
        axis = -1 if self._graph.rank(node.input[1]) == 1 else -2
        return self._found(name, node, weights, "OI", axis, axis)

    def _einsum(self, name: str, node: onnx.NodeProto) -> Layer | Reason | None:
        """A product with one matrix, wherever its axes are: each of them is summed over, or is the channels of the output."""
        index = weight_index(node, self._graph)
        if len(node.input) != 2 or not self._graph.is_constant(node.input[index]):
            return ReasonCode.OPERATOR_UNSUPPORTED() if self._reads_matrix(node) else None
        weights, equation = self._graph.constant(node.input[index]), attributes(node)["equation"].decode()
        axes = axes_of_product(equation, index)
        if axes is None or len(weights.shape) != 2:
            return ReasonCode.NO_MATRIX_PRODUCT(equation=equation)
        return self._found(name, node, weights, *axes)

    def _matmul_n_bits(self, name: str, node: onnx.NodeProto) -> Layer | Reason:
        """Runs as it is; its weights are dequantized where they are read."""
        graph, given = self._graph, attributes(node)
        inputs = [*node.input, *[""] * (6 - len(node.input))]
        is_unknown = given.setdefault("bits", 4) not in PACKED_BITS or given.get("weight_prepacked", 0) or inputs[4]
        constants = [each for each in (*inputs[1:4], inputs[5]) if each]
        if is_unknown or not all(map(graph.is_constant, constants)):
            return ReasonCode.OPERATOR_UNSUPPORTED()
        scales = graph.constant(inputs[2])

        def read() -> NDArray[Any]:
            zero_points = graph.value(inputs[3]) if inputs[3] else None
            return weights_of_n_bits(given, graph.value(inputs[1]), graph.value(inputs[2]), zero_points)

        shape = given["K"], given["N"]
        bias = bias_of(graph, node, -1)
        return Layer(
            name,
            "MatMul",
            LazyArray(shape, scales.dtype, read),
            "IO",
            node.input[0],
            None,
            -1,
            bias.output,
            -1,
            weight_step=LazyArray((1, given["N"]), scales.dtype, lambda: steps_of_n_bits(given, graph.value(inputs[2]))),
            bias=bias.read(),
            shares_weights=graph.only_reader(inputs[1]) is not node,
            weight_format=WeightFormat(f"uint{given['bits']}", "block", given["block_size"]),
        )

    def _found(
        self, name: str, node: onnx.NodeProto, weights: Constant, layout: str, channel_axis: int, output_axis: int, **more: Any
    ) -> Layer:
        """A layer, with what is found the same way for all operators."""
        index = weight_index(node, self._graph)
        tensor, quantization = self._read(node.input[1 - index])
        bias = bias_of(self._graph, node, output_axis)
        return Layer(
            name,
            operator_of(node),
            weights,
            layout,
            tensor,
            quantization,
            channel_axis,
            bias.output,
            output_axis,
            weight_step=self._weight_step(node.input[index], weights),
            bias=bias.read(),
            shares_weights=_shares_weights(node, self._graph),
            weight_format=self._weight_format(node.input[index]),
            **more,
        )

    def _weight_format(self, name: str) -> WeightFormat | None:
        dequantizer = dequantizer_of(self._graph, name)
        if dequantizer is None:
            return None
        scales = "block" if dequantizer.block_size else "channel" if dequantizer.step.size > 1 else "tensor"
        return WeightFormat(self._graph.constant(dequantizer.quantized).dtype.name, scales, dequantizer.block_size)

    def _weight_step(self, name: str, weights: Constant) -> Constant | None:
        dequantizer = dequantizer_of(self._graph, name)
        if dequantizer is None:
            return None
        shape, axes = self._graph.constant(name).shape, len(weights.shape)
        if not dequantizer.block_size and not dequantizer.is_coarser(self._graph):
            steps = dequantizer.steps_of(shape)
            return steps.reshape(steps.shape[steps.ndim - axes :])
        return LazyArray(shape[-axes:], weights.dtype, lambda: dequantizer.spacings(self._graph, shape).reshape(shape[-axes:]))

    def _read(self, name: str) -> tuple[str, Quantization | None]:
        """The tensor that a layer reads: quantized values and their quantization where they are dequantized just before it."""
        dequantizer = dequantizer_of(self._graph, name)
        if dequantizer is None or not dequantizer.is_even or self._graph.is_constant(name):
            return name, None
        step, zero_point = float(dequantizer.step.item()), int(dequantizer.zero_point.item())
        return dequantizer.quantized, Quantization.from_step(step, zero_point)


def _arrived(serialized: bytes, values: Values, name: str) -> OnnxNetwork:
    """The network that was pickled."""
    return OnnxNetwork(onnx.ModelProto.FromString(serialized), values, name)


@contextlib.contextmanager
def _fitting(name: str) -> Iterator[None]:
    """What is raised at models that onnxruntime takes, although their parts do not fit: it finds that when it runs them."""
    try:
        yield
    except (AttributeError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        said = str(error)
        if type(error) is ValueError and said.startswith(f"{name}:"):
            raise
        raise ValueError(f"{name}: a damaged ONNX model: {said}") from error


def _check_layer(layer: Layer) -> None:
    """Raises ValueError where what belongs to a layer does not fit its weights."""
    counted = layer.weights.shape[0] if layer.window is not None else layer.groups
    if layer.groups < 1 or counted % layer.groups:
        raise ValueError(f"layer {layer.name}: weights of shape {tuple(layer.weights.shape)} for {layer.groups} groups")
    if layer.weight_step is not None and not _fits(layer.weight_step.shape, layer.weights.shape):
        shapes = f"{tuple(layer.weight_step.shape)} for weights of shape {tuple(layer.weights.shape)}"
        raise ValueError(f"layer {layer.name}: scales of shape {shapes}")
    if layer.bias is None or layer.bias.ndim < -layer.output_axis:
        return
    if layer.channels > 1 and layer.bias.shape[layer.output_axis] not in (1, layer.channels):
        raise ValueError(f"layer {layer.name}: a bias of shape {layer.bias.shape} for {layer.channels} output channels")


def _fits(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether an array can be broadcast to another one of this shape."""
    return len(shape) <= len(whole) and all(size in (1, full) for size, full in zip(shape[::-1], whole[::-1]))


def axes_of_product(equation: str, index: int) -> tuple[str, int, int] | None:
    """Layout of the weights, the input's axis of channels and the output's, of an Einsum with a matrix as this operand.

    None where it is no product with one matrix.
    """
    operands, _, output = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    matrix, tensor = terms[index], terms[1 - index]
    letters = [*matrix, *tensor.replace("...", ""), *output.replace("...", "")]
    plain = "->" in equation and len(matrix) == 2 and all(letter.isalpha() for letter in letters)
    once = all(len(set(term.replace("...", ""))) == len(term.replace("...", "")) for term in (matrix, tensor, output))
    if not plain or not once:
        return None
    summed, channels, layout = matrix[0], matrix[1], "IO"
    if summed in output:
        summed, channels, layout = channels, summed, "OI"
    others = set(tensor.replace("...", "")) - {summed}
    same = others == set(output.replace("...", "")) - {channels} and ("..." in tensor) == ("..." in output)
    if not same or summed not in tensor or channels not in output or channels in tensor:
        return None
    after = tensor.partition(summed)[2], output.partition(channels)[2]
    return None if "..." in "".join(after) else (layout, -1 - len(after[0]), -1 - len(after[1]))


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
    others: set[str] = set()  # tensors that numpy has no type for
    for name, node in nodes.items():
        if not graph.is_constant(next(filter(None, node.output), "")):
            inputs = tuple(dict.fromkeys(each for each in (*node.input, *captured(node)) if each in known))
            outputs = tuple(output for output in node.output if output)
            is_lasting = not _collects(node, graph) and not _makes_other_type(node, graph, others)
            others.update(() if is_lasting else outputs)
            operations.append(Operation(name, inputs, outputs, _kind(node), is_lasting))
            known.update(outputs)
    return operations


def _collects(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether a node, a branch of it or a function that it calls may give what is no array that numpy has."""
    types = [value.type for inner in subgraphs(node) for value in inner.output if value.type.WhichOneof("value")]
    others = any(not each.HasField("tensor_type") or is_foreign(each.tensor_type.elem_type) for each in types)
    return others or not COLLECTING.isdisjoint({operator_of(node), *graph.called_operators(node)})


def _makes_other_type(node: onnx.NodeProto, graph: Graph, others: Set[str]) -> bool:
    """Whether the output of a node is of a type that numpy has not; other operators than these keep the type they read."""
    given, operator = attributes(node), operator_of(node)
    if operator in ("Cast", "QuantizeLinear"):
        zero_point = graph.constant(node.input[2]).dtype if len(node.input) > 2 and graph.is_constant(node.input[2]) else None
        to = given.get("to") or given.get("output_dtype")
        return is_foreign(to) if to else zero_point is not None and zero_point.isbuiltin != 1
    return operator not in GIVING and not others.isdisjoint(node.input)


def _kind(node: onnx.NodeProto) -> Kind:
    kinds = {"QuantizeLinear": Kind.QUANTIZE, "DequantizeLinear": Kind.DEQUANTIZE, "Shape": Kind.SHAPE, "Size": Kind.SHAPE}
    return kinds.get(operator_of(node), Kind.POINTWISE if operator_of(node) in POINTWISE else Kind.OTHER)


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
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        raise ValueError(f"{value.name}: unknown data type {tensor.elem_type}") from None
    symbols = tuple(axis.dim_param for axis in tensor.shape.dim)
    return ModelInput(value.name, dtype, tuple(sizes) if tensor.HasField("shape") else None, symbols)


def _copy(graph: Graph) -> tuple[Graph, dict[str, onnx.NodeProto]]:
    """To be edited, and its nodes by name."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    copy = Graph(model, Values(graph.values))
    return copy, named_nodes(copy.nodes)


def _shares_weights(node: onnx.NodeProto, graph: Graph) -> bool:
    name = _weights_of(node, graph)
    while graph.only_reader(name) is node:
        maker = graph.producer.get(name)
        if maker is None or operator_of(maker) not in COPIES:
            return False
        node, name = maker, maker.input[0]
    return True


def _weights_of(node: onnx.NodeProto, graph: Graph) -> str:
    return str(node.input[weight_index(node, graph)])
