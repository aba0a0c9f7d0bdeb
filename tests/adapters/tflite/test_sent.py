"""TFLite networks that are pickled, and what they are known by."""

import pickle
import zipfile

import numpy as np
import pytest

from biascorr import QuantParams
from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.correction.simulation import simulated
from biascorr.graph.layer import without_later_calls
from biascorr.graph.network import Edits
from networks import ranges_in
from tflite_models import MODELS, UNSUPPORTED, packed, samples_for, unpacked
from tflite_networks import EACH, FLOATS, batches, content_of, network_of, samples_of
from travelling import assert_same, assert_same_in_another_process, sent

pytestmark = pytest.mark.usefixtures("trusted")


def feeds_of(name):
    return batches(samples_of(name, 1))[0]


def shifted(network):
    return network.with_shifts({each.name: np.linspace(-1, 1, each.channels) for each in without_later_calls(network.layers)})


def edited(network):
    layer = network.layers[0]
    weights, bias = 2 * np.asarray(layer.weights), np.ones(layer.channels)
    name = next(name for name in network.facts().roles if network.facts().activation(name))
    return network.edited(Edits({layer.name: weights}, {layer.name: bias}, {name: (-0.5, 3.0)}))


def with_quantizers(network):
    return simulated(network, QuantParams(activation_bits=8), ranges_in(network, [feeds_of("activations")]))


CHANGES = {
    "shifted": shifted,
    "edited": edited,
    "simulated": lambda network: simulated(network, QuantParams(weight_bits=4)),
    "with quantizers": with_quantizers,
    "with input names": lambda network: network.with_input_names(["renamed"]),
}


@pytest.mark.parametrize("name", [*FLOATS, *(name for name in EACH if name.endswith("-int8") or name.startswith("fixture"))])
def test_a_network_that_was_sent_is_the_same(name):
    assert_same(network_of(name), sent(network_of(name)), feeds_of(name))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_network_with_what_cannot_be_corrected_is_the_same(name):
    content = UNSUPPORTED[name]()
    network = TfliteNetwork.load(content, name)
    feeds = batches(samples_for(content, 1))[0]
    assert_same(network, sent(network), feeds)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_the_same(change):
    network, feeds = CHANGES[change](network_of("activations")), feeds_of("activations")
    feeds = {each.name: array for each, array in zip(network.inputs, feeds.values())}
    assert_same(network, sent(network), feeds)
    assert shifted(network).model == shifted(sent(network)).model


def test_a_network_is_the_same_in_another_process(tmp_path):
    network = CHANGES["with quantizers"](edited(network_of("activations")))
    assert_same_in_another_process(network, feeds_of("activations"), tmp_path)


@pytest.mark.parametrize("change", [lambda network: network, shifted])
def test_what_travels_is_the_file(change):
    network = change(TfliteNetwork.load(content_of("convolutions"), "model"))
    unused = len(pickle.dumps(network))
    network.facts(), network.digest, network.input_ranges, network.part(feeds_of("convolutions"), network.outputs)
    assert len(pickle.dumps(network)) == unused < len(network.model) + 2000


# Digests


def digest_of(content, name="model"):
    return TfliteNetwork.load(content, name).digest


def test_a_model_has_one_digest_however_it_is_given(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(content_of("convolutions"))
    assert digest_of(path) == digest_of(bytearray(path.read_bytes())) == digest_of(content_of("convolutions"), "another")


@pytest.mark.parametrize("change", ["shifted", "edited"])
def test_a_network_that_is_saved_has_the_same_digest(change, tmp_path):
    network = CHANGES[change](network_of("activations"))
    network.save(tmp_path / "plain.tflite")
    network.save(tmp_path / "traced.tflite", provenance="{}")
    TfliteNetwork.load(tmp_path / "traced.tflite", "").save(tmp_path / "twice.tflite", provenance='{"other": 1}')
    assert {digest_of(path) for path in tmp_path.iterdir()} == {network.digest}
    assert len(list(tmp_path.iterdir())) == 3


def test_files_behind_a_model_are_in_its_digest(tmp_path):
    found = set()
    for text in ("cat", "dog"):
        path = tmp_path / f"{text}.tflite"
        path.write_bytes(content_of("convolutions"))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("labels.txt", text)
        network = TfliteNetwork.load(path, "")
        network.save(path, provenance="{}", force=True)
        assert digest_of(path) == network.digest
        found.add(network.digest)
    assert len(found | {digest_of(content_of("convolutions"))}) == 3


def with_scale(content):
    model = unpacked(content)
    tensor = next(
        each for each in model.subgraphs[0].tensors if each.quantization is not None and each.quantization.scale is not None
    )
    tensor.quantization.scale = np.asarray(tensor.quantization.scale) * 2
    return packed(model)


def test_all_that_is_computed_with_is_in_the_digest():
    network, quantized = network_of("activations"), content_of("convolutions-int8")
    files = [packed(unpacked(quantized)), with_scale(quantized), MODELS["convolutions"](any_batch=True)]
    networks = [network, *(change(network) for change in CHANGES.values()), *(TfliteNetwork.load(each, "") for each in files)]
    assert len({each.digest for each in networks}) == len(networks)
