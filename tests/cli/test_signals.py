"""Ctrl-C and its kind, at any time: one line, the status of the signal, nothing left behind."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from command_line import COMMAND, GIVEN, environment, names_in


def read_until(terminal, pattern):
    """What a process shows on a terminal, until it shows a pattern or ends."""
    shown = b""
    with contextlib.suppress(OSError):  # the process has ended
        while not re.search(pattern, shown) and (part := os.read(terminal, 4096)):
            shown += part
    return shown


def spilled(folder):
    """The folders of activations beyond the budget."""
    return list(folder.glob("biascorr-*/biascorr-*"))


def left_in(folder):
    """What should be gone; onnxruntime keeps a file of its own beside it."""
    return list(folder.glob("biascorr-*"))


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -signal.SIGKILL)]
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "status", "existing", "command"),
    [
        *((*each, False, "correct") for each in SIGNALS),
        (signal.SIGINT, 130, True, "correct"),
        (signal.SIGINT, 130, True, "equalize"),
    ],
)
def test_signal_during_a_run_leaves_no_output_and_no_temporary_file(
    number, status, existing, command, folder, tmp_path_factory
):
    many = np.lib.format.open_memmap(folder / "many.npy", "w+", np.float32, (300_000, 3, 6, 6))
    del many  # a sparse file of zeros
    if existing:
        (folder / "out.onnx").write_bytes(b"precious")
    before = names_in(folder)
    ours, theirs = pty.openpty()
    arguments = [command, "models/float.onnx", "--data", "many.npy", "-o", "out.onnx", "--force", "--memory-budget", "1MB"]
    arguments += ["--max-samples", "300000"]
    temporary = tmp_path_factory.mktemp("temporary")
    process = subprocess.Popen(
        [COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(TMPDIR=str(temporary)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    try:
        shown = read_until(ours, rb"samples: [1-9]")
        while not spilled(temporary):
            shown += os.read(ours, 4096)
        process.send_signal(number)
        shown += read_until(ours, rb"\0")
        printed, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == status, shown
    assert b"Traceback" not in shown
    assert printed == b""
    lines = [f"error: {ENDED[number]}, nothing was written".encode()] if number in ENDED else []
    assert re.findall(rb"error: [^\r\n]*", shown) == lines
    assert names_in(folder) == before
    assert number is signal.SIGKILL or left_in(temporary) == []
    assert not existing or (folder / "out.onnx").read_bytes() == b"precious"


SIGNALLING = """
import os, pkgutil, sys
from biascorr.__main__ import main

def signal_after(number, place):
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    plain = getattr(owner, name)

    def called(*arguments, **options):
        setattr(owner, name, plain)
        result = plain(*arguments, **options)
        os.kill(os.getpid(), number)
        return result

    setattr(owner, name, called)

signal_after(int(sys.argv.pop(1)), sys.argv.pop(1))
main()
"""
"""Runs the command; a signal comes right after the first call of a function."""

MOMENTS = {
    "the command starts": ("typer.Typer", "nothing was written"),
    "a folder is made": ("pathlib.Path.mkdir", "nothing was written"),
    "the bar is shown": ("rich.progress.Progress.start", "nothing was written"),
    "the output is in its place": ("pathlib.Path.hardlink_to", "but out.onnx is written"),
    "the report is made": ("biascorr.report.terminal.render", "but out.onnx is written"),
}


def run_and_signal(number, place, folder, *, answer, command="correct", **variables):
    """The command with its output; `answer` is how the process that starts it answers the signal."""
    arguments = (command, "models/float.onnx", "--data", "data/good.npy", "-o", "out.onnx", "--memory-budget", "1kB")
    return subprocess.run(
        [sys.executable, "-c", SIGNALLING, str(int(number)), place, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**variables),
        preexec_fn=lambda: signal.signal(number, answer),
        timeout=60,
    )


@pytest.mark.parametrize("number", ENDED)
@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_at_a_bad_moment(moment, number, folder, tmp_path_factory):
    place, state = MOMENTS[moment]
    temporary = tmp_path_factory.mktemp("temporary")
    done = run_and_signal(number, place, folder, answer=signal.SIG_DFL, TMPDIR=str(temporary))
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines() == [f"error: {ENDED[number]}, {state}"]
    assert names_in(folder) == GIVEN + ["out.onnx"] * state.startswith("but")
    assert left_in(temporary) == []


@pytest.mark.parametrize("number", ENDED)
def test_signal_that_another_thread_takes_is_noticed_soon(number, folder):
    code = """
import signal, sys, threading, time
from biascorr.__main__ import main
from biascorr.correction import correct

def endless(*_):
    signal.pthread_kill(threading.get_ident(), number)
    time.sleep(60)

number = int(sys.argv.pop())
correct.check_options = endless
main()
"""
    arguments = ["correct", "models/float.onnx", "--data", "data/good.npy", "-o", "out.onnx", str(int(number))]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, cwd=folder, timeout=30
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"error: {ENDED[number]}, nothing was written\n"
    assert names_in(folder) == GIVEN


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "biascorr"]], ids=["script", "module"])
@pytest.mark.parametrize("number", ENDED)
def test_signal_while_packages_are_imported_is_one_line(number, command, folder):
    (folder / "numpy.py").write_text("import os, time\nos.kill(os.getpid(), int(os.environ['NUMBER']))\ntime.sleep(30)\n")
    variables = {"PYTHONPATH": str(folder), "NUMBER": str(int(number))}
    done = subprocess.run(
        [*command, "--version"], check=False, capture_output=True, text=True, env=environment(**variables), timeout=30
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"error: {ENDED[number]}, nothing was written\n"


EQUALIZING = {
    "the bar is shown": ("rich.progress.Progress.start", "nothing was written"),
    "the report is made": ("biascorr.report.terminal.render", "but out.onnx is written"),
}


@pytest.mark.parametrize("moment", EQUALIZING)
def test_interrupt_of_equalization_at_a_bad_moment(moment, folder, tmp_path_factory):
    place, state = EQUALIZING[moment]
    temporary = tmp_path_factory.mktemp("temporary")
    done = run_and_signal(signal.SIGINT, place, folder, answer=signal.SIG_DFL, command="equalize", TMPDIR=str(temporary))
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: interrupted, {state}"
    assert names_in(folder) == GIVEN + ["out.onnx"] * state.startswith("but")
    assert left_in(temporary) == []


def test_interrupt_that_is_ignored_where_the_command_starts_stays_so(folder):
    done = run_and_signal(signal.SIGINT, "rich.progress.Progress.start", folder, answer=signal.SIG_IGN)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.onnx").is_file()
