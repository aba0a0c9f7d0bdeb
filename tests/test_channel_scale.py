"""Ranges of channels and scaled channels: values known by hand, kernel against twin, memory orders, what does not fit."""

import hashlib
import sys

import numpy as np
import pytest

from arrays import LAYOUTS, random_array
from biascorr import get_num_threads, set_num_threads
from biascorr.channel_scale import channel_ranges, scaled_channels
from comparisons import COMPARISONS

RANGES, SCALED = COMPARISONS["channel_ranges"], COMPARISONS["scaled_channels"]

CASES = [
    ("OIHW", (4, 6, 3, 3), 1),
    ("OIHW", (6, 5, 3, 3), 3),
    ("OIHW", (33, 1, 3, 3), 33),
    ("OIHW", (40, 70, 1, 1), 1),
    ("OIHW", (5, 8, 7, 7), 1),
    ("OIDHW", (4, 5, 3, 2, 3), 2),
    ("OIW", (8, 6, 5), 1),
    ("IOHW", (6, 4, 3, 3), 2),
    ("IOHW", (12, 1, 2, 2), 12),
    ("HWIO", (3, 3, 9, 17), 1),
    ("HWIO", (3, 3, 2, 48), 4),
    ("HWIGO", (3, 2, 4, 3, 5), 1),
    ("HWIGO", (2, 2, 4, 3, 40), 1),
    ("HWCM", (3, 3, 33, 2), 1),
    ("HWCM", (3, 3, 64, 1), 1),
    ("IO", (50, 7), 1),
    ("IO", (3, 1000), 1),
    ("OI", (31, 33), 1),
    ("OI", (64, 1), 1),
    ("O", (9,), 1),
    ("IO", (1, 1), 1),
]
"""Layouts, shapes and groups: runs shorter and longer than a vector, with and without groups, one channel on either side."""

CUT = [
    ("OIHW", (5, 4096, 3, 3), 1),
    ("OIHW", (64, 300, 3, 3), 4),
    ("HWIO", (3, 3, 200, 300), 1),
    ("HWIO", (3, 3, 4000, 5), 1),
    ("IO", (3, 40_000), 1),
    ("IO", (40_000, 3), 1),
    ("OI", (40_000, 17), 1),
    ("OI", (1, 300_001), 1),
    ("IO", (999, 1001), 1),
]
"""Weights that are cut into blocks or parts."""


def channels_of(layout, shape, groups):
    """Channels of all groups on the sides O and I, counted in words of the layout."""
    size = {"G": 1, "I": 1, **dict(zip(layout.translate(str.maketrans("CM", "GO")), shape))}
    outputs, inputs = size["G"] * size["O"], size["G"] * size["I"]
    return (outputs * groups, inputs) if layout[0] == "I" else (outputs, inputs * groups)


def factors_of(layout, shape, groups):
    rng = np.random.default_rng(1)
    return [rng.uniform(0.1, 3.0, count) for count in channels_of(layout, shape, groups)]


def check(weights, layout, groups):
    outputs, inputs = factors_of(layout, weights.shape, groups)
    for axis, others in (("O", inputs), ("I", outputs)):
        for factors in (None, others):
            found = RANGES.fast(weights, layout, axis, groups, factors)
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, RANGES.twin(weights, layout, axis, groups, factors), f"{axis} {factors}")
    for pair in ((outputs, inputs), (outputs, None), (None, inputs), (None, None)):
        found = SCALED.fast(weights, layout, groups, *pair)
        expected = SCALED.twin(weights, layout, groups, *pair)
        assert found.dtype == expected.dtype == weights.dtype.newbyteorder("=")
        assert found.flags.c_contiguous
        assert found.flags.owndata
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("layout", "shape", "groups"), CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_kernel_equals_twin(layout, shape, groups, dtype):
    check(random_array(shape, dtype), layout, groups)


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize(("layout", "shape", "groups"), CASES[::2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_any_memory_order(layout, shape, groups, dtype, memory):
    check(LAYOUTS[memory](random_array(shape, dtype)), layout, groups)


@pytest.mark.parametrize(("layout", "shape", "groups"), CUT)
@pytest.mark.parametrize("memory", ["contiguous", "fortran", "strided", "reversed"])
def test_large_weights(layout, shape, groups, memory):
    check(LAYOUTS[memory](random_array(shape, "float32")), layout, groups)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 257, 16_384, 16_385, 131_073])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sizes(size, dtype):
    for layout in ("OI", "IO"):
        for shape in ((size, 2), (2, size)):
            check(random_array(shape, dtype), layout, 1)


