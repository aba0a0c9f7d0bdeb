"""Copies of ONNX models with other weights, biases and activations, and without operations."""

import re

import numpy as np
import onnx
import pytest
from onnx import helper

from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph.network import Edits
from biascorr.graph.operations import BatchNorm
from networks import as_constant_nodes, biases, constants_of, model_from_text, run, samples, two_layers, weights

X = samples(2, 3, 5, 4)
BRANCHES = (
    "then_branch = a () => (float[N,3,5,4] u) { u = Neg(t) }, else_branch = b () => (float[N,3,5,4] v) { v = Identity(t) }"
)


def edited(model, **edits):
    """The network with these edits: a valid model, beside one that is as it was."""
    network = OnnxNetwork.load(model, "model")
    before = network.model.SerializeToString()
    copy = network.edited(Edits(**edits))
    assert network.model.SerializeToString() == before
    onnx.checker.check_model(copy.model, full_check=True)
    return OnnxNetwork.load(copy.model, "model")


def only_layer(network):
    (layer,) = network.layers
    return layer


def outputs(model, x=X, names=()):
    return run(model, {"x": x}, names)


LAYERS = [
    ("Conv(x, w, b)", (2, 3, 1, 1), {"b": (2,)}, (2, 1, 1)),
    ("Conv(x, w)", (2, 3, 1, 1), {}, None),
    ("ConvTranspose(x, w, b)", (3, 2, 1, 1), {"b": (2,)}, (2, 1, 1)),
    ("Conv<group=3>(x, w, b)", (6, 1, 1, 1), {"b": (6,)}, (6, 1, 1)),
    ("MatMul(x, w)", (4, 6), {}, None),
    ("MatMul(w, x)", (6, 5), {}, None),
]
BEHIND = [
    ("Conv(x, w)", (2, 3, 1, 1), "y = Add(t, b)", (1, 2, 1, 1)),
    ("Conv(x, w)", (2, 3, 1, 1), "y = Add(b, t)", (2, 5, 4)),
    ("Conv(x, w)", (2, 3, 1, 1), "y = Add(t, b)", ()),
    ("Conv(x, w)", (2, 3, 1, 1), "y = Add(t, b)", (4,)),
    ("MatMul(x, w)", (4, 6), "y = Add(t, b)", (6,)),
    ("MatMul(w, x)", (6, 5), "y = Add(t, b)", (6, 1)),
    ("Conv(x, w)", (2, 3, 5, 4), "y = Add(t, b)", (2, 5, 4)),
]


def with_layer(layer, shape, behind="y = Identity(t)", *, x="N,3,5,4", y="N,A,B,C", opset=17, **constants):
    text = f"g (float[{x}] x) => (float[{y}] y) {{ [layer] t = {layer} {behind} }}"
    return model_from_text(text, w=weights(*shape), opset=opset, ir_version=3 if opset < 9 else 8, **constants)


def channels_aligned(layer, array):
    return array.reshape(-1, *[1] * (-1 - layer.output_axis))


@pytest.mark.parametrize("opset", [7, 11, 21])
@pytest.mark.parametrize(("layer", "shape", "own", "bias"), LAYERS, ids=str)
def test_biases_in_and_of_layers(layer, shape, own, bias, opset):
    model = with_layer(layer, shape, opset=opset, **{name: biases(*each) for name, each in own.items()})
    before = only_layer(OnnxNetwork.load(model, "model"))
    assert (None if before.bias is None else before.bias.shape) == bias
    wanted = biases(before.channels, seed=5)
    network = edited(model, biases={"layer": wanted})
    after = only_layer(network)
    np.testing.assert_array_equal(after.bias, channels_aligned(after, wanted))
    change = channels_aligned(before, wanted) - (0 if before.bias is None else before.bias)
    (expected,), (found,) = outputs(model), outputs(network.model)
    np.testing.assert_array_equal(found, expected + change)


