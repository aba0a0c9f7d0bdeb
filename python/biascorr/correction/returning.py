"""The last look at a corrected model: its own runtime takes it, it computes what was measured, and it is not worse there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from biascorr.calibration.samples import Samples
from biascorr.correction.candidates import Candidate
from biascorr.correction.scoring import NOT_SCORED, FloatOutputs, OutputErrors, Score, arrays_of
from biascorr.graph.network import BiasNetwork
from biascorr.sweep.sweep import outputs_of

_OTHERWISE = 1.0
"""dB by which a runtime's own arithmetic may change a score unmentioned."""

_SAME = 40.0
"""dB at which outputs are the same but for roundings that fell otherwise; random networks of 4 bits have some 50."""


@dataclass(frozen=True, eq=False)
class Deployed:
    """The given and the corrected model as their own runtime runs them.

    Parameters
    ----------
    scores : mapping from str to Score
        By the labels of the candidates, the uncorrected one first; empty where nothing was scored.
    is_worse : bool
        Whether the corrected model is worse there than the one that was given.
    notes : sequence of str
        What is worth knowing about the scores.
    """

    scores: Mapping[str, Score] = field(default_factory=dict)
    is_worse: bool = False
    notes: tuple[str, ...] = ()


def deployed(given: BiasNetwork, before: Candidate, network: BiasNetwork, best: Candidate, expected: FloatOutputs) -> Deployed:
    """Scores a given model and the corrected one as their own runtime runs them."""
    if before.score is NOT_SCORED:
        return Deployed()
    scores = {str(each.choice): expected.score_deployed(model) for each, model in ((before, given), (best, network))}
    found, measured = scores[str(best.choice)], best.score
    notes = []
    if abs(found.sqnr - measured.sqnr) > _OTHERWISE:
        notes.append(
            f"the integer kernels that the runtime has for this CPU give {found}, exact arithmetic {measured}: 8-bit products "
            "may saturate there, which quantizers avoid with 7-bit weights (reduce_range)"
        )
    return Deployed(scores, found.is_worse_than(scores[str(before.choice)]), tuple(notes))


def check_returned(network: BiasNetwork, given: BiasNetwork | None, samples: Samples, threads: int) -> None:
    """Checks that a runtime takes a corrected model, and computes with it what was measured, as it did with the given one.

    Raises
    ------
    RuntimeError
        It does not.
    ValueError
        The runtime does not take the one that was given either.
    """
    try:
        network.check()
    except ValueError as error:
        if given is not None:
            given.check()
        raise RuntimeError(f"the corrected model is not valid, so it is not returned: {error}") from error
    if given is None or network is given or not samples.scored_batches:
        return
    found, usual = (_agreement(each, samples, threads) for each in (network, given))
    if found < min(usual, _SAME) - _SAME / 2:
        raise RuntimeError(
            f"the corrected model gives other outputs than were measured (they agree to {found:.0f} dB, those of the model "
            f"that was given to {usual:.0f} dB), so it is not returned"
        )


def _agreement(network: BiasNetwork, samples: Samples, threads: int) -> float:
    """How near the outputs that are measured come to those of the model in its runtime, in dB; for one batch."""
    batches = samples.scored_batches[:1]
    (_, measured), errors = next(outputs_of(network, samples, batches, threads)), OutputErrors()
    for name, value in network.deployed(threads=threads, optimized=False)(next(samples.feeds(batches))).items():
        errors.add(name, arrays_of(measured[name]), arrays_of(value))
    return _SAME if errors.score is NOT_SCORED else errors.score.sqnr
