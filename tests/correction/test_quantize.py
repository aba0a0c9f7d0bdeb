"""`quantize`: a float ONNX model in, an int8 model out, corrected, equalized where that is better."""

import json
import logging

import numpy as np
import onnx
import pytest

import biascorr
from biascorr import correct, quantize
from biascorr.calibration.progress import Work
from biascorr.correction.scoring import Score
from networks import (
    as_constant_nodes,
    batch_norm,
    batch_norm_constants,
    biases,
    model_from_text,
    samples,
    two_layers,
    weights,
    with_constants,
)
from tflite_fixtures import path_of


@pytest.fixture(scope="module")
def data():
    return samples(24, 3, 6, 6)


@pytest.fixture(scope="module")
def result(data):
    return quantize(two_layers(), data, equalize=False, max_samples=20)


def uneven():
    """Two layers between which channels differ a thousandfold: nothing but equalization saves them."""
    scales = (2.0 ** np.arange(-5, 5)).astype(np.float32)
    text = "g (float[N,6] x) => (float[N,4] y) { [a] t = Gemm(x, w1, b1) [relu] r = Relu(t) [b] y = Gemm(r, w2, b2) }"
    w1, w2 = weights(6, 10, axis=1) * scales, weights(10, 4, axis=1) / scales[:, None]
    return model_from_text(text, w1=w1, b1=(biases(10) * scales).astype(np.float32), w2=w2, b2=biases(4))


def test_the_model_is_quantized_and_corrected(result):
    operators = [node.op_type for node in result.model.graph.node]
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= set(operators)
    assert not result.is_simulated
    assert result.samples == 20
    assert result.is_held_out
    assert result.scored_samples == 8
    assert next(iter(result.scores)) == "none"
    assert {layer.name for layer in result.report} == {"first", "second", "last"}
    assert any("20 at most" in note for note in result.notes)
    assert result.notes[1].startswith("quantized by onnxruntime")
    record = json.loads(result.to_json())
    assert record["equalization"] is None
    assert record["seconds"] > 0
    types = {tensor.data_type for tensor in result.model.graph.initializer if len(tensor.dims) == 4}
    assert types == {onnx.TensorProto.INT8}


def test_it_scores_as_correct_does_with_the_prepared_model(tmp_path, data):
    """Of a model of which nothing has to be prepared, which is quantized the same way by hand."""
    from onnxruntime.quantization import QuantType, quantize_static

    from networks import Reader

    found = quantize(two_layers(), data, method="mean", equalize=False, reduce_range=False)
    path = tmp_path / "q.onnx"
    kinds = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    operators = ["Conv", "Gemm", "Relu"]
    quantize_static(two_layers(), path, Reader({"x": each[None]} for each in data), op_types_to_quantize=operators, **kinds)
    other = correct(two_layers(), data, quantized=path, method="mean")
    for name, score in other.scores.items():
        assert found.scores[name].sqnr == pytest.approx(score.sqnr, abs=0.5)


def test_a_model_is_equalized_where_that_is_better():
    data = samples(32, 6)
    found = quantize(uneven(), data, per_channel=False)
    assert found.choice.is_equalized
    assert found.method.startswith("equalized")
    assert found.equalization.chains
    assert found.scores[found.method].sqnr > found.scores["none"].sqnr + 10
    assert found.to_dict()["equalization"]["chains"]
    named = quantize(uneven(), data, per_channel=False, method="mean")
    assert named.method == "equalized, mean"
    plain = quantize(uneven(), data, per_channel=False, equalize=False)
    assert plain.equalization is None
    assert plain.scores["none"].sqnrs == pytest.approx(found.scores["none"].sqnrs)


def test_a_model_is_not_equalized_where_that_is_no_better(data):
    found = quantize(two_layers(), data, method="empirical")
    assert found.equalization is not None
    assert {"none", "empirical", "equalized", "equalized, empirical"} == set(found.scores)
    better = found.scores["equalized, empirical"].is_better_than(found.scores["empirical"])
    assert found.choice.is_equalized == better


