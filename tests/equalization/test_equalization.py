"""Equalization of whole models: what it keeps, what it leaves and why, and bias correction behind it."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat

from biascorr import (
    ActivationType,
    BiasCorrection,
    BiasCorrectionParams,
    CrossLayerScaling,
    HighBiasFold,
    QuantParams,
    equalize,
    equalize_model,
    find_all_convs_bn_with_activation,
    fold_all_batch_norms,
    fold_given_batch_norms,
)
from biascorr.adapters.onnx.network import OnnxNetwork
from networks import (
    as_constant_nodes,
    assert_same_function,
    batch_norm,
    batch_norm_constants,
    biases,
    constants_of,
    layers_of,
    magnitudes,
    model_from_text,
    quantized,
    run,
    samples,
    two_layers,
    weights,
    with_constants,
)

UNEVEN = np.float32([1, 16, 4, 64])


def uneven(*shape, axis=0, seed=0, dtype="float32"):
    factors = np.resize(UNEVEN, shape[axis]).reshape(-1, *[1] * (len(shape) - 1 - axis % len(shape)))
    return (weights(*shape, seed=seed) * factors).astype(dtype)


def linked(model):
    """The names of layers that were scaled, by chains."""
    return [[layer.name for layer in each.chain.layers] for each in equalize(model).chains]


def check(model, *feeds, names=("first", "second"), tolerance=1e-6):
    """Scales, keeps the function, gives even ranges; says so."""
    result = equalize(model, [dict(each) for each in feeds])
    assert_same_function(model, result.model, *feeds, tolerance=tolerance)
    assert result.change.relative <= tolerance
    assert [[layer.name for layer in each.chain.layers] for each in result.chains] == [list(names)]
    before, behind = (layers_of(result.model)[name] for name in names[:2])
    ranges, others = magnitudes(before)[0], magnitudes(behind)[1]
    others = others.reshape(len(ranges), -1).max(axis=1)
    np.testing.assert_allclose(ranges, others, rtol=1e-5 if ranges.dtype != "float16" and tolerance < 1e-4 else 1e-2)
    factors = result.chains[0].factors[0]
    assert factors.max() > 2 * factors.min()
    return result


# first: operator, a sample, its weights and the axis of its output channels; t is what it makes
FIRST = {
    "Conv": ("Conv<pads=[1,1,1,1]>(x, w{b})", (3, 6, 5), (4, 3, 3, 3), 0),
    "1-D": ("Conv(x, w{b})", (3, 7), (4, 3, 2), 0),
    "3-D": ("Conv(x, w{b})", (2, 3, 4, 3), (4, 2, 1, 2, 1), 0),
    "grouped": ("Conv<group=2>(x, w{b})", (4, 6, 5), (4, 2, 2, 2), 0),
    "multiplied": ("Conv<group=2>(x, w{b})", (2, 6, 5), (4, 1, 2, 2), 0),
    "depthwise": ("Conv<group=4>(x, w{b})", (4, 6, 5), (4, 1, 3, 3), 0),
    "ConvTranspose": ("ConvTranspose<strides=[2,2]>(x, w{b})", (3, 3, 2), (3, 4, 2, 2), 1),
    "grouped ConvTranspose": ("ConvTranspose<group=2>(x, w{b})", (6, 3, 3), (6, 2, 2, 2), 1),
    "Gemm": ("Gemm<alpha=0.5, beta=2.0>(x, w{b})", (3,), (3, 4), 1),
    "transposed Gemm": ("Gemm<transB=1>(x, w{b})", (3,), (4, 3), 0),
    "MatMul": ("MatMul(x, w)", (3,), (3, 4), 1),
    "MatMul of rank 3": ("MatMul(x, w)", (5, 3), (3, 4), 1),
    "MatMul, weights first": ("MatMul(w, x)", (3, 5), (4, 3), 0),
}
SECOND = {
    2: [("Gemm<transB=1>(r, v, c)", (5, 4)), ("Gemm<alpha=3.0>(r, v, c)", (4, 5)), ("MatMul(r, v)", (4, 5))],
    3: [("Conv<pads=[1,0]>(r, v, c)", (5, 4, 2)), ("MatMul(v, r)", (5, 4))],
    4: [
        ("Conv<pads=[1,1,1,1]>(r, v, c)", (5, 4, 3, 3)),
        ("Conv<group=2>(r, v)", (6, 2, 2, 2)),
        ("Conv<group=4>(r, v)", (8, 1, 2, 2)),
        ("ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(r, v, c)", (4, 5, 2, 2)),
        ("ConvTranspose<group=2>(r, v)", (4, 3, 2, 2)),
    ],
    5: [("Conv(r, v, c)", (5, 4, 1, 1, 2)), ("ConvTranspose(r, v, c)", (4, 5, 1, 2, 1))],
}
BIASES = {"MatMul": ("none", "add"), "Gemm": ("none", "own")}
PAIRS = [
    (name, second, v, bias)
    for name, (operator, shape, _, _) in FIRST.items()
    for second, v in ([("MatMul(r, v)", (4, 5))] if name == "MatMul of rank 3" else SECOND[len(shape) + 1])
    for bias in BIASES.get(re.match(r"\w+", operator)[0], ("none", "own", "add"))
]


def dims(shape):
    return ",".join(["N", *map(str, shape)])


def pair(name, second, v, between="r = Relu(t)", *, kind="float", bias="own", dtype="float32", **options):
    """The first layer -> what makes `r` of `t` -> the second."""
    operator, shape, w, axis = FIRST[name]
    axes_behind = 0 if axis == -1 or operator.startswith("MatMul(x") else len(shape) - 1
    own, made, add = (", b" if bias == "own" else ""), *(("a", "t = Add(a, b)") if bias == "add" else ("t", ""))
    text = f"""g ({kind}[{dims(shape)}] x) => ({kind}[{dims("ABCD"[: len(shape)])}] y) {{
        [first] {made} = {operator.format(b=own)} {add} {between} [second] y = {second}
    }}"""
    constants = {"w": uneven(*w, axis=axis), "v": weights(*v, seed=5), "c": biases(5)}
    if v[1] == 4:  # large where the first layer is small: bits to gain
        constants["v"] *= (64 / UNEVEN).reshape(4, *[1] * (len(v) - 2))
    constants["b"] = biases(4, *[1] * (axes_behind if bias == "add" else 0))
    arrays = {key: np.asarray(each) for key, each in (constants | options).items() if key not in ("opset", "ir_version")}
    used = {key: each.astype(dtype if each.dtype.kind == "f" else each.dtype) for key, each in arrays.items()}
    kept = {key: each for key, each in used.items() if re.search(rf"\b{key}\b", text)}
    return model_from_text(text, **kept, **{key: options[key] for key in ("opset", "ir_version") if key in options})


@pytest.mark.parametrize(("name", "second", "v", "bias"), PAIRS, ids=str)
def test_pairs_of_all_layers(name, second, v, bias):
    check(pair(name, second, v, bias=bias), {"x": samples(3, *FIRST[name][1])})


CONV = ("Conv", "Conv(r, v, c)", (5, 4, 2, 2))


@pytest.mark.parametrize("bias", [(4, 1, 1), (1, 4, 1, 1), (4, 6, 5), (6, 5), (5,), ()], ids=str)
def test_biases_of_every_shape(bias):
    check(pair(*CONV, bias="add", b=biases(*bias)), {"x": samples(3, 3, 6, 5)})


@pytest.mark.parametrize(
    ("between", "options"),
    [
        ("r = Identity(t)", {}),
        ("r = LeakyRelu(t)", {}),
        ("r = PRelu(t, s)", {"s": np.float32(0.25)}),
        ("r = PRelu(t, s)", {"s": np.float32([0, 0.5, -1, 2]).reshape(4, 1, 1)}),
        ("i = Identity(t) q = Relu(i) r = Dropout(q)", {}),
        ("q = Relu(t) r = Relu(q)", {}),
        ("q = Relu(t) r = Pad(q, p)", {"p": np.int64([0, 0, 1, 0, 0, 0, 0, 2])}),
        ("q = Pad(t, p) r = Relu(q)", {"p": np.int64([0, 0, 1, 0, 0, 0, 0, 2])}),
        ("r = Max(t, z)", {"z": np.float32(0)}),
        ("r = Max(z, t)", {"z": np.zeros((4, 1, 1), np.float32)}),
        ("r = Clip(t, z)", {"z": np.float32(0)}),
        ("r = Clip(t, low, high)", {"low": np.float32(0), "high": np.float32(6)}),
        ("r = Clip(t, low, high)", {"low": np.float32(-3), "high": np.float32(2.5)}),
        ("r = Clip(t, , high)", {"high": np.float32(3)}),
        ("q = Relu(t) r = Clip(q, low, high)", {"low": np.float32(1), "high": np.float32(6)}),
        ("r = Min(t, high)", {"high": np.float32([1, 2, 3, 4]).reshape(4, 1, 1)}),
        ("q = Max(low, t) r = Min(high, q)", {"low": np.float32([-1, -2, 0, 1]).reshape(1, 4, 1, 1), "high": np.float32(6)}),
    ],
    ids=str,
)
def test_what_may_be_between(between, options):
    check(pair(*CONV, between, **options), {"x": 4 * samples(3, 3, 6, 5) - 2})


@pytest.mark.parametrize(
    ("between", "second", "v", "options"),
    [
        ("q = Relu(t) r = Flatten(q)", "Gemm<transB=1>(r, v, c)", (5, 120), {}),
        ("q = Relu(t) r = Reshape(q, to)", "Gemm(r, v, c)", (120, 5), {"to": np.int64([0, -1])}),
        ("q = Reshape(t, to) r = Relu(q)", "MatMul(r, v)", (120, 5), {"to": np.int64([-1, 120])}),
        ("q = Relu(t) p = GlobalAveragePool(q) r = Flatten(p)", "Gemm(r, v, c)", (4, 5), {}),
        ("p = GlobalAveragePool(t) q = Relu(p) r = Reshape(q, to)", "Gemm(r, v)", (4, 5), {"to": np.int64([-1, 4])}),
        ("q = Relu(t) r = ReduceMean<axes=[2,3], keepdims=0>(q)", "MatMul(r, v)", (4, 5), {}),
        ("q = Relu(t) r = ReduceMean<axes=[-1]>(q)", "Conv(r, v, c)", (5, 4, 2, 1), {}),
    ],
    ids=str,
)
def test_matrix_products_behind_images(between, second, v, options):
    model = pair("Conv", second, v, between, **options)
    rank = 4 if second.startswith("Conv") else 2
    del model.graph.output[0].type.tensor_type.shape.dim[rank:]
    check(model, {"x": samples(3, 3, 6, 5)})


@pytest.mark.parametrize("between", ["r = Relu(t)", "r = Clip(t, low, high)", "r = LeakyRelu(t)"])
@pytest.mark.parametrize(
    ("layers", "dtype", "kind", "tolerance"),
    [
        (CONV, "float16", "float16", 5e-3),
        (("Gemm", "Gemm<transB=1>(r, v, c)", (5, 4)), "float16", "float16", 5e-3),
        (("Gemm", "Gemm<transB=1>(r, v, c)", (5, 4)), "float64", "double", 1e-14),
    ],
    ids=str,
)
def test_other_types(layers, dtype, kind, tolerance, between):
    model = pair(*layers, between, kind=kind, dtype=dtype, low=np.float32(0), high=np.float32(6))
    result = check(model, {"x": samples(3, *FIRST[layers[0]][1], dtype=dtype)}, tolerance=tolerance)
    assert {layer.weights.dtype.name for layer in result.network.layers} == {dtype}


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 21])
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_every_opset(opset, constant_nodes):
    clip = "r = Clip<min=0.0, max=6.0>(t)" if opset < 11 else "r = Clip(t, low, high)"
    bounds = {} if opset < 11 else {"low": np.float32(0), "high": np.float32(6)}
    model = pair(*CONV, clip, opset=opset, ir_version=3 if opset < 9 else 8, **bounds)
    if constant_nodes:
        del model.graph.input[1:]
        model = as_constant_nodes(model)
    x = {"x": 4 * samples(3, 3, 6, 5)}
    if opset >= 8:
        result = check(model, x)
        assert [node.op_type for node in result.model.graph.node if node.op_type in ("Clip", "Relu", "Min")] == ["Relu", "Min"]
    else:
        assert equalize(model).left["first"] == "Clip:r cannot limit each channel to a bound of its own in this model"
    check(pair(*CONV, opset=opset, ir_version=3 if opset < 9 else 8), x)
    assert_same_function(model, equalize(model).model, x, tolerance=1e-6)


def test_sizes_that_are_known_at_run_time_only():
    model = pair("Conv", "Conv<pads=[1,1,1,1]>(r, v, c)", (5, 4, 3, 3))
    for axis, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], "HW"):
        axis.dim_param = name
    check(model, {"x": samples(1, 3, 6, 5)}, {"x": samples(3, 3, 9, 12)})


def test_types_that_are_not_known_before_the_network_runs():
    """Behind an operator of another domain, of which only onnxruntime knows what it makes."""
    text = """g (float[N,3,6,5] x) => (float[N,A,B,C] y) {
        p = Identity(x) [first] t = Conv(p, w) q = Relu(t) r = Min(q, high) [second] y = Conv(r, v)
    }"""
    high = np.float32(6)
    model = model_from_text(text, w=uneven(4, 3, 1, 1), v=uneven(5, 4, 1, 1, seed=5), high=high)
    factors = (64 / UNEVEN).reshape(4, 1, 1)
    model = with_constants(model, v=constants_of(model)["v"] * factors)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Gelu", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    result = equalize(model, samples(3, 3, 6, 5))
    assert result.chains[0].limits == ["Min:r"]
    assert result.change.relative < 1e-6


def test_names_are_made_up_where_there_are_none():
    model = pair(*CONV, "r = Clip(t, low, high)", low=np.float32(0), high=np.float32(6))
    for node in model.graph.node:
        node.ClearField("name")
    check(model, {"x": samples(3, 3, 6, 5)}, names=("Conv:t", "Conv:y"))


def test_weights_that_are_computed():
    text = """g (float[N,3,6,5] x) => (float[N,A,B,C] y) {
        back = Transpose<perm=[3,2,0,1]>(w) half = Constant<value_float=0.5>() scaled = Mul(back, half)
        [first] t = Conv(x, scaled, b) r = Relu(t) turned = Transpose<perm=[3,2,0,1]>(v) [second] y = Conv(r, turned)
    }"""
    turned = [np.transpose(each, (2, 3, 1, 0)) for each in (uneven(4, 3, 2, 2), weights(5, 4, 2, 2))]
    check(model_from_text(text, w=turned[0], v=turned[1], b=biases(4)), {"x": samples(3, 3, 6, 5)})


def test_a_shared_bias():
    text = """g (float[N,3,6,5] x) => (float[N,A,B,C] y, float[N,D,E,F] z) {
        [first] t = Conv(x, w, b) r = Relu(t) [second] y = Conv(r, v) [other] z = Conv(x, u, b)
    }"""
    model = model_from_text(text, w=uneven(4, 3, 1, 1), v=weights(5, 4, 1, 1), u=weights(4, 3, 1, 1, seed=3), b=biases(4))
    check(model, {"x": samples(3, 3, 6, 5)})


def test_several_inputs_and_outputs_and_a_residual():
    text = """g (float[N,3,6,5] x, float[N,4,6,5] z) => (float[N,A,B,C] y, float[N,4,6,5] s, float[N,4,6,5] q) {
        [one] a = Conv(x, w1) [two] b = Conv(z, w2) s = Add(a, b) r = Relu(s)
        [three] c = Conv(r, w3) d = Relu(c) [four] e = Conv(d, w4) q = Add(e, r) [five] f = Conv(q, w5) g = Relu(f)
        [six] y = Conv(g, w6)
    }"""
    shapes = {
        "w1": (4, 3, 1, 1),
        "w2": (4, 4, 1, 1),
        "w3": (6, 4, 1, 1),
        "w4": (4, 6, 1, 1),
        "w5": (4, 4, 2, 2),
        "w6": (3, 4, 1, 1),
    }
    model = model_from_text(text, **{name: uneven(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())})
    result = equalize(model)
    assert linked(model) == [["three", "four"], ["five", "six"]]
    assert result.left == {
        "one": "Add:s reads its output, after which a scaled channel is not the same",
        "two": "Add:s reads its output, after which a scaled channel is not the same",
        "four": "Add:q reads its output, after which a scaled channel is not the same",
        "six": "its output is an output of the model",
    }
    feeds = {"x": samples(2, 3, 6, 5), "z": samples(2, 4, 6, 5)}
    assert_same_function(model, result.model, feeds, tolerance=1e-6)


LEFT = [
    ("[first] t = Conv(x, w) r = Relu(t) u = Relu(t) [second] c = Conv(r, v) y = Add(c, u)", "several operations read"),
    ("[first] y = Conv(x, w) [second] c = Conv(y, v) d = Relu(c)", "several operations read its output"),
    ("[first] t = Conv(x, w) y = Sigmoid(t)", "Sigmoid:y reads its output, after which a scaled channel is not the same"),
    ("[first] t = Conv(x, w) r = Softmax<axis=1>(t) [second] y = Conv(r, v)", "Softmax:r reads its output, after which"),
    ("[first] t = Conv(x, w) r = MaxPool<kernel_shape=[2,2]>(t) [second] y = Conv(r, v)", "MaxPool:r reads its output"),
    ("[first] t = Conv(x, w) r = Add(t, t) [second] y = Conv(r, v)", "Add:r reads its output, after which"),
    ("[first] t = Conv(x, w) r = Transpose<perm=[0,1,3,2]>(t) [second] y = Conv(r, v)", "Transpose:r reads its output"),
    ("[first] t = Conv(x, w) u = Neg(x) r = PRelu(t, u) [second] y = Conv(r, v)", "PRelu:r reads its output, after which"),
    ("[first] t = Conv(x, w) r = Pad(t, pads, one) [second] y = Conv(r, v)", "Pad:r reads its output, after which"),
    ("[first] t = Conv(x, w) r = Identity(t) q = Clip(r, , one) [second] y = Conv(q, v)", "Clip:q limits its output in"),
    ("[first] t = Conv(x, w) r = Relu(t) [second] y = Conv(r, w)", "its weights are used elsewhere too"),
    ("[first] t = Conv(x, w) r = Relu(t) [second] c = Conv(r, v) y = Conv(c, v)", "followed by second: its weights"),
    ("[first] t = Conv(x, w) r = Relu(t) [second] y = Conv(r, hole)", "followed by second: its weights are not finite"),
    ("[first] t = Conv(x, endless) r = Relu(t) [second] y = Conv(r, v)", "its weights are not finite"),
    ("[first] t = Conv(x, w) r = Relu(t) [second] y = MatMul(r, square)", "followed by second, which reads other channels"),
    ("[first] t = MatMul(x, square) r = Relu(t) [second] y = Conv(r, v)", "followed by second, which reads other channels"),
    ("[first] t = MatMul(x, square) r = Min(t, steps) [second] y = MatMul(r, square2)", "Min:r limits its output along"),
    ("[first] t = MatMul(x, square) r = ReduceMean<axes=[3]>(t) [second] y = Conv(r, v)",
     "ReduceMean:r reads its output, whose channels are not along axis 1"),
    ("[first] t = Conv(x, computed) y = Relu(t) computed = Identity(x)", "weights are computed at run time"),
    ("""[first] y = If(yes) <then_branch = a () => (float[N,4,5,4] u) { u = Conv(x, w) },
        else_branch = b () => (float[N,4,5,4] u) { u = Conv(x, v) }>""", "its subgraphs have layers"),
    ("""[first] t = Conv(x, w) q = If(yes) <then_branch = a () => (float[N,4,5,4] u) { u = Neg(t) },
        else_branch = b () => (float[N,4,5,4] u) { u = Identity(t) }> [second] y = Conv(q, v)""", "If:q reads its output"),
    ("[first] t = Conv(x, w) r = QuantizeLinear(t, one) q = DequantizeLinear(r, one) [second] y = Conv(q, v)",
     "QuantizeLinear:r reads its output, after which"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), LEFT, ids=str)
def test_what_is_left_has_a_reason(text, reason):
    constants = {
        "w": uneven(4, 4, 1, 1), "v": weights(4, 4, 1, 1, seed=1), "square": weights(4, 4), "square2": weights(4, 4, seed=2),
        "pads": np.int64([0, 0, 1, 0, 0, 0, 0, 0]), "one": np.float32(1),
        "hole": np.full((4, 4, 1, 1), np.nan, np.float32), "endless": np.full((4, 4, 1, 1), np.inf, np.float32),
        "steps": np.float32([1, 2, 3, 4]).reshape(4, 1, 1), "yes": np.bool_(True),
    }  # fmt: skip
    if "computed" in text:
        text = "computed = Abs(x)" + text.replace("computed = Identity(x)", "")
    size = 4 if "computed" not in text else 1
    header = f"g (float[{size},4,5,4] x) => (float[A,B,C,D] y)"
    model = model_from_text(
        f"{header} {{ {text} }}", **{name: each for name, each in constants.items() if re.search(rf"\b{name}\b", text)}
    )
    result = equalize(model)
    assert result.left["first"].startswith(reason)
    assert not [each for each in result.chains if each.chain.layers[0].name == "first"]
    if "hole" not in text and "endless" not in text:
        assert_same_function(model, result.model, {"x": samples(size, 4, 5, 4)}, tolerance=1e-6)


def test_a_function_with_layers():
    values = ", ".join(["0.5"] * 16)
    text = f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[2,4] x) => (float[2,4] y) <float[4,4] w = {{{values}}}> {{
        [first] t = Gemm(x, w) r = Relu(t) [second] y = own.layer(r, w)
    }} <opset_import: ["" : 17], domain: "own"> layer (x, w) => (y) {{ y = MatMul(x, w) }}"""
    result = equalize(onnx.parser.parse_model(text))
    assert result.left["second"] == "its function has layers, which are not corrected"
    assert "first" in result.left
    assert result.chains == []


