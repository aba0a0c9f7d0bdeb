"""Corrections from four times as many samples as there is memory, in a control group that ends what takes more."""

import hashlib
import os
import signal
import sys

import numpy as np
import onnx
import pytest

import beyond_memory
from beyond_memory import SHAPE, made, memory_group, model, run_in
from biascorr import QuantParams, correct

PROGRAM = [sys.executable, beyond_memory.__file__]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The samples as a file, 768 MB, and the model."""
    place = tmp_path_factory.mktemp("samples")
    beyond_memory.write(place / "x.npy")
    onnx.save(model(), place / "net.onnx")
    yield place
    (place / "x.npy").unlink()


@pytest.fixture(scope="module")
def group():
    with memory_group() as found:
        if found is None:
            pytest.skip("no control group can be made here")
        yield found


@pytest.fixture(scope="module")
def expected(folder):
    """With all of the memory of this machine."""
    return correct(model(), np.load(folder / "x.npy"), quant_params=QuantParams(), method="mean")


def test_the_group_ends_what_takes_more(folder, group):
    assert run_in(group, [*PROGRAM, str(folder), "array", "1"], env=ENVIRONMENT, timeout=120).returncode == -signal.SIGKILL


@pytest.mark.parametrize(("kind", "batch_size"), [("memory-mapped", 1), ("generator", 8), ("zarr", 1)])
def test_samples_beyond_memory_have_the_result_of_those_in_memory(kind, batch_size, folder, group, expected):
    if kind == "zarr":
        zarr = pytest.importorskip("zarr", "3")
        array = zarr.create_array(folder / "x.zarr", shape=SHAPE, chunks=(4, *SHAPE[1:]), dtype="f4", compressors=None)
        for number in range(0, SHAPE[0], 4):
            array[number : number + 4] = np.stack([made(k) for k in range(number, number + 4)])
    done = run_in(group, [*PROGRAM, str(folder), kind, str(batch_size)], env=ENVIRONMENT, timeout=240)
    digest = hashlib.sha256(expected.model.SerializeToString()).hexdigest()
    assert (done.returncode, done.stdout) == (0, f"{digest} {expected.data_digest}\n"), done.stderr


def test_the_command_reads_a_file_larger_than_memory(folder, group, expected):
    options = ["--data", "x.npy", "--batch-size", "8", "--method", "mean", "-o", "out.onnx"]
    command = [sys.executable, "-m", "biascorr", "correct", "net.onnx", *options]
    done = run_in(group, command, cwd=folder, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert onnx.load(folder / "out.onnx").graph == expected.model.graph
