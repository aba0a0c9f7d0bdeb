"""Models given in place of others, and float models that a quantizer's pre-processing changed: what to do is said, or done."""

import re
import warnings

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from biascorr import BiasCorrection, BiasCorrectionParams, QuantParams, correct, equalize
from networks import (
    Reader,
    batch_norm,
    batch_norm_constants,
    biases,
    model_from_text,
    quantized,
    run,
    samples,
    two_layers,
    weights,
)

X = samples(24, 3, 6, 6)
FEEDS = [{"x": X[k : k + 1]} for k in range(len(X))]
FORMATS = [QuantFormat.QDQ, QuantFormat.QOperator]


def dynamic(model, folder):
    onnx.save(model, folder / "float.onnx")
    quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx", extra_options={"MatMulConstBOnly": True})
    return onnx.load(folder / "dynamic.onnx")


@pytest.mark.parametrize("quant_format", FORMATS)
def test_models_in_place_of_others(quant_format):
    model = two_layers()
    given = quantized(model, FEEDS, quant_format=quant_format)
    for arguments, message in {
        (0, 1): r"reference: layer \w+ has quantized weights; and no layer of the other model has: exchange the two models",
        (
            0,
            None,
        ): r"reference: layer \w+ has quantized weights; give the float model, and this one as `quantized` \(--quantized\)",
        (0, 0): r"reference: layer \w+ has quantized weights; give the float model that was quantized",
        (1, 1): r"quantized: its weights are those of the float model, and nothing in it is quantized",
    }.items():
        first, second = (None if k is None else (given, model)[k] for k in arguments)
        for method in ("auto", "mean"):
            with pytest.raises(ValueError, match=f"^{message}$"):
                correct(first, X, quantized=second, method=method)


@pytest.mark.parametrize("quant_format", FORMATS)
def test_the_classic_interface_and_equalization_take_the_float_model(quant_format):
    given, params = quantized(two_layers(), FEEDS, quant_format=quant_format), BiasCorrectionParams(1, 4, 4, ["x"], ["y"])
    with pytest.raises(ValueError, match=r"^reference_model: layer \w+ has quantized weights; give the float model"):
        BiasCorrection.correct_bias(given, params, QuantParams(), FEEDS)
    with pytest.raises(ValueError, match=r"^reference: layer \w+ has quantized weights; equalize the float model"):
        equalize(given)


def test_models_that_are_quantized_when_they_run(tmp_path):
    model, given = two_layers(), dynamic(two_layers(), tmp_path)
    with pytest.raises(ValueError, match=r"^quantized: it is quantized when it runs \(ConvInteger.*quantize_static\)"):
        correct(model, X, quantized=given)
    for second in (None, model):
        with pytest.raises(ValueError, match=r"^reference: layer \S+ is quantized when it runs; "):
            correct(given, X, quantized=second)
    with pytest.raises(ValueError, match=r"^reference: layer \S+ is quantized when it runs; equalize the float model"):
        equalize(given)


def test_weights_on_a_grid_without_any_quantizer_are_quantized():
    model = two_layers()
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    for tensor in rounded.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.ndim == 4:
            step = np.abs(array).max() / 7
            tensor.CopyFrom(onnx.numpy_helper.from_array((np.rint(array / step) * step).astype(np.float32), tensor.name))
    correction = correct(model, X, quantized=rounded, method="mean")
    assert [row.method for row in correction.report if row.op == "Conv"] == ["mean"] * sum(
        row.op == "Conv" for row in correction.report
    )


NORMALIZED = f"""g (float[N,3,6,6] x) => (float[N,5,4,4] y) {{
    [first] t = Conv<pads=[1,1,1,1]>(x, w) {batch_norm("t", "n", "one")} r = Relu(n)
    [second] u = Conv(r, v, b) {batch_norm("u", "y", "two")}
}}"""


def normalized():
    constants = {"w": weights(4, 3, 3, 3), "v": weights(5, 4, 3, 3, seed=1), "b": biases(5)}
    norms = batch_norm_constants(4, "one") | batch_norm_constants(5, "two", seed=1)
    return model_from_text(NORMALIZED, **constants, **norms)


