"""What is read part by part, as samples are asked for: arrays of zarr, h5py, dask and the like, or mapped by numpy; and what
dask computes that is no array.

Known by what they have, a shape, a dtype and slices: no package is imported for them. A chunk is read once where samples are
asked for in order, however many batches have a part of it; no more than a chunk and a batch are in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.dask_sums import is_future


def is_sliceable(value: Any) -> bool:
    """Whether an object is an array of another package, or one that numpy has mapped from a file."""
    if isinstance(value, np.ndarray):
        return isinstance(value, np.memmap)
    if isinstance(value, np.generic) or not hasattr(type(value), "__getitem__") or hasattr(value, "numpy"):
        return False
    try:
        np.dtype(value.dtype)
        return isinstance(value.shape, tuple) and not hasattr(value, "iloc")  # pandas takes slices for labels
    except (AttributeError, TypeError):
        return False


def arrays_of_group(value: Any) -> Any:
    """The arrays of a zarr group by name; anything else as it is."""
    if isinstance(value, Mapping) or not hasattr(type(value), "array_keys"):
        return value
    return {name: value[name] for name in value.array_keys()}


def computed(value: Any) -> Any:
    """What dask computes: a bag, partition by partition as it is iterated; a delayed value or a future. Others as they are."""
    kind = type(value)
    if kind.__module__ == "dask.bag.core":
        return itertools.chain.from_iterable(part.compute() for part in value.to_delayed())
    if kind.__module__ == "dask.delayed":
        return value.compute()
    return value.result() if is_future(value) else value


class Slices:
    """An array that is read part by part.

    Parameters
    ----------
    array : object
        See :func:`is_sliceable`.
    name : str
        The name that errors give it.

    Raises
    ------
    ValueError
        Sizes of the array are not known.
    """

    def __init__(self, array: Any, name: str) -> None:
        if any(math.isnan(size) for size in array.shape):
            raise ValueError(f"{name}: a dask array of shape {array.shape}; call its compute_chunk_sizes() first")
        self.shape, self.dtype, self.ndim = array.shape, np.dtype(array.dtype), len(array.shape)
        self._array = array
        self._chunk: tuple[int, int, int, NDArray[Any]] | None = None  # its axis, bounds along that, values

    def read(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """A part along an axis."""
        parts = [self._part_of_chunk(axis, first, end, start, stop) for first, end in self._chunks(axis, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    def whole(self) -> NDArray[Any]:
        """All of it."""
        return self._copied(())

    def _part_of_chunk(self, axis: int, first: int, end: int, start: int, stop: int) -> NDArray[Any]:
        if (start <= first and end <= stop) or self._chunk is None or self._chunk[:3] != (axis, first, end):
            self._chunk = None  # before the next one comes
            values = self._copied((np.s_[:],) * axis + (np.s_[first:end],))
            if start <= first and end <= stop:
                return values
            self._chunk = axis, first, end, values
        within = slice(max(start, first) - first, min(stop, end) - first)
        return self._chunk[3][(np.s_[:],) * axis + (within,)].copy()

    def _chunks(self, axis: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The bounds of the chunks that have a part of this range; the range itself where there are no chunks."""
        chunks = getattr(self._array, "chunks", None)
        if not isinstance(chunks, tuple) or len(chunks) != self.ndim or start >= stop:
            yield start, stop
        elif isinstance(chunks[axis], tuple):  # of dask, each of its own size
            ends = list(itertools.accumulate(chunks[axis]))
            yield from ((first, end) for first, end in zip([0, *ends], ends) if first < stop and end > start)
        else:
            size = int(chunks[axis])
            firsts = range(start // size * size, stop, size)
            yield from ((first, min(first + size, self.shape[axis])) for first in firsts)

    def _copied(self, key: tuple[slice, ...]) -> NDArray[Any]:
        values = np.array(self._array[key] if key else self._array[...], order="C", subok=False)
        _forget_pages(self._array)
        return values


def _forget_pages(array: Any) -> None:
    """Has the system take the pages of a mapped file out of the memory of this process; they are read again where needed.

    Not of a mapping whose changes are kept in memory alone.
    """
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and array.mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(ValueError, OSError):  # closed, or not of a file
            mapped.madvise(mmap.MADV_DONTNEED)
