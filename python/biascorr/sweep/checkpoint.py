"""A checkpoint: the results of shards so far, in a folder, so that a run that was killed goes on where it was.

    run.json        what the run is of: versions, models, data, options
    000017.record   the result of the 17th call of a function of shards: a line, SHA-256 of what follows, and that

A run asks its shards for the same results in the same order as any other run of the same kind; those that are recorded are not
computed again. A record that is not whole counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept from using one folder twice
    fcntl = None  # type: ignore[assignment]

from biascorr.sweep.plan import SweepPlan
from biascorr.sweep.shard import Function, Shards

R = TypeVar("R")

_RUN = "run.json"

_NEW_RUN = "run.new"

_LOCK = ".lock"

_MAGIC = b"biascorr record 1\n"

_RECORDED = {
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.numeric": {"_frombuffer"},
    "biascorr.calibration.samples": {"SampleMeans"},
    "biascorr.correction.scoring": {"BatchErrors", "Terms"},
    "biascorr.statistics": {"ChannelMean", "TapMean", "_Seen", "_Sums"},
    "biascorr.sweep.measurements": {"Measurements"},
    "biascorr.sweep.paired": {"Goal", "Sums"},
    "biascorr.windows": {"TransposedWindow", "Window"},
}
"""What results of shards are made of: nothing else is made of a record, by module."""

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


def checked_folder(folder: str | os.PathLike[str] | None) -> Path | None:
    """The place of a checkpoint, wherever the process goes; None without one.

    Raises TypeError, ValueError or OSError where none can be there.
    """
    if folder is None:
        return None
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"checkpoint: {folder!r}, expected the path of a folder")
    if not os.fspath(folder):
        raise ValueError("checkpoint: an empty path, expected that of a folder")
    if "\0" in os.fsdecode(folder):
        raise ValueError(f"checkpoint: {folder!r}, expected a path without null characters")
    try:
        place = Path(os.fsdecode(folder)).expanduser().absolute()
    except RuntimeError as error:  # ~ of nobody
        raise ValueError(f"checkpoint: {os.fsdecode(folder)}: {error}") from error
    if not place.parent.is_dir():
        raise FileNotFoundError(f"checkpoint: no such folder: {place.parent}")
    try:
        is_other = (place.is_symlink() or place.exists()) and not place.is_dir()
    except OSError as error:
        raise OSError(error.errno, f"checkpoint: {error.strerror}", str(place)) from error
    if is_other:
        what = "is a file" if place.is_file() else "is neither a file nor a folder, nor a link to one"
        raise ValueError(f"checkpoint: {place} {what}, expected a folder")
    return place


class Checkpoint:
    """A folder of records. A context manager: at its end, another run may use it.

    Parameters
    ----------
    folder : Path
        The folder, which is made where there is none.
    identity : mapping from str to str
        What the run is of, by what errors call it.

    Raises
    ------
    ValueError
        The folder is that of another run, or has other files.
    OSError
        It cannot be made or written to, or another run uses it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        with self._writing(folder):
            folder.mkdir(exist_ok=True)
            self._check_is_own()
            self._lock = (folder / _LOCK).open("ab")
        try:
            self._take(self._lock)
            self._check(identity)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def record(self, number: int) -> Any:
        """What was recorded so; None where nothing whole was. Raises ValueError where no run has recorded it."""
        path = self._path(number)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OSError(error.errno, f"checkpoint: cannot be read: {error.strerror}", str(path)) from error
        digest, payload = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
        if not content.startswith(_MAGIC) or hashlib.sha256(payload).digest() != digest:
            return None
        try:
            return _Unpickler(io.BytesIO(payload)).load()
        except Exception as error:
            raise ValueError(f"checkpoint: {path} is no record of a run ({error}); remove the folder to begin anew") from error

    def keep(self, number: int, value: Any) -> None:
        """Records a value, whole or not at all. Raises OSError where it cannot be written."""
        payload = pickle.dumps(value, protocol=5)
        self._write(self._path(number), _MAGIC + hashlib.sha256(payload).digest() + payload)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.record"

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_suffix(".new")
        with self._writing(path):
            try:
                temporary.write_bytes(content)
                temporary.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = (
                f"checkpoint: cannot be written: {error.strerror}; give another folder, or make room and start it again: "
                "it goes on where it was"
            )
            raise OSError(error.errno, text, str(path)) from error

    def _take(self, lock: IO[bytes]) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"checkpoint: {self._folder} is in use by another run; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass

    def _check_is_own(self) -> None:
        names = {each.name for each in self._folder.iterdir()}
        if _RUN not in names and names - {_LOCK, _NEW_RUN}:
            raise ValueError(f"checkpoint: {self._folder} has other files; give a folder that is new or empty")

    def _check(self, identity: Mapping[str, str]) -> None:
        path = self._folder / _RUN
        if not path.exists():
            self._write(path, json.dumps(dict(identity), indent=1).encode())
            return
        _check_same(self._folder, identity, {**identity, **_description(path)})


