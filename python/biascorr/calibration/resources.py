"""The memory and the CPUs that this process may use: those of its container, not of its host.

Read from the files of control groups, version 1 and 2, from the group of the process up to the root of what it can see; the
tightest limit counts. Caches of files that can be dropped do not count as used.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from biascorr.arguments import checked_integer

_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Version 1 says so much, or a little more, where there is no limit."""


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that can still be had."""
    return max(0, min(_free_on_host(root), *_free_in_groups(root), _UNLIMITED))


def give_back_memory() -> None:
    """Gives free memory back to the system, which glibc keeps otherwise: what networks took to run, for the next to come."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not of glibc
        return None


def is_in_memory(folder: Path, root: Path = _ROOT) -> bool:
    """Whether what files in a folder have is in memory, which it takes from this process or its container."""
    mounts = [line.split() for line in _text(root / "proc/self/mounts").splitlines()]
    kinds = {Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount[1])): mount[2] for mount in mounts}
    inside = [folder.absolute(), *folder.absolute().parents]
    return next((kinds[each] for each in inside if each in kinds), "") in ("tmpfs", "ramfs")


def available_cpus(root: Path = _ROOT) -> int:
    """CPUs that threads of this process can keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(share) for share in _cpu_shares(root))]))


def checked_threads(threads: int | None) -> int:
    """Threads to use; None: one for each CPU that there is. Raises ValueError where it is below 1."""
    return available_cpus() if threads is None else checked_integer("threads", threads, 1, otherwise="None")


def _free_on_host(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return kilobytes.value * 1024 // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_in_groups(root: Path) -> Iterator[int]:
    for folder in _groups(root, ""):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            yield limit - used + _droppable(folder, "")
    for folder in _groups(root, "memory"):
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _UNLIMITED:
            yield limit - used + _droppable(folder, "total_")


def _droppable(folder: Path, prefix: str) -> int:
    """Bytes of files that can be read again, those that a process has mapped among them."""
    entries = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return sum(int(value) for key, value in entries if key in (f"{prefix}inactive_file", f"{prefix}active_file"))


def _cpu_shares(root: Path) -> Iterator[float]:
    for folder in _groups(root, ""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu"):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_us is not None and period_us and quota_us > 0:
            yield quota_us / period_us


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the group of this process and of those around it; version 2 where the controller is empty."""
    mounted = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = mounted / path.lstrip("/")
            inside = [group, *group.parents]
            yield from dict.fromkeys([*inside[: inside.index(mounted)], mounted] if mounted in inside else [mounted])


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    """The contents of a file; empty where it is not there or must not be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
