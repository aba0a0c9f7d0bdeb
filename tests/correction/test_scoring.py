"""How near outputs are to the float ones: golden values, by hand."""

import math

import ml_dtypes
import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.correction.scoring import Gain, OutputErrors, Score, Terms
from networks import BITS, model_from_text, samples, weights


def judged(*outputs):
    """The score of outputs, each a list of (float, computed) samples."""
    errors = OutputErrors()
    for k, batches in enumerate(outputs):
        for reference, computed in batches:
            terms = Terms.of([np.array(reference)], [np.array(computed)])
            if terms is not None:
                errors.add(f"y{k}", terms)
    return errors.score


def scored(sqnrs, divergences=None, metrics=None):
    """A score of these samples."""
    return Score(*(None if each is None else tuple(np.atleast_1d(each)) for each in (sqnrs, divergences, metrics)))


def of_one(reference, computed):
    return judged([(reference, computed)])


def test_ratio_of_signal_to_noise():
    score = of_one([3.0, -4.0], [3.0, -3.0])
    assert score.sqnr == pytest.approx(10 * math.log10(25), abs=1e-12)
    assert score.divergence is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ratio_is_the_mean_over_the_samples_from_sums_in_float64(dtype):
    rng = np.random.default_rng(0)
    references, outputs = (rng.standard_normal((3, 4, 5)).astype(dtype) for _ in range(2))
    r, q = references.astype(np.float64), outputs.astype(np.float64)
    expected = 10 * np.log10((r**2).sum(axis=(1, 2)) / ((q - r) ** 2).sum(axis=(1, 2)))
    score = judged(list(zip(references, outputs)))
    np.testing.assert_allclose(score.sqnrs, expected, atol=1e-9)
    assert score.sqnr == pytest.approx(expected.mean(), abs=1e-9)


@pytest.mark.parametrize("loud", [1e-6, 1.0, 1e6])
def test_a_loud_sample_counts_as_much_as_the_others(loud):
    samples_of = [([3.0 * loud, -4.0 * loud], [3.0 * loud, -3.0 * loud]), *[([10.0, 1.0], [9.0, 1.0])] * 3]
    expected = [10 * math.log10(25), *[10 * math.log10(101)] * 3]
    assert judged(samples_of).sqnr == pytest.approx(np.mean(expected))


def test_a_silent_sample_has_no_ratio_but_noise():
    silent, other = ([0.0, 0.0], [0.0, 0.1]), ([3.0, -4.0], [3.0, -4.1])
    score = judged([silent, other])
    assert score.sqnrs == pytest.approx([math.nan, 10 * math.log10(25 / 0.01)], nan_ok=True)
    assert score.sqnr == pytest.approx(10 * math.log10(25 / 0.01))
    assert score.noises == pytest.approx([0.01 / 12.5] * 2)
    better = judged([silent, (other[0], [3.0, -4.01])])
    assert better.gains_over(score)["sqnr"].mean == pytest.approx(20.0)
    louder = ([6.0, -8.0], [6.0, -8.1])
    ratios = [10 * math.log10(each / 0.01) for each in (25, 25, 100)]
    assert judged([silent, other], [other, louder]).sqnrs == pytest.approx([ratios[0], (ratios[1] + ratios[2]) / 2])


def test_a_constant_output_does_not_count_where_another_differs():
    constant = [([7.0, 8.0], [7.0, 8.0])] * 4
    varying = [([10.0 + k], [9.0 + k]) for k in range(4)]
    assert judged(varying, constant).sqnr == judged(varying).sqnr
    assert judged(constant).sqnr == 100.0
    assert judged(varying[:1], constant[:1]).sqnr == pytest.approx((20.0 + 100.0) / 2)  # nothing is known of one sample


def test_samples_that_cannot_be_told_apart_are_counted():
    errors = OutputErrors()
    errors.add("y", Terms.of([np.array([10.0])], [np.array([9.0])]), times=3)
    errors.add("y", Terms.of([np.array([3.0, -4.0])], [np.array([3.0, -3.0])]))
    assert errors.score.sqnrs == pytest.approx([20.0, 20.0, 20.0, 10 * math.log10(25)])


