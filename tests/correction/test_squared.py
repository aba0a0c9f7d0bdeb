"""The method "squared": shifts that make the squared error after the activation least."""

import numpy as np
import pytest

from biascorr import QuantParams, correct
from networks import BITS, biases, constants_of, fake_quantized, model_from_text, run, samples, weights, with_constants

PARAMS = QuantParams("tf", weight_bits=BITS)
ACTIVATIONS = {
    "Relu": lambda y: np.maximum(y, 0),
    "Clip": lambda y: np.clip(y, 0, 1),
    "HardSwish": lambda y: y * np.clip(y / 6 + 0.5, 0, 1),
    "Tanh": np.tanh,
}


def dense(activation):
    limits = {"low": np.float32(0), "high": np.float32(1)} if activation == "Clip" else {}
    inputs = ", low, high" if limits else ""
    text = f"g (float[N,6] x) => (float[N,4] y) {{ [layer] t = Gemm(x, w, b)  [act] y = {activation}(t{inputs}) }}"
    return model_from_text(text, w=weights(6, 4, axis=1), b=biases(4) / 2, **limits)


def convolutions():
    return model_from_text(
        """g (float[N,3,6,6] x) => (float[N,5] y) { [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)  [r1] r = Relu(a)
        [second] c = Conv(r, w2, b2)  [r2] s = Relu(c)  [sum] t = Add(s, s)  [pool] p = GlobalAveragePool(t)
        [flat] f = Flatten(p)  [last] y = Gemm(f, w3, b3) }""",
        w1=weights(4, 3, 3, 3), b1=biases(4), w2=weights(6, 4, 3, 3), b2=biases(6), w3=weights(6, 5, axis=1), b3=biases(5),
    )  # fmt: skip


def shift_of(model, corrected, name="b"):
    before, after = (constants_of(each)[name].astype(np.float64) for each in (model, corrected))
    return after - before


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_other_shift_has_a_smaller_error(activation):
    model, x = dense(activation), samples(400, 6)
    inner = model_from_text(
        "g (float[N,6] x) => (float[N,4] t) { [layer] t = Gemm(x, w, b) }", w=weights(6, 4, axis=1), b=biases(4) / 2
    )
    function = ACTIVATIONS[activation]
    expected, y = (
        run(each, {"x": x})[0].astype(np.float64)
        for each in (inner, with_constants(inner, w=fake_quantized(weights(6, 4, axis=1), None)))
    )

    def error(shift):
        return np.square(function(y + shift) - function(expected)).mean(axis=0)

    errors = {}
    for method in ("empirical", "activation", "squared"):
        errors[method] = error(shift_of(model, correct(model, x, method=method, quant_params=PARAMS).model))
    least = np.min([error(shift) for shift in np.linspace(-2, 2, 801)], axis=0)
    assert (errors["squared"] <= 1.01 * least + 1e-5).all()
    assert errors["squared"].sum() <= errors["empirical"].sum() + 1e-9
    assert errors["squared"].sum() <= errors["activation"].sum() + 1e-9
    assert errors["squared"].sum() < 0.999 * max(errors["empirical"].sum(), errors["activation"].sum())


def test_layers_without_an_activation_have_their_mean_error_taken():
    model, x = convolutions(), samples(24, 3, 6, 6)
    alone = model_from_text("g (float[N,6] x) => (float[N,4] y) { [layer] y = Gemm(x, w, b) }", w=weights(6, 4), b=biases(4))
    shifts = [
        shift_of(alone, correct(alone, samples(30, 6), method=method, quant_params=PARAMS).model)
        for method in ("empirical", "squared")
    ]
    np.testing.assert_array_equal(*shifts)
    report = correct(model, x, method="squared", quant_params=PARAMS).report
    assert [layer.method for layer in report] == ["squared"] * 3


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"memory_budget": 1}, {"strength": 0.5}])
def test_threads_and_memory_make_no_difference(options):
    model, x = convolutions(), samples(24, 3, 6, 6)
    found, expected = (
        correct(model, x, method="squared", quant_params=PARAMS, **each).model
        for each in (options, {"threads": 2} | {key: options[key] for key in options if key == "strength"})
    )
    for name in ("b1", "b2", "b3"):
        np.testing.assert_allclose(shift_of(model, found, name), shift_of(model, expected, name), atol=1e-5)
    if "strength" in options:
        whole = correct(model, x, method="squared", quant_params=PARAMS).model
        np.testing.assert_allclose(shift_of(model, found, "b1"), shift_of(model, whole, "b1") / 2, atol=1e-5)


def test_it_is_a_candidate_of_auto():
    correction = correct(convolutions(), samples(24, 3, 6, 6), quant_params=PARAMS)
    assert "squared" in correction.scores