@pytest.mark.parametrize("constant_nodes", [False, True])
@pytest.mark.parametrize(("layer", "shape", "behind", "bias"), BEHIND, ids=str)
def test_biases_behind_layers(layer, shape, behind, bias, constant_nodes):
    model = with_layer(layer, shape, behind, b=biases(*bias))
    if constant_nodes:
        model = as_constant_nodes(model)
    before = only_layer(OnnxNetwork.load(model, "model"))
    np.testing.assert_array_equal(before.bias, biases(*bias))
    assert before.output == "y"
    wanted = biases(before.channels, seed=5)
    network = edited(model, biases={"layer": wanted})
    change = channels_aligned(before, wanted) - before.bias
    (expected,), (found,) = outputs(model), outputs(network.model)
    np.testing.assert_array_equal(found, expected + change)
    assert [node.op_type for node in network.model.graph.node if node.op_type != "Constant"] == [layer.split("(")[0], "Add"]
    again = edited(network.model, biases={"layer": only_layer(network).bias + 1})
    np.testing.assert_array_equal(outputs(again.model)[0], found + 1)


@pytest.mark.parametrize(
    ("attributes", "c"),
    [
        ("alpha=2.0", None),
        ("alpha=2.0, beta=0.5", (6,)),
        ("beta=0.5", (1, 6)),
        ("beta=0.5", (2, 6)),
        ("beta=0.5", (2, 1)),
        ("beta=0.5", ()),
    ],
)
def test_biases_of_a_gemm(attributes, c):
    text = f"g (float[2,4] x) => (float[2,6] y) {{ [layer] y = Gemm<{attributes}>(x, w{'' if c is None else ', c'}) }}"
    x, constants = samples(2, 4), {} if c is None else {"c": biases(*c)}
    model = model_from_text(text, w=weights(4, 6), **constants)
    before = only_layer(OnnxNetwork.load(model, "model"))
    if c is not None:
        np.testing.assert_array_equal(before.bias, 0.5 * biases(*c))
        same = edited(model, biases={"layer": before.bias})
        np.testing.assert_array_equal(outputs(same.model, x)[0], outputs(model, x)[0])
        assert constants_of(same.model)["c"].shape == c
    network = edited(model, biases={"layer": biases(6, seed=5)})
    change = biases(6, seed=5) - (0 if before.bias is None else before.bias)
    np.testing.assert_array_equal(outputs(network.model, x)[0], outputs(model, x)[0] + change)


def test_a_bias_through_a_reshape_and_a_cast():
    behind = "c = Cast<to=1>(b) r = Reshape(c, s) y = Add(t, r)"
    model = with_layer("Conv(x, w)", (2, 3, 1, 1), behind, b=biases(2, dtype="float16"), s=np.int64([2, 1, 1]))
    layer = only_layer(OnnxNetwork.load(model, "model"))
    np.testing.assert_array_equal(layer.bias, biases(2).reshape(2, 1, 1))
    network = edited(model, biases={"layer": biases(2) + 1})
    np.testing.assert_array_equal(outputs(network.model)[0], outputs(model)[0] + 1)
    assert [node.op_type for node in network.model.graph.node] == ["Conv", "Add"]
    assert len(network.model.graph.initializer) == 2


def test_a_shared_bias_gets_a_copy():
    text = "g (float[N,3,5,4] x) => (float[N,2,5,4] y) { [a] s = Conv(x, w, b) [b] t = Conv(x, w, b) y = Add(s, t) }"
    model = model_from_text(text, w=weights(2, 3, 1, 1), b=biases(2))
    network = edited(model, biases={"a": biases(2) + 1})
    first, second = network.layers
    np.testing.assert_array_equal(first.bias - second.bias, np.ones((2, 1, 1)))


