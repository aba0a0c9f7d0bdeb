"""Corrected copies of a network, each by another method, and how near each comes to the float one."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.model.activations import activated_pairs
from biascorr.model.judging import NOT_JUDGED, Judge, Score
from biascorr.model.methods import Method, Shift
from biascorr.model.network import Feeds, Layer, LayerReport, Network
from biascorr.model.samples import Samples
from biascorr.model.sweep import CPUS, Measured, Sweep, in_order

Progress = Callable[[str, int, int | None], None]
"""Called with what is going on, what of it is done, and how much there is (None if unknown)."""

_DEPTH = 8
"""Layers measured in one stage where nothing is corrected: more hold more activations of a batch at once."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A corrected network.

    Parameters
    ----------
    name : str
        How it was corrected.
    network : Network
        With corrected biases.
    score : Score
        Of its outputs for the samples that judge.
    shifts : mapping
        What was to be added to the bias of each layer, by name.
    reports : mapping
        What became of it.
    """

    name: str
    network: Network
    score: Score = NOT_JUDGED
    shifts: dict[str, Shift] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)

    def add(self, layer: Layer, shift: Shift) -> NDArray[np.float64] | None:
        """Adds a shift to the bias of a layer; returns what the bias changed by, None where it did not."""
        report = LayerReport(layer.name, layer.op, channels=layer.channels)
        if not np.isfinite(shift).all():
            self.reports[layer.name] = replace(report, reason="its mean values are not finite")
            return None
        change = self.network.add_to_bias(layer, shift)
        before, after = (float(np.abs(x).mean()) for x in (shift, shift - change.applied))
        self.shifts[layer.name] = shift
        self.reports[layer.name] = replace(
            report, method=self.name, shift_before=before, shift_after=after, reason=change.note
        )
        return change.applied


class Workshop:
    """Makes candidates. What they share is computed once, when it is first asked for.

    Parameters
    ----------
    reference, quantized : Network
        The float network, and the one whose layers are corrected.
    pairs : mapping
        Layers to correct: the float one and the quantized one, by the name of the latter.
    samples : Samples
        What they run over.
    progress : callable
        See :data:`Progress`.
    """

    def __init__(
        self,
        reference: Network,
        quantized: Network,
        pairs: Mapping[str, tuple[Layer, Layer]],
        samples: Samples,
        progress: Progress,
    ) -> None:
        self._reference = reference
        self._quantized = quantized
        self._pairs = pairs
        self._samples = samples
        self._progress = progress
        self._layers = [layer for _, layer in pairs.values()]

    @functools.cached_property
    def weights(self) -> dict[str, NDArray[Any]]:
        """The float weights of each layer."""
        return {name: layer.weights for name, (layer, _) in self._pairs.items()}

    @functools.cached_property
    def _activated(self) -> dict[str, tuple[str, str]]:
        return activated_pairs(self._reference, self._quantized, self._pairs)

    @functools.cached_property
    def reference(self) -> dict[str, Measured]:
        """What is measured of each layer in the float network."""
        names = {layer.name: name for name, (layer, _) in self._pairs.items()}
        activated = {self._pairs[name][0].name: expected for name, (expected, _) in self._activated.items()}
        layers = list({layer.name: layer for layer, _ in self._pairs.values()}.values())
        sweep = Sweep(self._reference, layers, self._samples, activated=activated, depth=_DEPTH)
        found: dict[str, Measured] = {}
        sweep.correct(lambda layer, measured: found.update({names[layer.name]: measured}), self._step("float network"))
        for batch, outputs in enumerate(sweep.outputs()):
            for name in self._reference.outputs if self._samples.judge(batch).any() else ():
                self._samples.storage["float", name, batch] = outputs[name]
        return found

    @functools.cached_property
    def input_means(self) -> dict[str, NDArray[Any]]:
        """The mean input of each layer in the network as it came."""
        sweep = Sweep(self._quantized, self._layers, self._samples, inputs=self._pairs, depth=_DEPTH)
        found: dict[str, NDArray[Any]] = {}
        sweep.correct(lambda layer, measured: found.update({layer.name: measured.input}), self._step("quantized network"))
        collections.deque(sweep.outputs(), maxlen=0)  # drops what is live
        return found

    @functools.cached_property
    def uncorrected(self) -> Candidate:
        """The network as it came."""
        return Candidate("none", self._quantized, self._judged(self._quantized))

    def with_shifts(self, name: str, shifts: Mapping[str, Shift]) -> Candidate:
        """The network with shifts that are known."""
        candidate = Candidate(name, self._quantized.copy())
        for layer in self._layers:
            if layer.name in shifts:
                candidate.add(layer, shifts[layer.name])
        return replace(candidate, score=self._judged(candidate.network))

    def swept(self, name: str, method: Method, *, inputs: bool = False, activated: bool = False) -> Candidate:
        """The network whose layers are corrected one by one, each behind those before it."""
        candidate = Candidate(name, self._quantized.copy())
        sweep = Sweep(
            self._quantized,
            self._layers,
            self._samples,
            inputs=self._pairs if inputs else (),
            activated={name: tensor for name, (_, tensor) in self._activated.items()} if activated else {},
        )
        sweep.correct(lambda layer, measured: candidate.add(layer, method(layer, measured)), self._step(name))
        judge = Judge()
        for batch, outputs in enumerate(sweep.outputs()):
            self._compare(judge, outputs, batch)
        return replace(candidate, score=judge.score)

    def _judged(self, network: Network) -> Score:
        """The score of a network, from a pass over the samples that judge."""
        self.reference
        batches = [batch for batch in range(self._samples.batches) if self._samples.judge(batch).any()]
        names = [each.name for each in network.inputs]
        storage = self._samples.storage
        feeds = lambda batch: {name: storage[name, batch] for name in names}
        workers = min(len(batches), CPUS)
        compute = network.part(feeds(batches[0]), network.outputs, threads=max(1, CPUS // workers))
        judge = Judge()
        for batch, outputs in zip(batches, in_order(lambda batch: compute(feeds(batch)), batches, workers)):
            self._compare(judge, outputs, batch)
        return judge.score

    def _compare(self, judge: Judge, outputs: Feeds, batch: int) -> None:
        if self._samples.judge(batch).any():
            for name, computed in zip(self._reference.outputs, outputs.values()):
                expected = self._samples.storage["float", name, batch]
                judge.add(name, self._samples.judging(expected, batch), self._samples.judging(computed, batch))

    def _step(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(name, done, total)
