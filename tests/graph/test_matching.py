"""Which float layer a quantized one was: by name, by name without a quantizer's suffix, by weights."""

import re

import numpy as np
import pytest
from onnxruntime.quantization import QuantFormat

from biascorr import correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph.matching import match_layers
from networks import constants_of, fake_quantized, model_from_text, quantized, samples, two_layers, weights, with_constants

X = samples(8, 3, 6, 6)


def layers(**named):
    """One Gemm for each array of weights, in this order."""
    nodes = "".join(f"[{name}] y_{name} = Gemm(x, {name}_w) " for name in named)
    outputs = ", ".join(f"float[N,?] y_{name}" for name in named)
    constants = {f"{name}_w": array for name, array in named.items()}
    return OnnxNetwork.load(model_from_text(f"g (float[N,4] x) => ({outputs}) {{ {nodes} }}", **constants), "model").layers


def rounded(array):
    return fake_quantized(array, 1)


def names(reference, quantized):
    return {name: match.reference.name for name, match in match_layers(reference, quantized).items()}


A, B, C = (weights(4, 5, axis=1, seed=seed) for seed in range(3))


def test_names_count_more_than_weights():
    assert names(layers(a=A, b=A), layers(b=rounded(A), a=rounded(A))) == {"b": "b", "a": "a"}


@pytest.mark.parametrize("suffix", ["_quant", "_Q4", "_Q8", "_matmul_Q4"])
def test_names_without_the_suffix_of_a_quantizer_count_more_than_weights(suffix):
    found = names(layers(a=A, b=A), layers(**{f"b{suffix}": rounded(A), f"a{suffix}": rounded(A)}))
    assert found == {f"b{suffix}": "b", f"a{suffix}": "a"}


def test_other_names_are_told_apart_by_their_weights():
    assert names(layers(a=A, b=B, c=C), layers(q=rounded(C), r=rounded(A), s=rounded(B))) == {"q": "c", "r": "a", "s": "b"}


def test_a_name_that_is_taken_is_not_given_twice():
    found = names(layers(a=A, b=B), layers(a_quant=rounded(B), a=rounded(A)))
    assert found == {"a": "a", "a_quant": "b"}


def test_a_suffix_does_not_join_layers_of_other_shapes():
    assert names(layers(a=A, b=B[:, :3]), layers(a_quant=rounded(B[:, :3]))) == {"a_quant": "b"}


def test_layers_that_share_weights_have_one_each_as_far_as_there_are_some():
    found = names(layers(a=A, b=A), layers(q=rounded(A), r=rounded(A), s=rounded(A)))
    assert {found["q"], found["r"]} == {"a", "b"}
    assert found["s"] in ("a", "b")


def test_layers_of_other_weights_never_share_one():
    assert names(layers(a=A), layers(q=rounded(A), r=rounded(A) + np.float32(1 / 64))) == {"q": "a"}


def test_weights_that_cannot_have_been_rounded_from_any_have_none():
    assert names(layers(a=A, b=B), layers(a=rounded(A), q=rounded(C))) == {"a": "a"}
    assert names(layers(a=A, b=B), [*layers(a=rounded(A)), *layers(q=rounded(B)[:, :3])]) == {"a": "a"}


def test_names_that_were_counted_anew_prove_nothing():
    """Of the same name, other weights; then weights tell, and a float layer that is nobody's is no error."""
    assert names(layers(n1=A, n2=B, n3=C), layers(n2=rounded(A), n3=rounded(B), n4=rounded(C))) == {
        "n2": "n1",
        "n3": "n2",
        "n4": "n3",
    }
    assert names(layers(a=A, b=B), layers(a=rounded(B), b=rounded(A))) == {"a": "b", "b": "a"}
    assert names(layers(a=A, b=B, c=C), layers(b=rounded(A))) == {"b": "a"}


