"""New and moved biases in the type, domain and opset of their layer: the model loads, and computes what was said."""

import itertools
import warnings

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType

from biascorr import correct
from biascorr.adapters.onnx.network import OnnxNetwork
from networks import constants_of, model_from_text, quantized, samples, weights

KERNELS = {"Conv": (4, 3, 1, 1), "ConvTranspose": (3, 4, 1, 1), "Gemm": (3, 4), "MatMul": (3, 4)}
CHANNELS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
SHAPES = {"Conv": (3, 4, 4), "ConvTranspose": (3, 4, 4), "Gemm": (3,), "MatMul": (5, 3)}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


def graph_of(nodes, constants, layer, dtype, opset, ir_version, domains=()):
    shape = ["N", *SHAPES[layer]]
    made = [*shape[:-1], 4] if layer in ("Gemm", "MatMul") else ["N", 4, *shape[2:]]
    values = [helper.make_tensor_value_info(name, TYPES[dtype], axes) for name, axes in (("x", shape), ("y", made))]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    inputs = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors] if ir_version < 4 else []
    graph = helper.make_graph(nodes, "g", [values[0], *inputs], [values[1]], tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def pair_of(
    layer,
    dtype="float32",
    opset=17,
    ir_version=8,
    domain="",
    activations=True,
    per_channel=True,
    *,
    output=None,
    top=3,
    scale=1.0,
):
    """A float network of one layer without a bias, and it quantized, its output with (step, zero point) where wanted."""
    axis = CHANNELS[layer]
    w = ((weights(*KERNELS[layer], axis=axis) + 0.2) * scale).astype(dtype)
    others = tuple(k for k in range(w.ndim) if k != axis)
    step = (np.abs(w.astype(np.float64)).max(axis=others if per_channel else None) / top).astype(dtype)
    aligned = step.reshape([-1 if k == axis else 1 for k in range(w.ndim)]) if per_channel else step
    codes = np.rint(w.astype(np.float64) / aligned).astype(np.int8)
    float_model = graph_of([helper.make_node(layer, ["x", "w"], ["y"], "layer")], {"w": w}, layer, dtype, opset, ir_version)
    constants = {"q": codes, "s": step, "z": np.zeros(step.shape, np.int8)}
    given = {"axis": axis} if per_channel else ({"axis": 0} if domain else {})
    nodes, read = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["wd"], domain=domain, **given)], "x"
    if activations:
        constants |= {"xs": np.array(1 / 64 * scale, dtype), "xz": np.int8(-20)}
        nodes += [helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], domain=domain)]
        nodes += [helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], domain=domain)]
        read = "xd"
    nodes.append(helper.make_node(layer, [read, "wd"], ["y" if output is None else "t"], "layer"))
    if output is not None:
        constants |= {"ys": np.array(output[0], dtype), "yz": output[1]}
        nodes += [helper.make_node("QuantizeLinear", ["t", "ys", "yz"], ["tq"], domain=domain)]
        nodes += [helper.make_node("DequantizeLinear", ["tq", "ys", "yz"], ["y"], domain=domain)]
    quantized = graph_of(nodes, constants, layer, dtype, opset, ir_version, [domain] * bool(domain))
    return float_model, quantized


