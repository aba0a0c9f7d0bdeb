"""Cross-layer scaling: factors from the formulas, written out, of one sweep and of as many as change anything."""

import re

import numpy as np
import pytest

from biascorr import CrossLayerScaling, equalize
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.equalization.chains import chains_of, find_links
from biascorr.equalization.scaling import scale
from networks import (
    assert_same_function,
    biases,
    constants_of,
    layers_of,
    magnitudes,
    model_from_text,
    samples,
    weights,
    with_constants,
)

X = samples(3, 4, 6, 5)


def uneven(*shape, seed=0, axis=0):
    """Weights whose channels reach up to 1, 8 and 64, in another order for each seed."""
    factors = 8.0 ** np.random.default_rng(seed).integers(0, 3, shape[axis])
    return (weights(*shape, seed=seed) * factors.reshape(-1, *[1] * (len(shape) - 1 - axis))).astype(np.float32)


def network(kinds, between="Relu", *, channels=4):
    """Layers behind each other, each a full ("c") or depthwise ("d") convolution with a bias, named layer0, layer1, ...."""
    text, constants, tensor, width = "", {}, "x", channels
    for k, kind in enumerate(kinds):
        outputs = 2 if k == len(kinds) - 1 else channels
        shape = (channels, 1, 3, 3) if kind == "d" else (outputs, width, 1, 1)
        pads = "<group=4, pads=[1,1,1,1]>" if kind == "d" else ""
        text += f" [layer{k}] t{k} = Conv{pads}({tensor}, w{k}, b{k}) r{k} = {between}(t{k})"
        constants |= {f"w{k}": uneven(*shape, seed=k), f"b{k}": biases(shape[0], seed=k)}
        tensor, width = f"r{k}", shape[0]
    return model_from_text(f"g (float[N,4,6,5] x) => (float[N,A,B,C] {tensor}) {{{text} }}", **constants)


def in_numpy(model, chains):
    """One sweep over these chains of layers: their weights and biases, and the factors of each."""
    layers = layers_of(model)
    arrays = {name: np.asarray(layer.weights, np.float64) for name, layer in layers.items()}
    given = {name: layer.bias.astype(np.float64) for name, layer in layers.items()}
    factors = []
    for chain in chains:
        first, *inner, last = (arrays[name] for name in chain)
        others = [np.abs(each).max(axis=(1, 2, 3)) for each in (first, *inner)]
        ranges = [*others, np.abs(last).max(axis=(0, 2, 3)) if last.shape[1] > 1 else np.abs(last).max(axis=(1, 2, 3))]
        common = np.prod(ranges, axis=0) ** (1 / len(ranges))
        found, carried = [], 1.0
        for each in ranges[:-1]:
            carried = carried * np.where(common == 0, 1, each / np.where(common == 0, 1, common))
            found.append(carried)
        for before, behind, step in zip(chain, chain[1:], found):
            arrays[before] /= step.reshape(-1, 1, 1, 1)
            given[before] /= step.reshape(-1, 1, 1)
            arrays[behind] *= step.reshape((-1, 1, 1, 1) if arrays[behind].shape[1] == 1 else (1, -1, 1, 1))
        factors.append(found)
    return arrays, given, factors


def assert_equal_ranges(model, rtol=1e-5):
    """Of every two layers that can be scaled, in front of and behind each channel between them."""
    network = OnnxNetwork.load(model, "model")
    links = find_links(network)[0]
    assert links
    for chain in chains_of(links):
        first, *others = chain.layers
        ranges = [magnitudes(first)[0], *(magnitudes(layer)[1] for layer in others)]
        folded = [each.reshape(first.channels, -1).max(axis=1) for each in ranges]
        used = np.all(folded, axis=0)
        for each in folded[1:]:
            np.testing.assert_allclose(
                each[used], folded[0][used], rtol=rtol, err_msg=str([layer.name for layer in chain.layers])
            )


def names(chain):
    return [f"layer{k}" for k in chain]


CHAINS = [("cc", ["01"]), ("cdc", ["012"]), ("cddc", ["0123"]), ("cdddc", ["01234"]), ("dc", ["01"]), ("cd", ["01"])]
SEVERAL = [("ccc", ["01", "12"]), ("ccdcc", ["01", "123", "34"]), ("cdcdc", ["012", "234"]), ("dcdd", ["01", "123"])]


