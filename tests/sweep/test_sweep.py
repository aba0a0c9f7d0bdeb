"""The engine against brute force, and what it promises whatever the network: order, memory, threads, files.

Brute force runs the whole model anew for each layer, with an Add of the shifts behind every layer.
"""

import collections
import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat

from biascorr import QuantParams, correct
from biascorr.adapters.onnx import network as onnx_network
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.sweep import cut
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.shard import OneShard
from biascorr.sweep.sweep import Sweep
from networks import (
    BITS,
    Array,
    biases,
    constants_of,
    fake_quantized,
    model_from_text,
    quantized,
    run,
    samples,
    weights,
    with_constants,
)

PARAMS = QuantParams("tf", weight_bits=BITS)

pytestmark = pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")  # by brute force too


@pytest.fixture(autouse=True)
def every_output_is_written_into_buffers(monkeypatch):
    """As large ones are."""
    monkeypatch.setattr("biascorr.adapters.onnx.runtime._WORTH_BINDING", 0)


@dataclass
class Case:
    """A network and batches for it. The graph has layers with names; weights begin with w, biases with b."""

    text: str
    constants: dict[str, Array]
    batches: Sequence[Any]

    @property
    def model(self) -> onnx.ModelProto:
        return model_from_text(f"g {self.text}", **self.constants)

    @property
    def feeds(self) -> list[dict[str, Array]]:
        names = [value.name for value in self.model.graph.input]
        return [batch if isinstance(batch, dict) else {names[0]: batch} for batch in self.batches]

    @property
    def rounded(self) -> onnx.ModelProto:
        """The model with its weights on their grids."""
        on_grid = {name: fake_quantized(array, None) for name, array in self.constants.items() if name.startswith("w")}
        return with_constants(self.model, **on_grid)


def conv(*shape: int, seed: int = 0) -> Array:
    """Weights that keep values about as large as they were."""
    size = int(np.prod(shape[1:]))
    return weights(*shape, seed=seed) / np.float32(2 ** max(0, round(np.log2(size) / 2) - 1))


IMAGES = (6, 3, 7, 6)
IMAGE_IN = "(float[N,3,7,6] x)"


def images(*counts: int) -> list[Array]:
    return [samples(count, *IMAGES[1:], seed=seed) for seed, count in enumerate(counts)]


def chain(depth: int) -> Case:
    body, before = "", "x"
    for k in range(depth):
        body += f"[l{k}] a{k} = Conv({before}, w{k}, b{k}) r{k} = LeakyRelu<alpha=0.5>(a{k}) "
        before = f"r{k}"
    constants = {f"w{k}": conv(4, 3 if k == 0 else 4, 1, 1, seed=k) for k in range(depth)}
    constants |= {f"b{k}": biases(4, seed=k) for k in range(depth)}
    return Case(f"{IMAGE_IN} => (float[N,4,7,6] y) {{ {body} y = Identity({before}) }}", constants, images(3, 2))


