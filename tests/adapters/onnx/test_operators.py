"""Operators with quantized weights inside: QLinearConv, QLinearMatMul, QLinearAdd, QGemm, MatMulNBits."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import QuantFormat, QuantType

from biascorr.adapters.onnx import files
from biascorr.adapters.onnx.bias import bias_of
from biascorr.adapters.onnx.graph import Graph
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph.reasons import ReasonCode
from networks import (
    biases,
    constants_of,
    mean_corrected,
    model_from_text,
    output_shift,
    quantized,
    run,
    samples,
    stripped,
    weights,
    with_constants,
)

X = samples(16, 3, 8, 8)
BATCHES = [{"x": batch} for batch in np.split(X, 4)]

TEXT = """g (float[N,3,8,8] x) => (float[N,5] y) {{
    [padded] a = Conv<pads=[1,1,0,2], strides=[2,1]>(x, w1{b1})
    [relu] r = Relu(a)
    [depth] d = Conv<group=4>(r, w2{b2})
    [pool] m = GlobalAveragePool(d)
    [flatten] f = Flatten(m)
    [product] p = MatMul(f, w3)
    {sum}
    [last] y = Gemm<transB=1>(s, w4{b4})
}}"""
LAYERS = {"padded": "w1", "depth": "w2", "product": "w3", "last": "w4"}


def network(*, biased=True, opset=17, activation="LeakyRelu"):
    names = {name: f", {name}" if biased else "" for name in ("b1", "b2", "b4")}
    text = TEXT.format(**names, sum="[sum] s = Add(p, b3)" if biased else f"[sum] s = {activation}(p)")
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (8, 7), "w4": (5, 7)}
    shapes |= {"b1": (4,), "b2": (8,), "b3": (7,), "b4": (5,)} if biased else {}
    constants = {name: (0.4 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return model_from_text(text, opset=opset, **constants)


def in_operators(model, *, per_channel=False, activations=QuantType.QUInt8, weight_type=QuantType.QInt8):
    """Weights of 7 bits where onnxruntime saturates products of unsigned and signed 8 bits on CPUs without VNNI."""
    return quantized(
        model,
        BATCHES,
        quant_format=QuantFormat.QOperator,
        per_channel=per_channel,
        activation_type=activations,
        weight_type=weight_type,
        reduce_range=(activations, weight_type) == (QuantType.QUInt8, QuantType.QInt8),
    )


def node_of(model, layer):
    return next(node for node in model.graph.node if node.name in (layer, f"{layer}_quant"))


def real(values, step, zero_point, axis=None):
    shape = [-1 if k == axis and step.size > 1 else 1 for k in range(values.ndim)]
    return (values.astype(np.float64) - zero_point.astype(np.float64).reshape(shape)) * step.reshape(shape)


def shift_of(model, given, layer, x):
    """How the weight error of one layer of a model in operators shifts its mean output, from what it reads there."""
    constants, node = constants_of(given), node_of(given, layer)
    read, *x_parameters = (run(given, {"x": x}, [node.input[0]])[0], *(constants[name] for name in node.input[1:3]))
    w = real(*(constants[name] for name in node.input[3:6]), axis=1 if layer == "product" else 0)
    error = constants_of(model)[LAYERS[layer]].astype(np.float64) - w
    return output_shift(model, layer, real(read, *x_parameters).astype(np.float32), error, 1)


def bias_and_steps(model, layer):
    """The integers of a bias in a model in operators, and their steps."""
    constants = constants_of(model)
    if layer == "product":
        node = node_of(model, "sum")
        return constants[node.input[3]].astype(np.int64), constants[node.input[4]]
    node = node_of(model, layer)
    name = node.input[8 if node.op_type == "QLinearConv" else 6]
    steps = constants[node.input[1]].astype(np.float64) * constants[node.input[4]]
    return (constants[name].astype(np.int64) if name else np.zeros(1, np.int64)), steps


QUANTIZERS = {
    "uint8 activations": {},
    "int8": {"activations": QuantType.QInt8},
    "per channel": {"per_channel": True},
    "uint8 weights": {"weight_type": QuantType.QUInt8},
    "opset 12, per channel": {"per_channel": True, "opset": 12},
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_shift_of_each_layer_goes_into_its_bias_of_integers(name):
    options = dict(QUANTIZERS[name])
    model = network(opset=options.pop("opset", 17))
    given = in_operators(model, **options)
    correction = mean_corrected(model, X, quantized=given)
    assert [(each.name, each.op, each.method) for each in correction.report] == [
        ("padded_quant", "Conv", "mean"), ("depth_quant", "Conv", "mean"), ("product_quant", "MatMul", "mean"),
        ("last_quant", "Gemm", "mean"),
    ]  # fmt: skip
    report = {each.name.removesuffix("_quant"): each for each in correction.report}
    for layer in LAYERS:
        shift = shift_of(model, given, layer, X)
        (before, steps), (after, _) = bias_and_steps(given, layer), bias_and_steps(correction.model, layer)
        if "saturates" in report[layer].reason:
            assert layer == "product"
            continue
        assert report[layer].reason == ""
        assert np.abs(after - before).max() > (0 if layer == "product" else 5)
        np.testing.assert_allclose((after - before) * steps, shift, rtol=0, atol=0.51 * steps.max())
        np.testing.assert_allclose(report[layer].shift_before, np.abs(shift).mean(), rtol=1e-2)


@pytest.mark.parametrize("per_channel", [False, True])
def test_nothing_but_the_values_of_biases_changes(per_channel):
    given = in_operators(network(), per_channel=per_channel)
    corrected = mean_corrected(network(), X, quantized=given).model
    names = ["b1_quantized", "b2_quantized", "b3_quantized", "b4_quantized"]
    before, after = constants_of(given), constants_of(corrected)
    for name in names:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
        assert not np.array_equal(after[name], before[name])
    assert stripped(corrected, names) == stripped(given, names)


@pytest.mark.parametrize("per_channel", [False, True])
def test_biases_are_added_where_there_are_none(per_channel):
    model = network(biased=False)
    given = in_operators(model, per_channel=per_channel)
    correction = mean_corrected(model, X, quantized=given)
    corrected = correction.model
    assert [each.reason for each in correction.report] == ["it had no bias; one was added"] * 4
    onnx.checker.check_model(corrected, full_check=True)
    for layer in ("padded", "depth", "last"):
        shift = shift_of(model, given, layer, X)
        after, steps = bias_and_steps(corrected, layer)
        assert constants_of(corrected)[node_of(corrected, layer).input[-1 if layer != "last" else 6]].dtype == np.int32
        np.testing.assert_allclose(after * steps, shift, rtol=0, atol=0.51 * steps.max())
    added = next(k for k, node in enumerate(corrected.graph.node) if node.name == "product_quant") + 1
    real, bias, add, quantized = corrected.graph.node[added : added + 4]
    assert [each.op_type for each in (real, bias, add, quantized)] == ["DequantizeLinear"] * 2 + ["Add", "QuantizeLinear"]
    assert [*add.input] == [real.output[0], bias.output[0]]
    assert real.input[1:] == bias.input[1:] == quantized.input[1:] == node_of(given, "product").input[6:8]
    assert quantized.output[0] == node_of(given, "product").output[0]
    codes, step, zero_point = (constants_of(corrected)[name] for name in bias.input)
    assert codes.dtype == zero_point.dtype
    shift = shift_of(model, given, "product", X)
    np.testing.assert_array_equal(codes.astype(int) - zero_point, np.rint(shift / step).reshape(codes.shape))
    assert corrected.graph.output == given.graph.output


def test_product_without_a_bias_that_is_clamped_before_one_could_be_added_is_left_alone():
    model = network(biased=False, activation="Relu")
    given = in_operators(model)
    assert "Relu" not in [node.op_type for node in given.graph.node]
    correction = mean_corrected(model, X, quantized=given)
    report = {each.name: each for each in correction.report}
    assert report["product_quant"].reason == "it has no bias, and its quantized output is clamped at 0"
    assert report["product_quant"].shift_after == report["product_quant"].shift_before > 0
    assert node_of(correction.model, "product") == node_of(given, "product")
    assert "MatMul" not in [node.op_type for node in correction.model.graph.node]


def test_correction_brings_the_mean_output_nearer_to_that_of_the_float_model():
    model = network()
    given = in_operators(model, activations=QuantType.QInt8)
    corrected = mean_corrected(model, X, quantized=given).model
    expected, before, after = (run(each, {"x": X})[0].mean(axis=0) for each in (model, given, corrected))
    assert np.linalg.norm(after - expected) < 0.8 * np.linalg.norm(before - expected)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_parts_compute_what_the_model_does(name):
    options = dict(QUANTIZERS[name])
    given = in_operators(network(opset=options.pop("opset", 17)), **options)
    tensors = ["a_quantized", "d_quantized", "p_quantized", "s_quantized", "y_quantized"]
    found = OnnxNetwork.load(onnx.ModelProto.FromString(given.SerializeToString()), "model").part({"x": X}, tensors)({"x": X})
    for tensor, expected in zip(tensors, run(given, {"x": X}, tensors), strict=True):
        assert found[tensor].dtype == expected.dtype
        difference = found[tensor].astype(int) - expected
        assert np.abs(difference).max() <= 2
        assert np.abs(difference).mean() < 0.05


def test_a_bias_that_was_added_is_in_the_parts_computed_afterwards():
    for biased in (True, False):
        adapter = OnnxNetwork.load(in_operators(network(biased=biased), activations=QuantType.QInt8), "model")
        for layer in adapter.layers:
            before = adapter.part({"x": X}, [layer.output])({"x": X})[layer.output].astype(np.float64)
            shift = np.linspace(-0.2, 0.2, layer.channels)
            change = adapter.bias_change(layer, shift)
            shifted = adapter.with_shifts({layer.name: shift})
            output = next(each.output for each in shifted.layers if each.name == layer.name)
            after = shifted.part({"x": X}, [output])({"x": X})[output]
            aligned = change.applied.reshape(-1, *[1] * (-layer.output_axis - 1))
            is_rounded = output != layer.output  # an Add after a product that is quantized already
            tolerance = constants_of(adapter.model)["p_scale"] / 2 + 1e-5 if is_rounded else 1e-5
            assert is_rounded == (layer.op == "MatMul" and not biased)
            np.testing.assert_allclose(after - before, np.broadcast_to(aligned, after.shape), rtol=0, atol=tolerance)
            saturates = any(reason.code is ReasonCode.BIAS_SATURATES for reason in change.reasons)
            assert saturates or np.abs(change.applied - shift).max() < 0.02
        adapter = adapter.with_shifts({layer.name: np.linspace(-0.2, 0.2, layer.channels) for layer in adapter.layers})
        again = OnnxNetwork.load(adapter.model, "again")
        assert [layer.name for layer in again.layers] == [layer.name for layer in adapter.layers]
        (y,), (expected,) = (list(each.part({"x": X}, ["y"])({"x": X}).values()) for each in (again, adapter))
        np.testing.assert_allclose(y.mean(axis=0), expected.mean(axis=0), rtol=0, atol=0.05)  # to roundings in other places


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("biased", [False, True])
def test_biases_of_operators_are_read_added_to_and_set(name, biased):
    """In their own formats: read in real units, changed by what is promised, set to within half a step."""
    options = dict(QUANTIZERS[name])
    model = in_operators(network(opset=options.pop("opset", 17), biased=biased), **options)
    for layer in OnnxNetwork.load(model, "model").layers:
        graph = Graph(*files.load(model, "model"))
        node = next(each for each in graph.nodes if each.name == layer.name)
        bias, shift = bias_of(graph, node, layer.output_axis), np.linspace(-0.1, 0.1, layer.channels)
        before, change = bias.read(), bias.change(layer, shift)
        if before is None:
            assert ReasonCode.BIAS_ADDED() in change.reasons
            before = layer.along_channels(np.zeros(layer.channels))
        else:
            np.testing.assert_allclose(before, layer.bias, rtol=1e-6, atol=1e-7)
        bias.add(layer, shift)
        changed = bias_of(graph, node, layer.output_axis).read()
        if changed is not None:  # else it is an Add after a quantizer
            np.testing.assert_allclose(changed - before, np.broadcast_to(layer.along_channels(change.applied), changed.shape))
            bias_of(graph, node, layer.output_axis).set(layer, before)
            step = np.abs(change.applied - shift).max() * 2 + 1e-2
            np.testing.assert_allclose(bias_of(graph, node, layer.output_axis).read(), before, rtol=0, atol=step)


def test_operations_and_layers_name_tensors_of_the_same_graph():
    adapter = OnnxNetwork.load(in_operators(network()), "model")
    made = {name for operation in adapter.operations for name in operation.outputs}
    names = [operation.name for operation in adapter.operations]
    assert len(set(names)) == len(names)
    for layer in adapter.layers:
        assert {layer.output, layer.input} <= made
        assert layer.input_quantization is not None
        assert layer.name in names
        assert layer.weight_step is not None


def test_bias_of_int32_that_saturates_is_clamped_and_reported():
    given = with_constants(in_operators(network()), b1_quantized=np.full(4, 2**31 - 1, np.int32))
    correction = mean_corrected(network(), X, quantized=given)
    beyond = shift_of(network(), given, "padded", X) > 0
    assert 0 < beyond.sum() < 4
    after = constants_of(correction.model)["b1_quantized"]
    assert ((after == 2**31 - 1) == beyond).all()
    assert correction.report[0].reason == f"int32 bias saturates in {beyond.sum()} of 4 channels"


def test_bias_of_8_bits_that_saturates_is_clamped_and_reported():
    given = with_constants(in_operators(network(), activations=QuantType.QInt8), b3_quantized=np.full(7, 127, np.int8))
    correction = mean_corrected(network(), X, quantized=given)
    wanted = np.rint(shift_of(network(), given, "product", X) / constants_of(given)["b3_scale"])
    assert 0 < (wanted > 0).sum() < 7
    np.testing.assert_array_equal(constants_of(correction.model)["b3_quantized"], np.minimum(127 + wanted, 127))
    assert correction.report[2].reason == f"int8 bias saturates in {(wanted > 0).sum()} of 7 channels"


QUANTIZE = "q = QuantizeLinear(x, xs, xz)"


@pytest.mark.parametrize(("scale", "zero_point"), [((5,), ()), ((5,), (1,)), ((), (1,)), ((1,), ()), ((1,), (1,))])
def test_parameters_of_weights_may_differ_in_shape(scale, zero_point):
    text = f"""g (float[?,3,?,?] x) => (uint8[?,5,?,?] y) {{
        {QUANTIZE} [layer] y = QLinearConv(q, xs, xz, w, ws, wz, ys, xz, b)
    }}"""
    w, step = weights(5, 3, 3, 3), np.full(scale, 1 / 16, np.float32)
    constants = {"w": (np.rint(w * 16) + 3).astype(np.int8), "ws": step, "wz": np.full(zero_point, 3, np.int8)}
    constants |= {"xs": np.float32(1 / 8), "xz": np.uint8(40), "ys": np.float32(0.2), "b": np.arange(5, dtype=np.int32)}
    given = model_from_text(text, **{name: np.asarray(array) for name, array in constants.items()})
    model = model_from_text("g (float[?,3,?,?] x) => (float[?,5,?,?] y) { [layer] y = Conv(x, w, b) }", w=w, b=biases(5))
    corrected = mean_corrected(model, X, quantized=given).model
    shift = output_shift(model, "layer", X, w - np.rint(w * 16) / 16, 1)
    np.testing.assert_array_equal(constants_of(corrected)["b"], np.arange(5) + np.rint(shift * 128))


def test_a_bias_that_two_operators_share_is_told_apart():
    text = f"""g (float[?,3,?,?] x) => (uint8[?,5,?,?] u, uint8[?,5,?,?] v) {{
        {QUANTIZE}
        [one] u = QLinearConv(q, xs, xz, w, ws, wz, ys, xz, b)
        [two] v = QLinearConv<strides=[2,2]>(q, xs, xz, w, ws, wz, ys, xz, b)
    }}"""
    w, step = weights(5, 3, 3, 3), np.float32(1 / 16)
    constants = {"w": np.rint(w / step).astype(np.int8), "ws": step, "wz": np.int8(0), "b": np.arange(5, dtype=np.int32)}
    constants |= {"xs": np.float32(1 / 8), "xz": np.uint8(40), "ys": np.float32(0.2)}
    given = model_from_text(text, **{name: np.asarray(array) for name, array in constants.items()})
    float_text = """g (float[?,3,?,?] x) => (float[?,5,?,?] u, float[?,5,?,?] v) {
        [one] u = Conv(x, w, b) [two] v = Conv<strides=[2,2]>(x, w, b)
    }"""
    model = model_from_text(float_text, w=w, b=biases(5))
    corrected = mean_corrected(model, X, quantized=given).model
    for node in corrected.graph.node[1:]:
        shift = output_shift(model, node.name, X, w - np.rint(w / step) * step, 1)
        np.testing.assert_array_equal(constants_of(corrected)[node.input[8]], np.arange(5) + np.rint(shift / (step / 8)))


@pytest.mark.parametrize("real_output", [False, True])
@pytest.mark.parametrize("c", [None, (5,), (1, 5), (1,), ()])
def test_gemm_with_a_factor(c, real_output):
    x, w, step = samples(12, 7), weights(7, 5, axis=1), np.float32(1 / 16)
    output, tail = ("float[?,?] y", "") if real_output else ("uint8[?,?] y", ", ys, xz")
    text = f"""g (float[?,?] x) => ({output}) {{
        {QUANTIZE}
        [layer] y = com.microsoft.QGemm<alpha=0.5>(q, xs, xz, w, ws, wz, {"b" if c is not None else ""}{tail})
    }}"""
    constants = {"xs": np.float32(1 / 8), "xz": np.uint8(40), "ys": np.float32(0.2), "ws": step, "wz": np.int8(0)}
    constants |= {"w": np.rint(w / step).astype(np.int8)} | ({} if c is None else {"b": np.full(c, 3, np.int32)})
    arrays = {name: np.asarray(array) for name, array in constants.items() if name != "ys" or not real_output}
    given = contributed(model_from_text(text, **arrays))
    model = model_from_text("g (float[?,?] x) => (float[?,?] y) { [layer] y = Gemm<alpha=0.5>(x, w) }", w=w)
    correction = mean_corrected(model, x, quantized=given)
    node = correction.model.graph.node[1]
    shift = 0.5 * x.mean(axis=0, dtype=np.float64) @ (w - np.rint(w / step) * step)
    expected = (0 if c is None else 3) + np.rint(shift / (step / 8 * 0.5))
    found = constants_of(correction.model)[node.input[6]]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.reshape(-1), expected)
    before, after = (run(each, {"x": x})[0].astype(float) for each in (given, correction.model))
    assert np.abs((after - before).mean(axis=0) * (1 if real_output else 0.2) - shift).max() < 0.05


def contributed(model):
    """The model with contributed operators; inputs called `nothing`, as the textual form has no empty ones, are left out."""
    for node in model.graph.node:
        inputs = ["" if name == "nothing" else name for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_bias_in_an_add_without_a_zero_point_of_its_output(dtype):
    text = f"""g (float[?,7] x) => ({dtype}[?,5] y) {{
        {QUANTIZE}
        [layer] t = QLinearMatMul(q, xs, xz, w, ws, wz, ts, xz)
        [sum] y = com.microsoft.QLinearAdd(b, bs, bz, t, ts, xz, ts)
    }}"""
    x, w, step = samples(12, 7), weights(7, 5, axis=1), np.float32(1 / 16)
    constants = {
        "xs": np.float32(1 / 8),
        "xz": np.array(40, dtype),
        "ts": np.float32(1 / 8),
        "bs": np.float32(1 / 32),
        "bz": np.array(0, dtype),
    }
    constants |= {"w": np.rint(w / step).astype(np.int8), "ws": step, "wz": np.int8(0), "b": np.full(5, 9, dtype)}
    given = contributed(model_from_text(text, **{name: np.asarray(array) for name, array in constants.items()}))
    float_text = "g (float[?,7] x) => (float[?,5] y) { [layer] t = MatMul(x, w) [sum] y = Add(t, b) }"
    model = model_from_text(float_text, w=w, b=biases(5))
    corrected = mean_corrected(model, x, quantized=given).model
    shift = x.mean(axis=0, dtype=np.float64) @ (w - np.rint(w / step) * step)
    np.testing.assert_array_equal(constants_of(corrected)["b"], 9 + np.rint(shift * 32))
    assert stripped(corrected, ["b"]) == stripped(given, ["b"])
    (layer,) = OnnxNetwork.load(given, "model").layers
    feeds = {"x": x}
    assert OnnxNetwork.load(given, "model").part(feeds, [layer.output])(feeds)[layer.output].dtype == np.float32


def test_product_with_a_step_per_row_of_its_input_is_left_alone():
    text = "g (uint8[4,7] x) => (uint8[4,5] y) { [layer] y = QLinearMatMul(x, xs, xz, w, ws, wz, ws, wz) }"
    constants = {"xs": np.ones(4, np.float32), "xz": np.zeros(4, np.uint8), "ws": np.float32(1), "wz": np.uint8(0)}
    arrays = {name: np.asarray(array) for name, array in constants.items()}
    adapter = OnnxNetwork.load(model_from_text(text, w=np.ones((7, 5), np.uint8), **arrays), "model")
    assert (adapter.layers, [each.name for each in adapter.unsupported]) == ([], ["layer"])


LEFT_ALONE = {
    "a step that is computed": "s = Abs(t) y = QLinearConv(x, s, xz, w, ws, wz, ys, xz, b)",
    "channels last": "y = com.microsoft.QLinearConv<channels_last=1>(x, xs, xz, w, ws, wz, ys, xz, b)",
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_operator_of_a_form_that_is_not_written_in_others_is_left_alone(name):
    text = f"g (uint8[1,3,9,3] x, float[] t) => (uint8[?,?,?,?] y) {{ {LEFT_ALONE[name]} }}"
    w, step = weights(3, 3, 3, 3), np.float32(1 / 16)
    constants = {"w": np.rint(w / step).astype(np.int8), "ws": step, "wz": np.int8(0), "b": np.arange(3, dtype=np.int32)}
    constants |= {"xs": np.float32(1 / 8), "xz": np.uint8(40), "ys": np.float32(0.2)}
    given = model_from_text(text, **{each: np.asarray(array) for each, array in constants.items()})
    adapter = OnnxNetwork.load(contributed(given), "model")
    assert adapter.layers == []
    assert [(each.op, each.reason) for each in adapter.unsupported] == [("QLinearConv", "operator is not supported")]


# Weights of some bits in blocks


K, N = 70, 5
MATMUL = "g (float[?,70] x) => (float[?,5] y) { [layer] y = MatMul(x, w) }"
MATMUL_ADD = "g (float[?,70] x) => (float[?,5] y) { [layer] t = MatMul(x, w) y = Add(t, b) }"


@dataclass(frozen=True)
class Blocks:
    """Weights (K, N) in blocks along K, packed as MatMulNBits has them."""

    bits: int
    block: int
    zero_points: str = "packed"
    dtype: str = "float32"

    def grids(self):
        rng = np.random.default_rng(self.bits)
        blocks = -(-K // self.block)
        steps = rng.integers(8, 16, (N, blocks)).astype(self.dtype) / 2 ** (self.bits + 1)
        middles = rng.integers(0, 2**self.bits, (N, blocks)) if self.zero_points else np.full((N, blocks), 2 ** (self.bits - 1))
        return steps, middles

    def quantized(self, w):
        """Integers (N, blocks, block), of zeros beyond K, and what they stand for, (K, N)."""
        steps, middles = (grid[..., None].astype(np.float32) for grid in self.grids())
        padded = np.zeros((N, steps.shape[1] * self.block), np.float32)
        padded[:, :K] = w.T
        q = np.clip(np.rint(padded.reshape(N, -1, self.block) / steps + middles), 0, 2**self.bits - 1)
        return q.astype(np.uint8), ((q - middles) * steps).reshape(N, -1)[:, :K].T

    def constants(self, w):
        steps, middles = self.grids()
        given = {"wq": self.packed(self.quantized(w)[0]), "ws": steps.reshape(-1)}
        if self.zero_points == "packed":
            given["wz"] = self.packed(middles.astype(np.uint8)).reshape(-1)
        elif self.zero_points == "real":
            given["wz"] = middles.astype(self.dtype).reshape(-1)
        return given

    def packed(self, q):
        per_byte = 8 // self.bits
        q = np.concatenate([q, np.zeros((*q.shape[:-1], -q.shape[-1] % per_byte), np.uint8)], axis=-1)
        q = q.reshape(*q.shape[:-1], -1, per_byte) << np.arange(0, 8, self.bits, dtype=np.uint8)
        return np.bitwise_or.reduce(q, axis=-1)

    def node(self, inputs=""):
        attributes = f"<K={K}, N={N}, bits={self.bits}, block_size={self.block}>"
        return f"com.microsoft.MatMulNBits{attributes}(x, wq, ws{', wz' if self.zero_points else ''}{inputs})"


BLOCKS = {
    "4 bits": Blocks(4, 32),
    "4 bits, symmetric": Blocks(4, 16, ""),
    "4 bits, zero points of floats": Blocks(4, 32, "real"),
    "4 bits, one block": Blocks(4, 128),
    "8 bits": Blocks(8, 16),
    "8 bits, symmetric": Blocks(8, 64, ""),
    "2 bits": Blocks(2, 16),
}


def n_bits_model(blocks, body, w, **constants):
    arrays = {**blocks.constants(w), **constants}
    return contributed(model_from_text(f"g (float[?,70] x) => (float[?,5] y) {{ {body} }}", **arrays))


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_in_blocks_are_what_onnxruntime_multiplies_with(name):
    blocks, w = BLOCKS[name], weights(K, N, axis=1)
    given = n_bits_model(blocks, f"[layer] y = {blocks.node()}", w)
    (layer,) = OnnxNetwork.load(given, "model").layers
    assert (layer.name, layer.op, layer.layout, layer.channels) == ("layer", "MatMul", "IO", N)
    np.testing.assert_array_equal(layer.weights, blocks.quantized(w)[1])
    np.testing.assert_allclose(run(given, {"x": np.eye(K, dtype=np.float32)})[0], layer.weights, rtol=1e-6, atol=1e-6)


def test_weights_in_blocks_of_a_model_of_float16():
    blocks, w = Blocks(4, 32, dtype="float16"), weights(K, N, axis=1)
    text = f"g (float16[?,70] x) => (float16[?,5] y) {{ [layer] y = {blocks.node()} }}"
    given = contributed(model_from_text(text, **blocks.constants(w)))
    half = model_from_text(MATMUL.replace("float", "float16"), w=w.astype(np.float16))
    x = samples(12, K, dtype="float16")
    correction = mean_corrected(half, [x], quantized=given)
    (bias,) = (array for name, array in constants_of(correction.model).items() if name.startswith("y_bias"))
    shift = x.mean(axis=0, dtype=np.float64) @ (w - blocks.quantized(w)[1])
    assert bias.dtype == np.float16
    np.testing.assert_allclose(bias, shift, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("bias", ["input", "add", "none"])
def test_bias_of_weights_in_blocks(name, bias):
    blocks, w, b, x = BLOCKS[name], weights(K, N, axis=1), biases(N), samples(12, K)
    missing = ", nothing" * (1 if blocks.zero_points else 2)
    body = {
        "input": f"[layer] y = {blocks.node(f'{missing}, b')}",
        "add": f"[layer] t = {blocks.node()} y = Add(t, b)",
        "none": f"[layer] y = {blocks.node()}",
    }[bias]
    given = n_bits_model(blocks, body, w, **({} if bias == "none" else {"b": b}))
    model = model_from_text(MATMUL if bias == "none" else MATMUL_ADD, w=w, **({} if bias == "none" else {"b": b}))
    correction = mean_corrected(model, [x], quantized=given)
    expected, before, after = (
        run(each, {"x": x})[0].mean(axis=0, dtype=np.float64) for each in (model, given, correction.model)
    )
    assert np.abs(before - expected).max() > 0.05
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-4)
    assert correction.report[0].reason == ("it had no bias; one was added" if bias == "none" else "")
    if bias == "none":
        assert [node.op_type for node in correction.model.graph.node] == ["MatMulNBits", "Add"]
    else:
        assert stripped(correction.model, ["b"]) == stripped(given, ["b"])
    again = mean_corrected(model, [x], quantized=correction.model)
    np.testing.assert_allclose(run(again.model, {"x": x})[0].mean(axis=0) - after, expected - before, rtol=1e-3, atol=1e-4)


def test_weights_in_blocks_of_a_form_that_is_not_known_are_left_alone():
    blocks = Blocks(4, 32)
    given = n_bits_model(
        blocks, f"order = Identity(o) [layer] y = {blocks.node(', order')}", weights(K, N, axis=1), o=np.zeros(K, np.int32)
    )
    adapter = OnnxNetwork.load(given, "model")
    assert adapter.layers == []
    assert [each.reason for each in adapter.unsupported] == ["operator is not supported"]
