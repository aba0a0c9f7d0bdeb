"""Batch normalizations that become part of layers: the formulas, written out, and what keeps them where they are."""

import math
import re

import numpy as np
import onnx
import pytest

from biascorr import equalize, find_all_convs_bn_with_activation, fold_all_batch_norms, fold_given_batch_norms
from networks import (
    as_constant_nodes,
    assert_same_function,
    batch_norm,
    batch_norm_constants,
    biases,
    constants_of,
    kernel_sums,
    layers_of,
    model_from_text,
    samples,
    weights,
)

EPSILON = 0.25  # of batch_norm

# operator, shape of a sample, weights, weights with an axis of their own for groups, channels along the axes of these
BEHIND = [
    ("Conv<pads=[1,1,1,1]>", (3, 6, 5), (4, 3, 3, 3), (4, 3, 3, 3), (4, 1, 1, 1)),
    ("Conv<group=3>", (3, 6, 5), (6, 1, 2, 2), (6, 1, 2, 2), (6, 1, 1, 1)),
    ("Conv<group=2, strides=[2]>", (4, 7), (6, 2, 2), (6, 2, 2), (6, 1, 1)),
    ("Conv", (2, 3, 4, 3), (4, 2, 2, 1, 2), (4, 2, 2, 1, 2), (4, 1, 1, 1, 1)),
    ("ConvTranspose<strides=[2,2]>", (3, 4, 4), (3, 4, 2, 2), (3, 4, 2, 2), (4, 1, 1)),
    ("ConvTranspose<group=2>", (4, 4, 4), (4, 2, 2, 2), (2, 2, 2, 2, 2), (2, 1, 2, 1, 1)),
    ("Gemm<transB=1>", (3,), (4, 3), (4, 3), (4, 1)),
    ("Gemm<alpha=0.5, beta=2.0>", (3,), (3, 4), (3, 4), (4,)),
    ("MatMul", (3,), (3, 4), (3, 4), (4,)),
]
BEFORE = [
    ("Conv", (3, 6, 5), (4, 3, 3, 3), (4, 3, 3, 3), (3, 1, 1)),
    ("Conv<group=3>", (3, 6, 5), (6, 1, 2, 2), (3, 2, 1, 2, 2), (3, 1, 1, 1, 1)),
    ("Conv<group=2, strides=[2]>", (4, 7), (6, 2, 2), (2, 3, 2, 2), (2, 1, 2, 1)),
    ("Conv", (2, 3, 4, 3), (4, 2, 2, 1, 2), (4, 2, 2, 1, 2), (2, 1, 1, 1)),
    ("Gemm<transB=1>", (3,), (4, 3), (4, 3), (3,)),
    ("Gemm<alpha=0.5, beta=2.0>", (3,), (3, 4), (3, 4), (3, 1)),
    ("MatMul", (3,), (3, 4), (3, 4), (3, 1)),
]


def sizes(shape):
    return ",".join(["N", *map(str, shape)])


def gain_and_offset(constants):
    gamma, beta, mean, var = (constants[f"norm_{key}"].astype(np.float64) for key in ("gamma", "beta", "mean", "var"))
    gain = gamma / np.sqrt(var + EPSILON)
    return gain, beta - mean * gain


def layer_of(model):
    (layer,) = layers_of(model).values()
    return layer


BIASES = {"MatMul": ("none", "add"), "Gemm": ("none", "own")}


