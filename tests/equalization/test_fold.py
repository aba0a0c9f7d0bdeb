"""`fold`: the folded model, what was folded, what was left and why."""

import json

import onnx
import pytest

from biascorr import fold
from networks import assert_same_function, batch_norm, batch_norm_constants, model_from_text, quantized, samples, weights
from tflite_fixtures import path_of


@pytest.fixture
def model():
    text = f"""g (float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,4,6,6] z) {{
        [conv] t = Conv<pads=[1,1,1,1]>(x, w) {batch_norm("t", "y")}
        [other] u = Conv<pads=[1,1,1,1]>(x, w) [relu] r = Relu(u) {batch_norm("r", "z", "stays")} }}"""
    return model_from_text(text, w=weights(4, 3, 3, 3), **batch_norm_constants(4), **batch_norm_constants(4, "stays"))


@pytest.fixture
def own(model):
    """With weights of its own for each layer."""
    model.graph.node[2].input[1] = "v"
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights(4, 3, 3, 3), "v"))
    return model


def test_what_can_be_folded_is_folded(own):
    before = own.SerializeToString()
    folding = fold(own)
    assert [(each.batch_norm, each.layer) for each in folding.folds] == [("norm", "conv")]
    assert list(folding.left) == ["stays"]
    assert folding.is_anything_done
    assert_same_function(own, folding.model, {"x": samples(2, 3, 6, 6)}, tolerance=1e-5)
    assert own.SerializeToString() == before
    assert sum(node.op_type == "BatchNormalization" for node in folding.model.graph.node) == 1


def test_what_shares_weights_stays(model):
    folding = fold(model)
    assert not folding.is_anything_done
    assert "weights are used elsewhere" in folding.left["norm"]


def test_record_can_be_written_as_json(own):
    record = json.loads(fold(own).to_json())
    assert record["kind"] == "folding"
    assert record["folds"] == [{"layer": "conv", "batch_norm": "norm", "is_after": True}]
    assert record["left"][0]["reasons"][0]["code"] == "NORM_NOT_AFTER_LAYER"
    assert repr(fold(own)) == "Folding: 1 of 2 batch normalizations folded into 1 layer\n1 left as they are"


def test_saves_whole_files(tmp_path, own):
    path = tmp_path / "folded.onnx"
    onnx.save(own, tmp_path / "given.onnx")
    folding = fold(tmp_path / "given.onnx")
    folding.save(path)
    assert "fold" in {entry.key: entry.value for entry in onnx.load(path).metadata_props}["biascorr"]
    assert folding.files == {"reference": str(tmp_path / "given.onnx")}
    with pytest.raises(FileExistsError):
        folding.save(path)
    folding.save(path, force=True, provenance=False)


def test_quantized_models_are_refused(own):
    batches = [{"x": each[None]} for each in samples(2, 3, 6, 6)]
    with pytest.raises(ValueError, match="has quantized weights; fold the batch normalizations of the float model"):
        fold(quantized(own, batches))


def test_tflite_models_have_none():
    folding = fold(path_of("classifier_float"))
    assert not folding.is_anything_done
    assert "converter has folded them" in folding.notes[0]
