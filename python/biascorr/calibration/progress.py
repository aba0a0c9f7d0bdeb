"""How far all of the work is: a plan of what is left, whose pace is learned as it is done.

    share = elapsed / (elapsed + left)       left = sum over kinds of work of units * seconds per unit

The seconds per unit of a kind are those that were measured; as long as few were, its usual cost times the pace of all others.
The share that is reported never falls back, whatever turns out to be more than was planned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

LOGGER = logging.getLogger("biascorr")
"""Steps with their seconds and what was found at INFO, parts of steps at DEBUG."""

LOGGER.addHandler(logging.NullHandler())

Progress = Callable[[str, int, "int | None"], None]
"""Called with the step, how much of all the work is done, and how much there is: 1000; None while nobody knows how many samples
there are, when those that were read are counted. The share never falls back.
"""

WHOLE = 1000
"""What all of the work is in the units of :data:`Progress`."""

PREPARING = "preparing"
"""The kind of work that makes a part of a network ready to run: for few samples, it takes longer than they do."""

_READING = {"reading samples", "reading validation samples"}
"""Kinds whose pace says nothing of that of others."""

_READ = 0.05
"""The share of the work that reading is taken for, before anything else is known."""

_COSTS = dict.fromkeys(_READING, 0.05) | {
    PREPARING: 2.0,
    "deployed": 0.7,
    "layers": 1.2,
    "mean": 1.3,
    "iterative": 2.0,
    "activation": 2.5,
    "squared": 6.0,
}
"""What a unit of a kind usually costs, a batch mostly; 1 is a run of the float network (measured, on PP-OCR's detector)."""

_DOUBT = 4.0
"""Units of a kind that weigh as much as what is known of all others: the first ones take longer, as runtimes prepare."""


class Work:
    """The work that is planned and done, reported step by step.

    Parameters
    ----------
    progress : callable, optional
        See :data:`Progress`.
    clock : callable
        The time in seconds.
    """

    def __init__(self, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._start = self._mark = clock()
        self._left: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._share = 0.0
        self._label = self._kind = ""

    @classmethod
    def of(cls, progress: Progress | Work | None) -> Work:
        """The work that a callable is told of; the same, where it is work."""
        return progress if isinstance(progress, Work) else cls(progress)

    @property
    def label(self) -> str:
        """The step that is being done."""
        return self._label

    def plan(self, left: Mapping[str, float]) -> None:
        """What is left from now on: units by kind."""
        self._left = dict(left)

    def expect(self, left: Mapping[str, float]) -> None:
        """So much is left of some kinds of work."""
        self._left |= left

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Takes a note of a step that counts itself, and is a kind of its own."""
        outer, self._label = self._label, label
        self._note(label, done - self._done.get(label, 0.0))
        self._left[label] = 0 if total is None else max(0, total - done)
        self._report(counted=done if total is None else None)
        self._label = outer

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """What is done inside is this step; steps may be inside of others."""
        before, self._label = self._label, label
        self._report()
        start = self._clock()
        yield
        LOGGER.info("%s: %.2f s", label, self._clock() - start)
        self._label = before

    @contextmanager
    def doing(
        self, kind: str, units: float, label: str | None = None, *, prepared: float = 0.0
    ) -> Iterator[Callable[..., None]]:
        """So many units of a kind are done inside, and so many parts of a network are prepared to run.

        What is inside calls what it gets with the part of these that is done, and with the seconds of preparations.
        """
        outer = self._label, self._kind
        self._note(self._kind, 0.0)
        self._label, self._kind = label or self._label, kind
        inside = {kind: units} | ({PREPARING: prepared} if prepared else {})
        self._left |= {each: max(count, self._left.get(each, 0.0)) for each, count in inside.items()}
        after = {each: self._left[each] - count for each, count in inside.items()}

        def advance(part: float, seconds: float = 0.0) -> None:
            self._mark += seconds
            self._note(kind, part * units)
            self._mark -= seconds
            if prepared:
                self._note(PREPARING, part * prepared)
            self._report()

        self._report()
        start = self._clock()
        yield advance
        LOGGER.debug("%s%s: %.3f s", kind, f" ({self._label})" * (self._label not in ("", kind)), self._clock() - start)
        self._note(kind, 0.0)
        self._left |= after
        self._label, self._kind = outer

    def each(self, items: Iterator[T], kind: str, count: int, label: str | None = None) -> Iterator[T]:
        """Items of which each is a unit of a kind, done when the next one is asked for."""
        with self.doing(kind, count, label) as advance:
            try:
                for item in items:
                    yield item
                    advance(1 / count)
            finally:
                del items  # threads of what makes them end with it, also where a traceback keeps this frame

    def _note(self, kind: str, units: float) -> None:
        now = self._clock()
        if not kind:
            self._mark = now
            return
        self._done[kind] = self._done.get(kind, 0.0) + units
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._mark
        self._mark = now
        if kind in self._left:
            self._left[kind] = max(0.0, self._left[kind] - units)

    def _report(self, counted: int | None = None) -> None:
        if self._progress is None:
            return
        self._share = max(self._share, min(self._estimate(), 1 - 1 / WHOLE))
        if counted is not None:
            self._progress(self._label, counted, None)
        else:
            self._progress(self._label, int(self._share * WHOLE), WHOLE)

    def _estimate(self) -> float:
        elapsed, left = self._clock() - self._start, self._seconds_left()
        if left is not None:
            return elapsed / (elapsed + left) if left else 1.0
        read = {kind: self._done[kind] for kind in _READING & self._done.keys()}
        return max((_READ * done / (done + self._left.get(kind, 0.0)) for kind, done in read.items()), default=0.0)

    def _seconds_left(self) -> float | None:
        """None before anything but reading is known."""
        known = [kind for kind, units in self._done.items() if units and kind not in _READING]
        cost = sum(self._done[kind] * _COSTS.get(kind, 1.0) for kind in known)
        if not cost:
            return None
        pace = sum(self._seconds[kind] for kind in known) / cost
        return sum(units * self._pace_of(kind, _COSTS.get(kind, 1.0) * pace) for kind, units in self._left.items())

    def _pace_of(self, kind: str, usual: float) -> float:
        """Seconds of a unit."""
        return (self._seconds.get(kind, 0.0) + _DOUBT * usual) / (self._done.get(kind, 0.0) + _DOUBT)
