"""A cut of a network: the live tensors of some batches, and the threads that move it forward stage by stage.

A stage runs once per batch, from the live tensors; what the biases of its layers are to change by is added to their live
outputs before these are read. So every operation runs once per sample, however many layers there are. Quantized tensors are
held as their codes: what dequantizes them runs where it is read.

A cut that is asked for a stage and is not there yet runs those before it first: it needs no more than the shifts so far. So one
that was lost with its machine is made again, and one whose first stages are known from an earlier run begins where that ended.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.samples import SampleMeans, Samples
from biascorr.calibration.storage import Buffers
from biascorr.graph.layer import Layer
from biascorr.graph.network import Feeds, Shift
from biascorr.sweep.measurements import Measurements, Wanted
from biascorr.sweep.plan import Stage, SweepPlan

T = TypeVar("T")
R = TypeVar("R")

_AMPLE = 64
"""A stage hardly makes more than so many times the bytes that it reads: with as much memory free, nothing has to be counted."""


class Cut:
    """The live tensors of some batches.

    Parameters
    ----------
    plan : SweepPlan
        The sweep that it is of.
    samples : Samples
        The samples, in whose storage the live tensors are.
    batches : sequence of int
        The batches, in order.
    threads : int
        Threads that may be used.
    """

    def __init__(self, plan: SweepPlan, samples: Samples, batches: Sequence[int], threads: int) -> None:
        self._network = plan.network
        self._wanted = plan.wanted
        self._samples = samples
        self._batches = list(batches)
        self._threads = threads
        self.stages = plan.stages()
        self._done = 0  # stages
        self._is_whole = True  # no stage was left before its end
        self._shifted: set[tuple[str, int]] = set()
        self._activated: list[tuple[str, str, int]] = []
        self._buffers = Buffers()
        self.prepared = 0.0  # seconds in which the network was made ready to run
        self._made = 0  # bytes that the stage made of the last batch

    def measure(self, number: int, shifts: Mapping[str, NDArray[Any]]) -> Iterator[Measurements]:
        """Runs a stage and measures it, batch by batch.

        Parameters
        ----------
        number : int
            The stage.
        shifts : mapping from str to ndarray
            The change of each layer's output so far, by the name of the tensor and aligned with it.
        """
        self.run_to(number, shifts)
        yield from self._measured(self.stages[number], self._wanted, shifts)

    def run_to(self, number: int, shifts: Mapping[str, NDArray[Any]]) -> None:
        """Runs all stages before one, those that have not run yet: all of them where that one has run already, in part even."""
        if number < self._done or not self._is_whole:
            self._forget()
        while self._done < number:
            for _ in self._measured(self.stages[self._done], Wanted(outputs=False), shifts):
                pass

    def layer(self, number: int, name: str) -> Layer:
        """A layer of a stage."""
        return next(each for each in self.stages[number].layers if each.name == name)

    def _measured(self, stage: Stage, wanted: Wanted, shifts: Mapping[str, NDArray[Any]]) -> Iterator[Measurements]:
        self._forget_activated()
        self._is_whole = False
        tensors = list(dict.fromkeys([*stage.kept, *self._wanted.tensors(stage.layers)]))  # so that a runtime fuses the same
        for batch, results, part in self._run(stage, tensors, wanted, shifts):
            self._keep(stage, results, batch)
            yield part
        self._buffers.clear()
        self._done, self._is_whole = stage.number + 1, True

    def outputs(self, shifts: Mapping[str, NDArray[Any]]) -> Iterator[tuple[int, Feeds]]:
        """Runs the last stage; gives the outputs of the model for each batch."""
        last = self.stages[-1]
        self.run_to(last.number, shifts)
        for batch, results, _ in self._run(last, self._network.outputs, Wanted(outputs=False), shifts):
            yield batch, results

    def _forget(self) -> None:
        """Drops all that is live, as before the first stage."""
        storage = self._samples.storage
        for key in ((name, batch) for stage in self.stages for name in stage.kept for batch in self._batches):
            if key in storage:
                storage.pop(key)
        self._forget_activated()
        self._shifted.clear()
        self._done, self._is_whole = 0, True

    def close(self) -> None:
        """Drops all that is live, and all memory."""
        self._forget()
        self._buffers.clear()

    def live(self, layer: Layer, batch: int) -> NDArray[Any] | None:
        """The output of a layer of the stage that ran last, without its shift; None where it is not live."""
        storage, key = self._samples.storage, (layer.output, batch)
        if key not in storage:
            return None
        return np.asarray(storage[key])

    def activated(self, layer: Layer, batch: int, compute: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
        """What is computed of the live output of a layer, which is held until the next stage."""
        storage, key = self._samples.storage, ("activated", layer.name, batch)
        if key not in storage:
            storage[key] = compute(storage[layer.output, batch])
            self._activated.append(key)
        return np.asarray(storage[key])

    def _forget_activated(self) -> None:
        while self._activated:
            self._samples.storage.pop(self._activated.pop())

    def measure_activated(self, layer: Layer, tensor: str, shift: Shift) -> Iterator[SampleMeans]:
        """The means of the tensor after the activation of a layer whose live output a shift is added to, batch by batch."""
        aligned = layer.along_channels(shift)
        if not self._batches:
            return
        compute = self.part({layer.output: self._samples.storage[layer.output, self._batches[0]]}, [tensor], len(self._batches))

        def measure(batch: int) -> SampleMeans:
            array = self._samples.storage[layer.output, batch]
            shifted = self._buffers.take(array.shape, array.dtype)
            np.add(array, aligned.astype(array.dtype), out=shifted)
            (activated,) = compute({layer.output: shifted}).values()
            means = self._samples.means(activated, layer.output_axis, batch)
            self._buffers.give(shifted)
            self._buffers.give(activated)
            return means

        yield from in_order(measure, self._batches, self._workers(len(self._batches)), alone=self._threads == 1)

    def _run(
        self, stage: Stage, tensors: Sequence[str], wanted: Wanted, shifts: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[int, Feeds, Measurements]]:
        """The tensors of each batch in order, and what is measured of it; what nothing reads any more is dropped."""

        def run(batch: int) -> tuple[int, Feeds, Measurements]:
            results = compute(self._feeds(stage, batch, shifts))
            part = Measurements.of_batch(stage.layers, wanted, results, self._samples, batch)
            return batch, {name: results[name] for name in results if name in new}, part

        new = {name for name in tensors if name not in stage.given or name in self._network.outputs}  # others may go now

        for batches, workers in self._in_turns(stage, shifts):
            compute = self.part(self._feeds(stage, batches[0], shifts), tensors, workers)
            for batch, results, part in in_order(run, batches, workers, alone=self._threads == 1):
                yield batch, results, part
                self._drop(stage, results, batch)
                self._made = sum(getattr(value, "nbytes", 0) for value in results.values())

    def _in_turns(self, stage: Stage, shifts: Mapping[str, NDArray[Any]]) -> Iterator[tuple[Sequence[int], int]]:
        """Batches and the threads that may work on as many of them at once, within what is left of the memory budget.

        Where that could be too little for all threads, the first batch runs alone, to see what one takes.
        """
        workers = self._workers(len(self._batches))
        if not self._batches:
            return
        read = sum(array.nbytes for array in self._feeds(stage, self._batches[0], shifts).values())
        if workers == 1 or self._samples.storage.free >= _AMPLE * read * workers:
            yield self._batches, workers
            return
        yield self._batches[:1], 1
        room = self._samples.storage.free // max(1, read + self._made)
        yield self._batches[1:], max(1, min(workers, len(self._batches) - 1, room - 1))

    def _workers(self, batches: int) -> int:
        return max(1, min(batches, self._threads))

    def _drop(self, stage: Stage, results: Feeds, batch: int) -> None:
        for name in stage.dropped:
            array = self._samples.storage.pop((name, batch))
            if array is not None and name not in results:  # what is handed out may be kept
                self._buffers.give(array)

    def _keep(self, stage: Stage, results: Feeds, batch: int) -> None:
        """Keeps what is live; the memory of the rest can be written again."""
        storage = self._samples.storage
        for name in stage.kept:
            storage[name, batch] = results[name]
        for name, array in results.items():
            if name not in stage.given and not (name in stage.kept and storage.holds((name, batch))):
                self._buffers.give(array)

    def part(self, given: Feeds, wanted: Sequence[str], workers: int) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """Prepares a part of the network for so many batches at once."""
        threads = max(1, self._threads // self._workers(workers))
        start = time.monotonic()
        compute = self._network.part(given, wanted, threads=threads, allocator=self._buffers)
        self.prepared += time.monotonic() - start
        return compute

    def _feeds(self, stage: Stage, batch: int, shifts: Mapping[str, NDArray[Any]]) -> Feeds:
        return {name: self._live(name, batch, shifts) for name in stage.given}

    def _live(self, name: str, batch: int, shifts: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        array: NDArray[Any] = self._samples.storage[name, batch]
        if name not in shifts or (name, batch) in self._shifted:
            return array
        array += shifts[name].astype(array.dtype)
        if self._samples.storage.holds((name, batch)):
            self._shifted.add((name, batch))  # in place; what is on disk is read anew
        return array


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int, *, alone: bool = False) -> Iterator[R]:
    """The results of a function for each item, in order, by several threads that are never far ahead.

    Where there are several, or where they are to work `alone`, kernels take no other threads.
    """
    waiting: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(workers, initializer=_kernels.work_alone if alone or workers > 1 else None) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