def test_edits_of_quantized_layers_are_real():
    text = """g (float[N,3,5,4] x) => (float[N,2,5,4] y) {
        d = DequantizeLinear<axis=0>(w, s, z)
        e = DequantizeLinear(b, sb)
        [layer] y = Conv(x, d, e)
    }"""
    steps = np.float32([0.25, 0.5])
    w = np.arange(6, dtype=np.int8).reshape(2, 3, 1, 1)
    model = model_from_text(text, w=w, s=steps, z=np.int8([1, 2]), b=np.int32([3, 4]), sb=np.float32(0.125))
    layer = only_layer(OnnxNetwork.load(model, "model"))
    np.testing.assert_array_equal(layer.bias.ravel(), [0.375, 0.5])
    network = edited(model, weights={"layer": np.asarray(layer.weights) * 0.3}, biases={"layer": np.float64([0.1, 0.2])})
    after = only_layer(network)
    np.testing.assert_array_equal(after.weights, np.asarray(layer.weights) * np.float32(0.3))
    np.testing.assert_array_equal(after.bias.ravel(), np.float32([0.1, 0.2]))
    assert [node.op_type for node in network.model.graph.node] == ["Conv"]
    assert len(network.model.graph.initializer) == 2


@pytest.mark.parametrize("opset", [7, 10, 13, 21])
def test_a_removed_operation_takes_its_constants_along(opset):
    text = "g (float[N,3,5,4] x) => (float[N,3,5,4] y) { s = Relu(x) [norm] n = BatchNormalization(s, g, b, m, v) y = Abs(n) }"
    ones, unused = dict.fromkeys("gbmv", np.ones(3, np.float32)), np.ones(7, np.float32)
    constants = {name: array + k for k, (name, array) in enumerate(ones.items())}
    model = model_from_text(text, **constants, unused=unused, opset=opset, ir_version=3 if opset < 9 else 8)
    for name in ("s", "n"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, 5, 4]))
    model.graph.quantization_annotation.add(tensor_name="n")
    network = edited(model, removed=["norm"])
    graph = network.model.graph
    assert not graph.quantization_annotation
    assert [(node.op_type, *node.input) for node in graph.node] == [("Relu", "x"), ("Abs", "s")]
    assert list(constants_of(network.model)) == ["unused"]
    assert [value.name for value in graph.value_info] == ["s"]
    assert [value.name for value in graph.input] == (["x", "unused"] if opset < 9 else ["x"])
    np.testing.assert_array_equal(outputs(network.model)[0], np.maximum(X, 0))


def test_what_a_removed_operation_computed_goes_too():
    branches = "then_branch = a () => (float u) { u = Neg(c) }, else_branch = b () => (float v) { v = Neg(c) }"
    text = f"g (float[N,3,5,4] x) => (float[N,3,5,4] y) {{ i = If(f) <{branches}> [sum] s = Add(x, i) y = Neg(s) }}"
    network = edited(model_from_text(text, c=np.float32(0), f=np.bool_(True)), removed=["sum"])
    assert [node.op_type for node in network.model.graph.node] == ["Neg"]
    assert not constants_of(network.model)


