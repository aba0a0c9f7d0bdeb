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

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.progress import Work
from biascorr.calibration.samples import Samples
from biascorr.correction.metrics import Metric, Run
from biascorr.graph.network import BiasNetwork, Feeds, Network
from biascorr.graph.operations import Kind
from biascorr.sweep.shard import Function, Shard, Shards, Shifted
from biascorr.sweep.sweep import outputs_of

R = TypeVar("R")

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


@dataclass(frozen=True)
class Terms:
    """What an output of a sample adds to its score.

    Parameters
    ----------
    signal, noise : float
        The energies of the float output and of the error; of integers, how many there are and how many are wrong.
    divergence : float or None
        The mean over positions; None where they are no probabilities.
    has_elements, are_integers : bool
        Whether there are any elements, whether they are integers.
    reference : bytes
        A digest of the float output: the same where the values are.
    """

    signal: float
    noise: float
    divergence: float | None
    has_elements: bool
    are_integers: bool
    reference: bytes

    @classmethod
    def of(cls, reference: Sequence[NDArray[Any]], computed: Sequence[NDArray[Any]]) -> Terms | None:
        """From the arrays of an output and the computed ones; None where codes would be compared with real numbers."""
        pairs = [_alike(r, q) for r, q in itertools.zip_longest(reference, computed)]
        pairs = [(r, q) for r, q in pairs if r.dtype.kind == q.dtype.kind]
        if not pairs:
            return None
        signals, noises = zip(*(_energies(r, q) for r, q in pairs))
        divergence = None
        if all(map(_are_probabilities, pairs)):
            positions = sum(math.prod(r.shape[:-1]) for r, _ in pairs)
            divergence = sum(_divergence(r, q) for r, q in pairs) / max(1, positions)
        has_elements, are_integers = any(r.size for r, _ in pairs), any(r.dtype.kind != "f" for r, _ in pairs)
        return cls(sum(signals), sum(noises), divergence, has_elements, are_integers, _digest(reference))


def _digest(arrays: Sequence[NDArray[Any]]) -> bytes:
    """The same for equal values: of zeros with either sign, of any nan."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(f"{array.shape}".encode())
        values = np.ascontiguousarray(array)
        if values.dtype.kind == "f":
            values = values + values.dtype.type(0)
            values[np.isnan(values)] = np.nan
        found.update(repr(values.tolist()).encode() if values.dtype.hasobject else values.reshape(-1).view(np.uint8).data)
    return found.digest()


class _Output:
    """One output, sample by sample."""

    def __init__(self) -> None:
        self._signals: list[float] = []
        self._noises: list[float] = []
        self._divergences: list[float] = []
        self._first: bytes | None = None
        self.is_constant = True
        self.has_elements = False
        self._are_integers = False
        self.are_probabilities = True

    def add(self, terms: Terms, times: int) -> None:
        """Adds a sample, or as many as cannot be told apart."""
        self._first = self._first or terms.reference
        self.is_constant &= terms.reference == self._first
        self.has_elements |= terms.has_elements
        self._are_integers |= terms.are_integers
        self._signals += [terms.signal] * times
        self._noises += [terms.noise] * times
        self.are_probabilities &= terms.divergence is not None
        self._divergences += [terms.divergence or 0.0] * times

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

    def add(self, name: str, terms: Terms, *, times: int = 1) -> None:
        """Adds what an output of a sample adds, or of as many as cannot be told apart."""
        self._outputs.setdefault(name, _Output()).add(terms, times)

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


@dataclass(frozen=True)
class BatchErrors:
    """What a batch adds to the score of a network.

    Parameters
    ----------
    terms : list of (str, Terms, int)
        Of each output and sample in order, and for how many samples that cannot be told apart.
    metrics : list of float
        The user's own metric of each sample.
    """

    terms: list[tuple[str, Terms, int]]
    metrics: list[float] = field(default_factory=list)


class KeptOutputs:
    """The outputs of a float network for some batches, which those of other networks are compared with.

    Parameters
    ----------
    network : Network
        The float network.
    samples : Samples
        The samples, in whose storage the outputs are kept.
    """

    def __init__(self, network: Network, samples: Samples) -> None:
        self._network = network
        self._samples = samples

    def keep(self, outputs: Iterable[tuple[int, Feeds]]) -> None:
        """Keeps what the float network gives out for each batch."""
        for batch, computed in outputs:
            for name, value in computed.items():
                self._samples.storage["float", name, batch] = value

    def has(self, batch: int) -> bool:
        """Whether the outputs for a batch are kept."""
        return all(("float", name, batch) in self._samples.storage for name in self._network.outputs)

    def kept(self, name: str, batch: int) -> Any:
        """An output of the float network for a batch."""
        return self._samples.storage["float", name, batch]

    def errors(self, pairs: Mapping[str, str], outputs: Iterable[tuple[int, Feeds]]) -> Iterator[BatchErrors]:
        """The errors of outputs, batch by batch; `pairs` are those of the float network and those that are compared."""
        for batch, computed in outputs:
            terms = []
            for name, found in pairs.items():
                parts = self._apart(name, computed[found], batch)
                times = self._samples.sizes[batch] // len(parts)
                terms += [(name, each, times) for each in (Terms.of(*part) for part in parts) if each is not None]
            yield BatchErrors(terms)

    def metrics(self, metric: Metric, pairs: Mapping[str, str], computed: Feeds, batch: int) -> list[float]:
        """The user's own metric of each sample of a batch; it may write into what it gets."""
        size = self._samples.sizes[batch]
        apart = {name: self._apart(name, computed[found], batch) for name, found in pairs.items()}
        are_apart, found = all(len(parts) == size for parts in apart.values()), list[float]()
        for k in range(size if are_apart else 1):
            ours, theirs = ({name: _copied(parts[k][which]) for name, parts in apart.items()} for which in (1, 0))
            found += [metric.of_sample(ours, theirs)] * (1 if are_apart else size)
        return found

    def _apart(self, name: str, computed: Any, batch: int) -> list[tuple[list[NDArray[Any]], list[NDArray[Any]]]]:
        """For each sample of a batch, the arrays of an output and the computed ones; all as one where they are not apart."""
        expected = self.kept(name, batch)
        if all(isinstance(each, np.ndarray) and each.ndim for each in (expected, computed)):
            ours, theirs = (self._samples.apart(each, batch) for each in (expected, computed))
            if len(ours) == len(theirs):
                return [([r], [q]) for r, q in zip(ours, theirs)]
        return [(arrays_of(expected), arrays_of(computed))]