CASES = {
    "classifier": Case(
        f"""{IMAGE_IN} => (float[N,5] y) {{
            [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) [second] c = Conv(r, w2, b2)
            m = GlobalAveragePool(c) f = Flatten(m) [last] y = Gemm<transB=1>(f, w3, b3) }}""",
        {"w1": conv(4, 3, 3, 3), "w2": conv(6, 4, 3, 3), "w3": conv(5, 6), "b1": biases(4), "b2": biases(6), "b3": biases(5)},
        images(6),
    ),
    "residual": Case(
        f"""{IMAGE_IN} => (float[N,4,?,?] y) {{
            [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) [second] c = Conv<pads=[1,1,1,1]>(r, w2, b2)
            s = Add(c, r) q = Relu(s) [third] d = Conv<pads=[1,1,1,1]>(q, w3, b3) y = Add(d, q) }}""",
        {"w1": conv(4, 3, 3, 3), "w2": conv(4, 4, 3, 3), "w3": conv(4, 4, 3, 3, seed=5)}
        | {"b1": biases(4), "b2": biases(4, seed=2), "b3": biases(4, seed=3)},
        images(4, 2),
    ),
    "residual of the input": Case(
        f"""{IMAGE_IN} => (float[N,3,7,6] y) {{
            [first] a = Conv(x, w1, b1) r = LeakyRelu(a) [second] c = Conv(r, w2, b2) y = Add(x, c) }}""",
        {"w1": conv(4, 3, 1, 1), "w2": conv(3, 4, 1, 1), "b1": biases(4), "b2": biases(3)},
        images(4, 2),
    ),
    "concat": Case(
        f"""{IMAGE_IN} => (float[N,5,?,?] y) {{
            [left] a = Conv(x, w1, b1) [right] c = Conv(x, w2, b2) j = Concat<axis=1>(a, x, c) r = Relu(j)
            [last] y = Conv<strides=[2,2], dilations=[2,1], pads=[2,0,1,1]>(r, w3, b3) }}""",
        {"w1": conv(4, 3, 1, 1), "w2": conv(2, 3, 1, 1), "w3": conv(5, 9, 3, 2)}
        | {"b1": biases(4), "b2": biases(2), "b3": biases(5)},
        images(4, 2),
    ),
    "depthwise": Case(
        f"""{IMAGE_IN} => (float[N,5,?,?] y) {{
            six = Constant<value = float {{6.0}}>() zero = Constant<value = float {{0.0}}>()
            [expand] a = Conv(x, w1, b1) r = Clip(a, zero, six)
            [depthwise] d = Conv<group=8, pads=[1,1,1,1], strides=[2,2]>(r, w2, b2) q = HardSwish(d)
            [multiplier] m = Conv<group=8, pads=[0,1,0,0]>(q, w3, b3) [project] y = Conv(m, w4, b4) }}""",
        {"w1": conv(8, 3, 1, 1), "w2": conv(8, 1, 3, 3), "w3": conv(16, 1, 2, 2), "w4": conv(5, 16, 1, 1)}
        | {"b1": biases(8), "b2": biases(8), "b3": biases(16), "b4": biases(5)},
        images(4, 2),
    ),
    "grouped": Case(
        """(float[N,6,9] x) => (float[N,4,?] y) {
            [one] a = Conv<group=3, pads=[1,1]>(x, w1, b1) r = Sigmoid(a)
            [two] y = Conv<group=2, auto_pad="SAME_UPPER">(r, w2) }""",
        {"w1": conv(6, 2, 3), "w2": conv(4, 3, 2), "b1": biases(6)},
        [samples(3, 6, 9), samples(2, 6, 9, seed=8)],
    ),
    "transposed": Case(
        f"""{IMAGE_IN} => (float[N,3,?,?] y) {{
            [down] a = Conv<strides=[2,2]>(x, w1, b1) r = Relu(a)
            [up] u = ConvTranspose<strides=[2,2], pads=[1,0,0,1], group=2>(r, w2, b2) t = Tanh(u)
            [out] y = ConvTranspose<output_padding=[1,0], strides=[2,1]>(t, w3) }}""",
        {"w1": conv(4, 3, 3, 3), "w2": conv(4, 2, 3, 3), "w3": conv(4, 3, 2, 2), "b1": biases(4), "b2": biases(4)},
        images(4, 2),
    ),
    "gemm": Case(
        """(float[7,N] x) => (float[N,4] y) {
            [one] a = Gemm<transA=1, alpha=0.5>(x, w1, b1) r = Relu(a) [two] y = Gemm<transB=1, beta=0.25>(r, w2, b2) }""",
        {"w1": weights(7, 5, axis=1), "w2": conv(4, 5), "b1": biases(5), "b2": biases(4)},
        [samples(7, 12), samples(7, 3)],
    ),
    "matmul": Case(
        """(float[N,3,6] x) => (float[N,4,5] y) {
            [one] a = MatMul(x, w1) c = Add(a, b1) g = Relu(c)
            [two] d = MatMul(w2, g) h = Relu(d) [three] y = MatMul(h, w3) }""",
        {"w1": weights(6, 5, axis=1), "w2": weights(4, 3), "w3": weights(5, 5, axis=1) / np.float32(2), "b1": biases(5)},
        [samples(4, 3, 6), samples(2, 3, 6, seed=3)],
    ),
    "two inputs and outputs": Case(
        """(float[N,3,7,6] x, float[N,5] z) => (float[N,4] y, float[N,4,?,?] v, float[N,4] t) {
            [image] v = Conv(x, w1, b1) m = GlobalAveragePool(v) f = Flatten(m)
            [vector] a = Gemm(z, w2, b2) t = Mul(a, f) r = Relu(t) [last] c = Gemm(r, w3, b3) y = Add(c, a) }""",
        {"w1": conv(4, 3, 3, 3), "w2": weights(5, 4, axis=1), "w3": weights(4, 4, axis=1)}
        | {"b1": biases(4), "b2": biases(4), "b3": biases(4)},
        [{"x": x, "z": samples(len(x), 5, seed=k)} for k, x in enumerate(images(4, 3))],
    ),
    "shared weights": Case(
        f"""{IMAGE_IN} => (float[N,3,7,6] y) {{
            [one] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) [two] c = Conv<pads=[1,1,1,1]>(r, w1, b2)
            [other] d = Conv<pads=[1,1,1,1]>(x, w1, b3) y = Sub(c, d) }}""",
        {"w1": conv(3, 3, 3, 3), "b1": biases(3), "b2": biases(3, seed=2), "b3": biases(3, seed=4)},
        images(4, 2),
    ),
    "used twice": Case(
        f"""{IMAGE_IN} => (float[N,3,7,6] y) {{
            [one] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) [two] y = Conv<pads=[1,1,1,1]>(r, w1, b1) }}""",
        {"w1": conv(3, 3, 3, 3), "b1": biases(3)},
        images(4, 2),
    ),
    "read by two layers": Case(
        f"""{IMAGE_IN} => (float[N,4,7,6] y) {{
            [stem] a = Conv(x, w1, b1) r = Relu(a) [left] p = Conv(r, w2, b2) [right] q = Conv<pads=[1,1,1,1]>(a, w3, b3)
            s = Sigmoid(q) y = Mul(p, s) }}""",
        {"w1": conv(4, 3, 1, 1), "w2": conv(4, 4, 1, 1), "w3": conv(4, 4, 3, 3)}
        | {"b1": biases(4), "b2": biases(4, seed=2), "b3": biases(4, seed=3)},
        images(4, 2),
    ),
    "inception": Case(
        f"""{IMAGE_IN} => (float[N,4] y) {{
            [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
            [point] i = Conv(r, w2, b2)
            [reduce3] j = Conv(r, w3, b3) jr = Relu(j) [conv3] k = Conv<pads=[1,1,1,1]>(jr, w4, b4)
            [reduce5] l = Conv(r, w5, b5) lr = Relu(l) [conv5] m = Conv<pads=[1,1,1,1]>(lr, w6, b6) mr = Relu(m)
            [conv55] n = Conv<pads=[1,1,1,1]>(mr, w7, b7)
            pool = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r) [project] o = Conv(pool, w8, b8)
            all = Concat<axis=1>(i, k, n, o) q = Relu(all) [mix] s = Conv(q, w9, b9)
            t = GlobalAveragePool(s) y = Flatten(t) }}""",
        {"w1": conv(4, 3, 3, 3), "w4": conv(2, 2, 3, 3), "w6": conv(2, 2, 3, 3, seed=6), "w7": conv(3, 2, 3, 3)}
        | {f"w{k}": conv(2, 4, 1, 1, seed=k) for k in (2, 3, 5, 8)}
        | {"w9": conv(4, 9, 1, 1), "b1": biases(4), "b7": biases(3), "b9": biases(4)}
        | {f"b{k}": biases(2, seed=k) for k in (2, 3, 4, 5, 6, 8)},
        images(4, 2),
    ),
    "sizes that vary": Case(
        """(float[N,3,H,W] x) => (float[N,5,H,W] y) {
            [one] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) [two] y = Conv<pads=[2,0,0,2]>(r, w2, b2) }""",
        {"w1": conv(4, 3, 3, 3), "w2": conv(5, 4, 3, 3), "b1": biases(4), "b2": biases(5)},
        [samples(1, 3, 5, 9), samples(2, 3, 9, 4, seed=5), samples(1, 3, 12, 11, seed=7)],
    ),
    "batches that vary": Case(
        f"""{IMAGE_IN} => (float[N,5,?,?] y) {{ [one] a = Conv(x, w1, b1) r = Relu(a) [two] y = Conv(r, w2, b2) }}""",
        {"w1": conv(4, 3, 3, 3), "w2": conv(5, 4, 3, 3), "b1": biases(4), "b2": biases(5)},
        images(1, 7, 2, 4),
    ),
    "depth 32": chain(32),
    "vector": Case(
        """(float[7] x) => (float[4] y) { [one] a = MatMul(x, w1) r = Relu(a) [two] c = MatMul(r, w2) y = Add(c, b2) }""",
        {"w1": weights(7, 5, axis=1), "w2": weights(5, 4, axis=1), "b2": biases(4)},
        [samples(7, seed=seed) for seed in range(6)],
    ),
    "rows without batch": Case(
        """(float[7,6] x) => (float[4,5] y) { [one] a = MatMul(x, w1) r = Relu(a) [two] y = MatMul(w2, r) }""",
        {"w1": weights(6, 5, axis=1), "w2": weights(4, 7)},
        [samples(7, 6, seed=seed) for seed in range(5)],
    ),
    "image without batch": Case(
        """(float[3,7,6] x) => (float[4,7,6] y) {
            axes = Constant<value = int64[1] {0}>() e = Unsqueeze(x, axes)
            [one] a = Conv<pads=[1,1,1,1]>(e, w1, b1) r = Relu(a) [two] c = Conv(r, w2, b2) y = Squeeze(c, axes) }""",
        {"w1": conv(4, 3, 3, 3), "w2": conv(4, 4, 1, 1), "b1": biases(4), "b2": biases(4)},
        [samples(3, 7, 6, seed=seed) for seed in range(5)],
    ),
    "batch of one": Case(
        """(float[1,3,7,6] x) => (float[1,4,7,6] y) { [one] a = Conv(x, w1, b1) r = Relu(a) [two] y = Conv(r, w2, b2) }""",
        {"w1": conv(4, 3, 1, 1), "w2": conv(4, 4, 1, 1), "b1": biases(4), "b2": biases(4)},
        [samples(1, 3, 7, 6, seed=seed) for seed in range(5)],
    ),
}  # fmt: skip


