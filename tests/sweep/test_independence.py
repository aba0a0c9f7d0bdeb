"""Batches whose first axis is not, or not everywhere, that of samples: biases do not depend on how samples are batched."""

import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.calibration.storage import Storage
from biascorr.sweep.independence import BatchingFinder
from networks import BITS, biases, constants_of, model_from_text, samples, weights

CONSTANTS = {"w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1, seed=1)}
GATES = {"W": weights(1, 12, 6) / 4, "R": weights(1, 12, 3) / 4, "v": weights(3, 4, axis=1)}

BODIES = {
    "first": ("float[N,T,6] x", "float[N,T,4] y", "[a] t = MatMul(x, w) r = Relu(t) [b] y = MatMul(r, v)", CONSTANTS),
    "time first": (
        "float[N,T,6] x",
        "float[T,N,4] y",
        "s = Transpose<perm=[1,0,2]>(x) [a] t = MatMul(s, w) r = Relu(t) [b] y = MatMul(r, v)",
        CONSTANTS,
    ),
    "rows of time": (
        "float[N,T,6] x",
        "float[M,4] y",
        "s = Transpose<perm=[1,0,2]>(x) q = Reshape(s, rows) [a] t = MatMul(q, w) r = Relu(t) [b] y = MatMul(r, v)",
        {**CONSTANTS, "rows": np.array([-1, 6])},
    ),
    "rows of samples": (
        "float[N,T,6] x",
        "float[M,4] y",
        "q = Reshape(x, rows) [a] t = MatMul(q, w) r = Relu(t) [b] y = MatMul(r, v)",
        {**CONSTANTS, "rows": np.array([-1, 6])},
    ),
    "recurrent over the first axis": (
        "float[N,T,6] x",
        "float[N,1,T,4] y",
        "h, last = LSTM<hidden_size=3>(x, W, R) [b] y = MatMul(h, v)",
        GATES,
    ),
    "recurrent backwards": (
        "float[N,T,6] x",
        "float[N,1,T,4] y",
        'h, last = LSTM<hidden_size=3, direction="reverse">(x, W, R) [b] y = MatMul(h, v)',
        GATES,
    ),
    "mean of the batch": (
        "float[N,T,6] x",
        "float[1,T,4] y",
        "[a] t = MatMul(x, w) m = ReduceMean<axes=[0]>(t) r = Relu(m) [b] y = MatMul(r, v)",
        CONSTANTS,
    ),
    "centred": (
        "float[N,T,6] x",
        "float[N,T,4] y",
        "[a] t = MatMul(x, w) m = ReduceMean<axes=[0]>(t) c = Sub(t, m) r = Relu(c) [b] y = MatMul(r, v)",
        CONSTANTS,
    ),
    "rows that are chosen": (
        "float[N,T,6] x",
        "float[M,4] y",
        "q = Reshape(x, rows) s = ReduceMax<axes=[1], keepdims=0>(q) k = Greater(s, limit) p = Compress<axis=0>(q, k)"
        "[a] t = MatMul(p, w) r = Relu(t) [b] y = MatMul(r, v)",
        {**CONSTANTS, "rows": np.array([-1, 6]), "limit": np.float32(1.8)},
    ),
}
FIRST, ELSEWHERE, DEPENDENT = (0, True), (0, False), (None, True)
"""The axis of samples, and whether each tensor has them along its first axis."""

EXPECTED = {
    "first": FIRST,
    "time first": ELSEWHERE,
    "rows of time": DEPENDENT,
    "rows of samples": FIRST,
    "recurrent over the first axis": DEPENDENT,
    "recurrent backwards": DEPENDENT,
    "mean of the batch": DEPENDENT,
    "centred": DEPENDENT,
    "rows that are chosen": ELSEWHERE,
}


def model_of(name):
    given, made, body, constants = BODIES[name]
    return model_from_text(f"g ({given}) => ({made}) {{ {body} }}", **constants)


def batching_of(model, x, *inputs):
    network = OnnxNetwork.load(model, "model")
    with Storage(1 << 20) as storage:
        return BatchingFinder(network, inputs or network.inputs, storage, 1)({"x": x})


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", EXPECTED)
def test_how_a_batch_is_taken_apart(name, size):
    found = batching_of(model_of(name), samples(size, 8, 6))
    assert (found.axes.get("x"), found.is_along_first_axis) == EXPECTED[name]
    assert found.can_be_cut


@pytest.mark.parametrize(
    "options", [{"method": "empirical", "shrunk": True}, {"method": "activation"}, {"method": "auto"}], ids=str
)
@pytest.mark.parametrize("name", ["first", "time first", "rows of samples", "rows that are chosen"])
@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_biases_do_not_depend_on_how_samples_are_batched(name, options):
    x = samples(24, 8, 6)
    x[:, 4:] *= np.array([1, -1, 2, -2, 3, -1], np.float32)
    corrections = [
        correct(
            model_of(name),
            [x[k : k + size] for k in range(0, 24, size)],
            quant_params=QuantParams("tf", weight_bits=BITS),
            **options,
        )
        for size in (1, 2, 4, 8, 24)
    ]
    first, *others = (constants_of(correction.model) for correction in corrections)
    assert {correction.samples for correction in corrections} == {24}
    for other in others:
        assert list(other) == list(first)
        for key, array in first.items():
            np.testing.assert_allclose(other[key], array, rtol=1e-5, atol=1e-6)


def test_a_batch_whose_samples_depend_on_each_other_is_one_sample():
    correction = correct(
        model_of("centred"), [samples(6, 8, 6, seed=k) for k in range(4)], quant_params=QuantParams("tf", weight_bits=BITS)
    )
    assert (correction.samples, correction.batches) == (4, 4)


def test_rows_of_a_matrix_that_is_added_are_no_samples():
    model = model_from_text(
        "g (float[N,6] x) => (float[N,5] y) { [layer] y = Gemm(x, w, c) }", w=CONSTANTS["w"], c=biases(4, 5)
    )
    correction = correct(model, [samples(4, 6, seed=k) for k in range(8)], quant_params=QuantParams("tf", weight_bits=BITS))
    assert correction.samples == 8
