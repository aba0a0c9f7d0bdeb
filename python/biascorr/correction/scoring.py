"""How near the outputs of a network are to those of its float reference.

SQNR = 10 log10(sum r^2 / sum (q - r)^2)  in dB, averaged over the outputs of the model
KL   = mean over positions of sum_c r_c log(r_c / q_c) - r_c + q_c, where an output is probabilities

A q_c of 0 is taken for half of the least one that is not: half a step, where probabilities are quantized.

The last two terms cancel if both sum to 1; with them no rounding, nor an output of another kind, makes KL less than 0.

Values that a network gives out in another shape than its reference, boxes more or less, are lost: their noise is as much as
their signal, in any unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.samples import Samples
from biascorr.graph.network import BiasNetwork, Feeds, Network
from biascorr.graph.operations import Kind
from biascorr.sweep.sweep import outputs_of

_CEILING = 300.0
"""dB of an output without any error: beyond what float64 resolves."""

_REPEATED = 60.0
"""dB that outputs of the same network have at least, by which threads may round differently: a random one has some 10."""

_TRIES = 8
"""Batches that tell a random network: one that drops a few channels may drop the same ones by chance."""

_LEAST_PROBABILITY = 1e-9
"""Less is taken for this much, so that one class that vanishes does not outweigh all others."""


_COARSEST = 2.0**-4
"""The step of probabilities of 4 bits; where none that is not 0 is as small, there is no grid to be seen."""


@dataclass(frozen=True)
class Score:
    """How near a network's outputs are to the float ones.

    Parameters
    ----------
    sqnr : float
        Signal to quantization noise ratio in dB, the mean over the outputs.
    divergence : float or None
        Kullback-Leibler divergence in nats, the mean over the outputs that are probabilities; None where none is.
    """

    sqnr: float
    divergence: float | None = None

    def is_worse_than(self, other: Score) -> bool:
        """Whether any measure that both have is worse."""
        both = self.divergence is not None and other.divergence is not None
        return self.sqnr < other.sqnr or (both and (self.divergence or 0.0) > (other.divergence or 0.0))

    def __str__(self) -> str:
        return f"{self.sqnr:.2f} dB" + ("" if self.divergence is None else f", KL {self.divergence:.3g}")

    @staticmethod
    def best(scores: Iterable[Score]) -> Score:
        """The best of some scores: by divergence where all have one, for classifiers, else by SQNR."""
        scores = list(scores)
        if any(score.divergence is None for score in scores):
            return max(scores, key=lambda score: score.sqnr)
        return max(scores, key=lambda score: (-(score.divergence or 0.0), score.sqnr))


NOT_SCORED = Score(float("nan"))
"""The score of outputs that cannot be compared."""


class _Output:
    """Errors of one output, batch by batch."""

    def __init__(self) -> None:
        self.signal = self.noise = self.divergence = 0.0
        self.positions = 0
        self.probabilities = True
        self.has_elements = False

    def add(self, reference: NDArray[Any], computed: NDArray[Any]) -> None:
        self.has_elements |= bool(reference.size or computed.size)
        if reference.dtype.kind != "f":
            alike = reference.shape == computed.shape and reference == computed
            self.signal += reference.size
            self.noise += (reference.size or computed.size) - np.count_nonzero(alike)
            self.probabilities = False
            return
        r, q = reference.astype(np.float64), computed.astype(np.float64)
        signal = _energy(r)
        self.signal += signal
        if r.shape != q.shape:
            self.noise += signal or _energy(q)
            self.probabilities = False
            return
        self.noise += float(np.square(np.subtract(q, r, where=np.isfinite(r), out=np.zeros_like(r))).sum())
        self.probabilities &= bool(r.ndim > 0 and (r >= 0).all() and np.allclose(r.sum(axis=-1), 1.0, atol=1e-3))
        if self.probabilities:
            logs = np.log(np.maximum(r, _LEAST_PROBABILITY)) - np.log(np.maximum(q, _least_probability(q)))
            self.divergence += float((r * logs - r + q).sum())
            self.positions += r.size // r.shape[-1]

    @property
    def sqnr(self) -> float:
        if np.isnan(self.noise):
            return -np.inf
        with np.errstate(divide="ignore"):
            ratio = 10.0 * (np.log10(self.signal) - np.log10(self.noise)) if self.noise else _CEILING
        return float(np.clip(ratio, -_CEILING, _CEILING))


def _least_probability(q: NDArray[np.float64]) -> float:
    """What a probability of 0 is taken for: on a grid, half a step is all that is known of it."""
    step = float(q.min(initial=1.0, where=q > 0))
    return max(_LEAST_PROBABILITY, step / 2) if step <= _COARSEST else _LEAST_PROBABILITY


def _energy(values: NDArray[np.float64]) -> float:
    return float(np.square(values, where=np.isfinite(values), out=np.zeros_like(values)).sum())


class OutputErrors:
    """The errors of a network's outputs, collected batch by batch."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def add(self, name: str, reference: Iterable[NDArray[Any]], computed: Iterable[NDArray[Any]]) -> None:
        """Compares some values of an output with the float ones; codes cannot be compared with real numbers."""
        for expected, found in itertools.zip_longest(map(_plain, reference), map(_plain, computed)):
            expected = np.zeros(0, found.dtype) if expected is None else expected
            found = np.zeros(0, expected.dtype) if found is None else found
            if expected.dtype.kind == found.dtype.kind:
                self._outputs.setdefault(name, _Output()).add(expected, found)

    @property
    def score(self) -> Score:
        outputs = [each for each in self._outputs.values() if each.has_elements] or list(self._outputs.values())
        if not outputs:
            return NOT_SCORED
        divergences = [each.divergence / each.positions for each in outputs if each.probabilities and each.positions]
        return Score(float(np.mean([each.sqnr for each in outputs])), float(np.mean(divergences)) if divergences else None)


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Values of a type that numpy has: bfloat16 and float8, which it has not, are real."""
    return values.astype(np.float32) if values.dtype.isbuiltin == 2 else values


class FloatOutputs:
    """The outputs of a float network for the samples that are scored, which those of other networks are compared with.

    Outputs are compared by name, those that no layer of the other network has a part in left out; by position where the
    networks have no name in common.

    Parameters
    ----------
    network : Network
        The float network, which runs when its outputs are first needed.
    samples : Samples
        The samples, in whose storage the outputs are kept.
    threads : int
        Threads that run networks.
    """

    def __init__(self, network: Network, samples: Samples, threads: int) -> None:
        self._network = network
        self._samples = samples
        self._threads = threads
        self._batches = samples.scored_batches
        self._is_known = False

    def score(self, network: Network) -> Score:
        """The score of a network, which runs over the batches with scored samples."""
        if not self._batches:
            return NOT_SCORED
        if not self._is_known:
            for batch, outputs in self._run(self._network, self._batches):
                for name, value in outputs.items():
                    self._samples.storage["float", name, batch] = value
            self._is_known = True
        return self._score(network, self._run(network, self._batches))

    def score_deployed(self, network: BiasNetwork) -> Score:
        """The score of a model as its own runtime runs it."""
        run = network.deployed(threads=self._threads)
        batches = zip(self._batches, self._samples.feeds(self._batches))
        return self._score(network, ((batch, run(feeds)) for batch, feeds in batches))

    def agreement(self, network: BiasNetwork) -> float:
        """How near the outputs that are measured come to those that its own runtime computes without optimizations, in dB.

        For one batch; infinite where there is nothing to compare.
        """
        batches = self._batches[:1]
        (_, measured), errors = next(self._run(network, batches)), OutputErrors()
        for name, value in network.deployed(threads=self._threads, optimized=False)(next(self._samples.feeds(batches))).items():
            errors.add(name, arrays_of(measured[name]), arrays_of(value))
        return math.inf if errors.score is NOT_SCORED else errors.score.sqnr

    def are_repeatable(self) -> bool:
        """Whether the float network gives the same outputs for a batch again, but for rounding.

        It starts with a later batch this time: a network that draws random numbers may draw the same ones in each session.
        """
        again = self._score(self._network, self._run(self._network, self._batches[1:][-_TRIES:] or self._batches))
        return again is NOT_SCORED or again.sqnr > _REPEATED

    def _run(self, network: Network, batches: Sequence[int]) -> Iterator[tuple[int, Feeds]]:
        return outputs_of(network, self._samples, batches, self._threads)

    def _score(self, network: Network, outputs: Iterable[tuple[int, Feeds]]) -> Score:
        errors, pairs = OutputErrors(), self._pairs(network)
        for batch, computed in outputs:
            for name, found in pairs.items():
                expected = self._samples.storage["float", name, batch]
                errors.add(name, arrays_of(expected), arrays_of(computed[found]))
        return errors.score

    def _pairs(self, network: Network) -> dict[str, str]:
        """The outputs that are compared: of the float network, and of the other one."""
        changing, codes, expected = _outputs_of_layers(network), _codes(network), _codes(self._network)
        names = self._network.outputs
        common = set(names).intersection(network.outputs)
        pairs = {name: name for name in names if name in common} if common else dict(zip(names, network.outputs))
        pairs = {name: found for name, found in pairs.items() if (name in expected) == (found in codes)}
        return {name: found for name, found in pairs.items() if found in changing} or pairs


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
