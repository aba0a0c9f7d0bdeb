"""Types, as those who check their own code by them see them; and the names that they are offered."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import biascorr
import biascorr.typing
from biascorr.calibration import images
from biascorr.correction import correct
from biascorr.correction.quant_params import QUANT_MODES, QuantParams

ROOT = Path(__file__).parent.parent

WELL = '''
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

import biascorr
from biascorr.typing import Data, Method


def batches(count: int) -> Iterator[dict[str, NDArray[np.float32]]]:
    for _ in range(count):
        yield {"x": np.zeros((1, 3, 8, 8), np.float32)}


def corrected(model: onnx.ModelProto, data: Data, method: Method = "auto") -> onnx.ModelProto:
    correction = biascorr.correct(model, data, method=method, quant_params=biascorr.QuantParams("tf", weight_bits=4))
    layers: list[str] = [layer.name for layer in correction.report]
    print(correction.method, correction.gains["sqnr"].mean, layers, correction.summary())
    result: onnx.ModelProto = correction.model
    return result


first = corrected(onnx.load("float.onnx"), batches(8))
second = corrected(first, biascorr.images("photos", preset="imagenet", size=(256, 256)), "empirical")
third: onnx.ModelProto = biascorr.correct("float.onnx", Path("samples"), quantized=second).model
fourth = biascorr.equalize(third, [np.zeros((1, 3, 8, 8), np.float32)]).model.graph.name.upper()
biascorr.correct(Path("float.onnx"), "module:function", quantized="quantized.onnx").save("corrected.onnx")
bias = biascorr.MeanBiasCorrector(np.zeros(4)).calculate(np.zeros((4, 2)), np.zeros((4, 2)))
'''  # fmt: skip

ILL = """
import biascorr
class Net: name = "a model of some framework"
biascorr.correct("x", method="emprical")
biascorr.correct("x", new_biases="none")
biascorr.correct("x", 5)
biascorr.correct("x", print)
biascorr.correct("x", bach_size=2)
biascorr.images("photos", preset="imagnet")
biascorr.images("photos", layout="CHW", size="large")
biascorr.QuantParams("tf_enhnaced")
biascorr.correct(Net()).model.nmae
biascorr.correct("x", quantized=Net()).model.nmae
biascorr.equalize(Net()).model.nmae
biascorr.korrect
"""


@pytest.mark.slow
def test_what_mypy_says_of_a_script(tmp_path):
    (tmp_path / "well.py").write_text(WELL)
    (tmp_path / "ill.py").write_text(ILL)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--no-pretty", "--no-error-summary"]
    done = subprocess.run([*command, tmp_path / "well.py", tmp_path / "ill.py"], capture_output=True, text=True, cwd=ROOT)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = {int(line.split("ill.py:")[1].split(":")[0]) for line in errors if "ill.py:" in line}
    assert all("ill.py:" in line for line in errors), done
    assert found == set(range(4, ILL.count("\n") + 1)), done


def test_the_names_of_the_package():
    public = [name for name in dir(biascorr) if not name.startswith("__")]
    assert public == sorted(biascorr.__all__)
    assert {"__version__", "__doc__"} <= set(dir(biascorr))


def test_choices_are_those_of_their_types():
    assert typing.get_args(biascorr.typing.QuantMode) == QUANT_MODES
    assert typing.get_args(biascorr.typing.Method) == correct.METHODS
    assert typing.get_args(biascorr.typing.ImagePreset) == tuple(images._PRESETS)
    assert dataclasses.fields(QuantParams)[0].default in QUANT_MODES


def test_types_can_be_imported_where_they_are_used():
    for name in biascorr.typing.__all__:
        assert getattr(biascorr.typing, name) is not None
    assert biascorr.Correction[bytes].__origin__ is biascorr.Correction
