"""What is returned is what was measured: by the engine, by onnxruntime without optimizers, and as users run it."""

import warnings

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType

from biascorr import QuantParams, correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.scoring import OutputErrors, Score, Terms
from networks import BITS, model_from_text, quantized, samples, weights

FORMATS = {
    "QDQ": {"quant_format": QuantFormat.QDQ},
    "QDQ per channel": {"quant_format": QuantFormat.QDQ, "per_channel": True},
    "QOperator": {"quant_format": QuantFormat.QOperator},
    "QOperator per channel": {"quant_format": QuantFormat.QOperator, "per_channel": True},
    "QOperator int8": {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QInt8},
}
BODIES = {
    "conv": (
        "float[N,4,6,6] x",
        "float[N,3,6,6] y",
        "[a] t = Conv<pads=[1,1,1,1]>(x, w) r = Relu(t) [b] y = Conv<pads=[1,1,1,1]>(r, v)",
    ),
    "matmul": ("float[N,7,4] x", "float[N,7,3] y", "[a] t = MatMul(x, w) r = Relu(t) [b] y = MatMul(r, v)"),
    "gemm": ("float[N,4] x", "float[N,3] y", "[a] t = Gemm(x, w) r = Relu(t) [b] y = Gemm(r, v)"),
}
SHAPES = {"conv": ((5, 4, 3, 3), (3, 5, 3, 3), (4, 6, 6)), "matmul": ((4, 5), (5, 3), (7, 4)), "gemm": ((4, 5), (5, 3), (4,))}


def network(name):
    given, made, body = BODIES[name]
    w, v, x = SHAPES[name]
    rng = np.random.default_rng(3)
    constants = {key: (rng.normal(size=shape) + 0.2).astype(np.float32) for key, shape in (("w", w), ("v", v))}
    return model_from_text(f"g ({given}) => ({made}) {{ {body} }}", **constants), samples(40, *x)


def score(reference, model, data, level):
    exact, session = session_of(reference, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL), session_of(model, level)
    errors = OutputErrors()
    for x in data[3::4]:
        errors.add("y", Terms.of(exact.run(["y"], {"x": x[None]}), session.run(["y"], {"x": x[None]})))
    return errors.score.sqnr


def session_of(model, level):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level, options.log_severity_level = level, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("method", ["auto", "mean", "empirical"])
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("how", FORMATS)
def test_reported_scores_are_those_of_the_saved_model(how, name, method):
    """With 7-bit weights: products of 8 bits saturate in the kernels of some CPUs."""
    reference, data = network(name)
    given = quantized(reference, [{"x": x[None]} for x in data], reduce_range=True, **FORMATS[how])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made the outputs worse", UserWarning)
        fitted, scored = np.delete(data, np.s_[3::4], axis=0), data[3::4]
        correction = correct(reference, fitted, validation=scored, quantized=given, method=method)
    level = onnxruntime.GraphOptimizationLevel
    for label, model in (("none", given), (correction.method, correction.model)):
        assert score(reference, model, data, level.ORT_DISABLE_ALL) == pytest.approx(correction.scores[label].sqnr, abs=0.3)
        assert score(reference, model, data, level.ORT_ENABLE_ALL) == pytest.approx(correction.deployed[label].sqnr, abs=1e-3)
    if method == "auto":
        assert not correction.deployed[correction.method].is_worse_than(correction.deployed["none"])