@pytest.mark.parametrize("quant_format", FORMATS)
@pytest.mark.parametrize("names", ["kept", "counted anew"])
@pytest.mark.parametrize("method", ["auto", "mean", "empirical", "analytical", "hybrid"])
def test_batch_normalizations_that_pre_processing_folded(quant_format, names, method, tmp_path):
    model = normalized()
    onnx.save(model, tmp_path / "float.onnx")
    quant_pre_process(str(tmp_path / "float.onnx"), str(tmp_path / "prepared.onnx"), skip_symbolic_shape=True)
    prepared = onnx.load(tmp_path / "prepared.onnx")
    assert not [node for node in prepared.graph.node if node.op_type == "BatchNormalization"]
    given = quantized(prepared, FEEDS, quant_format=quant_format, reduce_range=True)
    if names == "counted anew":
        for k, node in enumerate(given.graph.node):
            node.name = f"node_{k}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made the outputs worse", UserWarning)
        correction = correct(model, X, quantized=given, method=method)
        expected = correct(prepared, X, quantized=given, method=method if method not in ("analytical", "hybrid") else "mean")
    assert "2 batch normalizations were folded into layers, as in the quantized model" in correction.notes
    assert len(correction.report) == 2
    if method not in ("analytical", "hybrid"):
        (found,), (wanted,) = (run(each.model, {"x": X}) for each in (correction, expected))
        np.testing.assert_allclose(found, wanted, atol=0.02)
    assert [row.method is not None for row in correction.report][1] or correction.method == "none"


def test_weights_that_were_changed_otherwise_are_refused_with_the_remedy(tmp_path):
    model = normalized()
    scaled = onnx.ModelProto()
    scaled.CopyFrom(model)
    for tensor in scaled.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(0.3), "w"))
    onnx.save(scaled, tmp_path / "float.onnx")
    quantize_static(str(tmp_path / "float.onnx"), str(tmp_path / "q.onnx"), Reader(FEEDS))
    with pytest.raises(ValueError, match=r"^quantized: not of .*: layer first has other weights; give the float model"):
        correct(model, X, quantized=tmp_path / "q.onnx")


def test_outputs_that_only_one_model_has_are_noted():
    body = "[a] t = MatMul(x, {w}) r = Relu(t) [b] y = MatMul(r, {v})"
    w, v, step = weights(6, 5, axis=1), weights(5, 4, axis=1), np.float32(1 / 2)
    more = "float[N,5] r, float[N,4] y"
    reference = model_from_text(f"g (float[N,6] x) => ({more}) {{ {body.format(w='w', v='v')} }}", w=w, v=v)
    codes = {name: np.rint(array / step).astype(np.int8) for name, array in (("w", w), ("v", v))}
    text = f"W = DequantizeLinear(w, s) V = DequantizeLinear(v, s) {body.format(w='W', v='V')}"
    given = model_from_text(f"g (float[N,6] x) => (float[N,4] y) {{ {text} }}", s=step, **codes)
    correction = correct(reference, samples(40, 6), quantized=given)
    assert "not scored, as only one of the models gives it out: r" in correction.notes
    renamed = model_from_text(f"g (float[N,6] x) => (float[N,4] z) {{ {re.sub(' y = ', ' z = ', text)} }}", s=step, **codes)
    with pytest.raises(ValueError, match="^quantized: not of this float model: gives out z, expected r, y$"):
        correct(reference, samples(40, 6), quantized=renamed)


def barely_normalized(folded, *, bits=None):
    """A Conv and a normalization that hardly scales, apart or as one; quantized where there are bits."""
    rng = np.random.default_rng(5)
    w, b = rng.normal(0.2, 1, (4, 3, 3, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    gamma, beta, mean = (
        np.float32([1.1, 0.9, 1.2, 1]),
        rng.normal(size=4).astype(np.float32),
        rng.normal(size=4).astype(np.float32),
    )
    if not folded:
        body = "[first] t = Conv(x, w, b) [norm] y = BatchNormalization(t, g, be, m, v)"
        constants = {"w": w, "b": b, "g": gamma, "be": beta, "m": mean, "v": np.ones(4, np.float32)}
    else:
        gain = gamma / np.sqrt(np.float32(1 + 1e-5))
        constants = {"w": w * gain[:, None, None, None], "b": (beta - (mean - b) * gain).astype(np.float32)}
        body = "[first] y = Conv(x, w, b)"
    if bits:
        step = np.abs(constants["w"]).max() / np.float32(2 ** (bits - 1) - 1)
        constants |= {"w": np.rint(constants["w"] / step).astype(np.int8), "s": step}
        body = "d = DequantizeLinear(w, s) " + body.replace("(x, w, b)", "(x, d, b)")
    return model_from_text(f"g (float[N,3,6,6] x) => (float[N,4,4,4] y) {{ {body} }}", **constants)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["empirical", "mean", "iterative"])
def test_a_normalization_that_hardly_scales_is_folded_all_the_same(bits, method):
    given = barely_normalized(True, bits=bits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made the outputs worse", UserWarning)
        found, expected = (correct(barely_normalized(folded), X, quantized=given, method=method) for folded in (False, True))
    assert found.notes[0] == "1 batch normalizations were folded into layers, as in the quantized model"
    (row,), (other,) = found.report, expected.report
    assert row.shift_before == pytest.approx(other.shift_before, rel=1e-3)


def test_a_float_model_that_was_only_folded_is_not_quantized():
    with pytest.raises(
        ValueError, match=r"^quantized: its weights are those of the float model, and nothing in it is quantized$"
    ):
        correct(barely_normalized(False), X, quantized=barely_normalized(True))