@pytest.mark.parametrize("text", ["y = Relu(x)", f"{batch_norm('x', 'y')}"])
def test_models_without_layers(text):
    constants = batch_norm_constants(4) if "Norm" in text else {}
    model = model_from_text(f"g (float[N,4] x) => (float[N,4] y) {{ {text} }}", **constants)
    result = equalize(model, samples(3, 4))
    assert result.model == model
    assert (result.folds, result.chains, result.high_biases, result.changes, result.change) == ([], [], [], {}, None)
    assert result.left.keys() == ({"norm"} if constants else set())


# ReLU6 and other clips

BOUNDS = {"low": np.float32(0), "high": np.float32(6)}
RELU6 = "r = Clip(t, low, high)"


def test_relu6_gets_a_bound_for_each_channel():
    model = pair(*CONV, RELU6, **BOUNDS)
    result = check(model, {"x": 8 * samples(3, 3, 6, 5)})
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Relu", "Min", "Conv"]
    (chain,) = result.chains
    assert chain.limits == ["Clip:r"]
    bound = constants_of(result.model)[result.model.graph.node[2].input[1]]
    np.testing.assert_allclose(bound, (6 / chain.factors[0]).reshape(4, 1, 1), rtol=1e-6)
    assert chain.bits > 0.25
    again = equalize(result.model)
    assert again.left.keys() == {"second"}
    np.testing.assert_allclose(again.chains[0].factors[0], 1, rtol=1e-6)
    assert [node.op_type for node in again.model.graph.node] == ["Conv", "Relu", "Min", "Conv"]


