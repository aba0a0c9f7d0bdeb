"""Tensors that are no arrays of numbers that numpy has, in any place: every method works around them."""

import itertools
import re
import warnings

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from biascorr import QuantParams, correct, equalize
from biascorr.adapters.onnx.network import OnnxNetwork
from networks import BITS, biases, constants_of, model_from_text, samples, weights

METHODS = ["auto", "mean", "iterative", "empirical", "activation", "hybrid"]
CONSTANTS = {"w": weights(6, 5, axis=1), "v": weights(5, 4, axis=1, seed=1), "b": biases(5), "c": biases(4)}


def corrected(model, data, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made the outputs worse", UserWarning)
        return correct(model, data, **options)


FIRST, LAST = "[a] t = Gemm(x, w, b)", "[z] y = Gemm(r, v, c)"
SEQUENCES = {
    "as an output": (f"{FIRST} r = Relu(t) {LAST.replace('y =', 'u =')} y = SplitToSequence<axis=1>(u)", "seq(float[N,1]) y"),
    "between layers": (f"{FIRST} s = SplitToSequence<axis=1>(t) r = ConcatFromSequence<axis=1>(s) {LAST}", "float[N,4] y"),
    "a part of one": (
        f"{FIRST} s = SequenceConstruct(t, x) i = Constant<value_int=0>() r = SequenceAt(s, i) {LAST}",
        "float[N,4] y",
    ),
    "an optional": (f"{FIRST} o = Optional(t) r = OptionalGetElement(o) {LAST}", "float[N,4] y"),
    "made in a branch, read after a layer": (
        f"""{FIRST} o = Relu(t) m = ReduceMax<keepdims=0>(t) k = Greater(m, zero) s = If(k)
            <then_branch = then () => (seq(float[N,5]) s1) {{ s1 = SequenceConstruct(t) }},
             else_branch = other () => (seq(float[N,5]) s2) {{ s2 = SequenceConstruct(t, t) }}>
            [m] u = Gemm(o, square, b) j = SequenceInsert(s, u) r = ConcatFromSequence<axis=0>(j) {LAST}""",
        "float[M,4] y",
    ),
    "made in a function, read after a layer": (
        f"{FIRST} o = Relu(t) s = local.Parts(t) [m] u = Gemm(o, square, b) j = SequenceInsert(s, u)"
        f"r = ConcatFromSequence<axis=0>(j) {LAST}",
        "float[M,4] y",
    ),
}
PARAMS = QuantParams("tf", weight_bits=BITS)
ZERO = {"zero": np.float32(0)}
MORE = {**CONSTANTS, **ZERO, "square": weights(5, 5, axis=1, seed=4)}
LOCAL = """<domain: "local", opset_import: ["" : 17]> Parts (t) => (s) { s = SequenceConstruct(t) }"""


def with_sequences(name):
    body, output = SEQUENCES[name]
    model = model_from_text(f"g (float[N,6] x) => ({output}) {{ {body} }} {LOCAL}", **MORE)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


IN_MEMORY_AND_NOT = [*((method, None) for method in METHODS), ("auto", 0), ("mean", 0)]
"""Methods, and bytes that are held in memory."""


@pytest.mark.parametrize(("method", "budget"), IN_MEMORY_AND_NOT)
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_and_optionals(name, method, budget):
    model = with_sequences(name)
    correction = corrected(model, samples(16, 6), method=method, quant_params=PARAMS, memory_budget=budget)
    assert [row.name for row in correction.report] == (["a", "m", "z"] if "[m]" in SEQUENCES[name][0] else ["a", "z"])
    assert "none" in correction.scores
    if method == "empirical":
        assert correction.scores["empirical"].sqnr > correction.scores["none"].sqnr


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_network_with_sequences_is_equalized(name):
    equalize(with_sequences(name), samples(16, 6))


def test_maps_and_text_are_not_scored():
    text = """g (float[N,6] x) => (float[N,4] y) { [a] t = Gemm(x, w, b) r = Relu(t) [z] y = Gemm(r, v, c) }"""
    model = model_from_text(text, **CONSTANTS)
    plain = corrected(model, samples(16, 6), quant_params=PARAMS)
    given = {"domain": "ai.onnx.ml", "classlabels_int64s": [0, 1, 2, 3]}
    model.graph.node.append(helper.make_node("ZipMap", ["y"], ["map"], "zip", **given))
    model.graph.node.append(helper.make_node("Cast", ["y"], ["text"], "cast", to=TensorProto.STRING))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    value = onnx.ValueInfoProto(name="map")
    value.type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
    value.type.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.output.extend([value, helper.make_tensor_value_info("text", TensorProto.STRING, None)])
    for budget in (None, 0):
        correction = corrected(model, samples(16, 6), quant_params=PARAMS, memory_budget=budget)
        assert correction.method == plain.method
    onnxruntime.InferenceSession(correction.model.SerializeToString())


NUMBERS_AGAIN = {
    "the shape of bfloat16": "q = Cast<to=16>(t) i = Shape(q) f = Reshape(t, i)",
    "whether there is one": "o = Optional(t) k = OptionalHasElement(o) f = Where(k, t, t)",
    "a type that is copied": "q = Cast<to=16>(t) f = CastLike(q, zero)",
    "text that is compared": "q = Cast<to=8>(t) k = Equal(q, q) f = Where(k, t, t)",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NUMBERS_AGAIN)
def test_layers_behind_numbers_that_others_gave_are_corrected_as_ever(name, method):
    """Each of them is `f = t` in other words: so the biases are the same."""

    def biases_of(body):
        text = (
            f"g (float[N,6] x) => (float[N,4] y) {{ {FIRST} {body} [m] n = Gemm(f, v, c) h = Relu(n) [z] y = Gemm(h, u, c) }}"
        )
        constants = {**CONSTANTS, **ZERO, "u": weights(4, 4, axis=1, seed=2)}
        model = model_from_text(text, opset=19, ir_version=9, **constants)
        correction = corrected(model, samples(16, 6), method=method, quant_params=PARAMS)
        assert [row.name for row in correction.report] == ["a", "m", "z"]
        return [row.shift_before for row in correction.report], constants_of(correction.model)

    plain = "q = Cast<to=16>(t) f = Cast<to=1>(q)" if name == "a type that is copied" else "f = Identity(t)"
    shifts, constants = biases_of(NUMBERS_AGAIN[name])
    expected, others = biases_of(plain)
    np.testing.assert_allclose(shifts, expected, rtol=1e-5)
    np.testing.assert_allclose(constants["b"], others["b"], rtol=1e-5)


OTHERS = {"bfloat16": TensorProto.BFLOAT16, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}


@pytest.mark.parametrize(("method", "budget"), IN_MEMORY_AND_NOT)
@pytest.mark.parametrize("kind", OTHERS)
def test_inputs_and_outputs_of_types_that_numpy_has_not(kind, method, budget):
    """They are the same numbers as in float32, and so are the biases and the scores."""
    to = OTHERS[kind]
    text = f"""g (float[N,6] x) => (float[N,4] y) {{ f = Cast<to=1>(x) [a] t = Gemm(f, w, b) r = Relu(t) [z] u = Gemm(r, v, c)
        q = Cast<to={to}>(u) y = Cast<to=1>(q) }}"""
    plain = model_from_text(text, opset=21, ir_version=10, **CONSTANTS)
    model = model_from_text(
        text.replace("q = ", "y = ").replace(" y = Cast<to=1>(q)", ""), opset=21, ir_version=10, **CONSTANTS
    )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = to
    x = samples(16, 6).astype(getattr(ml_dtypes, kind))
    options = {"method": method, "quant_params": PARAMS, "memory_budget": budget}
    correction, expected = corrected(model, x, **options), corrected(plain, x.astype(np.float32), **options)
    for one, other in zip(correction.report, expected.report, strict=True):
        assert one.shift_before == pytest.approx(other.shift_before, rel=1e-6)
    scores, others = ({name: score.sqnr for name, score in each.scores.items()} for each in (correction, expected))
    assert scores == pytest.approx(others)
    onnxruntime.InferenceSession(correction.model.SerializeToString())


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int4", "int8"])
def test_codes_are_not_compared_with_real_numbers(kind):
    float_model = model_from_text(f"g (float[N,6] x) => (float[N,5] y) {{ {FIRST.replace('t =', 'y =')} }}", **CONSTANTS)
    constants = {"s": np.float32(1 / 4), "zp": np.zeros((), ml_dtypes.int4 if kind == "int4" else kind)}
    text = f"g (float[N,6] x) => (float[N,5] y) {{ {FIRST} y = QuantizeLinear(t, s, zp) }}"
    given = model_from_text(text, opset=21, ir_version=10, **{**CONSTANTS, "w": np.round(CONSTANTS["w"], 1)}, **constants)
    given.graph.output[0].type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(constants["zp"].dtype)
    correction = corrected(float_model, samples(16, 6), quantized=given, method="empirical")
    assert all(np.isnan(score.sqnr) for score in correction.scores.values())


FLOATS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
ZERO_POINTS = {
    **{name: np.zeros((), getattr(ml_dtypes, name)) for name in FLOATS},
    "uint4": np.array(3, ml_dtypes.uint4), "int4": np.array(-2, ml_dtypes.int4), "uint8": np.uint8(30), "int8": np.int8(-90),
    "int16": np.int16(-200), "uint16": np.uint16(400),
}  # fmt: skip
STEPS = {"uint4": 1 / 4, "int4": 1 / 4, "uint8": 1 / 64, "int8": 1 / 64, "int16": 1 / 2**13, "uint16": 1 / 2**13}


def quantized_before(layer_inputs, kind, *, transposed=False, doubled=False):
    """Two products whose inputs are quantized to this type."""
    nodes, constants = (
        [],
        {"z": ZERO_POINTS[kind], "s": np.float32(STEPS.get(kind, 1 / 32)), "s2": np.float32(STEPS.get(kind, 1 / 32) * 1.5)},
    )
    for name in layer_inputs:
        nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}q"]))
        codes = f"{name}q"
        if transposed:
            nodes.append(helper.make_node("Transpose", [codes], [f"{name}p"], perm=[1, 0]))
            nodes.append(helper.make_node("Transpose", [f"{name}p"], [f"{name}r"], perm=[1, 0]))
            codes = f"{name}r"
        nodes.append(helper.make_node("DequantizeLinear", [codes, "s", "z"], [f"{name}d"]))
        if doubled:
            nodes.append(helper.make_node("QuantizeLinear", [f"{name}d", "s2", "z"], [f"{name}q2"]))
            nodes[-2].output[0], nodes[-1].input[0] = f"{name}e", f"{name}e"
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}q2", "s2", "z"], [f"{name}d"]))
    return nodes, constants


