"""Models that onnxruntime's quantizer made, and hand-made ones with what it does not make: their biases are encoded again."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import QuantType

from biascorr.adapters.onnx.network import OnnxNetwork
from networks import (
    as_constant_nodes,
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


def network(opset=17):
    """A layer of every kind: conv with and without a bias, matmul with an Add, gemm."""
    text = """g (float[N,3,8,8] x) => (float[N,5] y) {
        [padded] a = Conv<pads=[1,1,0,2], strides=[2,1]>(x, w1, b1)
        [relu] r = Relu(a)
        [plain] c = Conv(r, w2)
        [pool] m = GlobalAveragePool(c)
        [flatten] f = Flatten(m)
        [product] p = MatMul(f, w3)
        [sum] s = Add(p, b3)
        [relu2] q = Relu(s)
        [last] y = Gemm<transB=1>(q, w4, b4)
    }"""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (6, 8, 3, 3), "w3": (6, 7), "b3": (7,), "w4": (5, 7), "b4": (5,)}
    constants = {name: (0.4 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return model_from_text(text, opset=opset, **constants)


BIASES = {"padded": "b1", "product": "b3", "last": "b4"}
"""The biases of the float network by layer; `plain` has none."""


@dataclass(frozen=True)
class Quantizer:
    """Options of onnxruntime's quantizer."""

    activations: QuantType = QuantType.QInt8
    weights: QuantType = QuantType.QInt8
    per_channel: bool = False
    opset: int = 17
    options: dict[str, Any] = field(default_factory=dict)

    def model(self, **more):
        arguments = {"activation_type": self.activations, "weight_type": self.weights, "per_channel": self.per_channel}
        return quantized(network(self.opset), BATCHES, **arguments, extra_options=self.options, **more)


QUANTIZERS = {
    "int8": Quantizer(),
    "int8, per channel": Quantizer(per_channel=True),
    "uint8 activations": Quantizer(QuantType.QUInt8),
    "uint8 activations, per channel": Quantizer(QuantType.QUInt8, per_channel=True),
    "uint8": Quantizer(QuantType.QUInt8, QuantType.QUInt8),
    "int16 activations": Quantizer(QuantType.QInt16, opset=21),
    "int16 activations in contributed operators": Quantizer(QuantType.QInt16, options={"UseQDQContribOps": True}),
    "int4 weights": Quantizer(weights=QuantType.QInt4, opset=21),
    "int4 weights, per channel": Quantizer(weights=QuantType.QInt4, per_channel=True, opset=21),
    "symmetric activations": Quantizer(options={"ActivationSymmetric": True}),
    "biases of float": Quantizer(options={"QuantizeBias": False}),
    "weights behind QuantizeLinear": Quantizer(options={"AddQDQPairToWeight": True}),
    "a quantizer per reader": Quantizer(options={"DedicatedQDQPair": True}),
}
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=[name.replace(" ", "_") for name in QUANTIZERS])


def node_named(model, name):
    return next(node for node in model.graph.node if node.name == name)


def bias_tensor(model, layer):
    """The name of the tensor that a layer adds, None where it adds none."""
    if layer == "product":
        (constant,) = (name for name in node_named(model, "sum").input if name.startswith("b3"))
        return constant
    inputs = node_named(model, layer).input
    return inputs[2] if len(inputs) > 2 else None


def dequantizer(model, tensor):
    return next((node for node in model.graph.node if node.op_type == "DequantizeLinear" and tensor in node.output), None)


def shifts(model, layers=("padded", "plain", "product", "last")):
    """How the weight errors of a quantized network shift its layers, by layer."""
    found, floats = {}, constants_of(network())
    for layer, w in zip(layers, ("w1", "w2", "w3", "w4")):
        read, wq = run(model, {"x": X}, node_named(model, layer).input[:2])
        found[layer] = output_shift(network(), layer, read, floats[w].astype(np.float64) - wq, 1)
    return found


def real_and_step(model, tensor):
    """A bias in real units, and the distance of its neighbouring values: 0 if it is of floats."""
    real = run(model, {"x": X}, [tensor])[0].astype(np.float64)
    node = dequantizer(model, tensor)
    return real, 0.0 if node is None else constants_of(model)[node.input[1]].astype(np.float64)


@every_quantizer
def test_shift_of_each_layer_is_removed_to_the_step_of_its_bias(quantizer):
    given = quantizer.model()
    correction = mean_corrected(network(quantizer.opset), X, quantized=given)
    saturated = [layer.name for layer in correction.report if "saturates" in layer.reason]
    assert set(saturated) <= {"product"}  # in an Add, whose constant has 8 bits: its range ends where its values do
    for layer, shift in shifts(given).items():
        if layer not in saturated:
            before = 0.0 if layer == "plain" else real_and_step(given, bias_tensor(given, layer))[0]
            after, step = real_and_step(correction.model, bias_tensor(correction.model, layer))
            error = np.abs(after - before - shift)
            assert (error <= 0.501 * step + 1e-5 * (np.abs(shift) + np.abs(after))).all(), layer