def test_relu6_that_is_not_worth_a_bound_for_each_channel():
    model = pair("Conv", "ConvTranspose(r, v)", (4, 5, 2, 2), RELU6, **BOUNDS)
    result = equalize(model)
    assert result.model == model
    assert re.fullmatch(r"Clip:r would need a bound for each channel, to gain -?0\.\d\d bits", result.left["first"])


def test_relu6_in_a_chain_that_gains_nothing_ends_it_there_only():
    text = """g (float[N,3,6,5] x) => (float[N,A,B,C] y) {
        [one] t = Conv(x, w) r = Clip(t, low, high) [two] u = Conv<group=4>(r, d) s = Relu(u) [three] y = Conv(s, v)
    }"""
    constants = {"w": np.ones((4, 3, 1, 1), np.float32), "d": uneven(4, 1, 2, 2), "v": np.ones((2, 4, 1, 1), np.float32)}
    result = equalize(model_from_text(text, **constants, **BOUNDS))
    assert [[layer.name for layer in each.chain.layers] for each in result.chains] == [["two", "three"]]
    assert "Clip:r would need a bound for each channel" in result.left["one"]


def test_relu6_becomes_relu_where_asked():
    text = """g (float[N,3,6,5] x) => (float[N,A,B,C] y) {
        [one] t = Conv(x, w) [a] r = Clip(t, low, high) [two] u = Conv(r, v) [b] s = Clip(u, low, other)
        [three] q = Conv(s, k) [c] y = Clip(q, low, high)
    }"""
    constants = {"w": uneven(4, 3, 1, 1), "v": weights(4, 4, 1, 1), "k": weights(2, 4, 1, 1)}
    model = model_from_text(text, **constants, **BOUNDS, other=np.float32(1e6))
    x = 8 * samples(3, 3, 6, 5)
    with pytest.warns(UserWarning, match=r"the float outputs moved by up to .* of the largest\)"):
        result = equalize(model, x, replace_relu6=True)
    assert result.replaced == ["a", "c"]
    assert result.chains[0].limits == []
    moved = [np.abs(each - run(model, {"x": x})[0]).max() for each in run(result.model, {"x": x})]
    assert result.changes["ReLU6 to ReLU"].absolute == pytest.approx(moved[0], rel=1e-5)
    assert result.changes["ReLU6 to ReLU"].relative > 0.01
    assert result.changes["scaling"].absolute == pytest.approx(moved[0], rel=1e-5)
    assert {node.op_type for node in result.model.graph.node if node.name in ("a", "c")} == {"Relu"}
    as_relu = equalize_model(model, replace_relu6=True)
    assert as_relu == result.model
    assert equalize(model, x).change.relative < 1e-6


