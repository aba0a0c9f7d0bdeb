"""ONNX networks that are pickled, and what they are known by."""

import itertools
import os
import pickle
import re

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat

from biascorr import QuantParams
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.simulation import simulated
from biascorr.equalization.folding import fold_batch_norms
from biascorr.graph.network import Edits
from biascorr.graph.travel import by_reference
from biascorr.quantization import Quantization
from networks import (
    as_constant_nodes,
    batch_norm,
    batch_norm_constants,
    biases,
    model_from_text,
    quantized,
    ranges_in,
    samples,
    two_layers,
    weights,
)
from travelling import assert_same, assert_same_in_another_process, sent, tensors_of

X = samples(4, 3, 6, 6)
BATCHES = [{"x": X}]


def large():
    """Weights that are apart from the model, a batch normalization."""
    text = f"""g (float[N,3,6,6] x) => (float[N,9] y) {{
        [first] a = Conv<pads=[1,1,1,1]>(x, w1)
        {batch_norm("a", "n")}
        [relu] r = Relu(n)
        [second] c = Conv(r, w2, b2)
        [mean] m = GlobalAveragePool(c)
        [flatten] f = Flatten(m)
        [last] y = MatMul(f, w3)
    }}"""
    constants = {"w1": weights(16, 3, 3, 3), "w2": weights(32, 16, 3, 3), "b2": biases(32), "w3": weights(32, 9)}
    return model_from_text(text, **constants, **batch_norm_constants(16))


def loaded(model):
    return OnnxNetwork.load(model, "model")


def edited():
    network = loaded(two_layers())
    wide = np.asarray(network.layers[0].weights) * 2
    edits = Edits(weights={"first": wide}, biases={"second": np.ones(6)}, limits={"relu": (0.0, 3.0)})
    return network.edited(edits)


def shifted():
    network = loaded(large())
    return network.with_shifts({"first": np.arange(16.0), "second": np.arange(32.0)})


def simulation():
    network = loaded(large())
    return simulated(network, QuantParams(weight_bits=4, activation_bits=8), ranges_in(network, BATCHES))


NETWORKS = {
    "float": lambda: loaded(two_layers()),
    "large": lambda: loaded(large()),
    "constant nodes": lambda: loaded(as_constant_nodes(large())),
    "QDQ": lambda: loaded(quantized(two_layers(), BATCHES)),
    "QOperator": lambda: loaded(quantized(two_layers(), BATCHES, quant_format=QuantFormat.QOperator)),
    "edited": edited,
    "shifted": shifted,
    "folded": lambda: fold_batch_norms(loaded(large()))[0],
    "simulated": simulation,
    "with quantizers": lambda: loaded(large()).with_quantizers({"second": Quantization(7.0, -3)}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_was_sent_is_the_same(name):
    network = NETWORKS[name]()
    assert_same(network, sent(network), {"x": X})


def test_a_network_is_the_same_in_another_process(tmp_path):
    assert_same_in_another_process(shifted(), {"x": X}, tmp_path)


def test_nothing_that_was_made_of_it_travels():
    network, unused = loaded(large()), loaded(large())
    network.facts(), network.model, network.digest, network.part({"x": X}, network.outputs)
    assert len(pickle.dumps(network)) == len(pickle.dumps(unused)) < 1.2 * len(large().SerializeToString())


def test_values_of_a_network_that_arrived_are_kept_where_others_are_added(monkeypatch):
    def start_process():
        monkeypatch.setattr("biascorr.adapters.onnx.tensors._count", itertools.count())

    edits = Edits(weights={"last": np.ones((32, 9), np.float32)})
    start_process()
    network = loaded(large())
    content = pickle.dumps(network)
    expected = tensors_of(network.edited(edits), {"x": X})
    start_process()
    assert tensors_of(pickle.loads(content).edited(edits), {"x": X}) == expected


# Digests


def external(path, model):
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def test_a_model_has_one_digest_however_it_is_given(tmp_path):
    model = large()
    (tmp_path / "whole.onnx").write_bytes(model.SerializeToString())
    given = [model, model.SerializeToString(), tmp_path / "whole.onnx", external(tmp_path / "external.onnx", large())]
    assert len({loaded(each).digest for each in given}) == 1


def test_how_a_model_was_made_and_texts_are_not_in_its_digest(tmp_path):
    network, described = loaded(large()), large()
    network.save(tmp_path / "traced.onnx", provenance="{}")
    described.graph.node[0].doc_string = described.graph.doc_string = described.graph.initializer[0].doc_string = "a text"
    assert loaded(tmp_path / "traced.onnx").digest == loaded(described).digest == network.digest


def test_a_network_that_is_saved_has_the_same_digest(tmp_path):
    for name in ("edited", "shifted", "simulated", "folded"):
        network = NETWORKS[name]()
        network.save(tmp_path / f"{name}.onnx")
        assert loaded(tmp_path / f"{name}.onnx").digest == network.digest, name


def changed(change):
    model = large()
    change(model.graph)
    return model


def with_value(name):
    def change(graph):
        tensor = next(each for each in graph.initializer if each.name == name)
        tensor.raw_data = tensor.raw_data[:-1] + bytes([tensor.raw_data[-1] ^ 1])

    return changed(change)


def test_all_that_is_computed_with_is_in_the_digest():
    others = [
        large(),
        with_value("w1"),
        with_value("b2"),
        with_value("norm_beta"),
        changed(lambda graph: graph.node[0].attribute[0].ints.__setitem__(0, 2)),
        changed(lambda graph: setattr(next(each for each in graph.node if each.name == "relu"), "op_type", "Sigmoid")),
    ]
    networks = [*map(loaded, others), shifted(), NETWORKS["with quantizers"](), NETWORKS["folded"]()]
    assert len({each.digest for each in networks}) == len(networks)


def test_the_digest_of_a_copy_is_its_own():
    network = loaded(large())
    before = network.digest
    assert network.with_shifts({"second": np.ones(32)}).digest != before == network.digest


# References to files


@pytest.fixture
def mapped(tmp_path):
    network = loaded(external(tmp_path / "model.onnx", large()))
    with by_reference():
        return network, pickle.dumps(network), tmp_path / "model.onnx.data"


def test_values_in_files_may_stay_there(mapped):
    network, content, file = mapped
    assert len(content) < len(pickle.dumps(network)) - file.stat().st_size // 2
    assert_same(network, pickle.loads(content), {"x": X})


def test_what_was_changed_travels_beside_references(mapped):
    network = mapped[0].with_shifts({"first": np.arange(16.0)}).edited(Edits(weights={"last": np.ones((32, 9), np.float32)}))
    with by_reference():
        content = pickle.dumps(network)
    assert len(content) < len(pickle.dumps(network)) - 4 * 32 * 16 * 9
    assert_same(network, pickle.loads(content), {"x": X})


def test_a_reference_to_a_file_that_is_missing(mapped):
    _, content, file = mapped
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{re.escape(str(file))}: .* missing here; .* send the network with its values"
    ):
        pickle.loads(content)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_reference_to_a_file_that_is_another(change, mapped):
    _, content, file = mapped
    state = file.stat()
    file.write_bytes(file.read_bytes() + b"0" * (change == "size"))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + (change == "time")))
    with pytest.raises(ValueError, match=rf"another one here: \d+ bytes, .* expected {state.st_size} bytes"):
        pickle.loads(content)


def test_a_file_that_was_replaced_is_not_referred_to(mapped):
    network, _, file = mapped
    file.rename(file.with_suffix(".old"))
    file.write_bytes(b"another")
    with by_reference():
        assert_same(network, sent(network), {"x": X})