def check_so_far(folder: Path, identity: Mapping[str, str]) -> None:
    """Raises ValueError where a folder is that of a run of something else than what is known so far."""
    if (folder / _RUN).exists():
        _check_same(folder, identity, identity)


def _check_same(folder: Path, identity: Mapping[str, str], names: Iterable[str]) -> None:
    found = _description(folder / _RUN)
    others = [name for name in names if found.get(name) != identity.get(name)]
    if others:
        said = "; ".join(f"{name}: {found.get(name)}, now {identity.get(name)}" for name in others)
        said = _DIGEST.sub(r"\1...", said)
        raise ValueError(
            f"checkpoint: {folder} is of another run ({said}); give another folder, or remove this one to begin anew"
        )


def _description(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} is damaged ({error}); remove the folder to begin anew") from error


class _Unpickler(pickle.Unpickler):
    """Makes what results of shards are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDED.get(module, ()):
            raise pickle.UnpicklingError(f"it has {module}.{name}")
        return getattr(importlib.import_module(module), name)


class RecordedShards(Shards):
    """Shards whose results are recorded, and not computed where they were.

    Parameters
    ----------
    shards : Shards
        The shards.
    checkpoint : Checkpoint
        Where.
    """

    def __init__(self, shards: Shards, checkpoint: Checkpoint) -> None:
        self.threads = shards.threads
        self._shards = shards
        self._checkpoint = checkpoint
        self._numbers = itertools.count()

    @property
    def prepared(self) -> float:
        """Seconds in which networks were made ready to run, so far."""
        return self._shards.prepared

    def each(self, function: Function[R], batches: Sequence[int], *arguments: Any) -> Iterator[R]:
        """The results of a function for each of some batches, in their order."""
        number = next(self._numbers)
        found = self._known(number, function, batches)
        return self._recorded(number, function, batches, arguments) if found is None else iter(found)

    def _recorded(self, number: int, function: Function[R], batches: Sequence[int], arguments: Sequence[Any]) -> Iterator[R]:
        results = []
        for each in self._shards.each(function, batches, *arguments):
            results.append(each)
            yield each
        self._checkpoint.keep(number, (function.__name__, list(batches), results))

    def merged(self, function: Function[R], batches: Sequence[int], *arguments: Any, merge: Callable[[R, R], None]) -> R | None:
        """The results for all batches in one, each merged into those before; None of no batches."""
        number = next(self._numbers)
        found = self._known(number, function, batches)
        if found is None:
            result = self._shards.merged(function, batches, *arguments, merge=merge)
            found = [] if result is None else [result]
            self._checkpoint.keep(number, (function.__name__, list(batches), found))
        return next(iter(found), None)

    def finish(self, plan: SweepPlan) -> None:
        """Drops what is live of a sweep."""
        self._shards.finish(plan)

    def __exit__(self, *error: object) -> None:
        self._shards.__exit__(*error)

    def _known(self, number: int, function: Function[R], batches: Sequence[int]) -> list[R] | None:
        found = self._checkpoint.record(number)
        if not isinstance(found, tuple) or found[:2] != (function.__name__, list(batches)):
            return None
        results: list[R] = found[2]
        return results
