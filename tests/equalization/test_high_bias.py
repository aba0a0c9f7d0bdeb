"""High biases that move to the next layer: how much, what becomes of the statistics, and where they stay."""

import numpy as np
import onnx
import pytest

from biascorr import CrossLayerScaling, HighBiasFold, equalize, find_all_convs_bn_with_activation, fold_all_batch_norms
from networks import (
    as_constant_nodes,
    assert_same_function,
    batch_norm,
    batch_norm_constants,
    biases,
    kernel_sums,
    layers_of,
    model_from_text,
    run,
    samples,
    weights,
)

X = samples(3, 3, 6, 5)
UNEVEN = weights(5, 4, 2, 2) * np.float32([64, 8, 64, 1]).reshape(4, 1, 1)
BETWEEN = ["r = Relu(n)", "r = Identity(n)", "r = LeakyRelu(n)", "i = Identity(n) a = Relu(i) r = LeakyRelu<alpha=0.5>(a)"]


def network(between=BETWEEN[0], second="Conv(r, v, c)", *, v=(5, 4, 2, 2), **options):
    """first -> norm -> what makes `r` of `n` -> second."""
    text = f"""g (float[N,3,6,5] x) => (float[N,A,B,C] y) {{
        [first] t = Conv(x, w) {batch_norm("t", "n")} {between} [second] y = {second}
    }}"""
    w = weights(4, 3, 1, 1) * np.float32([1, 8, 1, 64]).reshape(4, 1, 1, 1)
    constants = {"w": w, "v": weights(*v) if isinstance(v, tuple) else v, "c": biases(5), **batch_norm_constants(4)}
    constants["norm_beta"][:] = [6, -3, 1.5, 8]  # three of them above three standard deviations, or three below
    constants["norm_gamma"][:] = [1, -0.5, 1, -0.25]
    return model_from_text(text, **(constants | options))


@pytest.mark.parametrize("between", BETWEEN)
def test_what_is_absorbed(between):
    model = network(between)
    folded, pairs = fold_all_batch_norms(model)
    scaled, infos = CrossLayerScaling.scale_model(folded)
    (pair,) = infos[0].cls_pairs
    acts = "elu" in between
    assert pair.relu_activation_between_layers == acts
    beta, gamma = (np.array(values) / pair.scale_factor for values in ([6, -3, 1.5, 8], [1, 0.5, 1, 0.25]))
    absorbed = np.maximum(0, beta - 3 * gamma) if acts else beta
    assert np.count_nonzero(absorbed) == (2 if acts else 4)
    model = HighBiasFold.bias_fold(scaled, pairs, infos)
    before, after = layers_of(scaled), layers_of(model)
    np.testing.assert_allclose(after["first"].bias.ravel(), before["first"].bias.ravel() - absorbed, rtol=1e-5, atol=1e-5)
    moved = kernel_sums(before["second"]) @ absorbed
    np.testing.assert_allclose(after["second"].bias.ravel(), before["second"].bias.ravel() + moved, rtol=1e-5, atol=1e-5)
    for name in ("first", "second"):
        np.testing.assert_array_equal(after[name].weights, before[name].weights)
    result = equalize(network(between))
    np.testing.assert_allclose(result.high_biases[0].folded, absorbed, rtol=1e-6, atol=1e-6)
    for name, layer in layers_of(result.model).items():
        np.testing.assert_allclose(layer.bias, after[name].bias, rtol=1e-5, atol=1e-5)
    if not acts:
        assert_same_function(network(between), model, {"x": X}, tolerance=1e-5)


