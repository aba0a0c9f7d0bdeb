"""Output files: written whole or not at all, and known to be possible before the work is done."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_NEW = 0o666  # less what the umask of the process takes away
_PRIVATE = 0o600


def kind_of(path: Path) -> str:
    """What a path is that is there but no regular file, for an error."""
    mode = path.stat().st_mode
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
    return f"{next((name for is_kind, name in kinds.items() if is_kind(mode)), 'a device')}, expected a file"


def mode_of(path: Path) -> int | None:
    """The permissions of a file; None where there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def check_output(path: str | os.PathLike[str], *, force: bool = False, size: int = 0) -> Path:
    """The place where a file of about this size is going to be written, links followed.

    Raises
    ------
    FileExistsError
        It exists and `force` is not set.
    OSError
        It cannot be written: there is no such folder, or one that is read-only, or full; it is a folder or a device; its name
        is too long.
    """
    try:
        place = Path(path).resolve()
        exists = place.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or links that go round in circles
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if exists and not place.is_file():
        raise OSError(f"{path}: {kind_of(place)}")
    if exists and not force:
        raise _existing(path)
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: {place.parent}")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: folder {place.parent} cannot be written to")
    if not place.name or len(os.fsencode(place.name)) > os.pathconf(place.parent, "PC_NAME_MAX"):
        raise OSError(f"{path}: the name is too long")
    free = shutil.disk_usage(place.parent).free
    if free < size:
        raise OSError(f"{path}: folder {place.parent} has {free} bytes left, about {size} are needed")
    return place


def _existing(path: str | os.PathLike[str]) -> FileExistsError:
    return FileExistsError(f"{path} exists; force=True (--force) overwrites it")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, force: bool = False, mode: int | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error, and its mode where it existed.

    A new file gets `mode`, or what the umask leaves. Nobody else can read what will be less open before it is.

    Raises as :func:`check_output`, and OSError, which names the path, where there is no space left.
    """
    place = check_output(path, force=force)
    kept = mode_of(place)
    mode = mode if kept is None else kept
    temporary = place.with_name(f".{secrets.token_hex(8)}.tmp{place.suffix}")  # some libraries insist on theirs
    with _of(path):
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _NEW if mode is None else _PRIVATE))
    try:
        with _of(path):
            yield temporary
            _flush(temporary)
            if mode is not None:
                temporary.chmod(mode)
            if force:
                temporary.replace(place)
            else:
                _link(temporary, place, path)
            _flush(place.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lets errors of the system name the file that is wanted, not the one that is written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _link(temporary: Path, place: Path, path: str | os.PathLike[str]) -> None:
    """Unlike a rename, fails where somebody else was faster; where files cannot be linked, a rename has to do."""
    try:
        place.hardlink_to(temporary)
    except FileExistsError:
        raise _existing(path) from None
    except OSError:
        if place.exists():
            raise _existing(path) from None
        temporary.replace(place)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