def test_what_is_said_of_a_tensor_that_another_node_makes_stays():
    text = f"g (float[N,3,5,4] x) => (float[N,3,5,4] y) {{ s = Abs(x) [out] t = Relu(s) y = If(f) <{BRANCHES}> }}"
    model = model_from_text(text, f=np.bool_(True))
    for name in ("s", "t"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, 5, 4]))
    assert [value.name for value in edited(model, removed=["out"]).model.graph.value_info] == ["t"]


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("s = Abs(x) [out] y = Identity(s)", ["Abs x -> y"]),
        ("s = Abs(x) [out] y = Identity(s) z = Neg(s)", ["Abs x -> y", "Neg y -> z"]),
        ("s = Abs(x) [out] y = Identity(s) z = Neg(y)", ["Abs x -> y", "Neg y -> z"]),
        ("z = Abs(x) [out] y = Identity(z)", ["Abs x -> z", "Identity z -> y"]),
        ("[out] y = Dropout(x)", ["Identity x -> y"]),
        ("s = Abs(x) [out] y = Max(c, s)", ["Abs x -> y"]),
        ("s = Abs(x) [out] t = Relu(s) y = Add(t, t)", ["Abs x -> s", "Add s s -> y"]),
        ("s = Abs(x) [a] t = Relu(s) [b] u = Relu(t) [out] y = Relu(u)", ["Abs x -> y"]),
        ("[out] t, mask = Dropout(x) y = Neg(t)", ["Neg x -> y"]),
        ("[out] y, mask = Dropout(x) z = Neg(x)", ["Identity x -> y", "Neg x -> z"]),
        ("s = Abs(x) [out] y = Identity(s) unread = Neg(s)", ["Abs x -> y", "Neg y -> unread"]),
        (f"[out] t = Dropout(x) i = Identity(f) y = If(i) <{BRANCHES}>", ["Identity x -> t", "Identity f -> i", "If i -> y"]),
        (f"t = Abs(x) [out] y = Identity(t) z = If(f) <{BRANCHES}>", ["Abs x -> t", "Identity t -> y", "If f -> z"]),
        (f"s = Abs(x) [out] t = Relu(s) y = If(f) <{BRANCHES}>", ["Abs x -> t", "If f -> y"]),
    ],
)
def test_removed_operations(text, nodes):
    outputs_of_graph = ", ".join(f"float[N,3,5,4] {name}" for name in "yz" if re.search(rf"\b{name}\b", text))
    model = model_from_text(f"g (float[N,3,5,4] x) => ({outputs_of_graph}) {{ {text} }}", c=np.float32(0), f=np.bool_(True))
    removed = [node.name for node in model.graph.node if node.name]
    if "mask" in text:
        model.graph.value_info.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, ["N", 3, 5, 4]))
    network = edited(model, removed=removed)
    assert not network.model.graph.value_info
    assert [" ".join([node.op_type, *node.input, "->", *node.output]) for node in network.model.graph.node] == nodes
    for found, expected in zip(outputs(network.model), outputs(model), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_layers_keep_their_names():
    text = """g (float[N,3,5,4] x) => (float[N,3,5,6] y) {
        r = Identity(x) t = Conv(r, w) u = MatMul(t, m) v = Conv(u, w) y = Identity(v)
    }"""
    model = model_from_text(text, w=weights(3, 3, 1, 1), m=weights(4, 6))
    names = ["Conv:t", "MatMul:u", "Conv:v"]
    assert [layer.name for layer in OnnxNetwork.load(model, "model").layers] == names
    edits = {"biases": {"MatMul:u": np.zeros(6)}, "removed": ["Identity:r", "Identity:y"]}
    network = edited(model, **edits)
    assert [layer.name for layer in network.layers] == names
    assert {value.name for value in network.model.graph.output} == {"y"}
    np.testing.assert_array_equal(outputs(network.model)[0], outputs(model)[0])


def test_a_nameless_layer_that_gets_a_bias_keeps_its_name():
    model = with_layer("MatMul(x, w)", (4, 6))
    model.graph.node[0].name = ""
    network = OnnxNetwork.load(model, "model")
    layer = only_layer(network)
    network = network.with_shifts({layer.name: np.ones(6)})
    assert only_layer(network).name == layer.name == "MatMul:t"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"weights": {"b": X}}, "weights: 'b' is no layer of the model"),
        ({"biases": {"relu": X}}, "biases: 'relu' is no layer of the model"),
        ({"removed": ["b"]}, "removed: 'b' is no operation of the model"),
        ({"removed": ["constant"]}, "removed: 'constant' is no operation of the model"),
        ({"removed": ["two"]}, "two: it cannot be removed: its output mask is read too"),
        ({"weights": {"layer": X}}, "layer layer: weights of shape (2, 3, 5, 4), expected (2, 3, 1, 1)"),
        ({"biases": {"layer": np.ones(3)}}, "layer layer: bias of shape (3,), expected (2,) or (2, 1, 1)"),
    ],
)
def test_edits_that_cannot_be(edits, message):
    text = "g (float[N,3,5,4] x) => (float[N,2,5,4] y, bool[A,B,C,D] m) "
    nodes = "[constant] v = Neg(w) [layer] t = Conv(x, v) [relu] r = Relu(t) [two] y, mask = Dropout(r) m = Identity(mask)"
    model = model_from_text(f"{text} {{ {nodes} }}", w=weights(2, 3, 1, 1))
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        OnnxNetwork.load(model, "model").edited(Edits(**edits))


