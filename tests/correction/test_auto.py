"""The automatic choice of a method: what it judges, what it takes, and that it never makes held-out samples worse."""

import warnings

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat, QuantType

from biascorr import QuantParams, correct
from biascorr.calibration.samples import scored_parts
from networks import (
    BITS,
    biases,
    constants_of,
    fake_quantized,
    gated_network,
    gated_samples,
    model_from_text,
    quantized,
    run,
    samples,
    stripped,
    two_layers,
    weights,
    with_constants,
)

PARAMS = QuantParams("tf", weight_bits=BITS)


def judges(count):
    """The numbers of the samples that judge."""
    return np.sort(scored_parts([1] * count, 0)[0])


def held_back(array):
    """The samples that judge."""
    return array[judges(len(array))]


def fitted(array):
    """The others."""
    return np.delete(array, judges(len(array)), axis=0)


def simulated(model):
    """The model with fake-quantized weights and its own biases."""
    return with_constants(model, **{k: fake_quantized(v, None) for k, v in constants_of(model).items() if k.startswith("w")})


def sqnr(reference, computed):
    """The mean over the samples."""
    r, q = (np.asarray(each, np.float64).reshape(len(reference), -1) for each in (reference, computed))
    return (10 * np.log10((r**2).sum(axis=1) / ((q - r) ** 2).sum(axis=1))).mean()


def divergence(reference, computed):
    r, q = (np.asarray(each, np.float64) for each in (reference, computed))
    return (r * np.log(r / q)).sum() / r[..., 0].size


def network(seed):
    """A residual network with flat activations, which means before them say little of."""
    text = """g (float[N,3,8,8] x) => (float[N,5] y) {
        [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [clip] c = Clip(a, low, high)
        [second] d = Conv<pads=[1,1,1,1], group=2>(c, w2, b2)
        [relu] r = Relu(d)
        [sum] s = Add(r, c)
        [pool] p = AveragePool<kernel_shape=[4,4], strides=[4,4]>(s)
        [flatten] f = Flatten(p)
        [last] y = Gemm(f, w3, b3)
    }"""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 3, 3, 3), "b2": (6,), "w3": (24, 5), "b3": (5,)}
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return model_from_text(text, **constants, low=np.float32(-0.5), high=np.float32(3))


def images(seed, count=20):
    """Unlike each other, so that the means of some are not those of others."""
    rng = np.random.default_rng([seed, 1])
    return (rng.standard_normal((count, 3, 8, 8)) * rng.gamma(1, 2, (count, 1, 1, 1))).astype(np.float32)


def gemm(outputs, body, **constants):
    text = f"g (float[N,7] x) => ({outputs}) {{ [layer] t = Gemm(x, w, b) {body} }}"
    return model_from_text(text, w=weights(7, 5, axis=1), b=biases(5), **constants)


# Never worse


@pytest.mark.parametrize("seed", range(8))
def test_simulated_model_is_never_worse_on_samples_that_are_held_back(seed):
    model, x = network(seed), images(seed)
    correction = correct(model, fitted(x), validation=held_back(x), quant_params=PARAMS)
    expected, before, after = (
        run(each, {"x": held_back(x)})[0] for each in (model, simulated(model), simulated(correction.model))
    )
    assert sqnr(expected, after) >= sqnr(expected, before)
    assert correction.scores["none"].sqnr == pytest.approx(sqnr(expected, before), abs=1e-3)
    assert correction.scores[correction.method].sqnr == pytest.approx(sqnr(expected, after), abs=1e-3)
    best = max(correction.scores.values(), key=lambda score: score.sqnr)
    assert not best.is_better_than(correction.scores[correction.method])


FORMATS = [(form, seed) for form in (QuantFormat.QDQ, QuantFormat.QOperator) for seed in range(3)]


@pytest.mark.parametrize(("form", "seed"), FORMATS, ids=str)
def test_quantized_model_is_never_worse_on_samples_that_are_held_back(form, seed):
    model, x = network(seed), images(seed)
    given = quantized(model, [{"x": x}], quant_format=form, weight_type=QuantType.QInt8, per_channel=seed == 1)
    correction = correct(model, fitted(x), validation=held_back(x), quantized=given)
    expected, before, after = (run(each, {"x": held_back(x)})[0] for each in (model, given, correction.model))
    assert sqnr(expected, after) >= sqnr(expected, before) - 0.01
    assert correction.scores["none"].sqnr == pytest.approx(sqnr(expected, before), abs=0.05)
    assert correction.scores[correction.method].sqnr == pytest.approx(sqnr(expected, after), abs=0.05)


