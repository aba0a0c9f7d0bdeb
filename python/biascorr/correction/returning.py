"""The last look at a corrected model: its own runtime takes it, it computes what was measured, and it is not worse there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from biascorr.correction.candidates import Candidate
from biascorr.correction.scoring import NOT_SCORED, FloatOutputs, Score
from biascorr.graph.network import BiasNetwork, arithmetic_of
from biascorr.sweep.shard import Shifted

_OTHERWISE = 1.0
"""dB by which a runtime's own arithmetic may change a score unmentioned."""

_BROKEN = 10.0
"""dB by which no rounding of a runtime makes a model worse: it computes something else than the file says."""

_SAME = 40.0
"""dB at which outputs are the same but for roundings that fell otherwise; random networks of 4 bits have some 50."""


@dataclass(frozen=True, eq=False)
class Deployed:
    """The given and the corrected model as their own runtime runs them.

    Parameters
    ----------
    scores : mapping from str to Score
        By the labels of the candidates, the uncorrected one first; empty where nothing was scored.
    is_worse, is_better : bool
        Whether the corrected model is worse there than the one that was given, whether it is surely better.
    notes : sequence of str
        What is worth knowing about the scores.
    """

    scores: Mapping[str, Score] = field(default_factory=dict)
    is_worse: bool = False
    is_better: bool = True
    notes: tuple[str, ...] = ()


def deployed(
    given: BiasNetwork | None, before: Candidate, corrected: Shifted, best: Candidate, expected: FloatOutputs
) -> Deployed:
    """Has a runtime take a corrected model, and compare what it computes with what was measured, and with the one given.

    Raises
    ------
    RuntimeError
        It does not take it, or computes something else than was measured, as it did not with the one given.
    ValueError
        It does not take the one that was given either.
    """
    network = corrected.network
    try:
        if given is None or before.score is NOT_SCORED:
            network.check()
            return Deployed()
        uncorrected = Shifted(given, {})
        agreement = expected.agreement(corrected)
        scores = {str(before.choice): expected.score_deployed(uncorrected)}
        scores[str(best.choice)] = scores[str(before.choice)] if network is given else expected.score_deployed(corrected)
    except ValueError as error:
        if given is not None:
            given.check()
        raise RuntimeError(f"the corrected model is not valid, so it is not returned: {error}") from error
    if agreement < _SAME / 2 and agreement < min(expected.agreement(uncorrected), _SAME) - _SAME / 2:
        raise RuntimeError(
            f"the corrected model gives other outputs than were measured (they agree to {agreement:.0f} dB), so it is not "
            "returned"
        )
    found, measured = scores[str(best.choice)], best.score
    first = scores[str(before.choice)]
    notes = []
    if before.score.sqnr - first.sqnr > _BROKEN:
        notes.append(
            f"the given model itself gives {first} as its runtime runs it, exact arithmetic {before.score}: the runtime does "
            "not compute what the file says, which no bias makes good"
        )
    if abs(found.sqnr - measured.sqnr) > _OTHERWISE:
        saturates = found.sqnr < measured.sqnr  # what saturates is not nearer
        why = f": {arithmetic_of(network)}" if saturates and arithmetic_of(network) else ""
        notes.append(f"the model as its runtime runs it on this CPU gives {found}, exact arithmetic {measured}{why}")
    return Deployed(scores, found.is_worse_than(first), found.is_better_than(first), tuple(notes))
