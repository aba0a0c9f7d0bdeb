"""Simulated quantization with batch normalizations folded before: what is returned, and what is warned of."""

import warnings

import numpy as np
import pytest

from biascorr import QuantParams, correct, fold_all_batch_norms
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.simulation import simulated
from networks import (
    assert_same_function,
    batch_norm,
    batch_norm_constants,
    biases,
    constants_of,
    layers_of,
    model_from_text,
    quantized,
    run,
    samples,
    two_layers,
    weights,
)

X = samples(32, 3, 6, 6)
PARAMS = QuantParams("tf", weight_bits=4)
METHODS = ["auto", "mean", "iterative", "empirical", "activation", "analytical", "hybrid"]
NOT_FOLDED = r"^not folded: {}, which a converter folds .*; fold=True \(--fold\) folds them first$"


def network():
    """first -> norm -> relu -> second -> last_norm: one batch normalization behind each convolution."""
    text = f"""g (float[N,3,6,6] x) => (float[N,5,4,4] y) {{
        [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        {batch_norm("a", "n")}
        [relu] r = Relu(n)
        [second] c = Conv(r, w2)
        {batch_norm("c", "y", "last_norm")}
    }}"""
    constants = {"w1": weights(4, 3, 3, 3), "b1": biases(4), "w2": weights(5, 4, 3, 3)}
    return model_from_text(text, **constants, **batch_norm_constants(4), **batch_norm_constants(5, "last_norm", seed=1))


def kept_network():
    """A batch normalization that stays: something else reads the output of the layer too."""
    text = f"""g (float[N,4] x) => (float[N,5] y) {{
        [layer] t = MatMul(x, w)  {batch_norm("t", "n")}  y = Add(n, t) }}"""
    return model_from_text(text, w=weights(4, 5, axis=1), **batch_norm_constants(5))


def corrected(model, data=X, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* made the outputs worse", UserWarning)
        return correct(model, data, quant_params=options.pop("quant_params", PARAMS), **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_the_model_folded_beforehand(method):
    model = network()
    before = model.SerializeToString()
    folded, pairs = fold_all_batch_norms(model)
    assert len(pairs) == 2
    found, expected = corrected(model, method=method, fold=True), corrected(folded, method=method)
    assert found.model == expected.model
    assert (found.method, found.scores) == (expected.method, expected.scores)
    assert found.notes == ["2 batch normalizations folded into layers", *expected.notes]
    assert model.SerializeToString() == before


def test_weights_that_are_returned_are_the_folded_ones():
    model = network()
    found = corrected(model, method="empirical", fold=True).model
    assert "BatchNormalization" not in {node.op_type for node in found.graph.node}
    given, folded, after = layers_of(model), layers_of(fold_all_batch_norms(model)[0]), layers_of(found)
    for name, layer in after.items():
        np.testing.assert_array_equal(layer.weights, folded[name].weights)
        assert np.abs(layer.weights - np.asarray(given[name].weights)).max() > 0.01
        assert np.abs(layer.bias - folded[name].bias).max() > 0.01
    assert_same_function(model, fold_all_batch_norms(model)[0], {"x": X}, tolerance=1e-5)


def test_folding_first_serves_the_model_that_is_folded_later():
    """Biases that fit the weights of before do not fit those that a converter quantizes."""
    model = network()
    (expected,) = run(model, {"x": X})

    def noise(float_model):
        layers = OnnxNetwork.load(fold_all_batch_norms(float_model)[0], "model")
        return np.square(run(simulated(layers, PARAMS).model, {"x": X})[0] - expected).sum()

    with pytest.warns(UserWarning, match=NOT_FOLDED.format("2 batch normalizations")):
        unfolded = correct(model, X, quant_params=PARAMS, method="empirical").model
    folded = corrected(model, method="empirical", fold=True).model
    assert noise(folded) < noise(model) / 2
    assert noise(folded) < noise(unfolded) / 2


def test_analytical_knows_the_folded_normalizations():
    found = corrected(network(), None, method="analytical", fold=True)
    assert {layer.name: layer.method for layer in found.report} == {"first": None, "second": "analytical"}
    assert "analytical" in corrected(network(), fold=True).scores


def test_both_attempts_start_from_the_folded_model():
    model = network()
    folded, _ = fold_all_batch_norms(model)
    found, expected = (corrected(each, equalize=True, fold=fold) for each, fold in ((model, True), (folded, False)))
    assert found.model == expected.model
    assert found.scores == expected.scores
    assert found.equalization.folds == []
    assert found.scores["none"] == corrected(folded).scores["none"]


@pytest.mark.parametrize("method", ["auto", "empirical", "analytical"])
def test_what_is_not_folded_is_warned_of(method):
    with pytest.warns(UserWarning, match=NOT_FOLDED.format("2 batch normalizations")) as found:
        result = corrected(network(), method=method)
    assert [each.filename for each in found] == [__file__]
    assert str(found[0].message) in result.notes


def corrected_by_name(**options):
    return corrected(network(), method="mean", **options)


@pytest.mark.parametrize(
    "made",
    [
        lambda: corrected_by_name(fold=True),
        lambda: corrected_by_name(equalize=True),
        lambda: corrected_by_name(quant_params=QuantParams("tf", ops_to_ignore=["first", "second"])),
        lambda: corrected(two_layers(), method="mean"),
        lambda: corrected(kept_network(), samples(8, 4), method="mean"),
        lambda: correct(network(), X, quantized=quantized(fold_all_batch_norms(network())[0], [{"x": X}])),
    ],
    ids=["folded", "equalized", "ignored", "none", "none that can be", "quantized"],
)
def test_nothing_is_said_where_nothing_is_left_to_fold(made):
    assert not any(note.startswith("not folded") for note in made().notes)


def test_layers_to_ignore_do_not_count():
    with pytest.warns(UserWarning, match=NOT_FOLDED.format("1 batch normalization")):
        corrected_by_name(quant_params=QuantParams("tf", ops_to_ignore=["first"]))


def test_a_model_with_nothing_to_fold_is_as_without():
    found, expected = (corrected(two_layers(), fold=fold) for fold in (True, False))
    assert (found.model, found.notes) == (expected.model, expected.notes)


def test_finding_out_makes_no_copy(monkeypatch):
    edits = []
    original = OnnxNetwork.edited
    monkeypatch.setattr(OnnxNetwork, "edited", lambda self, edit: edits.append(edit) or original(self, edit))
    with pytest.warns(UserWarning, match="not folded"):
        corrected(network(), None, method="analytical")
    assert len(edits) == 1  # the simulation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": True}, "fold: only for simulated quantization, but there is a quantized model"),
        ({"batch_size": 0}, "batch_size: 0, expected an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size: 1.5, expected an integer of at least 1"),
        ({"max_samples": 0}, "max_samples: 0, expected an integer of at least 1, or None"),
        ({"max_samples": True}, "max_samples: True, expected an integer of at least 1, or None"),
        ({"seed": -1}, "seed: -1, expected an integer of at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        correct(network(), X, quantized=network(), **options)


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 12), (5, 3), (100, 1)])
def test_no_more_samples_are_read_than_asked_for(batch_size, batches):
    found = corrected(two_layers(), X, method="mean", batch_size=batch_size, max_samples=12)
    assert (found.samples, found.batches) == (12, batches)
    expected = constants_of(corrected(two_layers(), X[:12], method="mean").model)
    for name, array in constants_of(found.model).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-6)