def joined(errors: Iterable[BatchErrors]) -> OutputErrors:
    """The errors of all batches."""
    found = OutputErrors()
    for batch in errors:
        for name, terms, times in batch.terms:
            found.add(name, terms, times=times)
    return found


class FloatOutputs:
    """The outputs of a float network for the samples that are scored, which those of other networks are compared with.

    Outputs are compared by name, those that are left by position; those that no layer of the other network has a part in are
    left out. They stay where they are computed; what travels is the errors of each sample.

    Parameters
    ----------
    network : Network
        The float network, which runs when its outputs are first needed.
    samples : Samples
        The samples.
    shards : Shards
        The shards that run networks, and keep the outputs.
    metric : Metric, optional
        The user's own, which decides in place of the other measures.
    work : Work, optional
        What is told of batches that are done.
    """

    def __init__(
        self, network: Network, samples: Samples, shards: Shards, metric: Metric | None = None, work: Work | None = None
    ) -> None:
        self._network = network
        self._samples = samples
        self._shards = shards
        self._metric = metric
        self._work = Work.of(work)
        self._batches = samples.scored_batches
        self._is_known = False

    def score(self, network: Shifted) -> Score:
        """The score of a network, which runs over the batches with scored samples."""
        if not self._batches:
            return NOT_SCORED
        if not self._is_known:
            with self._work.step("float outputs"):
                self._each("float", kept_outputs, self._network)
            self._is_known = True
        return self._score(network, "score", lambda feeds: network.network.part(feeds, network.network.outputs))

    def score_deployed(self, network: Shifted) -> Score:
        """The score of a model as its own runtime runs it."""
        return self._score(network, "deployed", lambda _: network.network.deployed(threads=self._shards.threads))

    def agreement(self, network: Shifted) -> float:
        """How near the outputs that are measured come to those that its own runtime computes without optimizations, in dB.

        For one batch; infinite where there is nothing to compare.
        """
        errors = joined(self._shards.each(runtime_errors, self._batches[:1], network))
        return min(errors.outputs.values(), default=math.inf)

    def random_outputs(self) -> list[str]:
        """The outputs that the float network does not give again.

        It starts with a later batch this time: a network that draws random numbers may draw the same ones in each session.
        """
        return random_among(self._each("float", repeated_errors, self._network, batches=batches_again(self._batches)))

    def _score(self, network: Shifted, kind: str, prepare: Callable[[Feeds], Callable[[Feeds], Any]]) -> Score:
        of_sample, metrics = self._metric, list[float]()
        if of_sample is not None and of_sample.evaluates_runs:
            metrics.append(of_sample.of_run(self._runner(output_pairs(self._network, network.network), prepare)))
            of_sample = None
        found = self._each(kind, errors_of_outputs, network, self._network, of_sample, kind == "deployed")
        metrics += itertools.chain.from_iterable(each.metrics for each in found)
        score = joined(found).score
        return score if self._metric is None else replace(score, metrics=tuple(metrics))

    def _each(self, kind: str, function: Function[R], *arguments: Any, batches: Sequence[int] | None = None) -> list[R]:
        batches = self._batches if batches is None else batches
        return [*self._work.each(self._shards.each(function, batches, *arguments), kind, len(batches))]

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


