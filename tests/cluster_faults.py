"""Faults on workers of a cluster, and what is left there: functions that a client runs on workers."""

import errno
import functools
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(seconds: float) -> None:
    """Stops this process, all of its threads, for a while."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


_MENDED: list[tuple[Any, str, Any]] = []
"""What faults have taken the place of."""


def _put(place: Any, name: str, value: Any) -> None:
    _MENDED.append((place, name, getattr(place, name)))
    setattr(place, name, value)


def mend() -> None:
    """Has a worker be as it was."""
    while _MENDED:
        setattr(*_MENDED.pop())


def fill_disk() -> None:
    def save(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    _put(np, "save", save)


def fail(kind: type[Exception], text: str) -> None:
    raise kind(text)


def arm(place: str, call: int, fault: Any, *, after: bool = False) -> None:
    """Has a function "module:name" meet a fault at one of its calls, before it or when it has run."""
    module, name = importlib.import_module(place.split(":")[0]), place.split(":")[1]
    original, calls = getattr(module, name), iter(range(1, sys.maxsize))

    @functools.wraps(original)
    def faulty(*arguments: Any) -> Any:
        is_now = next(calls) == call
        if is_now and not after:
            fault()
        found = original(*arguments)
        if is_now and after:
            fault()
        return found

    _put(module, name, faulty)


def has_version(version: str) -> None:
    import biascorr

    _put(biascorr, "__version__", version)


def lack(module: str) -> None:
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def left(dask_worker: Any) -> list[str]:
    """What a worker holds: results, networks, temporary folders."""
    from biascorr.sweep.cluster import _NETWORKS

    gc.collect()  # Dask keeps frames of what it failed to move to disk
    folders = Path(dask_worker.local_directory).glob("**/biascorr-*")
    return [*map(str, dask_worker.data), *_NETWORKS, *map(str, folders)]


def evict() -> None:
    """Has a worker move what it holds to disk, as Dask does where memory gets short."""
    from distributed import get_worker

    data = get_worker().data
    while data.fast and data.evict() != -1:
        pass


def pause() -> None:
    """Has the worker take no more tasks, as where its memory is nearly full."""
    from distributed import get_worker
    from distributed.core import Status

    worker = get_worker()
    worker.memory_manager.memory_limit = 0  # else its own look at the memory would end this
    worker.status = Status.paused


def forget_shards() -> None:
    """Has a worker have a shard as Dask makes it anew: without its samples."""
    import gc

    from biascorr.sweep.cluster import _Held

    for each in gc.get_objects():
        if isinstance(each, _Held):
            each.batches.clear()
            each.networks.clear()


def has_no_files() -> None:
    """Has a worker see no files of its client."""
    from biascorr.sweep import cluster

    _put(cluster, "Path", lambda _: Path("/nowhere"))


def has_no_weights() -> None:
    """Has a worker see no files of weights."""
    from biascorr.adapters.onnx import tensors

    _put(tensors, "_check_file", lambda _: (_ for _ in ()).throw(FileNotFoundError))


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)
