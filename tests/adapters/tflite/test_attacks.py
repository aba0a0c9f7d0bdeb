"""Files that are valid but odd, or damaged: what comes back is right, or it is an error that says why."""

import numpy as np
import pytest

import biascorr
from biascorr.adapters.tflite.network import TfliteNetwork
from tflite_models import MODELS
from tflite_networks import content_of, litert, samples_of

pytestmark = pytest.mark.usefixtures("trusted")


def loaded(content):
    return TfliteNetwork.load(content, "model")


def assert_same_function(content, other, samples):
    expected, found = litert(content, samples), litert(other, samples)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values, rtol=0, atol=1e-5 * np.abs(values).max())


# Weights of float16, which are dequantized


@pytest.mark.parametrize("name", ["fixture:classifier_float16", "fixture:decoder_float16", "float16_weights"])
def test_files_of_float16_are_equalized(name):
    content, samples = content_of(name), samples_of(name)
    equalization = biascorr.equalize(content, samples)
    assert equalization.chains
    assert equalization.change.relative < 1e-5
    assert_same_function(content, equalization.model, samples)


def test_biases_of_float16_stay_where_they_are():
    network = loaded(MODELS["float16_weights"]())
    shifts = {layer.name: np.full(layer.channels, 0.125) for layer in network.layers}
    assert not any(network.bias_change(layer, shifts[layer.name]).reasons for layer in network.layers)
    found = network.with_shifts(shifts)
    assert len(found.model) == len(network.model)
    for before, after in zip(network.layers, loaded(found.model).layers):
        np.testing.assert_allclose(after.bias, before.bias + 0.125, atol=1e-3)
