"""Networks on their way to other processes, by pickle: what of them may be a reference to a file that is there too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_BY_REFERENCE = ContextVar("by_reference", default=False)


@contextlib.contextmanager
def by_reference() -> Iterator[None]:
    """Networks that are pickled here refer to the files that their values are mapped from, and leave the values there.

    Where they are unpickled, these files must be at the same paths, with the same size and time of change.
    """
    token = _BY_REFERENCE.set(True)
    try:
        yield
    finally:
        _BY_REFERENCE.reset(token)


def is_by_reference() -> bool:
    """Whether networks are pickled so now."""
    return _BY_REFERENCE.get()