# Bias correction behind it

SAMPLES = 20000
QUANT = QuantParams("tf", weight_bits=4)
PARAMS = BiasCorrectionParams(SAMPLES, SAMPLES, SAMPLES, ["x"], ["y"])


def toy(activation="r = Relu(n)", **constants):
    """first -> norm -> activation -> second: what norm makes of samples from a normal distribution is as it says.

    Each channel of the first layer copies one of the input, so that channels are independent; norm's statistics are theirs.
    """
    rng = np.random.default_rng(50)  # one of those where stale statistics are as far off as none
    channels = 16
    text = f"""g (float[N,16] x) => (float[N,6] y) {{
        [first] t = Gemm(x, w) {batch_norm("t", "n", epsilon=0.0)} {activation} [second] y = Gemm(r, v, b)
    }}"""
    gain = 4.0 ** rng.integers(-1, 2, channels)
    norm = {
        "gamma": rng.uniform(0.2, 1.2, channels),
        "beta": np.where(np.arange(channels) % 4 == 0, 4, rng.normal(0.2, 0.6, channels)),
    }
    norm |= {"mean": np.zeros(channels), "var": gain**2}
    arrays = {"w": np.diag(gain), "v": rng.normal(0.05, 1, (channels, 6)) / 4 / gain[:, None] ** 0.5, "b": np.zeros(6)}
    arrays |= {f"norm_{key}": each for key, each in norm.items()}
    return model_from_text(text, **{key: each.astype(np.float32) for key, each in arrays.items()}, **constants)


