"""Simulated quantization of ONNX networks: which weights and inputs are moved to a grid, and to which."""

import numpy as np
import onnx
import pytest
from onnx import helper

from biascorr import Quantization, QuantParams, fake_quantize
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.simulation import input_quantizations, simulated
from biascorr.graph.reasons import ReasonCode
from networks import biases, model_from_text, ranges_in, run, samples, two_layers, weights

NEWEST = min(onnx.defs.onnx_opset_version(), 25)
OPSETS = [opset for opset in (9, 10, 11, 13, 17, 19, 21, 23, 25) if opset <= NEWEST]


def branches(*, opset=17, dtype="float32"):
    """A tensor that two layers and the output read; a MatMul with its constant first, and one that reads another layer."""
    kind = {"float32": "float", "float64": "double", "float16": "float16"}[dtype]
    text = f"""g ({kind}[N,3,4] x) => ({kind}[N,3,2] y, {kind}[N,3,4] r) {{
        r = Neg(x)
        [left] a = MatMul(wl, r)
        [right] b = MatMul(r, wr)
        [next] c = MatMul(b, wn)
        [sum] s = MatMul(a, wr)
        y = Add(s, c)
    }}"""
    constants = {"wl": weights(3, 3, dtype=dtype), "wr": weights(4, 2, dtype=dtype), "wn": weights(2, 2, dtype=dtype)}
    return model_from_text(text, opset=opset, ir_version=4 if opset < 11 else 8, **constants)


def network(model):
    return OnnxNetwork.load(model, "model")


def tensors(network, feeds, names):
    return network.part(feeds, names)(feeds)


def summary(layers):
    return [(each.name, each.op, each.layout, each.channel_axis, each.output, each.window) for each in layers]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("opset", OPSETS)
def test_inputs_are_on_their_grid_in_every_opset(opset, bits):
    given = network(branches(opset=opset))
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)}
    quantizations = {"left": Quantization(3.0, 1, bits), "right": Quantization(0.7, -1, bits)}
    found = given.with_quantizers(quantizations)
    onnx.checker.check_model(found.model, full_check=True)
    assert summary(found.layers) == summary(given.layers)
    inputs = {layer.name: layer.input for layer in found.layers}
    moved = tensors(found, feeds, ["r", inputs["left"], inputs["right"]])
    np.testing.assert_array_equal(moved["r"], -feeds["x"])
    for name, quantization in quantizations.items():
        np.testing.assert_allclose(moved[inputs[name]], fake_quantize(-feeds["x"], quantization), rtol=1e-6)
    assert {inputs["next"], inputs["sum"]} == {"a", "b"}


def test_rounding_is_half_to_even_and_saturates():
    given = network(branches())
    quantization = Quantization(2.0, 3, 4)
    values = np.array([-0.25, 0.25, 0.75, 1.25, -0.75, 1e30, -1e30, 6.0, 0, -5.4, 1.9, 2.3], np.float32).reshape(1, 3, 4)
    found = given.with_quantizers({"left": quantization})
    moved = tensors(found, {"x": -values}, [found.layers[0].input])
    np.testing.assert_array_equal(next(iter(moved.values())), quantization.fake_quantize(values))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_inputs_keep_their_dtype(dtype):
    given = network(branches(dtype=dtype))
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 4)).astype(dtype)}
    quantization = Quantization.from_range(-1.5, 2.5, 16 if dtype == "float64" else 8)
    found = given.with_quantizers({"right": quantization})
    moved = tensors(found, feeds, [next(layer.input for layer in found.layers if layer.name == "right")])
    (values,) = moved.values()
    assert values.dtype == dtype
    np.testing.assert_allclose(values, quantization.fake_quantize(-feeds["x"]), rtol=1e-3 if dtype == "float16" else 1e-6)


def test_layers_of_one_tensor_and_grid_share_it():
    given, quantization = network(branches()), Quantization(3.0)
    shared = given.with_quantizers({"right": quantization, "left": Quantization(3.0)})
    inputs = {layer.name: layer.input for layer in shared.layers}
    assert inputs["left"] == inputs["right"] != "r"
    assert len(shared.order) == len(given.order) + 6
    onnx.checker.check_model(shared.model)  # nodes stand in order


def test_the_given_network_is_not_changed():
    model = branches()
    before = model.SerializeToString()
    given = network(model)
    simulated(given, QuantParams(activation_bits=8), ranges_in(given, [{"x": samples(2, 3, 4)}]))
    assert given.model.SerializeToString() == model.SerializeToString() == before


def test_ranges_are_those_of_all_batches():
    given = network(two_layers())
    batches = [{"x": samples(count, 3, 6, 6, seed=seed)} for seed, count in enumerate((1, 4, 2))]
    batches[1]["x"][2, 1, 0, 0] = 9.0
    found = input_quantizations(given.layers, ranges_in(given, iter(batches)), 6)
    for layer in given.layers:
        seen = np.concatenate([tensors(given, feeds, [layer.input])[layer.input].ravel() for feeds in batches])
        assert found[layer.name] == Quantization.from_range(seen.min(), seen.max(), 6)
    assert found["first"].step == pytest.approx(9.5 / 63)


