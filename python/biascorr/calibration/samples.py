"""Calibration samples of a model, batch by batch, and which of them are held out to score what was fitted to the others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.data import Progress, batches_from_data, check_end, number_of_batches, number_of_samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import Feeds, ModelInput
from biascorr.reference import mean_from_sums

ONE_OF = 4
"""One of so many samples is held out."""


@dataclass(frozen=True, eq=False)
class SampleMeans:
    """Means of a tensor per sample and channel.

    Parameters
    ----------
    means : ndarray, (N, C), float64
        Over every axis but the channels'.
    positions : ndarray, (N,)
        Positions that each is the mean of; none where a sample has no elements.
    """

    means: NDArray[np.float64]
    positions: NDArray[np.int64]

    @property
    def has_values(self) -> bool:
        """Whether any sample has elements."""
        return bool(self.positions.any())

    @property
    def weights(self) -> NDArray[np.float64]:
        """The share of each sample in the mean, (N, 1); nan where no sample has elements."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.positions / self.positions.sum())[:, None]

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean over all positions, (C,)."""
        return np.asarray((self.means * self.weights).sum(axis=0))

    @classmethod
    def joined(cls, parts: Sequence[SampleMeans]) -> SampleMeans:
        """One after the other."""
        means, positions = zip(*((part.means, part.positions) for part in parts))
        return cls(np.concatenate(means), np.concatenate(positions))


class Samples:
    """Batches of inputs in a storage, each of samples that are all scored, or none of them.

    Parameters
    ----------
    storage : Storage
        Where they are.
    hold_out : bool
        Whether one of :data:`ONE_OF` samples is held out, if there are as many.
    """

    def __init__(self, storage: Storage, *, hold_out: bool = False) -> None:
        self.storage = storage
        self.batches_read = 0
        self._hold_out = hold_out
        self._indices: list[NDArray[np.int64]] = []  # of the samples of each batch, in the order in which they were read
        self._names: list[str] = []
        self._scored: set[int] = set()

    @property
    def batches(self) -> int:
        """Batches that are held: more than were read, where these had to be cut."""
        return len(self._indices)

    @property
    def count(self) -> int:
        """Samples of all batches together."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Samples of each batch."""
        return list(map(len, self._indices))

    @property
    def scored(self) -> int:
        """Samples whose outputs are scored."""
        return sum(len(self._indices[batch]) for batch in self._scored)

    @property
    def holds_out(self) -> bool:
        """Whether other samples are scored than are fitted."""
        return self._hold_out and self.count >= ONE_OF

    @property
    def scored_batches(self) -> list[int]:
        """The batches whose outputs are scored."""
        return sorted(self._scored)

    @property
    def fitted_batches(self) -> list[int]:
        """The batches that are fitted: those that are not held out."""
        return [batch for batch in range(self.batches) if not (self.holds_out and batch in self._scored)]

    def add(self, feeds: Feeds, size: int) -> None:
        """Keeps a batch of so many samples along the first axis."""
        self._names = list(feeds)
        for name, array in feeds.items():
            self.storage[name, self.batches] = array
        self._indices.append(np.arange(self.count, self.count + size))

    def read(
        self,
        data: Any,
        inputs: Sequence[ModelInput],
        progress: Progress,
        *,
        batch_size: int = 1,
        max_samples: int | None = None,
    ) -> None:
        """Keeps all batches of some data, of which a part is to be scored, up to so many samples.

        Raises ValueError where there are none, or no end of them.
        """
        check_end(data, max_samples)
        total = number_of_batches(data, inputs, batch_size=batch_size, max_samples=max_samples)
        lasting = type(data) in (np.ndarray, dict, list, tuple)
        batches = batches_from_data(data, inputs, batch_size=batch_size, max_samples=max_samples)
        for done, feeds in enumerate(batches, start=1):
            kept = feeds if lasting else {name: array.copy() for name, array in feeds.items()}  # a loader may fill them again
            self.add(kept, number_of_samples(feeds, inputs))
            progress("reading samples", done, total)
        if self.batches == 0:
            raise ValueError("data: no samples, at least one is needed")
        self.batches_read = self.batches

    def beside(self, storage: Storage) -> Samples:
        """The same samples, with their inputs in another storage, where other tensors of the same names can be."""
        other = copy.copy(self)
        other.storage = storage
        for batch in range(self.batches):
            for name in self._names:
                storage[name, batch] = self.storage[name, batch]
        return other

    def join(self) -> None:
        """Makes one sample of each batch."""
        self._indices = [np.array([batch]) for batch in range(self.batches)]

    def cut(self) -> None:
        """Makes a batch of each sample."""
        for batch, size in enumerate(self.sizes):
            for rest in range(size - 1, 0, -1):
                self._take(batch, np.s_[rest:], np.s_[:rest])

    def choose_scored(self) -> None:
        """Scores the last one of each :data:`ONE_OF` samples, all where there are fewer; cuts batches that have others too."""
        count = self.count
        for batch, indices in enumerate(self._indices.copy()):
            scored = (indices % ONE_OF == ONE_OF - 1) | (count < ONE_OF)
            if scored.all():
                self._scored.add(batch)
            elif scored.any():
                self._scored.add(self.batches)
                self._take(batch, scored, ~scored)

    def _take(self, batch: int, rows: Any, rest: Any) -> None:
        """Makes some samples, by their rows in the inputs, a batch of their own, the last one."""
        for name in self._names:
            array = self.storage[name, batch]
            self.storage[name, self.batches], self.storage[name, batch] = array[rows], array[rest]
        indices = self._indices[batch]
        self._indices.append(indices[rows])
        self._indices[batch] = indices[rest]

    def feeds(self, batches: Iterable[int] | None = None) -> Iterator[Feeds]:
        """The inputs of each batch."""
        for batch in range(self.batches) if batches is None else batches:
            yield {name: self.storage[name, batch] for name in self._names}

    def means(self, array: NDArray[Any], axis: int, batch: int) -> SampleMeans:
        """Means per sample and channel; of the whole batch as one where its samples cannot be separated."""
        size = len(self._indices[batch])
        apart = array.ndim + axis > 0 and len(array) % size == 0
        parts = np.split(array, size) if apart and size > 1 else [array]
        means = np.zeros((len(parts), array.shape[axis]))
        positions = np.zeros(len(parts), dtype=np.int64)
        for k, part in enumerate(parts):
            if part.size:
                (integers, reals), positions[k], _ = _kernels.channel_sums([part], axis, 0, None)
                means[k] = mean_from_sums(integers, reals, positions[k]) if reals is None else reals.sum(axis=0) / positions[k]
        return SampleMeans(means, positions)
