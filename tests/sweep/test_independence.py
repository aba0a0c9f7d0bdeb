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


def renamed(model, **axes):
    """The model with other names or sizes of the axes of its input, and outputs of any shape."""
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        size = axes.get(dim.dim_param)
        if isinstance(size, int):
            dim.dim_value = size
        elif size is not None:
            dim.dim_param = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return model


@pytest.mark.parametrize("name", EXPECTED)
def test_how_a_batch_of_fixed_size_is_taken_apart(name):
    found = batching_of(renamed(model_of(name), N=4, T=8), samples(4, 8, 6))
    expected = {"rows that are chosen": DEPENDENT}.get(name, EXPECTED[name])  # their rows cannot be told from each other
    assert (found.axes.get("x"), found.is_along_first_axis) == expected
    assert found.can_be_cut is (expected is DEPENDENT)


def recurrent(*axes):
    """A network whose first axis is time."""
    return model_from_text(
        f"g (float[{axes[0]},{axes[1]},6] x) => (float[{axes[0]},1,{axes[1]},4] y) {{ h, last = LSTM<hidden_size=3>(x, W, R) "
        "[b] y = MatMul(h, v) }",
        **GATES,
    )


@pytest.mark.parametrize("axes", [("T", "N"), ("time", "batch"), ("unk1", "unk2"), (8, "N"), (8, "unk2")])
def test_samples_are_found_along_another_axis_than_the_first(axes):
    found = batching_of(recurrent(*axes), samples(8, 5, 6))
    assert (found.axes, found.can_be_cut, found.is_along_first_axis) == ({"x": 1}, True, False)


def test_a_network_that_takes_whole_batches_only_by_its_inside():
    model = model_from_text(
        "g (float[N,6] x) => (float[N,4] y) { [a] t = MatMul(x, w) q = Reshape(t, shape) r = Relu(q) [b] y = MatMul(r, v) }",
        **CONSTANTS,
        shape=np.array([4, 5]),
    )
    found = batching_of(model, samples(4, 6))
    assert (found.axes, found.can_be_cut, found.is_along_first_axis) == ({"x": 0}, False, True)


def test_an_output_that_samples_share():
    model = model_from_text(
        "g (float[N,6] x) => (float[N,5] y, float[8] z) { [a] y = MatMul(x, w) z = Mul(c, c) }", w=CONSTANTS["w"], c=biases(8)
    )
    found = batching_of(model, samples(4, 6))
    assert (found.axes, found.is_along_first_axis) == ({"x": 0}, False)


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
            np.testing.assert_allclose(other[key], array, rtol=1e-5, atol=1e-6 if options.get("method") != "auto" else 3e-5)


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


@pytest.mark.parametrize("axes", [("T", "N"), ("unk1", "unk2")])
@pytest.mark.parametrize("method", ["auto", "empirical"])
@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_biases_of_a_model_whose_first_axis_is_time(axes, method):
    x = samples(8, 24, 6)
    corrections = [
        correct(
            recurrent(*axes),
            [x[:, k : k + size] for k in range(0, 24, size)],
            quant_params=QuantParams("tf", weight_bits=BITS),
            method=method,
            max_samples=20,
        )
        for size in (1, 2, 8, 24)
    ]
    corrections = corrections if axes == ("T", "N") else corrections[1:]  # of single samples, nothing shows the axis
    assert {correction.samples for correction in corrections} == {20}
    first, *others = (constants_of(correction.model) for correction in corrections)
    for other in others:
        for key, array in first.items():
            np.testing.assert_allclose(other[key], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["first", "time first", "rows of samples"])
def test_samples_in_batches_of_fixed_size_are_counted_and_scored_one_by_one(name):
    correction = correct(
        renamed(model_of(name), N=4), samples(40, 8, 6), quant_params=QuantParams("tf", weight_bits=BITS), max_samples=38
    )
    assert (correction.samples, correction.batches) == (36, 9)
    assert "data: not all samples were read, 38 at most (max_samples)" in correction.notes
