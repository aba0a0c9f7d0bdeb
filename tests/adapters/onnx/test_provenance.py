"""How a saved model was made, in its metadata."""

import json

import onnx

from biascorr import __version__, correct, equalize
from networks import mean_corrected, quantized, samples, two_layers

X = samples(4, 3, 6, 6)


def metadata_of(path):
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def test_a_saved_model_says_how_it_was_made(tmp_path):
    correction = mean_corrected(two_layers(), X)
    before = correction.model.SerializeToString()
    correction.save(tmp_path / "out.onnx")
    found = json.loads(metadata_of(tmp_path / "out.onnx")["biascorr"])
    assert found == {"version": __version__, "method": "mean", "data": correction.data_digest}
    saved = onnx.load(tmp_path / "out.onnx")
    del saved.metadata_props[-1]
    assert saved == correction.model
    assert correction.model.SerializeToString() == before


def test_a_model_that_was_not_asked_for_is_written_without_being_made_whole(tmp_path):
    correction = mean_corrected(two_layers(), X)
    correction.save(tmp_path / "light.onnx")
    assert correction.model is not None
    correction.save(tmp_path / "whole.onnx")
    assert (tmp_path / "light.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_second_correction_replaces_what_the_first_one_said(tmp_path):
    model = two_layers()
    model.metadata_props.add(key="mine", value="kept")
    mean_corrected(model, X).save(tmp_path / "first.onnx")
    correct(tmp_path / "first.onnx", X, method="iterative").save(tmp_path / "second.onnx")
    entries = onnx.load(tmp_path / "second.onnx").metadata_props
    assert [entry.key for entry in entries] == [*(each.key for each in model.metadata_props), "biascorr"]
    assert json.loads(entries[-1].value)["method"] == "iterative"


def test_a_model_to_which_nothing_was_done_is_saved_as_it_was(tmp_path):
    model = two_layers()
    given = quantized(model, [{"x": X[:1]}])
    correction = correct(model, X, quantized=given, method="mean", exclude=["*"])
    correction.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == given


def test_an_equalized_model_says_so(tmp_path):
    result = equalize(two_layers(), X)
    assert result.is_anything_done
    result.save(tmp_path / "out.onnx")
    found = json.loads(metadata_of(tmp_path / "out.onnx")["biascorr"])
    assert found == {"version": __version__, "method": "equalize", "data": result.data_digest}