@pytest.mark.parametrize(
    ("operator", "shape", "w", "grouped", "axes", "bias"),
    [(*each, bias) for each in BEHIND for bias in BIASES.get(each[0].split("<")[0], ("none", "own", "add"))],
    ids=str,
)
def test_a_normalization_behind_a_layer(operator, shape, w, grouped, axes, bias):
    channels = math.prod(axes)
    text = f"""g (float[{sizes(shape)}] x) => (float[{sizes("ABCD"[: len(shape)])}] y) {{
        [layer] t = {operator}(x, w{", b" if bias == "own" else ""})
        {"a = Add(t, b)" if bias == "add" else "a = Identity(t)"}
        {batch_norm("t" if bias != "add" else "a", "y")}
    }}"""
    if bias != "add":
        text = text.replace("a = Identity(t)", "")
    constants = {"w": weights(*w), **batch_norm_constants(channels)}
    constants["norm_gamma"][0] = 0
    b = biases(channels, *[1] * (len(shape) - 1 if bias == "add" else 0))
    model = model_from_text(text, **constants, **({} if bias == "none" else {"b": b}))
    before = layer_of(model)
    folded, pairs = fold_all_batch_norms(model)
    assert pairs == [("layer", "norm")]
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    gain, _ = gain_and_offset(constants)
    mean, beta = constants["norm_mean"].astype(np.float64), constants["norm_beta"]
    layer, given = layer_of(folded), 0 if before.bias is None else before.bias.ravel()
    expected = (constants["w"].reshape(grouped) * gain.reshape(axes)).reshape(w)
    np.testing.assert_allclose(layer.weights, expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(layer.bias.ravel(), beta - (mean - given) * gain, rtol=1e-5, atol=1e-6)
    assert_same_function(model, folded, {"x": samples(3, *shape)}, tolerance=1e-6)
    told = find_all_convs_bn_with_activation(onnx.ModelProto.FromString(folded.SerializeToString()))["layer"].output_bn
    np.testing.assert_array_equal(told.beta, beta)
    np.testing.assert_array_equal(told.gamma, np.abs(constants["norm_gamma"]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("operator", "shape", "w", "grouped", "axes"), BEFORE, ids=str)
def test_a_normalization_before_a_layer(operator, shape, w, grouped, axes, bias):
    own = ", b" if bias and operator != "MatMul" else ""
    text = f"""g (float[{sizes(shape)}] x) => (float[{sizes("ABCD"[: len(shape)])}] y) {{
        {batch_norm("x", "n")} [layer] y = {operator}(n, w{own})
    }}"""
    constants = {"w": weights(*w), **batch_norm_constants(math.prod(axes))}
    with_bias = {"b": biases(layer_of(model_from_text(text.replace(", b)", ")"), **constants)).channels)} if own else {}
    model = model_from_text(text, **constants, **with_bias)
    before = layer_of(model)
    folded, pairs = fold_all_batch_norms(model)
    assert pairs == [("layer", "norm")]
    gain, offset = gain_and_offset(constants)
    layer, given = layer_of(folded), 0 if before.bias is None else before.bias.ravel()
    split = constants["w"].astype(np.float64).reshape(grouped)
    np.testing.assert_allclose(layer.weights, (split * gain.reshape(axes)).reshape(w), rtol=1e-6)
    np.testing.assert_allclose(layer.bias.ravel(), given + kernel_sums(before) @ offset, rtol=1e-5, atol=1e-5)
    assert_same_function(model, folded, {"x": samples(3, *shape)}, tolerance=1e-6)
    told = find_all_convs_bn_with_activation(folded)["layer"].input_bn
    np.testing.assert_array_equal(told.beta, constants["norm_mean"])
    np.testing.assert_allclose(told.gamma, np.sqrt(constants["norm_var"]), rtol=1e-6)


X = "g (float[N,3,6,5] x) => (float[N,A,B,C] y)"
CONV = weights(3, 3, 1, 1)
NORM = batch_norm("t", "y")
WITHOUT_OFFSET = {"norm_beta": np.zeros(3, np.float32), "norm_mean": np.zeros(3, np.float32)}


def with_norm(text, *, header=X, channels=3, **options):
    return model_from_text(f"{header} {{ {text} }}", **{"w": CONV, **batch_norm_constants(channels), **options})


@pytest.mark.parametrize(
    ("text", "reason", "options"),
    [
        (f"[a] t = Conv(x, w) {batch_norm('t', 'n')} y = Add(t, n)", "something else reads the output of a too", {}),
        (f"{batch_norm('x', 'y')}", "no layer makes what it reads", {}),
        (f"t = Relu(x) {batch_norm('t', 'n')} [a] u = Conv(n, w) y = Add(u, n)", "not only layers read what it makes", {}),
        (f"{batch_norm('x', 'n')} [a] y = Conv<pads=[0,0,0,1]>(n, w)", "a after it reads padding too", {}),
        (
            f'{batch_norm("x", "n")} [a] y = Conv<auto_pad="SAME_UPPER">(n, v)',
            "a after it reads padding",
            {"v": weights(3, 3, 2, 2)},
        ),
        (f"{batch_norm('x', 'n')} [a] y = ConvTranspose<strides=[2,2]>(n, w)", "a after it reads padding too", {}),
        (f"[a] t = Conv(x, w) [b] u = Conv(x, w) {NORM.replace('y', 'n', 1)} y = Add(u, n)", "a: its weights are used", {}),
        (f"[a] t = Conv(x, w) {NORM}", "a: its weights are not finite", {"w": CONV * np.float32(np.inf)}),
        (f"[a] t = Conv(x, w) {NORM}", "its parameters are not finite", {"norm_gamma": np.float32([1, np.nan, 1])}),
        (f"[a] t = Conv(x, w) {NORM}", "its parameters are not finite", {"norm_var": np.float32([1, -1, 1])}),
        (f"[a] t = Conv(x, w) {NORM}", "its parameters are not finite", {"norm_mean": np.float32([1, 0, np.inf])}),
        (f"[a] t = MatMul(x, v) {NORM}", "the channels of a are not along axis 1", {"v": weights(5, 3)}),
    ],
    ids=str,
)
def test_normalizations_that_stay(text, reason, options):
    model = with_norm(text, **options)
    folded, pairs = fold_all_batch_norms(model)
    assert pairs == []
    assert folded == model
    assert equalize(model).left["norm"].startswith(reason) or reason in equalize(model).left["norm"]


@pytest.mark.parametrize(
    "layer",
    ["Conv<pads=[1,1,1,1]>(n, w)", "ConvTranspose<strides=[2,2]>(n, w)", 'Conv<auto_pad="SAME_LOWER", strides=[2,2]>(n, w)'],
)
def test_padding_that_a_normalization_leaves_zero(layer):
    model = with_norm(f"{batch_norm('x', 'n')} [a] y = {layer}", **WITHOUT_OFFSET, w=weights(3, 3, 3, 3))
    folded, pairs = fold_all_batch_norms(model)
    assert pairs == [("a", "norm")]
    assert_same_function(model, folded, {"x": samples(2, 3, 6, 5)}, tolerance=1e-6)


@pytest.mark.parametrize("is_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize(
    ("factor", "gamma", "mean", "fits"),
    [(64, 1, 0, True), (900, 1, 0, False), (2**-6, 1, 0, True), (2**-6, 2**-19, 0, False), (1 / 8, 1, 0.5, True)],
    ids=["large", "infinite", "small", "subnormal", "offset"],
)
def test_weights_that_float16_cannot_hold(is_after, factor, gamma, mean, fits):
    """The variance is as good as 0, so that the gain is 316 times gamma."""
    layer, norm = ("[layer] t = Gemm(x, w)", batch_norm("t", "y", epsilon=1e-5))
    if not is_after:
        layer, norm = batch_norm("x", "t", epsilon=1e-5), "[layer] y = Gemm(t, w)"
    arrays = {"w": weights(4, 4, dtype="float16") * np.float16(factor)}
    parameters = {"gamma": gamma, "beta": 0, "mean": mean, "var": 1e-8}
    arrays |= {f"norm_{name}": np.full(4, value, np.float16) for name, value in parameters.items()}
    model = model_from_text(f"g (float16[N,4] x) => (float16[N,4] y) {{ {layer} {norm} }}", **arrays)
    folded, pairs = fold_all_batch_norms(model)
    assert pairs == ([("layer", "norm")] if fits else [])
    assert_same_function(model, folded, {"x": samples(5, 4, dtype="float16") / np.float16(512)}, tolerance=3e-3)
    if not fits:
        assert equalize(model).left["norm"] == "layer would have weights or biases that float16 cannot hold"


@pytest.mark.parametrize("mean", [250, -250])
def test_biases_that_float16_cannot_hold(mean):
    arrays = {"w": weights(4, 4, dtype="float16"), "b": np.full(4, mean, np.float16)}
    parameters = {"gamma": 1, "beta": 0, "mean": mean, "var": 0}
    arrays |= {f"norm_{name}": np.full(4, value, np.float16) for name, value in parameters.items()}
    text = "g (float16[N,4] x) => (float16[N,4] y) {{ [layer] t = Gemm(x, w{}) {} }}"
    norm = batch_norm("t", "y", epsilon=1e-5)
    found = [fold_all_batch_norms(model_from_text(text.format(bias, norm), **arrays))[1] for bias in (", b", "")]
    assert found == [[("layer", "norm")], []]


def chain(**options):
    """first -> one -> two -> relu -> third, and before another layer."""
    text = f"""[first] t = Conv(x, w) {batch_norm("t", "a", "one")} {batch_norm("a", "b", "two")} r = Relu(b)
        {batch_norm("r", "c", "third")} [left] u = Conv(c, w2) [right] v = Conv(c, w3) y = Add(u, v)"""
    norms = {
        key: array
        for seed, name in enumerate(("one", "two", "third"))
        for key, array in batch_norm_constants(3, name, seed=seed).items()
    }
    return model_from_text(
        f"{X} {{ {text} }}", w=CONV, w2=weights(3, 3, 1, 1, seed=2), w3=weights(3, 3, 1, 1, seed=3), **norms, **options
    )


def test_several_normalizations():
    model = chain()
    folded, pairs = fold_all_batch_norms(model)
    assert sorted(pairs) == [("first", "one"), ("first", "two"), ("left", "third"), ("right", "third")]
    assert_same_function(model, folded, {"x": samples(2, 3, 6, 5)}, tolerance=1e-6)
    found = find_all_convs_bn_with_activation(folded)
    np.testing.assert_array_equal(found["first"].output_bn.beta, constants_of(model)["two_beta"])
    np.testing.assert_array_equal(found["left"].input_bn.beta, constants_of(model)["third_mean"])
    assert equalize(model).left.keys().isdisjoint({"one", "two", "third"})


def test_given_pairs():
    model = chain()
    folded = fold_given_batch_norms(model, [("first", "one")])
    assert [node.name for node in folded.graph.node if node.op_type == "BatchNormalization"] == ["two", "third"]
    assert_same_function(model, folded, {"x": samples(2, 3, 6, 5)}, tolerance=1e-6)
    both = fold_given_batch_norms(folded, [("right", "third"), ("left", "third")])
    assert [node.name for node in both.graph.node if node.op_type == "BatchNormalization"] == ["two"]
    assert_same_function(model, both, {"x": samples(2, 3, 6, 5)}, tolerance=1e-6)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("first", "four")], "layer_pairs: four cannot be folded into first: no batch normalization of this name"),
        ([("fifth", "one")], "layer_pairs: one cannot be folded into fifth: not among the given pairs"),
        ([("first", "third")], "layer_pairs: third cannot be folded into first"),
        ([("first", "two")], "layer_pairs: two cannot be folded into first"),
        ([("left", "third")], "layer_pairs: third cannot be folded into left: not among the given pairs"),
        ([("first",)], "layer_pairs[0]: ('first',), expected a layer and a batch normalization, by name"),
        ([5], "layer_pairs[0]: 5, expected a layer and a batch normalization, by name"),
        ([("first", "one"), "first"], "layer_pairs[1]: 'first', expected a layer and a batch normalization, by name"),
    ],
)
def test_pairs_that_cannot_be_folded(pairs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fold_given_batch_norms(chain(), pairs)


@pytest.mark.parametrize("opset", [7, 9, 13, 15, 21])
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_every_opset(opset, constant_nodes):
    model = chain(opset=opset, ir_version=3 if opset < 9 else 8)
    if constant_nodes:
        del model.graph.input[1:]
        model = as_constant_nodes(model)
    folded, pairs = fold_all_batch_norms(model)
    assert len(pairs) == 4
    assert_same_function(model, folded, {"x": samples(2, 3, 6, 5)}, tolerance=1e-6)


def test_what_nothing_reads_stays_where_it_is():
    text = (
        f"g (float[N,3,4,4] x) => (float[N,5,4,4] y) {{ [layer] y = Conv(x, w) [dead] t = Conv(x, w) {batch_norm('t', 'n')} }}"
    )
    model = model_from_text(text, w=weights(5, 3, 1, 1), **batch_norm_constants(5))
    result = equalize(model)
    assert result.left["norm"] == "nothing reads what it makes"
    assert [node.name for node in result.model.graph.node] == ["layer", "dead", "norm"]


def test_the_model_is_not_changed():
    model = chain()
    before = model.SerializeToString()
    fold_all_batch_norms(model)
    fold_given_batch_norms(model, [("first", "one")])
    assert model.SerializeToString() == before
