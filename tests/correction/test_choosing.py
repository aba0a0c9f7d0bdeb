"""Which candidate is taken, which ones are fitted to more samples, and whether a new fit is safe."""

import pytest

from biascorr import QuantParams, correct
from biascorr.correction.candidates import Candidate, CandidateBuilder, Choice
from biascorr.correction.choosing import choose, finalists, is_safe
from biascorr.correction.scoring import NOT_SCORED, Score
from networks import BITS, samples, two_layers

SPREAD = 0.5, -0.5, 0.25, -0.25, 0.0, 0.0, 0.0, 0.0
"""What makes the standard error of a gain 0.18 dB, with that of the doubt."""


def candidate(sqnr, spread=SPREAD, **options):
    return Candidate(Choice("mean"), score=Score(tuple(sqnr + each for each in spread), **options))


NONE = candidate(10.0, (0.0,) * 8)


@pytest.mark.parametrize(
    ("sqnrs", "taken"),
    [
        ([], 0),
        ([10.0], 0),
        ([10.1], 0),  # unsure
        ([10.5], 1),
        ([9.0, 11.0, 8.0], 2),
        ([11.0, 11.0], 1),
        ([11.0, 11.5], 2),  # surely better than the one before
        ([10.1, 11.0], 2),
    ],
)
def test_the_most_cautious_of_those_as_good_as_the_best_is_taken(sqnrs, taken):
    candidates = [NONE, *(candidate(sqnr, SPREAD[k:] + SPREAD[:k]) for k, sqnr in enumerate(sqnrs))]
    assert choose(candidates) is candidates[taken]


def test_nothing_is_taken_unscored():
    with pytest.raises(ValueError, match="gives out integers in place of the float model's real numbers"):
        choose([Candidate(Choice("none"), score=NOT_SCORED)])


@pytest.mark.parametrize(
    ("sqnrs", "chosen"), [([9.0, 9.5], []), ([9.0, 10.1], [2]), ([11.0, 12.0, 13.0], [3, 2]), ([12.9, 11.0, 13.0], [1, 3])]
)
def test_what_would_be_taken_and_the_best_others_are_fitted_to_more(sqnrs, chosen):
    candidates = [NONE, *(candidate(sqnr, SPREAD[k:] + SPREAD[:k]) for k, sqnr in enumerate(sqnrs))]
    assert finalists(candidates) == [candidates[k] for k in chosen]


@pytest.mark.parametrize(
    ("refitted", "safe"),
    [
        (candidate(12.5), True),
        (candidate(11.9), True),  # not surely worse
        (candidate(11.5), False),  # surely worse than before
        (candidate(9.0), False),
        (candidate(12.5, divergences=(0.2,) * 8), False),  # worse by divergence than both
    ],
)
def test_a_new_fit_is_safe_where_it_lost_nothing_surely(refitted, safe):
    divergences = None if refitted.score.divergences is None else (0.1,) * 8
    chosen, before = (candidate(sqnr, SPREAD[::-1], divergences=divergences) for sqnr in (12.0, 10.0))
    assert is_safe(refitted, chosen, before) is safe


def test_candidates_are_told_apart_on_a_part_of_the_samples(monkeypatch):
    fits, make = [], CandidateBuilder.candidate

    def candidate(self, choice, part=None, *, with_held_out=False):
        made = make(self, choice, part, with_held_out=with_held_out)
        fits.append((choice.method, len(self._batches)))
        return made

    monkeypatch.setattr(CandidateBuilder, "candidate", candidate)
    model, x = two_layers(), samples(64, 3, 6, 6)
    correction = correct(model, x, quant_params=QuantParams("tf", weight_bits=BITS))
    assert [count for _, count in fits] == [16] * 5 + [48] * 2 + [64]
    assert fits[-1][0] == correction.choice.method in [method for method, _ in fits[5:7]]
    fits.clear()
    correct(model, x[:40], quant_params=QuantParams("tf", weight_bits=BITS))
    assert [count for _, count in fits] == [30] * 5 + [40]
