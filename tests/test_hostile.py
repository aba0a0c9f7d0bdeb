"""Changed files, some of each kind: read, or refused with an error that says why. `make fuzz` goes on from there."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNTS = {"config": 60, "npy": 200, "npz": 100, "onnx": 100, "tflite": 25}


@pytest.mark.parametrize(("reader", "count"), COUNTS.items())
def test_changed_files_are_read_or_refused(reader: str, count: int):
    """In a process of its own, which may crash."""
    script = Path(__file__).with_name("hostile.py")
    run = subprocess.run([sys.executable, script, reader, str(count), "0"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
