"""4-bit integers: one to a byte in the dtypes of ml_dtypes, two to a byte as ONNX stores them."""

import ml_dtypes
import numpy as np
import pytest

from arrays import LAYOUTS
from biascorr import ChannelMean, PackedInt4, Quantization, prepare_input_mean


def packed(values, signed=True):
    """Two to a byte; the values' low halves."""
    halves = (np.asarray(values).ravel().astype(np.int16) & 15).astype(np.uint8)
    halves = np.append(halves, np.uint8(0)) if len(halves) % 2 else halves
    return PackedInt4(halves[::2] | halves[1::2] << 4, np.shape(values), signed)


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
def test_packed_is_the_same_as_unpacked(shape, signed):
    values = random_values(shape, signed)
    sample = packed(values, signed)
    assert sample.unpacked().dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_array_equal(sample.unpacked(), values)
    np.testing.assert_array_equal(
        prepare_input_mean([sample], Quantization(3.5, 1, 4)), prepare_input_mean([values], Quantization(3.5, 1, 4))
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 7), (3, 4, 7, 7), (2, 3, 8, 8), (300, 16, 14, 14), (1, 3, 224, 224), (5, 1, 9), (2, 3, 1)]
)
def test_packed_channels_first(shape, signed):
    values = random_values(shape, signed)
    ours, theirs = ChannelMean(channel_axis=1), ChannelMean(channel_axis=1)
    ours.update(packed(values, signed))
    theirs.update(values)
    assert ours.count == theirs.count
    np.testing.assert_array_equal(ours.mean(), theirs.mean())


@pytest.mark.parametrize("signed", [True, False])
def test_extremes_do_not_overflow(signed):
    for value in (-8, 7) if signed else (0, 15):
        values = np.full((9000, 64), value, np.int8)
        np.testing.assert_array_equal(prepare_input_mean([packed(values, signed)], None), np.full(64, value))
        dtype = ml_dtypes.int4 if signed else ml_dtypes.uint4
        np.testing.assert_array_equal(prepare_input_mean([values.astype(dtype)], None), np.full(64, value))


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
    samples = [packed(values), values.astype(np.float32), values, packed(values)]
    np.testing.assert_allclose(prepare_input_mean(samples, None), values.mean(axis=0), rtol=1e-6)
    assert prepare_input_mean(iter(samples), None).dtype == np.float32


def test_what_does_not_fit_is_named():
    data = np.zeros(3, np.uint8)
    for shape in ((4,), (7,), (2, 4)):
        with pytest.raises(ValueError, match="data: 3 bytes, expected"):
            PackedInt4(data, shape)
    with pytest.raises(ValueError, match=r"shape: \(-2, -3\)"):
        PackedInt4(data, (-2, -3))
    with pytest.raises(ValueError, match="contiguous"):
        PackedInt4(np.zeros(6, np.uint8)[::2], (6,))
    with pytest.raises(TypeError, match="data: int8, expected an array of uint8"):
        PackedInt4(data.view(np.int8), (6,))
    with pytest.raises(TypeError, match="data: list"):
        PackedInt4([1, 2, 3], (6,))
    with pytest.raises(TypeError):
        PackedInt4(data, (2.0, 3.0))
    with pytest.raises(ValueError, match=r"samples\[1\]: 3 channels, expected 2"):
        prepare_input_mean([PackedInt4(data, (3, 2)), PackedInt4(data, (2, 3))], None)
    with pytest.raises(ValueError, match=r"samples\[0\]"):
        prepare_input_mean([PackedInt4(data[:0], (0, 3))], None)
    with pytest.raises(ValueError, match=r"samples\[0\]"):
        prepare_input_mean([PackedInt4(data[:1], ())], None)


def test_a_masked_array_is_refused():
    with pytest.raises(TypeError, match=r"samples\[0\]: a masked array"):
        prepare_input_mean([np.ma.masked_array(np.ones((2, 3), ml_dtypes.int4))], None)