def corrected(float_model, quantized, data, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made the outputs worse", UserWarning)
        return correct(float_model, data, quantized=quantized, **{"method": "empirical", **options})


def outputs_of(model, x, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0].astype(np.float64)


def assert_mean_outputs_agree(float_model, model, data, layer, tolerance):
    axes = tuple(k for k in range(len(SHAPES[layer]) + 1) if k != (1 if "Conv" in layer else len(SHAPES[layer])))
    for level in (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
        expected, found = (outputs_of(each, data, level).mean(axis=axes) for each in (float_model, model))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def cases():
    either = (True, False)
    for layer, dtype, activations, per_channel in itertools.product(KERNELS, ("float32", "float16"), either, either):
        for opset, ir_version in ((19, 9), (21, 10), (23, 11)):
            yield layer, dtype, opset, ir_version, "", activations, per_channel
    for layer, activations, per_channel in itertools.product(KERNELS, either, either):
        for opset, ir_version in ((10, 5), (13, 7), (17, 8)):
            if not (per_channel and opset < 13) and not (layer == "Gemm" and opset < 11):  # where it has to have a bias
                yield layer, "float32", opset, ir_version, "", activations, per_channel
        for opset, ir_version in ((7, 3), (9, 4), (11, 6), (17, 8)):
            if layer != "Gemm" or opset >= 11:
                yield layer, "float32", opset, ir_version, "com.microsoft", activations, per_channel


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_a_new_bias(case):
    layer, dtype, opset, ir_version, domain, activations, per_channel = case
    float_model, quantized = pair_of(layer, dtype, opset, ir_version, domain, activations, per_channel)
    data = samples(24, *SHAPES[layer], dtype=dtype)
    correction = corrected(float_model, quantized, data)
    (row,) = correction.report
    assert (row.method, row.reason) == ("empirical", "it had no bias; one was added")
    tolerance = 0.02 if dtype == "float16" else 2e-3
    assert_mean_outputs_agree(float_model, correction.model, data, layer, tolerance)
    onnx.checker.check_model(correction.model) if not domain else None
    new = [array for name, array in constants_of(correction.model).items() if name not in constants_of(quantized)]
    if activations and layer != "MatMul":
        assert {array.dtype for array in new} == {np.dtype(np.int32), np.dtype(dtype)}
    else:
        assert {array.dtype for array in new} == {np.dtype(dtype)}


@pytest.mark.parametrize("opset", [17, 19, 21])
@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose", "Gemm"])
def test_a_step_that_float16_has_not(layer, opset):
    """The product of the steps of a layer may be far below the least number of their type: the new bias is real.

    Before a quantizer, onnxruntime would quantize it with a step of 0.
    """
    domain = "" if opset >= 19 else "com.microsoft"
    data = samples(24, *SHAPES[layer], dtype="float16") / np.float16(256)
    for output in (None, (1 / 64, np.int8(0))):
        float_model, quantized = pair_of(layer, "float16", opset, 8, domain, scale=2**-9, output=output)
        correction = corrected(float_model, quantized, data)
        reason = "float16 has no number near the step of its products"
        if output is None:
            assert correction.report[0].reason == f"it had no bias; one was added; its bias is real: {reason}"
            (bias,) = [array for name, array in constants_of(correction.model).items() if name not in constants_of(quantized)]
            assert bias.dtype == np.float16
        else:
            assert correction.report[0].reason == f"it has no bias, and {reason}"
            assert correction.model == quantized


def test_a_step_below_the_normal_numbers_of_float16():
    """It is near enough to the product that integer kernels take for it."""
    float_model, quantized = pair_of("Conv", "float16", 21, 10, scale=2**-4, output=(1 / 64, np.int8(0)))
    data = samples(24, *SHAPES["Conv"], dtype="float16") / np.float16(8)
    correction = corrected(float_model, quantized, data)
    assert correction.report[0].reason == "it had no bias; one was added"
    steps = constants_of(correction.model)["t_bias_scale"]
    assert (steps < np.finfo(np.float16).smallest_normal).any()
    assert_mean_outputs_agree(float_model, correction.model, data, "Conv", 0.01)


FUSED = [  # where onnxruntime would make a Gemm, and then something of it that it does not take itself
    ("float32", 10, 5, "", [None, 3], np.int8(-128)),
    ("float32", 10, 5, "com.microsoft", [None, 3], np.int8(-128)),
    ("float16", 17, 8, "com.microsoft", [None, 3], np.int8(-128)),
    ("float16", 13, 7, "com.microsoft", [2, 5, 3], np.int8(-128)),
    ("float32", 21, 10, "", [2, 5, 3], None),
    ("float16", 21, 10, "", [2, 5, 3], None),
]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_a_real_bias_that_is_added_is_not_quantized_by_onnxruntime(case, existing):
    dtype, opset, ir_version, domain, shape, zero_point = case
    output = None if zero_point is None else (np.float32(1 / 32), zero_point)
    _, quantized = pair_of("MatMul", dtype, opset, ir_version, domain, per_channel=False, output=output)
    for value in (quantized.graph.input[0], quantized.graph.output[0]):
        channels = value.type.tensor_type.shape.dim[-1].dim_value
        value.CopyFrom(helper.make_tensor_value_info(value.name, TYPES[dtype], [*shape[:-1], channels]))
    if existing:  # a number, which has to grow
        layer = next(node for node in quantized.graph.node if node.name == "layer")
        made, layer.output[0] = layer.output[0], "before"
        quantized.graph.node.insert(
            list(quantized.graph.node).index(layer) + 1, helper.make_node("Add", ["before", "b"], [made], "add")
        )
        quantized.graph.initializer.append(numpy_helper.from_array(np.array(0.25, dtype), "b"))
    network, shift = OnnxNetwork.load(quantized, "quantized"), np.linspace(0.3, 2.1, 4)
    x = samples(*(size or 6 for size in shape), dtype=dtype)
    change, moved = network.bias_change(network.layers[0], shift), network.with_shifts({"layer": shift})
    limit = np.inf if output is None else 255 / 32
    for level in (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
        before, after = (outputs_of(each.model, x, level) for each in (network, moved))
        is_inside = (before > 0) & (after < limit) if output is not None else np.ones(before.shape, bool)
        np.testing.assert_allclose((after - before - change.applied)[is_inside], 0, atol=0.02 if output is None else 1 / 32)


@pytest.mark.parametrize(("zero_point", "step"), [(np.int8(5), 1 / 64), (np.uint8(100), 1 / 64), (np.int16(0), 1 / 2**14)])
@pytest.mark.parametrize("method", ["empirical", "mean", "iterative", "auto"])
def test_a_product_with_a_quantized_output_gets_a_quantized_bias(zero_point, step, method):
    float_model, quantized = pair_of("MatMul", opset=21, ir_version=10, output=(step, zero_point), top=1)
    data = samples(24, *SHAPES["MatMul"])
    correction = corrected(float_model, quantized, data, method=method)
    nodes = [node.op_type for node in correction.model.graph.node]
    assert correction.report[0].reason == "it had no bias; one was added"
    assert nodes[nodes.index("MatMul") :] == [
        "MatMul", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Add", "QuantizeLinear", "DequantizeLinear"
    ]  # fmt: skip
    network, shift = OnnxNetwork.load(quantized, "quantized"), np.linspace(-0.3, 0.3, 4)
    change = network.bias_change(network.layers[0], shift)
    np.testing.assert_allclose(change.applied, np.rint(shift / (step)) * step)
    x = samples(6, *SHAPES["MatMul"], seed=5) / 4
    unoptimized = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    models = (network.model, network.with_shifts({"layer": shift}).model)
    before, after = (outputs_of(model, x, unoptimized) for model in models)
    limits = (np.array([np.iinfo(zero_point.dtype).min, np.iinfo(zero_point.dtype).max]) - int(zero_point)) * step
    assert (abs(before) < limits.max()).mean() > 0.5
    np.testing.assert_allclose(after, np.clip(before + change.applied, *limits), atol=1e-6)


@pytest.mark.parametrize("given", ["float", *QuantFormat], ids=str)
def test_a_network_with_other_biases_is_as_one_that_is_loaded(given):
    text = """g (float[N,3,7,6] x) => (float[N,5] y) { [first] a = Conv(x, w1, b1) r = Relu(a)
        m = GlobalAveragePool(r) f = Flatten(m) [last] y = Gemm<transB=1, beta=2.0>(f, w2, b2) }"""
    constants = {"w1": weights(4, 3, 3, 3), "w2": weights(5, 4), "b1": weights(4, 1).ravel(), "b2": weights(5, 1).ravel()}
    model, x = model_from_text(text, **constants), samples(6, 3, 7, 6)
    given = model if given == "float" else quantized(model, [{"x": x}], quant_format=given)
    network = OnnxNetwork.load(given, "model")
    shifted = network.with_shifts({layer.name: np.linspace(-0.5, 0.5, layer.channels) for layer in network.layers})
    loaded = OnnxNetwork.load(shifted.model, "model")
    assert [str(each) for each in shifted.operations] == [str(each) for each in loaded.operations]
    for ours, theirs, before in zip(shifted.layers, loaded.layers, network.layers):
        assert (ours.name, ours.output) == (theirs.name, theirs.output)
        np.testing.assert_array_equal(ours.weights, theirs.weights)
        np.testing.assert_array_equal(ours.bias, theirs.bias)
        assert not np.array_equal(ours.bias, before.bias)
    (one,), (other,) = (each.part({"x": x}, each.outputs)({"x": x}).values() for each in (shifted, loaded))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["empirical", "activation"])
@pytest.mark.parametrize("quant_format", QuantFormat, ids=str)
def test_later_layers_are_corrected_after_the_quantized_biases_of_earlier_ones(quant_format, method):
    text = "g (float[N,8] x) => (float[N,8] y) { [a] t = MatMul(x, v) u = Tanh(t) [b] z = MatMul(u, w) y = Tanh(z) }"
    scales = np.where(np.arange(8) == 0, 8, 1)  # of one step for all channels, which is coarse for most
    model = model_from_text(text, **{name: (weights(8, 8, axis=1) * scales / 8).astype(np.float32) for name in "vw"})
    data = samples(32, 8)
    given = quantized(model, [{"x": data}], quant_format=quant_format, activation_type=QuantType.QInt8, reduce_range=True)
    correction = corrected(model, given, data, method=method)
    network, reference = OnnxNetwork.load(given, "quantized"), OnnxNetwork.load(model, "model")
    first, _ = network.layers
    kept = OnnxNetwork.load(correction.model, "corrected").layers[0].bias.ravel()  # no step is lost: it is what was applied
    after = network.with_shifts({first.name: kept})
    found = after.part({"x": data}, [after.layers[1].output])({"x": data})[after.layers[1].output]
    expected = reference.part({"x": data}, ["z"])({"x": data})["z"]
    shift = (expected.astype(np.float64) - found).mean(axis=0)
    row = correction.report[1]
    assert correction.report[0].method == method
    if method == "empirical":
        np.testing.assert_allclose(row.shift_before, np.abs(shift).mean(), rtol=1e-3)


@pytest.mark.parametrize("zero_point", [np.uint8(0), np.int8(-128), np.uint8(255)])
def test_a_product_whose_output_is_clamped_at_0_gets_a_real_bias_before_that(zero_point):
    float_model, quantized = pair_of("MatMul", output=(1 / 32, zero_point))
    correction = corrected(float_model, quantized, samples(24, *SHAPES["MatMul"]), method="mean")
    nodes = [node.op_type for node in correction.model.graph.node]
    assert nodes[nodes.index("MatMul") + 1 :][:2] == ["Add", "QuantizeLinear"]


def with_bias(layer, codes, steps, **options):
    """A quantized layer with a bias of integers, and the float network."""
    float_model, quantized = pair_of(layer, **options)
    real = (codes * steps.astype(np.float64)).astype(np.float32)
    float_model.graph.node[0].input.append("b")
    float_model.graph.initializer.append(numpy_helper.from_array(real, "b"))
    node = next(node for node in quantized.graph.node if node.name == "layer")
    node.input.append("bd")
    quantized.graph.node.insert(0, helper.make_node("DequantizeLinear", ["bq", "bs"], ["bd"], "bias", axis=0))
    quantized.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (("bq", codes), ("bs", steps)))
    return float_model, quantized


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose", "Gemm"])
def test_channels_whose_step_is_0_stay(layer):
    codes, steps = np.array([300, 0, -40, 7], np.int32), np.array([1e-3, 0, 1e-4, 1e-3], np.float32)
    float_model, quantized = with_bias(layer, codes, steps)
    correction = corrected(float_model, quantized, samples(24, *SHAPES[layer]))
    constants = constants_of(correction.model)
    assert constants.keys() == constants_of(quantized).keys()
    assert constants["bq"].dtype == np.int32
    assert constants["bq"][1] == 0
    assert (np.delete(constants["bq"], 1) != np.delete(codes, 1)).all()
    assert correction.report[0].reason == "int32 bias has a step of 0 in 1 of 4 channels, which stay"
    assert [node.name for node in correction.model.graph.node] == [node.name for node in quantized.graph.node]


def test_a_new_bias_that_saturates_is_reported():
    float_model, quantized = pair_of("Conv", scale=2**-40, dtype="float32")
    network = OnnxNetwork.load(quantized, "quantized")
    shift = np.array([1.0, 1e-20, -1.0, 0.0])
    change = network.bias_change(network.layers[0], shift)
    assert [str(reason) for reason in change.reasons][1:] == ["int32 bias saturates in 2 of 4 channels"]
    written = network.with_shifts({"layer": shift}).layers[0].bias
    np.testing.assert_allclose(written.ravel(), change.applied, rtol=1e-6)
    assert float_model.graph.node[0].name == "layer"


REWRITTEN = "its bias was computed from constants; it is a real one now"
QUANTIZERS = [("QuantizeLinear", ["b", "bs", "bz"], "bq"), ("DequantizeLinear", ["bq", "bs", "bz"], "bd")]
BIASES = {
    "behind quantizers": (QUANTIZERS, ""),
    "behind a cast to less": ([("Cast", ["b64"], "bd")], ""),
    "behind a cast to more": ([("Cast", ["b16"], "bd")], REWRITTEN),
    "codes times a step": ([("Cast", ["bq32"], "bc"), ("Mul", ["bc", "bs"], "bd")], REWRITTEN),
}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_quantized_number_that_grows_stays_quantized(shape):
    _, quantized = pair_of("Conv", opset=21, ir_version=10)
    node = next(node for node in quantized.graph.node if node.name == "layer")
    node.output[0] = "t"
    nodes = [helper.make_node(op, inputs, [output], output) for op, inputs, output in QUANTIZERS]
    quantized.graph.node.extend([*nodes, helper.make_node("Add", ["t", "bd"], ["y"], "add")])
    constants = {"b": np.full(shape, 0.25, np.float32), "bs": np.float32(1 / 128), "bz": np.int16(0)}
    quantized.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    network, shift = OnnxNetwork.load(quantized, "quantized"), np.array([0.1, -0.2, 0.0, 1.0])
    moved = network.with_shifts({"layer": shift})
    assert [each.op_type for each in moved.model.graph.node] == [each.op_type for each in quantized.graph.node]
    assert moved.facts().shapes["bd"][-3:] == (4, 1, 1)
    applied = network.bias_change(network.layers[0], shift).applied
    np.testing.assert_allclose(moved.layers[0].bias.ravel(), 0.25 + applied, rtol=1e-6)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("is_node", [False, True])
def test_a_bias_that_is_computed_from_constants(name, is_node):
    made, reason = BIASES[name]
    float_model, quantized = pair_of("Conv", opset=21, ir_version=10)
    b, step = np.array([0.5, -0.25, 1.0, 0.125], np.float32), np.float32(1 / 128)
    constants = {"b": b, "bs": step, "bz": np.int16(0), "b64": b.astype(np.float64), "b16": b.astype(np.float16)}
    constants["bq32"] = np.rint(b / step).astype(np.int32)
    nodes = [helper.make_node(op, inputs, [output], output) for op, inputs, output in made]
    for node in nodes:
        node.attribute.extend([helper.make_attribute("to", 1)] * (node.op_type == "Cast"))
    for key in {each for node in nodes for each in node.input} & constants.keys():
        tensor = numpy_helper.from_array(constants[key], key)
        if is_node:
            nodes.insert(0, helper.make_node("Constant", [], [key], f"constant {key}", value=tensor))
        else:
            quantized.graph.initializer.append(tensor)
    for node in reversed(nodes):
        quantized.graph.node.insert(0, node)
    next(node for node in quantized.graph.node if node.name == "layer").input.append("bd")
    float_model.graph.node[0].input.append("b")
    float_model.graph.initializer.append(numpy_helper.from_array(b, "b"))
    data = samples(24, *SHAPES["Conv"])
    correction = corrected(float_model, quantized, data)
    assert correction.report[0].reason == reason
    assert_mean_outputs_agree(float_model, correction.model, data, "Conv", 0.51 * step + 1e-3)
    read = {each for node in correction.model.graph.node for each in node.input} | {"y"}
    assert all(set(node.output) & read for node in correction.model.graph.node)
    assert {tensor.name for tensor in correction.model.graph.initializer} <= read
    if not reason:
        assert [node.op_type for node in correction.model.graph.node] == [node.op_type for node in quantized.graph.node]


def test_a_model_of_contributed_operators_alone_gets_the_operators_of_onnx():
    """Of MatMulNBits: there may be no import of ONNX's own operators, which the new Add needs."""
    w = weights(32, 4, axis=1)
    packed, scale = np.zeros((4, 1, 16), np.uint8), (np.abs(w).max(axis=0) / 7).astype(np.float32)
    codes = (np.rint(w / scale).astype(int) + 8).T.reshape(4, 16, 2)
    packed[:, 0] = codes[..., 0] | codes[..., 1] << 4
    given = {"domain": "com.microsoft", "K": 32, "N": 4, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], "layer_Q4", **given)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", 32), ("y", 4))]
    tensors = [numpy_helper.from_array(packed, "q"), numpy_helper.from_array(scale, "s")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    quantized = helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)], ir_version=8)
    tensors = [numpy_helper.from_array(w, "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "layer")], "g", values[:1], values[1:], tensors)
    float_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    correction = corrected(float_model, quantized, samples(24, 32))
    assert correction.report[0].method == "empirical"
    onnxruntime.InferenceSession(correction.model.SerializeToString())


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_an_uneven_grid_of_the_output_gets_a_real_bias(dtype):
    float_model, quantized = pair_of("MatMul", opset=19, ir_version=9, output=(1 / 8, np.zeros((), dtype)))
    correction = corrected(float_model, quantized, samples(24, *SHAPES["MatMul"]), method="mean")
    assert correction.report[0].reason == "it had no bias; one was added"
    onnxruntime.InferenceSession(correction.model.SerializeToString())


@pytest.mark.parametrize("layer", KERNELS)
@pytest.mark.parametrize("method", ["empirical", "mean", "auto"])
def test_new_biases_can_be_skipped(layer, method):
    float_model, quantized = pair_of(layer)
    correction = corrected(float_model, quantized, samples(24, *SHAPES[layer]), method=method, new_biases="skip")
    assert [row.reason for row in correction.report] == ["it has no bias, and none was to be added"]
    assert correction.model == quantized
    codes, steps = np.array([300, 2, -40, 7], np.int32), np.full(4, 1e-3, np.float32)
    if layer != "MatMul":
        correction = corrected(*with_bias(layer, codes, steps), samples(24, *SHAPES[layer]), new_biases="skip")
        assert [row.method for row in correction.report] == ["empirical"]


def test_a_model_that_onnxruntime_refuses_to_optimize_is_not_blamed_on_its_correction():
    """It makes a QLinearMatMul, which no such old opset has."""
    float_model, quantized = pair_of("MatMul", "float32", 9, 4, "com.microsoft", output=(1 / 32, np.int8(0)))
    with pytest.raises(ValueError, match="^quantized: onnxruntime cannot run it: .*QLinearMatMul"):
        corrected(float_model, quantized, samples(4, *SHAPES["MatMul"]))


def test_new_biases_are_added_or_skipped():
    with pytest.raises(ValueError, match=r"^new_biases: 'no', expected one of add, skip$"):
        corrected(*pair_of("Conv"), samples(4, *SHAPES["Conv"]), new_biases="no")


def test_a_bias_that_cannot_move_at_all_is_left_as_it_is():
    float_model, quantized = with_bias("Conv", np.zeros(4, np.int32), np.zeros(4, np.float32))
    (row,) = corrected(float_model, quantized, samples(24, *SHAPES["Conv"])).report
    assert (row.method, row.reason) == (None, "int32 bias has a step of 0 in 4 of 4 channels, which stay")
    assert row.shift_before == row.shift_after > 0
