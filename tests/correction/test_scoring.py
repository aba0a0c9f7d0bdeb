"""How near outputs are to the float ones: golden values, by hand."""

import math

import numpy as np
import pytest

from biascorr.correction.scoring import OutputErrors, Score


def judged(*outputs):
    """The score of outputs, each a list of (float, computed) batches."""
    judge = OutputErrors()
    for k, batches in enumerate(outputs):
        for reference, computed in batches:
            judge.add(f"y{k}", [np.array(reference)], [np.array(computed)])
    return judge.score


def of_one(reference, computed):
    return judged([(reference, computed)])


def test_ratio_of_signal_to_noise():
    score = of_one([3.0, -4.0], [3.0, -3.0])
    assert score.sqnr == pytest.approx(10 * math.log10(25), abs=1e-12)
    assert score.divergence is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sums_are_those_of_all_batches_in_float64(dtype):
    rng = np.random.default_rng(0)
    references, outputs = (rng.standard_normal((3, 4, 5)).astype(dtype) for _ in range(2))
    r, q = references.astype(np.float64), outputs.astype(np.float64)
    expected = 10 * np.log10((r**2).sum() / ((q - r) ** 2).sum())
    assert judged(list(zip(references, outputs))).sqnr == pytest.approx(expected, abs=1e-9)


def test_outputs_weigh_the_same():
    score = judged([([10.0], [9.0])], [([1000.0] * 50, [900.0] * 50)])
    assert score.sqnr == pytest.approx(20.0)
    assert judged([([10.0], [9.0])], [([1.0], [0.0])]).sqnr == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("reference", "computed", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 300.0),
        ([0.0, 0.0], [0.0, 0.0], 300.0),
        ([0.0, 0.0], [0.0, 1.0], -300.0),
        ([1.0, 2.0], [1.0, np.nan], -math.inf),
        ([1.0, 2.0], [1.0, np.inf], -300.0),
        ([5.0, np.nan], [4.0, np.nan], 10 * math.log10(25)),
        ([5.0, np.nan], [4.0, 7.0], 10 * math.log10(25)),
        ([5.0, np.inf], [4.0, np.inf], 10 * math.log10(25)),
        ([5.0, -np.inf], [4.0, 0.0], 10 * math.log10(25)),
        ([5.0, 0.0], [4.0], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 5], 10 * math.log10(4)),
        ([1, 2, 3, 4], [1, 2, 3, 4], 300.0),
        ([1, 2, 3], [1, 2], 0.0),
        ([True, False], [False, False], 10 * math.log10(2)),
        (["a", "b"], ["a", "c"], 10 * math.log10(2)),
        (5.0, 4.0, 10 * math.log10(25)),
    ],
    ids=str,
)
def test_ratio_where_values_are_no_usual_numbers(reference, computed, expected):
    assert of_one(reference, computed).sqnr == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "computed", "expected"),
    [
        ([[0.5, 0.5]], [[0.25, 0.75]], 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ([[0.5, 0.5]], [[0.5, 0.5]], 0.0),
        ([[1.0, 0.0]], [[0.5, 0.5]], math.log(2)),
        ([[0.5, 0.5]], [[0.0, 1.0]], 0.5 * math.log(0.5e9) + 0.5 * math.log(0.5)),
        ([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]], 0.5 * math.log(2)),
        ([[1.0], [1.0]], [[2.0], [2.0]], 1 - math.log(2)),
    ],
)
def test_divergence_of_probabilities(reference, computed, expected):
    assert of_one(reference, computed).divergence == pytest.approx(expected, abs=1e-12)


def test_divergence_is_the_mean_over_the_positions_of_all_batches():
    same, other = ([[0.5, 0.5]], [[0.5, 0.5]]), ([[1.0, 0.0]] * 2, [[0.5, 0.5]] * 2)
    assert judged([same, other]).divergence == pytest.approx(2 / 3 * math.log(2))


def test_divergence_is_the_mean_over_the_outputs_that_are_probabilities():
    certain, even = ([[1.0, 0.0]], [[0.5, 0.5]]), ([[0.5, 0.5]], [[0.5, 0.5]])
    assert judged([certain], [even], [([2.0], [3.0])]).divergence == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize(
    "batches",
    [
        [([[0.5, 0.6]], [[0.5, 0.5]])],
        [([[1.5, -0.5]], [[0.5, 0.5]])],
        [([[0.5, 0.5]], [[0.5, 0.5]]), ([[0.5, 0.6]], [[0.5, 0.5]])],
        [([1, 0], [1, 0])],
        [(1.0, 1.0)],
        [([[0.5, np.nan]], [[0.5, 0.5]])],
    ],
    ids=str,
)
def test_what_is_no_probabilities_has_no_divergence(batches):
    assert judged(batches).divergence is None


@pytest.mark.parametrize(
    ("score", "other", "worse"),
    [
        (Score(10.0), Score(10.0), False),
        (Score(9.9), Score(10.0), True),
        (Score(10.1), Score(10.0), False),
        (Score(10.0, 0.2), Score(10.0, 0.1), True),
        (Score(20.0, 0.2), Score(10.0, 0.1), True),
        (Score(9.0, 0.05), Score(10.0, 0.1), True),
        (Score(11.0, 0.05), Score(10.0, 0.1), False),
        (Score(-math.inf), Score(-300.0), True),
    ],
)
def test_worse_in_any_measure_is_worse(score, other, worse):
    assert score.is_worse_than(other) is worse


def test_order_is_by_divergence_and_by_ratio_without_one():
    assert max([Score(10.0), Score(12.0), Score(11.0)], key=lambda score: score.order) == Score(12.0)
    scores = [Score(10.0, 0.3), Score(12.0, 0.2), Score(11.0, 0.1)]
    assert max(scores, key=lambda score: score.order) == Score(11.0, 0.1)


def test_scores_as_text():
    assert str(Score(12.345)) == "12.35 dB"
    assert str(Score(12.345, 0.012345)) == "12.35 dB, KL 0.0123"