# Brute force


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def node_of(model: onnx.ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def layer_names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]


def channels_last(node: NodeProto, array: Array) -> Array:
    """The output of a layer as rows of channels, in float64."""
    axis = 1 if "Conv" in node.op_type else -2 if node.op_type == "MatMul" and node.input[0].startswith("w") else -1
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).astype(np.float64)


def output_mean(model: onnx.ModelProto, name: str, batches: Sequence[dict[str, Array]]) -> Array:
    node = node_of(model, name)
    arrays = [run(model, feeds, [node.output[0]])[0] for feeds in batches]
    return np.concatenate([channels_last(node, array) for array in arrays]).mean(axis=0)


def product_mean(model: onnx.ModelProto, name: str, w: Array, batches: Sequence[dict[str, Array]]) -> Array:
    """The mean output of a layer for the input that it has in the model, with other weights and without its bias."""
    node = node_of(model, name)
    index = 0 if node.input[0].startswith("w") else 1
    alone = NodeProto()
    alone.CopyFrom(node)
    del alone.input[2:], alone.output[:]
    alone.input[:] = ["w", "x"] if index == 0 else ["x", "w"]
    alone.output.append("y")
    rows = []
    for feeds in batches:
        (x,) = run(model, feeds, [node.input[1 - index]]) if node.input[1 - index] not in feeds else (feeds[node.input[0]],)
        value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)
        graph = helper.make_graph([alone], "g", [value], [onnx.ValueInfoProto(name="y")], [numpy_helper.from_array(w, "w")])
        rows.append(run(helper.make_model(graph, opset_imports=model.opset_import, ir_version=8), {"x": x})[0])
    return np.concatenate([channels_last(node, array) for array in rows]).mean(axis=0)


