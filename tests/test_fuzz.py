"""Random graphs: what a correction does whatever the network. An example is a network, samples and a quantized twin."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType

from biascorr import Correction, QuantParams, correct
from networks import Array, quantized, run

METHODS = ("mean", "iterative", "empirical", "activation", "auto")
OPSETS = [opset for opset in (9, 10, 11, 12, 13, 15, 17, 19, 21, 22, 23, 25) if opset <= onnx.defs.onnx_opset_version()]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "QGemm", "QLinearConv", "QLinearMatMul")
PROFILE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

pytestmark = pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")

Draw = Any


@pytest.fixture(autouse=True, scope="module")
def every_output_is_written_into_buffers():
    """As large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("biascorr.onnx.runtime._WORTH_BINDING", 0)
        yield


@dataclass
class Builder:
    """A graph that grows operator by operator; shapes are those of one sample."""

    draw: Draw
    opset: int
    rng: np.random.Generator
    shapes: dict[str, tuple[int, ...]]
    only_initializers: bool
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    shareable: dict[int, str] = field(default_factory=dict)
    """Biases by their length, which a normalization may read too."""

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def between(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))

    def constant(self, array: Array) -> str:
        """An initializer or a Constant node."""
        name = f"c{len(self.nodes)}_{len(self.constants)}"
        tensor = numpy_helper.from_array(np.asarray(array, np.float32 if array.dtype.kind == "f" else array.dtype), name)
        if self.only_initializers or self.draw(st.booleans()):
            self.constants.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], f"constant {name}", value=tensor))
        return name

    def add(self, op: str, inputs: Sequence[str], shape: tuple[int, ...], **attributes: Any) -> None:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"{op} {name}", **attributes))
        self.shapes[name] = shape

    def weights(self, *shape: int, fan_in: int) -> str:
        """Not around zero, so that there is something to correct."""
        return self.constant(self.rng.normal(0.1, 1.0, shape) / math.sqrt(fan_in))

    def biases(self, channels: int) -> list[str]:
        kind = self.one_of("none", "zeros", "values", "values")
        if kind == "none":
            return []
        self.shareable[channels] = self.constant(self.rng.normal(0, kind == "values", channels))
        return [self.shareable[channels]]

    def bias_behind(self, channels: int, axes_behind: int) -> None:
        """Sometimes an Add of a constant behind a layer."""
        if self.draw(st.booleans()):
            name, shape = list(self.shapes.items())[-1]
            bias = self.constant(self.rng.normal(0, 1, (channels, *[1] * axes_behind)))
            self.add("Add", self.one_of([name, bias], [bias, name]), shape)

    def conv(self, name: str, shape: tuple[int, ...]) -> None:
        channels, *space = shape
        group = self.one_of(*(k for k in range(1, channels + 1) if channels % k == 0))
        outputs = group * self.between(1, max(1, 6 // group))
        taps, moves, pads = self.window(space, transposed=False)
        sizes = [
            (size + pads[k] + pads[k + len(space)] - moves["dilations"][k] * (taps[k] - 1) - 1) // moves["strides"][k] + 1
            for k, size in enumerate(space)
        ]
        w = self.weights(outputs, channels // group, *taps, fan_in=channels // group * math.prod(taps))
        self.add("Conv", [name, w, *self.biases(outputs)], (outputs, *sizes), group=group, pads=pads, **moves)
        if len(self.nodes[-1].input) == 2:
            self.bias_behind(outputs, len(space))

    def conv_transpose(self, name: str, shape: tuple[int, ...]) -> None:
        channels, *space = shape
        group = self.one_of(*(k for k in range(1, channels + 1) if channels % k == 0))
        each = self.between(1, max(1, 4 // group))
        taps, moves, pads = self.window(space, transposed=True)
        sizes = [
            (size - 1) * moves["strides"][k] + moves["dilations"][k] * (taps[k] - 1) + 1 - pads[k] - pads[k + len(space)]
            for k, size in enumerate(space)
        ]
        w = self.weights(channels, each, *taps, fan_in=channels // group * math.prod(taps))
        inputs = [name, w, *self.biases(group * each)]
        self.add("ConvTranspose", inputs, (group * each, *sizes), group=group, pads=pads, **moves)

    def window(self, space: Sequence[int], *, transposed: bool) -> tuple[list[int], dict[str, list[int]], list[int]]:
        """Taps, strides and dilations, and pads such that each axis keeps an output."""
        taps = [self.between(1, min(3, size)) for size in space]
        strides = [self.between(1, 2) for _ in space]
        dilations = [self.between(1, 2) if (count - 1) * 2 + 1 <= size else 1 for count, size in zip(taps, space)]
        limits = [0 if transposed and (size - 1) * stride + count < 4 else min(1, count - 1)
                  for size, stride, count in zip(space, strides, taps)]  # fmt: skip
        pads = [self.between(0, limit) for limit in (*limits, *limits)]
        return taps, {"strides": strides, "dilations": dilations}, pads

    def gemm(self, name: str, shape: tuple[int, ...]) -> None:
        size, outputs, transposed = shape[0], self.between(1, 5), self.between(0, 1)
        w = self.weights(*((outputs, size) if transposed else (size, outputs)), fan_in=size)
        bias = self.biases(outputs) if self.opset >= 11 else [self.constant(self.rng.normal(0, 1, outputs))]
        factors = {"alpha": self.one_of(1.0, 0.5), "beta": self.one_of(1.0, 2.0)}
        self.add("Gemm", [name, w, *bias], (outputs,), transB=transposed, **factors)

    def matmul(self, name: str, shape: tuple[int, ...]) -> None:
        outputs = self.between(1, 5)
        if len(shape) == 2 and self.draw(st.booleans()):
            w = self.weights(outputs, shape[-2], fan_in=shape[-2])
            self.add("MatMul", [w, name], (outputs, shape[-1]))
            self.bias_behind(outputs, 1)
        else:
            w = self.weights(shape[-1], outputs, fan_in=shape[-1])
            self.add("MatMul", [name, w], (*shape[:-1], outputs))
            self.bias_behind(outputs, 0)

    def activation(self, name: str, shape: tuple[int, ...]) -> None:
        op = self.one_of("Relu", "Relu", "Clip", "Sigmoid", "LeakyRelu", "PRelu", *(["HardSwish"] if self.opset >= 14 else []))
        if op == "Clip" and self.opset < 11:
            self.add(op, [name], shape, min=0.0, max=1.5)
        elif op == "Clip":
            self.add(op, [name, *(self.constant(np.float32(bound)) for bound in (-0.5, 1.5))], shape)
        elif op == "PRelu":
            slopes = self.rng.uniform(0, 1, (shape[0], *[1] * (len(shape) - 1)))
            self.add(op, [name, self.constant(slopes)], shape)
        else:
            self.add(op, [name], shape)

    def normalization(self, name: str, shape: tuple[int, ...]) -> None:
        parts = (
            self.rng.uniform(0.5, 1.5, shape[0]),
            *self.rng.normal(0, 1, (2, shape[0])),
            self.rng.uniform(0.5, 2, shape[0]),
        )
        gamma, beta, mean, variance = map(self.constant, parts)
        beta = self.one_of(beta, self.shareable.get(shape[0], beta))
        self.add("BatchNormalization", [name, gamma, beta, mean, variance], shape)

    def pool(self, name: str, shape: tuple[int, ...]) -> None:
        op = self.one_of("MaxPool", "AveragePool", "GlobalAveragePool")
        if op == "GlobalAveragePool":
            self.add(op, [name], (shape[0], *[1] * (len(shape) - 1)))
        else:
            taps = [self.between(1, min(2, size)) for size in shape[1:]]
            sizes = [(size - count) // count + 1 for size, count in zip(shape[1:], taps)]
            self.add(op, [name], (shape[0], *sizes), kernel_shape=taps, strides=taps)

    def join(self, name: str, shape: tuple[int, ...]) -> None:
        """With a tensor of the same shape, itself where there is no other."""
        alike = [other for other, found in self.shapes.items() if found == shape]
        other = self.one_of(*alike)
        op = self.one_of("Add", "Mul", "Concat")
        if op == "Concat":
            self.add(op, [other, name], (2 * shape[0], *shape[1:]), axis=1)
        else:
            self.add(op, [other, name], shape)

    def grow(self) -> None:
        """Reads the newest tensor, or any other one."""
        names = list(self.shapes)
        name = self.one_of(names[-1], names[-1], *names)
        shape = self.shapes[name]
        vector = [self.gemm, self.gemm, self.matmul]
        image = [self.conv, self.conv, self.conv_transpose, self.pool, self.flatten, self.matmul]
        common = [self.activation, self.activation, self.join, self.normalization]
        self.one_of(*(vector if len(shape) == 1 else image), *common)(name, shape)

    def flatten(self, name: str, shape: tuple[int, ...]) -> None:
        self.add("Flatten", [name], (math.prod(shape),))

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, 1, ["N", *self.shapes[name]]) for name in ("x", *outputs)]
        graph = helper.make_graph(self.nodes, "random", values[:1], values[1:], self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=4 if self.opset < 11 else 8
        )
        model.producer_name, model.doc_string = "tests", "a random network"
        helper.set_model_props(model, {"author": "me"})
        return model


class Example:
    """A network, batches of samples for it, and how it is quantized."""

    def __init__(
        self, model: onnx.ModelProto, batches: list[Array], given: onnx.ModelProto | None, params: QuantParams | None
    ) -> None:
        self.model, self.batches, self.given, self.params = model, batches, given, params

    def __repr__(self) -> str:
        graph = onnx.printer.to_text(self.model.graph)
        counts, opset = [len(batch) for batch in self.batches], self.model.opset_import[0].version
        kind = self.params or f"quantized by onnxruntime, {len(self.given.graph.node)} nodes"
        return f"opset {opset}, batches of {counts}, {kind}: {graph}"


@st.composite
def examples(draw: Draw, *, formats: Sequence[QuantFormat | None]) -> Example:
    quant_format = draw(st.sampled_from(formats))
    opset = draw(st.sampled_from(OPSETS if quant_format is None else [each for each in OPSETS if each >= 13]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(6,), (4, 7), (3, 5, 6), (4, 4, 3), (1, 6, 6)]))
    builder = Builder(draw, opset, rng, {"x": shape}, quant_format is QuantFormat.QOperator)
    (builder.conv if len(shape) > 1 else builder.gemm)("x", shape)
    for _ in range(draw(st.integers(0, 6))):
        builder.grow()
    names = list(builder.shapes)
    outputs = sorted({names[-1], *draw(st.lists(st.sampled_from(names[1:]), max_size=1))})
    model = builder.model(outputs)
    batches = [rng.normal(0.5, 1, (count, *shape)).astype(np.float32) for count in draw(st.sampled_from([[5], [2, 3, 4], [8]]))]
    if quant_format is None:
        bits, modes = draw(st.integers(3, 8)), st.sampled_from(["tf", "tf_enhanced"])
        flags = {name: draw(st.booleans()) for name in ("per_channel", "symmetric")}
        params = QuantParams(draw(modes), weight_bits=bits, activation_bits=draw(st.sampled_from([None, 8])), **flags)
        return Example(model, batches, None, params)
    types = {"activation_type": draw(st.sampled_from([QuantType.QInt8, QuantType.QUInt8])), "weight_type": QuantType.QInt8}
    options = {"per_channel": draw(st.booleans()), "quant_format": quant_format, **types}
    try:
        twin = quantized(model, [{"x": batch} for batch in batches], **options)
    except (AttributeError, RuntimeError, ValueError):  # what its quantizer makes of some graphs
        reject()
    return Example(model, batches, twin, None)


def layer_names(model: onnx.ModelProto) -> list[str]:
    """Names of the layers, without what onnxruntime adds to them."""
    constants = constants_of(model)
    nodes = [node for node in model.graph.node if node.op_type in LAYERS and not constants.issuperset(node.input)]
    return [node.name.removesuffix("_quant") for node in nodes]


# Only biases differ


BIASES = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "QLinearConv": 8, "QGemm": 6}
ADDENDS = {"Add": (0, 1), "QLinearAdd": (0, 3)}


def constants_of(model: onnx.ModelProto) -> set[str]:
    """Tensors that follow from no input."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
    return constants


def bias_inputs(model: onnx.ModelProto) -> Iterator[tuple[NodeProto, int]]:
    """Nodes and which of their inputs is the bias of a layer: its own, or the constant of an Add, maybe quantized."""
    made = {output: node for node in model.graph.node for output in node.output}
    constants = constants_of(model)
    for node in model.graph.node:
        index = BIASES.get(node.op_type)
        found = [index] if index is not None and index < len(node.input) else []
        found += [k for k in ADDENDS.get(node.op_type, ()) if node.input[k] in constants]
        for k in found:
            yield node, k
            if node.input[k] in made and made[node.input[k]].op_type == "DequantizeLinear":
                yield made[node.input[k]], 0


def without_biases(model: onnx.ModelProto, known: set[str]) -> tuple[list[bytes], dict[str, bytes]]:
    """The known nodes and constants of a model, the biases of layers cleared and the Adds of new ones taken out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    new = [node for node in copy.graph.node if node.name not in known]
    for node in new:
        assert node.op_type in ("Add", "DequantizeLinear", "QuantizeLinear"), node
    constants, restored, origin = constants_of(copy), {}, {}
    for node in new:
        if node.input[0] not in constants:  # on the way from an operator to its own output's name
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
            restored[origin[node.output[0]]] = node.output[0]
    of_biases = set()
    for node, index in list(bias_inputs(copy)):
        of_biases.add(node.input[index])
        node.input[index] = ""
    of_biases.difference_update(name for node in copy.graph.node for name in node.input)
    nodes = []
    for node in (node for node in copy.graph.node if node.name in known):
        if node.output[0] in restored:
            assert node.op_type in ("MatMul", "QLinearMatMul")
            node.output[0] = restored[node.output[0]]
        while node.input and not node.input[-1]:
            node.input.pop()
        if node.op_type == "Constant" and node.output[0] in of_biases:
            node.ClearField("attribute")
        nodes.append(node.SerializeToString())
    return nodes, {t.name: t.SerializeToString() for t in copy.graph.initializer if t.name not in of_biases}


def assert_only_biases_differ(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    names = {node.name for node in before.graph.node}
    assert len(names) == len(before.graph.node)
    (nodes, constants), (nodes_after, constants_after) = (without_biases(each, names) for each in (before, after))
    assert nodes_after == nodes
    assert {name: constants_after.get(name) for name in constants} == constants
    assert {tensor.name for tensor in before.graph.initializer} <= {tensor.name for tensor in after.graph.initializer}
    rest = []
    for model in (before, after):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.graph.ClearField("node")
        copy.graph.ClearField("initializer")
        rest.append(copy.SerializeToString(deterministic=True))
    assert rest[0] == rest[1]


# Held-back samples


def sqnr(reference: onnx.ModelProto, model: onnx.ModelProto, x: Array) -> float:
    """Of the outputs, in dB, averaged over them."""
    found = []
    for expected, computed in zip(run(reference, {"x": x}), run(model, {"x": x})):
        noise = np.square(expected.astype(np.float64) - computed).sum()
        found.append(10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise) if noise else 300.0)
    return float(np.mean(found))


def check(example: Example, method: str) -> None:
    before = example.model if example.given is None else example.given
    correction = correct(example.model, example.batches, quantized=example.given, method=method, quant_params=example.params)
    after = correction.model
    onnx.checker.check_model(after, full_check=True)
    assert_only_biases_differ(before, after)
    for batch in example.batches:
        expected, found = run(before, {"x": batch}), run(after, {"x": batch})
        assert [each.shape for each in found] == [each.shape for each in expected]
        assert all(np.isfinite(each).all() for each in found)
    check_report(correction, before)
    if method == "auto":
        check_judgement(example, correction, before)
    else:
        assert {layer.method for layer in correction.report} <= {method, None}


def check_report(correction: Correction, before: onnx.ModelProto) -> None:
    assert [layer.name.removesuffix("_quant") for layer in correction.report] == layer_names(before)  # each, and in order
    for layer in correction.report:
        assert layer.reason or layer.method
        assert layer.method is None or (layer.shift_before is not None and layer.shift_after is not None)


def check_judgement(example: Example, correction: Correction, before: onnx.ModelProto) -> None:
    none, chosen = correction.scores["none"], correction.scores[correction.method]
    assert not chosen.is_worse_than(none)
    if correction.method == "none":
        assert correction.model == before
    elif example.given is not None and none.divergence is None:
        held_back = np.concatenate(example.batches)[3::4]
        assert sqnr(example.model, correction.model, held_back) >= sqnr(example.model, before, held_back) - 0.1


def simulation(count: int) -> Any:
    """A decorator that gives a test so many examples of simulated quantization."""
    return lambda test: given(examples(formats=[None]))(settings(PROFILE, max_examples=count)(test))


def onnxruntime_quantization(count: int) -> Any:
    """A decorator that gives a test so many examples that onnxruntime quantized."""
    return lambda test: given(examples(formats=list(QuantFormat)))(settings(PROFILE, max_examples=count)(test))


@pytest.mark.parametrize("method", METHODS)
@simulation(8)
def test_simulated_quantization(method: str, example: Example) -> None:
    check(example, method)


@pytest.mark.parametrize("method", METHODS)
@onnxruntime_quantization(5)
def test_quantized_by_onnxruntime(method: str, example: Example) -> None:
    check(example, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@simulation(150)
def test_simulated_quantization_of_many(method: str, example: Example) -> None:
    check(example, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@onnxruntime_quantization(80)
def test_many_quantized_by_onnxruntime(method: str, example: Example) -> None:
    check(example, method)
