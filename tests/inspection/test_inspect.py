"""`inspect`: format, quantizer, inputs, and what is said of each layer."""

import json
import weakref

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic

from biascorr import correct, inspect
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph.layer import LazyArray
from networks import batch_norm, batch_norm_constants, biases, model_from_text, quantized, samples, two_layers, weights
from tflite_fixtures import path_of


@pytest.fixture(scope="module")
def float_model():
    return two_layers()


@pytest.fixture(scope="module")
def batches():
    return [{"x": each[None]} for each in samples(8, 3, 6, 6)]


def test_float_model(float_model):
    found = inspect(float_model)
    assert (found.format, found.is_quantized, found.origin.quantizer) == ("ONNX, opset 17, IR 8", False, None)
    assert found.origin.producer == "tests"
    (given,), (made,) = found.inputs, found.outputs
    assert (given.name, given.dtype, given.shape, given.layout, given.range) == ("x", "float32", ("N", 3, 6, 6), "NCHW", None)
    assert (made.name, made.dtype, made.shape, made.layout) == ("y", "float32", ("N", 5), None)
    first = found["first"]
    values = onnx.numpy_helper.to_array(float_model.graph.initializer[0])
    ranges = np.abs(values).reshape(4, -1).max(axis=1)
    assert first.is_correctable
    assert first.has_bias
    assert (first.operator, first.channels, first.parameters, first.dtype) == ("Conv", 4, 108, "float32")
    assert first.weight_range == (values.min(), values.max())
    assert first.channel_bits == pytest.approx(np.log2(ranges.max() / np.median(ranges)))
    assert first.bits is first.scales is first.weight_sqnr is first.matched is None
    assert [chain.layers for chain in found.chains] == [("first", "second"), ("second", "last")]
    assert [chain.bits for chain in found.chains] == sorted([first.chain_bits, found["last"].chain_bits], reverse=True)
    assert found["second"].chain_bits == found.chains[0].bits
    assert [each.name for each in found.layers] == ["first", "second", "last"]
    with pytest.raises(KeyError):
        found["other"]


def test_record_is_plain_and_finite(float_model, batches):
    given = quantized(float_model, batches, nodes_to_exclude=["second"])
    found = inspect(given, reference=float_model)
    record = json.loads(found.to_json())
    assert record == found.to_dict()
    assert record["kind"] == "inspection"
    assert record["format"] == "ONNX, opset 17, IR 8, QDQ"
    assert record["quantizer"] == "onnxruntime.quantization"
    layers = {each["name"]: each for each in record["layers"]}
    assert layers["second"]["weight_sqnr"] is None  # infinite
    assert layers["second"]["reasons"][0]["code"] == "NOT_QUANTIZED"
    assert "quantized by onnxruntime.quantization" in repr(found)


@pytest.mark.parametrize(
    ("options", "form", "dtype", "scales"),
    [
        ({}, "QDQ", "int8", "tensor"),
        ({"per_channel": True, "weight_type": QuantType.QInt8}, "QDQ", "int8", "channel"),
        ({"weight_type": QuantType.QUInt8, "activation_type": QuantType.QUInt8}, "QDQ", "uint8", "tensor"),
        ({"quant_format": QuantFormat.QOperator}, "QOperator", "int8", "tensor"),
    ],
)
def test_quantized_models_beside_the_float_one(float_model, batches, options, form, dtype, scales):
    given = quantized(float_model, batches, **options)
    found = inspect(given, reference=float_model)
    assert found.origin.quantization.startswith(form if form == "QDQ" else "QDQ, QOperator")
    assert not found.chains
    for layer in found.layers:
        assert (layer.dtype, layer.bits, layer.scales, layer.matched) == (dtype, 8, scales, layer.name.removesuffix("_quant"))
        assert layer.is_correctable
    wanted = {layer.name: np.asarray(layer.weights) for layer in OnnxNetwork.load(float_model, "model").layers}
    for layer in OnnxNetwork.load(given, "model").layers:
        w = wanted[layer.name.removesuffix("_quant")]
        error = np.asarray(layer.weights, np.float64).reshape(-1) - (w if w.shape == layer.weights.shape else w.T).ravel()
        expected = 10 * np.log10((w**2).sum() / (error**2).sum())
        assert found[layer.name].weight_sqnr == pytest.approx(expected, abs=0.01)


def test_input_range_is_that_of_its_quantizer(float_model, batches):
    found = inspect(quantized(float_model, batches))
    low, high = found.inputs[0].range
    values = np.concatenate([each["x"] for each in batches])
    assert low == pytest.approx(values.min(), abs=0.02)
    assert high == pytest.approx(values.max(), abs=0.02)


def test_layers_that_cannot_be_corrected_say_why(tmp_path):
    text = "g (float[N,6] x, float[6,4] v) => (float[N,4] y) { [fixed] a = Gemm(x, w)  [other] b = Gemm(x, v)  y = Add(a, b) }"
    found = inspect(model_from_text(text, w=weights(6, 4)))
    assert (found["fixed"].is_correctable, found["fixed"].has_bias) == (True, False)
    assert not found["other"].is_correctable
    assert found["other"].reason == "weights are computed at run time"
    assert found["other"].channels is None
    path = tmp_path / "dynamic.onnx"
    reference = model_from_text("g (float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }", w=weights(6, 4))
    quantize_dynamic(reference, path)
    found = inspect(path)
    assert found.origin.quantization == "dynamic"
    assert found.size == path.stat().st_size
    assert "quantized when it runs" in found.layers[0].reason
    assert inspect(path, reference=reference).layers == found.layers


