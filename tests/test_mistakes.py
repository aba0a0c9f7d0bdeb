"""Mistakes that are easily made with the array interface: each is said, with what was meant; what is right stays silent."""

import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from biascorr import (
    AnalyticalBiasCorrector,
    ChannelMean,
    EmpiricalBiasCorrector,
    MeanBiasCorrector,
    NullBiasCorrector,
    Quantization,
    fake_quantize,
    prepare_input_mean,
)
from biascorr.statistics import TapMean
from biascorr.windows import Window

RNG = np.random.default_rng(0)
CODES = [RNG.integers(20, 100, (2, 4, 4, 8), dtype=np.int8) for _ in range(3)]


@pytest.mark.parametrize(
    ("given", "found"), [(0.02, "0.02"), (3, "3"), ("int8", "str"), (np.ones(8), "ndarray"), ([1], "list")]
)
@pytest.mark.parametrize("kind", [list, np.array, iter])
def test_what_is_no_quantization(given, found, kind):
    with pytest.raises(
        TypeError, match=rf"^quantization: {found}, expected Quantization\(scale, zero_point\), whose scale is in"
    ):
        prepare_input_mean(kind(CODES), given)


@pytest.mark.parametrize("samples", [CODES, tuple(CODES), CODES[0], "iterator"], ids=["list", "tuple", "array", "iterator"])
@pytest.mark.parametrize("scale", [0.02, np.full(8, 0.02)], ids=["one", "per channel"])
def test_a_step_in_place_of_a_scale(samples, scale):
    given = iter(CODES) if isinstance(samples, str) else samples
    with pytest.warns(
        UserWarning, match=r"^quantization: scale .*0\.02.*: all means are beyond 256, .* use Quantization\.from_st"
    ):
        found = prepare_input_mean(given, Quantization(scale, -10))
    codes = np.concatenate(CODES) if given is not CODES[0] else CODES[0]
    np.testing.assert_allclose(found, (codes.mean((0, 1, 2)) + 10) / 0.02, rtol=1e-6)  # a warning, no other result


def test_the_warning_is_for_the_caller():
    with pytest.warns(UserWarning, match="from_step") as caught:
        prepare_input_mean(CODES, SimpleNamespace(scale=0.02, zero_point=-10))
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("samples", "quantization"),
    [
        (CODES, None),
        (CODES, Quantization.from_step(0.02, -10)),
        (CODES, Quantization.from_step(50.0, -10)),
        (CODES, Quantization.from_range(0.0, 1e4)),
        (CODES, pickle.loads(pickle.dumps(Quantization.from_range(np.zeros(8), np.full(8, 1e4))))),
        (CODES, Quantization(0.5, 0)),  # reaches far, but no farther than the codes do
        ([np.where(np.arange(8) == 3, 1, codes) for codes in CODES], Quantization(0.02, 0)),  # a channel within
        ([np.zeros_like(CODES[0])], Quantization(0.02, 0)),
        ([codes.astype(np.float32) * 50 for codes in CODES], Quantization(0.02, 0)),
        (CODES, Quantization(0.02, 0, bits=16)),
    ],
)
def test_scales_that_may_be_meant(samples, quantization):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_input_mean(samples, quantization)
        prepare_input_mean(iter(samples), quantization)


def test_silent_channels_do_not_hide_a_step():
    samples = [np.where(np.arange(8) == 3, 0, codes) for codes in CODES]
    with pytest.warns(UserWarning, match="from_step"):
        prepare_input_mean([each.astype(np.int8) for each in samples], Quantization(0.02, 0))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
@pytest.mark.parametrize("make", [MeanBiasCorrector, lambda mean: AnalyticalBiasCorrector(mean, np.ones(4), "relu")])
def test_weights_that_were_not_dequantized(dtype, make):
    weights, corrector = RNG.normal(size=(4, 3)).astype(np.float32), make(np.ones(4))
    grid = Quantization(50)
    codes = grid.quantize(weights)
    with pytest.raises(
        TypeError, match=rf"^fake_quantized_weights: {dtype}, expected real units as the weights \(float32\): dequa"
    ):
        corrector.calculate(weights, codes.astype(dtype))
    found = corrector.calculate(weights, grid.dequantize(codes))  # the advice
    np.testing.assert_array_equal(found, corrector.calculate(weights, fake_quantize(weights, grid)))


def test_integers_beside_integers_are_taken():
    found = MeanBiasCorrector([1.0, 2.0]).calculate(np.int8([[1, 2], [3, 4]]), np.int8([[1, 1], [1, 1]]))
    np.testing.assert_array_equal(found, [4.0, 7.0])
    np.testing.assert_array_equal(MeanBiasCorrector([1.0]).calculate([[0.5]], [[0]]), [0.5])  # no array, but a number


def test_groups_of_a_depthwise_layer():
    weights, quantized = RNG.normal(size=(2, 3, 3, 5, 2)).astype(np.float32)
    mean = RNG.normal(size=5)
    expected = MeanBiasCorrector(mean, layout="HWCM").calculate(weights, quantized)
    corrector = MeanBiasCorrector(mean, layout="HWCM", groups=5)
    np.testing.assert_array_equal(corrector.calculate(weights, quantized), expected)
    grid = Quantization(20)
    np.testing.assert_array_equal(
        corrector.calculate_from_quantization(weights, grid),
        MeanBiasCorrector(mean, layout="HWCM").calculate_from_quantization(weights, grid),
    )
    analytical = AnalyticalBiasCorrector(mean, np.ones(5), layout="HWCM", groups=5)
    assert analytical.calculate(weights, quantized).shape == (10,)
    for groups in (2, 10):
        with pytest.raises(ValueError, match=f"groups: {groups} does not fit"):
            MeanBiasCorrector(mean, layout="HWCM", groups=groups).calculate(weights, quantized)


def test_reprs():
    means, taps = ChannelMean(), TapMean(Window((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0))))
    found = {
        "<ChannelMean along axis -1: nothing yet>": means,
        "NullBiasCorrector()": NullBiasCorrector(),
        "MeanBiasCorrector(<input_mean of shape (4,)>)": MeanBiasCorrector(np.ones(4)),
        "MeanBiasCorrector(<input_mean of shape (3, 3, 4)>, groups=2, layout='OIHW')": MeanBiasCorrector(
            np.ones((3, 3, 4)), groups=2, layout="OIHW"
        ),
        "AnalyticalBiasCorrector(<input_mean of shape (2,)>)": AnalyticalBiasCorrector([0, 1], [1, 1]),
        "EmpiricalBiasCorrector(<means of 2 channels>)": EmpiricalBiasCorrector([0, 1], [1, 1]),
        "Quantization(scale=50.0, zero_point=3, bits=8)": Quantization.from_step(0.02, 3),
    }
    for text, value in found.items():
        assert repr(value) == text
    assert repr(taps).startswith("<TapMean of Window(taps=(3, 3)")
    means.update(CODES[0])
    taps.update(CODES[0].transpose(0, 3, 1, 2))
    assert repr(means) == "<ChannelMean along axis -1: 8 channels, 1 sample, 32 positions>"
    assert repr(taps).endswith(": 8 channels, 8 output positions>")