@pytest.mark.parametrize(
    ("method", "form"),
    [*((method, "plain") for method in METHODS), *itertools.product(("auto", "mean"), ("transposed", "doubled"))],
)
@pytest.mark.parametrize("kind", ZERO_POINTS)
def test_activations_on_any_grid(kind, method, form):
    """The shift of the first layer is the weight error times the mean of what it reads, whatever the codes are."""
    rng = np.random.default_rng(0)
    w, v = ((rng.normal(size=shape) + 0.2).astype(np.float32) for shape in ((6, 5), (5, 4)))
    steps = {name: np.float32(np.abs(array).max() / 3) for name, array in (("w", w), ("v", v))}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", 6), ("y", 4))]

    def network(before_a, before_b, constants, read):
        nodes = [
            *before_a,
            helper.make_node("MatMul", [read("x"), "W"], ["t"], "a"),
            helper.make_node("Relu", ["t"], ["r"], "relu"),
            *before_b,
            helper.make_node("MatMul", [read("r"), "V"], ["y"], "b"),
        ]
        tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    float_model = network([], [], {"W": w, "V": v}, lambda name: name)
    fake = {key.upper(): np.rint(array / steps[key]) * steps[key] for key, array in (("w", w), ("v", v))}
    options = {} if form == "plain" else {form: True}
    before_a, constants = quantized_before(["x"], kind, **options)
    before_b, _ = quantized_before(["r"], kind, **options)
    given = network(before_a, before_b, constants | fake, lambda name: f"{name}d")
    x = rng.random((24, 6)).astype(np.float32)
    correction = corrected(float_model, x, quantized=given, method=method)
    assert [row.name for row in correction.report] == ["a", "b"]
    if method in ("mean", "iterative"):
        read = OnnxNetwork.load(given, "quantized").part({"x": x}, ["xd"])({"x": x})["xd"]
        expected = read.mean(axis=0, dtype=np.float64) @ (w - fake["W"]).astype(np.float64)
        assert correction.report[0].shift_before == pytest.approx(np.abs(expected).mean(), rel=1e-5)
    onnxruntime.InferenceSession(correction.model.SerializeToString())


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("renamed", [False, True])
def test_weights_of_8_bit_floats_are_matched(kind, renamed):
    """Their spacing grows with them: most are further off than the step, which is that of values around 1."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(32, 16)).astype(np.float32)
    dtype = getattr(ml_dtypes, kind)
    step = np.float32(np.abs(w).max() / 200)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", 32), ("y", 16))]
    constants = {"q": (w / step).astype(dtype), "s": step, "z": np.zeros((), dtype)}
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    dequantize = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["wd"])
    product = helper.make_node("MatMul", ["x", "wd"], ["y"], "other" if renamed else "a")
    graph = helper.make_graph([dequantize, product], "g", values[:1], values[1:], tensors)
    given = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    float_model = model_from_text("g (float[N,32] x) => (float[N,16] y) { [a] y = MatMul(x, w) }", w=w)
    correction = corrected(float_model, samples(24, 32), quantized=given, method="empirical")
    assert correction.report[0].method == "empirical"
    assert correction.scores["empirical"].sqnr > correction.scores["none"].sqnr


@pytest.mark.parametrize("kind", ["quantized twice", "a step that is quantized", "a step that is cast", "no zero point"])
@pytest.mark.parametrize("renamed", [False, True])
def test_weights_through_several_quantizers_are_matched(kind, renamed):
    w = weights(32, 16, axis=1) / 4
    body = {
        "quantized twice": "d = DequantizeLinear(q, s) e = QuantizeLinear(d, s2, z) wd = DequantizeLinear(e, s2, z)",
        "a step that is quantized": "t = DequantizeLinear(sq, ss) wd = DequantizeLinear(q, t)",
        "a step that is cast": "t = Cast<to=1>(s16) wd = DequantizeLinear(q, t)",
        "no zero point": "wd = DequantizeLinear(q, s)",
    }[kind]
    step = np.float32(np.abs(w).max() / 15)
    constants = {
        "q": np.rint(w / step).astype(np.int8), "s": step, "s2": step / np.float32(7), "z": np.int8(0), "s16": np.float16(step),
        "sq": np.array(100, np.uint8), "ss": step / np.float32(100),
    }  # fmt: skip
    if kind == "quantized twice":
        constants["s"], constants["q"] = step * np.float32(2), np.rint(w / (step * 2)).astype(np.int8)
    read = set(re.findall(r"\w+", body))
    text = f"g (float[N,32] x) => (float[N,16] y) {{ {body} [{'other' if renamed else 'a'}] y = MatMul(x, wd) }}"
    given = model_from_text(text, **{name: array for name, array in constants.items() if name in read})
    float_model = model_from_text("g (float[N,32] x) => (float[N,16] y) { [a] y = MatMul(x, w) }", w=w)
    correction = corrected(float_model, samples(24, 32), quantized=given, method="empirical")
    assert correction.report[0].method == "empirical"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [1.8, 100.0])
def test_a_layer_that_reads_no_rows_in_some_samples_or_all(limit, method):
    text = """g (float[N,6] x) => (float[P,4] y) {
        s = ReduceMax<axes=[1], keepdims=0>(x) k = Greater(s, limit) p = Compress<axis=0>(x, k)
        [a] t = MatMul(p, w) r = Relu(t) [b] y = MatMul(r, v)
    }"""
    model = model_from_text(text, limit=np.float32(limit), w=CONSTANTS["w"], v=CONSTANTS["v"])
    correction = corrected(model, samples(24, 6), method=method, quant_params=PARAMS)
    reasons = {row.reason for row in correction.report}
    if limit > 10:
        assert reasons <= {"no sample has values there", "no correction made the outputs better"}
    elif method == "empirical":
        assert reasons == {"it had no bias; one was added"}
