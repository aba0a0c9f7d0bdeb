"""Measures a call in a process of its own, whose memory nothing else has used: seconds, peak memory, and the result.

The process that starts the call also watches it, so that its memory is seen however busy it is, and ends it where it takes too
much. Memory is the resident pages in /proc, so this needs Linux. Its high-water mark starts anew with each program, while that
of `getrusage` starts at the parent's.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

INTERVAL = 0.005
"""Seconds between two looks at a process."""

SHARE, LEFT = 0.85, 0.04
"""Parts of the machine's memory: a process that has more, or leaves less to all others, is ended."""

REPEATS, ENOUGH_SECONDS = 5, 10.0
"""Calls, of which the fastest counts, because noise only adds; fewer once they take so many seconds in all."""


@dataclass(frozen=True)
class Cost:
    """The cost of a call.

    `peak` is the bytes above the start of the call, `anonymous` the part of them that is not mapped from files. `failure` says
    why there is no result; the figures are then those up to the failure.
    """

    seconds: float
    peak: int
    anonymous: int
    result: Any = None
    failure: str = ""


def cost_of(function: Callable[..., Any], *arguments: Any, timeout: float = math.inf) -> Cost:
    """The cost of a call in a process of its own; function, arguments and result are pickled."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_call, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return _watched(process.pid or 0, ours, timeout)
    finally:
        process.kill()
        process.join()


def least_cost(function: Callable[..., Any], *arguments: Any, timeout: float = math.inf) -> Cost:
    """The cost of the fastest call, or of the first that fails."""
    costs: list[Cost] = []
    while len(costs) < REPEATS and sum(cost.seconds for cost in costs) < ENOUGH_SECONDS:
        costs.append(cost_of(function, *arguments, timeout=timeout))
        if costs[-1].failure:
            return costs[-1]
    return min(costs, key=lambda cost: cost.seconds)


def _call(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs in the process: sends the memory at the start, then the outcome."""
    connection.send(_memory("self"))
    start = time.perf_counter()
    try:
        result, failure = function(*arguments), ""
    except Exception as error:
        result, failure = None, f"{type(error).__name__}: {error}"
    connection.send((time.perf_counter() - start, _memory("self"), result, failure))
    connection.recv()  # until killed


def _watched(pid: int, connection: Connection, timeout: float) -> Cost:
    before = connection.recv()
    start, anonymous, total = time.perf_counter(), before["RssAnon"], _of_machine("MemTotal")
    peak, passed, failure = before["VmRSS"], 0.0, ""
    while not connection.poll(INTERVAL):
        now = _memory(pid)
        passed = time.perf_counter() - start
        peak, anonymous = max(peak, now["VmRSS"]), max(anonymous, now["RssAnon"])
        if now["VmRSS"] > SHARE * total or _of_machine("MemAvailable") < LEFT * total:
            failure = f"ended at {now['VmRSS'] / 1e9:.1f} GB"
        elif passed > timeout:
            failure = f"over {timeout:.0f} s"
        if failure:
            return Cost(passed, peak - before["VmRSS"], anonymous - before["RssAnon"], failure=failure)
    try:
        seconds, after, result, failure = connection.recv()
    except EOFError:
        return Cost(passed, peak - before["VmRSS"], anonymous - before["RssAnon"], failure="the process died")
    return Cost(seconds, after["VmHWM"] - before["VmRSS"], anonymous - before["RssAnon"], result, failure)


def _memory(pid: int | str) -> dict[str, int]:
    """Bytes of resident memory of a process by kind; zeros for one that has just ended."""
    fields = [line.split() for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()]
    found = {each[0].rstrip(":"): 1024 * int(each[1]) for each in fields if each[-1] == "kB"}
    return {kind: found.get(kind, 0) for kind in ("VmRSS", "VmHWM", "RssAnon")}


def _of_machine(kind: str) -> int:
    """Bytes of memory of the machine, by kind."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))