FORMS = [
    "y = Conv(x, w)",
    "v = Identity(w) y = Conv(x, v)",
    "v = Reshape(flat, s) y = Conv(x, v)",
    "v = Transpose<perm=[1,0,2,3]>(t) y = Conv(x, v)",
    "v = Cast<to=1>(wide) y = Conv(x, v)",
    "v = Mul(w, two) y = Conv(x, v)",
]


@pytest.mark.parametrize("constant_nodes", [False, True])
@pytest.mark.parametrize("opset", [7, 13, 21])
@pytest.mark.parametrize("text", FORMS)
def test_weights_in_any_form(text, opset, constant_nodes):
    w = weights(2, 3, 1, 1)
    forms = {"w": w, "t": w.transpose(1, 0, 2, 3), "flat": w.ravel(), "wide": w.astype(np.float64), "two": np.float32(2)}
    forms |= {"s": np.int64(w.shape)}
    constants = {name: array for name, array in forms.items() if re.search(rf"\b{name}[,)]", text)}
    text = f"g (float[N,3,5,4] x) => (float[N,2,5,4] y) {{ {text} }}"
    model = model_from_text(text, **constants, opset=opset, ir_version=3 if opset < 9 and not constant_nodes else 8)
    if constant_nodes:
        model = as_constant_nodes(model)
    layer = only_layer(OnnxNetwork.load(model, "model"))
    assert not layer.shares_weights
    network = edited(model, weights={layer.name: 2 * np.asarray(layer.weights, np.float64)})
    np.testing.assert_array_equal(only_layer(network).weights, 2 * layer.weights)
    np.testing.assert_array_equal(outputs(network.model)[0], 2 * outputs(model)[0])
    graph = network.model.graph
    assert len(graph.node) + len(graph.initializer) == 2
    assert network.model.ByteSize() <= model.ByteSize() + len("_edited")


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("y = Conv(x, w) z = Conv(x, w)", True),
        ("v = Identity(w) y = Conv(x, v) z = Conv(x, w)", True),
        ("v = DequantizeLinear(q, one) y = Conv(x, v) u = DequantizeLinear(q, two) z = Conv(x, u)", True),
        ("v = Reshape(w, s) y = Conv(x, v) u = Reshape(r, s) z = Conv(x, u)", False),
        ("y = Conv(x, w) z = Identity(w)", True),
        ("y = Conv(x, w) z = Add(w, one)", True),
        ("y = Conv(x, w) z = If(f) <then_branch = a () => (float[A,B,C,D] u) { u = Neg(w) }, "
         "else_branch = b () => (float[A,B,C,D] v) { v = Identity(w) }>", True),
        ("v = Neg(w) y = Conv(x, v) u = Neg(w) z = Conv(x, u)", False),
    ],
)  # fmt: skip
def test_shared_weights(text, shared):
    w = weights(3, 3, 1, 1)
    forms = {"q": np.arange(9, dtype=np.int8).reshape(w.shape), "one": np.float32(1), "two": np.float32(2)}
    forms |= {"s": np.int64(w.shape), "f": np.bool_(True), "r": w + 1, "w": w}
    model = model_from_text(f"g (float[N,3,5,4] x) => (float[N,3,5,4] y, float[A,B,C,D] z) {{ {text} }}", **forms)
    first = OnnxNetwork.load(model, "model").layers[0]
    assert first.shares_weights == shared
    network = edited(model, weights={first.name: 2 * np.asarray(first.weights)})
    assert not network.layers[0].shares_weights
    for found, expected, factor in zip(outputs(network.model), outputs(model), (2, 1), strict=True):
        np.testing.assert_array_equal(found, factor * expected)


