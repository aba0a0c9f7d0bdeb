"""How the command answers SIGINT (Ctrl-C), SIGTERM and SIGHUP: it ends soon, with one line, and leaves nothing behind.

A handler that raises does so between any two instructions of the main thread: where a lock has just been taken, which then
stays taken and other threads wait forever; where a folder has just been made that nobody knows of yet; in a callback or the
start of an extension module, where the exception is swallowed or becomes another. So no handler raises: while there is
nothing to clean up, it ends the process; from then on it only takes a note, and the main thread waits for one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

_ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if sys.platform != "win32":
    _ENDED[signal.SIGHUP] = "hung up"
_SOON = 0.1
"""Seconds that a wait may take: another thread may be the one that the system interrupts, and the main one sleep on."""


class StoppedError(Exception):
    """A signal came while work was being done, which may go on until the process ends.

    Parameters
    ----------
    number : int
        The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Takes a note of signals, from here on."""

    def __init__(self) -> None:
        self._events: SimpleQueue[int | Future[Any]] = SimpleQueue()  # a handler may interrupt its methods
        _answer(self._events.put)

    def wait_for(self, work: Callable[[], T]) -> T:
        """The result of the work, which another thread does. Raises StoppedError as soon as there is a signal."""
        from concurrent.futures import Future, ThreadPoolExecutor  # takes longer than all else here

        ThreadPoolExecutor(1).submit(work).add_done_callback(self._events.put)
        while True:
            with contextlib.suppress(Empty):
                event = self._events.get(timeout=_SOON)
                break
        if isinstance(event, Future):
            result: T = event.result()
            return result
        raise StoppedError(event)

    def leave_from_now_on(self, state: str) -> None:
        """Signals end the process, also one that has been noted; see :func:`leave`."""
        leave_on_signals(state)
        noted = None if self._events.empty() else self._events.get()
        if isinstance(noted, int):
            leave(noted, state)


def leave_on_signals(state: str) -> None:
    """Signals end the process; see :func:`leave`."""
    _answer(lambda number: leave(number, state))


def leave(number: int, state: str) -> NoReturn:
    """Ends the process whatever its threads do, with a line that tells the state of the output, as a signal ends a command."""
    with contextlib.suppress(OSError):  # who read along may be gone
        os.write(2, f"error: {_ENDED[signal.Signals(number)]}, {state}\n".encode(errors="replace"))
    os._exit(128 + number)


def _answer(answer: Callable[[int], object]) -> None:
    for number in _ENDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell lets what runs in the background ignore Ctrl-C
            signal.signal(number, lambda number, _: answer(number))
