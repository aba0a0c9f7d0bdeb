"""`demo`: the run, what it writes, what it refuses; the lines of text and their reading."""

import importlib.util
import json

import numpy as np
import onnx
import pytest

from biascorr.demo import demo as module
from biascorr.demo.demo import MODELS, demo
from biascorr.demo.text_lines import character_accuracy, edit_distance, read_line, read_right, render_lines, save_picture
from networks import model_from_text, samples, weights


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    text = "g (float[N,3,6,6] x) => (float[N,4] y) { t = Conv(x, w) m = GlobalAveragePool(t) y = Flatten(m) }"
    onnx.save(model_from_text(text, w=weights(4, 3, 3, 3)), folder / "net.onnx")
    np.savez(folder / "samples.npz", x=samples(40, 3, 6, 6))
    return {"network": folder / "net.onnx", "data": folder / "samples.npz"}


def test_a_network_of_the_users_own(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = own["network"].read_bytes()
    found = demo(**own, models="kept")
    assert list(found.cells) == ["model", "top-1 as float", "SQNR, dB", "seconds"]
    assert found.cells["model"] == list(MODELS)
    assert found.cells["SQNR, dB"][0] == "exact"
    assert found.columns["SQNR, dB"][1] > 10
    assert found.cells["seconds"][0] == ""
    assert (found.calibrated, found.scored) == (20, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert sorted(path.stem for path in (tmp_path / "kept").iterdir()) == sorted(MODELS)
    assert own["network"].read_bytes() == before
    assert repr(found).startswith("Demonstration: ")
    record = json.loads(found.to_json())
    assert [each["name"] for each in record["models"]] == list(MODELS)
    assert record["models"][0]["SQNR, dB"] is None
    with pytest.raises(FileExistsError, match="--force"):
        demo(**own, models="kept")
    demo(**own, models="kept", force=True)


def test_inputs_are_not_overwritten(own, tmp_path):
    network = tmp_path / "float.onnx"
    network.write_bytes(own["network"].read_bytes())
    with pytest.raises(ValueError, match="float.onnx: it is an input, network"):
        demo(network=network, data=own["data"], models=tmp_path, force=True)


def test_wrong_files_are_refused(own, tmp_path):
    with pytest.raises(ValueError, match="go together"):
        demo(network=own["network"])
    with pytest.raises(FileNotFoundError, match="network: no such file"):
        demo(network=tmp_path / "none.onnx", data=own["data"])
    for arrays, message in (
        ({"z": samples(4, 3, 6, 6)}, "no array for the input 'x', only z"),
        ({"x": samples(1, 3, 6, 6)}, "1 samples, at least 2 needed"),
    ):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            demo(network=own["network"], data=tmp_path / "wrong.npz")


def test_existing_picture_and_missing_recognizer(tmp_path, monkeypatch):
    (tmp_path / "demo.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="demo.png"):
        demo(picture=tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes() == b"mine"
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if "rapidocr" in name else find(name, *rest))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps rapidocr-onnxruntime==1.4.4"):
        demo(picture=tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


@pytest.mark.skipif(importlib.util.find_spec("rapidocr_onnxruntime") is None, reason="needs the wheel rapidocr-onnxruntime")
def test_lines_are_read_and_drawn(tmp_path):
    from biascorr.adapters.onnx.network import OnnxNetwork
    from biascorr.demo import text_lines

    network = onnx.load(text_lines.network_path())
    characters = text_lines.characters_of(network)
    lines = render_lines(3, seed=1)
    run = OnnxNetwork.load(network, "model").deployed()
    readings = [read_line(next(iter(run({"x": pixels}).values())), characters) for _, pixels in lines]
    assert all(map(read_right, [text for text, _ in lines], readings))
    save_picture(tmp_path / "lines.png", lines, dict.fromkeys(MODELS, readings), rows=3)
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_readings():
    assert edit_distance("kitten", "sitting") == 3
    assert read_right("a b", "ab")
    assert character_accuracy(["abcd"], ["abcx"]) == 0.75
    probabilities = np.zeros((1, 6, 3), np.float32)
    probabilities[0, range(6), [1, 1, 0, 1, 2, 2]] = 1
    assert read_line(probabilities, ["", "a", "b"]) == "aab"
    (first, pixels), (second, _) = render_lines(2, seed=0)
    assert first != second
    assert pixels.shape[:3] == (1, 3, 48)
    assert np.abs(pixels).max() <= 1


def test_figures_as_text():
    cells = module.Demonstration({"SQNR, dB": [np.inf, 1.26, -np.inf], "character accuracy": [1.0, 0.5, 0.0]}, 1, 1).cells
    assert cells["SQNR, dB"] == ["exact", "1.3", "-inf"]
    assert cells["character accuracy"] == ["100.00%", "50.00%", "0.00%"]