def batches_again(batches: Sequence[int]) -> Sequence[int]:
    """Those that tell a random network when they run again."""
    return batches[1:][-_TRIES:] or batches


def random_among(errors: Iterable[BatchErrors]) -> list[str]:
    """The outputs that a network did not give again, but for rounding."""
    return [name for name, sqnr in joined(errors).outputs.items() if sqnr < _REPEATED]


def kept_outputs(shard: Shard, batches: Sequence[int], network: Network) -> Iterator[None]:
    """Keeps the outputs of the float network on a shard, where they are not kept yet."""
    kept = KeptOutputs(network, shard.samples)
    missing = [batch for batch in batches if not kept.has(batch)]
    yield from (None for batch in batches if batch not in missing)
    for output in outputs_of(shard, network, missing):
        kept.keep([output])
        yield


def errors_of_outputs(
    shard: Shard, batches: Sequence[int], network: Shifted, reference: Network, metric: Metric | None, is_deployed: bool
) -> Iterator[BatchErrors]:
    """The errors of a network on a shard, in exact arithmetic or as its own runtime runs it, batch by batch."""
    kept, other = _kept(shard, batches, reference), network.network
    pairs, all_pairs = compared_outputs(reference, other), output_pairs(reference, other)
    for batch, computed in _deployed(shard, batches, other) if is_deployed else outputs_of(shard, other, batches):
        metrics = [] if metric is None else kept.metrics(metric, all_pairs, computed, batch)
        (found,) = kept.errors(pairs, [(batch, computed)])
        yield replace(found, metrics=metrics)


def repeated_errors(shard: Shard, batches: Sequence[int], network: Network) -> Iterator[BatchErrors]:
    """The errors of the float network that runs again."""
    return _kept(shard, batches, network).errors({name: name for name in network.outputs}, outputs_of(shard, network, batches))


def runtime_errors(shard: Shard, batches: Sequence[int], network: Shifted) -> Iterator[BatchErrors]:
    """The errors of a network as its own runtime runs it without optimizations, beside what is measured."""
    other = network.network
    for (_, measured), (_, found) in zip(outputs_of(shard, other, batches), _deployed(shard, batches, other, optimized=False)):
        terms = {name: Terms.of(arrays_of(measured[name]), arrays_of(value)) for name, value in found.items()}
        yield BatchErrors([(name, each, 1) for name, each in terms.items() if each is not None])


def _kept(shard: Shard, batches: Sequence[int], network: Network) -> KeptOutputs:
    for _ in kept_outputs(shard, batches, network):
        pass
    return KeptOutputs(network, shard.samples)


def _deployed(
    shard: Shard, batches: Sequence[int], network: BiasNetwork, *, optimized: bool = True
) -> Iterator[tuple[int, Feeds]]:
    run = network.deployed(threads=shard.threads, optimized=optimized)
    yield from ((batch, run(feeds)) for batch, feeds in zip(batches, shard.samples.feeds(batches)))


def compared_outputs(reference: Network, network: Network) -> dict[str, str]:
    """The outputs that are compared: of the float network, and of the other one."""
    changing, codes, expected = _outputs_of_layers(network), _codes(network), _codes(reference)
    pairs = output_pairs(reference, network)
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
