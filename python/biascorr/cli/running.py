"""Runs what a command is there for: checks the output, shows progress, answers signals, saves and prints the result."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import shlex
import sys
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from biascorr.calibration.progress import Progress
from biascorr.calibration.storage import TemporaryFolder
from biascorr.cli.bar import Bar
from biascorr.cli.options import ModelOptions, ShowOptions
from biascorr.cli.outputs import check_outputs, csv_of, write_text
from biascorr.cli.signals import Signals, StoppedError, leave
from biascorr.report.lines import printable
from biascorr.report.reported import Reported

NOTHING_CORRECTED = 3
"""The status where the output is written although no layer could be corrected."""

_PLAIN = 80
"""Columns of what is no terminal."""


@dataclass(frozen=True)
class Files:
    """The files that a command reads and writes.

    Parameters
    ----------
    models : mapping from str to str or None
        The models that are read, by the names of their parameters; the last one is like the one that is written.
    data : sequence of str or None
        The samples that are read.
    model : ModelOptions, optional
        The model that is written.
    """

    models: Mapping[str, str | None]
    data: Sequence[str | None] = ()
    model: ModelOptions | None = None


def run(work: Callable[[Progress], Any], files: Files, show: ShowOptions, status: Callable[[Any], int] = lambda _: 0) -> None:
    """Writes and prints what the work gives; ends with one line if anything is in the way.

    Parameters
    ----------
    work : callable
        Does it all; is given what it reports progress to.
    files : Files
        What is read and written.
    show : ShowOptions
        What is shown.
    status : callable
        The exit status of a record.
    """
    _check_usage(show)
    signals = Signals()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # lines of TensorFlow would stand among ours
    for message in (".* made the outputs worse", "not folded: ") if not show.quiet else ():
        warnings.filterwarnings("ignore", message, UserWarning)  # the notes say it
    warnings.formatwarning = lambda message, *_: f"warning: {_line(message)}\n"
    _replace_what_cannot_be_encoded()
    outputs = _outputs(files, show)
    written: list[Path] = []
    try:
        check_outputs(files.models, files.data, [show.config], outputs, show.force)
        console = Console(stderr=True)
        with _temporary_folder():  # saving may need one too
            quietly = contextlib.redirect_stdout(sys.stderr)  # what functions of the user's print
            with quietly, Bar(console, not show.quiet) as bar, _logging(console, show.verbose):
                result = signals.wait_for(lambda: work(bar))
            result = dataclasses.replace(result, command=_command())
            _write(result, files, show, outputs, written)
    except StoppedError as stopped:
        leave(stopped.number, "nothing was written")
    except typer.BadParameter:
        raise
    except Exception as error:  # of a function of the user's that makes data, which may raise anything; or an error of ours
        place = _place_of_user(error)
        if place is None and isinstance(error, _EXPECTED):
            fail(f"{_line(error)}, {_state(written)}" if written else error)
        if show.verbose:
            raise
        place = place or traceback.extract_tb(error.__traceback__)[-1]
        fail(f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno}; --verbose shows more)")
    signals.leave_from_now_on(_state(written))
    try:
        record = result.to_dict()
        _print(result, record, show, outputs.get("output"))
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more fails at exit
        if not isinstance(error, BrokenPipeError):  # who reads along may leave
            fail(f"{_state(written).removeprefix('but ')}, but the report cannot be printed: {error}")
    if code := status(record):
        raise SystemExit(code)


_EXPECTED = (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What is raised where something is not as it should be."""

_LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PACKAGE = Path(__file__).parents[1]


def _place_of_user(error: Exception) -> traceback.FrameSummary | None:
    """Where in a function of the user's, called by this package, an error came from; None where it did not."""
    frames = [(frame, Path(frame.filename)) for frame in traceback.extract_tb(error.__traceback__)]
    last = max((number for number, (_, path) in enumerate(frames) if path.is_relative_to(_PACKAGE)), default=-1)
    theirs = [frame for frame, path in frames[last + 1 :] if path.is_file() and not _is_in_library(path)]
    return theirs[-1] if theirs else None


def _is_in_library(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _LIBRARIES)


def fail(error: object) -> NoReturn:
    """Ends with one line that says what is wrong."""
    print(f"error: {_line(error)}", file=sys.stderr)
    raise SystemExit(1)


def _line(message: object) -> str:
    """What is wrong, in one line without codes that a terminal would act on."""
    text = " ".join(str(message).split())
    if isinstance(message, MemoryError):
        text = f"out of memory{text and f' ({text})'}; a lower --memory-budget or fewer --threads need less"
    return printable(text or type(message).__name__)


def _check_usage(show: ShowOptions) -> None:
    if show.quiet and show.verbose:
        raise typer.BadParameter("not with --quiet", param_hint="--verbose")
    if show.json and show.csv == "-":
        raise typer.BadParameter("stdout is taken by --json; give --csv a file", param_hint="--csv")


def _command() -> str:
    return shlex.join(["biascorr", *sys.argv[1:]])


def _outputs(files: Files, show: ShowOptions) -> dict[str, Path]:
    """The files that are written, by their options."""
    given = {
        "output": None if files.model is None else files.model.output,
        "csv": None if show.csv in (None, "-") else Path(str(show.csv)),
        "report": show.report,
    }
    return {option: path for option, path in given.items() if path is not None}


def _write(result: Any, files: Files, show: ShowOptions, outputs: Mapping[str, Path], written: list[Path]) -> None:
    """Writes all files, and adds each to those that are written when it is there."""
    if files.model is not None:
        result.save(files.model.output, force=show.force, provenance=files.model.provenance)
        written.append(files.model.output)
    if "csv" in outputs:
        write_text(outputs["csv"], csv_of(result.to_dict()), force=show.force)
        written.append(outputs["csv"])
    if show.report is not None:
        result.save_report(show.report, force=show.force)
        written.append(show.report)


def _state(written: Sequence[Path]) -> str:
    """What is written, for who stops what comes after."""
    names = list(map(printable, written))
    return f"but {' and '.join(names)} {'is' if len(names) == 1 else 'are'} written" if names else "nothing was written"


def _print(result: Reported, record: dict[str, Any], show: ShowOptions, output: Path | None) -> None:
    if show.json:
        print(result.to_json(), flush=True)
    elif show.csv == "-":
        print(csv_of(record), end="", flush=True)
    elif not show.quiet:
        from biascorr.report.terminal import render

        out = io.StringIO()
        console = _Console() if sys.stdout.isatty() else Console(file=out, width=_columns())
        render(record, console, output=None if output is None else str(output), all_rows=show.verbose)
        print("".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines()), end="", flush=True)


def _columns() -> int:
    """The columns of what is no terminal: those that are asked for, as far as they are a number."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else _PLAIN


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Lets the caller know, where rich would end with an error."""
        raise


class _Handler(logging.Handler):
    """Prints what is logged above the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(_line(record.getMessage())), soft_wrap=True)


@contextlib.contextmanager
def _logging(console: Console, is_wanted: bool) -> Iterator[None]:
    """Shows what is logged."""
    if not is_wanted:
        yield
        return
    logger, handler = logging.getLogger("biascorr"), _Handler(console)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """Has all temporary folders made inside one, which can be removed while a thread still writes there.

    It stays where they are made, or that thread would go on elsewhere.
    """
    try:
        folder = TemporaryFolder()
    except OSError:  # a run within its memory budget needs none
        yield
        return
    tempfile.tempdir = str(folder.path)
    try:
        yield
    finally:
        folder.cleanup()


def _replace_what_cannot_be_encoded() -> None:
    """Names of layers may have letters that the terminal has not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
