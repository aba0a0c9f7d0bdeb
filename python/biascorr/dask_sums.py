"""Sums of samples in dask collections, with the bits that the same samples have on one machine.

    run[p]   = the sums of partition p: of all of its integers together, of each of its other samples alone
    total[p] = total[p - 1] and then run[p], in the order of the samples

Sums of integers are exact, those of real numbers depend on their order: so runs are made side by side, where their partitions
are, and one total goes through them in order. Neither samples nor runs come to the client: it gets the total.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

_TOGETHER = 16
"""Runs that are added to a total in one task, where they are small: their workers hand them on."""

_PIECE_BYTES, _PIECE_POSITIONS = 1 << 20, 1 << 12
"""A sample of real numbers is summed in such pieces of its first axis on one machine (``src/channel_mean.rs``)."""


class Accumulator(Protocol):
    """Sums of samples, a sample at a time or merged."""

    @property
    def has_integers_alone(self) -> bool:
        """Whether its sums are exact."""

    def update(self, sample: Any) -> None:
        """Adds a sample."""

    def merge(self, other: Any) -> None:
        """Adds what another one has seen."""


A = TypeVar("A", bound=Accumulator)

Run = list[tuple[str, A]]
"""Accumulators of consecutive samples, and the names that errors give these."""


def has_collections(samples: Any) -> bool:
    """Whether this is a dask collection, or a list with some."""
    if type(samples) in (list, tuple):
        return any(type(sample) is not np.ndarray and _is_collection(sample) for sample in samples)
    return _is_collection(samples)


def _is_collection(value: Any) -> bool:
    import dask

    return dask.is_dask_collection(value) or is_future(value)


def is_future(value: Any) -> bool:
    """Whether this is what a cluster computes."""
    return (type(value).__module__, type(value).__name__) == ("distributed.client", "Future")


def summed(samples: Any, empty: A, channel_axis: int) -> A:
    """An accumulator that has seen all samples of dask collections, computed by the scheduler that is in use.

    Parameters
    ----------
    samples : dask array, bag, delayed value, or list of delayed samples
        See :func:`biascorr.prepare_input_mean`.
    empty : accumulator
        One that has seen nothing. It is not changed.
    channel_axis : int
        The axis of each sample that is not summed over.

    Raises
    ------
    TypeError
        A sample has a dtype that is not of real numbers, or another one than its dask array; the collection is of another kind.
    ValueError
        A sample has no elements, or other channels than those before; sizes of chunks are not known where they are needed.
    """
    import dask.array
    import dask.bag
    from dask.delayed import Delayed, delayed

    run, total = delayed(_run), delayed(empty)
    if isinstance(samples, (list, tuple)):
        runs, together = [run([sample], f"samples[{k}]", empty) for k, sample in enumerate(samples)], _TOGETHER
    elif isinstance(samples, dask.array.Array):
        runs, together = list(_runs_of_array(samples, empty, channel_axis)), _TOGETHER
    elif isinstance(samples, dask.bag.Bag):
        parts = enumerate(samples.to_delayed())
        runs, together = [run(part, f"partition {k}: samples[{{}}]", empty) for k, part in parts], 1
    elif isinstance(samples, Delayed) or is_future(samples):
        runs, together = [run(samples, "samples[{}]", empty)], 1
    else:
        kind = f"{type(samples).__module__}.{type(samples).__name__}"
        raise TypeError(f"samples: {kind}, expected a dask array, a bag or delayed samples, as its .data may be")
    for start in range(0, len(runs), together):
        total = delayed(_folded)(total, runs[start : start + together])
    return total.compute()  # type: ignore[no-any-return]


def _run(samples: Any, name: str, empty: A) -> Run[A]:
    """The sums of a partition, an array being one sample. The name of each sample is made with its number in the partition."""
    run: Run[A] = []
    for k, sample in enumerate([samples] if isinstance(samples, np.ndarray) else samples):
        label, sums = name.format(k), copy.deepcopy(empty)
        try:
            sums.update(sample)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label}: {_without_name(error)}") from None
        if sums.has_integers_alone and run and run[0][1].has_integers_alone:
            _merge(run[0][1], label, sums)
        else:
            run.insert(0 if sums.has_integers_alone else len(run), (label, sums))
    return run


def _folded(total: A, runs: Sequence[Run[A]]) -> A:
    """A copy, as the scheduler may have to compute this again."""
    total = copy.deepcopy(total)
    for label, sums in itertools.chain.from_iterable(runs):
        _merge(total, label, sums)
    return total


def _merge(total: Accumulator, label: str, sums: Accumulator) -> None:
    try:
        total.merge(sums)
    except ValueError as error:
        raise ValueError(f"{label}: {_without_name(error)} as in those before") from None


def _without_name(error: Exception) -> str:
    return str(error).partition(": ")[2] or str(error)


def _runs_of_array(array: Any, empty: A, channel_axis: int) -> Iterator[Any]:
    """The sums of its chunks: of real numbers, in the pieces that an array of numpy is summed in."""
    from dask.delayed import delayed

    if not -array.ndim <= channel_axis < array.ndim:
        raise ValueError(f"samples: {array.ndim} axes, none of which is channel axis {channel_axis}")
    channels = channel_axis % array.ndim
    exact = array.dtype.kind in "iub"
    whole = [channels] if exact else [axis for axis in range(array.ndim) if axis or channels == 0]
    unknown = [axis for axis in range(array.ndim) if math.isnan(array.shape[axis]) and (axis in whole or not exact)]
    if unknown:
        raise ValueError(
            f"samples: a dask array with unknown sizes along axis {unknown[0]}, expected known ones where chunks are put "
            "together; call its compute_chunk_sizes() first"
        )
    chunks: dict[int, Any] = {axis: -1 for axis in whole if len(array.chunks[axis]) > 1}
    length = None
    if not exact and channels != 0 and array.size:
        length = _piece_length(array.shape, channels, array.dtype.itemsize)
        chunks[0] = _multiples(array.chunks[0], length)
    array = array.rechunk(chunks) if chunks else array
    parts = array.to_delayed()
    for place in np.ndindex(array.numblocks):
        shape = tuple(sizes[k] for sizes, k in zip(array.chunks, place))
        yield delayed(_run_of_chunk)(parts[place], place, shape, array.dtype, length, empty)


def _piece_length(shape: Sequence[int], channels: int, itemsize: int) -> int:
    row = math.prod(shape[1:])
    return max(_PIECE_BYTES // (row * itemsize), -(-_PIECE_POSITIONS * shape[channels] // row), 1)


def _multiples(sizes: Sequence[int], length: int) -> tuple[int, ...]:
    """Sizes of chunks that end nearby, at whole pieces."""
    count = sum(sizes)
    ends = [round(end / length) * length for end in itertools.accumulate(sizes[:-1])]
    bounds = sorted({0, count, *(end for end in ends if end < count)})
    return tuple(end - start for start, end in itertools.pairwise(bounds))


def _run_of_chunk(
    chunk: NDArray[Any], place: tuple[int, ...], shape: tuple[float, ...], dtype: np.dtype[Any], length: int | None, empty: A
) -> Run[A]:
    label = f"chunk {place}" if len(place) > 1 else f"chunk {place[0]}"
    if chunk.dtype != dtype:
        raise TypeError(f"{label}: dtype {chunk.dtype}, expected {dtype} as the dask array says")
    if len(shape) != chunk.ndim or any(found != size for found, size in zip(chunk.shape, shape) if not math.isnan(size)):
        raise ValueError(f"{label}: shape {chunk.shape}, expected {shape} as the dask array says")
    if chunk.size == 0:
        return []
    if length is None:
        return _run(chunk, label, empty)
    pieces = (np.require(chunk[start : start + length], requirements="C") for start in range(0, len(chunk), length))
    return _run(pieces, label, empty)
