"""4-bit integers, one to a byte in the dtypes of ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from arrays import LAYOUTS
from biascorr import ChannelMean, Quantization, prepare_input_mean


def of_four_bits(values, signed=True):
    return np.asarray(values).astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)


def random_values(shape, signed, seed=0):
    low = -8 if signed else 0
    return np.random.default_rng(seed).integers(low, low + 16, shape).astype(np.int8)


SHAPES = [
    (1,),
    (2,),
    (3,),
    (5, 1),
    (5, 2),
    (7, 3),
    (1, 7, 7, 16),
    (3, 9, 5, 33),
    (2, 64),
    (4099, 3),
    (4099, 4),
    (9000, 65),
    (70_000, 31),
]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_are_the_same_as_eight(shape, signed):
    values = random_values(shape, signed)
    quantization = Quantization(3.5, 1, 4)
    found = prepare_input_mean([of_four_bits(values, signed)], quantization)
    np.testing.assert_array_equal(found, prepare_input_mean([values], quantization))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 7), (3, 4, 7, 7), (2, 3, 8, 8), (300, 16, 14, 14), (1, 3, 224, 224), (5, 1, 9), (2, 3, 1)]
)
def test_channels_first(shape, signed):
    values = random_values(shape, signed)
    ours, theirs = ChannelMean(channel_axis=1), ChannelMean(channel_axis=1)
    ours.update(of_four_bits(values, signed))
    theirs.update(values)
    assert ours.count == theirs.count
    np.testing.assert_array_equal(ours.mean(), theirs.mean())


@pytest.mark.parametrize("signed", [True, False])
def test_extremes_do_not_overflow(signed):
    for value in (-8, 7) if signed else (0, 15):
        values = np.full((9000, 64), value, np.int8)
        np.testing.assert_array_equal(prepare_input_mean([of_four_bits(values, signed)], None), np.full(64, value))


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_ml_dtypes_in_every_layout(dtype, memory):
    values = random_values((4, 9, 9, 33), dtype == "int4")
    sample = LAYOUTS[memory](values.astype(getattr(ml_dtypes, dtype)))
    np.testing.assert_array_equal(prepare_input_mean([sample], None), prepare_input_mean([values], None))


def test_the_other_half_of_the_byte_does_not_matter():
    values = random_values((50, 4), True)
    sample = (values.astype(np.uint8) & 15 | 0x50).view(ml_dtypes.int4)
    np.testing.assert_array_equal(prepare_input_mean([sample], None), prepare_input_mean([values], None))


def test_mixed_with_other_samples():
    values = random_values((6, 4), True)
    samples = [of_four_bits(values), values.astype(np.float32), values, of_four_bits(values)]
    np.testing.assert_allclose(prepare_input_mean(samples, None), values.mean(axis=0), rtol=1e-6)
    assert prepare_input_mean(iter(samples), None).dtype == np.float32


def test_what_does_not_fit_is_named():
    sample = of_four_bits(random_values((3, 2), True))
    with pytest.raises(ValueError, match=r"samples\[1\]: 3 channels, expected 2"):
        prepare_input_mean([sample, sample.T], None)
    with pytest.raises(ValueError, match=r"samples\[0\]: shape \[0, 3\] has no elements"):
        prepare_input_mean([np.zeros((0, 3), ml_dtypes.int4)], None)
    with pytest.raises(ValueError, match=r"samples\[0\]: 0-dimensional"):
        prepare_input_mean([np.zeros((), ml_dtypes.int4)], None)


def test_a_masked_array_is_refused():
    with pytest.raises(TypeError, match=r"samples\[0\]: a masked array"):
        prepare_input_mean([np.ma.masked_array(np.ones((2, 3), ml_dtypes.int4))], None)