@every_quantizer
def test_report_of_a_quantized_model(quantizer):
    given = quantizer.model()
    report = {layer.name: layer for layer in mean_corrected(network(quantizer.opset), X, quantized=given).report}
    assert [(layer.name, layer.op, layer.channels) for layer in report.values()] == [
        ("padded", "Conv", 8), ("plain", "Conv", 6), ("product", "MatMul", 7), ("last", "Gemm", 5)
    ]  # fmt: skip
    for name, shift in shifts(given).items():
        assert report[name].method == "mean"
        np.testing.assert_allclose(report[name].shift_before, np.abs(shift).mean(), rtol=1e-4)
        assert report[name].shift_after < report[name].shift_before
    assert "it had no bias; one was added" in report["plain"].reason
    assert report["padded"].reason == report["last"].reason == ""


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "behind" not in name], ids=lambda name: name.replace(" ", "_"))
def test_nothing_but_the_values_of_biases_changes(name):
    quantizer = QUANTIZERS[name]
    given = quantizer.model(nodes_to_exclude=["plain"])
    corrected = mean_corrected(network(quantizer.opset), X, quantized=given).model
    names = []
    for layer in ("padded", "product", "last"):
        tensor = bias_tensor(given, layer)
        node = dequantizer(given, tensor)
        names.append(tensor if node is None else node.input[0])
    before, after = constants_of(given), constants_of(corrected)
    for name in set(names) & set(before):
        assert after[name].dtype == before[name].dtype
        assert after[name].shape == before[name].shape
    assert stripped(corrected, names) == stripped(given, names)


