"""Means per channel: against the twin, against the definition, and whatever is wrong with samples."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrays import FLOATS, INTEGERS, LAYOUTS, SMALL_FLOATS, random_array
from biascorr import ChannelMean, Quantization, _kernels, prepare_input_mean, reference
from comparisons import COMPARISONS, totals

CHANNELS = COMPARISONS["channel_sums"]
SHAPES = [
    *[(1,), (7,), (64,), (129,)],  # channels alone
    *[(positions, channels) for positions in (1, 2, 63, 64, 65, 513) for channels in (1, 3, 4, 16, 63, 64, 65)],
    *[(1, 7, 7, 16), (2, 5, 3, 2, 300), (3, 1, 1, 2048), (4099, 1), (8193, 2), (1, 1000, 1000, 3), (40, 20011)],
]


def assert_close(found, expected, sample, rtol):
    if object in (found.dtype, expected.dtype):
        assert found.tolist() == expected.tolist()
    else:
        size = np.abs(sample.astype(np.float64)).sum() / sample.shape[-1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * max(size, 1e-300))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS + SMALL_FLOATS)
def test_kernel_equals_twin(dtype, layout):
    for seed, shape in enumerate(SHAPES[:-2]):
        values = random_array(shape, dtype, seed)
        sample = LAYOUTS[layout](values)
        before = values.tobytes()
        assert_close(CHANNELS.fast(sample), CHANNELS.twin(values), values, CHANNELS.rtol)
        assert np.ascontiguousarray(sample).tobytes() == before or layout == "byte_swapped"


@pytest.mark.parametrize("dtype", ["int8", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES[-2:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_first", "sliced", "reversed"])
def test_kernel_equals_twin_on_samples_that_are_cut_into_tiles(dtype, shape, layout):
    values = random_array(shape, dtype)
    assert_close(CHANNELS.fast(LAYOUTS[layout](values)), CHANNELS.twin(values), values, CHANNELS.rtol)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_any_axis_can_hold_the_channels(axis):
    sample = random_array((4, 5, 6), "int16")
    assert CHANNELS.fast(sample, axis).tolist() == CHANNELS.twin(sample, axis).tolist()


def test_pooled_mean_of_samples_of_different_shapes():
    samples = [np.array([0, 10, 2, 20]).reshape(1, 2, 1, 2), np.array([4, 30]).reshape(1, 1, 1, 2)]
    np.testing.assert_array_equal(prepare_input_mean(samples, None), [2, 20])


def test_affine_map_of_quantized_samples():
    quantization = Quantization(scale=255.12458585747225, zero_point=-128)
    for value, real in [(-128, 0.0), (127, 0.99951167), (0, 0.50171566)]:
        sample = np.full((1, 2, 2, 3), value, np.int8)
        np.testing.assert_allclose(prepare_input_mean([sample], quantization), [real] * 3, rtol=1e-6, atol=1e-12)


def test_scale_and_zero_point_per_channel():
    sample = np.array([[2, 8], [4, 10]], np.int8)
    quantization = Quantization(scale=[2.0, 4.0], zero_point=[1, -1])
    np.testing.assert_array_equal(prepare_input_mean([sample], quantization), [1.0, 2.5])


def test_any_object_with_scale_and_zero_point_serves():
    class Affine:
        scale = np.float32(0.5)
        zero_point = np.int64(1)

    np.testing.assert_array_equal(prepare_input_mean([np.array([3, 5])], Affine()), [4.0, 8.0])


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_result_is_float64_only_for_float64_samples(dtype):
    mean = prepare_input_mean([random_array((5, 3), "int8"), random_array((5, 3), dtype)], None)
    assert mean.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert mean.shape == (3,)


def test_integers_are_summed_exactly_beyond_what_float64_holds():
    big = np.array([[2**62], [2**62], [3]], np.int64)
    mean = ChannelMean()
    for _ in range(3):
        mean.update(big)
    for _ in range(6):
        mean.update(np.array([[-(2**62)]], np.int64))
    assert mean.mean()[0] == np.float32(9 / 15)


def test_unsigned_extremes_do_not_wrap():
    sample = np.full((1000, 2), np.iinfo(np.uint64).max)
    assert CHANNELS.fast(sample).tolist() == [1000 * (2**64 - 1)] * 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_first", "sliced", "strided", "reversed"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_float_means_are_within_one_ulp_of_the_exact_mean(dtype, layout):
    sample = random_array((3, 41, 43, 5), dtype)
    exact = [math.fsum(channel.ravel().tolist()) / channel.size for channel in np.moveaxis(sample, -1, 0)]
    found = prepare_input_mean([LAYOUTS[layout](sample)], None)
    ulp = np.spacing(np.asarray(exact, found.dtype))
    assert (np.abs(found.astype(np.float64) - exact) <= np.abs(ulp)).all()


@pytest.mark.parametrize("quantization", [None, Quantization()])
@pytest.mark.parametrize("dtypes", [("float64",), ("float64", "int64"), ("float32", "float64", "uint8")])
def test_float64_means_are_rounded_about_once(dtypes, quantization):
    rng = np.random.default_rng(0)
    for rows in (3, 7, 49, 1021):
        reals = 100 * rng.standard_normal((rows, 500 if rows < 1000 else 50))
        samples = [(reals * (2**50 if dtype == "int64" else 1)).astype(dtype) for dtype in dtypes]
        columns = np.concatenate([np.array(sample.tolist(), object) for sample in samples]).T
        exact = [sum(map(Fraction, column.tolist())) / len(column) for column in columns]
        accumulated = ChannelMean()
        for sample in samples:
            accumulated.update(sample)
        for found in (prepare_input_mean(samples, quantization), accumulated.mean(quantization)):
            errors = [abs(Fraction(float(x)) - y) / Fraction(np.spacing(abs(float(x)))) for x, y in zip(found, exact)]
            assert max(errors) < 0.51


@pytest.mark.parametrize("dtype", ["int8", "float32", "float64"])
def test_list_and_iterator_give_the_same_bits(dtype):
    samples = [random_array((1, 9, 9 + k, 13), dtype, k) for k in range(200)]
    streamed = ChannelMean()
    for sample in samples:
        streamed.update(sample)
    expected = prepare_input_mean(samples, None).tobytes()
    assert prepare_input_mean(iter(samples), None).tobytes() == expected
    assert prepare_input_mean(tuple(samples), None).tobytes() == expected
    assert streamed.mean().tobytes() == expected
    assert streamed.count == sum(sample.size // 13 for sample in samples)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float32"])
@pytest.mark.parametrize("shape", [(7,), (49, 1), (1, 1, 49), (1, 5, 3, 3), (1, 40, 7, 7), (1, 9, 30, 30), (1, 700, 5, 5)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_list_of_samples_alike_is_one_array(dtype, shape, axis):
    if axis == 1 and len(shape) == 1:
        pytest.skip("has one axis")
    values = random_array((300, *shape), dtype)
    sums, count, _ = _kernels.channel_sums(list(values), axis, 0, None)
    expected = CHANNELS.twin(values, axis % len(shape) + 1)
    assert count == values.size // shape[axis]
    if dtype == "float32":
        np.testing.assert_allclose(totals(sums), expected, rtol=0, atol=1e-13 * np.abs(values, dtype=np.float64).sum())
        streamed = ChannelMean(channel_axis=axis)
        for sample in values:
            streamed.update(sample)
        assert streamed.mean().tobytes() == _kernels.channel_mean(list(values), axis, 1.0, 0.0).tobytes()
    else:
        assert totals(sums).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_channel_mean_equals_twin(dtype):
    comparison = COMPARISONS["channel_mean"]
    samples = [random_array((2, 3 + k, 5), dtype, k) for k in range(4)]
    for scale, zero_point in [(1.0, 0), (37.5, -3), (np.linspace(0.5, 9.0, 5), np.arange(5))]:
        expected = comparison.twin(samples, scale, zero_point)
        np.testing.assert_allclose(comparison.fast(samples, scale, zero_point), expected, rtol=comparison.rtol, atol=1e-7)


@pytest.mark.parametrize("quantization", [None, Quantization(37.5, -3), Quantization(np.linspace(0.5, 9.0, 5), np.arange(5))])
def test_list_and_accumulator_agree_on_mixed_dtypes(quantization):
    samples = [random_array((7, 5), dtype, k) for k, dtype in enumerate(["int8", "float32", "uint16", "float16"])]
    expected = prepare_input_mean(iter(samples), quantization)
    assert prepare_input_mean(samples, quantization).tobytes() == expected.tobytes()


def test_an_iterator_is_consumed_once_with_one_sample_alive():
    alive, most = [], []

    class Counted(np.ndarray):
        def __del__(self):
            if alive:
                alive.pop()

    def samples():
        for k in range(5):
            alive.append(None)
            most.append(len(alive))
            yield np.full((2, 3), k, np.int8).view(Counted)

    np.testing.assert_array_equal(prepare_input_mean(samples(), None), [2, 2, 2])
    assert max(most) <= 2  # the one being replaced and its successor


def test_an_array_is_one_sample():
    sample = random_array((4, 5, 6), "float32")
    np.testing.assert_array_equal(prepare_input_mean(sample, None), prepare_input_mean([sample], None))
    np.testing.assert_array_equal(prepare_input_mean(np.array([1.0, 2.0]), None), [1.0, 2.0])


def test_nested_lists_are_samples():
    np.testing.assert_array_equal(prepare_input_mean([[[1, 2], [3, 4]]], None), [2, 3])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_propagate_as_in_numpy(dtype, value):
    sample = random_array((3, 70, 4), dtype)
    sample[1, 2, 1] = value
    found = prepare_input_mean([sample, random_array((3, 4), dtype)], None)
    assert np.isfinite(found[[0, 2, 3]]).all()
    np.testing.assert_array_equal(found[1], value)


def test_opposite_infinities_are_nan():
    sample = np.array([[np.inf, np.inf], [-np.inf, 1.0]])
    np.testing.assert_array_equal(prepare_input_mean([sample], None), [np.nan, np.inf])
    np.testing.assert_array_equal(prepare_input_mean([sample[:1], sample[1:]], None), [np.nan, np.inf])


RAGGED = [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, "samples: none given"),
        (iter([]), ValueError, "samples: none given"),
        ([np.ones((2, 3)), np.float32(1)], ValueError, r"samples\[1\]: 0-dimensional"),
        ([np.ones((2, 3)), np.ones((0, 3))], ValueError, r"samples\[1\]: shape \[0, 3\] has no elements"),
        ([np.ones((2, 0))], ValueError, r"samples\[0\]: shape \[2, 0\] has no elements"),
        ([np.ones(16)] * 3 + [np.ones((2, 12))], ValueError, r"samples\[3\]: 12 channels, expected 16 as in samples\[0\]"),
        (iter([np.ones(16), np.ones(12)]), ValueError, r"samples\[1\]: 12 channels, expected 16"),
        ([np.ones(3), np.ones(3, complex)], TypeError, r"samples\[1\]: dtype complex128, expected"),
        ([np.array(["a", "b"])], TypeError, r"samples\[0\]: dtype <U1"),
        ([np.array([1, None])], TypeError, r"samples\[0\]: dtype object"),
        ([np.array([1], "M8[s]")], TypeError, r"samples\[0\]: dtype datetime64"),
        ([np.ma.masked_array([1.0, 2.0], [True, False])], TypeError, r"samples\[0\]: a masked array"),
        ([RAGGED], ValueError, r"samples\[0\]: not an array"),
    ],
)
def test_bad_samples_are_named(samples, error, message):
    with pytest.raises(error, match=message):
        prepare_input_mean(samples, None)


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        ([1.0, 2.0], 0, "scale: 2 values, expected 1 or 3"),
        (1.0, [0, 1], "zero_point: 2 values, expected 1 or 3"),
        (0.0, 0, "scale: 0.0, expected positive"),
        (1.0, 0.5, "zero_point: 0.5, expected integers"),
    ],
)
def test_quantization_that_does_not_fit(scale, zero_point, message):
    class Affine:
        pass

    quantization = Affine()
    quantization.scale, quantization.zero_point = scale, zero_point
    with pytest.raises(ValueError, match=message):
        prepare_input_mean([np.ones((2, 3))], quantization)


@pytest.mark.parametrize("axis", [3, 7, -4, -9])
def test_a_channel_axis_that_the_sample_does_not_have(axis):
    mean = ChannelMean(channel_axis=axis)
    with pytest.raises(ValueError, match=rf"samples\[0\]: 3 axes, none of which is channel axis {axis}"):
        mean.update(np.ones((2, 3, 4)))


def test_booleans_count_as_one_whatever_their_byte():
    np.testing.assert_array_equal(prepare_input_mean([np.array([2, 1, 0], np.uint8).view(bool)], None), [1, 1, 0])


def test_one_value_serves_all_channels_in_every_form():
    class Affine:
        scale, zero_point = [2.0], 1

    samples = [np.array([[3, 5, 7]])]
    np.testing.assert_array_equal(prepare_input_mean(samples, Affine()), [1, 2, 3])
    np.testing.assert_array_equal(prepare_input_mean(iter(samples), Affine()), [1, 2, 3])


def test_beyond_float32_is_inf_in_every_form():
    samples = [np.full((1, 2), 1e38, np.float32)]
    for form in (samples, iter(samples)):
        np.testing.assert_array_equal(prepare_input_mean(form, Quantization(scale=1e-10)), [np.inf, np.inf])


def test_a_failed_update_changes_nothing():
    mean = ChannelMean()
    mean.update(np.array([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"samples\[1\]: 3 channels"):
        mean.update(np.ones(3))
    np.testing.assert_array_equal(mean.mean(), [1, 2])


def test_accumulators_of_different_channels_do_not_merge():
    first, second = ChannelMean(), ChannelMean()
    first.update(np.ones(3))
    second.update(np.ones(4))
    with pytest.raises(ValueError, match="other: 4 channels, expected 3"):
        first.merge(second)
    second.merge(ChannelMean())
    assert second.count == 1


def test_an_empty_accumulator_takes_over_what_it_merges():
    empty, full = ChannelMean(), ChannelMean()
    full.update(np.array([[1, 2], [3, 5]]))
    empty.merge(full)
    np.testing.assert_array_equal(empty.mean(), [2, 3.5])


def test_an_accumulator_survives_pickling():
    mean = ChannelMean(channel_axis=1)
    mean.update(random_array((2, 3, 4), "int8"))
    mean.update(random_array((2, 3, 4), "float32"))
    copy = pickle.loads(pickle.dumps(mean))
    copy.update(random_array((2, 3, 9), "float64"))
    mean.update(random_array((2, 3, 9), "float64"))
    assert copy.mean().tobytes() == mean.mean().tobytes()
    assert copy.count == mean.count


@settings(deadline=None)
@given(
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    dtype=st.sampled_from(["int8", "uint16", "int32", "int64", "uint64"]),
    order=st.randoms(use_true_random=False),
)
def test_integer_means_do_not_depend_on_order_or_split(parts, dtype, order):
    samples = [random_array((size, 3), dtype, seed) for seed, size in enumerate(parts)]
    expected = prepare_input_mean([np.concatenate(samples)], None).tobytes()
    accumulators = []
    for sample in samples:
        accumulators.append(ChannelMean())
        accumulators[-1].update(sample)
    order.shuffle(accumulators)
    while len(accumulators) > 1:
        accumulators[0].merge(accumulators.pop(order.randrange(1, len(accumulators))))
    assert accumulators[0].mean().tobytes() == expected


@settings(deadline=None)
@given(a=st.integers(-100, 100), b=st.integers(1, 100), seed=st.integers(0, 9))
def test_the_mean_is_affine_in_the_samples(a, b, seed):
    sample = random_array((50, 4), "float64", seed)
    mean = prepare_input_mean([sample], None)
    np.testing.assert_allclose(prepare_input_mean([sample * b + a], None), mean * b + a, rtol=1e-12, atol=1e-11)


def test_what_a_kernel_takes_as_it_is_stays_where_it_is():
    for dtype in ("int8", "uint64", "float16", "bfloat16", "float64"):
        for layout in ("contiguous", "reversed", "memory_mapped"):
            sample = LAYOUTS[layout](random_array((4, 3), dtype))
            assert np.shares_memory(reference.native(sample, "sample"), sample)
