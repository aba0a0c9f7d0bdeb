"""Correction of simulated quantization where the model is equalized before: what is tried, judged and returned."""

import numpy as np
import onnx
import pytest

from biascorr import QuantParams, correct, equalize
from networks import batch_norm, batch_norm_constants, biases, model_from_text, run, samples, weights

PARAMS = QuantParams("tf")
X = samples(32, 4, 5, 5)


def network(spread, behind):
    """Two convolutions; the channels between them differ by so much from one to the next in front and behind."""
    before, after = (np.float32(factor ** np.arange(8.0)) for factor in (spread, behind))
    return model_from_text(
        """g (float[N,4,5,5] x) => (float[N,3,5,5] y) {
        [first] a = Conv(x, w1, b1)  r = Relu(a)  [second] y = Conv(r, w2, b2) }""",
        w1=weights(8, 4, 1, 1) * before.reshape(8, 1, 1, 1),
        b1=biases(8) * before,
        w2=weights(3, 8, 1, 1) * after.reshape(1, 8, 1, 1),
        b2=biases(3),
    )


def test_auto_returns_the_equalized_model_where_that_is_best():
    model = network(4, 1 / 4)
    before = model.SerializeToString()
    result, alone = correct(model, X, quant_params=PARAMS, equalize=True), correct(model, X, quant_params=PARAMS)
    assert list(result.scores)[: len(alone.scores)] == list(alone.scores)
    assert [name.removeprefix("equalized, ") for name in result.scores][len(alone.scores) :] == [
        "equalized",
        *[*alone.scores][1:],
    ]
    for name in ("none", alone.method):
        assert result.scores[name] == alone.scores[name]
    assert result.method.startswith("equalized, ")
    assert result.scores[result.method].sqnr > max(score.sqnr for score in alone.scores.values()) + 6
    assert [layer.method for layer in result.report] == [result.method.removeprefix("equalized, ")] * 2
    equalized = result.equalization.model
    assert [layer.name for layer in result.equalization.chains[0].chain.layers] == ["first", "second"]
    assert result.model != equalized
    expected, found = (run(each, {"x": X})[0] for each in (model, equalized))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert model.SerializeToString() == before


def test_auto_does_not_equalize_where_that_is_worse():
    model, params = network(4, 1), QuantParams("tf", per_channel=True)
    result, alone = (correct(model, X, quant_params=params, equalize=each) for each in (True, False))
    assert result.equalization.is_anything_done
    assert result.scores["equalized"].sqnr < result.scores["none"].sqnr - 3
    assert (result.method, result.model) == (alone.method, alone.model)
    assert [layer.method for layer in result.report] == [layer.method for layer in alone.report]


def test_nothing_to_equalize_is_tried_once():
    model = model_from_text(
        "g (float[N,4,5,5] x) => (float[N,8,5,5] y) { [only] y = Conv(x, w, b) }", w=weights(8, 4, 1, 1), b=biases(8)
    )
    result, alone = (correct(model, X, quant_params=PARAMS, equalize=each) for each in (True, False))
    assert result.scores == alone.scores
    assert result.model == alone.model
    assert not result.equalization.is_anything_done
    assert alone.equalization is None


def test_method_by_name_corrects_the_equalized_model_and_judges_by_the_one_that_came():
    model = network(4, 1 / 4)
    result = correct(model, X, quant_params=PARAMS, equalize=True, method="empirical")
    assert list(result.scores) == ["none", "equalized", "equalized, empirical"]
    assert result.method == "equalized, empirical"
    assert result.scores["none"] == correct(model, X, quant_params=PARAMS, method="empirical").scores["none"]
    alone = correct(equalize(model, X).model, X, quant_params=PARAMS, method="empirical")
    assert result.model == alone.model
    assert [layer.shift_before for layer in result.report] == [layer.shift_before for layer in alone.report]


def test_without_data_by_what_the_folded_normalization_told():
    text = f"""g (float[N,4,5,5] x) => (float[N,3,5,5] y) {{
        [first] a = Conv(x, w1)  {batch_norm("a", "n")}  r = Relu(n)  [second] y = Conv(r, w2) }}"""
    constants = {"w1": weights(8, 4, 1, 1), "w2": weights(3, 8, 1, 1), **batch_norm_constants(8)}
    model = model_from_text(text, **constants)
    result = correct(model, method="analytical", quant_params=QuantParams("tf", weight_bits=4), equalize=True)
    assert (result.method, result.scores) == ("equalized, analytical", {})
    assert {layer.name: layer.method for layer in result.report} == {"first": None, "second": "analytical"}
    assert result.model != equalize(model).model


@pytest.mark.parametrize("how", ["model", "file"])
def test_quantized_model_is_not_equalized(how, tmp_path):
    model = network(1, 1)
    path = tmp_path / "quantized.onnx"
    onnx.save(model, path)
    with pytest.raises(ValueError, match="equalize: only for simulated quantization, but there is a quantized model"):
        correct(model, X, quantized=model if how == "model" else path, equalize=True)
