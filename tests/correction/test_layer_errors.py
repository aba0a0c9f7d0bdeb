"""The SQNR of each layer in the report."""

import numpy as np
import pytest

from biascorr import correct
from networks import fake_quantized, mean_corrected, model_from_text, run, samples, two_layers, weights, with_constants


def test_errors_of_layers_are_those_of_their_outputs():
    model, x = two_layers(), samples(3, 3, 6, 6)
    correction = mean_corrected(model, x)
    grids = {f"w{k}": fake_quantized(array, None) for k, array in ((1, weights(4, 3, 3, 3)), (2, weights(6, 4, 3, 3)))}
    expected, before, after = (
        run(each, {"x": x}, ["a", "c"])
        for each in (model, with_constants(model, **grids), with_constants(correction.model, **grids))
    )
    for layer, r, *others in zip(correction.report, expected, before, after):
        ratios = [10 * np.log10(np.square(r).sum() / np.square(q - r).sum()) for q in others]
        assert [layer.sqnr_before, layer.sqnr_after] == pytest.approx(ratios, abs=0.05)


def test_a_layer_that_overflows_has_no_ratio():
    """In float16, in the quantized network alone."""
    rng = np.random.default_rng(0)
    codes = rng.integers(100, 127, (7, 2)).astype(np.int8)
    codes[0] = 127
    text = "g (float16[N,7] x) => (float16[N,2] y) {{ {weights} [layer] t = MatMul(x, {name}) y = Clip(t, low, high) }}"
    limits = {"low": np.float16(0), "high": np.float16(100)}
    w = (codes.astype(np.float16) * 2 + rng.uniform(-0.9, -0.4, codes.shape)).astype(np.float16)
    model = model_from_text(text.format(weights="", name="w"), w=w, **limits)
    body = text.format(weights="W = DequantizeLinear(codes, step)", name="W")
    given = model_from_text(body, opset=19, codes=codes, step=np.float16(2), **limits)
    x = np.full((4, 7), 65504 / (2 * codes.sum(axis=0).max()) * 1.001, np.float16)
    outputs = [run(each, {"x": x}, ["t"])[0] for each in (model, given)]
    assert [np.isfinite(each).all() for each in outputs] == [True, False]
    (layer,) = correct(model, x, quantized=given, method="mean").report
    assert (layer.sqnr_before, layer.sqnr_after) == (None, None)
