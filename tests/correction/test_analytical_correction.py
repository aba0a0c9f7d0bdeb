"""`correct` with the methods that batch normalizations serve: analytical, without data or with it, and hybrid."""

import warnings

import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.simulation import simulated
from networks import biases, channel_mean, constants_of, model_from_text, quantized, run, samples, two_layers, weights

X = samples(16, 3, 6, 6)
PARAMS = QuantParams("tf", weight_bits=4)
CONSTANT = {"gamma": np.zeros(4, np.float32), "beta": np.float32([0.5, -0.25, 1.25, 2.0])}
"""Of a batch normalization: its output is beta, whatever the data."""


def network(size=6, **options):
    """first -> norm -> relu -> second -> third -> mean over space -> last"""
    text = f"""g (float[N,3,{size},{size}] x) => (float[N,5] y) {{
        [first] a = Conv(x, w1, b1)
        [norm] n = BatchNormalization<epsilon=0.0>(a, gamma, beta, zero, one)
        [relu] r = Relu(n)
        [second] c = Conv<pads=[1,1,1,1]>(r, w2)
        [third] d = Conv(c, w3, b3)
        [mean] m = GlobalAveragePool(d)
        [flatten] f = Flatten(m)
        [last] y = Gemm<transB=1>(f, w4, b4)
    }}"""
    shapes = {"w1": (4, 3, 3, 3), "w2": (6, 4, 3, 3), "w3": (2, 6, 2, 2), "w4": (5, 2)}
    constants = {name: weights(*shape) for name, shape in shapes.items()} | {"b1": biases(4), "b3": biases(2), "b4": biases(5)}
    norm = {"zero": np.zeros(4, np.float32), "one": np.ones(4, np.float32), **CONSTANT}
    return model_from_text(text, **constants, **(norm | options))


def corrected_unfolded(*arguments, **options):
    """A network corrected with its batch normalization as it is, which is warned of."""
    with pytest.warns(UserWarning, match="^not folded: 1 batch normalization, "):
        return correct(*arguments, **options)


def fake_quantized_model(model, params=PARAMS):
    """The model with the weights of its simulation."""
    return simulated(OnnxNetwork.load(model, "model"), params).model


def mean_of(model, name, axis, x=X):
    return channel_mean(run(model, {"x": x}, [name])[0], axis)


def report_of(correction):
    return {layer.name: layer for layer in correction.report}


def test_without_data_layers_behind_a_batch_normalization_are_corrected():
    correction = corrected_unfolded(network(), method="analytical", quant_params=PARAMS)
    report = report_of(correction)
    assert {name: layer.method for name, layer in report.items()} == {
        "first": None, "second": "analytical", "third": None, "last": None
    }  # fmt: skip
    for name in ("first", "third", "last"):
        assert report[name].reason == "no BatchNormalization before it gives the mean of its input"
    assert report["second"].shift_before > 0.01
    assert correction.method == "analytical"
    assert correction.scores == {}
    assert correction.notes[1:] == ["nothing was scored, which needs data"]
    assert (correction.samples, correction.batches) == (0, 0)


def test_the_corrected_layer_makes_what_the_float_one_makes():
    model = network()
    corrected = fake_quantized_model(corrected_unfolded(model, method="analytical", quant_params=PARAMS).model)
    expected, before, after = (mean_of(each, "c", 1) for each in (model, fake_quantized_model(model), corrected))
    assert np.abs(before - expected).max() > 0.01
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_the_quantized_model_may_be_given():
    model = network()
    given = quantized(model, [{"x": X}])
    correction = correct(model, quantized=given, method="analytical")
    report = report_of(correction)
    assert report["second"].method == "analytical"
    assert report["first"].method is None
    np.testing.assert_array_equal(constants_of(correction.model)["w2_quantized"], constants_of(given)["w2_quantized"])
    biases_after = constants_of(correction.model)
    assert any("bias" in name and np.any(biases_after[name]) for name in biases_after.keys() - constants_of(given).keys())


@pytest.mark.parametrize("method", ["auto", "mean", "iterative", "empirical", "activation", "hybrid"])
def test_other_methods_need_data(method):
    with pytest.raises(
        ValueError, match=f"data: None, expected samples with method '{method}'; only 'analytical' does without"
    ):
        correct(network(), method=method, quant_params=PARAMS)


def test_with_data_the_first_layer_is_corrected_by_its_mean_and_all_is_judged():
    model = network()
    correction = corrected_unfolded(model, X, method="analytical", quant_params=PARAMS)
    report = report_of(correction)
    assert [report[name].method for name in ("first", "second", "third", "last")] == ["analytical", "analytical", None, None]
    corrected = fake_quantized_model(correction.model)
    expected, before, after = (mean_of(each, "a", 1) for each in (model, fake_quantized_model(model), corrected))
    assert np.abs(before - expected).max() > 0.01
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert list(correction.scores) == ["none", "analytical"]
    assert np.isfinite([score.sqnr for score in correction.scores.values()]).all()