@pytest.mark.parametrize("activation_bits", [None, 8, 5])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_simulated_network_is_what_its_layers_are_one_by_one(per_channel, activation_bits):
    params = QuantParams(weight_bits=4, per_channel=per_channel, activation_bits=activation_bits)
    given, feeds = network(two_layers()), {"x": samples(4, 3, 6, 6)}
    found = simulated(given, params, ranges_in(given, [feeds]))
    assert [layer.name for layer in found.layers] == ["first", "second", "last"]
    quantizations = input_quantizations(given.layers, ranges_in(given, [feeds]), activation_bits) if activation_bits else {}
    for before, after in zip(given.layers, found.layers):
        np.testing.assert_array_equal(after.weights, params.fake_quantized(before))
        values = tensors(found, feeds, [before.input, after.input])
        if before.name in quantizations:
            expected = quantizations[before.name].fake_quantize(values[before.input])
            np.testing.assert_allclose(values[after.input], expected, rtol=1e-5)
        else:
            assert after.input == before.input
    (output,) = run(found.model, feeds)
    assert np.abs(output - run(given.model, feeds)[0]).max() > 0.01


def test_ignored_layers_stay_float():
    given, feeds = network(branches()), {"x": samples(4, 3, 4)}
    found = simulated(
        given, QuantParams(weight_bits=2, activation_bits=2, ops_to_ignore=["right", "sum"]), ranges_in(given, [feeds])
    )
    before, after = ({layer.name: layer for layer in each.layers} for each in (given, found))
    for name in ("right", "sum"):
        assert after[name].input == before[name].input
        np.testing.assert_array_equal(after[name].weights, before[name].weights)
    for name in ("left", "next"):
        assert after[name].input != before[name].input
        assert (after[name].weights != before[name].weights).any()


def test_names_to_ignore_are_checked():
    given = network(branches())
    with pytest.raises(ValueError, match="ops_to_ignore: 'rihgt' is no layer; the layers are left, right, next, sum"):
        simulated(given, QuantParams(ops_to_ignore=["left", "rihgt"]))
    text = "g (float[N,2,3,3] x) => (float[N,2,5,5] y) { [up] y = ConvTranspose(x, w) }"
    untouched = network(model_from_text(text, w=weights(2, 2, 3, 3)))
    simulated(untouched, QuantParams(ops_to_ignore=["up"]))  # whether this version could quantize it or not


def test_activations_need_samples_that_are_finite():
    given, params = network(branches()), QuantParams(activation_bits=8)
    with pytest.raises(ValueError, match="data: no samples, the ranges of activations need at least one"):
        simulated(given, params, ranges_in(given, []))
    for wrong in (np.nan, np.inf, -np.inf):
        x = samples(2, 3, 4)
        x[1, 1, 1] = wrong
        with pytest.raises(ValueError, match="layer (left|right): its input r contains nan or inf"):
            simulated(given, params, ranges_in(given, [{"x": samples(2, 3, 4)}, {"x": x}]))


def test_biases_of_a_simulated_network_can_be_corrected():
    """The nodes between a layer and the next hide neither its bias nor where a missing one goes."""
    text = """g (float[N,3,4] x) => (float[N,3,2] y) {
        [first] a = MatMul(x, w1)
        [bias] b = Add(a, b1)
        [second] c = MatMul(b, w2)
        [third] y = MatMul(c, w2)
    }"""
    given = network(model_from_text(text, w1=weights(4, 2), b1=biases(2), w2=weights(2, 2)))
    feeds = {"x": samples(4, 3, 4)}
    found = simulated(given, QuantParams(activation_bits=8, weight_bits=8), ranges_in(given, [feeds]))
    assert [layer.output for layer in found.layers] == ["b", "c", "y"]
    (before,) = run(found.model, feeds)
    for layer in found.layers:
        reasons = found.bias_change(layer, np.array([1.0, 2.0])).reasons
        assert (ReasonCode.BIAS_ADDED() in reasons) == (layer.name != "first")
    shifted = found.with_shifts({layer.name: np.array([1.0, 2.0]) for layer in found.layers})
    assert np.abs(run(shifted.model, feeds)[0] - before).max() > 0.5


def test_names_of_the_graph_are_not_taken():
    model = branches()
    model.graph.node.append(helper.make_node("Identity", ["r"], ["r_Mul"], "r_Mul_node"))
    model.graph.output.append(helper.make_tensor_value_info("r_Mul", onnx.TensorProto.FLOAT, None))
    found = network(model).with_quantizers({"left": Quantization(3.0)})
    feeds = {"x": samples(2, 3, 4)}
    np.testing.assert_array_equal(run(found.model, feeds, ["r_Mul"])[0], -feeds["x"])