X_TOY = np.random.default_rng(9).standard_normal((SAMPLES, 16)).astype(np.float32)


def residual(corrected, model):
    """How far the mean output of the second layer, its weights quantized, is from that of the float model."""
    layer = layers_of(corrected)["second"]
    node = next(each for each in corrected.graph.node if each.name == "second")
    coarse = with_constants(corrected, **{node.input[1]: QUANT.fake_quantized(layer)})
    shift = run(coarse, {"x": X_TOY})[0] - run(model, {"x": X_TOY})[0]
    return np.abs(shift.mean(axis=0, dtype=np.float64)).max()


def by_statistics(model, info):
    return BiasCorrection.analytical_bias_correction_per_layer(model, "second", info, QUANT)


def test_statistics_follow():
    model = toy()
    stale = find_all_convs_bn_with_activation(model)
    current = dict(stale)
    equalized = equalize_model(model, conv_bn_dict=current)
    assert equalize(model).high_biases[0].folded.any()
    assert residual(equalized, model) == pytest.approx(0.2, abs=0.03)
    elsewhere = replace(stale["second"].input_bn, name="elsewhere")  # so that it is taken as it is
    assert residual(by_statistics(equalized, replace(stale["second"], input_bn=elsewhere)), model) > 0.15
    found = find_all_convs_bn_with_activation(onnx.ModelProto.FromString(equalized.SerializeToString()))
    for infos in (current, found, stale):
        assert residual(by_statistics(equalized, infos["second"]), model) < 0.01
    for infos in (stale, current, None):
        corrected = BiasCorrection.correct_bias(equalized, PARAMS, QUANT, X_TOY, infos, False)
        assert residual(corrected, model) < 0.01