def test_golden_values():
    weights = np.array([[[1.0, -2.0], [0.5, 3.0]], [[-4.0, 0.0], [0.25, -0.125]]])
    assert channel_ranges(weights, "OIW", axis="O").tolist() == [3.0, 4.0]
    assert channel_ranges(weights, "OIW", axis="I").tolist() == [4.0, 3.0]
    assert channel_ranges(weights, "OIW", axis="O", factors=[1.0, 10.0]).tolist() == [30.0, 4.0]
    assert channel_ranges(weights, "OIW", axis="I", factors=[1.0, 0.5]).tolist() == [2.0, 3.0]
    # Two groups of one output channel and two input channels: inputs 0, 1 belong to output 0, inputs 2, 3 to output 1.
    assert channel_ranges(weights, "OIW", axis="I", groups=2).tolist() == [2.0, 3.0, 4.0, 0.25]
    assert channel_ranges(weights, "OIW", axis="O", groups=2, factors=[2.0, 1.0, 1.0, 32.0]).tolist() == [4.0, 8.0]
    assert channel_ranges(weights, "OIW", axis="I", groups=2, factors=[1.0, 8.0]).tolist() == [2.0, 3.0, 32.0, 2.0]
    found = scaled_channels(weights, "OIW", groups=2, output_factors=[1.0, 2.0], input_factors=[1.0, 4.0, 0.5, 8.0])
    assert found.tolist() == [[[1.0, -2.0], [2.0, 12.0]], [[-4.0, 0.0], [4.0, -2.0]]]


def test_golden_values_of_transposed_and_depthwise_layouts():
    weights = np.array([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.5]], np.float32)
    assert channel_ranges(weights, "IO", axis="O").tolist() == [4.0, 5.0, 3.0]
    # I counts both groups: outputs 0, 1, 2 belong to input 0, outputs 3, 4, 5 to input 1.
    assert channel_ranges(weights, "IO", axis="O", groups=2).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 0.5]
    assert channel_ranges(weights, "IO", axis="I", groups=2, factors=[1.0, 1.0, 2.0, 1.0, 0.1, 1.0]).tolist() == [6.0, 4.0]
    assert channel_ranges(weights, "CM", axis="O").tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 0.5]
    assert channel_ranges(weights, "CM", axis="I").tolist() == [3.0, 5.0]
    found = scaled_channels(weights, "CM", output_factors=[1.0, 1.0, 2.0, 1.0, 1.0, 4.0], input_factors=[1.0, 0.5])
    assert found.tolist() == [[1.0, -2.0, 6.0], [-2.0, 2.5, 1.0]]


def test_scaled_weights_have_the_ranges_that_factors_give():
    weights = random_array((24, 5, 3, 3), "float64")
    outputs, _ = factors_of("OIHW", weights.shape, 1)
    scaled = scaled_channels(weights, "OIHW", output_factors=outputs)
    np.testing.assert_array_equal(
        channel_ranges(weights, "OIHW", axis="I", factors=outputs), channel_ranges(scaled, "OIHW", axis="I")
    )
    np.testing.assert_allclose(channel_ranges(scaled, "OIHW", axis="O"), outputs * channel_ranges(weights, "OIHW", axis="O"))


def test_the_output_factor_comes_first_and_all_is_rounded_once():
    weights = np.array([[np.float32(1.1)]])
    found = scaled_channels(weights, "OI", output_factors=[1 / 3], input_factors=[3.3])
    assert found[0, 0] == np.float32(np.float64(weights[0, 0]) * (1 / 3) * 3.3)
    large = np.array([[3e38]], np.float32)  # times 100 it is no float32 until it is divided again
    assert scaled_channels(large, "OI", output_factors=[100.0], input_factors=[0.01])[0, 0] == pytest.approx(3e38)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("layout", "shape", "groups"), CASES)
def test_nan_and_infinities(layout, shape, groups, dtype):
    for seed in range(3):
        weights = random_array(shape, dtype)
        rng = np.random.default_rng(seed)
        for wrong in (np.nan, -np.nan, np.inf, -np.inf):
            weights.ravel()[rng.integers(weights.size)] = wrong
        check(weights, layout, groups)


def test_nan_wins_over_infinity_wherever_they_are():
    for size in (2, 9, 40):
        for at in range(size):
            weights = np.full((size, 1), np.inf, np.float32)
            weights[at] = -np.nan
            for factors in (None, [2.0]):
                assert np.isnan(channel_ranges(weights, "IO", axis="O"))
                assert np.isnan(channel_ranges(weights, "IO", axis="I", factors=factors)).tolist() == [
                    k == at for k in range(size)
                ]


def test_numbers_at_the_ends_of_the_types():
    for dtype in ("float32", "float64"):
        info = np.finfo(dtype)
        weights = np.array([[info.smallest_subnormal, -info.max, 0.0], [-info.smallest_subnormal, -0.0, info.tiny]], dtype)
        check(weights, "OI", 1)
        assert np.signbit(scaled_channels(weights, "OI")[1, 1])


def test_broadcast_weights():
    for shape in ((6, 40), (40, 6)):
        for given in (random_array((1, shape[1]), "float32"), random_array((shape[0], 1), "float32")):
            check(np.broadcast_to(given, shape), "OI", 1)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 0, 3, 3), (4, 3, 0, 3)])
def test_no_weights_at_all(shape):
    check(np.zeros(shape, np.float32), "OIHW", 1)
    assert channel_ranges(np.zeros(shape), "OIHW", axis="O").tolist() == [0.0] * shape[0]