@pytest.mark.parametrize("method", ["analytical", "hybrid"])
def test_data_tells_the_size_of_images_where_the_model_does_not(method):
    """It counts because of the padding."""
    known, found = (corrected_unfolded(network(size), X, method=method, quant_params=PARAMS).model for size in (6, "?"))
    assert found.graph.initializer == known.graph.initializer
    without = constants_of(corrected_unfolded(network("?"), method="analytical", quant_params=PARAMS).model)
    assert any(np.abs(without[name] - array).max() > 1e-3 for name, array in constants_of(found).items() if "bias" in name)


def test_a_worse_model_is_warned_of():
    """What the batch normalization says is not what the data has."""
    options = {"gamma": np.ones(4, np.float32), "beta": np.full(4, 30, np.float32), "zero": np.full(4, 30, np.float32)}
    with pytest.warns(UserWarning, match="analytical made the outputs worse"):
        corrected_unfolded(network(**options), X, method="analytical", quant_params=PARAMS)


def test_a_model_without_batch_normalizations_is_left_alone():
    model = two_layers()
    correction = correct(model, method="analytical", quant_params=PARAMS)
    assert correction.model == model
    assert [layer.method for layer in correction.report] == [None] * 3


def test_ignored_layers_are_left_alone():
    model = network()
    ignoring = QuantParams("tf", weight_bits=4, ops_to_ignore=["second"])
    correction = corrected_unfolded(model, method="analytical", quant_params=ignoring)
    assert correction.model == model
    assert report_of(correction)["second"].reason == "weights are not quantized"


def test_hybrid_is_analytical_where_it_can_be():
    model = network()
    correction = corrected_unfolded(model, X, method="hybrid", quant_params=PARAMS)
    methods = {name: layer.method for name, layer in report_of(correction).items()}
    assert methods == {"first": "empirical", "second": "analytical", "third": "empirical", "last": "empirical"}
    assert list(correction.scores) == ["none", "hybrid"]
    analytical = corrected_unfolded(model, method="analytical", quant_params=PARAMS)
    name = (constants_of(correction.model).keys() - constants_of(model).keys()).pop()  # the second layer had no bias
    np.testing.assert_array_equal(constants_of(correction.model)[name], constants_of(analytical.model)[name])
    corrected = fake_quantized_model(correction.model)
    for tensor, axis in {"a": 1, "d": 1, "y": 1}.items():
        np.testing.assert_allclose(mean_of(corrected, tensor, axis), mean_of(model, tensor, axis), atol=1e-5)


def test_layers_behind_an_analytical_one_are_measured_behind_its_correction():
    """Where a batch normalization says nothing true, what is behind makes up for it."""
    options = {"gamma": np.ones(4, np.float32), "beta": np.full(4, 8, np.float32), "zero": np.full(4, 4, np.float32)}
    model = network(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corrected = fake_quantized_model(correct(model, X, method="hybrid", quant_params=PARAMS).model)
    assert np.abs(mean_of(corrected, "c", 1) - mean_of(model, "c", 1)).max() > 0.01
    np.testing.assert_allclose(mean_of(corrected, "d", 1), mean_of(model, "d", 1), atol=1e-4)


@pytest.mark.parametrize("joins", [True, False])
def test_auto_tries_what_batch_normalizations_say_if_there_are_some(joins):
    correction = (
        corrected_unfolded(network(), X, quant_params=PARAMS) if joins else correct(two_layers(), X, quant_params=PARAMS)
    )
    assert ("analytical" in correction.scores) == joins
    assert "hybrid" not in correction.scores


def test_auto_says_why_layers_of_an_uncorrected_model_are_left_alone():
    text = "g (float[N,4] x) => (float[N,5] y) { [layer] t = Gemm(x, w) y = Mul(t, zero) }"
    model = model_from_text(text, w=weights(4, 5, axis=1), zero=np.zeros(1, np.float32))
    correction = correct(model, samples(32, 4), quant_params=PARAMS)
    assert correction.method == "none"
    assert correction.model == model
    assert [(layer.name, layer.method, layer.reason) for layer in correction.report] == [
        ("layer", None, "no correction made the outputs better")
    ]


def test_a_simulation_may_move_weights_further_than_zero_is_away():
    """As rounding up by chance does; there is no doubt which layer is which."""
    w = np.full((20, 20), 0.05, np.float32)
    w[0, 0] = 1.0
    model = model_from_text("g (float[N,20] x) => (float[N,20] y) { [layer] y = Gemm(x, w, b) }", w=w, b=biases(20))
    params = QuantParams("tf", "stochastic", weight_bits=2)
    assert np.linalg.norm(params.fake_quantized(OnnxNetwork.load(model, "model").layers[0]) - w) > np.linalg.norm(w)
    report = correct(model, samples(8, 20), method="empirical", quant_params=params).report
    assert [layer.method for layer in report] == ["empirical"]
