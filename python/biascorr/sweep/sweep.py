"""A sweep: the live activations of all samples at a cut of the graph, moved forward layer by layer.

    stage of an operation = the most corrected layers on any path from the inputs to it

The layers of a stage do not depend on each other, and all before them are corrected. A stage runs once per batch, from the
live tensors; then the shifts of its layers are found and added to their live outputs, and the cut moves on. So every operation
runs once per sample, however many layers there are. Quantized tensors are held as their codes: what dequantizes them runs
where it is read.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.samples import SampleMeans, Samples
from biascorr.calibration.storage import Buffers
from biascorr.graph.network import Feeds, Kind, Layer, Network
from biascorr.statistics import ChannelMean, TapMean

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]
"""Called with what is done and how much there is."""

CPUS = os.cpu_count() or 1


@dataclass(frozen=True)
class Stage:
    """Operations that run together.

    Parameters
    ----------
    layers : tuple of Layer
        Those whose shifts are found at its end.
    given, kept, dropped : tuple of str
        The live tensors it reads; those it makes; those that nothing reads behind it.
    """

    layers: tuple[Layer, ...]
    given: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def stages(network: Network, layers: Sequence[Layer], depth: int = 1) -> list[Stage]:
    """The stages of a network in order. The last has no layers; it is there for the outputs of the model.

    Where nothing is corrected on the way, `depth` layers behind each other can be measured in one stage.
    """
    inputs = {each.name for each in network.inputs}
    measured = {layer.output for layer in layers}
    level = dict.fromkeys(inputs, 0)  # of a tensor: layers on the path to it
    made = dict.fromkeys(inputs, -1)
    held = {name: {name} for name in inputs}  # what is live so that the tensor can be had
    read: dict[str, set[int]] = {}
    for operation in network.operations:
        before = max((level[name] for name in operation.inputs), default=0)
        sources = set().union(*(held[name] for name in operation.inputs))
        for name in operation.outputs:
            level[name], made[name] = before + (name in measured), before // depth
            held[name] = sources if operation.kind is Kind.DEQUANTIZE else {name}
        for source in () if operation.kind is Kind.DEQUANTIZE else sources:
            read.setdefault(source, set()).add(before // depth)
    last = max((made[name] + 1 for name in measured), default=0)
    last = max([last, *made.values()])
    for source in set().union(*(held[name] for name in network.outputs if name in held)):
        read.setdefault(source, set()).add(last)
    return [
        Stage(
            layers=tuple(layer for layer in layers if made[layer.output] == stage),
            given=tuple(name for name in read if stage in read[name] and made[name] < stage),
            kept=tuple(name for name in read if made[name] == stage < max(read[name])),
            dropped=tuple(name for name in read if 0 <= made[name] < stage == max(read[name])),
        )
        for stage in range(last + 1)
    ]


@dataclass(frozen=True)
class Measured:
    """What a sweep has measured of a layer, all layers before it corrected.

    Parameters
    ----------
    output : SampleMeans
        Of its output.
    activated : SampleMeans or None
        Of the tensor behind its activation; None where that was not asked for.
    input : ndarray or None
        Its mean input over the fitted samples, (C,) or (*K, C); None where that was not asked for.
    change_behind : callable
        How much a shift of the output, (channels,), would change the mean of that.
    """

    output: SampleMeans
    activated: SampleMeans | None
    input: NDArray[Any] | None
    change_behind: Callable[[NDArray[Any]], NDArray[np.float64]]


@dataclass(frozen=True)
class _Parts:
    """What is measured of one batch: means of tensors by name, and of inputs by what is averaged."""

    means: dict[str, SampleMeans]
    inputs: dict[Any, ChannelMean | TapMean]


class Sweep:
    """One sweep of a network.

    Parameters
    ----------
    network : Network
        What runs.
    layers : sequence of Layer
        The layers to measure and correct.
    samples : Samples
        What it runs over.
    inputs : container of str
        Names of the layers whose mean input is wanted.
    activated : mapping
        The tensors to measure behind the activations of layers, by layer name.
    depth : int
        Layers behind each other that are measured in one stage; 1 where they are corrected.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[Layer],
        samples: Samples,
        *,
        inputs: Container[str] = (),
        activated: Mapping[str, str] | None = None,
        depth: int = 1,
    ) -> None:
        self._network = network
        self._samples = samples
        self._inputs = inputs
        self._activated = activated or {}
        self._shifts: dict[str, NDArray[Any]] = {}
        self._shifted: set[tuple[str, int]] = set()
        self._buffers = Buffers()
        self._stages = stages(network, layers, depth)

    def correct(self, shift_of: Callable[[Layer, Measured], NDArray[Any] | None], progress: Progress) -> None:
        """Asks for the shift of each layer: what was added to its bias, (channels,), or None."""
        for done, stage in enumerate(self._stages[:-1], start=1):
            for layer, measured in self._measured(stage):
                shift = shift_of(layer, measured)
                if shift is not None:
                    self._shifts[layer.output] = _aligned(shift, layer.output_axis)
            progress(done, len(self._stages) - 1)

    def outputs(self) -> Iterator[Feeds]:
        """What the model gives out for each batch, after all layers are corrected."""
        return (results for results, _ in self._run(self._stages[-1], self._network.outputs))

    def _measured(self, stage: Stage) -> Iterator[tuple[Layer, Measured]]:
        axes = self._measured_axes(stage)
        read = [layer.input for layer in stage.layers if layer.name in self._inputs]
        means: dict[str, list[SampleMeans]] = {name: [] for name in axes}
        inputs: dict[Any, ChannelMean | TapMean] = {}
        for batch, (results, parts) in enumerate(self._run(stage, list(dict.fromkeys([*stage.kept, *axes, *read])))):
            for name, part in parts.means.items():
                means[name].append(part)
            for key, mean in parts.inputs.items():
                inputs[key] = _merged(inputs.get(key), mean)
            self._keep(stage, results, batch)
        self._buffers.clear()
        for layer in stage.layers:
            behind = self._activated.get(layer.name, "")
            yield (
                layer,
                Measured(
                    SampleMeans.joined(means[layer.output]),
                    SampleMeans.joined(means[behind]) if behind else None,
                    inputs[_what_is_averaged(layer)].mean(layer.input_quantization) if layer.name in self._inputs else None,
                    functools.partial(self._change_behind, layer, means.get(behind, ())),
                ),
            )

    def _measured_axes(self, stage: Stage) -> dict[str, int]:
        """The tensors whose means are wanted, and the axes of their channels."""
        axes = {layer.output: layer.output_axis for layer in stage.layers}
        behind = [layer for layer in stage.layers if layer.name in self._activated]
        return axes | {self._activated[layer.name]: layer.output_axis for layer in behind}

    def _measure(self, stage: Stage, results: Feeds, batch: int) -> _Parts:
        """What is measured of one batch."""
        means = {name: self._samples.means(results[name], axis, batch) for name, axis in self._measured_axes(stage).items()}
        wanted = {_what_is_averaged(layer): layer for layer in stage.layers if layer.name in self._inputs}
        inputs = {key: empty_mean(layer) for key, layer in wanted.items()}
        for key, mean in inputs.items():
            for array in self._samples.fitted(results[wanted[key].input], batch):
                mean.update(array)
        return _Parts(means, inputs)

    def _keep(self, stage: Stage, results: Feeds, batch: int) -> None:
        """Keeps what is live; the memory of the rest can be written again."""
        storage = self._samples.storage
        for name in stage.kept:
            storage[name, batch] = results[name]
        for name, array in results.items():
            if name not in stage.given and not (name in stage.kept and storage.holds((name, batch))):
                self._buffers.give(array)

    def _change_behind(self, layer: Layer, before: Sequence[SampleMeans], shift: NDArray[Any]) -> NDArray[np.float64]:
        """How a shift of a layer's output would change the mean of the tensor behind its activation."""
        aligned = _aligned(shift, layer.output_axis)
        fitted = [batch for batch in range(self._samples.batches) if self._samples.is_fitted(batch).any()]
        example = {layer.output: self._samples.storage[layer.output, fitted[0]]}
        compute = self._part(example, [self._activated[layer.name]])

        def measure(batch: int) -> SampleMeans:
            array = self._samples.storage[layer.output, batch]
            shifted = self._buffers.take(array.shape, array.dtype)
            np.add(array, aligned.astype(array.dtype), out=shifted)
            (activated,) = compute({layer.output: shifted}).values()
            means = self._samples.means(activated, layer.output_axis, batch)
            self._buffers.give(shifted)
            self._buffers.give(activated)
            return means

        after = SampleMeans.joined(list(in_order(measure, fitted, self._workers)))
        return after.mean - SampleMeans.joined(before).mean

    def _run(self, stage: Stage, wanted: Sequence[str]) -> Iterator[tuple[Feeds, _Parts]]:
        """The wanted tensors of each batch in order, and what is measured of it; what nothing reads any more is dropped."""
        compute = self._part(self._feeds(stage, 0), wanted)

        def run(batch: int) -> tuple[Feeds, _Parts]:
            results = compute(self._feeds(stage, batch))
            return results, self._measure(stage, results, batch)

        for batch, (results, parts) in enumerate(in_order(run, range(self._samples.batches), self._workers)):
            yield results, parts
            for name in stage.dropped:
                array = self._samples.storage.pop((name, batch))
                if array is not None and name not in results:  # what is handed out may be kept
                    self._buffers.give(array)

    @property
    def _workers(self) -> int:
        return min(self._samples.batches, CPUS)

    def _part(self, given: Feeds, wanted: Sequence[str]) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        return self._network.part(given, wanted, threads=max(1, CPUS // self._workers), buffers=self._buffers)

    def _feeds(self, stage: Stage, batch: int) -> Feeds:
        return {name: self._live(name, batch) for name in stage.given}

    def _live(self, name: str, batch: int) -> NDArray[Any]:
        array = self._samples.storage[name, batch]
        if name not in self._shifts or (name, batch) in self._shifted:
            return array
        array += self._shifts[name].astype(array.dtype)
        if self._samples.storage.holds((name, batch)):
            self._shifted.add((name, batch))  # in place; what is on disk is read anew
        return array


def _aligned(shift: NDArray[Any], axis: int) -> NDArray[Any]:
    """A shift as it is added to a layer's output."""
    return shift.reshape(-1, *[1] * (-1 - axis))


def _what_is_averaged(layer: Layer) -> tuple[Any, ...]:
    return layer.input, layer.channel_axis, layer.window


def empty_mean(layer: Layer) -> ChannelMean | TapMean:
    """What collects the mean input of a layer."""
    if layer.window is None:
        return ChannelMean(channel_axis=layer.channel_axis)
    return TapMean(layer.window, channel_axis=layer.channel_axis)


def _merged(mean: Any, part: Any) -> Any:
    if mean is None:
        return part
    mean.merge(part)
    return mean


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """What the function makes of each item, in order, by several threads that are never far ahead."""
    waiting: collections.deque[Future[R]] = collections.deque()
    alone = _kernels.work_alone if workers > 1 else None
    with ThreadPoolExecutor(workers, initializer=alone) as pool:
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