@pytest.mark.parametrize("calibration", ["entropy", "percentile"])
def test_calibrations_take_batches_of_any_sizes(calibration, capsys):
    text = "g (float[N,3,H,6] x) => (float[N,4,H,6] y) { [a] t = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(t) }"
    model = model_from_text(text, w=weights(4, 3, 3, 3), b=biases(4))
    batches = [{"x": samples(1 + k % 2, 3, 5 + k % 3, 6)} for k in range(8)]
    found = quantize(model, batches, calibration=calibration, equalize=False, method="mean")
    assert found.report[0].channels == 4
    assert capsys.readouterr() == ("", "")


def test_options_of_quantization(data):
    options = {"per_channel": False, "weight_type": "uint8", "activation_type": "uint8", "op_types": ["Gemm"]}
    found = quantize(two_layers(), data, **options, reduce_range=True, equalize=False, method="mean")
    inspected = {layer.name: layer for layer in biascorr.inspect(found.model).layers}
    assert (inspected["last"].dtype, inspected["last"].scales) == ("uint8", "tensor")
    assert inspected["first"].bits is None
    assert found.model.graph.initializer
    assert "of 7 bits, uint8 activations by minmax, Gemm" in found.notes[0]


def test_ranges_of_the_equalized_model_are_planned_until_it_is_quantized(monkeypatch):
    planned, plain = [], Work.expect

    def expect(work, left):
        planned.append(left.get("calibrating"))
        plain(work, left)

    monkeypatch.setattr(Work, "expect", expect)
    quantize(uneven(), samples(24, 6), method="mean")
    assert [each for each in planned if each is not None] == [24, 0]


def test_old_opsets_and_constants_in_nodes(data):
    model = as_constant_nodes(two_layers())
    model.opset_import[0].version = 12
    found = quantize(model, data[:8], equalize=False, method="mean")
    assert next(each.version for each in found.model.opset_import if each.domain == "") >= 13
    assert all(layer.method == "mean" for layer in found.report)


def test_batch_norms_are_folded_by_the_preparation():
    text = f"""g (float[N,3,6,6] x) => (float[N,4,6,6] y) {{ [a] t = Conv<pads=[1,1,1,1]>(x, w) {batch_norm("t", "n")}
        y = Relu(n) }}"""
    model = model_from_text(text, w=weights(4, 3, 3, 3), **batch_norm_constants(4))
    found = quantize(model, samples(16, 3, 6, 6), equalize=False, method="mean")
    assert not any(node.op_type == "BatchNormalization" for node in found.model.graph.node)
    assert found.report[0].method == "mean"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_type": "int4"}, ValueError, "weight_type: 'int4', expected one of int8, uint8"),
        ({"activation_type": "float"}, ValueError, "activation_type: 'float'"),
        ({"calibration": "max"}, ValueError, "calibration: 'max', expected one of minmax"),
        ({"op_types": "Conv"}, TypeError, "expected a sequence of operators: ['Conv']"),
        ({"op_types": ["MatMul"]}, ValueError, "op_types: MatMul, expected operators of the model's layers; it has Conv, Gemm"),
        ({"op_types": ["Conv", "gemm"]}, ValueError, "op_types: 'gemm', which is no operator of the model; did you mean Gemm?"),
        ({"op_types": ["Conv", 3]}, ValueError, "op_types: 3, which is no operator of the model"),
        ({"per_channel": "no"}, TypeError, "per_channel: 'no', expected True or False"),
        ({"equalize": "yes"}, TypeError, "equalize: 'yes', expected True or False"),
        ({"reduce_range": 7}, TypeError, "reduce_range: 7, expected True or False"),
        ({"shrunk": 2}, TypeError, "shrunk: 2, expected True or False"),
        ({"strength": "half"}, ValueError, "strength: 'half', expected a number above 0 up to 1"),
        ({"method": "best"}, ValueError, "method: 'best'"),
    ],
)
def test_wrong_options_are_refused(options, error, message, data):
    with pytest.raises(error) as raised:
        quantize(two_layers(), data[:4], **options)
    assert message in str(raised.value)