def test_unmatched_layer(float_model, batches):
    other = model_from_text(
        """g (float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,9] z) { [first] y = Conv<pads=[1,1,1,1]>(x, w1, b1)
        m = GlobalAveragePool(x) f = Flatten(m) [more] z = Gemm(f, w4) }""",
        w1=onnx.numpy_helper.to_array(float_model.graph.initializer[0]),
        w4=weights(3, 9),
        b1=biases(4),
    )
    found = inspect(quantized(other, batches), reference=float_model)
    assert found["first"].matched == "first"
    assert found["more"].reason.startswith("no layer of this name in the float model")
    with pytest.raises(ValueError, match="^model: not of this float model"):
        inspect(model_from_text("g (float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }", w=weights(6, 4)), reference=other)


def test_batch_norms_are_folded_before_gains_are_measured():
    text = f"""g (float[N,3,6,6] x) => (float[N,5,4,4] y) {{ [a] t = Conv<pads=[1,1,1,1]>(x, w1) {batch_norm("t", "n")}
        r = Relu(n) [b] y = Conv(r, w2) }}"""
    model = model_from_text(text, w1=weights(4, 3, 3, 3), w2=weights(5, 4, 3, 3), **batch_norm_constants(4))
    found = inspect(model)
    assert found.batch_norms == 1
    assert [chain.layers for chain in found.chains] == [("a", "b")]
    assert "1" in found.notes[0]


def test_producers_that_are_known():
    nodes = "q = QuantizeLinear(x, s, z) dq_output_x = DequantizeLinear(q, s, z) y = Relu(dq_output_x)"
    model = model_from_text(
        f"g (float[N,6] x) => (float[N,6] y) {{ {nodes} }}", s=np.float32(0.5).reshape(()), z=np.int8(0).reshape(())
    )
    assert inspect(model).origin.quantizer == "NNCF"
    for producer, version, expected in (
        ("quark.onnx", "0.9", "Quark 0.9"),
        ("onnx.quantize", "0.1.0", "onnxruntime.quantization"),
        ("vai_q_onnx", "", "Vitis AI Quantizer"),
    ):
        model.producer_name, model.producer_version = producer, version
        assert inspect(model).origin.quantizer == expected


def test_weights_are_read_one_after_the_other(monkeypatch):
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    read = LazyArray.__array__

    def watched(self, *arguments, **options):
        nonlocal most
        array = read(self, *arguments, **options).copy()
        alive.append(weakref.ref(array))
        most = max(most, sum(each() is not None for each in alive))
        return array

    monkeypatch.setattr(LazyArray, "__array__", watched)
    layers = inspect(path_of("classifier_int8")).layers
    assert len(alive) >= len(layers)
    assert most <= 2


@pytest.mark.parametrize(
    ("name", "form", "dtype", "scales"),
    [
        ("classifier_int8", "int8 activations, int8 weights", "int8", "channel"),
        ("classifier_int8_per_tensor", "int8 activations, int8 weights", "int8", "tensor"),
        ("classifier_dynamic", "dynamic, int8 weights", "int8", "channel"),
        ("classifier_int16x8", "int16 activations, int8 weights", "int8", "channel"),
    ],
)
def test_tflite_models(name, form, dtype, scales):
    found = inspect(path_of(name), reference=path_of("classifier_float"))
    assert found.format.startswith("TFLite 3, runtime ")
    assert found.origin.quantization == form
    assert found.origin.quantizer.startswith("TFLiteConverter of TensorFlow 2.")
    convolutions = [layer for layer in found.layers if layer.scales is not None and "CONV" in layer.operator]
    assert convolutions
    for layer in convolutions:
        assert (layer.dtype, layer.bits, layer.scales) == (dtype, 8, scales)
        assert 20 < layer.weight_sqnr < 80
    assert found.inputs[0].layout == "NHWC"


def test_float_tflite_model():
    found = inspect(path_of("classifier_float"))
    assert found.origin.quantizer is None
    assert found.origin.producer.startswith("TFLiteConverter")
    assert not found.is_quantized
    assert found.outputs[0].dtype == "float32"


def test_weights_of_few_bits():
    w = weights(64, 8)
    reference = model_from_text("g (float[N,64] x) => (float[N,8] y) { [layer] y = MatMul(x, w) }", opset=21, w=w)
    scales = np.abs(w).reshape(2, 32, 8).max(axis=1).T / 7  # (N, blocks)
    codes = np.round(w.T.reshape(8, 2, 32) / scales[..., None]).astype(np.int64) + 8
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    given = {"K": 64, "N": 8, "bits": 4, "block_size": 32}
    node = onnx.helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], "layer_Q4", domain="com.microsoft", **given)
    model = model_from_text("g (float[N,64] x) => (float[N,8] y) { y = Relu(x) }", opset=21, q=packed, s=scales.ravel())
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model.graph.node[0].CopyFrom(node)
    found = inspect(model, reference=reference)
    assert (found.origin.quantization, found.origin.quantizer) == ("MatMulNBits", "onnxruntime.quantization")
    layer = found.layers[0]
    assert (layer.bits, layer.scales, layer.block_size, layer.matched) == (4, "block", 32, "layer")
    assert 10 < layer.weight_sqnr < 40


def test_says_what_correct_does(float_model, batches):
    given = quantized(float_model, batches, nodes_to_exclude=["second"])
    report = correct(float_model, batches, quantized=given, method="mean").report
    correctable = {layer.name: layer.is_correctable for layer in inspect(given, reference=float_model).layers}
    assert correctable == {layer.name: layer.method is not None for layer in report}