def add_shift(model: onnx.ModelProto, name: str, shift: Array, feeds: dict[str, Array]) -> None:
    """Puts an Add of a shift, (channels,), behind a layer."""
    node = node_of(model, name)
    (array,) = run(model, feeds, [node.output[0]])
    behind = array.ndim - 2 if "Conv" in node.op_type else int(node.input[0].startswith("w"))
    output, node.output[0] = node.output[0], f"{node.output[0]}_before_shift"
    constant = shift.astype(np.float32).reshape(-1, *[1] * behind)
    model.graph.initializer.append(numpy_helper.from_array(constant, f"{name}_shift"))
    index = next(k for k, each in enumerate(model.graph.node) if each.name == name)
    model.graph.node.insert(index + 1, helper.make_node("Add", [node.output[0], f"{name}_shift"], [output]))


def brute_force(
    reference: onnx.ModelProto, model: onnx.ModelProto, batches: Sequence[dict[str, Array]], method: str = "empirical"
) -> dict[str, Array]:
    """The shift of each layer by its name."""
    model, shifts = copy_of(model), {}
    for name in layer_names(model):
        if method == "empirical":
            shift = output_mean(reference, name, batches) - output_mean(model, name, batches)
        else:
            w = next(each for each in node_of(model, name).input if each.startswith("w"))
            means = [product_mean(model, name, constants_of(each)[w], batches) for each in (reference, model)]
            shift = means[0] - means[1]
        step = bias_step(model, name)
        shifts[name] = shift if step is None else np.rint(shift / step) * step
        add_shift(model, name, shifts[name], batches[0])
    return shifts


def dequantizer(model: onnx.ModelProto, name: str) -> NodeProto | None:
    """What dequantizes the bias of a layer."""
    inputs = node_of(model, name).input[2:]
    return next((node for node in model.graph.node if node.output[0] in inputs and node.op_type == "DequantizeLinear"), None)


def bias_step(model: onnx.ModelProto, name: str) -> Array | None:
    """The step of a bias in integers."""
    found = dequantizer(model, name)
    return None if found is None else constants_of(model)[found.input[1]].astype(np.float64)


def bias(model: onnx.ModelProto, name: str) -> Array | float:
    """What a layer adds to each channel: its own bias, the constant of an Add behind it, or nothing."""
    constants, node = constants_of(model), node_of(model, name)
    if len(node.input) > 2:
        found = dequantizer(model, name)
        own = constants[node.input[2]] if found is None else constants[found.input[0]] * constants[found.input[1]]
        factor = next((each.f for each in node.attribute if each.name == "beta"), 1.0)
        return own.astype(np.float64).ravel() * factor
    adds = [each for each in model.graph.node if each.op_type == "Add" and node.output[0] in each.input]
    found = [constants[each] for add in adds for each in add.input if each in constants]
    return found[0].astype(np.float64).ravel() if found else 0.0


def changes(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, Array]:
    return {name: bias(after, name) - bias(before, name) for name in layer_names(before)}


