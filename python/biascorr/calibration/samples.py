"""Calibration samples of a model, batch by batch, and which of them are held back to judge what was fitted to the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.data import ModelInput, batches_from_data, number_of_batches, number_of_samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import Feeds
from biascorr.reference import mean_from_sums

Progress = Callable[[str, int, int | None], None]
"""Called with what is going on, what of it is done, and how much there is (None if unknown)."""

ONE_OF = 4
"""One of so many samples judges."""


@dataclass(frozen=True, eq=False)
class SampleMeans:
    """Means of a tensor per sample and channel.

    Parameters
    ----------
    means : ndarray, (N, C), float64
        Over every axis but the channels'.
    positions : ndarray, (N,)
        How many positions each is the mean of.
    fitted : ndarray, (N,), bool
        False for the samples that are held back.
    """

    means: NDArray[np.float64]
    positions: NDArray[np.int64]
    fitted: NDArray[np.bool_]

    @property
    def weights(self) -> NDArray[np.float64]:
        """The share of each sample in the mean, (N, 1): none for those that are held back."""
        weights = self.positions * self.fitted
        return np.asarray(weights / weights.sum())[:, None]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Over all positions of all fitted samples, (C,)."""
        return np.asarray((self.means * self.weights).sum(axis=0))

    @classmethod
    def joined(cls, parts: Sequence[SampleMeans]) -> SampleMeans:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("means", "positions", "fitted")))


class Samples:
    """Batches of calibration samples in a storage.

    Parameters
    ----------
    storage : Storage
        Holds the inputs of each batch, and what is live of it.
    held_back : bool
        Whether the samples that judge are kept from what is fitted. Where there are too few, all are fitted and all judge.
    """

    def __init__(self, storage: Storage, *, held_back: bool = False) -> None:
        self.storage = storage
        self._wanted_back = held_back
        self._starts = [0]
        self._names: list[str] = []

    @property
    def batches(self) -> int:
        return len(self._starts) - 1

    @property
    def count(self) -> int:
        """Samples of all batches together."""
        return self._starts[-1]

    @property
    def all_judge(self) -> bool:
        """Whether there are too few to choose judges from."""
        return self.count < ONE_OF

    @property
    def held_back(self) -> bool:
        """Whether other samples judge than are fitted."""
        return self._wanted_back and not self.all_judge

    @functools.cached_property
    def _judges(self) -> NDArray[np.bool_]:
        return np.asarray((np.arange(self.count) % ONE_OF == ONE_OF - 1) | self.all_judge)

    @functools.cached_property
    def _fitted(self) -> NDArray[np.bool_]:
        return ~self._judges if self.held_back else np.ones(self.count, dtype=bool)

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

    def judge(self, batch: int) -> NDArray[np.bool_]:
        """Which samples of a batch judge."""
        return self._judges[slice(*self._starts[batch : batch + 2])]

    def is_fitted(self, batch: int) -> NDArray[np.bool_]:
        """Which samples of a batch are fitted."""
        return self._fitted[slice(*self._starts[batch : batch + 2])]

    def fitted(self, array: NDArray[Any], batch: int) -> Iterator[NDArray[Any]]:
        """The parts of a tensor that belong to fitted samples."""
        return self._parts(array, self.is_fitted(batch))

    def judging(self, array: NDArray[Any], batch: int) -> Iterator[NDArray[Any]]:
        """The parts of a tensor that belong to samples that judge."""
        return self._parts(array, self.judge(batch))

    def _parts(self, array: NDArray[Any], wanted: NDArray[np.bool_]) -> Iterator[NDArray[Any]]:
        if wanted.all() or array.ndim == 0 or len(array) % len(wanted):
            return iter([array] if wanted.any() else [])
        return (part for part, is_wanted in zip(np.split(array, len(wanted)), wanted) if is_wanted)

    def means(self, array: NDArray[Any], axis: int, batch: int) -> SampleMeans:
        """Means per sample and channel; of the whole batch as one where its samples cannot be told apart."""
        fitted = self.is_fitted(batch)
        apart = array.ndim + axis > 0 and len(array) % len(fitted) == 0
        parts = np.split(array, len(fitted)) if apart and len(fitted) > 1 else [array]
        means = np.empty((len(parts), array.shape[axis]))
        positions = np.empty(len(parts), dtype=np.int64)
        for k, part in enumerate(parts):
            (integers, reals), positions[k], _ = _kernels.channel_sums([part], axis, 0, None)
            means[k] = mean_from_sums(integers, reals, positions[k]) if reals is None else reals.sum(axis=0) / positions[k]
        return SampleMeans(means, positions, fitted[: len(parts)])
