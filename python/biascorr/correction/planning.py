"""The work that is left while the best correction is looked for, as :class:`biascorr.calibration.progress.Work` takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from biascorr.calibration.progress import PREPARING
from biascorr.calibration.samples import Samples
from biascorr.correction.candidates import CandidateBuilder, Choice
from biascorr.sweep.sweep import DEPTH

_ERRORS = 12
"""Batches that the errors of layers are measured by: a few, of three networks."""

_STAGES = 30
"""Parts of a network that are made ready to run, where it is not known yet how many there are."""

_EMPIRICAL = Choice("empirical")

_AGAIN = 8
"""Batches that the float network runs again."""


def work_left(
    samples: Samples,
    builder: CandidateBuilder | None = None,
    *,
    first: Sequence[Choice] = (),
    second: Sequence[Choice] = (),
    refitted: Sequence[Choice] = (),
    is_deployed: bool = True,
    times: int = 1,
) -> Counter[str]:
    """Units of work by kind.

    Parameters
    ----------
    samples : Samples
        The samples.
    builder : CandidateBuilder, optional
        Makes the candidates.
    first, second, refitted : sequence of Choice
        The candidates that are fitted to a part of the samples, to all that are not held out, and to all.
    is_deployed : bool
        Whether the models are run by their own runtime in the end.
    times : int
        How often candidates are made, of the float network as it is and equalized.
    """
    scored, fitted = len(samples.scored_batches), len(samples.fitted_batches)
    everything = fitted + len(samples.held_out_batches)
    part = fitted if builder is None or not second else builder.part or fitted
    left: Counter[str] = Counter()
    for choices, batches, count in ((first, part, times), (second, fitted, times), (refitted, everything, 1)):
        for choice in choices:
            left[choice.method] += batches * count
            left[PREPARING] += (_STAGES if builder is None else builder.preparations(choice)) * count
            left["score"] += scored * count
        if any(choice.method in ("empirical", "activation", "squared", "hybrid") for choice in choices):
            left["layers"] = max(left["layers"], batches * times)
            left[PREPARING] += (_STAGES if builder is None else builder.preparations(_EMPIRICAL)) * count // DEPTH
    left["layers"] = max(0, left["layers"] - (0 if builder is None else builder.measured_batches))
    left["float"] += _AGAIN
    left["errors"] += _ERRORS
    left["deployed"] += 2 * scored if is_deployed else 0
    return left