INF = np.inf
VECTOR = np.array([0.5, INF, 1.0]).reshape(3, 1, 1)
LIMITS = [
    ((-INF, INF), []),
    ((0, INF), ["Relu"]),
    ((0, 1), ["Clip"]),
    ((-0.5, INF), ["Clip"]),
    ((-INF, 0.25), ["Clip"]),
    ((0.5, 0.5), ["Clip"]),
    ((0, VECTOR), ["Relu", "Min"]),
    ((-VECTOR, INF), ["Max"]),
    ((-INF, VECTOR), ["Min"]),
    ((-VECTOR, VECTOR), ["Max", "Min"]),
    ((-1, VECTOR), ["Max", "Min"]),
    ((0, np.full((3, 1, 1), 6.0)), ["Clip"]),
    ((np.zeros((3, 1, 1)), np.full((3, 1, 1), INF)), ["Relu"]),
]
ACTIVATIONS = {"relu": "Relu(x)", "clip": "Clip(x, c, d)", "clip below": "Clip(x, c)", "max": "Max(x, c)", "min": "Min(c, x)"}


def clipping(activation, type_="float", opset=17, ends="y = Identity(t)"):
    if opset < 11:
        activation = re.sub(r"Clip\(x.*\)", "Clip<min=-1.0>(x)", activation)
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[type_]
    constants = {name: dtype(k) for k, name in enumerate("cd", -1) if re.search(rf"[ (]{name}[,)]", activation)}
    text = f"g ({type_}[N,3,5,4] x) => ({type_}[N,3,5,4] y) {{ [act] t = {activation} {ends} }}"
    return model_from_text(text, **constants, opset=opset, ir_version=3 if opset < 9 else 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("opset", [8, 10, 11, 13, 21])
@pytest.mark.parametrize(("limits", "operators"), LIMITS, ids=str)
def test_limits(limits, operators, opset, activation):
    network = edited(clipping(ACTIVATIONS[activation], opset=opset), limits={"act": limits})
    *nodes, last = network.model.graph.node
    assert [node.op_type for node in nodes] == operators
    assert last.input[0] == ("t" if operators else "x")
    assert [node.name for node in nodes] == ["act", *[f"act_{op}" for op in operators[1:]]][: len(operators)]
    assert len(network.model.graph.initializer) == sum(len(node.input) - 1 for node in nodes)
    assert len(network.model.graph.input) == 1 + (opset < 9) * len(network.model.graph.initializer)
    x = (X - 1).astype(np.float32)
    x[0, :, 0, 0] = np.nan
    x[0, :, 1, 0], x[0, :, 2, 0] = INF, -INF
    (found,) = outputs(network.model, x)
    np.testing.assert_array_equal(found, np.clip(x, *limits))


@pytest.mark.parametrize("type_", ["float16", "double"])
@pytest.mark.parametrize("opset", [8, 11, 12, 21])
@pytest.mark.parametrize("limits", [(-1, 1), (-INF, 0.25), (-VECTOR, VECTOR), (0, 1e300), (0, VECTOR)], ids=str)
def test_limits_of_other_types(type_, opset, limits):
    network = edited(clipping("Relu(x)", type_, opset), limits={"act": limits})
    x = (X - 1).astype(np.float16 if type_ == "float16" else np.float64)
    (found,) = outputs(network.model, x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, np.clip(x.astype(np.float64), *limits))


def test_limits_of_numbers_before_max_and_min_broadcast():
    network = edited(clipping("Relu(x)", opset=7), limits={"act": (-1, 2)})
    np.testing.assert_array_equal(outputs(network.model)[0], X.clip(-1, 2))
    with pytest.raises(ValueError, match="act: such limits need opset 8 or newer, the model has 7"):
        network.edited(Edits(limits={"act": (-1, VECTOR)}))


def test_limits_behind_a_layer_whose_type_nothing_else_tells():
    text = "g (float[N,3,5,4] x) => (float[N,A,B,C] y) { a = com.microsoft.Gelu(x) [layer] t = Conv(a, w) [act] y = Relu(t) }"
    model = model_from_text(text, w=weights(2, 3, 1, 1))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    network = OnnxNetwork.load(model, "model").edited(Edits(limits={"act": (0, 1)}))
    np.testing.assert_array_equal(outputs(network.model)[0], np.minimum(outputs(model)[0], 1))
    del model.graph.node[1]
    model.graph.node[1].input[0] = "a"
    with pytest.raises(ValueError, match="act: the type of a, which it limits, is not known"):
        OnnxNetwork.load(model, "model").edited(Edits(limits={"act": (0, 1)}))


def test_limits_of_an_output_of_the_model():
    network = edited(clipping("Relu(x)", ends="y = Neg(t) [out] z = Relu(x)"), limits={"act": (-INF, INF), "out": (0, VECTOR)})
    np.testing.assert_array_equal(outputs(network.model)[0], -X)


@pytest.mark.parametrize(
    ("text", "limits", "message"),
    [
        ("Relu(x)", (1, 0), "act: limits 1.0 and 0.0, expected the first to be at most the second"),
        ("Relu(x)", (0, np.nan), "act: limits 0.0 and nan, expected the first to be at most the second"),
        ("Sigmoid(x)", (0, 1), "limits: 'act' is no activation that limits values of the model"),
        ("Max(x, x)", (0, 1), "limits: 'act' is no activation that limits values of the model"),
    ],
)
def test_limits_that_cannot_be(text, limits, message):
    with pytest.raises(ValueError, match=message):
        OnnxNetwork.load(clipping(text), "model").edited(Edits(limits={"act": limits}))


def norm(name="bn", *, beta=(0.5, -1.0), gamma=(2.0, 0.25)):
    beta, gamma = np.float64(beta), np.float64(gamma)
    return BatchNorm(name, beta, gamma, beta, gamma**2, 0.0)


def folded_in(network):
    return {tensor: (each.name, *each.beta, *each.gamma) for tensor, each in network.facts().statistics.items()}


CHAIN = "g (float[N,3,5,4] x) => (float[N,3,5,4] y) { [a] s = Abs(x) [b] t = Relu(s) [c] u = Identity(t) [d] y = Neg(u) }"


def test_what_is_known_of_tensors_is_kept_in_the_model(tmp_path):
    model = model_from_text(CHAIN)
    assert folded_in(OnnxNetwork.load(model, "model")) == {}
    network = edited(model, statistics={"s": norm("one"), "y": norm("two", beta=(0.1, 1e30))})
    network.save(tmp_path / "model.onnx")
    again = OnnxNetwork.load(tmp_path / "model.onnx", "model")
    assert folded_in(again)["s"] == ("one", 0.5, -1.0, 2.0, 0.25)
    assert folded_in(again)["y"] == ("two", *np.float32([0.1, 1e30]).astype(np.float64), 2.0, 0.25)
    known = again.facts().statistics["s"]
    assert (known.epsilon, known.beta.dtype) == (0.0, np.float64)
    np.testing.assert_array_equal([known.mean, known.variance], [known.beta, known.gamma**2])
    assert [entry.key for entry in again.model.metadata_props] == ["author", "biascorr.folded"]
    assert again.model.metadata_props[1].value.startswith('{"s":["one","AAAAPwAAgL8=","AAAAQAAAgD4=","')


def test_what_was_known_of_other_tensors_stays():
    network = edited(model_from_text(CHAIN), statistics={"s": norm("one"), "t": norm("two")})
    network = edited(network.model, statistics={"t": norm("three")})
    assert {tensor: each[0] for tensor, each in folded_in(network).items()} == {"s": "one", "t": "three"}
    assert folded_in(edited(network.model)) == folded_in(network)


@pytest.mark.parametrize(
    ("given", "edits", "found"),
    [
        ("t", {"removed": "b"}, {"s": "t"}),
        ("st", {"removed": "b"}, {"s": "t"}),
        ("ts", {"removed": "b"}, {"s": "t"}),
        ("s", {"removed": "b"}, {"s": "s"}),
        ("u", {"removed": "bc"}, {"s": "u"}),
        ("u", {"removed": "cb"}, {"s": "u"}),
        ("tu", {"removed": "dc"}, {"y": "u"}),
        ("s", {"removed": "dcb"}, {"y": "s"}),
        ("x", {"removed": "abcd"}, {"x": "x"}),
        ("y", {"removed": "abcd"}, {"y": "y"}),
        ("st", {"limits": {"b": (-INF, INF)}}, {"s": "t"}),
        ("st", {"limits": {"b": (-1, VECTOR)}}, {"s": "s", "t": "t"}),
        ("z", {}, {}),
    ],
)
@pytest.mark.parametrize("known_before", [False, True])
def test_what_is_known_moves_with_the_tensors(given, edits, found, known_before):
    folded, model = {tensor: norm(tensor) for tensor in given}, model_from_text(CHAIN)
    first, second = ({"statistics": folded}, edits) if known_before else ({"statistics": folded, **edits}, {})
    network = edited(edited(model, **first).model, **second)
    assert {tensor: each[0] for tensor, each in folded_in(network).items()} == found
    kept = [entry.value for entry in network.model.metadata_props if entry.key == "biascorr.folded"]
    assert bool(kept) == bool(found)


def test_what_is_known_of_tensors_that_are_gone_is_ignored():
    model = edited(model_from_text(CHAIN), statistics={"s": norm("one"), "t": norm("two")}).model
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "other"
    network = OnnxNetwork.load(model, "model")
    assert list(folded_in(network)) == ["t"]
    assert '"s"' not in edited(network.model).model.metadata_props[-1].value


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"s": 3}', '{"s": ["n"]}', '{"s": [1, "", ""]}', '{"s": ["n", 1, 2]}',
     '{"s": ["n", "AAAAAA==", ""]}', '{"s": ["n", "AAAA", "AAAA"]}', '{"s": ["n", "?", "?"]}', '{"s": ["n", "\\u00e9", ""]}',
     "[" * 99999],
)  # fmt: skip
def test_metadata_that_somebody_changed(text):
    model = model_from_text(CHAIN)
    model.metadata_props.add(key="biascorr.folded", value=text)
    network = OnnxNetwork.load(model, "model")
    with pytest.raises(
        ValueError,
        match=r"^model: a damaged ONNX model: metadata 'biascorr.folded': .*; expected what biascorr writes there, or nothing$",
    ):
        network.facts()
    with pytest.raises(ValueError, match="metadata 'biascorr.folded'"):
        network.edited(Edits())