def assert_close(found: dict[str, Array], expected: dict[str, Array], model: onnx.ModelProto) -> None:
    for name, shift in expected.items():
        size = max(np.abs(shift).max(), np.abs(bias(model, name)).max(initial=0.0))
        assert np.abs(shift).max() > 1e-4, f"{name}: nothing to correct"
        np.testing.assert_allclose(found[name], shift, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("method", ["empirical", "iterative"])
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
def test_biases_are_those_of_brute_force(name, method):
    case = CASES[name]
    after = correct(case.model, case.feeds, method=method, quant_params=PARAMS).model
    expected = brute_force(case.model, case.rounded, case.feeds, method)
    assert_close(changes(case.model, after), expected, case.model)


@pytest.mark.parametrize("name", ["residual", "concat", "used twice", "two inputs and outputs", "gemm", "matmul"])
def test_biases_of_a_given_model_are_those_of_brute_force(name):
    case = CASES[name]
    after = correct(case.model, case.feeds, quantized=case.rounded, method="empirical").model
    assert_close(changes(case.model, after), brute_force(case.model, case.rounded, case.feeds), case.model)


QUANTIZED = ["classifier", "residual", "concat", "depthwise", "inception", "used twice", "shared weights", "read by two layers"]


@pytest.mark.parametrize("name", QUANTIZED, ids=lambda name: name.replace(" ", "_"))
def test_integer_biases_are_those_of_brute_force(name):
    case = CASES[name]
    given = quantized(case.model, case.feeds)
    after = correct(case.model, case.feeds, quantized=given, method="empirical").model
    found, expected = changes(given, after), brute_force(case.model, given, case.feeds)
    for layer, shift in expected.items():
        step = bias_step(given, layer)
        assert step is not None
        np.testing.assert_allclose(found[layer], shift, rtol=0, atol=1.001 * step.max(), err_msg=layer)
    assert max(np.abs(shift).max() for shift in expected.values()) > 1e-3


def operator_biases(model: onnx.ModelProto) -> dict[str, Array]:
    """Integer biases of QLinearConv and QGemm by the output of the layer."""
    constants, at = constants_of(model), {"QLinearConv": 8, "QGemm": 6}
    nodes = [node for node in model.graph.node if node.op_type in at]
    return {node.name.removesuffix("_quant"): constants[node.input[at[node.op_type]]].astype(np.int64) for node in nodes}


@pytest.mark.parametrize("name", ["classifier", "depthwise", "concat", "inception"])
def test_operators_with_quantized_weights_get_the_biases_of_quantizers_around_layers(name):
    case = CASES[name]
    around, inside = (quantized(case.model, case.feeds, quant_format=each) for each in (QuantFormat.QDQ, QuantFormat.QOperator))
    after = correct(case.model, case.feeds, quantized=inside, method="empirical").model
    found, before = operator_biases(after), operator_biases(inside)
    expected = brute_force(case.model, around, case.feeds)
    assert set(found) == set(expected)
    for layer, shift in expected.items():
        steps = np.rint(shift / bias_step(around, layer)).astype(np.int64)
        np.testing.assert_allclose(found[layer] - before[layer], steps, rtol=0, atol=1, err_msg=layer)


# Behind activations


def activated_error(case: Case, model: onnx.ModelProto, tensor: str) -> float:
    """How far a mean is from the float one, over channels."""
    means = [np.concatenate([channel_rows(run(each, feeds, [tensor])[0]) for feeds in case.feeds]).mean(0)
             for each in (case.model, model)]  # fmt: skip
    return float(np.linalg.norm(means[1] - means[0]))


def channel_rows(array: Array) -> Array:
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]).astype(np.float64)


ACTIVATED = {"classifier": ["r"], "depthwise": ["r", "q"], "transposed": ["r", "t"], "inception": ["jr", "lr", "mr"]}


@pytest.mark.parametrize("name", ACTIVATED)
def test_means_behind_activations_come_nearer(name):
    case = CASES[name]
    after = correct(case.model, case.feeds, quantized=case.rounded, method="activation").model
    for tensor in ACTIVATED[name]:
        before = activated_error(case, case.rounded, tensor)
        assert activated_error(case, after, tensor) < 0.2 * before, tensor


@pytest.mark.parametrize("method", ["empirical", "activation"])
@pytest.mark.parametrize("activation", ["", "Relu"])
def test_half_the_strength_is_half_the_shift_of_one_layer(method, activation):
    body = f"[one] a = Conv(x, w1, b1) y = {activation or 'Identity'}(a)"
    case = Case(f"{IMAGE_IN} => (float[] y) {{ {body} }}", {"w1": conv(4, 3, 3, 3), "b1": biases(4)}, images(4))
    whole, half = (
        changes(case.model, correct(case.model, case.feeds, method=method, strength=part, quant_params=PARAMS).model)["one"]
        for part in (1.0, 0.5)
    )
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(half, whole / 2, rtol=0, atol=1e-6)


