"""The quantizers of weights: ranges and grids that are known, kernel against twin, what has no range; stochastic rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrays import FLOATS, LAYOUTS, random_array
from biascorr import Quantization, fake_quantize, get_num_threads, reference, set_num_threads
from comparisons import COMPARISONS

RANGE = COMPARISONS["quantization_range"]


def ends(quantization):
    """The least and the greatest value on the grid."""
    limit = 2 ** (quantization.bits - 1)
    return quantization.dequantize(np.array([-limit, limit - 1], np.int64)).tolist()


@pytest.mark.parametrize(
    ("bits", "asymmetric", "step", "low", "high"),
    [
        (8, False, 0.0157480315, -2.015748, 2.0),
        (8, True, 0.0117647059, -85 * 3 / 255, 170 * 3 / 255),
        (4, False, 0.285714, -8 * 2 / 7, 2.0),
    ],
)
def test_golden_values(bits, asymmetric, step, low, high):
    quantization = Quantization.from_weights([-1.0, 2.0, 0.3], bits, asymmetric=asymmetric, mode="tf")
    assert quantization.step == pytest.approx(step, rel=2e-6)
    assert ends(quantization) == pytest.approx([low, high], rel=1e-6)
    if asymmetric:
        assert -128 - quantization.zero_point == -85


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
def test_kernel_equals_twin(bits, search, asymmetric):
    for dtype in ("float32", "float64"):
        for channels, size in [(0, 3), (3, 0), (3, 1), (3, 2), (1, 7), (2, 8), (3, 9), (2, 1000), (1, 65_537)]:
            weights = random_array((channels, size), dtype, size)
            found = RANGE.fast(weights, bits, asymmetric, search)
            assert found.shape == (channels, 2)
            np.testing.assert_array_equal(found, RANGE.twin(weights, bits, asymmetric, search))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_any_layout_and_dtype(layout, dtype, axis):
    weights = random_array((4, 5, 30), dtype)
    rows = weights.reshape(1, -1) if axis is None else np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    low, high = reference.quantization_range(rows.astype(np.float64), 4, True, True).T
    expected = Quantization.from_range(low, high, 4) if axis is not None else Quantization.from_range(low[0], high[0], 4)
    found = Quantization.from_weights(LAYOUTS[layout](weights), 4, axis=axis, asymmetric=True)
    assert found == expected
    assert np.shape(found.scale) == (() if axis is None else (weights.shape[axis],))


def test_the_scale_of_each_channel_serves_fake_quantize():
    weights = random_array((3, 4, 5), "float32")
    moved = fake_quantize(weights, Quantization.from_weights(weights, axis=1), axis=1)
    for channel in range(4):
        one = Quantization.from_weights(weights[:, channel])
        np.testing.assert_array_equal(moved[:, channel], fake_quantize(weights[:, channel], one))


def test_a_symmetric_search_gives_up_what_is_rare():
    """Two bits have one step above 0. At 50/100 of the range saturation costs 3 * 0.5^2; a wider grid costs the others more."""
    weights = [0.5] * 1000 + [1.0]
    assert Quantization.from_weights(weights, 2, mode="tf").step == 1.0
    assert Quantization.from_weights(weights, 2).step == 0.5
    assert Quantization.from_weights([*weights, *[1.0] * 300], 2).step > 0.5


def test_an_asymmetric_search_finds_width_and_position():
    """All weights but one are in 4/16 of the range, with 0 at 5/20 of that."""
    weights = np.append(np.linspace(-0.25, 0.75, 20_000), [-2.0, 2.0])
    quantization = Quantization.from_weights(weights, 4, asymmetric=True)
    assert quantization.step == pytest.approx(1 / 15)
    assert ends(quantization) == pytest.approx([-4 / 15, 11 / 15])


@settings(deadline=None)
@given(seed=st.integers(0, 99), bits=st.sampled_from([4, 6]), asymmetric=st.booleans())
def test_a_search_loses_no_more_than_the_observed_range(seed, bits, asymmetric):
    weights = np.random.default_rng(seed).standard_t(3, 5000)

    def loss(mode):
        moved = fake_quantize(weights, Quantization.from_weights(weights, bits, asymmetric=asymmetric, mode=mode))
        return np.square(moved - weights).sum()

    assert loss("tf_enhanced") < loss("tf")


@pytest.mark.parametrize("mode", ["tf", "tf_enhanced"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_are_all_alike(mode, asymmetric, dtype):
    options = {"asymmetric": asymmetric, "mode": mode}
    assert Quantization.from_weights(random_array((3, 0), dtype), **options).scale == 1.0
    for value in (0.0, -0.0, 3.0, -3.0):
        weights = np.full((2, 9), value).astype(random_array((1,), dtype).dtype)
        for axis in (None, 0):
            moved = fake_quantize(weights, Quantization.from_weights(weights, axis=axis, **options), axis=0)
            np.testing.assert_allclose(moved.astype(np.float64), value, rtol=1e-12)


@pytest.mark.parametrize("mode", ["tf", "tf_enhanced"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(wrong, mode):
    for dtype in ("float16", "float32", "float64"):
        weights = random_array((4, 50), dtype)
        weights[2, 33] = wrong
        for axis in (None, 0, 1):
            with pytest.raises(ValueError, match="weights: contains nan or inf"):
                Quantization.from_weights(weights, axis=axis, mode=mode)
    with pytest.raises(ValueError, match="weights: contains nan or inf"):
        RANGE.twin(weights, 8, False, False)


@pytest.mark.parametrize("mode", ["tf", "tf_enhanced"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_numbers_at_the_ends_of_float64(mode, asymmetric):
    options = {"asymmetric": asymmetric, "mode": mode}
    for unit in (1e-300, 1.0, 1e300):
        found = Quantization.from_weights(unit * np.array([1.0, -2.0, 0.1]), **options)
        assert 0.015 < found.step / unit < 0.016 or asymmetric
        assert 0.011 < found.step / unit < 0.012 or not asymmetric
    for weights in ([5e-324, 0.0], [-1.7e308, 1.7e308] if asymmetric else [-5e-324, 0.0]):
        with pytest.raises(ValueError, match="scale: "):
            Quantization.from_weights(weights, **options)
    rows = np.array([[5e-324, 0.0], [-1.7e308, 1.7e308], [1e-310, 1.0], [-1e-310, 1e308]])
    np.testing.assert_array_equal(RANGE.fast(rows, 8, asymmetric, True), RANGE.twin(rows, 8, asymmetric, True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 1}, ValueError, "bits: 1, expected"),
        ({"mode": "percentile"}, ValueError, "mode: 'percentile', expected 'tf' or 'tf_enhanced'"),
        ({"axis": 2}, ValueError, "axis: 2, the array has 2 axes"),
        ({"weights": ["a"]}, TypeError, "weights: dtype"),
    ],
)
def test_arguments_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        Quantization.from_weights(**{"weights": np.ones((2, 3)), **arguments})


def test_the_number_of_threads_changes_nothing():
    weights, before = random_array((64, 3000), "float32"), get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            set_num_threads(threads)
            found.add(Quantization.from_weights(weights, axis=0, bits=4))
        assert len(found) == 1
    finally:
        set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stochastic_rounding_is_that_of_its_seed(layout):
    weights = random_array((30, 40), "float32")
    quantization = Quantization(scale=np.linspace(1.0, 5.0, 30), zero_point=3, bits=5)

    def moved(weights, seed):
        return fake_quantize(weights, quantization, axis=0, rng=np.random.default_rng(seed))

    found = moved(LAYOUTS[layout](weights), 0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, moved(weights, 0))
    assert (found != moved(weights, 1)).any()
    np.testing.assert_array_equal(moved(found, 1), found)  # what is on the grid stays
    step, inside = quantization.step[:, None], np.abs(weights * quantization.scale[:, None]) < 12
    assert (np.abs(found - weights) < step * (1 + 1e-6))[inside].all()


def test_stochastic_rounding_is_right_on_average():
    values = np.full(100_000, 0.3)
    moved = fake_quantize(values, Quantization(), rng=np.random.default_rng(0))
    assert set(moved) == {0.0, 1.0}
    assert moved.mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_stochastic_rounding_of_blocks_and_of_narrow_dtypes(dtype):
    weights = random_array((4, 6), dtype)
    quantization = Quantization([[1.0, 2.0]] * 4, bits=4)
    found = fake_quantize(weights, quantization, axis=1, block_size=3, rng=np.random.default_rng(0))
    assert found.dtype == fake_quantize(weights, quantization, axis=1, block_size=3).dtype
    for block, scale in ((slice(0, 3), 1.0), (slice(3, 6), 2.0)):
        steps = found[:, block].astype(np.float64) * scale
        np.testing.assert_array_equal(steps, np.rint(steps))


def test_stochastic_rounding_checks_channels():
    with pytest.raises(ValueError, match="scale: 2 values, expected 1 or 3"):
        fake_quantize(np.ones((2, 3)), Quantization([1.0, 2.0]), rng=np.random.default_rng(0))
    assert fake_quantize(0.5, Quantization([4.0]), rng=np.random.default_rng(0)) == 0.5
