"""The sweep of the engine against brute force: a file that is written, read and run from its inputs again for each layer."""

import numpy as np
import pytest

from biascorr import correct
from biascorr.adapters.tflite.bias import Bias
from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.correction.methods import mean_shift
from biascorr.graph.matching import match_layers
from biascorr.sweep.measurements import empty_mean
from tflite_models import MODELS, samples_for
from tflite_networks import EACH, batches, content_of, float_of, run, samples_of
from tflite_quantizers import quantized

pytestmark = [
    pytest.mark.usefixtures("trusted"),
    pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning"),  # by brute force too
]


def loaded(content):
    return TfliteNetwork.load(content, "model")


def mean_output(network, layer, samples):
    """Of each channel, over samples and positions."""
    rows = run(network, samples, [layer.output])[layer.output].astype(np.float64)
    return np.moveaxis(rows, layer.output_axis, 0).reshape(layer.channels, -1).mean(axis=1)


def input_mean(network, layer, samples):
    mean = empty_mean(layer)
    for feeds in batches(samples):
        mean.update(network.part(feeds, [layer.input], threads=1)(feeds)[layer.input])
    return mean.mean(None)


def brute_force(reference, content, samples, method):
    """The corrected file."""
    float_network, given = loaded(reference), loaded(content)
    matches = match_layers(float_network.layers, given.layers)
    for name, match in matches.items():
        if not match.is_quantized:
            continue
        network = loaded(content)
        (layer,) = [each for each in network.layers if each.name == name]
        if method == "empirical":
            shift = mean_output(float_network, match.reference, samples) - mean_output(network, layer, samples)
        else:
            shift = mean_shift(layer, match.reference.weights, input_mean(network, layer, samples))
        if network.bias_change(layer, shift).applied is not None:  # it has a place for one
            content = network.with_shifts({name: shift}).model
    return content


def biases_of(content):
    """The real bias of each layer, and the distance of neighbouring ones."""
    network, found = loaded(content), {}
    for layer in network.layers:
        grid = Bias(network._graph, network._lowered.products[layer.name]).grid
        bias = np.zeros(layer.channels) if layer.bias is None else np.ravel(layer.bias).astype(np.float64)
        found[layer.name] = bias, 0.0 if grid is None else np.broadcast_to(grid.scale, bias.shape)
    return found


def assert_same_biases(found, expected):
    expected = biases_of(expected)
    for name, (bias, step) in biases_of(found).items():
        tolerance = 1.01 * step + 2e-6 * np.abs(expected[name][0]).max() + 1e-6
        assert (np.abs(bias - expected[name][0]) <= tolerance).all(), name


@pytest.mark.parametrize("name", [*EACH, "grouped-dynamic_per_tensor"])
def test_a_sweep_finds_what_brute_force_does(name):
    samples, reference, content = samples_of(name, 3), float_of(name), content_of(name)
    correction = correct(reference, samples, quantized=content, method="empirical", threads=1)
    assert any(layer.method for layer in correction.report)
    assert_same_biases(correction.model, brute_force(reference, content, samples, "empirical"))


@pytest.mark.parametrize("name", EACH[::4])
def test_the_iterative_method_finds_what_brute_force_does(name):
    samples, reference, content = samples_of(name, 3), float_of(name), content_of(name)
    correction = correct(reference, samples, quantized=content, method="iterative", threads=1)
    assert_same_biases(correction.model, brute_force(reference, content, samples, "iterative"))


@pytest.mark.parametrize("model", ["residual", "two_inputs", "transpose_conv", "matmul_right"])
@pytest.mark.parametrize("recipe", ["int8", "int8_in_out", "int16x8"])
def test_batches_of_several_samples(model, recipe):
    reference, samples = MODELS[model](any_batch=True), samples_for(MODELS[model](), 6)
    content = quantized(reference, recipe, samples)
    correction = correct(reference, samples, quantized=content, method="empirical", batch_size=4, threads=1)
    assert (correction.samples, correction.batches) == (6, 2)
    assert_same_biases(correction.model, brute_force(reference, content, samples, "empirical"))


def test_what_does_not_fit_into_the_memory_goes_to_the_disk():
    name = "residual-int8"
    samples, reference, content = samples_of(name, 6), float_of(name), content_of(name)
    models = [
        correct(reference, samples, quantized=content, method="empirical", threads=threads, memory_budget=budget).model
        for threads, budget in ((1, None), (1, 2000), (2, None))
    ]
    assert models[0] == models[1] == models[2]