def test_best_of_the_candidates_is_taken():
    model, x = two_layers(), samples(40, 3, 6, 6)
    correction = correct(model, x, quant_params=PARAMS)
    assert next(iter(correction.scores)) == "none"
    assert {"none", "mean", "iterative", "squared", "activation"} <= set(correction.scores)
    best = max(correction.scores, key=lambda name: correction.scores[name].sqnr)
    assert correction.method != "none"
    assert not correction.scores[best].is_better_than(correction.scores[correction.method])
    assert [layer.method for layer in correction.report] == [correction.method] * 3
    assert correction.notes == []


def test_half_of_a_shift_is_taken_where_all_of_it_is_too_much():
    x = samples(40, 7)
    x[judges(40)] /= 2
    correction = correct(gemm("float[N,5] t", ""), fitted(x), validation=held_back(x), quant_params=PARAMS)
    assert correction.method == correction.report[0].method
    assert correction.method in ("empirical 0.5", "activation 0.5")
    half = constants_of(
        correct(gemm("float[N,5] t", ""), fitted(x), quant_params=PARAMS, method="empirical", strength=0.5).model
    )
    np.testing.assert_allclose(constants_of(correction.model)["b"], half["b"], rtol=1e-6)


def test_means_in_the_flat_part_of_an_activation_are_not_trusted():
    model, x = gemm_and_relu(), gated_samples(40)
    correction = correct(model, x, quant_params=PARAMS)
    scores = correction.scores
    assert scores["mean"].sqnr < scores["none"].sqnr - 6
    assert correction.method in ("activation", "squared")
    assert min(scores[method].sqnr for method in ("activation", "squared")) > scores["none"].sqnr + 6


def gemm_and_relu():
    """Positive weights: where the samples are far below zero, so is the output."""
    text = "g (float[N,6] x) => (float[N,4] y) { [layer] t = Gemm(x, w, b) y = Relu(t) }"
    return model_from_text(text, w=np.abs(weights(6, 4, axis=1)), b=biases(4))


# As it came


def test_model_that_every_correction_makes_worse_stays_as_it_is():
    correction = correct(gated_network(), gated_samples(40), quant_params=PARAMS)
    assert correction.method == "none"
    assert correction.model == gated_network()
    others = [score for name, score in correction.scores.items() if name != "none"]
    assert others
    assert all(score.is_worse_than(correction.scores["none"]) for score in others)
    (layer,) = correction.report
    assert (layer.name, layer.method, layer.channels) == ("layer", None, 4)
    assert layer.reason == "no correction made the outputs better"


def test_quantized_model_that_every_correction_makes_worse_stays_as_it_is():
    given = quantized(gated_network(), [{"x": gated_samples(40)}], weight_type=QuantType.QInt4)
    before = given.SerializeToString(deterministic=True)
    correction = correct(gated_network(), gated_samples(40), quantized=given)
    assert correction.method == "none"
    assert correction.model == given
    assert given.SerializeToString(deterministic=True) == before


def test_model_that_is_perfect_stays_as_it_is():
    model = simulated(two_layers())
    correction = correct(model, samples(40, 3, 6, 6), quant_params=PARAMS)
    assert correction.method == "none"
    assert correction.model == model
    assert list(correction.scores) == ["none"]
    assert [layer.reason for layer in correction.report] == ["weights are not quantized"] * 3


def test_model_whose_outputs_hide_every_error_stays_as_it_is():
    model = gemm("int64[N] y", "y = ArgMax<axis=1, keepdims=0>(t)")
    x = samples(40, 7)
    (expected,), (before,) = (run(each, {"x": held_back(x)}) for each in (model, simulated(model)))
    np.testing.assert_array_equal(before, expected)
    correction = correct(model, x, quant_params=PARAMS)
    assert correction.method == "none"
    assert correction.model == model


# What changes


@pytest.mark.parametrize("count", [1, 40])
def test_result_differs_from_the_model_only_in_biases(count):
    model = two_layers()
    corrected = correct(model, samples(count, 3, 6, 6), quant_params=PARAMS).model
    assert stripped(corrected, ["b1", "b2", "b3"]) == stripped(model, ["b1", "b2", "b3"])
    assert all(not np.array_equal(constants_of(corrected)[name], constants_of(model)[name]) for name in ("b1", "b2", "b3"))


