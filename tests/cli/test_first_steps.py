"""What goes wrong the first time, and what is said about it."""

import re
import sys

import pytest

from command_line import assert_one_error, run

CORRECT = ("correct", "models/float.onnx", "--quantized", "models/quantized.onnx", "--method", "mean", "-o", "out.onnx")
DATA = ("--data", "data/good.npz")

USAGE = {
    "give the quantized model as --quantized": (
        "correct",
        "models/float.onnx",
        "models/quantized.onnx",
        *DATA,
        "-o",
        "out.onnx",
    ),
    "give samples as --data": ("quantize", "models/float.onnx", "data/good.npz", "-o", "out.onnx"),
    "give the float model as --reference": ("inspect", "models/quantized.onnx", "models/float.onnx"),
    "data/good.npz is no folder of images; leave out --preset": (*CORRECT, *DATA, "--preset", "imagenet"),
    "first_steps:none is no folder of images; leave out --size --layout": (
        *(*CORRECT, "--data", "first_steps:none", "--size", "8", "--layout", "NCHW"),
    ),
}


@pytest.mark.parametrize("expected", USAGE)
def test_what_was_meant_by_an_argument(expected, folder):
    done = run(*USAGE[expected], cwd=folder)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


ERRORS = {
    r"ValueError: too late \(.*first_steps\.py, line 2; --verbose shows more\)": (*CORRECT, "--data", "first_steps:fails"),
    r"ValueError: in between \(.*first_steps\.py, line 8; --verbose shows more\)": (*CORRECT, "--data", "first_steps:begins"),
    r"data: 'first_steps:none' returned None, expected samples": (*CORRECT, "--data", "first_steps:none"),
    r"out\.pdf: the report is a page, expected a name that ends with \.html": (*CORRECT, *DATA, "--report", "out.pdf"),
    r"reference: no such file: gone\.keras": ("correct", "gone.keras", *DATA, "-o", "out.keras"),
    r"models\[1\]: no such file: gone\.onnx": ("compare", "models/float.onnx", "models/quantized.onnx", "gone.onnx", *DATA),
    r"reference: model\.pt: not an ONNX model.*; torch\.onnx\.export makes one": (
        "inspect",
        "a.onnx",
        "--reference",
        "model.pt",
    ),
    r"reference: a \.tflite model, expected ONNX: .*": ("quantize", "float.tflite", *DATA, "-o", "out.onnx"),
}

MINE = """def fails():
    raise ValueError("too late")
def none():
    pass
def begins():
    import numpy as np
    yield {"x": np.load("data/good.npz")["x"]}
    raise ValueError("in between")
"""


@pytest.mark.parametrize("expected", ERRORS)
def test_what_is_wrong_is_said_in_one_line(expected, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "first_steps", raising=False)
    (folder / "first_steps.py").write_text(MINE)
    (folder / "model.pt").write_bytes(b"PK\3\4")
    (folder / "a.onnx").write_bytes((folder / "models/float.onnx").read_bytes())
    done = run(*ERRORS[expected], cwd=folder)
    assert_one_error(done)
    assert re.fullmatch(f"error: {expected}", done.stderr.splitlines()[-1]), done.stderr
