"""Correctors: golden values, every layout against the twin, and whatever is wrong with weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrays import LAYOUTS, random_array
from biascorr import (
    AnalyticalBiasCorrector,
    BiasCorrectionType,
    BiasCorrector,
    EmpiricalBiasCorrector,
    MeanBiasCorrector,
    NullBiasCorrector,
)
from biascorr.statistics import clipped_normal_mean
from comparisons import COMPARISONS

ERROR = COMPARISONS["weight_error"]


def test_golden_values_of_a_convolution():
    weights = np.linspace(0.0, 1.1, 12).reshape(1, 2, 3, 1, 2)
    quantized = np.array([0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 1, 1, 1]).reshape(weights.shape)
    found = MeanBiasCorrector([1, -2, 0.5]).calculate(weights, quantized)
    np.testing.assert_allclose(found, [0.05, 0.2], rtol=1e-6)


def test_golden_values_of_a_grouped_convolution():
    weights = (np.arange(8) * 0.1 - 0.35).reshape(2, 1, 1, 2, 2)
    quantized = np.array([-0.375, -0.25, -0.125, 0, 0, 0.125, 0.25, 0.375]).reshape(weights.shape)
    corrector = MeanBiasCorrector([2, -1])
    np.testing.assert_allclose(corrector.calculate(weights, quantized), [0.15, 0.05, 0.025, 0.075], rtol=1e-6)


# layout, shape, groups, input channels of all groups
CASES = [
    ("IO", (64, 10), 1, 64),
    ("OI", (10, 64), 1, 64),
    ("OI", (6, 0), 1, 0),
    ("IO", (3, 0), 1, 3),
    ("WIO", (3, 4, 6), 1, 4),
    ("WIO", (3, 4, 6), 2, 8),
    ("HWIO", (3, 3, 16, 16), 1, 16),
    ("HWIO", (3, 5, 1, 12), 6, 6),
    ("HWIO", (1, 1, 5, 7), 1, 5),
    ("DHWIO", (2, 3, 3, 4, 5), 1, 4),
    ("HWIGO", (3, 2, 4, 5, 6), 1, 20),
    ("HWIGO", (3, 3, 1, 65, 1), 1, 65),
    ("HWIGO", (3, 3, 1, 17, 2), 1, 17),
    ("DHWIGO", (2, 2, 2, 3, 4, 5), 1, 12),
    ("OIHW", (12, 5, 3, 3), 1, 5),
    ("OIHW", (12, 5, 3, 3), 4, 20),
    ("OIHW", (9, 1, 5, 5), 9, 9),
    ("OIW", (8, 3, 7), 2, 6),
    ("OIDHW", (4, 3, 2, 3, 2), 1, 3),
    ("IOHW", (12, 5, 3, 3), 1, 12),
    ("IOHW", (12, 5, 3, 3), 3, 12),
    ("HWOI", (3, 3, 5, 6), 1, 6),
    ("HWCM", (3, 3, 8, 2), 1, 8),
    ("IO", (33, 4099), 1, 33),
    ("IO", (700, 700), 1, 700),
    ("OI", (700, 701), 1, 701),
    ("OIHW", (130, 129, 3, 3), 1, 129),
    ("HWIO", (3, 3, 130, 129), 1, 130),
]


@pytest.mark.parametrize(("layout", "shape", "groups", "channels"), CASES)
def test_kernel_equals_twin(layout, shape, groups, channels):
    taps = tuple(size for size, letter in zip(shape, layout) if letter in "DHW")
    for dtype in ("float32", "float64"):
        weights, quantized = random_array(shape, dtype, 1), random_array(shape, dtype, 2)
        for mean_shape in {(channels,), (*taps, channels)}:
            mean = random_array(mean_shape, "float64", 3)
            expected = ERROR.twin(weights, quantized, mean, groups, layout)
            found = MeanBiasCorrector(mean, groups=groups, layout=layout).calculate(weights, quantized)
            assert found.dtype == dtype
            assert found.shape == expected.shape
            scale = np.abs(weights - quantized).sum() / max(len(expected), 1)
            tolerance = ERROR.rtol if dtype == "float64" else 1e-7
            np.testing.assert_allclose(found, expected, rtol=1e-7 if dtype == "float32" else 1e-12, atol=tolerance * scale)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["contiguous", "fortran", "strided", "reversed"])
def test_any_memory_layout_of_either_tensor(first, second):
    for layout, shape in [("HWIO", (3, 3, 20, 18)), ("OIHW", (18, 20, 3, 3)), ("IO", (40, 50))]:
        weights, quantized = random_array(shape, "float32", 1), random_array(shape, "float32", 2)
        mean = random_array((shape[layout.index("I")],), "float64", 3)
        before = weights.copy()
        found = ERROR.fast(LAYOUTS[first](weights), LAYOUTS[second](quantized), mean, 1, layout)
        np.testing.assert_allclose(found, ERROR.twin(weights, quantized, mean, 1, layout), rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(weights, before)


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
def test_default_layout_follows_the_rank(rank):
    layout = {2: "IO", 3: "WIO", 4: "HWIO", 5: "HWIGO", 6: "DHWIGO"}[rank]
    shape = tuple(range(2, 2 + rank))
    weights, quantized = random_array(shape, "float64", 1), random_array(shape, "float64", 2)
    channels = int(np.prod([size for size, letter in zip(shape, layout) if letter in "IG"]))
    mean = random_array((channels,), "float64")
    named = MeanBiasCorrector(mean, layout=layout).calculate(weights, quantized)
    np.testing.assert_array_equal(MeanBiasCorrector(mean).calculate(weights, quantized), named)


@pytest.mark.parametrize(
    ("weights_dtype", "quantized_dtype", "found_dtype"),
    [
        ("float32", "float32", "float32"),
        ("float32", "float64", "float32"),
        ("float64", "float32", "float64"),
        ("float16", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("int8", "int8", "float32"),
    ],
)
def test_dtypes_of_weights(weights_dtype, quantized_dtype, found_dtype):
    weights, quantized = random_array((6, 4), weights_dtype, 1), random_array((6, 4), quantized_dtype, 2)
    mean = random_array((6,), "float32", 3)
    found = MeanBiasCorrector(mean).calculate(weights, quantized)
    assert found.dtype == found_dtype
    expected = mean.astype(np.float64) @ (weights.astype(np.float64) - quantized.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_the_mean_is_copied():
    mean = np.ones(2)
    corrector = MeanBiasCorrector(mean)
    mean[:] = 100
    np.testing.assert_array_equal(corrector.calculate(np.ones((2, 1)), np.zeros((2, 1))), [2.0])


def test_no_error_gives_zeros_not_none():
    weights = random_array((3, 4), "float32")
    np.testing.assert_array_equal(MeanBiasCorrector(np.ones(3)).calculate(weights, weights), np.zeros(4, np.float32))


def test_lists_are_weights():
    assert MeanBiasCorrector([1.0, 2.0]).calculate([[1.0], [1.0]], [[0.5], [0.0]]).tolist() == [2.5]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel(value):
    weights, quantized = np.ones((5, 3)), np.zeros((5, 3))
    weights[2, 1] = value
    np.testing.assert_array_equal(MeanBiasCorrector(np.ones(5)).calculate(weights, quantized), [5, value, 5])


@pytest.mark.parametrize(
    ("weights", "quantized", "options", "message"),
    [
        ((3, 4), (4, 3), {}, r"fake_quantized_weights: shape \[4, 3\], expected \[3, 4\] as weights"),
        ((3, 4), (1, 4), {}, "fake_quantized_weights: shape"),
        ((4, 3), (4, 3), {}, r"input_mean: shape \[3\], expected \[4\] or \[4\]"),
        ((3, 3, 4, 5), (3, 3, 4, 5), {}, r"input_mean: shape \[3\], expected \[4\] or \[3, 3, 4\]"),
        ((3,), (3,), {}, "weights: 1 axes, expected 2 to 6, or a layout"),
        ((3, 4), (3, 4), {"layout": "HIO"}, 'weights: 2 axes, the layout "HIO" names 3'),
        ((3, 4), (3, 4), {"layout": "IX"}, 'layout: "IX" is not understood'),
        ((3, 4), (3, 4), {"layout": "IH"}, 'layout: "IH" is not understood'),
        ((3, 4), (3, 4), {"layout": "ii"}, 'layout: "ii" is not understood'),
        ((1, 1, 3, 4), (1, 1, 3, 4), {"groups": 3}, r"groups: 3 does not fit weights of shape \[1, 1, 3, 4\]"),
        ((1, 1, 1, 3, 1), (1, 1, 1, 3, 1), {"groups": 3}, "groups: 3 does not fit"),
    ],
)
def test_weights_that_do_not_fit(weights, quantized, options, message):
    with pytest.raises(ValueError, match=message):
        MeanBiasCorrector(np.ones(3), **options).calculate(np.ones(weights), np.ones(quantized))


def test_means_that_are_none():
    with pytest.raises(TypeError, match="input_mean: dtype complex128"):
        MeanBiasCorrector(np.ones(3, complex))
    with pytest.raises(ValueError, match="input_mean: 0-dimensional"):
        MeanBiasCorrector(1.0)
    with pytest.raises(ValueError, match="groups: 0, expected at least 1"):
        MeanBiasCorrector([1.0], groups=0)


@pytest.mark.parametrize("which", ["weights", "fake_quantized_weights"])
def test_weights_that_are_not_real(which):
    arrays = {"weights": np.ones((3, 4)), "fake_quantized_weights": np.ones((3, 4)), which: np.ones((3, 4), complex)}
    with pytest.raises(TypeError, match=f"{which}: dtype complex128"):
        MeanBiasCorrector(np.ones(3)).calculate(**arrays)


@pytest.mark.parametrize("groups", [2.0, True, "2", None])
def test_groups_that_are_no_integer(groups):
    with pytest.raises(TypeError, match="groups: .*, expected an integer"):
        MeanBiasCorrector([1.0], groups=groups)


def test_groups_and_layouts_that_cannot_be():
    with pytest.raises(ValueError, match="groups: "):
        MeanBiasCorrector([1.0], groups=2**70)
    with pytest.raises(ValueError, match="groups: 1048576 does not fit"):
        MeanBiasCorrector(np.ones(0), groups=2**20, layout="IO").calculate(np.zeros((0, 4)), np.zeros((0, 4)))
    with pytest.raises(TypeError, match="layout: int, expected a string"):
        MeanBiasCorrector([1.0], layout=5)
    with pytest.raises(ValueError, match='layout: "" is not understood'):
        MeanBiasCorrector(np.ones(3), layout="").calculate(np.ones((3, 4)), np.ones((3, 4)))


def test_masked_and_ragged_statistics_are_refused():
    masked = np.ma.masked_array([1.0, 2.0], [True, False])
    with pytest.raises(TypeError, match="input_mean: a masked array"):
        MeanBiasCorrector(masked)
    with pytest.raises(TypeError, match="quantized_mean: a masked array"):
        EmpiricalBiasCorrector([1.0, 2.0], masked)
    with pytest.raises(TypeError, match="beta: a masked array"):
        AnalyticalBiasCorrector(masked, [1.0, 1.0])
    with pytest.raises(ValueError, match="weights: not an array"):
        MeanBiasCorrector([1.0]).calculate([[1.0], [2.0, 3.0]], [[1.0]])


def test_a_clipped_normal_mean_at_the_edges():
    beta, gamma = [np.inf, -np.inf, 1.0, 0.0, np.nan], [1.0, 1.0, np.nan, np.inf, 1.0]
    np.testing.assert_array_equal(clipped_normal_mean(beta[:2], gamma[:2], 0.0, 6.0), [6.0, 0.0])
    np.testing.assert_array_equal(clipped_normal_mean(beta[:2], gamma[:2], 0.0), [np.inf, 0.0])
    assert np.isnan(clipped_normal_mean([beta[2], beta[4]], [gamma[2], gamma[4]], 0.0, 6.0)).all()
    np.testing.assert_array_equal(clipped_normal_mean([0.3], [2.0], 1.5, 1.5), [1.5])
    with pytest.raises(ValueError, match="low, high: nan, 1.0"):
        clipped_normal_mean([0.0], [1.0], np.nan, 1.0)
    for activation in ((0.0,), [0.0, 1.0, 2.0], 3):
        with pytest.raises(ValueError, match="activation: "):
            AnalyticalBiasCorrector([0.0], [1.0], activation)


def test_null_corrector_leaves_the_bias_alone():
    assert NullBiasCorrector().calculate(np.ones((2, 2)), np.zeros((2, 2))) is None


def test_empirical_corrector_is_a_difference():
    corrector = EmpiricalBiasCorrector(np.float32([1, 2]), np.float32([0.5, 4]))
    found = corrector.calculate(None, None)
    assert found.tolist() == [0.5, -2.0]
    assert found.dtype == np.float32
    found[0] = 7
    assert corrector.calculate(None, None)[0] == 0.5
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        EmpiricalBiasCorrector([1, 2], [1, 2, 3])


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BiasCorrector()


def test_correction_types():
    assert [each.name for each in BiasCorrectionType] == ["NONE", "REGULAR", "ITERATIVE"]


@pytest.mark.parametrize(
    ("beta", "gamma", "relu", "relu6"),
    [
        (0, 1, 0.398942280, 0.398942280),
        (1, 1, 1.083315471, 1.083315417),
        (3, 2, 3.058613588, 3.0),
        (7, 1, 7.0, 5.916684529),
        (7, -1, 7.0, 5.916684529),
        (-2, 0, 0.0, 0.0),
        (8, 0, 8.0, 6.0),
    ],
)
def test_golden_values_of_a_clipped_normal_distribution(beta, gamma, relu, relu6):
    assert clipped_normal_mean([beta], [gamma])[0] == pytest.approx(beta)
    assert clipped_normal_mean([beta], [gamma], 0.0)[0] == pytest.approx(relu, rel=1e-8)
    assert clipped_normal_mean([beta], [gamma], 0.0, 6.0)[0] == pytest.approx(relu6, rel=1e-8)


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(-3, 3), st.floats(-4, 1), st.floats(0, 5))
def test_a_clipped_normal_mean_equals_its_integral(beta, gamma, low, width):
    t = np.linspace(-12, 12, 200_001)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    expected = np.trapezoid(np.clip(beta + abs(gamma) * t, low, low + width) * density, t)
    assert clipped_normal_mean([beta], [gamma], low, low + width)[0] == pytest.approx(expected, abs=1e-6)


def test_a_clipped_normal_mean_has_bounds_per_channel():
    beta, gamma = np.float64([0.5, -1, 2, 3, 0]), np.float64([1, 2, -0.5, 0, 3])
    low, high = np.float64([0, -1.5, -np.inf, 4, -np.inf]), np.float64([np.inf, 0.25, 2, 4, np.inf])
    expected = [clipped_normal_mean(*([each] for each in one[:2]), *one[2:])[0] for one in zip(beta, gamma, low, high)]
    np.testing.assert_array_equal(clipped_normal_mean(beta, gamma, tuple(low), tuple(high)), expected)
    mixed = clipped_normal_mean(beta, gamma, 0.0, high)
    np.testing.assert_array_equal(mixed, clipped_normal_mean(beta, gamma, np.zeros(5), high))


def test_analytical_corrector_is_a_mean_corrector():
    weights, quantized = random_array((4, 3), "float64", 1), random_array((4, 3), "float64", 2)
    beta, gamma = random_array((4,), "float64", 3), random_array((4,), "float64", 4)
    for activation, bounds in [(None, ()), ("relu", (0.0,)), ("relu6", (0.0, 6.0)), ((-1.0, 2.0), (-1.0, 2.0))]:
        mean = clipped_normal_mean(beta, gamma, *bounds)
        expected = MeanBiasCorrector(mean).calculate(weights, quantized)
        found = AnalyticalBiasCorrector(beta, gamma, activation).calculate(weights, quantized)
        np.testing.assert_array_equal(found, expected)


def test_statistics_that_do_not_fit():
    with pytest.raises(ValueError, match="activation: 'gelu'"):
        AnalyticalBiasCorrector([0.0], [1.0], "gelu")
    with pytest.raises(ValueError, match=r"beta, gamma: shapes \(1,\) and \(2,\)"):
        AnalyticalBiasCorrector([0.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="low, high: 2.0, 1.0"):
        clipped_normal_mean([0.0], [1.0], 2.0, 1.0)
    with pytest.raises(ValueError, match=r"low, high: \[0. 2.\], 1.0, expected low <= high"):
        clipped_normal_mean([0.0, 0.0], [1.0, 1.0], [0.0, 2.0], 1.0)
    with pytest.raises(ValueError, match=r"low, high: shapes \(\) and \(3,\), expected \(\) or \(2,\) as of beta"):
        clipped_normal_mean([0.0, 0.0], [1.0, 1.0], 0.0, [1.0, 2.0, 3.0])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(-4, 4), st.integers(0, 99))
def test_the_shift_is_linear_in_the_weights(inputs, outputs, factor, seed):
    weights, quantized, other = (random_array((inputs, outputs), "float64", seed + k) for k in range(3))
    corrector = MeanBiasCorrector(random_array((inputs,), "float64", seed + 3))
    zero = np.zeros_like(weights)
    combined = corrector.calculate(weights + factor * other, quantized)
    parts = corrector.calculate(weights, quantized) + factor * corrector.calculate(other, zero)
    np.testing.assert_allclose(combined, parts, rtol=1e-10, atol=1e-10)