# What must make no difference

METHODS = ["mean", "iterative", "empirical", "activation", "auto"]


def corrected(case: Case, data: Any, method: str, **options: Any) -> onnx.ModelProto:
    return correct(case.model, data, method=method, quant_params=PARAMS, **options).model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "two inputs and outputs", "sizes that vary"])
def test_threads_make_no_difference(name, method):
    found = [corrected(CASES[name], CASES[name].feeds, method, threads=count) for count in (1, 2, 4)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "matmul", "sizes that vary"])
def test_memory_budget_makes_no_difference(name, method):
    found = [corrected(CASES[name], CASES[name].feeds, method, memory_budget=budget) for budget in (0, 3000, 1 << 40)]
    assert found[0] == found[1] == found[2]


SPLITS = [[12], [1] * 12, [5, 7], [3, 1, 6, 2]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "inception", "classifier"])
def test_batches_make_no_difference(name, method):
    case, x = CASES[name], samples(12, 3, 7, 6)
    found = [corrected(case, np.split(x, np.cumsum(sizes)[:-1]), method) for sizes in SPLITS]
    expected = changes(case.model, found[0])
    for model in found[1:]:
        for layer, change in changes(case.model, model).items():
            np.testing.assert_allclose(change, expected[layer], rtol=0, atol=1e-6, err_msg=layer)


@pytest.mark.parametrize("method", METHODS)
def test_kinds_of_data_make_no_difference(method, tmp_path):
    case, x = CASES["residual"], samples(8, 3, 7, 6)
    np.save(tmp_path / "x.npy", x)
    read_only = x.copy()
    read_only.flags.writeable = False
    expected = corrected(case, list(x[:, None]), method)
    for data in (read_only, np.load(tmp_path / "x.npy", mmap_mode="r"), (x[k : k + 1] for k in range(8)), tmp_path / "x.npy"):
        found = corrected(case, data, method)
        for layer, change in changes(case.model, found).items():
            np.testing.assert_allclose(change, changes(case.model, expected)[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["empirical", "auto"])
def test_batches_in_one_buffer_make_no_difference(method):
    case, x = CASES["residual"], samples(8, 3, 7, 6)

    def batches():
        buffer = np.empty((2, 3, 7, 6), np.float32)
        for part in np.split(x, 4):
            buffer[...] = part
            yield buffer

    assert corrected(case, batches(), method) == corrected(case, np.split(x, 4), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0, None])
