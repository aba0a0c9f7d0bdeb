"""What users install: the wheel in an empty environment with numpy alone."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
USE = """
import sys
import numpy as np
import biascorr
from biascorr import BiasCorrector, MeanBiasCorrector, NullBiasCorrector, Quantization, prepare_input_mean

mean = prepare_input_mean([np.full((1, 2, 2, 3), 64, np.int8)], Quantization(scale=128.0))
weights = np.full((1, 1, 3, 1, 2), 0.26, np.float32)
quantized = Quantization(scale=100.0).fake_quantize(weights) - np.float32(0.01)
print(*(f"{shift:.6f}" for shift in MeanBiasCorrector(mean).calculate(weights, quantized)))
heavy = {"onnx", "onnxruntime", "typer", "rich", "ml_dtypes", "keras", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
try:
    biascorr.correct("model.onnx", [])
except ImportError as error:
    print(error)
print(biascorr.__file__)
"""


def run(*command, **options):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=280, **options)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(Path(sys.executable).with_name("maturin"), "build", "--release", "--quiet", "--out", folder, cwd=PROJECT)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_is_abi3_and_has_types_and_licence(wheel):
    assert "cp310-abi3" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "biascorr/py.typed",
        "biascorr/_kernels.pyi",
        "biascorr/_kernels.abi3.so",
        "biascorr/report/templates/page.css",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment_with_numpy_alone(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    wheelhouse = PROJECT / "build" / "wheelhouse"
    pip = [environment / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    run(*pip, "install", "--no-index", "--find-links", wheelhouse, wheel, env=clean)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    output = run(environment / "bin" / "python", "-I", "-c", USE, cwd=elsewhere, env=clean).splitlines()
    assert output[0] == "0.015000 0.015000"
    assert output[1] == 'reading a model needs onnx: pip install "biascorr[onnx]"'
    assert output[2].startswith(str(environment))
    refused = subprocess.run([environment / "bin" / "biascorr"], capture_output=True, text=True, env=clean)
    assert refused.returncode == 1
    assert refused.stderr == 'error: the command line needs typer: pip install "biascorr[onnx]"\n'
