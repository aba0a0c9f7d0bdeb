"""What users install: the wheel in an empty environment with numpy alone."""

import os
import re
import subprocess
import sys
import tarfile
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
def test_sdist_has_what_a_build_needs_and_nothing_that_was_built(tmp_path):
    run(Path(sys.executable).with_name("maturin"), "sdist", "--out", tmp_path, cwd=PROJECT)
    (sdist,) = tmp_path.iterdir()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "src/lib.rs", "src/python/mod.rs")
    assert {*needed, "PKG-INFO", "python/biascorr/py.typed", "python/biascorr/_kernels.pyi"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("target/", "build/", ".venv/"))]


def test_wheels_are_tested_by_tests_that_exist_on_versions_that_are_claimed():
    workflow = (PROJECT / ".github" / "workflows" / "wheels.yml").read_text()
    tests = set(re.findall(r"tests/\w+\.py", workflow))
    assert len(tests) > 5
    assert all((PROJECT / test).exists() for test in tests)
    project = (PROJECT / "pyproject.toml").read_text()
    claimed = re.findall(r"Python :: (3\.\d+)", project)
    tested = re.findall(r'"(3\.\d+t?)"', re.search(r"python: \[(.*)\]", workflow)[1])
    assert tested == [claimed[0], claimed[-1], f"{claimed[-1]}t"]
    assert f'requires-python = ">={claimed[0]}"' in project


def test_the_version_to_cite_is_the_one_that_is_built():
    version = re.search(r'^version = "(.*)"$', (PROJECT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (PROJECT / "CITATION.cff").read_text()


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
    assert refused.stderr == 'error: the command line needs rich: pip install "biascorr[onnx]" (or tflite, keras)\n'