def test_what_the_caller_has_is_not_changed(method, budget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CASES["residual of the input"]
    model, given, data = case.model, case.rounded, [np.array(batch) for batch in case.batches]
    onnx.save(model, tmp_path / "model.onnx")
    before = [model.SerializeToString(), given.SerializeToString(), (tmp_path / "model.onnx").read_bytes()]
    correct(model, data, quantized=given, method=method, memory_budget=budget)
    correct(tmp_path / "model.onnx", data, method=method, memory_budget=budget)
    after = [model.SerializeToString(), given.SerializeToString(), (tmp_path / "model.onnx").read_bytes()]
    assert after == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert Path.cwd() == tmp_path
    for array, batch in zip(data, case.batches):
        np.testing.assert_array_equal(array, batch)


def test_a_second_run_changes_nothing():
    case = CASES["inception"]
    once = correct(case.model, case.feeds, quantized=case.rounded, method="empirical").model
    twice = correct(case.model, case.feeds, quantized=once, method="empirical").model
    for layer, change in changes(once, twice).items():
        np.testing.assert_allclose(change, np.zeros_like(change), rtol=0, atol=1e-6, err_msg=layer)


# The temporary folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def written(monkeypatch):
    """Files that numpy wrote."""
    paths: list[Path] = []
    save = np.save

    def saving(path, array, **options):
        paths.append(Path(path))
        save(path, array, **options)

    monkeypatch.setattr(np, "save", saving)
    return paths


@pytest.mark.parametrize("method", METHODS)
def test_files_are_gone_afterwards(method, folder, written):
    case = CASES["residual"]
    corrected(case, case.feeds, method, memory_budget=0)
    assert len(written) > 2 * len(case.feeds)
    assert all(folder in path.parents for path in written)
    assert list(folder.iterdir()) == []


def test_nothing_is_written_within_the_budget(folder, written):
    corrected(CASES["residual"], CASES["residual"].feeds, "auto", memory_budget=1 << 30)
    assert written == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
@pytest.mark.parametrize("step", ["reading samples", "float network", "empirical"])
def test_files_are_gone_after_an_interruption(step, error, folder, written):
    def progress(name, done, total):  # noqa: ARG001
        if name == step:
            raise error

    case = CASES["residual"]
    with pytest.raises(error):
        corrected(case, case.feeds, "empirical", memory_budget=0, progress=progress)
    assert written
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("full_after", [0, 1, 3, 6])
def test_full_disk(full_after, folder, monkeypatch):
    saved, save = [], np.save

    def saving(path, array, **options):
        if len(saved) == full_after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        save(path, array, **options)

    monkeypatch.setattr(np, "save", saving)
    case = CASES["residual"]
    with pytest.raises(OSError, match="No space left on device") as caught:
        corrected(case, case.feeds, "empirical", memory_budget=0)
    assert caught.value.errno == errno.ENOSPC
    assert list(folder.iterdir()) == []


def test_a_sample_that_fails_in_the_middle_leaves_no_files(folder, written):
    case = CASES["residual"]
    broken = [*case.batches, np.full((1, 3, 7, 6), np.nan, np.float32)]
    with pytest.raises(ValueError, match="nan"):
        corrected(case, broken, "empirical", memory_budget=0)
    assert written
    assert list(folder.iterdir()) == []


# Cost


@pytest.fixture
def executed(monkeypatch):
    """Names of the nodes that ran, as often as they did; dequantizers excepted."""
    ran: collections.Counter[str] = collections.Counter()
    lock, prepared = threading.Lock(), []
    prepare, make_part = onnx_network.Session, OnnxNetwork.part

    def session(model, *arguments, **options):
        prepared[:] = [node.name for node in model.graph.node if node.op_type != "DequantizeLinear"]
        return prepare(model, *arguments, **options)

    def part(network, given, wanted, **options):
        compute = make_part(network, given, wanted, **options)
        names = list(prepared) if any(name not in given for name in wanted) else []

        def counting(feeds):
            with lock:
                ran.update(names)
            return compute(feeds)

        return counting

    monkeypatch.setattr(onnx_network, "Session", session)
    monkeypatch.setattr(OnnxNetwork, "part", part)
    return ran


def with_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which all nodes have names."""
    copy = copy_of(model)
    for node in copy.graph.node:
        node.name = node.name or f"node of {node.output[0]}"
    return copy


def is_constant(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that read no input."""
    known = {value.name for value in model.graph.input}
    constant = set()
    for node in model.graph.node:
        if known.isdisjoint(node.input):
            constant.add(node.name)
        else:
            known.update(node.output)
    return constant


def expected_counts(model: onnx.ModelProto, times: int) -> dict[str, int]:
    constant = is_constant(model)
    nodes = [node for node in model.graph.node if node.op_type != "DequantizeLinear" and node.name not in constant]
    return {node.name: times for node in nodes}


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
def test_a_sweep_runs_each_operation_once_per_batch(name, depth, is_quantized, executed):
    case = CASES[name]
    if is_quantized and len({array.shape for feeds in case.feeds for array in feeds.values()}) > len(case.feeds[0]):
        case = dataclasses.replace(case, batches=case.batches[:1])  # what its quantizer takes
    model = with_names(quantized(case.model, case.feeds) if is_quantized else case.model)
    network = OnnxNetwork.load(model, "model")
    with Storage(1 << 30) as storage:
        held = Samples(storage)
        for feeds in case.feeds:
            held.add(feeds, 1)
        sweep = Sweep(network, network.layers, OneShard(held, 2), range(held.batches), Wanted(inputs=True), depth=depth)
        executed.clear()
        for stage in sweep.stages:
            sweep.measure(stage)
            for layer in stage.layers if depth == 1 else ():
                sweep.shift(layer, np.zeros(layer.channels))
        outputs = [feeds for _, feeds in sweep.outputs()]
        left = [key for key in storage._arrays if key[0] not in network.outputs]
    constant = is_constant(model)
    found = {name: count for name, count in executed.items() if name not in constant}
    assert found == expected_counts(model, len(case.batches))
    assert {key[0] for key in left} <= {value.name for value in model.graph.input}
    for feeds, given in zip(case.feeds, outputs):
        for array, expected in zip(given.values(), run(model, feeds)):
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=0.1 if is_quantized else 1e-4)


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
def test_positions_are_those_of_the_outputs_where_only_inputs_are_measured(name, depth):
    case = CASES[name]
    network = OnnxNetwork.load(case.model, "model")
    found = []
    for outputs in (True, False):
        with Storage(1 << 30) as storage:
            held = Samples(storage)
            for feeds in case.feeds:
                held.add(feeds, 1)
            wanted = Wanted(outputs=outputs, inputs=True)
            sweep = Sweep(network, network.layers, OneShard(held, 2), range(held.batches), wanted, depth=depth)
            measured = {name: each for stage in sweep.stages for name, each in sweep.measure(stage).items()}
        assert measured.keys() == {layer.name for layer in network.layers}
        assert all(each.output.means.any() == outputs for each in measured.values())
        found.append({name: (each.output.positions.sum(), each.input.tolist()) for name, each in measured.items()})
    assert found[0] == found[1]