def test_outputs_weigh_the_same():
    score = judged([([10.0], [9.0])], [([1000.0] * 50, [900.0] * 50)])
    assert score.sqnr == pytest.approx(20.0)
    assert judged([([10.0], [9.0])], [([1.0], [0.0])]).sqnr == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("reference", "computed", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 100.0),
        ([1.0, 2.0], [1.0, 2.0 + 1e-9], 100.0),
        ([0.0, 0.0], [0.0, 0.0], 100.0),
        ([0.0, 0.0], [0.0, 1.0], 0.0),
        ([1.0, 2.0], [1.0, np.nan], -300.0),
        ([1.0, 2.0], [1.0, np.inf], -300.0),
        ([5.0, np.nan], [4.0, np.nan], 10 * math.log10(25)),
        ([5.0, np.nan], [4.0, 7.0], 10 * math.log10(25)),
        ([5.0, np.inf], [4.0, np.inf], 10 * math.log10(25)),
        ([5.0, -np.inf], [4.0, 0.0], 10 * math.log10(25)),
        ([5.0, 0.0], [4.0], 10 * math.log10(25)),
        ([3.0, 4.0], [3.0], 10 * math.log10(25 / 16)),
        ([3.0], [3.0, 4.0], 10 * math.log10(9 / 16)),
        ([[3.0], [4.0]], [3.0, 4.0], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 5], 10 * math.log10(4)),
        ([1, 2, 3, 4], [1, 2, 3, 4], 10 * math.log10(400)),
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


def test_divergence_is_the_mean_over_samples_of_the_mean_over_positions():
    same, other = ([[0.5, 0.5]], [[0.5, 0.5]]), ([[1.0, 0.0]] * 2, [[0.5, 0.5]] * 2)
    assert judged([same, other]).divergence == pytest.approx(1 / 2 * math.log(2))


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
        (scored(10.0), scored(10.0), False),
        (scored(9.9), scored(10.0), True),
        (scored(10.1), scored(10.0), False),
        (scored(10.0, 0.2), scored(10.0, 0.1), True),
        (scored(20.0, 0.2), scored(10.0, 0.1), True),
        (scored(9.0, 0.05), scored(10.0, 0.1), True),
        (scored(11.0, 0.05), scored(10.0, 0.1), False),
        (scored(11.0, 0.05, 0.8), scored(10.0, 0.1, 0.9), True),
        (scored(9.0, 0.05, 0.9), scored(10.0, 0.1, 0.9), False),
    ],
)
def test_worse_in_any_measure_is_worse(score, other, worse):
    assert score.is_worse_than(other) is worse


def test_gain_is_the_mean_of_paired_differences_with_its_standard_error():
    one, other = scored([12.0, 21.0, 33.0, 44.0], [0.1, 0.2, 0.3, 0.4]), scored([10.0, 20.0, 30.0, 40.0], [0.2] * 4)
    gains = one.gains_over(other)
    assert gains["sqnr"].mean == 2.5
    assert gains["sqnr"].error == pytest.approx(math.sqrt(5 + 1) / 4)  # one more may differ by 1 dB
    assert gains["divergence"].mean == pytest.approx(-0.05)
    assert gains["divergence"].error == pytest.approx(math.sqrt(0.05) / 4)
    assert str(gains["sqnr"]) == "+2.50 ± 0.61"


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (12.345, 10.0, "+12.35 ± 10.00"),
        (0.00012345, 0.000024, "+0.000123 ± 0.000024"),
        (-0.0034, 0.0, "-0.0034 ± 0.0000"),
        (0.0, 0.0, "+0.00 ± 0.00"),
    ],
)
def test_gain_as_text_has_two_digits_of_its_error(mean, error, text):
    assert str(Gain(mean, error)) == text