def test_statistics_of_normalizations_that_became_one():
    norms = batch_norm_constants(3, "one") | batch_norm_constants(3, "two", seed=4)
    text = f"""g (float[N,3,6,5] x) => (float[N,4,6,5] y) {{
        {batch_norm("x", "a", "one")} {batch_norm("a", "b", "two")} [layer] y = Conv(b, w)
    }}"""
    model = model_from_text(text, w=weights(4, 3, 1, 1), **norms)
    stale = find_all_convs_bn_with_activation(model)["layer"]
    equalized = equalize_model(model)
    current = find_all_convs_bn_with_activation(equalized)["layer"]
    np.testing.assert_array_equal(current.input_bn.beta, norms["one_mean"])
    expected, found = (
        BiasCorrection.analytical_bias_correction_per_layer(equalized, "layer", info, QUANT) for info in (current, stale)
    )
    assert found == expected


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(TypeError, match="replace_relu6: 'no', expected True or False"):
        equalize(pair(*CONV), replace_relu6="no")


@pytest.mark.parametrize("replace_relu6", [False, True])
def test_statistics_follow_through_relu6(replace_relu6):
    model = toy("r = Clip(n, low, high)", low=np.float32(0), high=np.float32(3))
    if replace_relu6:
        model = toy("r = Clip(n, low, high)", low=np.float32(0), high=np.float32(6))
    stale = find_all_convs_bn_with_activation(model)
    current = dict(stale)
    equalized = equalize_model(model, conv_bn_dict=current, replace_relu6=replace_relu6)
    (chain,) = equalize(model, replace_relu6=replace_relu6).chains
    assert len(chain.limits) == (not replace_relu6)
    activation = current["second"].in_activation_type
    if replace_relu6:
        assert activation == ActivationType.relu
    else:
        np.testing.assert_allclose(activation.bounds[1], 3 / chain.factors[0], rtol=1e-6)
    float_model = toy() if replace_relu6 else model
    assert residual(equalized, float_model) > 0.1
    for infos in (stale, current):
        assert residual(by_statistics(equalized, infos["second"]), float_model) < 0.01


