"""Calibration samples of a model, batch by batch, and which of them are held out to score what was fitted to the others."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.batching import Batching, Batchings, assumed
from biascorr.calibration.data import batches_from_data, check_end, number_of_batches, resolved
from biascorr.calibration.digest import Digest
from biascorr.calibration.images import Images
from biascorr.calibration.progress import LOGGER, Progress
from biascorr.calibration.resources import give_back_memory
from biascorr.calibration.slices import is_sliceable
from biascorr.calibration.storage import Storage
from biascorr.graph.network import Feeds, ModelInput
from biascorr.reference import mean_from_sums

_ONE_OF = 4
"""One of so many samples is held out."""

_AT_ONCE = 4
"""Batches of inputs that are in memory at once besides those that are held: some being read, some run."""

_ENOUGH = 8
"""Samples that are held out at least, where there are twice as many."""


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


def scored_parts(sizes: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Which parts of so many samples each are scored, at random, and which are not; all are, where there are too few.

    A quarter of the samples; :data:`_ENOUGH` at least, but no more than half of them where that is more.
    """
    count = sum(sizes)
    wanted = max(count // _ONE_OF, min(_ENOUGH, count // 2))
    order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    if count < _ONE_OF or len(sizes) < 2:
        return order, []
    before = np.cumsum([0, *(sizes[part] for part in order[:-1])])
    scored = min(int(np.count_nonzero(before < wanted)), len(sizes) - 1)
    return order[:scored], order[scored:]


class Samples:
    """Batches of inputs in a storage, each of samples that are all scored, or none of them.

    Parameters
    ----------
    storage : Storage
        Where they are.
    hold_out : bool
        Whether the samples that are scored are not fitted, where there are enough.
    seed : int
        Chooses the samples that are scored, where there are no others to be scored.
    batching : Batching, optional
        How batches are taken apart; None: each is one sample, until others are read.

    Attributes
    ----------
    images : Images or None
        The data, where it was images; not validation data.
    left_out : list of str
        The names of data of which there was more than was to be read, as far as is known.
    """

    def __init__(self, storage: Storage, *, hold_out: bool = False, seed: int = 0, batching: Batching | None = None) -> None:
        self.storage = storage
        self.batches_read = 0
        self.left_out: list[str] = []
        self.images: Images | None = None
        self._hold_out = hold_out
        self._seed = seed
        self._batching = batching or Batching({})
        self._indices: list[NDArray[np.int64]] = []  # of the samples of each batch, in the order in which they were read
        self._names: list[str] = []
        self._validation: set[int] = set()
        self._scored: set[int] = set()
        self._fitted: list[int] | None = None  # all that may be
        self._digest = Digest()

    def __getstate__(self) -> dict[str, Any]:
        """All but the values: what is known of the batches."""
        return {**self.__dict__, "storage": None, "images": None, "_digest": None}

    @property
    def batches(self) -> int:
        """Batches that are held: more than were read, where these had to be cut."""
        return len(self._indices)

    @property
    def digest(self) -> str | None:
        """SHA-256 of all samples that were read, in hexadecimal; None where none were."""
        return self._digest.text

    @property
    def data_batches(self) -> list[int]:
        """The batches that may be fitted: all but those of validation data."""
        return [batch for batch in range(self.batches) if batch not in self._validation]

    @property
    def count(self) -> int:
        """Samples that may be fitted."""
        return sum(len(self._indices[batch]) for batch in self.data_batches)

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
        return bool(self._scored) and self._scored.isdisjoint(self.fitted_batches)

    @property
    def scored_batches(self) -> list[int]:
        """The batches whose outputs are scored."""
        return sorted(self._scored)

    @property
    def fitted_batches(self) -> list[int]:
        """The batches that are fitted; in random order where some are held out, so that the first ones are like all."""
        return self.data_batches if self._fitted is None else self._fitted.copy()

    @property
    def held_out_batches(self) -> list[int]:
        """The batches that could be fitted, and are not, to be scored: none of validation data."""
        return sorted(self._scored.difference(self._validation, self.fitted_batches))

    def add(self, feeds: Feeds, size: int, *, validation: bool = False) -> None:
        """Keeps a batch of so many samples."""
        self._names = list(feeds)
        for name, array in feeds.items():
            self.storage[name, self.batches] = array
        if validation:
            self._validation.add(self.batches)
        first = int(self._indices[-1][-1]) + 1 if self._indices else 0
        self._indices.append(np.arange(first, first + size))

    def read(
        self,
        data: Any,
        inputs: Sequence[ModelInput],
        progress: Progress,
        *,
        batch_size: int = 1,
        max_samples: int | None = None,
        validation: bool = False,
        batchings: Batchings | None = None,
    ) -> None:
        """Keeps all batches of some data, up to so many samples: to be fitted and scored, or validation data, only scored.

        The latter comes after the former. Raises ValueError where there are none, or no end of them.
        """
        name, before, started = "validation" if validation else "data", self.batches, time.perf_counter()
        data = resolved(data, name)
        self.images = data if isinstance(data, Images) and not validation else self.images
        check_end(data, max_samples, name)
        total = number_of_batches(data, inputs, batch_size=batch_size, max_samples=max_samples)
        lasting = (
            type(data) in (np.ndarray, dict, list, tuple, Images) or isinstance(data, (str, PathLike)) or is_sliceable(data)
        )
        known = assumed(inputs)
        batchings = batchings or (lambda _: known)
        batches = batches_from_data(
            data, inputs, name=name, batch_size=batch_size, max_samples=max_samples, batchings=batchings
        )
        for done, feeds in enumerate(batches, start=1):
            kept = feeds if lasting else {key: array.copy() for key, array in feeds.items()}  # a loader may fill them again
            self._batching = batchings(feeds)
            if done == 1:
                self.storage.leave(_AT_ONCE * sum(array.nbytes for array in kept.values()))
            self.add(kept, batches.size, validation=validation)
            self._digest.update(kept, self._batching.axes)
            progress(f"reading {'validation ' * validation}samples", done, total)
            del feeds, kept  # before the next ones are read
        give_back_memory()
        if self.batches == before:
            raise ValueError(f"{name}: no samples, at least one is needed")
        self.batches_read = len(self.data_batches)
        read = self.batches - before, sum(self.sizes[before:])
        LOGGER.info("%s: read %d batches of %d samples: %.2f s", name, *read, time.perf_counter() - started)
        if batches.left_any:
            self.left_out.append(name)

    def beside(self, storage: Storage, batches: Iterable[int]) -> Samples:
        """The same samples, the inputs of some batches in another storage, where other tensors of the same names can be."""
        other = copy.copy(self)
        other.storage = storage
        for batch in batches:
            for name in self._names:
                self.storage.lend((name, batch), storage)
        return other

    def score_all(self) -> None:
        """Has all samples scored."""
        if self._batching.can_be_cut and not self._batching.is_along_first_axis:
            self._cut()
        self._scored = set(range(self.batches))

    def choose_scored(self) -> None:
        """Chooses the samples that are scored, by their number alone; makes batches that are scored whole or not at all.

        Batches that cannot be cut are chosen whole. Those whose samples are not along the first axis everywhere become
        batches of one.
        """
        if self._batching.can_be_cut and not self._batching.is_along_first_axis:
            self._cut()
        if self._validation:
            self._scored = self._validation
            return
        parts = [1] * self.count if self._batching.can_be_cut else self.sizes
        scored, others = scored_parts(parts, self._seed)
        for batch, indices in enumerate(self._indices.copy()):
            rows = np.isin(indices if self._batching.can_be_cut else batch, scored)
            if rows.all():
                self._scored.add(batch)
            elif rows.any():
                self._scored.add(self.batches)
                self._take(batch, rows, ~rows)
        if self._hold_out and others:
            places = {part: place for place, part in enumerate(others)}
            unscored = set(range(self.batches)) - self._scored
            first = [int(indices[0]) if self._batching.can_be_cut else k for k, indices in enumerate(self._indices)]
            self._fitted = sorted(unscored, key=lambda batch: places[first[batch]])
        give_back_memory()

    def _cut(self) -> None:
        """Makes a batch of each sample."""
        for batch, size in enumerate(self.sizes):
            for rest in range(size - 1, 0, -1):
                self._take(batch, np.s_[rest:], np.s_[:rest])

    def _take(self, batch: int, rows: Any, rest: Any) -> None:
        """Makes some samples, by their numbers in the batch, a batch of their own, the last one."""
        feeds = {name: self.storage[name, batch] for name in self._names}
        for number, part in ((self.batches, rows), (batch, rest)):
            for name, array in self._batching.rows(feeds, part).items():
                self.storage[name, number] = array
        if batch in self._validation:
            self._validation.add(self.batches)
        indices = self._indices[batch]
        self._indices.append(indices[rows])
        self._indices[batch] = indices[rest]

    def feeds(self, batches: Iterable[int] | None = None) -> Iterator[Feeds]:
        """The inputs of some batches; of all that may be fitted, if None."""
        for batch in self.data_batches if batches is None else batches:
            yield {name: self.storage[name, batch] for name in self._names}

    def apart(self, array: NDArray[Any], batch: int) -> list[NDArray[Any]]:
        """The values of each sample of a batch in a tensor; all of them as one where samples cannot be separated in it."""
        size = len(self._indices[batch])
        if size == 1 or not self._batching.is_along_first_axis or not array.ndim or len(array) % size:
            return [array]
        return np.split(array, size)

    def means(self, array: NDArray[Any], axis: int, batch: int) -> SampleMeans:
        """Means per sample and channel; of the whole batch as one where its samples cannot be separated."""
        parts = self.apart(array, batch) if array.ndim + axis > 0 else [array]
        means = np.zeros((len(parts), array.shape[axis]))
        positions = np.zeros(len(parts), dtype=np.int64)
        for k, part in enumerate(parts):
            if part.size:
                (integers, reals), positions[k], _ = _kernels.channel_sums([part], axis, 0, None)
                means[k] = mean_from_sums(integers, reals, positions[k]) if reals is None else reals.sum(axis=0) / positions[k]
        return SampleMeans(means, positions)