@pytest.mark.parametrize("top", [1, 3, 7])
def test_exchanged_names_of_layers_with_coarse_weights_prove_nothing(top):
    """Of means far from 0, and with one weight far out: whatever they are rounded to is nearer to both than 0 is."""
    arrays = {}
    for seed, name in enumerate("ab"):
        arrays[name] = np.random.default_rng(seed).normal(0.5, 0.2, (16, 16)).astype(np.float32)
        arrays[name][0, 0] = 3 if top > 1 else 1
    steps = {name: np.float32(np.abs(array).max() / top) for name, array in arrays.items()}
    coarse = {name: np.rint(array / steps[name]) * steps[name] for name, array in arrays.items()}
    body = "[{0}] t = MatMul(x, a) [{1}] y = MatMul(t, b)"
    text = "g (float[N,16] x) => (float[N,16] y) {{ {} }}"
    float_layers = OnnxNetwork.load(model_from_text(text.format(body.format("a", "b")), **arrays), "model").layers
    for order in (("a", "b"), ("b", "a")):
        given = OnnxNetwork.load(model_from_text(text.format(body.format(*order)), **coarse), "quantized").layers
        assert names(float_layers, given) == {order[0]: "a", order[1]: "b"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_layers_are_matched_in_order(count):
    found = names(layers(**{f"f{k}": A for k in range(count)}), layers(**{f"q{k}": rounded(A) for k in range(count)}))
    assert found == {f"q{k}": f"f{k}" for k in range(count)}


PRODUCTS = {
    "MatMul": "[{name}] y = MatMul(x, w)",
    "MatMul, Add": "[{name}] t = MatMul(x, w) y = Add(t, b)",
    "Gemm": "[{name}] y = Gemm(x, w, b)",
    "Gemm, transB": "[{name}] y = Gemm<transB=1>(x, wt, b)",
    "Gemm, alpha": "[{name}] y = Gemm<alpha=0.5>(x, w2, b)",
    "Einsum": '[{name}] t = Einsum<equation="ni,oi->no">(x, wt) y = Add(t, b)',
    "constant first": "s = Transpose<perm=[1,0]>(x) [{name}] t = MatMul(wt, s) u = Transpose<perm=[1,0]>(t) y = Add(u, b)",
}


def product(form, w, name, offset=0.0):
    constants = {"w": w, "wt": np.ascontiguousarray(w.T), "w2": w * 2, "b": np.full(5, offset, np.float32)}
    body = PRODUCTS[form].format(name=name)
    used = {key: array for key, array in constants.items() if key in re.findall(r"\w+", body)}
    return model_from_text(f"g (float[N,4] x) => (float[N,5] y) {{ {body} }}", **used)


@pytest.mark.parametrize("name", ["same", "other"])
@pytest.mark.parametrize("after", PRODUCTS)
@pytest.mark.parametrize("before", PRODUCTS)
def test_a_layer_is_its_product(before, after, name):
    """Whatever operator does it, with its weights this or that way round, or scaled."""
    x, quantized_weights = samples(24, 4), rounded(A)
    reference, given = product(before, A, "same"), product(after, quantized_weights, name)
    for method in ("mean", "empirical"):
        (row,) = correct(reference, x, quantized=given, method=method).report
        expected = np.abs(x.mean(axis=0, dtype=np.float64) @ (A - quantized_weights).astype(np.float64)).mean()
        assert row.method == method
        assert row.shift_before == pytest.approx(expected, rel=1e-4)


def test_a_layer_of_the_same_name_with_other_weights_is_an_error():
    with pytest.raises(ValueError, match="quantized: not of this float model: layer a has other weights"):
        match_layers(layers(a=A), layers(a=rounded(B)))
    with pytest.raises(ValueError, match=r"layer a has weights of shape \(4, 3\), expected \(4, 5\)"):
        match_layers(layers(a=A), layers(a=rounded(B[:, :3])))


def test_a_model_of_other_layers_is_an_error():
    with pytest.raises(ValueError, match="quantized: not of this float model: no layer named q in it, nor one of its weights"):
        match_layers(layers(a=A), layers(q=rounded(B)))
    assert match_layers(layers(a=A), []) == {}


@pytest.mark.parametrize("quant_format", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_model_whose_layers_were_renamed_is_corrected_like_one_whose_were_not(quant_format):
    given = quantized(two_layers(), [{"x": X}], quant_format=quant_format)
    expected = correct(two_layers(), X, quantized=given, method="empirical")
    for node in given.graph.node:
        node.name = f"other_{node.name}"
    found = correct(two_layers(), X, quantized=given, method="empirical")
    assert [layer.name for layer in found.report] == [f"other_{layer.name}" for layer in expected.report]
    assert [layer.method for layer in found.report] == ["empirical"] * 3
    for name, array in constants_of(expected.model).items():
        np.testing.assert_array_equal(constants_of(found.model)[name], array)


def test_layers_are_matched_before_the_data_is_read():
    def batches():
        raise AssertionError
        yield

    other = with_constants(two_layers(), w2=weights(6, 4, 3, 3, seed=9))
    with pytest.raises(ValueError, match="quantized: not of this float model: layer second has other weights"):
        correct(two_layers(), batches(), quantized=quantized(other, [{"x": X}]))


def test_a_layer_without_a_match_is_left_as_it_is_with_the_reason():
    given = with_constants(two_layers(), w1=fake_quantized(constants_of(two_layers())["w1"], 0), w3=weights(5, 6, seed=9))
    next(node for node in given.graph.node if node.name == "last").name = "renamed"
    report = {layer.name: layer for layer in correct(two_layers(), X, quantized=given, method="empirical").report}
    assert report["first"].method == "empirical"
    assert report["second"].reason == "weights are not quantized"
    assert report["renamed"].reason == "no layer of this name in the float model, nor one of its weights"


def many(*arrays, renamed=False):
    """Convolutions of one shape, each with its own input."""
    nodes = "".join(f"[{'q' if renamed else 'f'}{k}] y{k} = Conv(x, w{k}) " for k in range(len(arrays)))
    outputs = ", ".join(f"float[N,A,B,C] y{k}" for k in range(len(arrays)))
    constants = {f"w{k}": array for k, array in enumerate(arrays)}
    text = f"g (float[N,8,5,5] x) => ({outputs}) {{ {nodes} }}"
    return OnnxNetwork.load(model_from_text(text, **constants), "model").layers


def drawn(kind, count=30):
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.3, (32, 8, 3, 3))
    arrays = rng.normal(0, 0.3, (count, 32, 8, 3, 3))
    if kind == "filters of mean 0":
        arrays -= arrays.mean(axis=(2, 3, 4), keepdims=True)
    if kind == "nearly equal":
        arrays = base + 0.05 * arrays
    if kind == "scaled copies":
        arrays = base * (1 + np.arange(count) / 8)[:, None, None, None, None]
    return arrays.astype(np.float32)


@pytest.mark.parametrize("order", ["as they are", "reversed"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["random", "filters of mean 0", "nearly equal", "scaled copies"])
def test_the_nearest_weights_are_found_whatever_their_sums(kind, bits, order):
    arrays = drawn(kind)
    moved = [fake_quantized(array, 0, bits) for array in arrays]
    errors = [[np.linalg.norm(array - each) for array in arrays] for each in moved]
    indices = range(len(arrays)) if order == "as they are" else range(len(arrays))[::-1]
    if any(np.argmin(row) != k for k, row in enumerate(errors)):
        pytest.skip("rounding moves some weights nearer to others")
    found = match_layers(many(*arrays), many(*(moved[k] for k in indices), renamed=True))
    assert {name: match.reference.name for name, match in found.items()} == {f"q{i}": f"f{k}" for i, k in enumerate(indices)}


def test_renamed_layers_with_weights_that_are_not_finite_are_matched():
    arrays = drawn("random", 6)
    arrays[3, 0, 0, 0, 0] = np.nan
    found = match_layers(many(*arrays), many(*arrays, renamed=True))
    assert {name: match.reference.name for name, match in found.items()} == {f"q{k}": f"f{k}" for k in range(6)}
    assert [match.is_finite for match in found.values()] == [k != 3 for k in range(6)]
