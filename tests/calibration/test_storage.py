"""Temporary folders: of this process alone, removed with it or by the next one; a full disk is said with the remedy."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from biascorr.calibration import storage as module
from biascorr.calibration.storage import Storage, TemporaryFolder, _remove_abandoned

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
    assert raised.value.errno == errno.ENOSPC
    assert not list(place.iterdir())


def test_a_folder_in_memory_that_is_full_is_said_before_it_ends_the_process(place, monkeypatch):
    monkeypatch.setattr(module, "is_in_memory", lambda _: True)
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    with Storage(0) as storage:
        storage["x"] = np.ones(10)
        with pytest.raises(OSError, match="in memory, which is full; set TMPDIR to a folder on a disk") as raised:
            storage["y"] = np.ones(100)
        assert raised.value.errno == errno.ENOSPC
        assert str(place) in raised.value.filename
        np.testing.assert_array_equal(storage["x"], np.ones(10))


@pytest.mark.parametrize(
    ("in_memory", "chosen", "expected"),
    [
        ({"/tmp"}, {}, "/var/tmp"),
        ({"/tmp", "/var/tmp"}, {}, "/tmp"),
        (set(), {}, "/tmp"),
        ({"/tmp"}, {"TMPDIR": "/tmp"}, "/tmp"),
    ],
)
def test_the_temporary_folder_is_on_a_disk_unless_one_is_chosen(in_memory, chosen, expected, monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setattr(module, "is_in_memory", lambda folder: str(folder) in in_memory)
    assert module._place() == Path(expected)


@pytest.mark.usefixtures("place")
def test_no_more_is_held_than_leaves_room(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 100)
    with Storage(1000) as storage:
        storage["x"] = np.ones(10)
        storage.leave(60)
        assert storage.free == 40
        storage.leave(500)
        assert storage.free == 0
        storage["y"] = np.ones(1)
        assert storage.holds("x")
        assert not storage.holds("y")


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.usefixtures("place")
def test_what_is_lent_takes_nothing_and_stays_with_its_owner(budget):
    with Storage(budget) as owner, Storage(budget) as other:
        owner["x"] = np.ones(10)
        free = other.free
        owner.lend("x", other)
        np.testing.assert_array_equal(other["x"], np.ones(10))
        assert other.free == free
        assert other.holds("x") == owner.holds("x")
        assert other.pop("x") is None
        assert "x" not in other
        np.testing.assert_array_equal(owner["x"], np.ones(10))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_a_lock_that_is_no_file_hangs_nobody(make, place):
    (place / "biascorr-of-a-joker").mkdir()
    make(place / "biascorr-of-a-joker/.lock")
    TemporaryFolder().cleanup()


def test_folders_of_others_are_not_even_opened(place, monkeypatch):
    (place / "biascorr-of-another").mkdir()
    (place / "biascorr-of-another/.lock").write_bytes(b"")
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it is of another user"))
    _remove_abandoned(place)
    assert (place / "biascorr-of-another/.lock").exists()


def test_without_fcntl_no_file_is_open_where_folders_are_renamed(place, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    folder = TemporaryFolder()
    assert not [*folder.path.iterdir()]
    folder.cleanup()
    assert not [*place.iterdir()]


@pytest.mark.usefixtures("place")
def test_a_place_without_locks_keeps_its_folders(monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = TemporaryFolder(), TemporaryFolder()
    assert first.path.exists()
    for folder in (first, second):
        folder.cleanup()
