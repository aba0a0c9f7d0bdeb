"""Tensors without elements: caches that are empty at first, inputs that some samples have nothing of."""

import numpy as np
import pytest

from biascorr import QuantParams, correct, equalize
from networks import BITS, biases, constants_of, model_from_text, samples, weights

PARAMS = QuantParams("tf", weight_bits=BITS)
METHODS = ["mean", "iterative", "empirical", "activation", "auto"]

pytestmark = pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")


def decoder():
    """One head of attention that keeps keys and values: `past` is what was there before, of any length."""
    text = """g (float[N,T,8] x, float[N,P,8] past_key, float[N,P,8] past_value)
            => (float[N,T,8] y, float[N,S,8] present_key, float[N,S,8] present_value) {
        [query] q = MatMul(x, wq) [key] k = MatMul(x, wk) [value] v = MatMul(x, wv)
        present_key = Concat<axis=1>(past_key, k) present_value = Concat<axis=1>(past_value, v)
        t = Transpose<perm=[0,2,1]>(present_key) s = MatMul(q, t) a = Softmax<axis=-1>(s) c = MatMul(a, present_value)
        [output] o = MatMul(c, wo) [bias] b = Add(o, bo) [up] u = MatMul(b, wu) r = Relu(u) [down] d = MatMul(r, wd)
        y = Add(x, d)
    }"""
    constants = {f"w{name}": weights(8, 8, axis=1, seed=seed) / 8 for seed, name in enumerate("qkvoud")}
    return model_from_text(text, **constants, bo=biases(8))


def feeds(past, count=8):
    return [
        {"x": samples(1, 5, 8, seed=k), "past_key": samples(1, past, 8, seed=k + 50), "past_value": samples(1, past, 8)}
        for k in range(count)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [None, 0])
def test_a_decoder_with_empty_caches(method, budget):
    correction = correct(decoder(), feeds(0), method=method, quant_params=PARAMS, memory_budget=budget)
    assert [layer.name for layer in correction.report] == ["query", "key", "value", "output", "up", "down"]
    assert all(layer.method is not None for layer in correction.report)
    assert correction.scores[correction.method].sqnr > correction.scores["none"].sqnr


def test_caches_of_many_lengths():
    data = [*feeds(0, 4), *feeds(3, 4)]
    correction = correct(decoder(), data, method="empirical", quant_params=PARAMS)
    assert correction.scores["empirical"].sqnr > correction.scores["none"].sqnr + 3


def test_an_array_that_holds_no_positions_of_each_sample():
    data = {"x": samples(8, 5, 8), "past_key": samples(8, 0, 8), "past_value": samples(8, 0, 8)}
    correction = correct(decoder(), data, method="mean", quant_params=PARAMS)
    assert correction.samples == 8
    assert all(layer.method == "mean" for layer in correction.report)


def test_equalization_with_empty_caches():
    result = equalize(decoder(), feeds(0))
    assert result.change is None or result.change.relative < 1e-5


def test_a_batch_without_samples_is_refused():
    data = [{"x": samples(1, 5, 8), "past_key": samples(1, 0, 8), "past_value": samples(1, 0, 8)}]
    data.append({name: array[:0] for name, array in data[0].items()})
    with pytest.raises(ValueError, match=r"data\[1\]: input x: shape \(0, 5, 8\) has no samples"):
        correct(decoder(), data, method="mean", quant_params=PARAMS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", ["N", "2"])
def test_a_cache_along_the_first_axis_that_is_empty_at_first(rows, method):
    text = f"""g (float[{rows},6] x, float[P,6] past) => (float[M,4] y) {{
        k = Concat<axis=0>(past, x) [a] t = Gemm(k, w, b) r = Relu(t) [z] y = Gemm(r, v, c) }}"""
    constants = {"w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1, seed=1), "b": biases(5), "c": biases(4)}
    x = samples(16, 6)
    data = [{"x": x[k : k + 2], "past": x[:k]} for k in range(0, 16, 2)]
    correction = correct(model_from_text(text, **constants), data, method=method, quant_params=PARAMS)
    assert [layer.name for layer in correction.report] == ["a", "z"]
    if method == "empirical":
        assert correction.scores["empirical"].sqnr > correction.scores["none"].sqnr


def computed_rows():
    """A layer that reads the rows of its input that are chosen at run time, maybe none."""
    return model_from_text(
        """g (float[N,4] x, bool[N] chosen) => (float[N,3] y, float[K,3] z) {
            [first] a = Gemm(x, w1, b1) y = Relu(a) k = Compress<axis=0>(x, chosen) [reader] z = Gemm(k, w2, b2) }""",
        **{"w1": weights(4, 3, axis=1), "b1": biases(3), "w2": weights(4, 3, axis=1, seed=5), "b2": biases(3, seed=6)},
    )


def choices(*rows):
    return [{"x": samples(4, 4, seed=k), "chosen": np.arange(4) < count} for k, count in enumerate(rows)]


@pytest.mark.parametrize("method", ["mean", "iterative", "empirical"])
def test_a_layer_that_some_batches_have_no_rows_for(method):
    model, data = computed_rows(), choices(2, 0, 3, 0, 1)
    corrected = correct(model, data, method=method, quant_params=PARAMS)
    assert corrected.report[1].method == method
    if method == "empirical":
        rows = np.concatenate([feeds["x"][feeds["chosen"]] for feeds in data])
        direct = correct(
            model_from_text(
                "g (float[N,4] k) => (float[N,3] z) { [reader] z = Gemm(k, w2, b2) }",
                w2=constants_of(model)["w2"],
                b2=constants_of(model)["b2"],
            ),
            [rows],
            method="empirical",
            quant_params=PARAMS,
        )
        np.testing.assert_allclose(constants_of(corrected.model)["b2"], constants_of(direct.model)["b2"], rtol=1e-5)


@pytest.mark.parametrize("method", ["mean", "iterative", "empirical", "activation"])
def test_a_layer_that_no_batch_has_rows_for_stays_as_it_is(method):
    model = computed_rows()
    correction = correct(model, choices(0, 0, 0), method=method, quant_params=PARAMS)
    report = correction.report[1]
    assert (report.name, report.method) == ("reader", None)
    assert report.reason == "no sample has values there"
    np.testing.assert_array_equal(constants_of(correction.model)["b2"], constants_of(model)["b2"])
    assert correction.report[0].method == method
