"""The memory of a sweep: live tensors, up to a budget and beyond it in a temporary folder; memory that can be written again."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # not on Windows, where folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

from biascorr.arguments import checked_integer
from biascorr.calibration.resources import free_memory, give_back_memory, is_in_memory

_PREFIX = "biascorr-"
"""What the names of temporary folders start with."""

_LOCK = ".lock"

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
"""Of bytes, in powers of 1000, or of 1024 with an i."""

_SHARE = 0.5
"""Part of the free memory that is used where no budget is given; the rest is for the network that runs."""


def checked_budget(memory_budget: int | str | None) -> int:
    """Bytes that may be held; None: a share of the memory that is free now.

    Raises ValueError where it is below 0, or a text that names no bytes.
    """
    if memory_budget is None:
        return int(_SHARE * free_memory())
    if isinstance(memory_budget, str):
        return bytes_from_text(memory_budget)
    return checked_integer("memory_budget", memory_budget, 0, otherwise="None")


def bytes_from_text(text: str) -> int:
    """The bytes that a text like "500MB", "1.5 GB", "2g" or "512MiB" names. Raises ValueError where it names none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"memory_budget: {text!r}, expected bytes: 500000000, 500MB, 1.5GB or 512MiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[(found[2] or "").lower()])


class Buffers:
    """Memory that is written again instead of freed: fresh pages take longer to get than to fill.

    May be used by several threads at once.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any values."""
        size = math.prod(shape) * dtype.itemsize
        room = 1 << max(size - 1, 0).bit_length()
        try:
            block = self._free[room].pop()
        except (KeyError, IndexError):
            block = np.empty(room, dtype=np.uint8)
        return block[:size].view(dtype).reshape(shape)

    def give(self, array: NDArray[Any]) -> None:
        """Takes an array back that nobody reads any more; one that did not come from here is not kept."""
        block = getattr(array, "base", None)
        if isinstance(block, np.ndarray) and block.dtype == np.uint8 and block.base is None and block.size >= array.nbytes:
            self._free.setdefault(block.size, []).append(block)

    def clear(self) -> None:
        """Frees what is not in use."""
        self._free.clear()
        give_back_memory()


class TemporaryFolder:
    """A temporary folder for this process alone. Those whose processes are gone, killed, are removed when one is made.

    Who makes one keeps a lock on a file in it, which the system gives up with the process, whatever ends it. Its name is known
    before it is there: an interrupt at any moment leaves nothing behind.
    """

    _process = 0

    def __init__(self, within: str | None = None) -> None:
        place = Path(within) if within else _place()
        _remove_abandoned(place)
        self.path = place / f"{_PREFIX}{os.urandom(8).hex()}"
        self._process = os.getpid()
        self.path.mkdir(0o700)
        if fcntl is None:  # Windows renames neither an open file nor the folder that it is in
            return
        unlocked = self.path / f"{_LOCK}-to-be"
        self._lock = unlocked.open("wb")
        with contextlib.suppress(OSError):  # where nothing can be locked, nobody takes it for abandoned either
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)  # nobody ever finds it without its lock

    def cleanup(self) -> None:
        """Removes it, unless this is a forked child of its process."""
        if self._process != os.getpid():
            return
        try:
            self._remove()
        finally:
            self._remove()  # what an interrupt left
        self._process = 0

    __del__ = cleanup

    def _remove(self) -> None:
        """By another name, so that a thread that still writes there adds nothing."""
        renamed = Path(f"{self.path}-")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)
        if hasattr(self, "_lock"):
            self._lock.close()


def _place() -> Path:
    """The folder for temporary files; /var/tmp, where nobody chose one and that of the system is in memory."""
    place, other = Path(tempfile.gettempdir()), Path("/var/tmp")
    is_chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")) or place != Path("/tmp")
    is_better = not is_chosen and is_in_memory(place) and os.access(other, os.W_OK | os.X_OK) and not is_in_memory(other)
    return other if is_better else place


def _remove_abandoned(place: Path) -> None:
    if fcntl is None:
        return
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, just removed by somebody else, or in use
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with io.FileIO(folder / _LOCK, opener=_opened) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _opened(path: str, flags: int) -> int:
    """It may be a link or a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


class Storage:
    """Arrays by key, for several threads. A context manager: at its end, the temporary folder is removed, whatever happens.

    What is no array of numbers, a sequence or text, can be kept too; it stays in memory.

    Parameters
    ----------
    budget : int
        Bytes held in memory; the rest goes to disk.
    place : path, optional
        The folder in which the temporary one is made; None: that for temporary files.
    """

    def __init__(self, budget: int, place: str | None = None) -> None:
        self._place = place
        self._budget = budget
        self._held = 0
        self._arrays: dict[Hashable, NDArray[Any] | Path] = {}
        self._counted: dict[Hashable, int] = {}  # bytes of those that are held
        self._folder: TemporaryFolder | None = None
        self._is_in_memory = False
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Bytes of the budget that are not in use."""
        return max(0, self._budget - self._held)

    def leave(self, size: int) -> None:
        """Has no more held than leaves so many bytes of the memory that is free now."""
        with self._lock:
            self._budget = min(self._budget, max(0, self._held + free_memory() - size))

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the temporary folder, and forgets all arrays."""
        if self._folder is not None:
            self._folder.cleanup()
        self._arrays.clear()

    def __setitem__(self, key: Hashable, array: Any) -> None:
        if key in self._arrays:
            self.pop(key)
        size = _bytes_of(array)
        with self._lock:
            fits = self._held + size <= self._budget or not _is_plain(array)
            self._held += size * fits
            self._counted[key] = size * fits
        self._arrays[key] = array if fits else self._written(array)

    def __getitem__(self, key: Hashable) -> Any:
        found = self._arrays[key]
        return np.load(found, allow_pickle=False) if isinstance(found, Path) else found

    def __contains__(self, key: Hashable) -> bool:
        return key in self._arrays

    def pop(self, key: Hashable) -> NDArray[Any] | None:
        """Forgets an array; returns it if it was in memory, and is not lent."""
        found = self._arrays.pop(key)
        if key not in self._counted:
            return None
        with self._lock:
            self._held -= self._counted.pop(key)
        if isinstance(found, Path):
            found.unlink()
            return None
        return found

    def lend(self, key: Hashable, other: Storage) -> None:
        """Has another storage give out the same array too, wherever it is; there, it takes nothing."""
        other._arrays[key] = self._arrays[key]

    def holds(self, key: Hashable) -> bool:
        """Whether an array is in memory, so that whoever changes it changes it for all."""
        return not isinstance(self._arrays[key], Path)

    def _written(self, array: NDArray[Any]) -> Path:
        with self._lock:
            if self._folder is None:
                self._folder = TemporaryFolder(self._place)
                self._is_in_memory = is_in_memory(self._folder.path)
        if self._is_in_memory and free_memory() < 2 * array.nbytes:
            raise OSError(
                errno.ENOSPC,
                "activations cannot be kept: this folder is in memory, which is full; set TMPDIR to a folder on a disk",
                str(self._folder.path),
            )
        path = self._folder.path / f"{next(self._numbers)}.npy"
        try:
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            remedy = "give a greater memory_budget, or set TMPDIR to a folder with more space"
            number = error.errno or errno.ENOSPC  # numpy has none where it could not write all of it
            raise OSError(number, f"activations cannot be kept: {error.strerror or error}; {remedy}", str(path)) from error
        return path


def _is_plain(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


def _bytes_of(value: Any) -> int:
    return sum(map(_bytes_of, value)) if isinstance(value, list) else int(getattr(value, "nbytes", 0))