@pytest.mark.parametrize(
    ("score", "other", "better"),
    [
        (scored([11.0] * 9), scored([10.0] * 9), True),
        (scored([11.0, 9.0, 11.0, 9.5]), scored([10.0] * 4), False),
        (scored(10.9), scored(10.0), False),  # one sample says little
        (scored(11.1), scored(10.0), True),
        (scored([11.0] * 9, [0.1] * 9), scored([10.0] * 9, [0.2] * 9), True),
        (scored([11.0] * 9, [0.3] * 9), scored([10.0] * 9, [0.2] * 9), False),
        (scored([9.0] * 9, [0.1] * 9), scored([10.0] * 9, [0.2] * 9), False),
        (scored([11.0] * 9, [0.1] * 8 + [1.9]), scored([10.0] * 9, [0.2] * 9), False),
        (scored([11.0] * 9, [0.1] * 8 + [0.8]), scored([10.0] * 9, [0.2] * 9), True),  # not sure, but it agrees
        (scored([9.0] * 9, None, [0.9] * 9), scored([10.0] * 9, None, [0.8] * 9), True),
        (scored([11.0] * 9, None, [0.8] * 9), scored([10.0] * 9, None, [0.8] * 9), False),
        (scored([11.0] * 9, None, 0.8), scored([10.0] * 9, None, 0.7), True),
        (scored([10.0] * 9), scored([10.0] * 9), False),
    ],
)
def test_better_is_surely_better_where_the_divergence_agrees(score, other, better):
    assert score.is_better_than(other) is better


def test_a_network_that_is_better_on_quiet_samples_alone_is_not_better():
    quiet, loud = ([1.0, 1.0], [1.0, 1.1]), ([100.0, 100.0], [100.0, 101.0])
    better_quiet, worse_loud = (quiet[0], [1.0, 1.01]), (loud[0], [100.0, 102.0])
    before, after = judged([quiet, quiet, loud] * 3), judged([better_quiet, better_quiet, worse_loud] * 3)
    assert after.gains_over(before)["sqnr"].is_sure
    assert not after.is_better_than(before)
    assert judged([better_quiet, better_quiet, loud] * 3).is_better_than(before)


def test_order_is_by_metric_by_divergence_and_by_ratio_without_one():
    scores = [scored(10.0), scored(12.0), scored(11.0)]
    assert Score.best(scores) is scores[1]
    scores = [scored(10.0, 0.3), scored(12.0, 0.2), scored(11.0, 0.1)]
    assert Score.best(scores) is scores[2]
    scores = [scored(10.0, 0.3, 3.0), scored(12.0, 0.2, 2.0), scored(11.0, 0.1, 1.0)]
    assert Score.best(scores) is scores[0]


def test_scores_as_text():
    assert str(scored(12.345)) == "12.35 dB"
    assert str(scored(12.345, 0.012345)) == "12.35 dB, KL 0.0123"
    assert str(scored(12.345, 0.012345, 0.875)) == "12.35 dB, KL 0.0123, metric 0.875"
    assert str(scored(math.nan, None, 0.875)) == "metric 0.875"


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_lost_values_are_as_bad_in_each_unit(unit):
    boxes = np.full((10, 4), unit)
    a_little_off = [(boxes, boxes * 1.1)] * 10
    half_are_lost = [(boxes, boxes[:5] if k % 2 else boxes * 1.01) for k in range(10)]
    found_nothing, found_something = ([(boxes[:0], boxes)], [(boxes, boxes[:0])])
    assert judged(a_little_off).sqnr == pytest.approx(20.0)
    assert judged(half_are_lost).sqnrs == pytest.approx([40.0, 10 * math.log10(2)] * 5)
    assert judged(found_nothing).sqnr == 0.0
    assert judged(found_something).sqnr == 0.0


def test_sequences_are_compared_part_by_part():
    errors = OutputErrors()
    errors.add("y", Terms.of([np.array([3.0]), np.array([4.0])], [np.array([3.0])]))
    errors.add("y", Terms.of([np.array([3.0])], [np.array([3.0]), np.array([4.0])]))
    assert errors.score.sqnrs == pytest.approx([10 * math.log10(25 / 16), 10 * math.log10(9 / 16)])


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
    found, expected = (correct(each, samples(40, 6), quant_params=params).scores for each in (both, alone))
    assert {name: str(score) for name, score in found.items()} == {name: str(score) for name, score in expected.items()}


