"""The quantizer: its parameters, its arithmetic, and kernels against twins."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrays import LAYOUTS, random_array
from biascorr import Quantization, fake_quantize
from comparisons import COMPARISONS

SIZES = [0, 1, 7, 8, 9, 1000, 65_537, 300_001]


@pytest.mark.parametrize(("value", "real"), [(-128, 0.0), (127, 0.99951167), (0, 0.50171566)])
def test_golden_values(value, real):
    quantization = Quantization(scale=255.12458585747225, zero_point=-128)
    found = quantization.dequantize(np.array(value, np.int8))
    np.testing.assert_allclose(found, real, rtol=1e-6)
    assert quantization.quantize(found) == value


@pytest.mark.parametrize(
    ("low", "high", "bits", "asymmetric", "step", "zero_point"),
    [
        (-1, 2, 8, False, 0.0157480315, 0),
        (-1, 2, 8, True, 0.0117647059, -43),
        (-1, 2, 4, False, 0.285714, 0),
        (0, 0.9995117, 8, True, 1 / 255.12458, -128),
        (1, 2, 8, True, 2 / 255, -128),
        (-2, -1, 8, True, 2 / 255, 127),
        (0, 0, 8, True, 1.0, 0),
        (0, 0, 8, False, 1.0, 0),
    ],
)
def test_from_range(low, high, bits, asymmetric, step, zero_point):
    quantization = Quantization.from_range(low, high, bits, asymmetric)
    assert quantization.step == pytest.approx(step, rel=1e-5)
    assert quantization.zero_point == zero_point
    assert quantization.dequantize(quantization.quantize(0.0)) == 0.0


def test_from_step_is_the_reciprocal():
    assert Quantization.from_step(0.25, 3, 4) == Quantization(4.0, 3, 4)
    assert Quantization(4.0).step == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale: 0.0, expected positive and finite"),
        ({"scale": -1.0}, "scale: -1.0"),
        ({"scale": np.inf}, "scale: inf"),
        ({"scale": np.nan}, "scale: nan"),
        ({"scale": [1.0, 0.0]}, "scale: "),
        ({"zero_point": 0.5}, "zero_point: 0.5, expected integers"),
        ({"zero_point": np.nan}, "zero_point: nan"),
        ({"scale": [1.0, 2.0], "zero_point": [1, 2, 3]}, r"shapes \(2,\) and \(3,\), expected equal"),
        ({"scale": []}, "no values"),
        ({"zero_point": 2.0**51}, r"expected integers of no more than 2\^50"),
        ({"zero_point": 1e30}, r"expected integers of no more than 2\^50"),
        ({"bits": float("inf")}, "bits: inf"),
        ({"bits": 1}, "bits: 1, expected an integer from 2 to 32"),
        ({"bits": 33}, "bits: 33"),
        ({"bits": 7.5}, "bits: 7.5"),
    ],
)
def test_parameters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**arguments)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (np.nan, 1), (0, np.inf)])
def test_ranges_that_are_none(low, high):
    with pytest.raises(ValueError, match="min, max: "):
        Quantization.from_range(low, high)


@pytest.mark.parametrize("step", [0.0, -1.0, np.inf, np.nan])
def test_steps_that_are_none(step):
    with pytest.raises(ValueError, match="step: "):
        Quantization.from_step(step)


@pytest.mark.parametrize("bits", [-5, 0, 1, 8.5, 2000])
def test_bits_of_a_range_are_checked_first(bits):
    with pytest.raises(ValueError, match=f"bits: {bits}, expected"):
        Quantization.from_range(-1, 2, bits)


def test_large_zero_points_leave_room_for_every_step():
    quantization = Quantization(1.0, -(2**50))
    assert quantization.quantize([2.0**50 + 5, 2.0**50 - 3]).tolist() == [5, -3]


def test_a_copy_is_as_frozen_as_its_original():
    copied = copy.deepcopy(Quantization([1.0, 2.0]))
    with pytest.raises(ValueError, match="read-only"):
        copied.scale[0] = 3.0


def test_a_quantization_is_a_value():
    first, second = Quantization([1.0, 2.0], [0, 1]), Quantization(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    assert first == second
    assert hash(first) == hash(second)
    assert first != Quantization([1.0, 2.0], [0, 2])
    assert first != "something else"
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(AttributeError):
        first.bits = 4
    with pytest.raises(ValueError, match="read-only"):
        first.scale[0] = 3.0


BITS = [(2, "int8"), (8, "int8"), (9, "int16"), (16, "int16"), (17, "int32"), (32, "int32")]


@pytest.mark.parametrize(("bits", "dtype"), BITS)
def test_quantized_values_have_the_smallest_dtype_and_saturate(bits, dtype):
    quantization = Quantization(1.0, 0, bits)
    found = quantization.quantize([-1e30, -np.inf, -0.5, 0.5, 1.5, 2.5, np.inf])
    assert found.dtype == dtype
    limit = 2 ** (bits - 1)
    assert found.tolist() == [-limit, -limit, 0, 0, min(2, limit - 1), min(2, limit - 1), limit - 1]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", [2, 8, 16, 32])
def test_kernels_equal_twins(bits, dtype, per_channel):
    for size in SIZES:
        values = 3 * random_array((size, 3), dtype, size)
        scale, zero_point = (np.array([2.0, 3.7, 0.1]), np.array([0, -1, 1])) if per_channel else (12.34, 1)
        for name in ("quantize", "fake_quantize"):
            comparison = COMPARISONS[name]
            found, expected = comparison.fast(values, scale, zero_point, bits), comparison.twin(values, scale, zero_point, bits)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        codes = COMPARISONS["quantize"].twin(values, scale, zero_point, bits)
        comparison = COMPARISONS["dequantize"]
        found, expected = comparison.fast(codes, scale, zero_point), comparison.twin(codes, scale, zero_point)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    values = random_array((5, 6, 7), "float32")
    found = fake_quantize(LAYOUTS[layout](values), Quantization(scale=7.0, zero_point=2, bits=4))
    np.testing.assert_array_equal(found, COMPARISONS["fake_quantize"].twin(values, 7.0, 2, 4))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_can_hold_the_channels(axis):
    values = random_array((4, 5, 6), "float32")
    scale = np.linspace(1.0, 9.0, values.shape[axis])
    moved = COMPARISONS["fake_quantize"].twin(np.moveaxis(values, axis, -1), scale, 0, 8)
    np.testing.assert_array_equal(fake_quantize(values, Quantization(scale), axis=axis), np.moveaxis(moved, -1, axis))


@pytest.mark.parametrize(
    ("given_dtype", "found_dtype"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float64", "float64"), ("int16", "float32")],
)
def test_fake_quantize_keeps_floating_dtypes(given_dtype, found_dtype):
    values = random_array((4, 5), given_dtype)
    found = fake_quantize(values, Quantization(scale=2.0, bits=16))
    assert found.dtype.name == found_dtype
    expected = np.rint(values.astype(np.float64) * 2.0) / 2.0
    np.testing.assert_array_equal(found.astype(np.float64), expected.clip(-(2.0**14), 2.0**14 - 0.5))


def test_scalars_and_lists():
    quantization = Quantization(scale=2.0)
    assert quantization.quantize(0.26) == 1
    assert quantization.quantize(0.26).shape == ()
    assert fake_quantize([[0.1], [0.4]], quantization).tolist() == [[0.0], [0.5]]


def test_nan_has_no_quantized_value_and_stays_nan_otherwise():
    values = np.array([0.0, np.nan])
    with pytest.raises(ValueError, match="array: contains nan"):
        Quantization().quantize(values)
    np.testing.assert_array_equal(fake_quantize(values, Quantization()), values)


@pytest.mark.parametrize("method", ["quantize", "dequantize", "fake_quantize"])
def test_bad_arrays_are_named(method):
    quantization = Quantization(scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="scale: 2 values, expected 1 or 3, the number of channels"):
        getattr(quantization, method)(np.ones((4, 3), np.int8))
    with pytest.raises(TypeError, match="array: dtype complex128"):
        getattr(quantization, method)(np.ones(2, complex))


@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_what_takes_the_slow_path_is_not_broadcast(dtype):
    with pytest.raises(ValueError, match="scale: 3 values, expected 1 or 1"):
        Quantization([1.0, 2.0, 3.0]).dequantize(np.zeros((4, 1), dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_dtypes_are_kept_and_rounded_once(dtype):
    values, quantization = random_array((40, 40), dtype), Quantization(428123.5578310375, bits=30)
    found = fake_quantize(values, quantization)
    assert found.dtype == values.dtype
    expected = COMPARISONS["fake_quantize"].twin(values.astype(np.float64), quantization.scale, 0, 30).astype(values.dtype)
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("axis", [2, 5, -3])
def test_an_axis_that_the_array_does_not_have(axis):
    with pytest.raises(ValueError, match=f"axis: {axis}, the array has 2 axes"):
        fake_quantize(np.ones((2, 3)), Quantization(), axis=axis)


def test_wide_integers_are_dequantized_too():
    quantization = Quantization(scale=2.0, zero_point=1, bits=32)
    assert quantization.dequantize(np.array([2**40, 1], np.int64)).tolist() == [(2**40 - 1) / 2, 0.0]


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), zero_point=st.integers(-128, 127), seed=st.integers(0, 99))
def test_values_on_the_grid_stay_and_others_move_at_most_half_a_step(scale, zero_point, seed):
    quantization = Quantization(scale, zero_point)
    low, high = (quantization.dequantize(np.array(q, np.int64)) for q in (-128, 127))
    values = np.random.default_rng(seed).uniform(low, high, 100)
    moved = fake_quantize(values, quantization)
    assert (np.abs(moved - values) <= quantization.step / 2 * (1 + 1e-12)).all()
    np.testing.assert_array_equal(fake_quantize(moved, quantization), moved)


@pytest.mark.skipif(int(np.__version__.split(".")[0]) < 2, reason="numpy 1 has no more than 32 axes")
def test_more_axes_than_numpy_1_had():
    array = np.full((1,) * 64, 0.26, np.float32)
    quantization = Quantization(4.0)
    assert fake_quantize(array, quantization).item() == 0.25
    assert quantization.dequantize(quantization.quantize(array)).shape == array.shape


@pytest.mark.parametrize("block_size", [4, 10**15, 2**70])
def test_a_block_may_be_longer_than_its_axis(block_size):
    found = fake_quantize(np.full((2, 3), 0.26), Quantization([[4], [1]]), axis=1, block_size=block_size)
    np.testing.assert_array_equal(found, [[0.25] * 3, [0.0] * 3])


def test_a_scalar_has_no_blocks():
    with pytest.raises(ValueError, match="block_size: 2, the array has no axes"):
        fake_quantize(1.0, Quantization(), block_size=2)
