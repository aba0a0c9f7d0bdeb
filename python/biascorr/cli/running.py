"""Runs what a command is there for: checks the output, shows progress, answers signals, saves and prints the result."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from biascorr.adapters.loading import check_output_of, check_same_framework, sizes_by_file
from biascorr.calibration.progress import Progress
from biascorr.calibration.storage import TemporaryFolder
from biascorr.cli.signals import Signals, StoppedError, leave
from biascorr.correction.result import Correction
from biascorr.equalization.result import Equalization
from biascorr.report.lines import printable
from biascorr.whole_file import check_output

Result = TypeVar("Result", Correction, Equalization)

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def run(
    work: Callable[[Progress], Result],
    output: Path,
    force: bool,
    print_result: Callable[[Result, Path], None],
    models: Mapping[str, Path | None],
    *data: Path | None,
) -> None:
    """Writes what the work gives and prints it; ends with one line if anything is in the way."""
    signals = Signals()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # lines of TensorFlow would stand among ours
    for message in (".* made the outputs worse", "not folded: "):
        warnings.filterwarnings("ignore", message, UserWarning)  # the notes say it
    warnings.formatwarning = lambda message, *_: f"warning: {_line(message)}\n"
    _replace_what_cannot_be_encoded()
    try:
        _check_output(output, force, models, *data)
        console = Console(stderr=True)
        with _temporary_folder():  # saving may need one too
            with Bar(*_COLUMNS, console=console, disable=not console.is_terminal) as bar:
                task = bar.add_task("", total=None)

                def progress(step: str, done: int, total: int | None) -> None:
                    bar.update(task, description=step, completed=done, total=total)

                result = signals.wait_for(lambda: work(progress))
            result.save(output, force=force)
    except StoppedError as stopped:
        leave(stopped.number, "nothing was written")
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(error)
    signals.leave_from_now_on(f"but {printable(output)} is written")
    try:
        print_result(result, output)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more fails at exit
        if not isinstance(error, BrokenPipeError):  # who reads along may leave
            fail(f"{output} is written, but the report cannot be printed: {error}")


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


def _check_output(output: Path, force: bool, models: Mapping[str, Path | None], *data: Path | None) -> None:
    """The output is another file than all that is read, and has the name and the room for a model like the last one."""
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists; --force overwrites it")
    check_output(output, force=force)
    given = [(path, name) for name, path in models.items() if path is not None]
    if len(given) > 1:
        check_same_framework(given[0][0], given[1][0])
    check_output_of(given[-1][0], output, given[-1][1])
    sizes = list(itertools.starmap(sizes_by_file, given))
    samples = [each.iterdir() if each.is_dir() else [each] for each in data if each is not None]
    for file in itertools.chain(*sizes, *samples):
        if output.exists() and file.exists() and file.samefile(output):
            raise ValueError(f"{output}: it is an input, {file}; give the output another name")
    check_output(output, force=force, size=sum(sizes[-1].values()))


def fail(error: object) -> NoReturn:
    print(f"error: {_line(error)}", file=sys.stderr)
    raise SystemExit(1)


def _line(message: object) -> str:
    """What is wrong, in one line without codes that a terminal would act on."""
    text = " ".join(str(message).split())
    if isinstance(message, MemoryError):
        text = f"out of memory{text and f' ({text})'}; a lower --memory-budget or fewer --threads need less"
    return printable(text or type(message).__name__)
