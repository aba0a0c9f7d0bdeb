"""How near the outputs of a network are to those of its float reference, sample by sample.

For each sample, the mean over the outputs of the model:

SQNR = 10 log10(sum r^2 / sum (q - r)^2)  in dB
KL   = mean over positions of sum_c r_c log(r_c / q_c) - r_c + q_c, where an output is probabilities

So neither the unit of an output nor the loudness of a sample weighs anything; the score of a network is the mean over the
samples. What they say of two networks is paired: the gain of one over the other is the mean of the differences, with its
standard error. As nobody is helped by a network that is better on quiet samples alone, the noise of each sample, as a part of
the mean energy of its output, has to say the same.

A q_c of 0 is taken for half of the least one that is not: half a step, where probabilities are quantized. The last two terms of
KL cancel if both sum to 1; with them no rounding, nor an output of another kind, makes KL less than 0.

Rows that only one of the networks gives out, boxes more or less, are noise of their own energy. An output that is the same for
all samples does not count, where another one differs; nor has a sample an SQNR whose outputs are zeros, where others are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.progress import Work
from biascorr.calibration.samples import Samples
from biascorr.correction.metrics import Metric, Run
from biascorr.graph.network import BiasNetwork, Feeds, Network
from biascorr.graph.operations import Kind
from biascorr.sweep.sweep import outputs_of

_CEILING = 100.0
"""dB of a sample without any error: no quantizer comes near, and more must not outweigh other samples."""

_FLOOR = -300.0
"""dB of a sample that is lost."""

_LOST = 1e30
"""Noise of a sample that is lost, as a part of the signal."""

_SURE_OF_ONE = 100
"""An output of n integers, all equal, counts as if one in so many times n were wrong."""

_DOUBT = 1.0
"""dB by which the gain of one more sample may be expected to differ from the mean, before any is known."""

_REPEATED = 60.0
"""dB that outputs of the same network have at least, by which threads may round differently: a random one has some 10."""

_TRIES = 8
"""Batches that tell a random network: one that drops a few channels may drop the same ones by chance."""

_LEAST_PROBABILITY = 1e-9
"""Less is taken for this much, so that one class that vanishes does not outweigh all others."""


_COARSEST = 2.0**-4
"""The step of probabilities of 4 bits; where none that is not 0 is as small, there is no grid to be seen."""


@dataclass(frozen=True)
class Gain:
    """What one network has over another, from the differences of their samples.

    Parameters
    ----------
    mean : float
        The mean difference; above 0 where the first one is better.
    error : float
        Its standard error.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, differences: NDArray[np.float64], doubt: float = 0.0) -> Gain:
        """From the difference of each sample, nan where it is not known, one more of which differs from the mean by so much."""
        known = differences[~np.isnan(differences)]
        differences = known if known.size else differences
        mean = float(differences.mean())
        squares = float(np.square(differences - mean).sum()) + doubt**2
        return cls(mean, math.sqrt(squares) / len(differences))

    @property
    def is_sure(self) -> bool:
        """Whether it is above its standard error."""
        return self.mean > self.error

    def __str__(self) -> str:
        scale = self.error or abs(self.mean) or 1.0
        digits = max(2, 1 - math.floor(math.log10(scale))) if math.isfinite(scale) else 2
        return f"{self.mean:+.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Score:
    """How near a network's outputs are to the float ones.

    Parameters
    ----------
    sqnrs : tuple of float
        Signal to quantization noise ratio of each sample in dB, the mean over the outputs; nan where all are silent.
    divergences : tuple of float, or None
        Kullback-Leibler divergence of each sample in nats, the mean over the outputs that are probabilities; None where none
        is.
    metrics : tuple of float, or None
        The user's own metric of each sample, or one of the network; None where there is none.
    noises : tuple of float, or None
        Noise of each sample as a part of the mean energy of an output, the mean over the outputs.
    """

    sqnrs: tuple[float, ...]
    divergences: tuple[float, ...] | None = None
    metrics: tuple[float, ...] | None = None
    noises: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        return f"<Score of {len(self.sqnrs)}: {self}>"

    @property
    def sqnr(self) -> float:
        """The mean SQNR in dB."""
        known = [sqnr for sqnr in self.sqnrs if not math.isnan(sqnr)]
        return float(np.mean(known)) if known else math.nan

    @property
    def divergence(self) -> float | None:
        """The mean divergence in nats."""
        return None if self.divergences is None else float(np.mean(self.divergences))

    @property
    def metric(self) -> float | None:
        """The mean of the user's own metric."""
        return None if self.metrics is None else float(np.mean(self.metrics))

    def gains_over(self, other: Score) -> dict[str, Gain]:
        """By measure, for those that decide: the user's own metric; else the SQNR, and the divergence where both have one."""
        if self.metrics is not None and other.metrics is not None:
            return {"metric": Gain.of(np.subtract(self.metrics, other.metrics))}
        gains = {"sqnr": Gain.of(np.subtract(self.sqnrs, other.sqnrs), _DOUBT)}
        if self.divergences is not None and other.divergences is not None:
            gains["divergence"] = Gain.of(np.subtract(other.divergences, self.divergences))
        return gains

    def is_worse_than(self, other: Score) -> bool:
        """Whether any measure is worse."""
        return any(gain.mean < 0 for gain in self.gains_over(other).values())

    def is_better_than(self, other: Score) -> bool:
        """Whether it is surely better by metric; else by SQNR and noise, and better by divergence."""
        gains = self.gains_over(other)
        agrees = gains.pop("divergence", Gain(1.0, 0.0)).mean > 0
        if "metric" not in gains and self.noises is not None and other.noises is not None:
            gains["noise"] = Gain.of(np.subtract(other.noises, self.noises))
        return agrees and all(gain.is_sure for gain in gains.values())

    def __str__(self) -> str:
        parts = [] if math.isnan(self.sqnr) and self.metrics else [f"{self.sqnr:.2f} dB"]
        parts += [] if self.divergence is None else [f"KL {self.divergence:.3g}"]
        return ", ".join(parts + ([] if self.metric is None else [f"metric {self.metric:.4g}"]))

    @staticmethod
    def best(scores: Iterable[Score]) -> Score:
        """The best of some scores: by metric, else by divergence where all have one, for classifiers, else by SQNR."""
        scores = list(scores)
        if all(score.metric is not None for score in scores):
            return max(scores, key=lambda score: (score.metric or 0.0, score.sqnr))
        if any(score.divergence is None for score in scores):
            return max(scores, key=lambda score: score.sqnr)
        return max(scores, key=lambda score: (-(score.divergence or 0.0), score.sqnr))