def test_result_differs_from_the_quantized_model_only_in_biases():
    model, x = two_layers(), samples(40, 3, 6, 6)
    given = quantized(model, [{"x": x}], weight_type=QuantType.QInt4)
    corrected = correct(model, x, quantized=given).model
    names = ["b1_quantized", "b2_quantized", "b3_quantized"]
    assert stripped(corrected, names) == stripped(given, names)
    assert corrected != given
    onnx.checker.check_model(corrected, full_check=True)


# What is fitted, what judges


def test_samples_that_judge_are_not_fitted():
    model, x = gemm("float[N,5] t", ""), samples(40, 7)
    other = x.copy()
    other[judges(40)] *= 2
    first, second = (correct(model, each, quant_params=PARAMS, method="auto") for each in (x, other))
    assert first.scores != second.scores
    alone = correct(model, fitted(x), validation=held_back(x), quant_params=PARAMS)
    assert {name: str(score) for name, score in first.scores.items()} == {
        name: str(each) for name, each in alone.scores.items()
    }


def test_the_winner_is_fitted_again_to_all_samples():
    model, x = two_layers(), samples(40, 3, 6, 6)
    correction = correct(model, x, quant_params=PARAMS)
    choice = correction.choice
    assert correction.is_refitted
    by_name = correct(model, x, quant_params=PARAMS, method=choice.method, strength=choice.strength, shrunk=choice.shrunk)
    alone = correct(model, fitted(x), validation=held_back(x), quant_params=PARAMS)
    assert not alone.is_refitted
    assert alone.choice == choice
    for name, array in constants_of(correction.model).items():
        np.testing.assert_allclose(array, constants_of(by_name.model)[name], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(constants_of(alone.model)["b1"], constants_of(correction.model)["b1"])


def test_batches_are_split_by_samples():
    model, x = two_layers(), samples(40, 3, 6, 6)
    one, other = (correct(model, data, quant_params=PARAMS) for data in (x, [x[:3], x[3:20], x[20:]]))
    assert one.method == other.method
    for name, score in one.scores.items():
        assert other.scores[name].sqnr == pytest.approx(score.sqnr, abs=1e-3)
    for name, array in constants_of(one.model).items():
        np.testing.assert_allclose(constants_of(other.model)[name], array, rtol=1e-4, atol=1e-5)


def test_a_method_by_name_is_fitted_to_all_samples():
    model, x = two_layers(), samples(40, 3, 6, 6)
    other = x.copy()
    other[judges(40)] = samples(10, 3, 6, 6, seed=7)
    first, second = (correct(model, each, quant_params=PARAMS, method="empirical") for each in (x, other))
    assert list(first.scores) == ["none", "empirical"]
    assert not np.array_equal(constants_of(first.model)["b1"], constants_of(second.model)["b1"])


# Too few samples


@pytest.mark.parametrize(("count", "judges"), [(4, 2), (12, 6), (15, 7)])
def test_few_samples_that_are_held_back_are_noted(count, judges):
    correction = correct(two_layers(), samples(count, 3, 6, 6), quant_params=PARAMS)
    note = correction.notes[0]
    assert note.startswith(f"scored on {judges} held-out sample{'s' * (judges > 1)}: too few")
    assert "16 samples" in note


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_samples_to_hold_any_back_are_noted(count):
    correction = correct(two_layers(), samples(count, 3, 6, 6), quant_params=PARAMS)
    (note,) = correction.notes
    assert note.startswith(f"scored on {count} fitted sample")
    assert correction.samples == count
    assert correction.method != "none"


def test_enough_samples_are_not_noted():
    assert correct(two_layers(), samples(16, 3, 6, 6), quant_params=PARAMS).notes == []


# Methods by name


@pytest.mark.parametrize("method", ["mean", "iterative", "empirical", "activation"])
def test_method_by_name_that_makes_the_outputs_worse_warns(method):
    with pytest.warns(UserWarning, match=rf"^{method} made the outputs worse: .* dB before, .* dB after") as caught:
        correction = correct(gated_network(), gated_samples(40), quant_params=PARAMS, method=method)
    assert [warning.filename for warning in caught] == [__file__]
    assert correction.notes == [str(caught[0].message)]
    assert correction.method == correction.report[0].method == method
    assert correction.model != gated_network()
    before, after = (correction.scores[name] for name in ("none", method))
    assert f"{before} before, {after} after" in correction.notes[0]


def test_method_by_name_that_makes_the_outputs_better_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert correct(two_layers(), samples(40, 3, 6, 6), quant_params=PARAMS, method="empirical").notes == []


# Outputs of other kinds


def test_classifier_is_judged_by_divergence():
    model, x = gemm("float[N,5] y", "y = Softmax(t)"), samples(40, 7)
    correction = correct(model, fitted(x), validation=held_back(x), quant_params=PARAMS)
    expected, before, after = (
        run(each, {"x": held_back(x)})[0] for each in (model, simulated(model), simulated(correction.model))
    )
    scores = correction.scores
    assert scores["none"].divergence == pytest.approx(divergence(expected, before), rel=1e-3)
    assert scores[correction.method].divergence == pytest.approx(divergence(expected, after), rel=1e-3)
    best = min(scores.values(), key=lambda score: score.divergence)
    assert not best.is_better_than(scores[correction.method])
    assert scores[correction.method].divergence < 0.5 * scores["none"].divergence


def test_classifier_with_another_output_that_gets_worse_stays_as_it_is():
    text = "g (float[N,6] x) => (float[N,3] p) { xs = Mul(x, small) [head] u = Gemm(xs, w2) p = Softmax(u) }"
    classes = model_from_text(text, w2=weights(6, 3, axis=1), small=np.float32(0.1))
    model = gated_network()
    model.graph.node.extend(classes.graph.node)
    model.graph.initializer.extend(classes.graph.initializer)
    model.graph.output.extend(classes.graph.output)
    correction = correct(model, gated_samples(40), quant_params=PARAMS)
    none, mean = (correction.scores[name] for name in ("none", "mean"))
    assert mean.divergence < none.divergence
    assert mean.sqnr < none.sqnr
    assert correction.method == "none"


def test_several_outputs_weigh_the_same():
    model = gemm(
        "float[N,5] t, float[N,5] y, int64[N] z",
        "u = Mul(t, h) y = Relu(u) z = ArgMax<axis=1, keepdims=0>(t)",
        h=np.float32(100),
    )
    x = samples(40, 7)
    correction = correct(model, x, quant_params=PARAMS)
    expected, before = (run(each, {"x": held_back(x)}) for each in (model, simulated(model)))
    right = 20.0 * (before[2] == expected[2]).mean()
    ratios = [*(sqnr(*pair) for pair in list(zip(expected, before))[:2]), right]
    assert correction.scores["none"].sqnr == pytest.approx(np.mean(ratios), abs=1e-3)
    assert correction.method != "none"


def test_outputs_of_integers_are_judged_by_how_many_are_equal():
    model, x = gemm("int64[N,1] y", "y = ArgMax<axis=1>(t)"), samples(300, 7, seed=5)
    model = with_constants(model, b=-(x @ weights(7, 5, axis=1)).mean(axis=0))  # no class is the best of most samples
    correction = correct(model, fitted(x), validation=held_back(x), quant_params=PARAMS)
    expected, before, after = (
        run(each, {"x": held_back(x)})[0] for each in (model, simulated(model), simulated(correction.model))
    )
    assert (before == expected).sum() < (after == expected).sum()
    assert correction.scores["none"].sqnr == pytest.approx(20 * (before == expected).mean())


def test_output_that_is_a_number():
    model = gemm("float y", "y = ReduceMean<keepdims=0>(t)")
    correction = correct(model, samples(40, 7), quant_params=PARAMS)
    assert correction.method != "none"


def test_output_that_is_not_finite_everywhere_is_judged_where_it_is():
    model, x = gemm("float[N,5] y", "y = Log(t)"), samples(40, 7)
    correction = correct(model, np.delete(x, np.s_[3::4], axis=0), validation=x[3::4], quant_params=PARAMS)
    expected, before = (run(each, {"x": x[3::4]})[0] for each in (model, simulated(model)))
    known = np.isfinite(expected)
    assert 0 < known.sum() < known.size
    assert np.isfinite(before[known]).all()
    expected, before = (np.where(known, each, 0) for each in (expected, before))
    assert correction.scores["none"].sqnr == pytest.approx(sqnr(expected, before), abs=1e-3)
