"""Where the bias of a layer is kept, and how it is read, added to and set: one class for each form of storage.

A bias is an input of the layer, or the constant of an Add that alone reads the layer's output, directly or after a
QuantizeLinear and DequantizeLinear. Either is float, or integers before DequantizeLinear, which are rounded again with their
own step. A layer with neither gets a bias: an input of a Conv or Gemm, quantized as ONNX quantizers do it where the layer is
quantized; an Add after a product, of quantized values where its output is quantized.

Operators with quantized weights inside keep theirs as they do: int32 in the steps of their products, 8 bits in a QLinearAdd.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx.graph import Graph, attributes
from biascorr.adapters.onnx.operators import CONTRIBUTED, operator_of
from biascorr.adapters.onnx.quantizers import Dequantizer, bias_steps, dequantizer_of
from biascorr.graph.axes import aligned
from biascorr.graph.layer import Layer
from biascorr.graph.network import BiasChange, Shift
from biascorr.graph.reasons import Reason, ReasonCode

_OWN_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "MatMulNBits": 5}
"""Operators with an input for a bias of real numbers, or of integers before DequantizeLinear."""

_INTEGER_BIAS = {"QLinearConv": 8, "QGemm": 6}
"""Operators with an input for a bias in int32, in the steps of their products."""

_ADDS = {"Add": (0, 1), "QLinearAdd": (0, 3)}
"""Operators that add, and the inputs that they add."""

_STEP_ERROR = 1 / 64
"""Part of itself by which the step of a bias may differ from that of its products, which integer kernels take for it."""

_QUANTIZED_PRODUCTS = 10
"""The opset that gave ONNX the QLinearMatMul that onnxruntime makes of a product between quantizers."""

_LOST = 1 / 8
"""Part of a shift that may be lost between the steps of a grid."""

_RESHAPES = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that keep the values of a tensor and their order."""


class Bias(abc.ABC):
    """The bias of a layer.

    Parameters
    ----------
    graph : Graph
        The graph that the layer is in.
    node : onnx.NodeProto
        The layer.
    output_axis : int
        Axis of its output that has the channels, from the end.
    """

    def __init__(self, graph: Graph, node: onnx.NodeProto, output_axis: int) -> None:
        self._graph = graph
        self._node = node
        self._axis = output_axis

    @property
    def output(self) -> str:
        """The tensor that the layer makes, bias included."""
        return str(self._node.output[0])

    def read(self) -> NDArray[Any] | None:
        """The bias in real units, its axes aligned with the last ones of the output; None where there is none."""
        return None

    @abc.abstractmethod
    def change(self, layer: Layer, shift: Shift) -> BiasChange:
        """The change that adding a shift would make."""

    def add(self, layer: Layer, shift: Shift) -> None:
        """Adds a shift."""
        self.prepare(layer, shift)()

    @abc.abstractmethod
    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:
        """Finds the new values and their place, before anything in the graph changes; the result writes them."""

    @abc.abstractmethod
    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        """Makes the bias another one, aligned with the last axes of the output."""

    def _name(self, suffix: str = "") -> str:
        return f"{self._node.output[0]}_bias{suffix}"

    def _for_add(self, shift: Shift) -> Shift:
        """A shift as an Add gets it: with all axes of the output where the layer is quantized, as far as these are known.

        An Add of a vector becomes part of a Gemm in onnxruntime, which then quantizes its bias by operators that are not in
        every opset, and reshapes some inputs in a way that it refuses itself.
        """
        shift = aligned(shift, self._axis)
        is_quantized = any(dequantizer_of(self._graph, each) is not None for each in self._node.input)
        rank = (self._graph.rank(self._node.output[0]) if is_quantized else None) or 0
        return shift.reshape((1,) * (rank - shift.ndim) + shift.shape)