# Bad input


@pytest.mark.parametrize("quant_format", list(QuantFormat))
@pytest.mark.parametrize(
    "entry",
    [
        equalize,
        equalize_model,
        fold_all_batch_norms,
        lambda model: fold_given_batch_norms(model, []),
        CrossLayerScaling.scale_model,
        lambda model: CrossLayerScaling.scale_cls_sets(model, []),
        lambda model: HighBiasFold.bias_fold(model, [], []),
    ],
)
def test_quantized_models_are_refused(entry, quant_format):
    model = quantized(two_layers(), [{"x": samples(4, 3, 6, 6)}], quant_format=quant_format)
    with pytest.raises(
        ValueError, match=r"(model|reference): layer first(_quant)? has quantized weights; equalize the float model"
    ):
        entry(model)


def with_metadata(model, value):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    next(each for each in copy.metadata_props if each.key == "biascorr.folded").value = value
    return copy


def metadata_of(model):
    return json.loads(next(each.value for each in model.metadata_props if each.key == "biascorr.folded"))


def entry_of(beta, gamma):
    beta, gamma = (base64.b64encode(np.float32(each).tobytes()).decode() for each in (beta, gamma))
    return json.dumps({"t": ["norm", beta, gamma]})


@pytest.mark.parametrize(
    "value",
    [
        "", "[]", "{", '{"t": 5}', '{"t": []}', '{"t": ["norm", "AAAA"]}', '{"t": ["norm", "?", "?"]}', '{"t": [5, "", ""]}',
        entry_of(np.ones(16), np.ones(15)), entry_of(np.full(16, np.nan), np.ones(16)), entry_of(np.ones(16), -np.ones(16)),
        entry_of(np.full(16, np.inf), np.ones(16)), entry_of(np.ones(16), np.full(16, np.nan)),
    ],
)  # fmt: skip
def test_metadata_that_somebody_changed(value):
    model = with_metadata(fold_all_batch_norms(toy())[0], value)
    for entry in (equalize, find_all_convs_bn_with_activation):
        with pytest.raises(ValueError, match="metadata 'biascorr.folded': .*expected what biascorr writes there, or nothing"):
            entry(model)


