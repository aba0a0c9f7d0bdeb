"""Times a row: all of its expressions and the machine's read bandwidth, in bursts that take turns."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import set_num_threads

Array = NDArray[Any]
Expression = Callable[[], Any]

BURST_SECONDS, REST_SECONDS = 0.06, 0.05
SLOW_SECONDS, ENOUGH_SECONDS = 0.1, 0.5
"""Seconds of a call that needs no warming up, and of the bursts of an expression that are enough."""
HOPELESS = 2
"""An expression whose first call takes so many times as long as the fastest is not timed."""

PROBE_BYTES = 128 << 20
"""Bytes that a call of the probe reads at least, so that starting its threads does not count."""


@dataclass(frozen=True)
class Row:
    """Expressions with the same result to time: ours, the code that a user would write, and better numpy.

    `bytes_read` is what ours has to read. Where `calls` is set, that is so little that not
    the rate is reported, but the time divided by `calls`.
    """

    ours: Expression
    twin: Expression
    numpy: dict[str, Expression]
    bytes_read: int
    torch: Expression | None = None
    atol: float = 1e-4
    calls: int = 0


Rows = Iterator[tuple[str, Callable[[], Row]]]
"""Names of rows, and functions that make them: arrays live only while their row is timed."""


@dataclass(frozen=True)
class Times:
    """Seconds of a row: of ours and of reading the same bytes, by number of threads; of the others."""

    ours: dict[int, float]
    probe: dict[int, float]
    twin: float
    torch: float | None
    best: float
    best_name: str


def measured(row: Row, threads: list[int], bursts: int, largest: int) -> Times:
    """The times of a row, after a check that all expressions agree with the twin."""
    numpy = {name: row.numpy[name] for name in contenders(row)}
    expressions = {(name, 0): expression for name, expression in numpy.items()} | {("twin", 0): row.twin}
    if row.torch:
        expressions["torch", 0] = row.torch
    nbytes = min(row.bytes_read, largest)
    for count in threads:
        expressions["ours", count] = row.ours
        if not row.calls:
            expressions["probe", count] = probe(words(largest)[: nbytes // 8], count)
    times = seconds(expressions, bursts)
    best = min(numpy, key=lambda name: times[name, 0])
    return Times(
        {count: times["ours", count] for count in threads},
        {count: times.get(("probe", count), 0.0) / repeats(nbytes) * row.bytes_read / nbytes for count in threads},
        times["twin", 0],
        times.get(("torch", 0)),
        times[best, 0],
        best,
    )


def contenders(row: Row) -> list[str]:
    """The numpy expressions that may be the fastest. Raises AssertionError where ours or one of them is not accurate."""
    expected = row.twin()
    first = {}
    for name, expression in {"ours": row.ours, "torch": row.torch, **row.numpy}.items():
        if expression:
            start = time.perf_counter()
            result = expression()
            first[name] = time.perf_counter() - start
            np.testing.assert_allclose(result, expected, rtol=0, atol=row.atol, err_msg=name)
    limit = max(HOPELESS * min(first[name] for name in row.numpy), 1e-3)  # where a first call says nothing
    return [name for name in row.numpy if first[name] < limit]


def seconds(expressions: dict[tuple[str, int], Expression], bursts: int) -> dict[tuple[str, int], float]:
    """Median time of a call of each expression, by name and number of biascorr's threads (0: it uses none).

    Bursts take turns, so that noise meets all alike. Before each the threads of numpy's BLAS get time to stop spinning; its
    first call warms up and does not count, unless it is slow; calls of microseconds are timed in batches.
    """
    times: dict[tuple[str, int], list[float]] = {key: [] for key in expressions}
    for burst in range(bursts):
        for key, expression in expressions.items():
            if burst and sum(times[key]) > ENOUGH_SECONDS:
                continue
            if threads := key[1]:
                set_num_threads(threads)
            time.sleep(REST_SECONDS)
            first = duration(expression, 1)
            if first > SLOW_SECONDS:
                times[key].append(first)
                continue
            batch = max(1, int(1e-3 / max(first, 1e-9)))
            end = time.perf_counter() + BURST_SECONDS
            while time.perf_counter() < end:
                times[key].append(duration(expression, batch))
    return {key: statistics.median(each) for key, each in times.items()}


def duration(expression: Expression, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        expression()
    return (time.perf_counter() - start) / calls


def probe(array: Array, threads: int) -> Expression:
    """Reads the array, `repeats` times over, as fast as numpy can: an or of 64-bit words, which releases the GIL.

    What is read once is cut into more pieces than threads, so that a thread which is held up leaves some to the others.
    """
    times = repeats(array.nbytes)
    parts = np.array_split(array, threads * (8 if times == 1 else 1))
    tasks = [functools.partial(np.bitwise_or.reduce, np.broadcast_to(part, (times, part.size)), axis=None) for part in parts]
    run = map if threads == 1 else pool(threads).map
    return lambda: list(run(lambda task: task(), tasks))


def repeats(nbytes: int) -> int:
    return max(1, PROBE_BYTES // nbytes)


@functools.cache
def words(nbytes: int) -> Array:
    return np.ones(nbytes // 8, np.uint64)


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