def bias_of(graph: Graph, node: onnx.NodeProto, output_axis: int) -> Bias:
    """The bias of a layer, in the form that it has."""
    if operator_of(node) in _INTEGER_BIAS:
        return _ProductBias(graph, node, output_axis)
    place = _place_of_bias(graph, node)
    if place is None and _is_clamped(graph, node):
        return _NoBias(graph, node, output_axis)
    if place is None and operator_of(node) in ("Conv", "ConvTranspose", "Gemm"):
        return _NewInput(graph, node, output_axis)
    if place is None:
        return (_NewAdd if _output_grid(graph, node) is None else _NewQuantizedAdd)(graph, node, output_axis)
    reader, index = place
    if operator_of(reader) == "QLinearAdd":
        return _AddedBias(graph, node, output_axis, reader, index)
    source, at = _source(graph, reader, index)
    dequantizer = dequantizer_of(graph, source.input[at])
    if dequantizer is not None and _holds_integers(graph, dequantizer.quantized):
        return _QuantizedBias(graph, node, output_axis, reader, index)
    return _RealBias(graph, node, output_axis, reader, index)


def _place_of_bias(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """The node that adds the bias of a layer, and which of its inputs the bias is; None where there is none."""
    index = _OWN_BIAS.get(operator_of(node))
    if index is not None and index < len(node.input) and node.input[index]:
        return node, index
    return None if operator_of(node) == "Gemm" else _following_add(graph, node)


def constant_bias(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The constant tensor that a bias is read from; None where there is none."""
    reader, index = _place_of_bias(graph, node) or (node, None)
    return None if index is None or not graph.is_constant(reader.input[index]) else str(reader.input[index])


def _following_add(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """The Add or QLinearAdd of a constant that alone reads the output, and which of its inputs the constant is."""
    name = node.output[0]
    reader = graph.only_reader(name)
    for quantizer in ("QuantizeLinear", "DequantizeLinear"):
        if reader is not None and operator_of(reader) == quantizer:
            name = reader.output[0]
            reader = graph.only_reader(name)
    if reader is None or operator_of(reader) not in _ADDS:
        return None
    first, second = _ADDS[operator_of(reader)]
    index = second if reader.input[first] == name else first
    return (reader, index) if graph.is_constant(reader.input[index]) else None


def _source(graph: Graph, reader: onnx.NodeProto, index: int) -> tuple[onnx.NodeProto, int]:
    """The node that reads a constant before it is reshaped for one that alone reads it, and which of its inputs it is."""
    while graph.only_reader(reader.input[index]) is reader:
        source = graph.producer.get(reader.input[index])
        if source is None or not (operator_of(source) in _RESHAPES or _is_narrowing(graph, source)):
            break
        reader, index = source, 0
    return reader, index


def _is_narrowing(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node casts real numbers to a type whose numbers the type that they have has too."""
    if operator_of(node) != "Cast":
        return False
    before, after = graph.constant(node.input[0]).dtype, graph.constant(node.output[0]).dtype
    return before.kind == after.kind == "f" and before.itemsize >= after.itemsize


def _holds_integers(graph: Graph, name: str) -> bool:
    return graph.is_constant(name) and graph.value(name).dtype.kind in "iu"


def _is_clamped(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether the output is quantized to values of one sign: maybe in place of a Relu, before which biases belong."""
    if operator_of(node) != "QLinearMatMul":
        return False
    zero_point = graph.value(node.input[7])
    limits = np.iinfo(zero_point.dtype)
    return zero_point.item() in (limits.min, limits.max)


def gets_quantized_bias(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a product has no bias, and one could be added to its quantized output."""
    return _place_of_bias(graph, node) is None and _output_grid(graph, node) is not None


def _output_grid(graph: Graph, node: onnx.NodeProto) -> tuple[list[str], str] | None:
    """Step and zero point of the quantized output of a product, and the domain of quantizers for it.

    None where it has none, or not an even grid of both signs.
    """
    if graph.opset < _QUANTIZED_PRODUCTS:
        return None
    quantizer, given = node, list(node.input[6:8])
    if operator_of(node) != "QLinearMatMul":
        reader = graph.only_reader(node.output[0])
        if reader is None or operator_of(reader) != "QuantizeLinear" or attributes(reader).keys() - {"axis", "saturate"}:
            return None
        quantizer, given = reader, list(reader.input[1:3])
    if len(given) < 2 or not all(each and graph.is_constant(each) for each in given):
        return None
    step, zero_point = map(graph.value, given)
    is_even = zero_point.dtype.kind in "iu" and zero_point.dtype.itemsize * 4 <= step.dtype.itemsize * 2
    if step.size != 1 or not is_even or not np.isfinite(step).all() or not (step > 0).all():
        return None
    limits = np.iinfo(zero_point.dtype)
    return None if zero_point.item() in (limits.min, limits.max) else (given, quantizer.domain)


def _per_channel(change: NDArray[Any], axis: int) -> Shift:
    """The change of each channel, where a bias has other axes too."""
    channels = np.moveaxis(change, axis, 0)
    return np.asarray(channels.reshape(len(channels), -1).mean(axis=1), dtype=np.float64)


class _ConstantBias(Bias):
    """A constant input of the layer, or of an Add after it."""

    def __init__(self, graph: Graph, node: onnx.NodeProto, output_axis: int, reader: onnx.NodeProto, index: int) -> None:
        super().__init__(graph, node, output_axis)
        self._reader = reader
        self._index = index
        self._is_own = reader is node
        self._factor = attributes(node).get("beta", 1.0)  # of a Gemm: y = alpha A B + beta C

    @property
    def output(self) -> str:
        return str(self._reader.output[0])

    def _values(self) -> NDArray[Any]:
        return self._graph.value(self._reader.input[self._index])

    def read(self) -> NDArray[Any] | None:
        if operator_of(self._node) == "Gemm":
            return np.asarray(self._values() * self._factor)
        return aligned(self._values(), self._axis) if self._is_own else self._values()

    def change(self, layer: Layer, shift: Shift) -> BiasChange:  # noqa: ARG002
        _, applied, reasons = self._moved(self._as_stored(shift))
        return BiasChange(_per_channel(applied, -1 if self._is_own else self._axis) * self._factor, reasons)

    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:  # noqa: ARG002
        stored = self._as_stored(shift)
        return self._writer(self._moved(stored)[0], stored)

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        if not self._is_own or operator_of(self._node) == "Gemm":  # where it is smaller than the one before, it is repeated
            bias = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, self._values().shape))
        stored = bias / self._factor if operator_of(self._node) == "Gemm" else bias.reshape(-1) if self._is_own else bias
        self._graph.set_constant(self._reader, self._index, stored.astype(layer.weights.dtype), self._name())

    def _as_stored(self, shift: Shift) -> Shift:
        if self._is_own:
            return np.asarray(shift / self._factor)
        stored, shape = aligned(shift, self._axis), self._values().shape
        return stored if np.broadcast_shapes(stored.shape, shape) == shape else self._for_add(shift)

    @abc.abstractmethod
    def _moved(self, shift: Shift) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
        """The values after a shift, in the shape in which they are added; the change in real units; remarks."""

    @abc.abstractmethod
    def _writer(self, values: NDArray[Any], shift: Shift) -> Callable[[], None]:
        """Writes new values where the old ones are; at the node that adds them where they have grown."""

    def _source(self, shift: Shift) -> tuple[onnx.NodeProto, int]:
        shape = self._values().shape
        if np.broadcast_shapes(shape, shift.shape) != shape:
            return self._reader, self._index
        return _source(self._graph, self._reader, self._index)


class _RealBias(_ConstantBias):
    """Real numbers."""

    def _moved(self, shift: Shift) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
        values, (source, at) = self._values(), self._source(shift)
        moved = (values + shift).astype(values.dtype)
        maker = self._graph.producer.get(source.input[at])
        is_computed = maker is not None and operator_of(maker) not in ("Constant", *_RESHAPES)
        return moved, np.subtract(moved, values, dtype=np.float64), (ReasonCode.BIAS_REWRITTEN(),) if is_computed else ()

    def _writer(self, values: NDArray[Any], shift: Shift) -> Callable[[], None]:
        source, at = self._source(shift)
        before = values if source is self._reader else self._graph.value(source.input[at])
        stored, name = values.reshape(before.shape).astype(before.dtype), f"{self._reader.output[0]}_bias"
        return lambda: self._graph.set_constant(source, at, stored, name)


class _QuantizedBias(_RealBias):
    """Integers before DequantizeLinear."""

    def _dequantizer(self, shift: Shift) -> Dequantizer | None:
        """None where the values must grow, to hold the shift, after they are reshaped: they become real numbers."""
        source, at = self._source(shift)
        return dequantizer_of(self._graph, source.input[at])

    def _moved(self, shift: Shift) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
        dequantizer = self._dequantizer(shift)
        if dequantizer is None:
            return super()._moved(shift)
        shape, values = self._values().shape, self._graph.value(dequantizer.quantized)
        steps = dequantizer.steps_of(np.atleast_1d(values).shape)
        if shape != values.shape:
            steps = np.broadcast_to(steps, values.shape).reshape(shape)
        return _rounded(values.reshape(shape), steps, shift)

    def _writer(self, values: NDArray[Any], shift: Shift) -> Callable[[], None]:
        dequantizer = self._dequantizer(shift)
        if dequantizer is None:
            return super()._writer(values, shift)
        graph, (source, at), node = self._graph, self._source(shift), dequantizer.node
        before = graph.value(dequantizer.quantized)
        kept = values if values.size != before.size else values.reshape(before.shape)
        is_own = graph.only_reader(source.input[at]) is source
        quantizer = graph.producer.get(dequantizer.quantized) if is_own else None
        is_alone = graph.only_reader(dequantizer.quantized) is node
        if quantizer is not None and operator_of(quantizer) == "QuantizeLinear" and is_alone:
            real = self._unquantized(graph.value(quantizer.input[0]), dequantizer, before, kept)
            return lambda: graph.set_constant(quantizer, 0, real, f"{source.output[0]}_bias")

        def write() -> None:
            own = node if is_own else _copy_of(graph, node, source, at)
            graph.set_constant(own, 0, kept, f"{source.output[0]}_bias_quantized")

        return write

    @staticmethod
    def _unquantized(real: NDArray[Any], dequantizer: Dequantizer, before: NDArray[Any], after: NDArray[Any]) -> NDArray[Any]:
        """The real numbers that are quantized to these values; those whose value stays, stay."""
        steps = np.broadcast_to(dequantizer.steps_of(np.atleast_1d(after).shape), np.atleast_1d(after).shape)
        moved = (after.astype(np.float64) - dequantizer.zero_point.astype(np.float64)) * steps.reshape(after.shape)
        return np.where(after == before, real, moved).astype(real.dtype)


class _AddedBias(_ConstantBias):
    """Integers of a QLinearAdd, with a step of their own."""

    def read(self) -> NDArray[Any]:
        zero_point = self._graph.value(self._reader.input[self._index + 2]).astype(np.float64)
        return np.asarray((self._values() - zero_point) * self._step())

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        self.add(layer, _per_channel(np.asarray(bias - self.read()), self._axis))

    def _step(self) -> NDArray[Any]:
        return self._graph.value(self._reader.input[self._index + 1]).astype(np.float64).reshape(())

    def _moved(self, shift: Shift) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
        return _rounded(self._values(), self._step(), shift)

    def _writer(self, values: NDArray[Any], shift: Shift) -> Callable[[], None]:  # noqa: ARG002
        name = f"{self._reader.output[0]}_bias"
        return lambda: self._graph.set_constant(self._reader, self._index, values, name)


class _ProductBias(Bias):
    """int32 in the steps of the products that an operator sums, or none yet."""

    def _values(self, layer: Layer) -> tuple[NDArray[Any], bool]:
        index = _INTEGER_BIAS[operator_of(self._node)]
        exists = index < len(self._node.input) and bool(self._node.input[index])
        return self._graph.value(self._node.input[index]) if exists else np.zeros(layer.channels, np.int32), exists

    def _moved(self, layer: Layer, shift: Shift) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
        values, exists = self._values(layer)
        moved, applied, reasons = _rounded(values, bias_steps(self._graph, self._node), shift)
        return moved, applied, reasons if exists else (ReasonCode.BIAS_ADDED(), *reasons)

    def read(self) -> NDArray[Any] | None:
        index = _INTEGER_BIAS[operator_of(self._node)]
        if index >= len(self._node.input) or not self._node.input[index]:
            return None
        return aligned(self._graph.value(self._node.input[index]) * bias_steps(self._graph, self._node), self._axis)

    def change(self, layer: Layer, shift: Shift) -> BiasChange:
        _, applied, reasons = self._moved(layer, shift)
        return BiasChange(_per_channel(applied, -1), reasons)

    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:
        (moved, *_), index = self._moved(layer, shift), _INTEGER_BIAS[operator_of(self._node)]
        return lambda: self._graph.set_constant(self._node, index, moved, self._name("_quantized"))

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        before = self.read()
        self.add(layer, np.asarray(bias if before is None else bias - before, dtype=np.float64).reshape(-1))


class _NewInput(Bias):
    """None yet, of an operator with an input for it: real, or int32 before DequantizeLinear where the layer is quantized."""

    def __init__(self, graph: Graph, node: onnx.NodeProto, output_axis: int) -> None:
        super().__init__(graph, node, output_axis)
        self._factor = attributes(node).get("beta", 1.0)

    def change(self, layer: Layer, shift: Shift) -> BiasChange:
        values, step, reasons = self._values(layer, shift)
        if self._stays(reasons):
            return BiasChange(None, (ReasonCode.STEP_TOO_SMALL(dtype=layer.weights.dtype.name),))
        real = values.astype(np.float64) * (1.0 if step is None else step.astype(np.float64))
        return BiasChange(real * self._factor, (ReasonCode.BIAS_ADDED(), *reasons))

    def _values(self, layer: Layer, shift: Shift) -> tuple[NDArray[Any], NDArray[Any] | None, tuple[Reason, ...]]:
        """Values, the step that they are multiplied by, None where they are real, and remarks."""
        step, reasons = self._step(layer)
        if step is None:
            return (shift / self._factor).astype(layer.weights.dtype), None, reasons
        values, _, reasons = _rounded(np.zeros(layer.channels, np.int32), step, shift / self._factor)
        return values, step, reasons

    def _dequantizers(self) -> list[Dequantizer | None]:
        return [dequantizer_of(self._graph, each) for each in self._node.input[:2]]

    def _step(self, layer: Layer) -> tuple[NDArray[Any] | None, tuple[Reason, ...]]:
        """The product of the steps of both operands, () or (channels,), in their type.

        None where one is not quantized so, or their type has no number near it, which is remarked.
        """
        dequantizers = self._dequantizers()
        steps = [None if each is None else _steps_of_channels(each, layer) for each in dequantizers]
        known = [step.astype(np.float64) for step in steps if step is not None]
        if len(known) < len(steps):
            return None, ()
        product = np.asarray(functools.reduce(np.multiply, known))
        dtype = steps[1].dtype if steps[1] is not None else product.dtype
        step = product.astype(dtype)
        if (np.abs(step - product) > _STEP_ERROR * product).any():
            return None, (ReasonCode.BIAS_STEP_TOO_SMALL(dtype=dtype.name),)
        return step, ()

    def _stays(self, reasons: tuple[Reason, ...]) -> bool:
        """Whether there is no step for a bias, and none for the one that onnxruntime makes of a real one before a quantizer."""
        reader = self._graph.only_reader(self._node.output[0])
        return bool(reasons) and reader is not None and operator_of(reader) == "QuantizeLinear"

    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:
        values, step, reasons = self._values(layer, shift)
        return lambda: None if self._stays(reasons) else self._write(values, step)

    def _write(self, values: NDArray[Any], step: NDArray[Any] | None) -> None:
        graph, node = self._graph, self._node
        weights = self._dequantizers()[1]
        if step is None or weights is None:
            graph.set_input(node, 2, graph.add_initializer(self._name(), values))
            return
        constants = {"_quantized": values, "_scale": step, "_zero_point": np.zeros(step.shape, np.int32)}
        inputs = [graph.add_initializer(self._name(suffix), array) for suffix, array in constants.items()]
        output = graph.fresh_name(self._name())
        name, domain = f"{output}_DequantizeLinear", weights.node.domain
        dequantize = helper.make_node("DequantizeLinear", inputs, [output], graph.fresh_name(name), domain=domain)
        if step.size > 1 or domain == CONTRIBUTED:
            dequantize.attribute.append(helper.make_attribute("axis", 0))
        dequantize.attribute.extend(each for each in weights.node.attribute if each.name == "output_dtype")
        graph.set_input(node, 2, output)
        graph.insert(dequantize, node, after=False)

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        stored = bias / self._factor if operator_of(self._node) == "Gemm" else bias.reshape(-1)
        self._graph.set_constant(self._node, 2, stored.astype(layer.weights.dtype), self._name())


class _NewAdd(Bias):
    """None yet, of an operator without an input for it: an Add after the layer.

    It takes over the name of the output, so that nothing else changes.
    """

    def change(self, layer: Layer, shift: Shift) -> BiasChange:
        return BiasChange(shift.astype(layer.weights.dtype).astype(np.float64), (ReasonCode.BIAS_ADDED(),))

    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:
        bias = self._for_add(shift)
        return lambda: self._write_real(layer, bias)

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        self._write_real(layer, bias)

    def _write_real(self, layer: Layer, bias: NDArray[Any]) -> None:
        graph, node, output = self._graph, self._node, self._node.output[0]
        constant = graph.add_initializer(self._name(), bias.astype(layer.weights.dtype))
        node.name = layer.name  # of a node without one, the layer would change its name with the output
        graph.give_up_output(node, f"{output}_before_bias")
        add = helper.make_node("Add", [node.output[0], constant], [output], graph.fresh_name(f"{output}_add_bias"))
        graph.insert(add, node, after=True)


class _NewQuantizedAdd(_NewAdd):
    """None yet, of a product whose output is quantized: an Add of quantized values, on the grid of that output.

    The grid is the only one that is known there, so the bias moves by whole steps. Where these are too coarse, it is a real one
    if it can be: before the QuantizeLinear that follows, which runtimes of integers then cannot merge with the product.
    """

    @property
    def output(self) -> str:
        """Where the bias is going to be added: in the network that runs, a QLinearMatMul is requantized before that."""
        graph, name = self._graph, str(self._node.output[0])
        readers = [graph.only_reader(name)]
        for _ in range(2):
            readers.append(None if readers[-1] is None else graph.only_reader(readers[-1].output[0]))
        first, between, last = readers
        if first is None or between is None or last is None:
            return name
        operators = [operator_of(each) for each in (first, between, last)]
        is_same_grid = first.input[1:] == between.input[1:] == last.input[1:]
        is_requantized = operators == ["QuantizeLinear", "DequantizeLinear", "QuantizeLinear"] and is_same_grid
        return str(between.output[0]) if is_requantized else name

    def _grid(self) -> tuple[list[str], str]:
        return _output_grid(self._graph, self._node) or ([], "")

    def _codes(self, shift: Shift) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
        step, zero_point = (self._graph.value(each).reshape(()) for each in self._grid()[0])
        return _rounded(np.full(shift.shape, zero_point), step, shift)

    def _is_coarse(self, shift: Shift, applied: Shift) -> bool:
        """Whether too little of a shift is left on the grid, and it can be added as it is."""
        lost, whole = (float(np.linalg.norm(each)) for each in (shift - applied, shift))
        return operator_of(self._node) != "QLinearMatMul" and lost > _LOST * whole

    def change(self, layer: Layer, shift: Shift) -> BiasChange:
        _, applied, reasons = self._codes(shift)
        if self._is_coarse(shift, applied):
            real = super().change(layer, shift)
            return BiasChange(real.applied, (*real.reasons, ReasonCode.BIAS_BETWEEN_STEPS()))
        if not applied.any():
            return BiasChange(None, (ReasonCode.BELOW_STEP(),))
        return BiasChange(applied, (ReasonCode.BIAS_ADDED(), *reasons))

    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:
        codes, applied, _ = self._codes(shift)
        if self._is_coarse(shift, applied):
            return super().prepare(layer, shift)
        return lambda: self._write(layer, aligned(codes, self._axis)) if applied.any() else None

    def _write(self, layer: Layer, codes: NDArray[Any]) -> None:
        graph, node, output = self._graph, self._node, self._node.output[0]
        parameters, domain = self._grid()
        is_quantized = operator_of(node) == "QLinearMatMul"
        bias, real = graph.fresh_name(self._name()), graph.fresh_name(f"{output}_real_before_bias")
        constant = graph.add_initializer(self._name("_quantized"), codes)

        def made_by(op: str, source: str, made: str) -> onnx.NodeProto:
            return helper.make_node(op, [source, *parameters], [made], graph.fresh_name(f"{made}_{op}"), domain=domain)

        quantize, dequantize = (functools.partial(made_by, op) for op in ("QuantizeLinear", "DequantizeLinear"))

        node.name = layer.name
        graph.give_up_output(node, f"{output}_before_bias")
        biased = graph.fresh_name(f"{output}_biased") if is_quantized else output
        before = node.output[0] if is_quantized else graph.fresh_name(f"{output}_quantized_before_bias")
        new = [] if is_quantized else [quantize(node.output[0], before)]
        new += [dequantize(before, real), dequantize(constant, bias)]
        new += [helper.make_node("Add", [real, bias], [biased], graph.fresh_name(f"{output}_add_bias"))]
        for each in [*new, quantize(biased, output)] if is_quantized else new:
            node = graph.insert(each, node, after=True)

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:
        self.add(layer, _per_channel(np.broadcast_to(bias, aligned(np.empty(layer.channels), self._axis).shape), self._axis))


class _NoBias(Bias):
    """None, and none can be added."""

    def change(self, layer: Layer, shift: Shift) -> BiasChange:  # noqa: ARG002
        return BiasChange(None, (ReasonCode.CLAMPED(),))

    def prepare(self, layer: Layer, shift: Shift) -> Callable[[], None]:  # noqa: ARG002
        return lambda: None

    def set(self, layer: Layer, bias: NDArray[Any]) -> None:  # noqa: ARG002
        raise ValueError(f"layer {layer.name}: {ReasonCode.CLAMPED()}")


def _rounded(
    values: NDArray[Any], steps: NDArray[Any], shift: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], tuple[Reason, ...]]:
    """Integers after a shift in real units, within the limits of their type; their change in real units; remarks."""
    limits, steps = np.iinfo(values.dtype), np.asarray(steps, dtype=np.float64)
    shift, steps = np.broadcast_arrays(shift, steps)
    wanted = values + np.rint(np.divide(shift, steps, out=np.zeros(steps.shape), where=steps > 0))
    moved = np.clip(wanted, limits.min, limits.max)
    counts = {
        ReasonCode.BIAS_SATURATES: np.count_nonzero(wanted != moved),
        ReasonCode.BIAS_CANNOT_MOVE: np.count_nonzero(steps == 0),
    }
    reasons = (code(dtype=values.dtype.name, count=count, channels=moved.size) for code, count in counts.items() if count)
    return moved.astype(values.dtype), (moved - values) * steps, tuple(reasons)


def _copy_of(graph: Graph, dequantizer: onnx.NodeProto, node: onnx.NodeProto, index: int) -> onnx.NodeProto:
    """A dequantizer of this node's own, where others read the one it has."""
    copy = onnx.NodeProto()
    copy.CopyFrom(dequantizer)
    copy.name = graph.fresh_name(f"{dequantizer.name}_own") if dequantizer.name else ""
    copy.output[0] = graph.fresh_name(f"{node.output[0]}_bias")
    graph.set_input(node, index, copy.output[0])
    return graph.insert(copy, node, after=False)


def _steps_of_channels(dequantizer: Dequantizer, layer: Layer) -> NDArray[Any] | None:
    """One step, or one for each output channel of all groups; None where the steps belong to something else."""
    if dequantizer.block_size:
        return None
    if dequantizer.step.size == 1:
        return dequantizer.step.reshape(())
    times, rest = divmod(layer.channels, dequantizer.step.size)
    return np.tile(dequantizer.step, times) if rest == 0 and times in (1, layer.groups) else None
