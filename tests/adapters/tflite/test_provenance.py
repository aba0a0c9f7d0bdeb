"""How a saved file was made, behind the flatbuffer."""

import io
import json
import zipfile

import numpy as np
import pytest

from biascorr import __version__, correct
from biascorr.adapters.tflite import files
from tflite_networks import content_of, litert, samples_of

pytestmark = pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")

TEXT = '{"method":"mean"}'


@pytest.fixture(scope="module")
def correction():
    samples = samples_of("fixture:classifier_int8", 4)
    given = content_of("fixture:classifier_int8")
    return correct(content_of("fixture:classifier_float"), samples, quantized=given, method="mean", threads=1)


def archive(content, **members):
    made = io.BytesIO(content)
    with zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as archived:
        archived.comment = b"of mine"
        for name, text in members.items():
            archived.writestr(name, text)
    return made.getvalue()


def members_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archived:
        assert archived.testzip() is None
        return {name: archived.read(name).decode() for name in archived.namelist()}


def saved(content, folder, text=TEXT):
    files.save(content, folder / "saved.tflite", force=True, provenance=text)
    return (folder / "saved.tflite").read_bytes()


def test_a_saved_file_says_how_it_was_made_and_runs_as_before(correction, tmp_path):
    correction.save(tmp_path / "out.tflite")
    content = (tmp_path / "out.tflite").read_bytes()
    assert content.startswith(correction.model)
    found = json.loads(members_of(content)["biascorr.json"])
    assert found == {"version": __version__, "method": "mean", "data": correction.data_digest}
    samples = samples_of("fixture:classifier_int8", 2)
    for name, values in litert(content, samples).items():
        np.testing.assert_array_equal(values, litert(correction.model, samples)[name])


def test_a_second_correction_replaces_what_the_first_one_said(correction, tmp_path):
    first = saved(correction.model, tmp_path, "first")
    second = saved(first, tmp_path, "second")
    assert members_of(second) == {"biascorr.json": "second"}
    assert second.startswith(correction.model)


def test_files_behind_a_model_stay_there(correction, tmp_path):
    given = archive(correction.model, labels="cat\ndog\n", vocabulary="a b")
    for content in (given, saved(given, tmp_path)):
        found = saved(content, tmp_path)
        assert members_of(found) == {"labels": "cat\ndog\n", "vocabulary": "a b", "biascorr.json": TEXT}
        assert zipfile.ZipFile(io.BytesIO(found)).comment == b"of mine"
        assert found.startswith(correction.model)


@pytest.mark.parametrize("tail", [b"junk", b"PK\x05\x06" + bytes(18), b"PK\x05\x06" + b"\xff" * 18])
def test_other_bytes_behind_a_model_stay_there(correction, tail, tmp_path):
    found = saved(correction.model + tail, tmp_path)
    assert found.startswith(correction.model + (b"" if tail.endswith(bytes(18)) else tail))
    assert members_of(found) == {"biascorr.json": TEXT}
    again = files.with_tail(correction.model, found)
    assert members_of(again) == {"biascorr.json": TEXT}
    assert again.startswith(correction.model + (b"" if tail.endswith(bytes(18)) else tail))


def test_without_provenance_a_file_is_as_it_is_in_memory(correction, tmp_path):
    assert saved(correction.model, tmp_path, None) == correction.model
