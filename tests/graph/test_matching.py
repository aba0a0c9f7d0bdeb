"""Which float layer a quantized one was: by name, by name without a quantizer's suffix, by weights."""

from dataclasses import replace

import numpy as np
import pytest
from onnxruntime.quantization import QuantFormat

from biascorr import correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph.matching import counterparts
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
    return {name: layer.name for name, layer in counterparts(reference, quantized).items()}


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
    other = [replace(layer, op="Conv") for layer in layers(q=rounded(B))]
    assert names(layers(a=A, b=B), [*layers(a=rounded(A)), *other]) == {"a": "a"}


def test_a_layer_of_the_same_name_with_other_weights_is_an_error():
    with pytest.raises(ValueError, match="quantized: not of this float model: layer a has other weights"):
        counterparts(layers(a=A), layers(a=rounded(B)))
    with pytest.raises(ValueError, match=r"layer a has weights of shape \(4, 3\), expected \(4, 5\)"):
        counterparts(layers(a=A), layers(a=rounded(B[:, :3])))


def test_a_model_of_other_layers_is_an_error():
    with pytest.raises(ValueError, match="quantized: not of this float model: no layer named q in it, nor one of its weights"):
        counterparts(layers(a=A), layers(q=rounded(B)))
    assert counterparts(layers(a=A), []) == {}


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


def test_a_layer_without_a_counterpart_is_left_alone_with_the_reason():
    given = with_constants(two_layers(), w1=fake_quantized(constants_of(two_layers())["w1"], 0), w3=weights(5, 6, seed=9))
    next(node for node in given.graph.node if node.name == "last").name = "renamed"
    report = {layer.name: layer for layer in correct(two_layers(), X, quantized=given, method="empirical").report}
    assert report["first"].method == "empirical"
    assert report["second"].reason == "weights are not quantized"
    assert report["renamed"].reason == "no layer of this name in the float model, nor one of its weights"
