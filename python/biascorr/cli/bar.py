"""The bar: how far all of the work is, what is being done, and how long the rest will take."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from biascorr.report.lines import elided

_STEP = 34
"""Columns of the step."""

_KNOWN = 0.03
"""The share of the work from which on the time that is left is told."""


class Bar:
    """One bar for all of the work, there from the first report on until the work is done or fails; on a terminal alone.

    Parameters
    ----------
    console : Console
        Where it is shown.
    is_shown : bool
        Whether it is, where that is a terminal.
    """

    def __init__(self, console: Console, is_shown: bool = True) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), _Share(), TimeElapsedColumn(), _Left())
        is_disabled = not (is_shown and console.is_terminal)
        self._bar = Progress(*columns, console=console, transient=True, disable=is_disabled, expand=True)
        self._task = self._bar.add_task("", total=None, start=False)
        self._began = time.monotonic()
        self._is_started = self._is_done = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._is_done = True
        if self._is_started:
            self._bar.stop()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """See :data:`biascorr.calibration.progress.Progress`; called by another thread, maybe also when all is over."""
        if self._is_done:
            return
        now, share = time.monotonic(), 0.0 if total is None else done / total
        ends = now + (now - self._began) * (1 - share) / share if share > _KNOWN else None
        what = f"{step}: {done}" if total is None else step
        description = elided(what, _STEP).ljust(_STEP)  # so that the bar stays where it is
        self._bar.update(self._task, description=description, completed=done, total=total, ends=ends)
        if not self._is_started:
            self._is_started = True
            self._bar.start_task(self._task)
            self._bar.start()


class _Share(ProgressColumn):
    """The share of the work that is done."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:3.0f}%")


class _Left(ProgressColumn):
    """The time that the rest will take."""

    def render(self, task: Task) -> Text:
        ends = task.fields.get("ends")
        if ends is None or task.total is None:
            return Text("")
        left = max(0, round(ends - time.monotonic()))
        return Text(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
