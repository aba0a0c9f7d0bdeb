"""Corrected copies of a network, each by another method, and how near each comes to the float one."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.samples import Progress, Samples
from biascorr.correction.analytical import analytical_shift, tells_mean
from biascorr.correction.methods import Empirical, Hybrid, Method, Shift, mean_shift
from biascorr.correction.scoring import NOT_JUDGED, Judge, Score
from biascorr.graph.activations import activated_pairs
from biascorr.graph.batch_norms import ConvBnInfoType, batch_norms_around_layers
from biascorr.graph.network import Feeds, Layer, LayerReport, Network
from biascorr.sweep.sweep import CPUS, Measured, Sweep, empty_mean, in_order

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
        if not np.isfinite(shift).all():
            self.leave(layer, "its mean values are not finite")
            return None
        change = self.network.add_to_bias(layer, shift)
        before, after = (float(np.abs(x).mean()) for x in (shift, shift - change.applied))
        self.shifts[layer.name] = shift
        self.reports[layer.name] = LayerReport(
            layer.name, layer.op, self.name, layer.channels, shift_before=before, shift_after=after, reason=change.note
        )
        return change.applied

    def leave(self, layer: Layer, reason: str) -> None:
        """Leaves the bias of a layer as it is."""
        self.reports[layer.name] = LayerReport(layer.name, layer.op, channels=layer.channels, reason=reason)


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
    activated : bool
        Whether what is behind the activations is measured too.
    judge : Network or None
        The float network whose outputs candidates are judged by, which takes a pass through the rest of each network; None:
        they are not judged.
    norms : mapping, optional
        What is around the layers of the float network; None: found there.
    """

    def __init__(
        self,
        reference: Network,
        quantized: Network,
        pairs: Mapping[str, tuple[Layer, Layer]],
        samples: Samples,
        progress: Progress,
        *,
        activated: bool = True,
        judge: Network | None = None,
        norms: Mapping[str, ConvBnInfoType] | None = None,
    ) -> None:
        self._reference = reference
        self._quantized = quantized
        self._pairs = pairs
        self._samples = samples
        self._progress = progress
        self._judge = judge
        self._norms = norms
        self._layers = [layer for _, layer in pairs.values()]
        self._activated = activated_pairs(reference, quantized, pairs) if activated else {}
        self._has_expectations = False

    @functools.cached_property
    def weights(self) -> dict[str, NDArray[Any]]:
        """The float weights of each layer."""
        return {name: layer.weights for name, (layer, _) in self._pairs.items()}

    @functools.cached_property
    def reference(self) -> dict[str, Measured]:
        """What is measured of each layer in the float network."""
        names: dict[str, list[str]] = {}
        for name, (layer, _) in self._pairs.items():
            names.setdefault(layer.name, []).append(name)
        activated = {self._pairs[name][0].name: expected for name, (expected, _) in self._activated.items()}
        layers = list({layer.name: layer for layer, _ in self._pairs.values()}.values())
        sweep = Sweep(self._reference, layers, self._samples, activated=activated, depth=_DEPTH)
        found: dict[str, Measured] = {}
        sweep.correct(
            lambda layer, measured: found.update(dict.fromkeys(names[layer.name], measured)), self._step("float network")
        )
        for batch, outputs in enumerate(sweep.outputs()):
            if self._judge is self._reference and self._samples.judge(batch).any():
                self._expect(outputs, batch)
        return found

    @functools.cached_property
    def input_means(self) -> dict[str, NDArray[Any]]:
        """The mean input of each layer in the network as it came."""
        sweep = Sweep(self._quantized, self._layers, self._samples, inputs=self._pairs, depth=_DEPTH)
        found: dict[str, NDArray[Any] | None] = {}
        sweep.correct(lambda layer, measured: found.update({layer.name: measured.input}), self._step("quantized network"))
        collections.deque(sweep.outputs(), maxlen=0)  # drops what is live
        return {name: mean for name, mean in found.items() if mean is not None}

    def uncorrected(self, name: str, network: Network) -> Candidate:
        """A network as it is."""
        candidate = Candidate(name, network, self._score(self._outputs(network)))
        for layer in self._layers:
            candidate.leave(layer, "no correction made the outputs better")
        return candidate

    @property
    def mean_shifts(self) -> dict[str, Shift]:
        """The weight error of each layer times its mean input in the network as it came."""
        means = self.input_means
        return {layer.name: mean_shift(layer, self.weights[layer.name], means[layer.name]) for layer in self._layers}

    @functools.cached_property
    def analytical_shifts(self) -> dict[str, Shift]:
        """Of the layers behind a batch normalization of the float network."""
        norms = batch_norms_around_layers(self._reference) if self._norms is None else self._norms
        known = {name: norms[before.name] for name, (before, _) in self._pairs.items() if before.name in norms}
        telling = {name: info for name, info in known.items() if tells_mean(info)}
        shapes = self._shapes([self._pairs[name][0].input for name in telling])
        return {
            name: analytical_shift(layer, before.weights, telling[name], shapes.get(before.input))
            for name, (before, layer) in self._pairs.items()
            if name in telling
        }

    def _shapes(self, names: Iterable[str]) -> Mapping[str, Sequence[int | None]]:
        """Of these tensors of the float network; of the first batch where they are not known without data."""
        known = self._reference.surroundings.shapes
        unknown = [name for name in dict.fromkeys(names) if None in known.get(name, (None, None))[1:]]
        if not unknown or not self._samples.batches:
            return known
        feeds = next(self._samples.feeds())
        return {**known, **{name: array.shape for name, array in self._reference.part(feeds, unknown)(feeds).items()}}

    @property
    def _first_shifts(self) -> dict[str, Shift]:
        """Of the layers that read an input of the model, as far as there are samples of it."""
        inputs = {each.name for each in self._reference.inputs}
        first = {name: pair for name, pair in self._pairs.items() if self._samples.batches and pair[0].input in inputs}
        means = {name: empty_mean(before) for name, (before, _) in first.items()}
        for batch, feeds in enumerate(self._samples.feeds()):
            for name, (before, _) in first.items():
                for array in self._samples.fitted(feeds[before.input], batch):
                    means[name].update(array)
        return {
            name: mean_shift(layer, before.weights, means[name].mean(before.input_quantization))
            for name, (before, layer) in first.items()
        }

    def analytical(self) -> Candidate:
        """The network corrected with what batch normalizations say; its first layers with the mean of the data."""
        candidate = self.with_shifts("analytical", self._first_shifts | self.analytical_shifts)
        for layer in self._layers:
            if layer.name not in candidate.reports:
                candidate.leave(layer, "no BatchNormalization before it tells the mean of what it reads")
        return candidate

    def empirical(self) -> Candidate:
        """Swept, the mean output of each layer that of the float one."""
        return self.swept("empirical", Empirical(self.reference))

    def hybrid(self) -> Candidate:
        """Swept, with the analytical shifts where they are known; the reports say where."""
        known = self.analytical_shifts
        candidate = self.swept("hybrid", Hybrid(known, Empirical(self.reference)))
        for name, report in candidate.reports.items():
            if report.method is not None:
                candidate.reports[name] = replace(report, method="analytical" if name in known else "empirical")
        return candidate

    def with_shifts(self, name: str, shifts: Mapping[str, Shift]) -> Candidate:
        """The network with shifts that are known."""
        candidate = Candidate(name, self._quantized.copy())
        for layer in self._layers:
            if layer.name in shifts:
                candidate.add(layer, shifts[layer.name])
        return replace(candidate, score=self._score(self._outputs(candidate.network)))

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
        return replace(candidate, score=self._score(enumerate(sweep.outputs())))

    def _score(self, outputs: Iterable[tuple[int, Feeds]]) -> Score:
        """Of outputs by batch, which are only computed where they are judged."""
        if self._judge is None:
            return NOT_JUDGED
        if not self._has_expectations:
            for batch, expected in self._outputs(self._judge):
                self._expect(expected, batch)
        judge = Judge()
        for batch, computed in outputs:
            self._compare(judge, computed, batch)
        return judge.score

    def _expect(self, outputs: Feeds, batch: int) -> None:
        self._has_expectations = True
        for name, array in outputs.items():
            self._samples.storage["float", name, batch] = array

    def _outputs(self, network: Network) -> Iterator[tuple[int, Feeds]]:
        """Outputs of a network for the batches that judge."""
        names, storage = [each.name for each in network.inputs], self._samples.storage
        batches = [batch for batch in range(self._samples.batches) if self._samples.judge(batch).any()]
        workers = min(len(batches), CPUS)
        example = {name: storage[name, batches[0]] for name in names}
        compute = network.part(example, network.outputs, threads=max(1, CPUS // workers))
        yield from zip(batches, in_order(lambda k: compute({name: storage[name, k] for name in names}), batches, workers))

    def _compare(self, judge: Judge, outputs: Feeds, batch: int) -> None:
        if self._samples.judge(batch).any():
            for name, computed in zip(self._reference.outputs, outputs.values()):
                expected = self._samples.storage["float", name, batch]
                judge.add(name, self._samples.judging(expected, batch), self._samples.judging(computed, batch))

    def _step(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(name, done, total)