def test_empirical_takes_two_passes_and_one_to_score(executed):
    """Half of the samples are scored: float, uncorrected, corrected, and float again to see whether that is chance.

    Four of them show the errors of layers in these three.
    """
    case = dataclasses.replace(CASES["depth 32"], batches=images(*[1] * 12))
    correct(with_names(case.model), case.feeds, method="empirical", quant_params=PARAMS)
    assert {executed[name] for name in layer_names(case.model)} == {2 * 12 + 3 * 6 + 5 + 3 * 4}


PEAK = """
from pathlib import Path
import sys
import numpy as np
from biascorr import QuantParams, correct
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

def batches(count):
    for seed in range(count):
        yield np.random.default_rng(seed).random((1, 3, 128, 128), np.float32)

def work(count):
    params = QuantParams("tf", weight_bits=4)
    correct(sys.argv[1], batches(count), method="empirical", quant_params=params, memory_budget=8 << 20)

work(8)
before = peak()
work(96)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_budget(tmp_path):
    """The output of a layer takes 96 MB in all, where a residual begins twice as much; the budget is 8 MB."""
    text = """g (float[N,3,128,128] x) => (float[N,4] y) {
        [one] a = Conv(x, w1, b1) r = Relu(a) [two] c = Conv(r, w2, b2) s = Add(c, r) q = Relu(s) [three] d = Conv(q, w3, b3)
        m = GlobalAveragePool(d) y = Flatten(m) }"""
    constants = {"w1": conv(16, 3, 1, 1), "w2": conv(16, 16, 1, 1), "w3": conv(4, 16, 1, 1)}
    model = model_from_text(text, **constants, b1=biases(16), b2=biases(16), b3=biases(4))
    onnx.save(model, tmp_path / "model.onnx")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model.onnx")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    limit = 32 << 10  # kB; a loaded machine lets threads get ahead by some batches: 18 MB were seen
    assert int(grown) < limit, f"{grown} kB more for 12 times the samples"


@pytest.mark.parametrize(("budget", "expected"), [(1 << 30, {4}), (0, {1}), (17 << 20, {1, 2, 3})])
def test_batches_in_flight_count(budget, expected, monkeypatch):
    """A batch takes 1 MB and makes 4 MB: with room for some at once, no more than these run."""
    text = """g (float[N,4,256,256] x) => (float[N,4,1,1] z) {
        [layer] y = Conv(x, w) r = Relu(y) [second] t = Conv(r, w) z = GlobalAveragePool(t) }"""
    network = OnnxNetwork.load(model_from_text(text, w=weights(4, 4, 1, 1)), "model")
    seen, run_in_order = set(), cut.in_order

    def in_order(function, batches, workers, **options):
        seen.add(workers)
        return run_in_order(function, batches, workers, **options)

    monkeypatch.setattr(cut, "in_order", in_order)
    with Storage(budget) as storage:
        held = Samples(storage)
        for _ in range(8):
            held.add({"x": np.ones((1, 4, 256, 256), np.float32)}, 1)
        sweep = Sweep(network, network.layers, OneShard(held, 4), range(8), Wanted())
        sweep.measure(sweep.stages[0])
    assert seen <= expected
    assert (max(seen) > 1) == (budget > 0)


def test_outputs_that_are_kept_are_not_written_again():
    text = """g (float[N,4,128,128] x) => (float[N,4,128,128] y, float[N,4,128,128] z, float[N,4,128,128] u) {
        [layer] y = Conv(x, w)
        z = Relu(y)
        u = Neg(z)
    }"""
    model = model_from_text(text, w=weights(4, 4, 1, 1))
    network, batches = OnnxNetwork.load(model, "model"), np.split(samples(16, 4, 128, 128), 16)
    with Storage(1 << 30) as storage:
        held = Samples(storage)
        for batch in batches:
            held.add({"x": batch}, 1)
        sweep = Sweep(network, network.layers, OneShard(held, 2), range(held.batches), Wanted())
        for stage in sweep.stages:
            sweep.measure(stage)
        kept = [outputs for _, outputs in sweep.outputs()]
    for batch, outputs in zip(batches, kept):
        for name, expected in zip("yzu", run(model, {"x": batch})):
            np.testing.assert_allclose(outputs[name], expected, rtol=1e-6, atol=1e-6)


def test_activation_that_makes_more_channels_is_none():
    text = """g (float[N,3,6,6] x) => (float[N,4,6,6] z) {
        [layer] y = Conv(x, w, b)
        m = Mul(y, factors)
        z = Relu(m)
    }"""
    factors = np.arange(1, 5, dtype=np.float32).reshape(1, 4, 1, 1)
    model, x = model_from_text(text, w=weights(1, 3, 1, 1), b=biases(1), factors=factors), samples(8, 3, 6, 6)
    by_activation, empirical = (correct(model, x, method=method, quant_params=PARAMS) for method in ("activation", "empirical"))
    assert constants_of(by_activation.model)["b"] == constants_of(empirical.model)["b"]
