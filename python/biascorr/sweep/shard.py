"""A shard: the samples of some batches, and all that runs over them. Whoever runs shards asks them for the results of batches.

A function of a shard is complete: it names the network, the batches and the shifts so far, and makes anew what the shard has
not got, live tensors or outputs. So a shard may be lost, and another one with the same samples goes on.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import BiasNetwork, Shift
from biascorr.sweep.cut import Cut
from biascorr.sweep.plan import SweepPlan

R = TypeVar("R")


class Shard:
    """The samples of some batches, with the live tensors of the sweeps over them.

    Parameters
    ----------
    samples : Samples
        The samples, in whose storage live tensors are held.
    threads : int
        Threads that may be used.
    """

    def __init__(self, samples: Samples, threads: int) -> None:
        self.samples = samples
        self.threads = threads
        self._cuts: dict[str, tuple[Cut, Storage | None]] = {}
        self._prepared = 0.0

    @property
    def prepared(self) -> float:
        """Seconds in which networks were made ready to run, so far."""
        return self._prepared + sum(cut.prepared for cut, _ in self._cuts.values())

    def cut(self, plan: SweepPlan, batches: Sequence[int]) -> Cut:
        """Where a sweep over these batches is; before its first stage, where it is not known here."""
        if plan.name not in self._cuts:
            storage = Storage(self.samples.storage.free) if plan.is_beside else None
            samples = self.samples if storage is None else self.samples.beside(storage, batches)
            self._cuts[plan.name] = Cut(plan, samples, batches, self.threads), storage
        return self._cuts[plan.name][0]

    def finish(self, name: str) -> None:
        """Drops what is live of a sweep of this name."""
        if name in self._cuts:
            cut, storage = self._cuts.pop(name)
            self._prepared += cut.prepared
            cut.close()
            if storage is not None:
                storage.close()

    def close(self) -> None:
        """Drops what is live of all sweeps."""
        for _, storage in self._cuts.values():
            if storage is not None:
                storage.close()
        self._cuts.clear()


@dataclass(frozen=True, eq=False)
class Shifted:
    """A network with shifts added to the biases of layers; the shifts alone travel to where it runs.

    Parameters
    ----------
    base : BiasNetwork
        The network.
    shifts : mapping from str to ndarray
        See :meth:`BiasNetwork.with_shifts`; none: the network itself.
    """

    base: BiasNetwork
    shifts: Mapping[str, Shift]

    @functools.cached_property
    def network(self) -> BiasNetwork:
        """The network with the shifts, made when it is first needed."""
        return self.base.with_shifts(self.shifts) if self.shifts else self.base

    def __reduce__(self) -> tuple[Any, ...]:
        return Shifted, (self.base, self.shifts)


Function = Callable[..., Iterator[R]]
"""Called with a shard, some of its batches in order, and arguments; gives one result per batch. A function of a module."""


class Shards(abc.ABC):
    """Shards that have all batches between them.

    Attributes
    ----------
    threads : int
        Threads that may be used here.
    """

    threads: int

    @property
    @abc.abstractmethod
    def prepared(self) -> float:
        """Seconds in which networks were made ready to run, so far."""

    @abc.abstractmethod
    def each(self, function: Function[R], batches: Sequence[int], *arguments: Any) -> Iterator[R]:
        """The results of a function for each of some batches, in their order."""

    def merged(self, function: Function[R], batches: Sequence[int], *arguments: Any, merge: Callable[[R, R], None]) -> R | None:
        """The results for all batches in one, each merged into those before; None of no batches."""
        found: list[R] = []
        for each in self.each(function, batches, *arguments):
            if found:
                merge(found[0], each)
            else:
                found.append(each)
        return next(iter(found), None)

    @abc.abstractmethod
    def finish(self, plan: SweepPlan) -> None:
        """Drops what is live of a sweep."""

    def __enter__(self) -> Shards:
        return self

    @abc.abstractmethod
    def __exit__(self, *error: object) -> None:
        """Frees what is held."""


class OneShard(Shards):
    """The shard of this machine.

    Parameters
    ----------
    samples, threads
        See :class:`Shard`.
    """

    def __init__(self, samples: Samples, threads: int) -> None:
        self.threads = threads
        self._shard = Shard(samples, threads)

    @property
    def prepared(self) -> float:
        """Seconds in which networks were made ready to run, so far."""
        return self._shard.prepared

    def each(self, function: Function[R], batches: Sequence[int], *arguments: Any) -> Iterator[R]:
        """The results of a function for each of some batches, in their order."""
        return function(self._shard, batches, *arguments)

    def finish(self, plan: SweepPlan) -> None:
        """Drops what is live of a sweep."""
        self._shard.finish(plan.name)

    def __exit__(self, *error: object) -> None:
        self._shard.close()