ZERO_POINTS = {
    "float8e4m3": np.zeros((), ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.zeros((), ml_dtypes.float8_e5m2),
    "uint8": np.array(0, np.uint8),
    "uint8, both signs": np.array(100, np.uint8),
    "int8": np.array(-128, np.int8),
    "int8, both signs": np.array(0, np.int8),
    "uint4": np.array(0, ml_dtypes.uint4),
    "uint4, both signs": np.array(5, ml_dtypes.uint4),
    "int4, both signs": np.array(0, ml_dtypes.int4),
    "int16": np.array(0, np.int16),
}


@pytest.mark.parametrize("before", ["Relu", "Clip", "LeakyRelu", "Dropout", "Identity"])
@pytest.mark.parametrize("kind", ZERO_POINTS)
@pytest.mark.parametrize("pairs", [1, 2])
def test_optimizers_keep_the_arithmetic_that_is_measured(before, kind, pairs):
    """Against onnxruntime without any: an operator before quantizers stays, and so do two pairs of them."""
    zero, step = ZERO_POINTS[kind], np.float32(1 / 16)
    inputs = {"Clip": ["t", "low", "high"], "Dropout": ["t", "ratio", "trains"]}.get(before, ["t"])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"], "a"), helper.make_node(before, inputs, ["q0"])]
    for k in range(pairs):
        nodes += [
            helper.make_node("QuantizeLinear", [f"q{k}", f"s{k}", "z"], [f"c{k}"]),
            helper.make_node("DequantizeLinear", [f"c{k}", f"s{k}", "z"], [f"q{k + 1}"]),
        ]
    nodes.append(helper.make_node("MatMul", [f"q{pairs}", "v"], ["y"], "b"))
    constants = {
        "w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1), "z": zero, "low": np.float32(0), "high": np.float32(6),
        "ratio": np.float32(0.5), "trains": np.bool_(False), "s0": step, "s1": step * np.float32(1.5),
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = samples(50, 6) - np.float32(1)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    measured = OnnxNetwork.load(model, "model").part({"x": x}, ["y"])({"x": x})["y"]
    np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_computes_something_else_than_was_measured_is_not_returned(monkeypatch):
    reference, data = network("conv")
    given = quantized(reference, [{"x": x[None]} for x in data], reduce_range=True)
    with_shifts = OnnxNetwork.with_shifts

    def saved_otherwise(self, shifts):
        changed = with_shifts(self, shifts)
        other = with_shifts(self, {name: shift + 50.0 for name, shift in shifts.items()})
        changed.deployed = other.deployed
        return changed

    monkeypatch.setattr(OnnxNetwork, "with_shifts", saved_otherwise)
    with pytest.raises(RuntimeError, match=r"gives other outputs than were measured .* not returned"):
        correct(reference, data, quantized=given, method="empirical")


@pytest.mark.parametrize("is_given", [True, False])
def test_a_model_that_does_not_load_is_not_returned(is_given, monkeypatch):
    reference, data = network("conv")
    given = quantized(reference, [{"x": x[None]} for x in data], reduce_range=True) if is_given else None
    with_shifts = OnnxNetwork.with_shifts

    def fail(**_):
        raise ValueError("quantized: onnxruntime cannot run it: Type Error")

    def broken(self, shifts):
        changed = with_shifts(self, shifts)
        changed.deployed = changed.check = fail
        return changed

    monkeypatch.setattr(OnnxNetwork, "with_shifts", broken)
    with pytest.raises(RuntimeError, match=r"corrected model is not valid.*Type Error"):
        correct(reference, data, quantized=given, method="empirical")


def test_auto_returns_the_model_that_was_given_where_the_runtime_makes_the_corrected_one_worse(monkeypatch):
    reference, data = network("conv")
    given = quantized(reference, [{"x": x[None]} for x in data], reduce_range=True)
    deployed, with_shifts = OnnxNetwork.deployed, OnnxNetwork.with_shifts

    def worse(self, shifts):
        changed = with_shifts(self, shifts)
        changed.deployed = lambda **options: deployed(
            self if not options.get("optimized", True) else with_shifts(self, {"a": np.full(5, 2.0)}), **options
        )
        return changed

    monkeypatch.setattr(OnnxNetwork, "with_shifts", worse)
    correction = correct(reference, data, quantized=given)
    assert correction.method == "none"
    assert correction.model.SerializeToString() == given.SerializeToString()
    (note,) = [note for note in correction.notes if "runtime's own arithmetic" in note]
    assert note.endswith("is not surely better than the uncorrected model, which is returned")
    best = Score.best(correction.scores.values())
    assert best != correction.scores["none"]


def test_simulated_quantization_has_no_deployed_scores():
    reference, data = network("gemm")
    assert correct(reference, data, quant_params=QuantParams("tf", weight_bits=BITS)).deployed == {}


@pytest.mark.parametrize("name", ["conv", "gemm"])
def test_constants_that_nothing_reads(name):
    """Quantizers leave the float weights behind: large ones are not handed to onnxruntime, which would miss them."""
    reference, data = network(name)
    given = quantized(reference, [{"x": x[None]} for x in data], reduce_range=True)
    given.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "left_behind"))
    correction = correct(reference, data, quantized=given, method="empirical")
    assert correction.deployed.keys() == {"none", "empirical"}
    assert "left_behind" in {tensor.name for tensor in correction.model.graph.initializer}