@pytest.mark.parametrize("form", ["given", "constant nodes", "bytes", "saved"])
@pytest.mark.parametrize("between", [BETWEEN[0], BETWEEN[1]])
def test_statistics_behind_it(between, form, tmp_path):
    model = network(between)
    result = equalize(as_constant_nodes(model) if form == "constant nodes" else model)
    equalized = result.model
    if form == "saved":
        result.save(tmp_path / "equalized.onnx")
        equalized = tmp_path / "equalized.onnx"
    elif form == "bytes":
        equalized = equalized.SerializeToString()
    found = find_all_convs_bn_with_activation(equalized)["second"]
    (factors,), absorbed = result.chains[0].factors, result.high_biases[0].folded
    assert found.in_activation_type.name == ("relu" if "Relu" in between else "no_activation")
    np.testing.assert_allclose(found.input_bn.beta, [6, -3, 1.5, 8] / factors - absorbed, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.input_bn.gamma, [1, 0.5, 1, 0.25] / factors, rtol=1e-6)
    assert found.input_bn.name == "norm"
    behind = find_all_convs_bn_with_activation(equalized)["first"].output_bn
    np.testing.assert_array_equal(behind.beta, found.input_bn.beta)


@pytest.mark.parametrize(
    ("between", "second", "reason", "options"),
    [
        ("r = Relu(n)", "Conv<pads=[0,0,1,1]>(r, v)", "second reads padding", {}),
        ('r = Relu(n)', 'Conv<auto_pad="SAME_LOWER">(r, v)', "second reads padding", {}),
        ("a = Relu(n) r = Pad(a, p)", "Conv(r, v)", "second reads padding", {"p": np.int64([0, 0, 0, 1, 0, 0, 0, 0])}),
        ("r = Relu(n)", "ConvTranspose(r, v)", "second reads padding", {"v": (4, 5, 2, 2)}),
        ("r = Clip(n, low, high)", "Conv(r, v)", "_Min limits it to bounds",
         {"low": np.float32(0), "high": np.float32(20), "v": UNEVEN}),
        ("r = Max(n, low)", "Conv(r, v)", "Max:r limits it to bounds", {"low": np.float32(1), "v": UNEVEN}),
    ],
)  # fmt: skip
def test_biases_that_stay(between, second, reason, options):
    model = network(between, second, **options)
    result = equalize(model)
    assert result.high_biases == []
    assert len(result.chains) == 1
    assert result.left["first"].startswith("its high bias stays: ")
    assert reason in result.left["first"]
    found = find_all_convs_bn_with_activation(result.model).get("second")
    if found is not None and found.input_bn is not None:
        np.testing.assert_allclose(found.input_bn.beta, [6, -3, 1.5, 8] / result.chains[0].factors[0], rtol=1e-6)
    assert_same_function(model, result.model, {"x": X}, tolerance=1e-5)


LAST = {
    "Conv": ("", "Conv(r, v, c)", (5, 4, 3, 3)),
    "grouped": ("", "Conv<group=2, strides=[2,1]>(r, v)", (6, 2, 2, 2)),
    "depthwise": ("", "Conv<group=4, dilations=[2,2]>(r, v)", (8, 1, 2, 2)),
    "ConvTranspose": ("", "ConvTranspose(r, v)", (4, 5, 1, 1)),
    "Gemm behind Flatten": ("f = Flatten(r)", "Gemm<transB=1, alpha=0.5>(f, v)", (5, 120)),
    "Gemm behind an average": ("p = GlobalAveragePool(r) f = Flatten(p)", "Gemm(f, v, c)", (4, 5)),
    "MatMul behind an average": ("f = ReduceMean<axes=[2,3], keepdims=0>(r)", "MatMul(f, v)", (4, 5)),
}


