"""The command line in this process, as quick as a call, and in one of its own."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from biascorr.cli.app import app

COMMAND = Path(sys.executable).with_name("biascorr")

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    returncode: int
    stdout: str
    stderr: str


def environment(**variables):
    return os.environ | {"COLUMNS": "200", "TERM": "xterm"} | variables


def run(*arguments, cwd, **variables):
    """The command in this process."""
    arguments = list(map(str, arguments))
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    answers = {number: signal.getsignal(number) for number in ANSWERED}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd) if sys.version_info >= (3, 11) else _changed_folder(cwd))
        stack.enter_context(mock.patch.dict(os.environ, environment(**variables), clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["biascorr", *arguments]))
        stack.enter_context(mock.patch.object(warnings, "formatwarning"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(mock.patch.object(warnings, "showwarning", _show))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", variables.get("TMPDIR")))
        warnings.resetwarnings()
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            app(arguments, prog_name="biascorr")
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        finally:
            for number, answer in answers.items():
                signal.signal(number, answer)
    return Done(code, *(each.buffer.getvalue().decode("utf-8", "replace") for each in (out, err)))


def _show(message, category, filename, lineno, *_):
    """Shows a warning as it is shown where no test records it."""
    print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)


@contextlib.contextmanager
def _changed_folder(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def start(*arguments, cwd, limit=None, **variables):
    """The command in a process of its own; `limit` is the size in bytes that a file may have."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        preexec_fn=limit_files if limit else None,
    )


GIVEN = ["data", "models"]
"""What is in the folder of a test before a command runs."""


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_one_error(done, status=1):
    """One line says what is wrong, the last one."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("error: ")
    assert len(lines[-1]) > len("error: ")