@pytest.mark.parametrize("channels", [0, 5, 32])
def test_metadata_of_another_number_of_channels_tells_nothing(channels):
    model = fold_all_batch_norms(toy())[0]
    ((tensor, (*_, digest)),) = metadata_of(model).items()
    entry = json.loads(entry_of(np.full(channels, 9), np.ones(channels)))["t"]
    model = with_metadata(model, json.dumps({tensor: [*entry, digest]}))
    result = equalize(model)
    assert result.high_biases == []
    assert_same_function(model, result.model, {"x": X_TOY[:5]}, tolerance=1e-6)


def is_known(model):
    """Whether the mean of what the second layer reads is."""
    found = find_all_convs_bn_with_activation(model)
    return "second" in found and found["second"].input_bn is not None


FOLDED = {
    "Gemm": ("[first] t = Gemm(x, w, b)", (4,), (5, 4)),
    "MatMul": ("m = MatMul(x, w) [first] t = Add(m, b)", (4,), (5, 4)),
    "Conv": ("[first] t = Conv(x, w, b)", (5, 3, 3), (4, 5, 1, 1)),
    "constant nodes": ("[first] t = Conv(x, w, b)", (5, 3, 3), (4, 5, 1, 1)),
    "transposed": ("u = Transpose<perm=[1,0]>(w) [first] t = Gemm(x, u, b)", (4,), (4, 5)),
}


@pytest.mark.parametrize("changed", ["nothing", "first weights", "first bias", "second weights", "digest", "corrected"])
@pytest.mark.parametrize("how", FOLDED)
def test_statistics_belong_to_weights(how, changed):
    layer, shape, w = FOLDED[how]
    operator = "Gemm" if len(shape) == 1 else "Conv"
    text = f"""g (float[{"N,5" if len(shape) == 1 else "N,5,3,3"}] x) => (float[{",".join("ABCD"[: 1 + len(shape)])}] y) {{
        {layer} {batch_norm("t", "n")} r = Relu(n) [second] y = {operator}(r, v) }}"""
    v = weights(4, 6) if operator == "Gemm" else weights(6, 4, 1, 1)
    model = fold_all_batch_norms(model_from_text(text, w=weights(*w), b=biases(4), v=v, **batch_norm_constants(4)))[0]
    assert is_known(model)
    arrays = constants_of(model)
    names = {"second weights": next(node.input[1] for node in model.graph.node if node.name == "second")}
    names["first weights"] = next(name for name, each in arrays.items() if each.ndim > 1 and name != names["second weights"])
    names["first bias"] = next(name for name, each in arrays.items() if each.shape == (4,))
    if changed in names:
        model = with_constants(model, **{names[changed]: arrays[names[changed]] * np.float32(1.5)})
    elif changed == "corrected":
        network = OnnxNetwork.load(model, "model")
        model = network.with_shifts({network.layers[0].name: np.ones(4)}).model
    elif changed == "digest":
        model = with_metadata(model, json.dumps({name: entry[:3] for name, entry in metadata_of(model).items()}))
    if how == "constant nodes":
        model = as_constant_nodes(model)
    assert is_known(model) == (changed in ("nothing", "second weights", "corrected"))


def test_what_equalize_raises_for():
    with pytest.raises(FileNotFoundError):
        equalize("missing.onnx")
    with pytest.raises(TypeError, match="reference: "):
        equalize(5)
    with pytest.raises(ValueError, match="x"):
        equalize(toy(), {"x": X_TOY[:, :5]})


def test_nothing_that_is_given_changes(tmp_path):
    model = toy()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    before = path.read_bytes()
    result = equalize(path, X_TOY[:8])
    equalize(model)
    assert model == onnx.load_from_string(before)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert result.model == equalize(before, X_TOY[:8]).model
    with pytest.raises(FileExistsError):
        result.save(path)
    result.save(path, force=True, provenance=False)
    assert onnx.load(path) == result.model
