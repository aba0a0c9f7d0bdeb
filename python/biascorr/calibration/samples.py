"""Calibration samples of a model, batch by batch, and which of them are held out to score what was fitted to the others."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.data import Progress, batches_from_data, number_of_batches, number_of_samples
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
    fitted : ndarray, (N,), bool
        False for the samples that are held out.
    """

    means: NDArray[np.float64]
    positions: NDArray[np.int64]
    fitted: NDArray[np.bool_]

    @property
    def has_values(self) -> bool:
        """Whether any fitted sample has elements."""
        return bool(np.any(self.positions * self.fitted))

    @property
    def weights(self) -> NDArray[np.float64]:
        """The share of each sample in the mean, (N, 1): none for those that are held out; nan where no sample has elements."""
        weights = self.positions * self.fitted
        with np.errstate(invalid="ignore"):
            return np.asarray(weights / weights.sum())[:, None]

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean over all fitted positions, (C,)."""
        return np.asarray((self.means * self.weights).sum(axis=0))

    @classmethod
    def joined(cls, parts: Sequence[SampleMeans]) -> SampleMeans:
        """One after the other."""
        means, positions, fitted = zip(*((part.means, part.positions, part.fitted) for part in parts))
        return cls(np.concatenate(means), np.concatenate(positions), np.concatenate(fitted))


class Samples:
    """Batches of inputs in a storage.

    Parameters
    ----------
    storage : Storage
        Where they are.
    hold_out : bool
        Whether one of :data:`ONE_OF` samples is held out, if there are as many.
    """

    def __init__(self, storage: Storage, *, hold_out: bool = False) -> None:
        self.storage = storage
        self._hold_out = hold_out
        self._starts = [0]
        self._names: list[str] = []

    @property
    def batches(self) -> int:
        """Batches that were added."""
        return len(self._starts) - 1

    @property
    def count(self) -> int:
        """Samples of all batches together."""
        return self._starts[-1]

    @property
    def scored(self) -> int:
        """Samples whose outputs are scored."""
        return int(np.count_nonzero(self._scored))

    @property
    def holds_out(self) -> bool:
        """Whether other samples are scored than are fitted."""
        return self._hold_out and self.count >= ONE_OF

    @functools.cached_property
    def _scored(self) -> NDArray[np.bool_]:
        """The last one of each :data:`ONE_OF`; all where there are fewer."""
        return np.asarray((np.arange(self.count) % ONE_OF == ONE_OF - 1) | (self.count < ONE_OF))

    @functools.cached_property
    def _fitted(self) -> NDArray[np.bool_]:
        return ~self._scored if self.holds_out else np.ones(self.count, dtype=bool)

    def add(self, feeds: Feeds, size: int) -> None:
        """Keeps a batch of so many samples along the first axis."""
        self._names = list(feeds)
        for name, array in feeds.items():
            self.storage[name, self.batches] = array
        self._starts.append(self.count + size)

    def read(self, data: Any, inputs: Sequence[ModelInput], progress: Progress) -> None:
        """Keeps all batches of some data. Raises ValueError where there are none."""
        total = number_of_batches(data)
        lasting = isinstance(data, (np.ndarray, Mapping, list, tuple))
        for done, feeds in enumerate(batches_from_data(data, inputs), start=1):
            kept = feeds if lasting else {name: array.copy() for name, array in feeds.items()}  # a loader may fill them again
            self.add(kept, number_of_samples(feeds, inputs))
            progress("reading samples", done, total)
        if self.batches == 0:
            raise ValueError("data: no samples, at least one is needed")

    def feeds(self) -> Iterator[Feeds]:
        """The inputs of each batch."""
        for batch in range(self.batches):
            yield {name: self.storage[name, batch] for name in self._names}

    def is_scored(self, batch: int) -> NDArray[np.bool_]:
        """Which samples of a batch are scored."""
        return self._scored[slice(*self._starts[batch : batch + 2])]

    def is_fitted(self, batch: int) -> NDArray[np.bool_]:
        """Which samples of a batch are fitted."""
        return self._fitted[slice(*self._starts[batch : batch + 2])]

    def fitted(self, array: NDArray[Any], batch: int) -> Iterator[NDArray[Any]]:
        """The parts of a tensor that belong to fitted samples and have elements."""
        return self._parts(array, self.is_fitted(batch))

    def held_out(self, array: NDArray[Any], batch: int) -> Iterator[NDArray[Any]]:
        """The parts of a tensor that belong to scored samples."""
        return self._parts(array, self.is_scored(batch))

    def _parts(self, array: NDArray[Any], wanted: NDArray[np.bool_]) -> Iterator[NDArray[Any]]:
        if wanted.all() or array.ndim == 0 or len(array) % len(wanted):
            return iter([array] if wanted.any() else [])
        return (part for part, is_wanted in zip(np.split(array, len(wanted)), wanted) if is_wanted)

    def means(self, array: NDArray[Any], axis: int, batch: int) -> SampleMeans:
        """Means per sample and channel; of the whole batch as one where its samples cannot be separated."""
        fitted = self.is_fitted(batch)
        apart = array.ndim + axis > 0 and len(array) % len(fitted) == 0
        parts = np.split(array, len(fitted)) if apart and len(fitted) > 1 else [array]
        means = np.zeros((len(parts), array.shape[axis]))
        positions = np.zeros(len(parts), dtype=np.int64)
        for k, part in enumerate(parts):
            if part.size:
                (integers, reals), positions[k], _ = _kernels.channel_sums([part], axis, 0, None)
                means[k] = mean_from_sums(integers, reals, positions[k]) if reals is None else reals.sum(axis=0) / positions[k]
        return SampleMeans(means, positions, fitted[: len(parts)])
