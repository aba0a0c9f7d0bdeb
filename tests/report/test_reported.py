"""What results say of themselves: text, JSON, rows."""

import json

import numpy as np
import onnx.parser
import pytest

from biascorr import QuantParams, correct, equalize

RELU_NETWORK = """
<ir_version: 8, opset_import: ["" : 17]> network (float[N,1] x) => (float[N,1] y)
<float[1,2] w1 = {8, 1}, float[2,1] w2 = {2, 4}> { [a] h = MatMul(x, w1)  r = Relu(h)  [b] y = MatMul(r, w2) }
"""


@pytest.fixture(scope="module")
def correction():
    samples = np.random.default_rng(0).normal(1.0, 1.0, (40, 1)).astype(np.float32)
    return correct(onnx.parser.parse_model(RELU_NETWORK), samples, quant_params=QuantParams(weight_bits=3), equalize=True)


@pytest.fixture(scope="module")
def equalization():
    return equalize(onnx.parser.parse_model(RELU_NETWORK), np.ones((4, 1), np.float32))


@pytest.fixture(params=["correction", "equalization"])
def result(request):
    return request.getfixturevalue(request.param)


def test_a_result_shows_itself_in_two_lines(result):
    assert len(repr(result).splitlines()) == 2
    assert repr(result).startswith(type(result).__name__)


def test_a_summary_is_plain_text_of_80_columns(result):
    lines = result.summary().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.summary()


def test_a_record_survives_json_unchanged(result):
    def forbidden(constant):
        raise AssertionError(constant)

    assert json.loads(result.to_json(), parse_constant=forbidden) == result.to_dict()
    assert len(result.to_json(indent=None).splitlines()) == 1
