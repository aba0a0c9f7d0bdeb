"""The correction from a quantizer: the bits of quantizing first, for every layout, grid, dtype and memory order."""

import hashlib

import numpy as np
import pytest

from arrays import LAYOUTS, random_array
from biascorr import MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean, reference

SHAPES = {
    "HWIO": (3, 2, 8, 24),
    "OIHW": (24, 8, 3, 2),
    "IOHW": (8, 24, 3, 2),
    "HWIGO": (3, 1, 4, 3, 20),
    "HWCM": (3, 3, 33, 2),
    "IO": (64, 50),
    "OI": (50, 64),
}


def mean_of(shape, layout, groups=1, per_tap=False):
    sizes = dict(zip(layout, shape))
    inputs = sizes.get("I", 1) * sizes.get("G", sizes.get("C", 1)) * (1 if layout[0] == "I" else groups)
    taps = [sizes[letter] for letter in layout if letter in "DHW"] if per_tap else []
    return np.random.default_rng(1).standard_normal((*taps, inputs))


def channels_of(shape, layout, groups=1):
    return int(reference.output_channels(shape, groups, layout).max()) + 1


def two_steps(corrector, weights, scale, zero_point, bits):
    """Quantizing first, by the twin: the grid of each weight is given."""
    each = np.broadcast_to(scale, weights.shape), np.broadcast_to(zero_point, weights.shape)
    return corrector.calculate(weights, reference.fake_quantize(weights, *each, bits))


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(("layout", "per_tap"), [(layout, per_tap) for layout in SHAPES for per_tap in {False, "H" in layout}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_grid(layout, dtype, per_tap):
    weights = random_array(SHAPES[layout], dtype)
    corrector = MeanBiasCorrector(mean_of(weights.shape, layout, per_tap=per_tap), layout=layout)
    found = corrector.calculate_from_quantization(weights, Quantization(13.7, 2, 5))
    same_bits(found, two_steps(corrector, weights, 13.7, 2, 5))
    same_bits(found, corrector.calculate(weights, fake_quantize(weights, Quantization(13.7, 2, 5))))


@pytest.mark.parametrize(
    ("layout", "groups"), [*((layout, 1) for layout in SHAPES), ("HWIO", 4), ("OIHW", 4), ("IOHW", 4), ("OI", 2)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int8", "int32"])
def test_a_grid_for_each_output_channel(layout, dtype, groups):
    weights = random_array(SHAPES[layout], dtype)
    corrector = MeanBiasCorrector(mean_of(weights.shape, layout, groups), layout=layout, groups=groups)
    channels = channels_of(weights.shape, layout, groups)
    scale, zero_point = np.linspace(3.1, 40.3, channels), np.arange(channels) % 5 - 2
    index = reference.output_channels(weights.shape, groups, layout)
    found = corrector.calculate_from_quantization(weights, Quantization(scale, zero_point, 6))
    expected = fake_quantize(
        weights, Quantization(*(np.broadcast_to(x[index], weights.shape) for x in (scale, zero_point)), 6), axis=0, block_size=1
    )
    same_bits(found, corrector.calculate(weights, expected))
    only_scale = corrector.calculate_from_quantization(weights, Quantization(scale, 1, 6))
    same_bits(only_scale, corrector.calculate_from_quantization(weights, Quantization(scale, np.full(channels, 1), 6)))


@pytest.mark.parametrize("axis", range(-4, 4))
@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_a_grid_for_each_step_of_an_axis(layout, axis):
    weights = random_array(SHAPES[layout], "float32")
    corrector = MeanBiasCorrector(mean_of(weights.shape, layout), layout=layout)
    quantization = Quantization(np.linspace(5.5, 23.1, weights.shape[axis]), 0, 4)
    found = corrector.calculate_from_quantization(weights, quantization, axis=axis)
    same_bits(found, corrector.calculate(weights, fake_quantize(weights, quantization, axis=axis)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 32, 100])
@pytest.mark.parametrize("layout", ["IO", "OI", "HWIO", "OIHW", "HWIGO", "IOHW"])
def test_blocks_of_input_channels(layout, block_size, dtype):
    weights = random_array(SHAPES[layout], dtype)
    axis = layout.index("I")
    blocks = [-(-size // block_size) if k == axis else size for k, size in enumerate(weights.shape)]
    rng = np.random.default_rng(2)
    scale, zero_point = rng.uniform(2.0, 30.0, blocks), rng.integers(-3, 4, blocks)
    corrector = MeanBiasCorrector(mean_of(weights.shape, layout), layout=layout)
    for quantization in (Quantization(scale, zero_point, 4), Quantization(scale, 1, 4)):
        found = corrector.calculate_from_quantization(weights, quantization, block_size=block_size)
        each = [
            np.repeat(np.broadcast_to(x, blocks), block_size, axis=axis).take(range(weights.shape[axis]), axis=axis)
            for x in (quantization.scale, quantization.zero_point)
        ]
        wide = weights if dtype != "float16" else weights.astype(np.float64)
        expected = reference.fake_quantize(wide, *each, 4).astype(dtype)
        same_bits(found, corrector.calculate(weights, expected))
        np.testing.assert_array_equal(fake_quantize(weights, quantization, axis=axis, block_size=block_size), expected)


def test_blocks_of_another_axis():
    weights = random_array((12, 50), "float32")
    quantization = Quantization(np.random.default_rng(0).uniform(3.0, 9.0, (12, 5)), 0, 4)
    corrector = MeanBiasCorrector(np.arange(12.0))
    found = corrector.calculate_from_quantization(weights, quantization, axis=-1, block_size=10)
    same_bits(found, corrector.calculate(weights, fake_quantize(weights, quantization, block_size=10)))


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("layout", ["HWIO", "OIHW", "HWCM"])
def test_the_memory_order_of_the_quantized_does_not_matter(layout, memory):
    weights = LAYOUTS[memory](random_array(SHAPES[layout], "float32"))
    corrector = MeanBiasCorrector(mean_of(weights.shape, layout), layout=layout)
    quantized = fake_quantize(weights, Quantization(9.5))
    expected = corrector.calculate_from_quantization(weights, Quantization(9.5))
    for other in LAYOUTS.values():
        same_bits(corrector.calculate(weights, other(quantized)), expected)
    channels = channels_of(weights.shape, layout)
    scale = np.linspace(3.0, 9.0, channels)
    index = reference.output_channels(weights.shape, 1, layout)
    found = corrector.calculate_from_quantization(weights, Quantization(scale))
    same_bits(found, two_steps(corrector, np.asarray(weights, np.float32), scale[index], 0, 8))


def test_large_weights_are_cut_alike():
    for layout, shape in [("IO", (1000, 3000)), ("OI", (3000, 1000)), ("HWIO", (3, 3, 300, 200)), ("OI", (3, 100_000))]:
        weights = random_array(shape, "float32")
        corrector = MeanBiasCorrector(mean_of(shape, layout), layout=layout)
        found = corrector.calculate_from_quantization(weights, Quantization(9.5))
        same_bits(found, corrector.calculate(weights, fake_quantize(weights, Quantization(9.5))))


def test_nothing_is_modified():
    weights = random_array((5, 7), "float32")
    before = hashlib.sha256(weights.tobytes()).digest()
    MeanBiasCorrector(np.ones(5)).calculate_from_quantization(weights, Quantization(np.arange(1.0, 8.0)))
    assert hashlib.sha256(weights.tobytes()).digest() == before


def test_what_does_not_fit_is_named():
    weights, corrector = random_array((6, 4), "float32"), MeanBiasCorrector(np.ones(6))
    blocks = np.ones((3, 4))
    cases = [
        ({"quantization": Quantization(np.ones(3))}, "3 values, expected 1 or 4, the number of channels"),
        ({"quantization": Quantization(np.ones(4)), "axis": 0}, "scale: 4 values, expected 1 or 6"),
        ({"quantization": Quantization(np.ones(6)), "axis": 2}, "axis: 2, the array has 2 axes"),
        ({"quantization": Quantization(blocks)}, "scale, zero_point: 2 and 0 axes, expected at most 1, or a block_size"),
        ({"quantization": Quantization(blocks), "block_size": 3}, r"scale: shape \(3, 4\), expected \(2, 4\)"),
        ({"quantization": Quantization(np.ones(4)), "block_size": 3}, r"scale: shape \(4,\), expected \(2, 4\)"),
        ({"quantization": Quantization(blocks), "block_size": 0}, "block_size: 0, expected an integer of at least 1"),
        ({"quantization": Quantization(blocks), "block_size": 2.0}, "block_size: 2.0, expected an integer"),
    ]
    for arguments, message in cases:
        for given in (weights, weights.astype(np.float16)):
            with pytest.raises(ValueError, match=message):
                corrector.calculate_from_quantization(given, **arguments)
    with pytest.raises(ValueError, match="2 and 0 axes, expected at most 1"):
        prepare_input_mean([weights], Quantization(blocks))
    with pytest.raises(ValueError, match="2 and 0 axes, expected at most 1"):
        Quantization(blocks).quantize(weights)
    with pytest.raises(TypeError, match="weights: dtype complex64"):
        corrector.calculate_from_quantization(weights.astype(np.complex64), Quantization())
    with pytest.raises(ValueError, match="mean"):
        MeanBiasCorrector(np.ones(7)).calculate_from_quantization(weights, Quantization())


def test_nan_and_infinite_weights():
    weights = np.array([[np.nan, np.inf, 1.0], [0.2, 0.3, 0.4]], np.float32)
    corrector, quantization = MeanBiasCorrector([1.0, 2.0]), Quantization(4.0)
    with np.errstate(invalid="ignore"):
        expected = corrector.calculate(weights, fake_quantize(weights, quantization))
    np.testing.assert_array_equal(corrector.calculate_from_quantization(weights, quantization), expected)
    assert np.isnan(expected[0])


def test_depthwise_has_no_input_axis_to_divide():
    weights = random_array((3, 3, 8, 2), "float32")
    with pytest.raises(ValueError, match="axis"):
        MeanBiasCorrector(np.ones(8), layout="HWCM").calculate_from_quantization(weights, Quantization(2.0), block_size=2)


@pytest.mark.parametrize("memory", ["reversed", "broadcast"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_walked_in_their_own_memory_order(dtype, memory):
    weights = np.tile(random_array((9, 250), dtype), 2)
    weights = weights[::-1, ::-1] if memory == "reversed" else np.broadcast_to(weights[0], weights.shape)
    mean = np.random.default_rng(1).standard_normal(500)
    mean[250:] = -mean[:250]  # what is left is rounding, so that float32 shows the order
    corrector = MeanBiasCorrector(mean, layout="OI")
    for quantization in (Quantization(3.0), Quantization(np.linspace(1.0, 3.0, 9))):
        found = corrector.calculate_from_quantization(weights, quantization)
        same_bits(found, corrector.calculate(weights, fake_quantize(weights, quantization, axis=0)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_no_weights_at_all(dtype):
    corrector = MeanBiasCorrector(np.ones(0))
    weights = np.zeros((0, 3), dtype)
    found = corrector.calculate_from_quantization(weights, Quantization(np.ones(3)))
    same_bits(found, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="scale, zero_point: 4 values|scale: 4 values"):
        corrector.calculate_from_quantization(weights, Quantization(np.ones(4)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strides", [(3, 1), (1, 3), (-3, 1), (5, 2), (1, 1), (0, 1)])
@pytest.mark.parametrize("layout", ["IO", "OI"])
def test_blocks_of_weights_that_overlap(layout, strides, dtype):
    memory = random_array((700,), dtype)
    steps = tuple(stride * memory.itemsize for stride in strides)
    weights = np.lib.stride_tricks.as_strided(memory[150:], (48, 40), steps)
    axis, corrector = (
        layout.index("I"),
        MeanBiasCorrector(random_array((weights.shape[layout.index("I")],), "float64"), layout=layout),
    )
    blocks = [size // 8 if k == axis else size for k, size in enumerate(weights.shape)]
    quantization = Quantization(np.linspace(1.0, 30.0, np.prod(blocks)).reshape(blocks), 0, 4)
    found = corrector.calculate_from_quantization(weights, quantization, block_size=8)
    same_bits(found, corrector.calculate(weights, fake_quantize(weights, quantization, axis=axis, block_size=8)))