NOT_SCORED = Score((math.nan,))
"""The score of outputs that cannot be compared."""


class _Output:
    """One output, sample by sample."""

    def __init__(self) -> None:
        self._signals: list[float] = []
        self._noises: list[float] = []
        self._divergences: list[float] = []
        self._first: Sequence[NDArray[Any]] | None = None
        self.is_constant = True
        self.has_elements = False
        self._are_integers = False
        self.are_probabilities = True

    def add(self, reference: Sequence[NDArray[Any]], computed: Sequence[NDArray[Any]], times: int) -> None:
        """Adds a sample, or as many as cannot be told apart: the arrays of it, and those that are compared with them."""
        pairs = [_alike(r, q) for r, q in itertools.zip_longest(reference, computed)]
        pairs = [(r, q) for r, q in pairs if r.dtype.kind == q.dtype.kind]
        if self._first is None:
            self._first = reference
        else:
            self.is_constant &= len(reference) == len(self._first) and all(map(_same, reference, self._first))
        self.has_elements |= any(r.size for r, _ in pairs)
        self._are_integers |= any(r.dtype.kind != "f" for r, _ in pairs)
        signals, noises = zip(*(_energies(r, q) for r, q in pairs))
        self._signals += [sum(signals)] * times
        self._noises += [sum(noises)] * times
        self.are_probabilities &= all(map(_are_probabilities, pairs))
        if self.are_probabilities:
            positions = sum(math.prod(r.shape[:-1]) for r, _ in pairs)
            self._divergences += [sum(_divergence(r, q) for r, q in pairs) / max(1, positions)] * times

    @property
    def is_varying(self) -> bool:
        """Whether it depends on the sample, as far as is known."""
        return not self.is_constant or len(self._signals) == 1

    @property
    def sqnrs(self) -> NDArray[np.float64]:
        """Of each sample, in dB; nan where it is silent."""
        return self._ratios(self._counted_noises)

    @property
    def agreement(self) -> float:
        """The mean of these in dB, without doubt of integers that are all equal."""
        return float(np.nanmean(self._ratios(np.array(self._noises))))

    def _ratios(self, noises: NDArray[np.float64]) -> NDArray[np.float64]:
        signals = np.array(self._signals)
        if not signals.any():
            return np.where(noises == 0, _CEILING, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = 10.0 * (np.log10(signals) - np.log10(noises))
        ratios = np.where(noises == 0, _CEILING, np.clip(np.nan_to_num(ratios, nan=_FLOOR), _FLOOR, _CEILING))
        return np.where(signals > 0, ratios, np.nan)

    @property
    def noises(self) -> NDArray[np.float64]:
        """Of each sample, as a part of the mean signal."""
        signal = float(np.mean(self._signals)) or 1.0
        return np.asarray(np.nan_to_num(self._counted_noises / signal, nan=_LOST, posinf=_LOST))

    @property
    def _counted_noises(self) -> NDArray[np.float64]:
        return np.maximum(self._noises, 1 / _SURE_OF_ONE) if self._are_integers else np.array(self._noises)

    @property
    def divergences(self) -> NDArray[np.float64]:
        """Of each sample, in nats."""
        return np.array(self._divergences)


def _alike(r: NDArray[Any] | None, q: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two arrays of types that numpy has, bfloat16 and float8 as float32; an empty one for what is missing."""
    one, other = (None if each is None else _plain(each) for each in (r, q))
    if one is None or other is None:
        present: Any = other if one is None else one
        nothing = np.zeros(0, present.dtype)
        return (nothing, present) if one is None else (present, nothing)
    return one, other


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype.isbuiltin == 2 else values


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _energies(reference: NDArray[Any], computed: NDArray[Any]) -> tuple[float, float]:
    """Signal and noise; of integers, how many there are and how many are wrong."""
    if reference.dtype.kind != "f":
        alike = reference.shape == computed.shape and reference == computed
        return reference.size, int((reference.size or computed.size) - np.count_nonzero(alike))
    r, q = reference.astype(np.float64), computed.astype(np.float64)
    signal = _energy(r)
    if r.shape == q.shape:
        return signal, float(np.square(np.subtract(q, r, where=np.isfinite(r), out=np.zeros_like(r))).sum())
    if r.ndim != q.ndim:
        return signal, signal or _energy(q)
    common = tuple(slice(min(sizes)) for sizes in zip(r.shape, q.shape))
    kept, found = r[common], q[common]
    lost = signal - _energy(kept) + _energy(q) - _energy(found)
    return signal, _energies(kept, found)[1] + max(0.0, lost)


def _are_probabilities(pair: tuple[NDArray[Any], NDArray[Any]]) -> bool:
    r, q = pair
    if r.dtype.kind != "f" or r.shape != q.shape or r.ndim == 0:
        return False
    return bool((r >= 0).all() and np.allclose(r.sum(axis=-1, dtype=np.float64), 1.0, atol=1e-3))


def _divergence(reference: NDArray[Any], computed: NDArray[Any]) -> float:
    """The sum over positions."""
    r, q = reference.astype(np.float64), computed.astype(np.float64)
    logs = np.log(np.maximum(r, _LEAST_PROBABILITY)) - np.log(np.maximum(q, _least_probability(q)))
    return float((r * logs - r + q).sum())


def _least_probability(q: NDArray[np.float64]) -> float:
    """What a probability of 0 is taken for: on a grid, half a step is all that is known of it."""
    step = float(q.min(initial=1.0, where=q > 0))
    return max(_LEAST_PROBABILITY, step / 2) if step <= _COARSEST else _LEAST_PROBABILITY


def _energy(values: NDArray[Any]) -> float:
    return float(np.square(values, where=np.isfinite(values), out=np.zeros_like(values)).sum())


class OutputErrors:
    """The errors of a network's outputs, collected sample by sample."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def add(self, name: str, reference: Sequence[NDArray[Any]], computed: Sequence[NDArray[Any]], *, times: int = 1) -> None:
        """Compares the arrays of an output for a sample with the float ones; codes cannot be compared with real numbers.

        Samples that cannot be told apart, so many, are compared as one.
        """
        if any(_kinds_agree(r, q) for r, q in itertools.zip_longest(reference, computed)):
            self._outputs.setdefault(name, _Output()).add(reference, computed, times)

    @property
    def outputs(self) -> dict[str, float]:
        """How near each output alone comes, in dB."""
        return {name: each.agreement for name, each in self._outputs.items()}

    @property
    def divergences(self) -> dict[str, float]:
        """The mean divergence of each output that is probabilities, in nats."""
        found = {name: each.divergences for name, each in self._outputs.items() if each.are_probabilities and each.has_elements}
        return {name: float(np.mean(divergences)) for name, divergences in found.items()}

    @property
    def score(self) -> Score:
        """The score of all samples."""
        known = list(self._outputs.values())
        counted = [each for each in known if each.has_elements] or known
        counted = [each for each in counted if each.is_varying] or counted
        if not counted:
            return NOT_SCORED
        divergences = [each.divergences for each in counted if each.are_probabilities and each.has_elements]
        sqnrs, noises = (np.array([getattr(each, name) for each in counted]) for name in ("sqnrs", "noises"))
        return Score(_means(sqnrs), _means(np.array(divergences)) if divergences else None, noises=_means(noises))


def _means(outputs: NDArray[np.float64]) -> tuple[float, ...]:
    """The mean over the outputs of each sample; nan where it is of none."""
    counts = (~np.isnan(outputs)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return tuple((np.nansum(outputs, axis=0) / counts).tolist())


def _kinds_agree(r: NDArray[Any] | None, q: NDArray[Any] | None) -> bool:
    one, other = _alike(r, q)
    return one.dtype.kind == other.dtype.kind


class FloatOutputs:
    """The outputs of a float network for the samples that are scored, which those of other networks are compared with.

    Outputs are compared by name, those that are left by position; those that no layer of the other network has a part in are
    left out.

    Parameters
    ----------
    network : Network
        The float network, which runs when its outputs are first needed.
    samples : Samples
        The samples, in whose storage the outputs are kept.
    threads : int
        Threads that run networks.
    metric : Metric, optional
        The user's own, which decides in place of the other measures.
    work : Work, optional
        What is told of batches that are done.
    """

    def __init__(
        self, network: Network, samples: Samples, threads: int, metric: Metric | None = None, work: Work | None = None
    ) -> None:
        self._network = network
        self._samples = samples
        self._threads = threads
        self._metric = metric
        self._work = Work.of(work)
        self._batches = samples.scored_batches
        self._is_known = False

    def score(self, network: Network) -> Score:
        """The score of a network, which runs over the batches with scored samples."""
        if not self._batches:
            return NOT_SCORED
        if not self._is_known:
            with self._work.step("float outputs"):
                self.keep(self._run(self._network, self._batches))
        return self._score(
            network, self._run(network, self._batches, "score"), lambda feeds: network.part(feeds, network.outputs)
        )

    def keep(self, outputs: Iterable[tuple[int, Feeds]]) -> None:
        """Keeps what the float network gives out for each batch, which then need not run."""
        for batch, computed in outputs:
            for name, value in computed.items():
                self._samples.storage["float", name, batch] = value
        self._is_known = True

    def kept(self, name: str, batch: int) -> Any:
        """An output of the float network for a batch."""
        return self._samples.storage["float", name, batch]

    def score_deployed(self, network: BiasNetwork) -> Score:
        """The score of a model as its own runtime runs it."""
        run = network.deployed(threads=self._threads)
        batches = zip(self._batches, self._samples.feeds(self._batches))
        outputs = ((batch, run(feeds)) for batch, feeds in batches)
        return self._score(network, self._work.each(outputs, "deployed", len(self._batches)), lambda _: run)

    def agreement(self, network: BiasNetwork) -> float:
        """How near the outputs that are measured come to those that its own runtime computes without optimizations, in dB.

        For one batch; infinite where there is nothing to compare.
        """
        batches = self._batches[:1]
        (_, measured), errors = next(self._run(network, batches)), OutputErrors()
        for name, value in network.deployed(threads=self._threads, optimized=False)(next(self._samples.feeds(batches))).items():
            errors.add(name, arrays_of(measured[name]), arrays_of(value))
        return min(errors.outputs.values(), default=math.inf)

    def random_outputs(self, run: Callable[[Sequence[int]], Iterable[tuple[int, Feeds]]] | None = None) -> list[str]:
        """The outputs that the float network, or what runs it over batches, does not give again, but for rounding.

        It starts with a later batch this time: a network that draws random numbers may draw the same ones in each session.
        """
        batches = self._batches[1:][-_TRIES:] or self._batches
        again = self._run(self._network, batches) if run is None else run(batches)
        errors = self.errors({name: name for name in self._network.outputs}, again)
        return [name for name, sqnr in errors.outputs.items() if sqnr < _REPEATED]

    def _run(self, network: Network, batches: Sequence[int], kind: str = "float") -> Iterator[tuple[int, Feeds]]:
        return self._work.each(outputs_of(network, self._samples, batches, self._threads), kind, len(batches))

    def _score(
        self, network: Network, outputs: Iterable[tuple[int, Feeds]], prepare: Callable[[Feeds], Callable[[Feeds], Any]]
    ) -> Score:
        if self._metric is None:
            return self.errors(self.pairs(network), outputs).score
        pairs, found = output_pairs(self._network, network), list[float]()
        if self._metric.evaluates_runs:
            found.append(self._metric.of_run(self._runner(pairs, prepare)))
        else:
            outputs = self._with_metrics(self._metric, pairs, outputs, found)
        return replace(self.errors(self.pairs(network), outputs).score, metrics=tuple(found))

    def errors(self, pairs: Mapping[str, str], outputs: Iterable[tuple[int, Feeds]]) -> OutputErrors:
        """The errors of outputs, batch by batch."""
        errors = OutputErrors()
        for batch, computed in outputs:
            for name, found in pairs.items():
                parts = self.apart(name, computed[found], batch)
                for expected, values in parts:
                    errors.add(name, expected, values, times=self._samples.sizes[batch] // len(parts))
        return errors

    def _with_metrics(
        self, metric: Metric, pairs: Mapping[str, str], outputs: Iterable[tuple[int, Feeds]], metrics: list[float]
    ) -> Iterator[tuple[int, Feeds]]:
        """Gives outputs on, batch by batch, and adds the metric of each sample to a list; it may write into what it gets."""
        for batch, computed in outputs:
            size = self._samples.sizes[batch]
            apart = {name: self.apart(name, computed[found], batch) for name, found in pairs.items()}
            are_apart = all(len(parts) == size for parts in apart.values())
            for k in range(size if are_apart else 1):
                ours, theirs = ({name: _copied(parts[k][which]) for name, parts in apart.items()} for which in (1, 0))
                metrics.extend([metric.of_sample(ours, theirs)] * (1 if are_apart else size))
            yield batch, computed

    def apart(self, name: str, computed: Any, batch: int) -> list[tuple[list[NDArray[Any]], list[NDArray[Any]]]]:
        """For each sample of a batch, the arrays of an output and the computed ones; all as one where they are not apart."""
        expected = self.kept(name, batch)
        if all(isinstance(each, np.ndarray) and each.ndim for each in (expected, computed)):
            ours, theirs = (self._samples.apart(each, batch) for each in (expected, computed))
            if len(ours) == len(theirs):
                return [([r], [q]) for r, q in zip(ours, theirs)]
        return [(arrays_of(expected), arrays_of(computed))]

    def _runner(self, pairs: Mapping[str, str], prepare: Callable[[Feeds], Callable[[Feeds], Any]]) -> Run:
        """Runs a network on batches of the user's, and calls its outputs as the float network does."""
        inputs, prepared = [each.name for each in self._network.inputs], list[Callable[[Feeds], Any]]()

        def run(batch: Any) -> dict[str, NDArray[Any]]:
            feeds = dict(batch) if isinstance(batch, Mapping) else {inputs[0]: np.asarray(batch)}
            if set(feeds) != set(inputs):
                raise ValueError(f"metric: it ran {', '.join(map(str, feeds))}, the model's inputs are {', '.join(inputs)}")
            if not prepared:
                prepared.append(prepare(feeds))
            computed = prepared[0](feeds)
            return {name: computed[found] for name, found in pairs.items()}

        return run

    def pairs(self, network: Network) -> dict[str, str]:
        """The outputs that are compared: of the float network, and of the other one."""
        changing, codes, expected = _outputs_of_layers(network), _codes(network), _codes(self._network)
        pairs = output_pairs(self._network, network)
        pairs = {name: found for name, found in pairs.items() if (name in expected) == (found in codes)}
        return {name: found for name, found in pairs.items() if found in changing} or pairs


def output_pairs(reference: Network, network: Network) -> dict[str, str]:
    """The outputs of the float network and those of another one: of the same name; of what is left, in order, if as many."""
    pairs = {name: name for name in reference.outputs if name in set(network.outputs)}
    ours, theirs = ([name for name in each.outputs if name not in pairs] for each in (reference, network))
    return pairs | (dict(zip(ours, theirs)) if len(ours) == len(theirs) else {})


def _copied(arrays: list[NDArray[Any]]) -> Any:
    """The array of an output; a list, where it is a sequence."""
    return arrays[0].copy() if len(arrays) == 1 else [each.copy() for each in arrays]


def arrays_of(output: Any) -> list[NDArray[Any]]:
    """The arrays of an output: itself, those of a sequence, none of anything else."""
    return [each for each in (output if isinstance(output, list) else [output]) if isinstance(each, np.ndarray)]


def _codes(network: Network) -> set[str]:
    """The tensors of quantized values, which are not to be compared with real numbers."""
    return {name for each in network.operations if each.kind is Kind.QUANTIZE for name in each.outputs}


def _outputs_of_layers(network: Network) -> set[str]:
    """The tensors that layers have a part in."""
    reached = {layer.output for layer in network.layers}
    for operation in network.operations:
        if operation.kind is not Kind.SHAPE and not reached.isdisjoint(operation.inputs):
            reached.update(operation.outputs)
    return reached