def test_layers_whose_biases_cannot_be_corrected_are_quantized():
    """The preparation makes one operator of a product and a sum, whose bias is no constant then."""
    model = model_from_text(
        "g (float[N,5] x, float[N,5] z) => (float[N,5] y) { t = MatMul(x, w) y = Add(t, z) }", w=weights(5, 5)
    )
    found = quantize(model, {name: samples(16, 5) for name in "xz"}, equalize=False)
    assert "QuantizeLinear" in {node.op_type for node in found.model.graph.node}
    assert [report.reason for report in found.report] == ["its bias is computed at run time"]


def test_what_onnxruntime_cannot_quantize_is_named(data):
    model = model_from_text("g (double[N,5] x) => (double[N,5] y) { y = MatMul(x, w) }", w=weights(5, 5, dtype="float64"))
    with pytest.raises(ValueError, match="quantized none of its layers; it takes weights of float32, the model has float64"):
        quantize(model, samples(8, 5, dtype="float64"), equalize=False)
    w = weights(5, 6)
    w[0, 0] = np.nan
    with pytest.raises(ValueError, match="^reference: layer last has weights that are nan or infinite: onnxruntime cannot"):
        quantize(with_constants(two_layers(), w3=w), data[:4], equalize=False)


def test_other_frameworks_and_quantized_models_are_refused(result, data):
    with pytest.raises(TypeError, match=r"expected ONNX: tf.lite.TFLiteConverter quantizes .*biascorr correct"):
        quantize(path_of("classifier_float"), data)
    with pytest.raises(ValueError, match="has quantized weights; give the float model"):
        quantize(result.model, data)


def test_weights_have_7_bits_where_8_saturate(monkeypatch, data):
    monkeypatch.setattr("biascorr.correction.quantize._SATURATED", -1000.0)  # as if it were so on any CPU
    monkeypatch.setattr(Score, "is_better_than", lambda *_: True)
    assert "of 7 bits" not in quantize(two_layers(), data, equalize=False, method="mean").notes[0]
    monkeypatch.setattr(Score, "is_better_than", lambda *_: False)
    tried = quantize(two_layers(), data, equalize=False, method="mean")
    assert "of 7 bits" in tried.notes[0]
    assert tried.notes[1].startswith("weights have 7 bits (reduce_range), which gives ")
    codes = next(onnx.numpy_helper.to_array(each) for each in tried.model.graph.initializer if len(each.dims) == 4)
    assert np.abs(codes).max() <= 64


def test_nothing_of_onnxruntime_stays(data, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = logging.getLogger().handlers.copy(), logging.root.manager.disable
    given = two_layers().SerializeToString()
    model = onnx.load_from_string(given)
    quantize(model, data[:8], equalize=False, method="mean")
    assert (logging.getLogger().handlers, logging.root.manager.disable) == before
    assert model.SerializeToString() == given
    assert not list(tmp_path.iterdir())


def test_saved_model_is_the_one_that_was_scored(result, data, tmp_path):
    result.save(tmp_path / "q.onnx")
    found = biascorr.compare(two_layers(), tmp_path / "q.onnx", data[:20])
    assert found.models[0].sqnr == pytest.approx(result.deployed[result.method].sqnr, abs=3)


def test_large_models_go_through_files(monkeypatch, data):
    monkeypatch.setattr("biascorr.adapters.onnx.static_quantization._LARGE", 0)
    found = quantize(two_layers(), data[:8], equalize=False, method="mean")
    assert all(layer.method == "mean" for layer in found.report)
    onnx.checker.check_model(found.model)