@pytest.mark.parametrize(("pooled", "second", "shape"), LAST.values(), ids=LAST)
def test_every_layer_behind(pooled, second, shape):
    """Without an activation, the function is the same."""
    rank = 2 if pooled else 4
    model = network(f"r = Identity(n) {pooled}", second, v=shape)
    del model.graph.output[0].type.tensor_type.shape.dim[rank:]
    result = equalize(model, {"x": X})
    assert len(result.high_biases) == 1
    assert result.change.relative < 1e-5
    before = layers_of(fold_all_batch_norms(model)[0])["second"]
    high = np.repeat([6, -3, 1.5, 8], before.input_channels // 4)
    given = 0 if before.bias is None else before.bias.ravel()
    found = layers_of(result.model)["second"].bias.ravel()
    np.testing.assert_allclose(found, given + kernel_sums(before) @ high, rtol=1e-4, atol=1e-4)


def test_samples_limit_what_moves():
    """Channels below what would move, by more than the three standard deviations of their batch normalization."""
    model = network(norm_var=np.full(4, 1, np.float32))
    without, result = equalize(model), equalize(model, {"x": X})
    assert np.abs(run(model, {"x": X})[0] - run(without.model, {"x": X})[0]).max() > 0.01
    assert result.changes["high-bias fold"].relative < 1e-5
    assert result.change is result.changes["high-bias fold"]
    scaled, _ = CrossLayerScaling.scale_model(fold_all_batch_norms(model)[0])
    least = run(scaled, {"x": X}, [layers_of(scaled)["first"].output])[0].min(axis=(0, 2, 3))
    expected = np.clip(least, 0, without.high_biases[0].folded)
    np.testing.assert_allclose(result.high_biases[0].folded, expected, rtol=1e-5)
    assert (expected < without.high_biases[0].folded).any()
    found = find_all_convs_bn_with_activation(result.model)["second"].input_bn.beta
    np.testing.assert_allclose(found, [6, -3, 1.5, 8] / result.chains[0].factors[0] - expected, rtol=1e-5)


def test_outputs_that_are_no_numbers_do_not_count():
    model = network()
    model.graph.node.insert(0, onnx.helper.make_node("Sqrt", ["x"], ["root"]))
    model.graph.node[1].input[0] = "root"
    result = equalize(model, {"x": X})
    assert np.isfinite(layers_of(result.model)["first"].bias).all()
    assert result.high_biases[0].folded.any()
    assert result.change.relative < 1e-5


def test_only_given_pairs():
    folded, pairs = fold_all_batch_norms(network())
    scaled, infos = CrossLayerScaling.scale_model(folded)
    assert HighBiasFold.bias_fold(scaled, [], infos) == scaled
    assert HighBiasFold.bias_fold(scaled, pairs, []) == scaled
    assert HighBiasFold.bias_fold(scaled, pairs, infos) != scaled
    with pytest.raises(ValueError, match=r"folded_pairs\[0\]: \('first',\), expected a layer and a batch normalization"):
        HighBiasFold.bias_fold(scaled, [("first",)], infos)


def test_through_a_chain():
    """Each layer between absorbs what comes, and hands on its own."""
    text = f"""g (float[N,3,6,5] x) => (float[N,A,B,C] y) {{
        [first] t = Conv(x, w) {batch_norm("t", "n", "one")} r = Relu(n)
        [second] u = Conv(r, v) {batch_norm("u", "m", "two")} s = Relu(m) [third] y = Conv(s, k)
    }}"""
    constants = batch_norm_constants(4, "one") | batch_norm_constants(4, "two", seed=1)
    constants |= {"w": weights(4, 3, 1, 1), "v": weights(4, 4, 2, 2), "k": weights(3, 4, 1, 1)}
    constants["one_beta"][:], constants["two_beta"][:] = 9, 7
    result = equalize(model_from_text(text, **constants))
    assert [(each.first, each.second) for each in result.high_biases] == [("first", "second"), ("second", "third")]
    found = find_all_convs_bn_with_activation(onnx.ModelProto.FromString(result.model.SerializeToString()))
    for name, chain, high_bias, value in zip(("second", "third"), result.chains, result.high_biases, (9, 7)):
        np.testing.assert_allclose(found[name].input_bn.beta, value / chain.factors[0] - high_bias.folded, rtol=1e-5)
    folded = layers_of(fold_all_batch_norms(model_from_text(text, **constants))[0])["second"]
    (ins, outs), (taken, given) = (each.factors[0] for each in result.chains), (each.folded for each in result.high_biases)
    expected = folded.bias.ravel() / outs + (kernel_sums(folded) * ins / outs[:, None]) @ taken - given
    np.testing.assert_allclose(layers_of(result.model)["second"].bias.ravel(), expected, rtol=1e-4, atol=1e-4)
