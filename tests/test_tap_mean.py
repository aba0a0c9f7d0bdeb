"""Means per kernel tap: against the twin, and exact under padding, stride and dilation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrays import LAYOUTS, random_array
from biascorr import MeanBiasCorrector, Quantization
from biascorr.statistics import TapMean
from biascorr.windows import TransposedWindow, Window
from comparisons import COMPARISONS

TAPS = COMPARISONS["tap_sums"]


def window_of(taps, strides=None, dilations=None, pads=None, auto_pad="NOTSET"):
    ones = (1,) * len(taps)
    return Window(taps, strides or ones, dilations or ones, pads or ((0, 0),) * len(taps), auto_pad)


CASES = {
    "1x1": ((1, 1), window_of((1, 1))),
    "pointwise strided": ((7, 9), window_of((1, 1), (2, 3))),
    "3x3 same": ((7, 9), window_of((3, 3), pads=((1, 1), (1, 1)))),
    "3x3 strided": ((8, 9), window_of((3, 3), (2, 2), pads=((0, 1), (1, 1)))),
    "5x3 dilated": ((11, 13), window_of((5, 3), (1, 2), (2, 3), ((4, 4), (3, 2)))),
    "kernel as large as the input": ((4, 4), window_of((4, 4))),
    "padding beyond the kernel": ((3, 3), window_of((2, 2), pads=((3, 4), (5, 2)))),
    "cropping": ((6, 6), window_of((3, 3), pads=((-1, 0), (-2, -1)))),
    "stride beyond the kernel": ((9, 9), window_of((2, 2), (4, 5))),
    "no output": ((2, 2), window_of((3, 3))),
    "same upper": ((6, 7), window_of((4, 3), (2, 2), auto_pad="SAME_UPPER")),
    "same lower": ((6, 7), window_of((4, 3), (2, 2), auto_pad="SAME_LOWER")),
    "1-D": ((17,), window_of((5,), (2,), (2,), ((3, 1),))),
    "3-D": ((4, 5, 6), window_of((3, 2, 3), (1, 2, 1), (1, 1, 2), ((1, 1), (0, 1), (2, 2)))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_twin(case, layout):
    space, window = CASES[case]
    for dtype in ("int8", "uint16", "int64", "float32", "float64", "bfloat16"):
        for channels in (1, 5, 70):
            values = random_array((2, channels, *space), dtype)
            windows = window.along(space)
            expected = TAPS.twin(values, windows)
            found = TAPS.fast(LAYOUTS[layout](values), windows)
            if expected.dtype == object:
                assert found.tolist() == expected.tolist()
            else:
                np.testing.assert_allclose(found, expected, rtol=0, atol=TAPS.rtol * np.abs(values.astype(float)).sum())


def test_channels_may_be_last():
    values = random_array((2, 7, 9, 5), "int8")
    windows = CASES["3x3 same"][1].along((7, 9))
    expected = TAPS.twin(values, windows, -1)
    np.testing.assert_array_equal(TAPS.fast(values, windows, -1), expected)
    np.testing.assert_array_equal(TAPS.fast(np.moveaxis(values, -1, 1), windows, 1), expected)


def test_a_large_sample_is_cut_into_tasks():
    values = random_array((3, 200, 40, 40), "int8")
    windows = CASES["3x3 strided"][1].along((40, 40))
    np.testing.assert_array_equal(TAPS.fast(values, windows), TAPS.twin(values, windows))


def convolve(x, weights, window):
    """Direct convolution of (N, C, H, W) by (O, C, KH, KW), from the definition."""
    (_, sh, dh, ph, oh), (_, sw, dw, pw, ow) = window.along(x.shape[2:])
    y = np.zeros((len(x), len(weights), oh, ow))
    for o_h, o_w, k_h, k_w in np.ndindex(oh, ow, *weights.shape[2:]):
        h, w = o_h * sh + k_h * dh - ph, o_w * sw + k_w * dw - pw
        if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]:
            y[:, :, o_h, o_w] += x[:, :, h, w] @ weights[:, :, k_h, k_w].T
    return y


@pytest.mark.parametrize("case", [name for name, (space, _) in CASES.items() if len(space) == 2 and name != "no output"])
def test_the_shift_of_a_convolution_is_exact(case):
    space, window = CASES[case]
    x = [random_array((2, 3, *space), "float64", seed) + 1.0 for seed in range(2)]
    weights, quantized = (random_array((4, 3, *window.taps), "float64", seed) for seed in (5, 6))
    mean = TapMean(window)
    for batch in x:
        mean.update(batch)
    y, y_quantized = (np.concatenate([convolve(batch, w, window) for batch in x]) for w in (weights, quantized))
    shift = MeanBiasCorrector(mean.mean(), layout="OIHW").calculate(weights, quantized)
    np.testing.assert_allclose(shift, (y - y_quantized).mean(axis=(0, 2, 3)), rtol=1e-10, atol=1e-12)


def test_padding_of_quantized_samples_is_real_zero():
    window = CASES["3x3 same"][1]
    quantization = Quantization(scale=[4.0, 8.0], zero_point=[-3, 7])
    codes = random_array((2, 2, 7, 9), "int8")
    by_codes, by_values = TapMean(window), TapMean(window)
    by_codes.update(codes)
    by_values.update(np.moveaxis(quantization.dequantize(np.moveaxis(codes, 1, -1)), -1, 1).astype(np.float64))
    np.testing.assert_allclose(by_codes.mean(quantization), by_values.mean(), rtol=1e-6, atol=1e-6)


def test_samples_may_differ_in_size():
    window = CASES["3x3 strided"][1]
    mean = TapMean(window)
    sums, outputs = 0, 0
    for size in ((8, 9), (5, 30), (3, 3)):
        sample = random_array((1, 4, *size), "int16")
        mean.update(sample)
        windows = window.along(size)
        sums = sums + TAPS.twin(sample, windows)
        outputs += windows[0][-1] * windows[1][-1]
    np.testing.assert_allclose(mean.mean(), (sums / outputs).astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -3, -1, 3])
def test_any_axis_but_the_first_can_hold_the_channels(axis):
    window = CASES["3x3 same"][1]
    sample = random_array((2, 3, 7, 9), "int8")
    expected, mean = TapMean(window), TapMean(window, channel_axis=axis)
    expected.update(sample)
    mean.update(np.moveaxis(sample, 1, axis))
    np.testing.assert_array_equal(mean.mean(), expected.mean())


@pytest.mark.parametrize("axis", [0, -4, 4, -5])
def test_a_channel_axis_that_is_none(axis):
    with pytest.raises(ValueError, match="expected 4 axes with the channels along axis"):
        TapMean(CASES["3x3 same"][1], channel_axis=axis).update(np.ones((2, 3, 8, 9)))
    with pytest.raises(ValueError, match=f"none of which is channel axis {axis}"):
        TAPS.fast(np.ones((2, 3, 8, 9)), CASES["3x3 same"][1].along((8, 9)), axis)


def test_samples_of_another_rank_or_number_of_channels():
    mean = TapMean(CASES["3x3 same"][1])
    mean.update(np.ones((1, 4, 5, 5)))
    with pytest.raises(ValueError, match="sample: 1 channels, expected 4 as in those before"):
        mean.update(np.ones((1, 1, 5, 5)))
    for shape in ((4, 5, 5), (1, 4, 5, 5, 5)):
        with pytest.raises(ValueError, match="expected 4 axes"):
            mean.update(np.ones(shape))
    np.testing.assert_array_equal(mean.mean()[1, 1], 1.0)


def test_lists_are_samples():
    mean = TapMean(CASES["1x1"][1])
    mean.update([[[[1, 3]]]])
    assert mean.mean().item() == 2.0


def test_no_output_position_has_no_mean():
    mean = TapMean(CASES["no output"][1])
    mean.update(np.ones((1, 3, 2, 2), np.float32))
    with pytest.raises(ValueError, match="samples: none with an output position"):
        mean.mean()


@pytest.mark.parametrize("windows", [[], [(1, 1, 1, 0, 2)], [(1, 0, 1, 0, 2)] * 2, [(0, 1, 1, 0, 2)] * 2])
def test_windows_that_do_not_fit(windows):
    with pytest.raises(ValueError, match="windows: "):
        TAPS.fast(np.ones((1, 2, 3, 3), np.int8), windows)


@settings(deadline=None)
@given(
    size=st.integers(1, 30),
    taps=st.integers(1, 6),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 4),
    pads=st.tuples(st.integers(-2, 6), st.integers(-2, 6)),
)
def test_any_window_equals_the_twin(size, taps, stride, dilation, pads):
    windows = window_of((taps,), (stride,), (dilation,), (pads,)).along((size,))
    values = random_array((2, 3, size), "int8", size)
    assert TAPS.fast(values, windows).tolist() == TAPS.twin(values, windows).tolist()


def spread(x, window):
    """What each tap adds to all outputs of a transposed convolution of (N, C, W), from the definition."""
    ((_, outputs),) = window.along(x.shape[2:])
    reach = (x.shape[2] - 1) * window.strides[0] + (window.taps[0] - 1) * window.dilations[0] + 1
    y = np.zeros((window.taps[0], len(x), x.shape[1], reach + window.output_padding[0]), x.dtype)
    for tap in range(window.taps[0]):
        first = tap * window.dilations[0]
        y[tap, :, :, first : first + (x.shape[2] - 1) * window.strides[0] + 1 : window.strides[0]] = x
    return y[..., window.pads[0][0] :][..., :outputs]


@settings(deadline=None)
@given(
    size=st.integers(1, 12),
    taps=st.integers(1, 6),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 4),
    pads=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    output_padding=st.integers(0, 3),
    dtype=st.sampled_from(["int8", "uint8", "int64", "float64"]),
)
def test_tap_of_a_transposed_window_counts_where_it_falls_on_an_output(
    size, taps, stride, dilation, pads, output_padding, dtype
):
    window = TransposedWindow((taps,), (stride,), (dilation,), (pads,), (output_padding,))
    ((_, outputs),) = window.along((size,))
    assert outputs == max((size - 1) * stride + (taps - 1) * dilation + 1 + output_padding - sum(pads), 0)
    x = random_array((2, 3, size), dtype)
    mean = TapMean(window)
    mean.update(x)
    if outputs:
        expected = spread(x.astype(np.float64), window).mean(axis=(1, 3))
        np.testing.assert_allclose(mean.mean(), expected, rtol=1e-6, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("axis", [1, -1])
def test_transposed_windows_of_quantized_images(axis):
    window = TransposedWindow((3, 4), (2, 1), (1, 2), ((2, 3), (1, 0)), (1, 0))
    quantization = Quantization(scale=[4.0, 8.0], zero_point=[-3, 7])
    codes = random_array((2, 2, 7, 9), "int8")
    by_codes, by_values = TapMean(window, channel_axis=axis), TapMean(window)
    by_codes.update(np.moveaxis(codes, 1, axis))
    by_values.update(np.moveaxis(quantization.dequantize(np.moveaxis(codes, 1, -1)), -1, 1).astype(np.float64))
    assert by_codes.mean().shape == (3, 4, 2)
    np.testing.assert_allclose(by_codes.mean(quantization), by_values.mean(), rtol=1e-6, atol=1e-6)