def test_nothing_is_modified():
    weights, factors = random_array((30, 40), "float32"), np.linspace(1.0, 2.0, 40)
    before = hashlib.sha256(weights.tobytes() + factors.tobytes()).digest()
    channel_ranges(weights, "OI", axis="O", factors=factors)
    assert scaled_channels(weights, "OI") is not weights
    scaled_channels(weights, "OI", input_factors=factors)[...] = 0
    assert hashlib.sha256(weights.tobytes() + factors.tobytes()).digest() == before


def test_lists_and_other_kinds_of_factors():
    weights = random_array((3, 2), "float64")
    expected = scaled_channels(weights, "OI", output_factors=[1.0, 2.0, 3.0])
    for factors in ((1, 2, 3), np.array([1, 2, 3], np.int8), np.array([3.0, 0, 2.0, 0, 1.0])[::-2], np.array([1, 2, 3], ">f4")):
        np.testing.assert_array_equal(scaled_channels(weights.tolist(), "OI", output_factors=factors), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"axis": "H"}, ValueError, "axis: 'H', expected 'O' or 'I'"),
        ({"axis": 0}, ValueError, "axis: 0, expected 'O' or 'I'"),
        ({"layout": "OIX"}, ValueError, 'layout: "OIX" is not understood'),
        ({"layout": "OI"}, ValueError, 'weights: 3 axes, the layout "OI" names 2'),
        ({"layout": 3}, TypeError, "layout" if sys.version_info >= (3, 11) else "int"),  # what PyO3 says
        ({"groups": 4}, ValueError, r"groups: 4 does not fit weights of shape \[6, 4, 3\]"),
        ({"groups": 0}, ValueError, "groups: 0, expected at least 1"),
        ({"groups": 2.0}, TypeError, "groups: float, expected an integer"),
        ({"groups": True}, TypeError, "groups: bool, expected an integer"),
        ({"weights": np.ones((6, 4, 3), np.int8)}, TypeError, "weights: dtype int8, expected floating point"),
        ({"weights": np.ones((6, 4, 3), complex)}, TypeError, "weights: dtype complex128"),
        ({"weights": np.ma.ones((6, 4, 3))}, TypeError, "weights: a masked array"),
        ({"factors": np.ones(6)}, ValueError, "factors: 6 values, expected 4, one for each channel"),
        ({"factors": np.ones((4, 1))}, ValueError, "factors: 2 axes, expected one"),
        ({"factors": 2.0}, ValueError, "factors: 0 axes, expected one"),
        ({"factors": ["a"] * 4}, TypeError, "factors: dtype"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    arguments = {"weights": np.ones((6, 4, 3)), "layout": "OIW", "axis": "O", **arguments}
    with pytest.raises(error, match=message):
        channel_ranges(**arguments)
    del arguments["axis"]
    if "factors" in arguments:
        arguments["input_factors"] = arguments.pop("factors")
        message = f"input_{message}"
    if not message.startswith("axis"):
        with pytest.raises(error, match=message):
            scaled_channels(**arguments)
    if "input_factors" in arguments:
        weights = np.swapaxes(arguments.pop("weights"), 0, 1)
        with pytest.raises(error, match=message.replace("input", "output")):
            scaled_channels(weights, "OIW", output_factors=arguments["input_factors"])


@pytest.mark.parametrize(("factor", "found"), [(-1.5, "-1.5"), (np.nan, "nan"), (np.inf, "inf")])
def test_ranges_are_of_factors_of_at_least_0_and_scaled_weights_of_any(factor, found):
    weights, factors = np.ones((2, 4)), [1.0, 2.0, factor, 1.0]
    with pytest.raises(ValueError, match=rf"factors\[2\]: {found}, expected a finite number of at least 0"):
        channel_ranges(weights, "OI", axis="O", factors=factors)
    np.testing.assert_array_equal(scaled_channels(weights, "OI", input_factors=factors), weights * factors)


@pytest.mark.parametrize("layout", ["OI", "IO"])
def test_a_factor_of_0_hides_a_channel_of_any_finite_weights(layout):
    weights = np.array([[1e300, -3.0, 2.0], [0.5, 0.0, -4.0]])
    given = weights if layout == "OI" else weights.T
    np.testing.assert_array_equal(channel_ranges(given, layout, axis="O", factors=[0.0, 1.0, 0.5]), [3.0, 2.0])
    np.testing.assert_array_equal(channel_ranges(given, layout, axis="I", factors=[0.0, 0.0]), [0.0, 0.0, 0.0])


def test_the_number_of_threads_changes_nothing():
    before = get_num_threads()
    try:
        for layout, shape, groups in CUT:
            weights = random_array(shape, "float32")
            outputs, inputs = factors_of(layout, shape, groups)
            found = set()
            for threads in (1, 2, 3):
                set_num_threads(threads)
                digest = hashlib.sha256(scaled_channels(weights, layout, output_factors=outputs, groups=groups))
                digest.update(channel_ranges(weights, layout, axis="O", groups=groups, factors=inputs))
                digest.update(channel_ranges(weights, layout, axis="I", groups=groups, factors=outputs))
                found.add(digest.digest())
            assert len(found) == 1
    finally:
        set_num_threads(before)
