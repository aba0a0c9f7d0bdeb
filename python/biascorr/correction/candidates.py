"""Candidates: shifts of the layers of a network, each found by another method, and how near its outputs come to the float ones.

A candidate is shifts and a score, never a copy of a model. What candidates share is measured once, when it is first needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from biascorr.calibration.progress import Progress, Work
from biascorr.calibration.samples import Samples
from biascorr.correction.analytical import analytical_shift
from biascorr.correction.methods import Activation, Empirical, Mean, Method, Squared, mean_shift
from biascorr.correction.pooling import PooledShifts
from biascorr.correction.scoring import NOT_SCORED, FloatOutputs, Score
from biascorr.graph.activations import activated_pairs
from biascorr.graph.batch_norms import ConvBnInfoType, batch_norms_around_calls
from biascorr.graph.layer import Layer
from biascorr.graph.matching import Match
from biascorr.graph.network import BiasNetwork, Network, Shift
from biascorr.graph.reasons import LayerReport, Reason, ReasonCode
from biascorr.sweep.measurements import InputMean, Measured, Wanted, empty_mean
from biascorr.sweep.paired import PairedSweep
from biascorr.sweep.plan import Stage, layers_across_stages, plan_stages
from biascorr.sweep.shard import Shards, Shifted
from biascorr.sweep.sweep import DEPTH, Sweep

_PART = 4
"""One of so many fitted batches tells which candidates are the best ones."""

_WORST = 5
"""Channels of a layer that its report names."""

_PREPARED = {"activation": 2, "squared": 3}
"""Parts of networks that are made ready to run for a stage, where they are not one."""

_LEAST_PART = 16
"""Batches that do so, at least."""


@dataclass(frozen=True)
class Choice:
    """The way in which a candidate is made.

    Parameters
    ----------
    method : str
        One of the methods of :func:`biascorr.correct`; "none" for the uncorrected network.
    strength : float
        The part of each shift that is corrected.
    shrunk : bool
        Whether shifts are smaller where samples disagree.
    is_equalized : bool
        Whether the float network was equalized before.
    """

    method: str
    strength: float = 1.0
    shrunk: bool = False
    is_equalized: bool = False

    @property
    def label(self) -> str:
        """The method, with its strength."""
        strength = [] if self.strength == 1.0 else [f"{self.strength:g}"]
        return " ".join([self.method, *strength, *(["shrunk"] if self.shrunk else [])])

    def __str__(self) -> str:
        if not self.is_equalized:
            return self.label
        return "equalized" if self.method == "none" else f"equalized, {self.label}"


@dataclass(frozen=True, eq=False)
class Candidate:
    """Shifts of layers, and their score.

    Parameters
    ----------
    choice : Choice
        The way in which it is made.
    shifts : dict from str to ndarray
        The shift of each layer that is corrected, by name; of a layer of several calls, the same by the name of each.
    reports : dict from str to LayerReport
        Of the layers that could be corrected, by name, a layer of several calls by that of the first.
    score : Score
        Of the outputs for the samples that are scored.
    is_refitted : bool
        Whether it is fitted to the held-out samples too.
    """

    choice: Choice
    shifts: dict[str, Shift] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)
    score: Score = NOT_SCORED
    is_refitted: bool = False

    def keep(self, layer: Layer, *reasons: Reason) -> None:
        """Keeps the bias of a layer as it is."""
        name = layer.first_call
        self.reports[name] = LayerReport(name, layer.op, channels=layer.channels, reasons=reasons)


class CandidateBuilder:
    """Makes candidates.

    Parameters
    ----------
    reference : Network
        Float.
    quantized : BiasNetwork
        The network whose layers are corrected.
    matches : mapping from str to Match
        The layers to correct, by name, with all of their calls.
    choices : sequence of Choice
        The candidates that are going to be made; what they share is measured for all of them.
    samples : Samples
        The samples that networks run over.
    shards : Shards
        The shards that run them.
    progress : callable or Work
        What is told of all that is done; see :data:`Progress`.
    expected : FloatOutputs, optional
        The float outputs that candidates are scored against; None: they are not scored.
    norms : mapping, optional
        The batch normalizations around the layers of the float network, the same around all calls of each; None: those found
        around each call.
    """

    def __init__(
        self,
        reference: Network,
        quantized: BiasNetwork,
        matches: Mapping[str, Match],
        choices: Sequence[Choice],
        samples: Samples,
        shards: Shards,
        progress: Progress | Work,
        *,
        expected: FloatOutputs | None = None,
        norms: Mapping[str, ConvBnInfoType] | None = None,
    ) -> None:
        self.reference = reference
        self.quantized = quantized
        self._matches = matches
        self._samples = samples
        self._work = Work.of(progress)
        self._shards = shards
        self._expected = expected
        self._norms = norms
        self._layers = [match.quantized for match in matches.values()]
        self._quantized_layers = {layer.name: layer for layer in quantized.layers}
        pairs = {name: (match.reference, match.quantized) for name, match in matches.items()}
        methods = {choice.method for choice in choices}
        self._activated = activated_pairs(reference, quantized, pairs) if methods & {"activation", "squared"} else {}
        self._batches = samples.fitted_batches
        self._reference_measured: dict[str, Measured] = {}
        self._reference_batches = 0  # so many are measured, the first ones
        self._known_analytical: dict[str, Shift] | None = None

    @property
    def has_layers(self) -> bool:
        """Whether there is anything to correct."""
        return bool(self._layers)

    @property
    def measured_batches(self) -> int:
        """Batches that the float network has been measured over."""
        return self._reference_batches

    def preparations(self, choice: Choice) -> int:
        """The parts of networks, about, that are made ready to run for a candidate."""
        stages = self._stages
        if choice.method == "analytical":
            return 0
        return stages // DEPTH if choice.method == "mean" else stages * _PREPARED.get(choice.method, 1)

    @functools.cached_property
    def _stages(self) -> int:
        """The stages of a sweep in which every layer is corrected."""
        return len(plan_stages(self.quantized, self._layers)) - 1

    def uncorrected(self, choice: Choice) -> Candidate:
        """The network as it is."""
        candidate = Candidate(choice)
        for layer in self._layers:
            candidate.keep(layer, ReasonCode.NOT_BETTER())
        return self._scored(candidate)

    @property
    def part(self) -> int | None:
        """Batches that are enough to tell the best candidates; None where there are hardly more."""
        fitted = self._samples.fitted_batches
        part = max(_LEAST_PART, len(fitted) // _PART)
        return part if 2 * part <= len(fitted) else None

    def candidate(self, choice: Choice, part: int | None = None, *, with_held_out: bool = False) -> Candidate:
        """The candidate that is made so.

        It is fitted to the first batches, so many; None: to all that are not held out, or to these too. Later ones are not
        fitted to fewer.
        """
        held_out = self._samples.held_out_batches if with_held_out else []
        self._batches = [*self._samples.fitted_batches[:part], *held_out]
        if choice.method == "mean":
            return self._with_known(choice, self._mean_shifts(), ReasonCode.NO_VALUES())
        if choice.method == "analytical":
            known = self._pooled(self._first_shifts() | self.analytical_shifts())
            return self._with_known(choice, known, ReasonCode.NO_STATISTICS())
        if choice.method == "hybrid":
            return self._hybrid(choice)
        return self._swept(choice, self._method(choice))

    def _method(self, choice: Choice) -> Method:
        if choice.method == "iterative":
            return Mean({name: match.reference.weights for name, match in self._matches.items()})
        reference = self._reference_measurements()
        if choice.method == "empirical":
            return Empirical(reference, choice.strength, choice.shrunk)
        if choice.method == "squared":
            return Squared(reference, choice.strength, choice.shrunk)
        if choice.method == "activation":
            activated = {name: tensor for name, (_, tensor) in self._activated.items()}
            return Activation(reference, choice.strength, choice.shrunk, activated=activated)
        raise ValueError(f"method: {choice.method!r} makes no candidate")

    def _swept(self, choice: Choice, method: Method, known: Mapping[str, Shift] | None = None) -> Candidate:
        """The network with its layers corrected stage by stage, each after those before it; some by shifts that are known.

        A layer that is called in several stages needs its shift before its last call is measured: one more sweep, in which
        later calls have the shift of those so far, makes it known.
        """
        shifts = dict(known or {})
        sweep = self._sweep(self.quantized, self._layers, method.wanted)
        unknown = layers_across_stages(sweep.stages) - shifts.keys()
        if unknown:
            pooled = self._correct(Candidate(choice), sweep, method, shifts, f"{self._work.label}, layers called again")
            shifts |= {name: shift for name, shift in pooled.by_layer().items() if name in unknown}
            sweep = self._sweep(self.quantized, self._layers, method.wanted)
        candidate = Candidate(choice)
        self._correct(candidate, sweep, method, shifts, self._work.label)
        return self._scored(candidate)

    def _correct(
        self, candidate: Candidate, sweep: Sweep, method: Method, known: Mapping[str, Shift], label: str
    ) -> PooledShifts:
        """Adds the layers of a sweep to a candidate, with known shifts or else with those that are measured; the latter."""
        pooled = PooledShifts()
        kind, units, prepared = candidate.choice.method, len(self._batches), self.preparations(candidate.choice)
        seconds = self._shards.prepared
        with self._beside(sweep, method) as paired, self._work.doing(kind, units, label, prepared=prepared) as advance:
            for stage in sweep.stages:
                for layer, shift, positions in self._shifts_of(sweep, stage, method, known, paired):
                    pooled.add(layer, shift, positions)
                for layer in stage.layers:
                    found = known.get(layer.first_call, pooled.of(layer))
                    if found is None:
                        candidate.keep(layer, ReasonCode.NO_VALUES())
                        continue
                    change = self._corrected(candidate, layer, found)
                    if change is not None:
                        sweep.shift(layer, change)
                before, seconds = seconds, self._shards.prepared
                advance(1 / len(sweep.stages), seconds - before)
        sweep.finish()
        return pooled

    @contextlib.contextmanager
    def _beside(self, sweep: Sweep, method: Method) -> Iterator[PairedSweep | None]:
        """The float network, swept beside the quantized one, where a method needs that and their stages are alike."""
        if not method.steps:
            yield None
            return
        pairs = {name: match.reference for name, match in self._matches.items()}
        activated = {name: tensor for name, (tensor, _) in self._activated.items()}
        paired = PairedSweep(self.reference, pairs, activated, sweep, self._shards)
        try:
            yield paired if paired.is_beside() else None
        finally:
            paired.finish()

    def _shifts_of(
        self, sweep: Sweep, stage: Stage, method: Method, known: Mapping[str, Shift], paired: PairedSweep | None = None
    ) -> Iterator[tuple[Layer, Shift, int]]:
        """Measures a stage; the shift of each call that has values, but for known ones, and the positions it is of."""
        measured = sweep.measure(stage)
        layers = [layer for layer in stage.layers if layer.first_call not in known and measured[layer.name].output.has_values]
        shifts = {layer.name: method.shift(layer, measured[layer.name]) for layer in layers}
        for _ in range(method.refinements):
            for name, after in sweep.measure_activated(stage, shifts).items():
                layer = self._matches[name].quantized
                shifts[name] = method.refined(layer, measured[name], shifts[name], after)
        if paired is not None:
            shifts = {layer.name: paired.refined(stage, layer, shifts[layer.name], method.steps) for layer in layers}
        for layer in layers:
            found = measured[layer.name]
            yield layer, method.final(layer, found, shifts[layer.name]), found.output.positions.sum()

    def _with_known(self, choice: Choice, shifts: Mapping[str, Shift], otherwise: Reason) -> Candidate:
        """The network with shifts that are known, which only has to run to be scored; why other layers have none."""
        candidate = Candidate(choice)
        for layer in self._layers:
            if layer.first_call in shifts:
                self._corrected(candidate, layer, shifts[layer.first_call])
            else:
                candidate.keep(layer, otherwise)
        return self._scored(candidate)

    def _scored(self, candidate: Candidate) -> Candidate:
        """With the score of the network as it would be saved, which a sweep does not know to the last rounding."""
        if self._expected is None:
            return candidate
        return replace(candidate, score=self._expected.score(Shifted(self.quantized, candidate.shifts)))

    def _corrected(self, candidate: Candidate, layer: Layer, shift: Shift) -> Shift | None:
        """Adds a call of a layer to a candidate; returns the change of its bias, None where it stays as it is."""
        if not np.isfinite(shift).all():
            candidate.keep(layer, ReasonCode.MEANS_NOT_FINITE())
            return None
        name = layer.first_call
        change = self.quantized.bias_change(self._quantized_layers[name], shift)
        stays = any(reason.code is ReasonCode.BIAS_CANNOT_MOVE for reason in change.reasons) and not np.any(change.applied)
        if change.applied is None or stays:
            change = replace(change, applied=None)
        method, applied = (None, 0.0) if change.applied is None else (candidate.choice.label, change.applied)
        before, after = (float(np.abs(each).mean()) for each in (shift, shift - applied))
        report = LayerReport(name, layer.op, method, layer.channels, before, after, change.reasons)
        candidate.reports[name] = replace(report, worst_channels=_worst_channels(shift))
        if change.applied is not None:
            candidate.shifts[layer.name] = shift
        return change.applied

    def _hybrid(self, choice: Choice) -> Candidate:
        """Analytical shifts of layers that have one for all of their calls, else empirical ones; the reports say which."""
        shifts = self.analytical_shifts()
        others = {layer.first_call for layer in self._layers if layer.name not in shifts}
        known = {name: shift for name, shift in self._pooled(shifts).items() if name not in others}
        candidate = self._swept(choice, Empirical(self._reference_measurements()), known)
        for name, report in candidate.reports.items():
            if report.method is not None:
                candidate.reports[name] = replace(report, method="analytical" if name in known else "empirical")
        return candidate

    def _reference_measurements(self) -> dict[str, Measured]:
        """Measurements of the float layer that each layer was, by the name of the latter; measured when first needed."""
        missing = self._batches[self._reference_batches :]
        if missing:
            found, known = self._measure_reference(missing), self._reference_measured
            self._reference_measured = {name: known[name].joined(found[name]) for name in found} if known else found
            self._reference_batches = len(self._batches)
        return self._reference_measured

    def _measure_reference(self, batches: Sequence[int]) -> dict[str, Measured]:
        layers = list({match.reference.name: match.reference for match in self._matches.values()}.values())
        activated = {self._matches[name].reference.name: tensor for name, (tensor, _) in self._activated.items()}
        sweep = Sweep(self.reference, layers, self._shards, batches, Wanted(activated=activated), depth=DEPTH)
        found: dict[str, Measured] = {}
        seconds = self._shards.prepared
        with self._work.doing("layers", len(batches), "float network", prepared=len(sweep.stages)) as advance:
            for stage in sweep.stages:
                found |= sweep.measure(stage)
                before, seconds = seconds, self._shards.prepared
                advance(1 / len(sweep.stages), seconds - before)
        sweep.finish()
        return {name: found[match.reference.name] for name, match in self._matches.items()}

    def _mean_shifts(self) -> dict[str, Shift]:
        """The weight error of each layer times its mean input in the uncorrected network."""
        method = Mean({name: match.reference.weights for name, match in self._matches.items()})
        sweep = self._sweep(self.quantized, self._layers, method.wanted, depth=DEPTH)
        pooled = PooledShifts()
        seconds = self._shards.prepared
        with self._work.doing("mean", len(self._batches), prepared=len(sweep.stages)) as advance:
            for stage in sweep.stages:
                for layer, shift, positions in self._shifts_of(sweep, stage, method, {}):
                    pooled.add(layer, shift, positions)
                before, seconds = seconds, self._shards.prepared
                advance(1 / len(sweep.stages), seconds - before)
        sweep.finish()
        return pooled.by_layer()

    def analytical_shifts(self) -> dict[str, Shift]:
        """Shifts of the calls whose mean input a batch normalization of the float network gives; found when first needed."""
        if self._known_analytical is None:
            self._known_analytical = self._find_analytical_shifts()
        return self._known_analytical

    def _find_analytical_shifts(self) -> dict[str, Shift]:
        norms = batch_norms_around_calls(self.reference) if self._norms is None else self._norms_of_calls(self._norms)
        known = {name: norms[match.reference.name] for name, match in self._matches.items() if match.reference.name in norms}
        known = {name: info for name, info in known.items() if info.gives_input_mean}
        shapes = self._shapes([self._matches[name].reference.input for name in known])
        shifts: dict[str, Shift] = {}
        for name, match in self._matches.items():
            if name in known:
                shape = shapes.get(match.reference.input)
                with _named(name):
                    shifts[name] = analytical_shift(match.quantized, match.reference.weights, known[name], shape)
        return shifts

    def _norms_of_calls(self, norms: Mapping[str, ConvBnInfoType]) -> dict[str, ConvBnInfoType]:
        """By the name of each call, those of its layer."""
        return {layer.name: norms[layer.first_call] for layer in self.reference.layers if layer.first_call in norms}

    def _pooled(self, shifts: Mapping[str, Shift]) -> dict[str, Shift]:
        """Shifts of layers, by those of calls that were not measured."""
        pooled = PooledShifts()
        for name, shift in shifts.items():
            pooled.add(self._matches[name].quantized, shift)
        return pooled.by_layer()

    def _shapes(self, names: Iterable[str]) -> Mapping[str, Sequence[int | None]]:
        """Shapes of these tensors of the float network; those in the first batch where they are not known without data."""
        known = self.reference.facts().shapes
        unknown = [name for name in dict.fromkeys(names) if None in known.get(name, (None, None))[1:]]
        if not unknown or not self._samples.data_batches:
            return known
        feeds = next(self._samples.feeds())
        computed = self.reference.part(feeds, unknown, threads=self._shards.threads)(feeds)
        return {**known, **{name: array.shape for name, array in computed.items()}}

    def _first_shifts(self) -> dict[str, Shift]:
        """Shifts of the layers that read an input of the model, as far as there are samples of it."""
        inputs = {each.name for each in self.reference.inputs}
        first = {name: match for name, match in self._matches.items() if match.reference.input in inputs}
        means: dict[str, InputMean] = {}
        for feeds in self._samples.feeds(self._batches):
            for name, match in first.items():
                if feeds[match.reference.input].size:
                    with _named(name):
                        means.setdefault(name, empty_mean(match.reference)).update(feeds[match.reference.input])
        shifts: dict[str, Shift] = {}
        for name, mean in means.items():
            quantized, reference = first[name].quantized, first[name].reference
            with _named(name):
                shifts[name] = mean_shift(quantized, reference.weights, mean.mean(reference.input_quantization))
        return shifts

    def _sweep(self, network: Network, layers: Sequence[Layer], wanted: Wanted, *, depth: int = 1) -> Sweep:
        """A sweep over the batches that are fitted."""
        return Sweep(network, layers, self._shards, self._batches, wanted, depth=depth)


@contextlib.contextmanager
def _named(layer: str) -> Iterator[None]:
    """Errors name the layer: one that no output depends on may read samples that do not fit it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer}: {str(error).removeprefix(f'layer {layer}: ')}") from error


def _worst_channels(shift: Shift) -> tuple[tuple[int, float], ...]:
    """The channels with the largest shifts in magnitude, and these."""
    largest = np.argsort(-np.abs(shift), kind="stable")[:_WORST]
    return tuple((int(channel), float(shift[channel])) for channel in largest if shift[channel])
