"""Copies of ONNX models with other weights, biases and activations, and without operations."""

import re

import numpy as np
import onnx
import pytest
from onnx import helper

from biascorr.model.network import Edits
from biascorr.onnx.network import OnnxNetwork
from networks import as_constant_nodes, biases, constants_of, model_from_text, run, samples, weights

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
    network = edited(model, weights={"layer": layer.weights * 0.3}, biases={"layer": np.float64([0.1, 0.2])})
    after = only_layer(network)
    np.testing.assert_array_equal(after.weights, layer.weights * np.float32(0.3))
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
    network = edited(model, removed=["norm"])
    graph = network.model.graph
    assert [(node.op_type, *node.input) for node in graph.node] == [("Relu", "x"), ("Abs", "s")]
    assert list(constants_of(network.model)) == ["unused"]
    assert [value.name for value in graph.value_info] == ["s"]
    assert [value.name for value in graph.input] == (["x", "unused"] if opset < 9 else ["x"])
    np.testing.assert_array_equal(outputs(network.model)[0], np.maximum(X, 0))


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
        (f"[out] t = Dropout(x) i = Identity(f) y = If(i) <{BRANCHES}>", ["Identity x -> t", "Identity f -> i", "If i -> y"]),
        (f"s = Abs(x) [out] t = Relu(s) y = If(f) <{BRANCHES}>", ["Abs x -> t", "If f -> y"]),
    ],
)
def test_removed_operations(text, nodes):
    outputs_of_graph = ", ".join(f"float[N,3,5,4] {name}" for name in "yz" if f"{name} =" in text)
    model = model_from_text(f"g (float[N,3,5,4] x) => ({outputs_of_graph}) {{ {text} }}", c=np.float32(0), f=np.bool_(True))
    removed = [node.name for node in model.graph.node if node.name]
    network = edited(model, removed=removed)
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
    network = OnnxNetwork.load(with_layer("MatMul(x, w)", (4, 6)), "model").copy()
    model = network.model
    model.graph.node[0].name = ""
    network = OnnxNetwork(model, "model")
    layer = only_layer(network)
    network.add_to_bias(layer, np.ones(6))
    assert only_layer(network.copy()).name == layer.name == "MatMul:t"


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
    network = edited(model, weights={layer.name: 2 * layer.weights})
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
    network = edited(model, weights={first.name: 2 * first.weights})
    assert not network.layers[0].shares_weights
    for found, expected, factor in zip(outputs(network.model), outputs(model), (2, 1), strict=True):
        np.testing.assert_array_equal(found, factor * expected)
