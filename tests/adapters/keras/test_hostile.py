"""Changed .keras files, some of them: read, or refused with an error that says why; `make fuzz TARGET=keras` tries more."""

import subprocess
import sys
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent.parent.parent / "hostile.py"


@pytest.mark.slow
def test_changed_files_are_read_or_refused():
    """In a process of its own, which may crash."""
    run = subprocess.run([sys.executable, HOSTILE, "keras", "8", "0"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