@pytest.mark.parametrize("constant_nodes", [False, True])
def test_the_same_constants_make_the_same_model(constant_nodes):
    model = as_constant_nodes(two_layers()) if constant_nodes else two_layers()
    network = OnnxNetwork.load(model, "model")
    weights_of = {layer.name: layer.weights for layer in network.layers}
    copy = edited(model, weights=weights_of, biases={layer.name: layer.bias for layer in network.layers})
    assert copy.model.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_subgraphs_and_the_caller_keep_what_they_read():
    branches = BRANCHES.replace("Identity(t)", "Mul(t, b)").replace("Neg(t)", "Mul(t, b)")
    text = f"""g (float[N,3,5,4] x) => (float[N,3,5,4] y, float[3,3,1,1] w) {{
        [layer] t = Conv(x, w, c) c = Reshape(b, s) y = If(f) <{branches}>
    }}"""
    constants = {"b": np.float32([2, 3, 4]).reshape(3, 1, 1), "s": np.int64([3]), "f": np.bool_(True)}
    model = model_from_text(text, w=weights(3, 3, 1, 1), **constants)
    model.graph.node.sort(key=lambda node: node.op_type != "Reshape")
    network = edited(model, weights={"layer": 2 * weights(3, 3, 1, 1)}, biases={"layer": np.float32([4, 6, 8])})
    np.testing.assert_array_equal(outputs(network.model)[1], weights(3, 3, 1, 1))
    np.testing.assert_array_equal(outputs(network.model)[0], 2 * outputs(model)[0])
    assert set(constants_of(network.model)) == {"w", "w_edited", "b", "f", "t_bias"}
