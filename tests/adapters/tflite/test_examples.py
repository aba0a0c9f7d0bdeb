"""The example in examples/tflite_deployed.py does what it says, and changes nothing of the file but biases."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from tflite_fixtures import images, path_of
from tflite_models import outputs_of

PATH = Path(__file__).parent.parent.parent.parent / "examples" / "tflite_deployed.py"


def loaded():
    spec = importlib.util.spec_from_file_location("tflite_deployed", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = loaded()


def sqnr(name, content):
    samples = {"image": images(64, seed=2)}
    expected, found = (outputs_of(each, samples)["output_0"] for each in (path_of(name).read_bytes(), content))
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


def test_the_example_prints_that_correction_helps(tmp_path, capsys):
    output = tmp_path / "new" / "corrected.tflite"
    example.main(["--output", str(output)])
    printed = capsys.readouterr().out
    rows = [[float(score) for score in re.findall(r"([\d.]+) dB", line)] for line in printed.splitlines()[1:3]]
    assert all(after > before + 3 for before, after in zip(*rows))
    changed, size = map(int, re.search(r"(\d+) of (\d+) bytes differ", printed).groups())
    before, after = path_of("classifier_int8_per_tensor").read_bytes(), output.read_bytes()
    assert size == len(before) == len(after)
    assert 0 < changed < 4 * (5 * 16 + 64 + 10)  # the biases
    assert sqnr("classifier_float", after) > sqnr("classifier_float", before) + 3


def test_the_example_takes_files_and_a_folder(tmp_path, capsys):
    for k, image in enumerate(images()):
        np.save(tmp_path / f"{k:02}.npy", image[None])
    paths = (path_of("decoder_float"), path_of("decoder_int8"), tmp_path, "--output", tmp_path / "corrected.tflite")
    example.main(list(map(str, paths)))
    assert re.search(r"corrected\.tflite: (written anew|\d+ of \d+ bytes differ)", capsys.readouterr().out)


def test_the_example_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        example.main(["float.tflite"])
    assert "expected FLOAT.tflite INT8.tflite SAMPLES, or nothing" in capsys.readouterr().err