@pytest.mark.parametrize(("kinds", "chains"), [*CHAINS, *SEVERAL])
@pytest.mark.parametrize("entry", ["equalize", "scale_model", "scale_cls_sets"])
def test_one_sweep(kinds, chains, entry):
    model = network(kinds)
    arrays, given, factors = in_numpy(model, list(map(names, chains)))
    if entry == "equalize":
        result = equalize(model, iterations=1)
        scaled, found = result.model, [chain.factors for chain in result.chains]
    elif entry == "scale_model":
        scaled, infos = CrossLayerScaling.scale_model(model, iterations=1)
        found = [[pair.scale_factor for pair in info.cls_pairs] for info in infos]
        assert [[info.cls_pairs[0].layer1, *(pair.layer2 for pair in info.cls_pairs)] for info in infos] == list(
            map(names, chains)
        )
        assert all(pair.relu_activation_between_layers for info in infos for pair in info.cls_pairs)
    else:
        scaled, found = CrossLayerScaling.scale_cls_sets(model, [tuple(names(chain)) for chain in chains])
    for each, expected in zip(found, factors, strict=True):
        np.testing.assert_allclose(each, expected, rtol=1e-6)
    for name, layer in layers_of(scaled).items():
        np.testing.assert_allclose(layer.weights, arrays[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(layer.bias, given[name], rtol=1e-6, err_msg=name)
    assert_same_function(model, scaled, {"x": X}, tolerance=1e-6)


@pytest.mark.parametrize("kinds", [kinds for kinds, _ in (*CHAINS, *SEVERAL)])
@pytest.mark.parametrize("between", ["Relu", "Identity", "LeakyRelu"])
def test_sweeps_until_ranges_are_equal(kinds, between):
    model = network(kinds, between)
    result = equalize(model)
    assert_equal_ranges(result.model)
    assert_same_function(model, result.model, {"x": X}, tolerance=1e-6)
    again = equalize(result.model)
    for chain in again.chains:
        assert chain.bits == pytest.approx(0, abs=1e-5)
        for factors in chain.factors:
            np.testing.assert_allclose(factors, 1, rtol=1e-5)
    assert len(again.chains) == len(result.chains) > 0


def test_one_sweep_is_not_all():
    with pytest.raises(AssertionError):
        assert_equal_ranges(equalize(network("ccc"), iterations=1).model)


def test_sweeps_are_counted():
    counted = []
    network_ = OnnxNetwork.load(network("cccc"), "model")
    scale(network_, 3, lambda *done: counted.append(done))
    assert counted == [(1, 3), (2, 3), (3, 3)]
    counted.clear()
    scale(network_, None, lambda *done: counted.append(done))
    assert counted == [(k + 1, None) for k in range(len(counted))]
    assert len(counted) > 1


def test_too_many_sweeps_are_warned_of(monkeypatch):
    monkeypatch.setattr("biascorr.equalization.scaling._MOST_SWEEPS", 2)
    with pytest.warns(UserWarning, match="ranges have not settled after 2 sweeps"):
        equalize(network("cccc"))


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_channels_without_a_range_stay(zero):
    model = network("cdc")
    tensor = next(each for each in model.graph.initializer if each.name == f"w{zero}")
    array = layers_of(model)[f"layer{zero}"].weights.copy()
    array[(slice(None), 1) if zero == 2 else 1] = 0
    tensor.raw_data = array.tobytes()
    result = equalize(model)
    for factors in result.chains[0].factors:
        assert factors[1] == 1
        assert (factors[[0, 2, 3]] != 1).any()
    assert_same_function(model, result.model, {"x": X}, tolerance=1e-6)


@pytest.mark.parametrize("kinds", ["cc", "cdc"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_channel_that_tells_nothing_is_silenced_and_kept_from_growing(kinds, where):
    model = network(kinds)
    names = [f"w{k}" for k in range(len(kinds))]
    arrays = {name: array.copy() for name, array in constants_of(model).items() if name in names}
    faint = arrays[names[where]]
    (faint[1] if where == 0 else faint[:, 1])[...] *= np.float32(1e-18)
    model = with_constants(model, **arrays)
    result = equalize(model, X)
    (chain,) = result.chains
    np.testing.assert_array_equal(chain.silent, [False, True, False, False])
    for factors in chain.factors:
        assert factors[1] == 1
    first = layers_of(result.model)["layer0"]
    assert not first.weights[1].any()
    np.testing.assert_allclose(first.bias.ravel()[1], biases(4, seed=0)[1], rtol=1e-6)
    assert_same_function(model, result.model, {"x": X}, tolerance=1e-6)
    assert not equalize(result.model).chains[0].silent.any()


def test_a_faint_range_that_the_other_layer_makes_up_for_is_scaled():
    model = network("cc")
    arrays = {name: array.copy() for name, array in constants_of(model).items()}
    arrays["w0"][1] *= np.float32(2.0**-40)
    arrays["b0"][1] *= np.float32(2.0**-40)
    arrays["w1"][:, 1] *= np.float32(2.0**40)
    result = equalize(with_constants(model, **{name: arrays[name] for name in ("w0", "b0", "w1")}))
    assert not result.chains[0].silent.any()
    assert result.model == equalize(model).model


def test_bits_are_what_ranges_lost():
    model = network("ccdcc")
    result = equalize(model)
    before, after = layers_of(model), layers_of(result.model)
    for chain in result.chains:
        gained = [
            np.log2(np.abs(before[each.name].weights).max() / np.abs(after[each.name].weights).max())
            for each in chain.chain.layers
        ]
        assert sum(gained) == pytest.approx(chain.bits, abs=1e-5)


def test_a_bias_that_would_be_infinite_keeps_its_channel():
    text = "g (float16[N,2] x) => (float16[N,3] y) { [first] t = Gemm(x, w, b) r = Relu(t) [second] y = Gemm(r, v) }"
    tiny = np.float16([[1, 2e-6], [4, 1e-6]])
    model = model_from_text(text, w=tiny, b=np.float16([1, 200]), v=weights(2, 3, dtype="float16"))
    result = equalize(model)
    (factors,) = result.chains[0].factors
    assert factors[0] != 1
    assert factors[1] == 1
    assert np.isfinite(layers_of(result.model)["first"].bias).all()
    assert_same_function(model, result.model, {"x": samples(3, 2, dtype="float16")}, tolerance=1e-3)


@pytest.mark.parametrize(
    ("rows", "columns", "kept"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], []),
        ([2**-9, 1, 1, 1], [1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 1, 1, 1], [2**-9, 1, 1, 1], [0, 3]),
        ([0, 1, 1, 1], [1, 0, 1, 1], []),
    ],
    ids=["even", "input of the first", "output of the second", "none"],
)
def test_weights_that_would_be_subnormal_keep_their_channel(rows, columns, kept):
    """Where another channel of the same weights on the other side would be."""
    first, second = (2**-3, 2**-12) if columns[0] == 1 else (2**-10, 4)
    text = "g (float16[N,4] x) => (float16[N,4] y) { [first] t = Gemm(x, w) r = Relu(t) [second] y = Gemm(r, v) }"
    w = weights(4, 4, dtype="float16") * np.float16(first) * np.float16(rows).reshape(-1, 1)
    v = weights(4, 4, dtype="float16") * np.float16(second) * np.float16(columns)
    result = equalize(model_from_text(text, w=w, v=v))
    (factors,) = result.chains[0].factors
    assert np.flatnonzero(factors == 1).tolist() == kept
    for before, array in (("w", w), ("v", v)):
        after = constants_of(result.model)[before].astype(np.float64)
        scaled = array / factors if before == "w" else array * factors[:, None]
        for axis in (0, 1):
            largest = np.abs(scaled).max(axis=axis)
            assert (np.abs(after - scaled).max(axis=axis) <= largest * 2**-10).all()


PAIRS = network("ccdcc")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([("layer0", "other")], "cls_sets: layer0 and other cannot be scaled together: layer0: followed by layer1"),
        ([("other", "layer0")], "cls_sets: other and layer0 cannot be scaled together: other: no layer of this name"),
        ([("layer0", "layer2")], "layer0: followed by layer1"),
        ([("layer4", "layer0")], "layer4: its output is an output of the model"),
        (
            [("layer0", "layer1", "layer2")],
            "cls_sets: layer0, layer1, layer2: layer1 is no depthwise layer with the channels of the one before it",
        ),
        ([("layer0", "layer1"), ("layer0",)], "cls_sets: layer0: expected two layers or more"),
        ([()], "expected two layers or more"),
    ],
)
def test_sets_that_cannot_be_scaled(sets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CrossLayerScaling.scale_cls_sets(PAIRS, sets)


def test_only_the_given_sets_are_scaled():
    scaled, factors = CrossLayerScaling.scale_cls_sets(PAIRS, [("layer3", "layer4")])
    before, after = layers_of(PAIRS), layers_of(scaled)
    assert [name for name in before if (before[name].weights != after[name].weights).any()] == ["layer3", "layer4"]
    assert len(factors) == 1
    np.testing.assert_allclose(magnitudes(after["layer3"])[0], magnitudes(after["layer4"])[1], rtol=1e-6)


@pytest.mark.parametrize("iterations", [0, -1, True, 1.5, "2"])
def test_sweeps_are_checked(iterations):
    for entry in (equalize, CrossLayerScaling.scale_model):
        with pytest.raises(ValueError, match=re.escape(f"iterations: {iterations!r}, expected an integer of at least 1")):
            entry(PAIRS, iterations=iterations)


def test_behind_a_flatten_a_depthwise_layer_ends_a_chain():
    text = """g (float[N,3,2,2] x) => (float[N,5,1,1] y) {
        [first] t = Conv(x, w, b) f = Flatten(t) u = Reshape(f, s) [depthwise] d = Conv<group=16>(u, k) [last] y = Conv(d, v)
    }"""
    constants = {"w": uneven(4, 3, 1, 1), "b": biases(4), "k": uneven(16, 1, 1, 1), "v": weights(5, 16, 1, 1)}
    model = model_from_text(text, s=np.int64([-1, 16, 1, 1]), **constants)
    result = equalize(model)
    assert [[layer.name for layer in each.chain.layers] for each in result.chains] == [
        ["first", "depthwise"],
        ["depthwise", "last"],
    ]
    assert_equal_ranges(result.model)
    assert_same_function(model, result.model, {"x": samples(3, 3, 2, 2)}, tolerance=1e-6)
    with pytest.raises(ValueError, match="depthwise is no depthwise layer with the channels of"):
        CrossLayerScaling.scale_cls_sets(model, [("first", "depthwise", "last")])
