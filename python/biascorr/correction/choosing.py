"""Which candidate is taken: none that is not surely better, and the most cautious of those that are as good as the best.

A gain is sure where it is above its standard error over the samples. The best of many candidates on a few
samples is partly luck: the one that is taken is the first, from cautious to bold, that the best one is not surely better than.
"""

from __future__ import annotations

from collections.abc import Sequence

from biascorr.correction.candidates import Candidate
from biascorr.correction.scoring import NOT_SCORED, Score

_FINALISTS = 2
"""Candidates that are fitted to all samples that are not held out."""


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that is taken; they are in order from cautious to bold, the uncorrected network first.

    Raises ValueError where nothing could be scored.
    """
    before, *others = candidates
    if before.score is NOT_SCORED:
        raise ValueError(
            "quantized: gives out integers in place of the float model's real numbers; name a method to go on without scores"
        )
    better = [each for each in others if each.score.is_better_than(before.score)]
    if not better:
        return before
    best = Score.best(each.score for each in better)
    return next(each for each in better if each.score is best or not best.is_better_than(each.score))


def finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, fitted to a part of the samples, that are worth more of them."""
    left = [each for each in candidates[1:] if not each.score.is_worse_than(candidates[0].score)]
    chosen = [each for each in left if each is choose(candidates)]
    while len(chosen) < _FINALISTS and len(chosen) < len(left):
        best = Score.best(each.score for each in left if each not in chosen)
        chosen.append(next(each for each in left if each.score is best))
    return chosen


def is_safe(refitted: Candidate, chosen: Candidate, before: Candidate) -> bool:
    """Whether a candidate that was fitted again, to all samples, can take the place of the one that was chosen."""
    is_kept = all(gain.mean >= -gain.error for gain in refitted.score.gains_over(chosen.score).values())
    return is_kept and refitted.score.is_better_than(before.score)
