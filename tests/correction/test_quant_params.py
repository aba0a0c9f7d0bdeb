"""Simulated quantization: its parameters, and the weights that a layer has in it."""

import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from arrays import random_array
from biascorr import Quantization, QuantParams, fake_quantize
from biascorr.graph.layer import Layer


def layer(weights, layout, groups=1, name="conv"):
    return Layer(name, "Conv", weights, layout, "x", None, 1, "y", -1, groups)


def test_the_classic_signature():
    params = QuantParams("tf", "stochastic", False, ["a", "b"])
    assert (params.quant_mode, params.round_mode, params.ops_to_ignore) == ("tf", "stochastic", ("a", "b"))
    default = QuantParams()
    assert (default.quant_mode, default.round_mode, default.use_cuda, default.ops_to_ignore) == (
        "tf_enhanced",
        "nearest",
        True,
        (),
    )
    assert (default.weight_bits, default.activation_bits, default.per_channel, default.symmetric) == (8, None, False, True)
    with pytest.raises(TypeError):
        QuantParams("tf", "nearest", True, None, 8)


def test_parameters_are_a_value():
    params = QuantParams(ops_to_ignore=iter(["a"]))
    assert params == QuantParams(ops_to_ignore=("a",))
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))
    with pytest.raises(FrozenInstanceError):
        params.weight_bits = 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quant_mode": "TF"}, ValueError, "quant_mode: 'TF', expected 'tf' or 'tf_enhanced'"),
        ({"round_mode": None}, ValueError, "round_mode: None, expected 'nearest' or 'stochastic'"),
        ({"use_cuda": "no"}, ValueError, "use_cuda: 'no', expected True or False"),
        ({"per_channel": 1}, ValueError, "per_channel: 1, expected True or False"),
        ({"symmetric": None}, ValueError, "symmetric: None, expected True or False"),
        ({"ops_to_ignore": "conv1"}, TypeError, "ops_to_ignore: 'conv1', expected a list of names"),
        ({"ops_to_ignore": ["conv1", 2]}, TypeError, "ops_to_ignore: 2, expected names"),
        ({"weight_bits": 1}, ValueError, "weight_bits: 1, expected an integer from 2 to 32"),
        ({"weight_bits": 8.0}, ValueError, "weight_bits: 8.0, expected"),
        ({"weight_bits": True}, ValueError, "weight_bits: True, expected"),
        ({"activation_bits": 17}, ValueError, "activation_bits: 17, expected an integer from 2 to 16"),
        ({"seed": -1}, ValueError, "seed: -1, expected an integer of at least 0"),
    ],
)
def test_values_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantParams(**arguments)


@pytest.mark.parametrize("quant_mode", ["tf", "tf_enhanced"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 16])
def test_one_grid_for_all_weights(quant_mode, symmetric, bits):
    weights = random_array((6, 3, 3, 3), "float32")
    found = QuantParams(quant_mode, weight_bits=bits, symmetric=symmetric).fake_quantized(layer(weights, "OIHW"))
    quantization = Quantization.from_weights(weights, bits, asymmetric=not symmetric, mode=quant_mode)
    np.testing.assert_array_equal(found, fake_quantize(weights, quantization))
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("layout", "shape", "groups", "channels"),
    [
        ("OIHW", (6, 4, 3, 3), 2, lambda w: w),
        ("OI", (6, 4), 1, lambda w: w),
        ("IO", (4, 6), 1, lambda w: w.T),
        ("HWIO", (3, 3, 4, 6), 1, lambda w: np.moveaxis(w, -1, 0)),
        ("IOHW", (4, 6, 3, 3), 1, lambda w: np.moveaxis(w, 1, 0)),
        ("IOHW", (4, 3, 3, 3), 2, lambda w: np.concatenate([np.moveaxis(w[:2], 1, 0), np.moveaxis(w[2:], 1, 0)])),
        ("HWCM", (3, 3, 4, 2), 4, lambda w: np.moveaxis(w, (2, 3), (0, 1)).reshape(8, 3, 3)),
        ("HWIGO", (3, 3, 4, 2, 3), 2, lambda w: np.moveaxis(w, (3, 4), (0, 1)).reshape(6, 3, 3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_grid_for_each_output_channel(layout, shape, groups, channels, dtype):
    weights = random_array(shape, dtype)
    found = QuantParams(weight_bits=3, per_channel=True).fake_quantized(layer(weights, layout, groups))
    assert (found.shape, found.dtype) == (weights.shape, weights.dtype)
    for given, moved in zip(channels(weights), channels(found)):
        np.testing.assert_array_equal(moved, fake_quantize(given, Quantization.from_weights(given, 3)))


@pytest.mark.parametrize("per_channel", [False, True])
def test_stochastic_rounding_depends_on_seed_and_name_alone(per_channel):
    weights = random_array((6, 40), "float32")

    def moved(seed, name, weights=weights):
        params = QuantParams("tf", "stochastic", weight_bits=4, per_channel=per_channel, seed=seed)
        return params.fake_quantized(layer(weights, "OI", name=name))

    found = moved(0, "a")
    np.testing.assert_array_equal(found, moved(0, "a", np.asfortranarray(weights)))
    assert (found != moved(1, "a")).any()
    assert (found != moved(0, "b")).any()
    quantization = Quantization.from_weights(weights, 4, axis=0 if per_channel else None, mode="tf")
    assert (found != fake_quantize(weights, quantization, axis=0)).any()
    steps = found * np.reshape(quantization.scale, (-1, 1))
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_without_a_range_name_their_layer(per_channel):
    weights = random_array((6, 4), "float32")
    weights[2, 3] = np.nan
    with pytest.raises(ValueError, match="layer conv: weights: contains nan or inf"):
        QuantParams(per_channel=per_channel).fake_quantized(layer(weights, "OI"))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(6, 0), (6, 4)])
def test_weights_of_zero_or_of_none(shape, per_channel):
    found = QuantParams(per_channel=per_channel).fake_quantized(layer(np.zeros(shape, np.float32), "OI"))
    np.testing.assert_array_equal(found, np.zeros(shape))