@pytest.mark.parametrize("body", ["d = Dropout(t, half, yes)", "n = RandomNormalLike(t) d = Add(t, n)"])
def test_a_float_network_that_is_random_is_noted(body):
    text = f"g (float[N,6] x) => (float[N,4] y) {{ [a] t = MatMul(x, w) {body} [b] y = MatMul(d, v) }}"
    constants = {"w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1)}
    more = {"half": np.float32(0.5), "yes": np.bool_(True)} if "half" in body else {}
    correction = correct(
        model_from_text(text, **constants, **more), samples(40, 6), quant_params=QuantParams("tf", weight_bits=BITS)
    )
    assert [note for note in correction.notes if "does not give the same outputs twice (y)" in note]


def test_a_divergence_that_is_not_known_is_none_of_0():
    """It is not known where a network gives out other numbers of rows: then SQNR decides."""
    assert not scored(29.0, 0.0007).is_worse_than(scored(0.0))
    assert not scored(29.0).is_worse_than(scored(0.0, 0.1))
    assert scored(1.0, 0.2).is_worse_than(scored(1.0, 0.1))
    scores = [scored(2.0), scored(29.0, 0.0007), scored(0.0)]
    assert Score.best(scores) is scores[1]


def test_values_where_there_should_be_none_are_noise_whatever_their_type():
    assert of_one(np.zeros(0, np.int64), np.zeros(4, np.int64)).sqnr == 0.0
    assert judged([(np.zeros((0, 3)), np.zeros((0, 3)))], [([3.0, -4.0], [3.0, -3.0])]).sqnr == pytest.approx(
        10 * math.log10(25)
    )


def test_an_output_that_the_float_network_never_fills_does_not_count():
    """One false box would make a network better: all other samples of that output are without any error."""
    nothing, box, other = np.zeros((0, 4)), np.ones((1, 4)), ([10.0], [9.0])
    found_none, found_one = ([(nothing, nothing)] * 3 + [(nothing, found)] for found in (nothing, box))
    varying = [([10.0 + k], [9.0 + k]) for k in range(4)]
    assert judged(varying, found_one).sqnrs == judged(varying, found_none).sqnrs == judged(varying).sqnrs
    assert judged([other], [(nothing, box)]).sqnr == pytest.approx(20.0)


def test_an_output_without_any_element_is_no_probabilities_by_chance():
    """The sum over an axis of no elements, for no positions, is 1 for all of them."""
    nothing = np.zeros((0, 0))
    assert judged([([[0.5, 0.5]], [[0.5, 0.5]])] * 2, [(nothing, nothing)] * 2).divergence == 0.0


def test_samples_are_paired_where_one_network_loses_rows_of_a_batch():
    """With rows lost, a batch is compared as one, and then its silent sample is not known as such."""
    loud, silent = np.array([[3.0, -4.0]]), np.zeros((1, 2))
    whole, apart = OutputErrors(), OutputErrors()
    whole.add("y", Terms.of([np.concatenate([loud, silent])], [loud * 1.1]), times=2)
    for sample in (loud, silent):
        apart.add("y", Terms.of([sample], [sample * 1.01]))
    assert whole.score.sqnrs == pytest.approx([20.0, 20.0])
    assert apart.score.sqnrs == pytest.approx([40.0, math.nan], nan_ok=True)
    assert apart.score.gains_over(whole.score)["sqnr"].mean == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("outputs", "body"),
    [
        ("int64[N] y", "y = ArgMax<axis=1, keepdims=0>(t)"),
        ("bool[N,4] y", "y = Greater(t, one)"),
        ("float[N,2] z, int64[N,2] y", "z, y = TopK(t, two)"),
    ],
)
def test_outputs_of_few_integers_are_not_taken_for_random(outputs, body):
    text = f"g (float[N,6] x) => ({outputs}) {{ [a] t = MatMul(x, w) {body} }}"
    more = {"one": np.float32(1)} if "one" in body else {"two": np.array([2])} if "two" in body else {}
    model = model_from_text(text, w=weights(6, 4, axis=1), **more)
    assert correct(model, samples(40, 6), quant_params=QuantParams("tf", weight_bits=BITS)).notes == []
