"""Layers that are to be corrected, and that are not: by name, pattern or operator."""

import numpy as np
import pytest

from biascorr import QuantParams, correct
from networks import constants_of, model_from_text, samples, weights

X = samples(24, 3)
PARAMS = QuantParams("tf", weight_bits=3)


def model():
    return model_from_text(
        """network (float[N,3] x) => (float[N,2] z) {
        [body_first] h = Gemm(x, w1, b1)  r = Relu(h)  [body_second] s = MatMul(r, w2)  [head] z = Gemm(s, w3, b3) }""",
        w1=weights(3, 4), w2=weights(4, 4), w3=weights(4, 2), b1=np.zeros(4, np.float32), b3=np.ones(2, np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "corrected"),
    [
        ({}, ["body_first", "body_second", "head"]),
        ({"exclude": ["head"]}, ["body_first", "body_second"]),
        ({"exclude": ["Gemm"]}, ["body_second"]),
        ({"only": ["body*"]}, ["body_first", "body_second"]),
        ({"only": ["body*"], "exclude": ["*_first"]}, ["body_second"]),
        ({"only": ["h?ad", "MatMul"]}, ["body_second", "head"]),
        ({"only": []}, []),
    ],
)
@pytest.mark.parametrize("method", ["auto", "empirical", "mean"])
@pytest.mark.filterwarnings("ignore:.* made the outputs worse")  # of samples that no layer lets through
def test_layers_are_named(method, options, corrected):
    correction = correct(model(), X, method=method, quant_params=PARAMS, **options)
    assert [layer.name for layer in correction.report] == ["body_first", "body_second", "head"]
    left = [layer.name for layer in correction.report if layer.reason == "left out by only or exclude"]
    assert left == [name for name in ["body_first", "body_second", "head"] if name not in corrected]
    if method != "auto":
        assert [layer.name for layer in correction.report if layer.method] == corrected
    if "body_first" not in corrected:
        assert (constants_of(correction.model)["b1"] == 0).all()


@pytest.mark.parametrize("argument", ["only", "exclude"])
def test_what_is_no_layer_is_an_error(argument):
    with pytest.raises(ValueError, match=f"^{argument}: 'tail' is neither name nor operator of a layer; the layers"):
        correct(model(), X, **{argument: ["tail"]})
    with pytest.raises(TypeError, match=f"^{argument}: 'head', expected a list of names, patterns of names or operators$"):
        correct(model(), X, **{argument: "head"})
    with pytest.raises(TypeError, match=f"^{argument}: 3, expected names, patterns of names or operators$"):
        correct(model(), X, **{argument: [3]})
