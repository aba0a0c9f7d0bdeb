"""Random graphs: what a correction does whatever the network. An example is a network, samples and a quantized twin."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from onnx import NodeProto
from onnxruntime.quantization import QuantFormat, QuantType

from biascorr import Correction, QuantParams, correct
from biascorr.calibration.samples import scored_parts
from networks import Array, quantized, run
from random_graphs import OPSETS, PROFILE, Builder, Draw

METHODS = ("mean", "iterative", "empirical", "activation", "auto")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "QGemm", "QLinearConv", "QLinearMatMul")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning"),
    pytest.mark.filterwarnings("ignore:not folded:UserWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def every_output_is_written_into_buffers():
    """As large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("biascorr.adapters.onnx.runtime._WORTH_BINDING", 0)
        yield


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
            while node.input[k] in made and made[node.input[k]].op_type in ("DequantizeLinear", "QuantizeLinear"):
                node, k = made[node.input[k]], 0
                yield node, k


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
        held_back = np.concatenate(example.batches)
        held_back = held_back[scored_parts([1] * len(held_back), 0)[0]]
        assert sqnr(example.model, correction.model, held_back) >= sqnr(example.model, before, held_back) - 0.1


def simulation(count: int) -> Any:
    """A decorator that gives a test so many examples of simulated quantization, each with a method."""
    return lambda test: given(examples(formats=[None]), st.sampled_from(METHODS))(settings(PROFILE, max_examples=count)(test))


def onnxruntime_quantization(count: int) -> Any:
    """A decorator that gives a test so many examples that onnxruntime quantized, each with a method."""
    strategies = examples(formats=list(QuantFormat)), st.sampled_from(METHODS)
    return lambda test: given(*strategies)(settings(PROFILE, max_examples=count)(test))


@simulation(40)
def test_simulated_quantization(example: Example, method: str) -> None:
    check(example, method)


@onnxruntime_quantization(25)
def test_quantized_by_onnxruntime(example: Example, method: str) -> None:
    check(example, method)


@pytest.mark.slow
@simulation(250)
def test_simulated_quantization_of_many(example: Example, method: str) -> None:
    check(example, method)


@pytest.mark.slow
@onnxruntime_quantization(150)
def test_many_quantized_by_onnxruntime(example: Example, method: str) -> None:
    check(example, method)
