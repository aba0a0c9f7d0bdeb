"""Exceptions and Ctrl-C in the middle of work: they come out as they are, nothing is left, and the next call works."""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import workload
from biascorr import ChannelMean, prepare_input_mean
from biascorr.calibration.storage import Storage
from networks import samples


class FaultError(Exception):
    """Of a kind that nobody else knows."""


FAULTS = [
    FaultError("of the disk"),
    MemoryError("of the loader"),
    KeyboardInterrupt(),
    SystemExit(3),
    OSError(5, "of the network"),
]


def raising(fault, after):
    """Batches, and then an exception."""
    yield from np.split(samples(12, 3, 6, 6), 12)[:after]
    raise fault


def stopping(fault, calls):
    """A callback that raises when it is called so often."""
    left = [calls]

    def progress(*_):
        left[0] -= 1
        if not left[0]:
            raise fault

    return progress


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """Checks that nothing is left of what a test did."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = workload.correction()
    before = workload.left()
    yield
    assert workload.left() == before
    assert workload.correction() == expected


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("after", [0, 5])
def test_data_that_raises(fault, after):
    with pytest.raises(type(fault)) as raised:
        workload.correction(raising(fault, after))
    assert raised.value is fault
    with pytest.raises(type(fault)) as raised:
        prepare_input_mean(raising(fault, after), None)
    assert raised.value is fault


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("calls", [1, 14, 40])
def test_a_callback_that_raises(fault, calls):
    with pytest.raises(type(fault)) as raised:
        workload.correction(method="auto", progress=stopping(fault, calls))
    assert raised.value is fault


@contextlib.contextmanager
def interrupted_at(number, file):
    """KeyboardInterrupt comes at this line, counted as they run in this file; gives what tells whether it came."""
    left = [number]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(file):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: left[0] <= 0
    finally:
        sys.settrace(before)


@pytest.mark.timeout(60)
def test_an_interrupted_update_is_whole_or_nothing():
    """At moments of chance, as signals come: a line may be half done."""
    sample, rng = np.ones((2, 3), np.int8), np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(1000):
            mean = ChannelMean()
            mean.update(sample)
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-4))
                while True:
                    mean.update(sample)
            mean.update(sample)  # no lock is held
            assert f" {mean.count // 2} samples, {mean.count} positions>" in repr(mean)
            assert mean.mean().tolist() == [1.0] * 3
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("clean")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may come in a finalizer
def test_an_interrupt_leaves_no_temporary_folder():
    def stored():
        with Storage(0) as storage:
            storage["x"] = np.ones(3)
            storage["y"] = storage["x"]

    for line in range(1, 300):
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(line, "storage.py") as came:
            stored()
        assert list(Path(tempfile.gettempdir()).iterdir()) == []
        if not came():
            return
    pytest.fail("a storage has no end")


@pytest.mark.usefixtures("clean")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # forking beside threads is the point
def test_a_forked_child_leaves_the_folder_to_its_parent():
    with Storage(0) as storage:
        storage["x"] = np.ones(3)
        child = os.fork()
        if not child:
            storage.__exit__()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert storage["x"].tolist() == [1.0] * 3
