"""How near outputs are to the float ones: golden values, by hand."""

import math

import ml_dtypes
import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.correction.scoring import OutputErrors, Score
from networks import BITS, model_from_text, samples, weights


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
        ([[0.25, 0.75, 0.0]], [[0.0, 63 / 64, 1 / 64]], 0.25 * math.log(32) + 0.75 * math.log(64 / 84)),  # half a step
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
    assert Score.best([Score(10.0), Score(12.0), Score(11.0)]) == Score(12.0)
    scores = [Score(10.0, 0.3), Score(12.0, 0.2), Score(11.0, 0.1)]
    assert Score.best(scores) == Score(11.0, 0.1)


def test_scores_as_text():
    assert str(Score(12.345)) == "12.35 dB"
    assert str(Score(12.345, 0.012345)) == "12.35 dB, KL 0.0123"


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_lost_values_are_as_bad_in_each_unit(unit):
    boxes = np.full((10, 4), unit)
    a_little_off = [(boxes, boxes * 1.1)] * 10
    half_are_lost = [(boxes, boxes[:5] if k % 2 else boxes * 1.01) for k in range(10)]
    found_nothing, found_something = ([(boxes[:0], boxes)], [(boxes, boxes[:0])])
    assert judged(a_little_off).sqnr == pytest.approx(20.0)
    assert judged(half_are_lost).sqnr == pytest.approx(10 * math.log10(1 / (0.5 + 0.5e-4)))
    assert judged(found_nothing).sqnr == -300.0
    assert judged(found_something).sqnr == 0.0


def test_sequences_are_compared_part_by_part():
    errors = OutputErrors()
    errors.add("y", [np.array([3.0]), np.array([4.0])], [np.array([3.0])])
    assert errors.score.sqnr == pytest.approx(10 * math.log10(25 / 16))
    errors.add("y", [np.array([3.0])], [np.array([3.0]), np.array([4.0])])
    assert errors.score.sqnr == pytest.approx(10 * math.log10(34 / 32))


def test_types_that_numpy_has_not_are_real():
    reference, computed = (np.array(values, ml_dtypes.bfloat16) for values in ([3.0, -4.0], [3.0, -3.0]))
    assert of_one(reference, computed).sqnr == pytest.approx(10 * math.log10(25))


TWO_OUTPUTS = "[a] t = MatMul(x, {w}) r = Relu(t) [b] y = MatMul(r, {v})"


def two_outputs(outputs, suffix=""):
    w, v = weights(6, 5, axis=1), weights(5, 4, axis=1)
    declared = ", ".join(f"float[N,{5 if name == 'r' else 4}] {name}" for name in outputs)
    if not suffix:
        return model_from_text(f"g (float[N,6] x) => ({declared}) {{ {TWO_OUTPUTS.format(w='w', v='v')} }}", w=w, v=v)
    step = np.float32(1 / 2)
    body = "W = DequantizeLinear(w, step) V = DequantizeLinear(v, step) " + TWO_OUTPUTS.format(w="W", v="V")
    codes = {name: np.rint(array / step).astype(np.int8) for name, array in (("w", w), ("v", v))}
    return model_from_text(f"g (float[N,6] x) => ({declared}) {{ {body} }}", step=step, **codes)


def test_outputs_are_compared_by_name():
    data = samples(40, 6)
    expected = correct(two_outputs("yr"), data, quantized=two_outputs("yr", "q"))
    for order in ("ry", "yr"):
        found = correct(two_outputs(order), data, quantized=two_outputs("yr", "q"))
        assert (found.method, found.scores.keys()) == (expected.method, expected.scores.keys())
        for name, score in found.scores.items():
            assert score.sqnr == pytest.approx(expected.scores[name].sqnr, abs=1e-9)
    assert expected.scores[expected.method].sqnr > expected.scores["none"].sqnr + 3


@pytest.mark.parametrize("other", ["s = Neg(x)", "n = Shape(r) f = Cast<to=1>(n) e = ReduceSum(f) z = Mul(x, e) s = Sub(z, z)"])
def test_an_output_that_no_layer_has_a_part_in_is_not_scored(other):
    body = f"[a] t = MatMul(x, w) r = Relu(t) [b] y = MatMul(r, v) {other}"
    constants = {"w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1)}
    alone, both = (
        model_from_text(f"g (float[N,6] x) => ({outputs}) {{ {body} }}", **constants)
        for outputs in ("float[N,4] y", "float[N,4] y, float[N,6] s")
    )
    params = QuantParams("tf", weight_bits=BITS)
    assert (
        correct(both, samples(40, 6), quant_params=params).scores == correct(alone, samples(40, 6), quant_params=params).scores
    )


@pytest.mark.parametrize("body", ["d = Dropout(t, half, yes)", "n = RandomNormalLike(t) d = Add(t, n)"])
def test_a_float_network_that_is_random_is_noted(body):
    text = f"g (float[N,6] x) => (float[N,4] y) {{ [a] t = MatMul(x, w) {body} [b] y = MatMul(d, v) }}"
    constants = {"w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1)}
    more = {"half": np.float32(0.5), "yes": np.bool_(True)} if "half" in body else {}
    correction = correct(
        model_from_text(text, **constants, **more), samples(40, 6), quant_params=QuantParams("tf", weight_bits=BITS)
    )
    assert [note for note in correction.notes if "does not give the same outputs twice" in note]


def test_a_divergence_that_is_not_known_is_none_of_0():
    """It is not known where a network gives out other numbers of rows: then SQNR decides."""
    assert not Score(29.0, 0.0007).is_worse_than(Score(0.0))
    assert not Score(29.0).is_worse_than(Score(0.0, 0.1))
    assert Score(1.0, 0.2).is_worse_than(Score(1.0, 0.1))
    assert Score.best([Score(2.0), Score(29.0, 0.0007), Score(0.0)]) == Score(29.0, 0.0007)


def test_values_where_there_should_be_none_are_noise_whatever_their_type():
    assert of_one(np.zeros(0, np.int64), np.zeros(4, np.int64)).sqnr == -300.0
    assert judged([(np.zeros((0, 3)), np.zeros((0, 3)))], [([3.0, -4.0], [3.0, -3.0])]).sqnr == pytest.approx(
        10 * math.log10(25)
    )