@every_quantizer
def test_result_runs_with_every_optimization(quantizer):
    given = quantizer.model()
    corrected = mean_corrected(network(quantizer.opset), X, quantized=given).model
    onnx.checker.check_model(corrected, full_check=True)
    session = onnxruntime.InferenceSession(corrected.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(["y"], {"x": X})
    assert output.shape == (16, 5)
    assert corrected.graph.output == given.graph.output
    assert corrected.graph.input == given.graph.input


@pytest.mark.parametrize("per_channel", [False, True])
def test_correction_brings_the_mean_output_nearer_to_that_of_the_float_model(per_channel):
    given = QUANTIZERS["int4 weights, per channel" if per_channel else "int4 weights"].model()
    corrected = mean_corrected(network(21), X, quantized=given).model
    expected, before, after = (run(each, {"x": X})[0].mean(axis=0) for each in (network(21), given, corrected))
    assert np.linalg.norm(after - expected) < 0.6 * np.linalg.norm(before - expected)


def test_given_models_stay_as_they_were():
    model, given = network(), Quantizer().model()
    before = [each.SerializeToString(deterministic=True) for each in (model, given)]
    mean_corrected(model, X, quantized=given)
    assert [each.SerializeToString(deterministic=True) for each in (model, given)] == before


def test_quantized_model_may_be_a_path_bytes_or_proto(tmp_path):
    given = Quantizer().model()
    path = tmp_path / "quantized.onnx"
    onnx.save(given, path)
    first, *others = (
        mean_corrected(network(), X, quantized=each).model for each in (given, path, str(path), path.read_bytes())
    )
    assert all(other == first for other in others)


# Biases of integers


@pytest.mark.parametrize("per_channel", [False, True])
def test_new_bias_of_a_quantized_conv_is_int32_with_the_product_of_the_steps(per_channel):
    given = Quantizer(per_channel=per_channel).model()
    corrected = mean_corrected(network(), X, quantized=given).model
    node = dequantizer(corrected, node_named(corrected, "plain").input[2])
    values, step, zero_point = (constants_of(corrected)[name] for name in node.input)
    inputs = [dequantizer(given, name).input[1] for name in node_named(given, "plain").input]
    expected = constants_of(given)[inputs[0]] * constants_of(given)[inputs[1]]
    assert values.dtype == zero_point.dtype == np.int32
    assert values.shape == (6,)
    np.testing.assert_allclose(step, expected, rtol=1e-6)
    assert not zero_point.any()


@pytest.mark.parametrize("end", ["min", "max"])
def test_bias_that_saturates_is_clamped_and_reported(end):
    given = Quantizer().model()
    limit = getattr(np.iinfo(np.int32), end)
    given = with_constants(given, b1_quantized=np.full(8, limit, np.int32))
    correction = mean_corrected(network(), X, quantized=given)
    step = constants_of(given)["b1_quantized_scale"].astype(np.float64)
    shift = shifts(given)["padded"]
    wanted = np.rint(shift / step)
    beyond = wanted > 0 if end == "max" else wanted < 0
    assert 0 < beyond.sum() < 8
    after = constants_of(correction.model)["b1_quantized"].astype(np.int64)
    np.testing.assert_allclose(after, limit + np.where(beyond, 0, wanted), rtol=0, atol=1)
    report = next(layer for layer in correction.report if layer.name == "padded")
    assert report.reason == f"int32 bias saturates in {beyond.sum()} of 8 channels"
    np.testing.assert_allclose(report.shift_after, np.abs(shift * beyond).mean(), atol=step.max())


def test_bias_of_an_add_keeps_its_type_of_8_bits():
    given = Quantizer().model()
    correction = mean_corrected(network(), X, quantized=given)
    before, after = constants_of(given), constants_of(correction.model)
    shift = shifts(given)["product"]
    expected = np.clip(before["b3_quantized"] + np.rint(shift / before["b3_scale"]), -128, 127)
    assert after["b3_quantized"].dtype == np.int8
    np.testing.assert_array_equal(after["b3_quantized"], expected)


HAND_MADE = """g ({inputs}) => ({outputs}) {{
    {quantize}
    xd = DequantizeLinear(xq, xs, xz)
    wd = DequantizeLinear<axis=0>(wq, ws)
    {layers}
}}"""
ONE_CONV = "[conv] u = Conv<pads=[1,1,1,1]>(xd, wd, bd)"
FLOAT_CONV = "g (float[?,3,?,?] x) => (float[?,4,?,?] u) { [conv] u = Conv<pads=[1,1,1,1]>(x, w, b) }"


def hand_made(layers, outputs="float[?,4,?,?] u", *, opset=17, reads_floats=True, **constants):
    """A quantized graph around `layers`, which read xd and wd; x is quantized in it, or given as xq."""
    inputs = "float[?,3,?,?] x" if reads_floats else "uint8[?,3,?,?] xq"
    quantize = "xq = QuantizeLinear(x, xs, xz)" if reads_floats else ""
    text = HAND_MADE.format(inputs=inputs, outputs=outputs, quantize=quantize, layers=layers)
    w, step = hand_made_weights()
    given = {
        "xs": np.float32(1 / 8),
        "xz": np.uint8(40),
        "wq": np.rint(w / step[:, None, None, None]).astype(np.int8),
        "ws": step,
    }
    arrays = {name: np.asarray(array) for name, array in (given | constants).items()}
    return model_from_text(text, opset=opset, **arrays)


def hand_made_weights():
    w = weights(4, 3, 3, 3)
    return w, np.array([0.0625, 0.03125, 0.0625, 0.125], np.float32)


def hand_made_shift(attributes, reads):
    """The shift of a layer whose input on the grid is `reads`."""
    w, step = hand_made_weights()
    error = w - np.rint(w / step[:, None, None, None]) * step[:, None, None, None]
    model = model_from_text(f"g (float[?,3,?,?] x) => (float[?,4,?,?] y) {{ [conv] y = Conv{attributes}(x, w) }}", w=error)
    return output_shift(model, "conv", reads, error, 1)


BQ, BS = np.array([100, -200, 300, 400], np.int32), np.array([0.01, 0.02, 0.01, 0.005], np.float32)


def test_bias_behind_a_dequantizer_without_a_zero_point():
    given = hand_made("bd = DequantizeLinear<axis=0>(bq, bs) " + ONE_CONV, bq=BQ, bs=BS)
    corrected = mean_corrected(model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given).model
    shift = hand_made_shift("<pads=[1,1,1,1]>", X)
    np.testing.assert_array_equal(constants_of(corrected)["bq"], BQ + np.rint(shift / BS))
    assert stripped(corrected, ["bq"]) == stripped(given, ["bq"])


def test_bias_with_a_zero_point_moves_by_the_shift():
    given = hand_made(
        "bd = DequantizeLinear(bq, bs, bz) " + ONE_CONV, bq=BQ.astype(np.int16) // 2, bs=BS[0], bz=np.int16(50), opset=21
    )
    corrected = mean_corrected(model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given).model
    expected = BQ // 2 + np.rint(hand_made_shift("<pads=[1,1,1,1]>", X) / BS[0])
    np.testing.assert_array_equal(constants_of(corrected)["bq"], expected)


def test_dequantizer_of_a_bias_that_two_layers_share_is_told_apart():
    layers = "[bias] bd = DequantizeLinear<axis=0>(bq, bs) " + ONE_CONV + " [other] v = Conv<strides=[2,2]>(xd, wd, bd)"
    given = hand_made(layers, "float[?,4,?,?] u, float[?,4,?,?] v", bq=BQ, bs=BS)
    text = FLOAT_CONV.replace("u)", "u, float[?,4,?,?] v)", 1).replace("}", "[other] v = Conv<strides=[2,2]>(x, w, b) }")
    correction = mean_corrected(model_from_text(text, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given)
    assert [(layer.name, layer.method) for layer in correction.report] == [("conv", "mean"), ("other", "mean")]
    onnx.checker.check_model(correction.model, full_check=True)
    for name, attributes in [("conv", "<pads=[1,1,1,1]>"), ("other", "<strides=[2,2]>")]:
        node = dequantizer(correction.model, node_named(correction.model, name).input[2])
        expected = BQ + np.rint(hand_made_shift(attributes, X) / BS)
        np.testing.assert_array_equal(constants_of(correction.model)[node.input[0]], expected)
        assert node.input[1] == "bs"


def test_bias_that_two_dequantizers_read_is_told_apart():
    layers = "bd = DequantizeLinear<axis=0>(bq, bs) bo = DequantizeLinear<axis=0>(bq, bs) "
    layers += ONE_CONV + " [other] v = Conv<strides=[2,2]>(xd, wd, bo)"
    given = hand_made(layers, "float[?,4,?,?] u, float[?,4,?,?] v", bq=BQ, bs=BS)
    text = FLOAT_CONV.replace("u)", "u, float[?,4,?,?] v)", 1).replace("}", "[other] v = Conv<strides=[2,2]>(x, w, b) }")
    corrected = mean_corrected(model_from_text(text, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given).model
    for tensor, attributes in [("bd", "<pads=[1,1,1,1]>"), ("bo", "<strides=[2,2]>")]:
        values = constants_of(corrected)[dequantizer(corrected, tensor).input[0]]
        np.testing.assert_array_equal(values, BQ + np.rint(hand_made_shift(attributes, X) / BS))


RESHAPED = {
    "Identity": ("bi = DequantizeLinear<axis=0>(bq, bs) bd = Identity(bi) " + ONE_CONV, (4,)),
    "Identity before": ("bi = Identity(bq) bd = DequantizeLinear<axis=0>(bi, bs) " + ONE_CONV, (4,)),
    "Reshape": ("bi = DequantizeLinear<axis=0>(bq, bs) bd = Reshape(bi, s) " + ONE_CONV, (4, 1)),
    "Reshape before an Add": (
        "bi = DequantizeLinear<axis=0>(bq, bs) bd = Reshape(bi, c) [conv] t = Conv<pads=[1,1,1,1]>(xd, wd) u = Add(t, bd)", (4,)
    ),
    "Unsqueeze before an Add": (
        "bi = DequantizeLinear<axis=0>(bq, bs) bd = Unsqueeze(bi, a) [conv] t = Conv<pads=[1,1,1,1]>(xd, wd) u = Add(bd, t)",
        (4,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESHAPED)
def test_bias_of_integers_behind_a_reshape(name):
    layers, shape = RESHAPED[name]
    shapes = {"s": np.array([-1]), "c": np.array([1, 4, 1, 1]), "a": np.array([1, 2])}
    given = hand_made(layers, bq=BQ.reshape(shape), bs=BS, **shapes)
    corrected = mean_corrected(model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given).model
    shift = hand_made_shift("<pads=[1,1,1,1]>", X)
    before, after = (run(each, {"x": X}, ["bd"])[0].reshape(-1) for each in (given, corrected))
    np.testing.assert_allclose(after - before, np.rint(shift / BS) * BS, rtol=1e-4)
    if name != "Identity before":
        np.testing.assert_array_equal(constants_of(corrected)["bq"].reshape(-1), BQ + np.rint(shift / BS))
        assert stripped(corrected, ["bq"]) == stripped(given, ["bq"])


def test_bias_that_is_a_product_of_integers_and_a_step():
    given = hand_made("bi = Cast<to=1>(bq) bd = Mul(bi, bs) " + ONE_CONV, bq=BQ, bs=BS)
    corrected = mean_corrected(model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given).model
    (bias,) = run(corrected, {"x": X}, [node_named(corrected, "conv").input[2]])
    np.testing.assert_allclose(bias, BQ * BS + hand_made_shift("<pads=[1,1,1,1]>", X), rtol=1e-5)


def test_bias_of_an_add_of_8_bits_that_saturates_is_clamped_and_reported():
    given = with_constants(Quantizer().model(), b3_quantized=np.full(7, -128, np.int8))
    correction = mean_corrected(network(), X, quantized=given)
    wanted = -128 + np.rint(shifts(given)["product"] / constants_of(given)["b3_scale"])
    beyond = (wanted < -128).sum()
    assert 0 < beyond < 7
    np.testing.assert_array_equal(constants_of(correction.model)["b3_quantized"], np.maximum(wanted, -128))
    assert correction.report[2].reason == f"int8 bias saturates in {beyond} of 7 channels"


@pytest.mark.parametrize("opset", range(13, min(onnx.defs.onnx_opset_version(), 26) + 1))
def test_every_opset_with_quantizers_per_channel(opset):
    given = hand_made("bd = DequantizeLinear<axis=0>(bq, bs) " + ONE_CONV, bq=BQ, bs=BS, opset=opset)
    model = model_from_text(FLOAT_CONV, opset=opset, w=weights(4, 3, 3, 3), b=biases(4))
    corrected = mean_corrected(model, X, quantized=given).model
    np.testing.assert_array_equal(constants_of(corrected)["bq"], BQ + np.rint(hand_made_shift("<pads=[1,1,1,1]>", X) / BS))
    assert corrected.opset_import == given.opset_import


@pytest.mark.parametrize("opset", range(10, 13))
def test_every_opset_with_a_quantizer_per_tensor(opset):
    w, step = weights(4, 3, 3, 3), np.float32(1 / 16)
    text = (
        HAND_MADE.format(
            inputs="float[?,3,?,?] x", outputs="float[?,4,?,?] u", quantize="xq = QuantizeLinear(x, xs, xz)", layers=ONE_CONV
        )
        .replace("<axis=0>", "")
        .replace(", bd", "")
    )
    constants = {"xs": np.float32(1 / 8), "xz": np.uint8(40), "wq": np.rint(w / step).astype(np.int8), "ws": step}
    given = model_from_text(text, opset=opset, **{name: np.asarray(array) for name, array in constants.items()})
    model = model_from_text(FLOAT_CONV.replace(", b)", ")"), opset=opset, w=w)
    corrected = mean_corrected(model, X, quantized=given).model
    shift = output_shift(model, "conv", X, w - np.rint(w / step) * step, 1)
    (bias,) = run(corrected, {"x": X}, [node_named(corrected, "conv").input[2]])
    np.testing.assert_array_equal(np.rint(bias / (step / 8)), np.rint(shift / (step / 8)))
    onnx.checker.check_model(corrected, full_check=True)


def test_bias_behind_quantize_and_dequantize_of_floats():
    layers = "bq = QuantizeLinear<axis=0>(b, bs, bz) bd = DequantizeLinear<axis=0>(bq, bs, bz) " + ONE_CONV
    b = np.array([0.5, -0.25, 0.75, 0.3], np.float32)
    given = hand_made(layers, b=b, bs=BS, bz=np.zeros(4, np.int16), opset=21)
    corrected = mean_corrected(model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=b), X, quantized=given).model
    expected = np.rint(b / BS) * BS + np.rint(hand_made_shift("<pads=[1,1,1,1]>", X) / BS) * BS
    (found,) = run(corrected, {"x": X}, [node_named(corrected, "conv").input[2]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bias_of_floats_of_a_quantized_conv_stays_float():
    given = hand_made(ONE_CONV.replace("bd", "b"), b=biases(4))
    correction = mean_corrected(model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=biases(4)), X, quantized=given)
    expected = biases(4) + hand_made_shift("<pads=[1,1,1,1]>", X)
    np.testing.assert_allclose(constants_of(correction.model)["b"], expected, rtol=1e-6)
    assert stripped(correction.model, ["b"]) == stripped(given, ["b"])


def test_quantized_model_that_takes_other_samples_than_the_float_one_is_refused():
    given = hand_made("bd = DequantizeLinear<axis=0>(bq, bs) " + ONE_CONV, reads_floats=False, bq=BQ, bs=BS)
    model = model_from_text(FLOAT_CONV, w=weights(4, 3, 3, 3), b=biases(4))
    with pytest.raises(ValueError, match=r"^quantized: .*takes xq \(uint8\), expected x \(float32\)"):
        mean_corrected(model, (X * 8 + 40).astype(np.uint8), quantized=given)


def test_weights_alone_are_quantized():
    text = "g (float[?,3,?,?] x) => (float[?,4,?,?] u) { wd = DequantizeLinear<axis=0>(wq, ws) [conv] u = Conv(x, wd) }"
    w, step = hand_made_weights()
    given = model_from_text(text, wq=np.rint(w / step[:, None, None, None]).astype(np.int8), ws=step)
    float_text = "g (float[?,3,?,?] x) => (float[?,4,?,?] u) { [conv] u = Conv(x, w) }"
    corrected = mean_corrected(model_from_text(float_text, w=w), X, quantized=given).model
    (bias,) = run(corrected, {"x": X}, [node_named(corrected, "conv").input[2]])
    np.testing.assert_allclose(bias, hand_made_shift("", X), rtol=1e-6, atol=1e-7)


def test_real_weights_between_quantizers_stay_as_they_are():
    text = """g (float[?,3,?,?] x) => (float[?,4,?,?] ud) {
        xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz)
        [conv] u = Conv<pads=[1,1,1,1]>(xd, w, b)
        uq = QuantizeLinear(u, us, xz) ud = DequantizeLinear(uq, us, xz)
    }"""
    constants = {"xs": np.float32(1 / 8), "us": np.float32(1 / 1024), "xz": np.uint16(2000), "w": weights(4, 3, 3, 3) / 3}
    model = model_from_text(text, opset=21, b=biases(4), **constants)
    (u,) = OnnxNetwork.load(model, "model").part({"x": X}, ["ud"])({"x": X}).values()
    np.testing.assert_allclose(u, run(model, {"x": X})[0], rtol=0, atol=1.1 / 1024)


@pytest.mark.parametrize(("step_of_output", "is_real"), [(0.1, True), (0.004, False)])
def test_new_bias_of_a_quantized_matmul_is_an_add(step_of_output, is_real):
    """On the grid of its output, unless the shift would be lost between the steps of that."""
    text = """g (float[?,?] x) => (float[?,?] yd) {
        xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz) wd = DequantizeLinear(wq, ws)
        [product] y = MatMul(xd, wd) yq = QuantizeLinear(y, ys, yz) yd = DequantizeLinear(yq, ys, yz)
    }"""
    w, x, step = weights(8, 5, axis=1), samples(12, 8), np.float32(1 / 32)
    constants = {"xs": np.float32(1 / 8), "xz": np.uint8(40), "ws": step, "wq": np.rint(w / step).astype(np.int8)}
    given = model_from_text(text, opset=21, ir_version=10, ys=np.float32(step_of_output), yz=np.int16(3), **constants)
    model = model_from_text("g (float[?,?] x) => (float[?,?] y) { [product] y = MatMul(x, w) }", w=w)
    correction = mean_corrected(model, [x], quantized=given)
    before, after = (run(each, {"x": x}, ["y"])[0] for each in (given, correction.model))
    shift = x.mean(axis=0, dtype=np.float64) @ (w - np.rint(w / step) * step)
    expected = shift if is_real else np.rint(shift / step_of_output) * step_of_output
    tolerance = 1e-6 if is_real else 0.51 * step_of_output  # what is added to is rounded too
    np.testing.assert_allclose(after - before, np.broadcast_to(expected, after.shape), rtol=0, atol=tolerance)
    note = "; its bias is real: it would be lost between the steps of its quantized output" if is_real else ""
    assert correction.report[0].reason == "it had no bias; one was added" + note
    reader = next(
        node for node in correction.model.graph.node if node_named(correction.model, "product").output[0] in node.input
    )
    assert reader.op_type == ("Add" if is_real else "QuantizeLinear")


def test_weights_with_a_step_per_block():
    text = """g (float[?,?] x) => (float[?,?] y) {
        wd = DequantizeLinear<axis=0, block_size=2>(wq, ws) [product] p = MatMul(x, wd) y = Add(p, b)
    }"""
    w, x = weights(8, 5, axis=1), samples(12, 8)
    step = np.random.default_rng(0).uniform(0.0625, 0.08, (4, 5)).astype(np.float32)
    q = np.clip(np.rint(w / step.repeat(2, 0)), -8, 7).astype(np.int8)
    given = model_from_text(text, opset=21, wq=q, ws=step, b=biases(5))
    model = model_from_text(
        "g (float[?,?] x) => (float[?,?] y) { [product] p = MatMul(x, w) y = Add(p, b) }", opset=21, w=w, b=biases(5)
    )
    corrected = mean_corrected(model, [x], quantized=given).model
    shift = x.mean(axis=0, dtype=np.float64) @ (w - q * step.repeat(2, 0))
    np.testing.assert_allclose(constants_of(corrected)["b"], biases(5) + shift, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "per_channel"), [(1, False), (1, True), (2, False)])
def test_transposed_conv(groups, per_channel, bias):
    text = f"""g (float[N,3,8,8] x) => (float[N,6,?,?] y) {{
        [first] t = Conv(x, w1, b1)
        [up] y = ConvTranspose<group={groups}, strides=[2,2], pads=[1,0,2,1]>(t, w2{", b2" if bias else ""})
    }}"""
    constants = {"w1": weights(4, 3, 3, 3), "b1": biases(4), "w2": weights(4, 6 // groups, 3, 3, axis=1)}
    model = model_from_text(text, **constants, **({"b2": biases(6)} if bias else {}))
    given = quantized(model, BATCHES, per_channel=per_channel, weight_type=QuantType.QInt4, nodes_to_exclude=["first"])
    correction = mean_corrected(model, X, quantized=given)
    read, w = run(given, {"x": X}, node_named(given, "up").input[:2])
    shift = output_shift(model, "up", read, constants["w2"].astype(np.float64) - w, 1)
    after, step = real_and_step(correction.model, bias_tensor(correction.model, "up"))
    before = real_and_step(given, bias_tensor(given, "up"))[0] if bias else 0.0
    assert np.abs(shift).max() > step.max() > 0
    assert (np.abs(after - before - shift) <= 0.501 * step + 1e-5 * np.abs(after)).all()
    assert {layer.name: layer.channels for layer in correction.report}["up"] == 6


def test_new_bias_of_a_grouped_transposed_conv_has_the_step_of_each_channel():
    text = """g (float[?,4,?,?] x) => (float[?,6,?,?] y) {
        xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz) wd = DequantizeLinear<axis=1>(wq, ws)
        [up] y = ConvTranspose<group=2>(xd, wd)
    }"""
    w, x, step = weights(4, 3, 2, 2, axis=1), samples(5, 4, 6, 6), np.array([0.0625, 0.03125, 0.0625], np.float32)
    wq = np.rint(w / step[:, None, None]).astype(np.int8)
    given = model_from_text(text, xs=np.float32(1 / 8), xz=np.uint8(40), wq=wq, ws=step)
    model = model_from_text("g (float[?,4,?,?] x) => (float[?,6,?,?] y) { [up] y = ConvTranspose<group=2>(x, w) }", w=w)
    corrected = mean_corrected(model, [x], quantized=given).model
    values, steps, _ = (constants_of(corrected)[name] for name in dequantizer(corrected, bias_tensor(corrected, "up")).input)
    np.testing.assert_array_equal(steps, np.tile(step / 8, 2))
    shift = output_shift(model, "up", x, w - wq * step[:, None, None], 1)
    assert (np.abs(values * steps - shift) <= 0.501 * steps).all()


SHARED_QUANTIZERS = """g (float[?,3,8,8] x) => (float[?,6,?,?] u, float[?,5,?,?] v) {
    xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz)
    wd1 = DequantizeLinear<axis=0>(w1q, w1s, w1z) [conv] t1 = Conv(xd, wd1, b1) r1 = Relu(t1)
    r1q = QuantizeLinear<axis=1>(r1, rs, rz) r1d = DequantizeLinear<axis=1>(r1q, rs, rz)
    wd2 = DequantizeLinear<axis=0>(w2q, w2s, w2z) [depthwise] t2 = Conv<group=4, pads=[1,1,1,1]>(r1d, wd2, b2) r2 = Relu(t2)
    r2q = QuantizeLinear(r2, xs, xz) r2d = DequantizeLinear(r2q, xs, xz)
    wd3 = DequantizeLinear<axis=0>(w3q, w3s, w3z) [one] u = Conv(r2d, wd3, b3)
    wd4 = DequantizeLinear<axis=0>(w4q, w4s, w4z) [two] v = Conv<strides=[2,2]>(r2d, wd4)
}"""


@pytest.mark.parametrize("constant_nodes", [False, True])
def test_quantizers_that_layers_share_and_quantizers_with_a_step_per_channel(constant_nodes):
    shapes = {"w1": (4, 3, 3, 3), "w2": (4, 1, 3, 3), "w3": (6, 4, 1, 1), "w4": (5, 4, 3, 3)}
    floats = {name: weights(*shape) for name, shape in shapes.items()} | {"b1": biases(4), "b2": biases(4), "b3": biases(6)}
    constants = {"xs": np.float32(1 / 8), "xz": np.uint8(40), "rs": np.array([1, 2, 3, 4], np.float32) / 16}
    constants |= {"rz": np.zeros(4, np.uint8)} | {name: array for name, array in floats.items() if name[0] == "b"}
    for name, shape in shapes.items():
        step = np.abs(floats[name]).max(axis=(1, 2, 3)).astype(np.float32) / 7
        constants |= {f"{name}s": step, f"{name}z": np.zeros(shape[0], np.int8)}
        constants[f"{name}q"] = np.rint(floats[name] / step[:, None, None, None]).astype(np.int8)
    given = model_from_text(SHARED_QUANTIZERS, **{name: np.asarray(array) for name, array in constants.items()})
    given = as_constant_nodes(given) if constant_nodes else given
    model = model_from_text(
        """g (float[?,3,8,8] x) => (float[?,6,?,?] u, float[?,5,?,?] v) {
            [conv] t1 = Conv(x, w1, b1) r1 = Relu(t1)
            [depthwise] t2 = Conv<group=4, pads=[1,1,1,1]>(r1, w2, b2) r2 = Relu(t2)
            [one] u = Conv(r2, w3, b3) [two] v = Conv<strides=[2,2]>(r2, w4)
        }""",
        **floats,
    )
    correction = mean_corrected(model, X, quantized=given)
    assert [(layer.name, layer.method) for layer in correction.report] == [
        ("conv", "mean"), ("depthwise", "mean"), ("one", "mean"), ("two", "mean")
    ]  # fmt: skip
    for layer, w, b in [("conv", "w1", "b1"), ("depthwise", "w2", "b2"), ("one", "w3", "b3"), ("two", "w4", None)]:
        read, wq = run(given, {"x": X}, node_named(given, layer).input[:2])
        shift = output_shift(model, layer, read, floats[w].astype(np.float64) - wq, 1)
        (after,) = run(correction.model, {"x": X}, [node_named(correction.model, layer).input[2]])
        assert np.abs(shift).max() > 0.01
        atol = 1e-6 if b else constants["w4s"].max() / 16
        np.testing.assert_allclose(after - (floats[b] if b else 0.0), shift, rtol=1e-4, atol=atol)


BLOCKED = {
    "rows of a product": ("MatMul", (70, 5), 0, 1, "int4"),
    "columns of a product": ("MatMul", (70, 5), 1, 1, "int8"),
    "input channels of a conv": ("Conv", (5, 7, 3, 3), 1, 0, "int4"),
    "taps of a conv": ("Conv", (5, 7, 3, 3), 3, 0, "uint4"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_weights_in_blocks_of_few_bits(name):
    op, shape, axis, channels, dtype = BLOCKED[name]
    size = 2 if shape[axis] < 16 else 16
    w, x = weights(*shape, axis=channels), samples(12, 70) if op == "MatMul" else samples(4, 7, 6, 6)
    blocks = [-(-length // size) if k == axis else length for k, length in enumerate(shape)]
    steps = np.random.default_rng(0).uniform(0.0625, 0.08, blocks).astype(np.float32)
    zero_points = np.random.default_rng(1).integers(0, 5, blocks)
    step, zero_point = (np.take(each, np.arange(shape[axis]) // size, axis) for each in (steps, zero_points))
    q = np.clip(np.rint(w / step) + zero_point, 0 if dtype == "uint4" else -8, 15 if dtype == "uint4" else 7).astype(np.int8)
    axes = "?,?" if op == "MatMul" else "?,?,?,?"
    given = model_from_text(
        f"""g (float[{axes}] x) => (float[{axes}] y) {{
            wd = DequantizeLinear<axis={axis}, block_size={size}>(wq, ws, wz) [layer] y = {op}(x, wd)
        }}""",
        opset=21,
        ir_version=10,
        wq=q.astype(getattr(ml_dtypes, dtype, dtype)),
        ws=steps,
        wz=zero_points.astype(getattr(ml_dtypes, dtype, dtype)),
    )
    model = model_from_text(f"g (float[{axes}] x) => (float[{axes}] y) {{ [layer] y = {op}(x, w) }}", opset=21, w=w)
    (layer,) = OnnxNetwork.load(given, "model").layers
    np.testing.assert_allclose(layer.weights, (q - zero_point) * step, rtol=1e-6)
    np.testing.assert_array_equal(layer.weight_step, step)
    correction = mean_corrected(model, [x], quantized=given)
    assert correction.report[0].method == "mean"
    means = [run(each, {"x": x})[0].astype(np.float64) for each in (model, correction.model)]
    others = (0,) if op == "MatMul" else (0, 2, 3)
    np.testing.assert_allclose(*(each.mean(axis=others) for each in means), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^quantized: .*layer layer "):
        mean_corrected(with_constants(model, w=np.roll(w, 1)), [x], quantized=given)


# Which layer is which


def test_layers_without_names_are_found():
    model = network()
    for node in model.graph.node:
        node.name = ""
    given = quantized(model, BATCHES)
    assert [layer.method for layer in mean_corrected(model, X, quantized=given).report] == ["mean"] * 4


def test_layers_with_other_names_are_found_by_their_order():
    given = Quantizer().model()
    expected = mean_corrected(network(), X, quantized=given)
    for node in given.graph.node:
        node.name = f"other_{node.name}"
    found = mean_corrected(network(), X, quantized=given)
    assert [layer.name for layer in found.report] == [f"other_{layer.name}" for layer in expected.report]
    assert [layer.method for layer in found.report] == ["mean"] * 4
    for name, array in constants_of(expected.model).items():
        np.testing.assert_array_equal(constants_of(found.model)[name], array)


def test_quantized_model_with_other_layers_is_refused():
    other = model_from_text("g (float[?,3,8,8] x) => (float[?,5,?,?] y) { [other] y = Conv(x, w) }", w=weights(5, 3, 3, 3))
    with pytest.raises(ValueError, match=r"^quantized: .*no layer named padded"):
        mean_corrected(other, X, quantized=Quantizer().model())


def test_quantized_model_with_other_shapes_is_refused():
    model = network()
    wide = with_constants(model, w1=np.ones((8, 3, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"^quantized: .*layer padded .*\(8, 3, 3, 3\).*\(8, 3, 3, 4\)"):
        mean_corrected(wide, X, quantized=Quantizer().model())


@pytest.mark.parametrize(("layer", "name"), [("padded", "w1"), ("last", "w4")])
def test_quantized_model_with_other_weights_is_refused(layer, name):
    model = network()
    other = np.roll(constants_of(model)[name], 1)
    with pytest.raises(ValueError, match=rf"^quantized: .*layer {layer} "):
        mean_corrected(with_constants(model, **{name: other}), X, quantized=Quantizer().model())


def test_layer_without_a_counterpart_is_left_alone_with_a_reason():
    given = Quantizer().model()
    node_named(given, "last").name = "renamed"
    model = network()
    last = node_named(model, "last")
    last.op_type, last.input[1] = "Identity", ""
    del last.input[1:], last.attribute[:]
    correction = mean_corrected(model, X, quantized=given)
    report = {layer.name: layer for layer in correction.report}
    assert report["renamed"].method is None
    assert "no layer of this name" in report["renamed"].reason
    assert report["padded"].method == "mean"
    np.testing.assert_array_equal(constants_of(correction.model)["b4_quantized"], constants_of(given)["b4_quantized"])


def test_layers_that_are_not_quantized_are_left_alone_with_a_reason():
    given = Quantizer().model(nodes_to_exclude=["padded", "product"])
    correction = mean_corrected(network(), X, quantized=given)
    for layer in correction.report:
        excluded = layer.name in ("padded", "product")
        assert (layer.method is None) == excluded
        assert layer.reason == "weights are not quantized" or not excluded
    for name in ("b1", "b3_quantized"):
        np.testing.assert_array_equal(constants_of(correction.model)[name], constants_of(given)[name])


def test_weights_that_are_not_finite_are_left_alone_with_a_reason():
    model = network()
    broken = constants_of(model)["w4"].copy()
    broken[0, 0] = np.nan
    report = mean_corrected(with_constants(model, w4=broken), X, quantized=Quantizer().model()).report
    assert [layer.method for layer in report] == ["mean", "mean", "mean", None]
    assert report[-1].reason == "weights are not finite"


def test_errors_say_which_of_the_models_is_meant(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^quantized: no such file"):
        mean_corrected(network(), X, quantized=tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"^quantized: not an ONNX model"):
        mean_corrected(network(), X, quantized=b"\xff" * 40)
    with pytest.raises(FileNotFoundError, match=r"^reference: no such file"):
        mean_corrected(tmp_path / "none.onnx", X, quantized=network())
    with pytest.raises(TypeError, match=r"^quantized: int"):
        mean_corrected(network(), X, quantized=3)


SHARED_BIASES = {
    "dequantized": "b = DequantizeLinear(q, s)",
    "behind an Identity": "r = DequantizeLinear(q, s) b = Identity(r)",
    "behind a Reshape": "r = DequantizeLinear(q, s) b = Reshape(r, shape)",
    "reshaped before": "p = Reshape(q, shape) b = DequantizeLinear(p, s)",
    "real": "b = Identity(f)",
}


@pytest.mark.parametrize("form", SHARED_BIASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_said_of_a_shared_bias_is_what_is_written(form, count):
    layers = " ".join(f"[c{k}] y{k} = Conv(x, w{k}, b)" for k in range(count))
    outputs = ", ".join(f"float[N,4,5,5] y{k}" for k in range(count))
    constants = {f"w{k}": weights(4, 3, 1, 1, seed=k) for k in range(count)}
    constants |= {"q": np.int32([3, -5, 7, 90]), "s": np.float32(0.25), "shape": np.int64([4]), "f": biases(4)}
    text = f"g (float[N,3,5,5] x) => ({outputs}) {{ {SHARED_BIASES[form]} {layers} }}"
    network = OnnxNetwork.load(model_from_text(text, **constants), "model")
    shifts = {layer.name: np.linspace(-0.3, 0.4, 4) * (k + 1) for k, layer in enumerate(network.layers)}
    said = {layer.name: network.bias_change(layer, shifts[layer.name]).applied for layer in network.layers}
    after = {layer.name: layer for layer in network.with_shifts(shifts).layers}
    for layer in network.layers:
        written = after[layer.name].bias.astype(np.float64) - layer.bias
        np.testing.assert_allclose(written.ravel(), said[layer.name], rtol=0, atol=1e-6)
