"""Temporary folders: of this process alone, removed with it or by the next one; a full disk is said with the remedy."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from biascorr.calibration.storage import Storage, TemporaryFolder

HOLD = """
import sys, time
import numpy as np
from biascorr.calibration.storage import Storage
with Storage(0) as storage:
    storage["x"] = np.ones(10)
    print(storage._folder.path, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def held():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_folders_of_processes_that_were_killed_are_removed_by_the_next(place):
    killed, abandoned = held()
    running, used = held()
    (place / "biascorr-of-nobody").mkdir()
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert abandoned.exists()
        folder = TemporaryFolder()
        assert not abandoned.exists()
        assert used.exists()
        assert {path.name for path in place.iterdir()} == {used.name, folder.path.name, "biascorr-of-nobody"}
        folder.cleanup()
        assert not folder.path.exists()
    finally:
        for process in (killed, running):
            process.kill()
            process.wait()
            process.stdout.close()


def test_links_and_files_are_left_alone(place, tmp_path_factory):
    precious = tmp_path_factory.mktemp("precious")
    (precious / ".lock").write_bytes(b"")
    (place / "biascorr-link").symlink_to(precious)
    (place / "biascorr-file").write_bytes(b"")
    TemporaryFolder().cleanup()
    assert (precious / ".lock").exists()
    assert sorted(path.name for path in place.iterdir()) == ["biascorr-file", "biascorr-link"]


def test_a_full_disk_is_said_with_the_remedy(place, monkeypatch):
    def full(*_, **__):
        raise OSError("3072 requested and 3040 written")

    monkeypatch.setattr(np, "save", full)
    with Storage(0) as storage, pytest.raises(OSError, match="requested.*memory_budget.*TMPDIR") as raised:
        storage["x"] = np.ones(10)
    assert str(place) in str(raised.value) or str(place) in str(raised.value.filename)
    assert raised.value.errno in (None, errno.ENOSPC)
    assert not list(place.iterdir())
