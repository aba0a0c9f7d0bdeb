"""What ONNX operators do to values and channels, in every form that opsets give them."""

import numpy as np
import pytest

from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph.operations import Leaky, SpatialEffect
from networks import as_constant_nodes, model_from_text

SHAPE = (2, 4, 6, 5)


def facts(text, *, x="N,4,6,5", y="A,B", opset=17, constant_nodes=False, **constants):
    """Of a model with one node `op` that reads `t`, whose shape is known, and makes `y`."""
    model = model_from_text(
        f"g (float[{x}] x) => (float[{y}] y) {{ t = Abs(x) [op] y = {text} }}",
        opset=opset,
        ir_version=3 if opset < 9 and not constant_nodes else 8,
        **constants,
    )
    return OnnxNetwork.load(as_constant_nodes(model) if constant_nodes else model, "model").facts()


def with_effect(known, effect):
    """The operations that keep channels apart in this way; the axis of the channels is ONNX's."""
    found = {name: known.preserving(name, effect) for name in known.roles}
    assert all((each.channel_axis, each.output_axis) == (1, 1) for each in found.values() if each)
    return {name for name, each in found.items() if each}


@pytest.mark.parametrize(
    ("text", "found", "constants"),
    [
        ("LeakyRelu(t)", True, {}),
        ("LeakyRelu<alpha=0.0>(t)", True, {}),
        ("LeakyRelu<alpha=-0.1>(t)", True, {}),
        ("PRelu(t, slope)", True, {"slope": np.float32(0.5)}),
        ("PRelu(t, slope)", True, {"slope": np.float32([0, 1, 2, 3]).reshape(4, 1, 1)}),
        ("PRelu(t, slope)", True, {"slope": np.float32([0, 1, -2, 3]).reshape(4, 1, 1)}),
        ("PRelu(t, x)", False, {}),
        ("ThresholdedRelu(t)", False, {}),
        ("Relu(t)", False, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_leaky(text, found, constants, constant_nodes):
    role = facts(text, y="A,B,C,D", constant_nodes=constant_nodes, **constants).roles["op"]
    assert (role == Leaky()) == found
    assert found or role.type.bounds == ((0.0, np.inf) if text == "Relu(t)" else None)


PADS = np.int64([0, 0, 1, 2, 0, 0, 0, 3])


@pytest.mark.parametrize(
    ("text", "found", "options"),
    [
        ("Pad(t, pads)", True, {"pads": PADS}),
        ("Pad(t, pads)", True, {"pads": PADS, "opset": 11}),
        ("Pad(t, pads, value)", True, {"pads": PADS, "value": np.float32(0)}),
        ("Pad(t, pads, value)", False, {"pads": PADS, "value": np.float32(-1)}),
        ('Pad<mode="constant">(t, pads)', True, {"pads": PADS}),
        ('Pad<mode="reflect">(t, pads)', False, {"pads": PADS}),
        ('Pad<mode="edge">(t, pads)', False, {"pads": PADS}),
        ("Pad(t, pads)", False, {"pads": np.int64([0, 1, 0, 0, 0, 0, 0, 0])}),
        ("Pad(t, pads)", False, {"pads": np.int64([0, 0, 0, 0, 1, 0, 0, 0])}),
        ("Pad(t, pads, , axes)", True, {"pads": np.int64([1, 2, 0, 3]), "axes": np.int64([2, 3]), "opset": 18}),
        ("Pad(t, pads, , axes)", True, {"pads": np.int64([1, 2, 0, 3]), "axes": np.int64([-1, -2]), "opset": 21}),
        ("Pad(t, pads, , axes)", False, {"pads": np.int64([1, 2, 0, 3]), "axes": np.int64([-1, -3]), "opset": 18}),
        ("Pad(t, pads, , axes)", True, {"pads": np.int64([1, 0, 1, 0]), "axes": np.int64([3, 1]), "opset": 18}),
        ("Pad<pads=[0,0,1,2,0,0,0,3]>(t)", True, {"opset": 10}),
        ("Pad<pads=[0,0,1,2,0,0,0,3]>(t)", True, {"opset": 7}),
        ("Pad<pads=[0,0,1,2,0,0,0,3], value=1.0>(t)", False, {"opset": 10}),
        ("Pad<pads=[0,1,1,2,0,0,0,3]>(t)", False, {"opset": 10}),
        ('Pad<pads=[0,0,1,2,0,0,0,3], mode="reflect">(t)', False, {"opset": 10}),
        ("Abs(t)", False, {}),
    ],
    ids=str,
)
def test_paddings(text, found, options):
    assert with_effect(facts(text, y="A,B,C,D", **options), SpatialEffect.PADDING) == ({"op"} if found else set())


def test_a_padding_that_is_computed_at_run_time():
    model = model_from_text(
        "g (float[2,4,6,5] x, int64[8] p) => (float[A,B,C,D] y, float[A,B,C,D] z) { y = Pad(x, q) z = Pad(x, p) }", q=PADS
    )
    assert with_effect(OnnxNetwork.load(model, "model").facts(), SpatialEffect.PADDING) == {"Pad:y"}


def test_a_padding_of_axes_from_the_end_of_an_unknown_rank():
    nodes = "r = Reshape(x, s) y = Pad(r, p, , a) z = Pad(r, p, , b)"
    text = f"g (float[N,4,6,5] x, int64[R] s) => (float[A,B,C,D] y, float[A,B,C,D] z) {{ {nodes} }}"
    model = model_from_text(text, opset=18, p=np.int64([1, 1]), a=np.int64([-1]), b=np.int64([3]))
    assert with_effect(OnnxNetwork.load(model, "model").facts(), SpatialEffect.PADDING) == {"Pad:z"}


@pytest.mark.parametrize(
    ("text", "found", "options"),
    [
        ("Flatten(t)", True, {}),
        ("Flatten<axis=1>(t)", True, {"opset": 7}),
        ("Flatten<axis=2>(t)", False, {}),
        ("Flatten<axis=-3>(t)", True, {}),
        ("Flatten<axis=-1>(t)", False, {}),
        ("Flatten<axis=0>(t)", False, {}),
        ("Reshape(t, s)", True, {"s": [0, -1]}),
        ("Reshape(t, s)", True, {"s": [0, -1], "opset": 7}),
        ("Reshape(t, s)", True, {"s": [0, 120]}),
        ("Reshape(t, s)", True, {"s": [-1, 120]}),
        ("Reshape(t, s)", False, {"s": [-1, 60]}),
        ("Reshape(t, s)", False, {"s": [-1, 120], "x": "N,4,H,5"}),
        ("Reshape(t, s)", True, {"s": [-1, 120], "x": "N,4,H,5", "y": "N,120"}),
        ("Reshape(t, s)", False, {"s": [-1, 60], "x": "N,4,H,5", "y": "M,60"}),
        ("Reshape(t, s)", True, {"s": [0, -1], "x": "N,4,H,W"}),
        ("Reshape(t, s)", False, {"s": [-1, 60], "x": "?,4,H,5", "y": "?,60"}),
        ("Reshape(t, s)", True, {"s": [2, -1], "x": "2,4,H,W"}),
        ("Reshape(t, s)", False, {"s": [1, -1], "x": "2,4,6,5"}),
        ("Reshape(t, s)", False, {"s": [0, 4, -1], "y": "A,B,C"}),
        ("Reshape(t, s)", False, {"s": [-1]}),
        ("Reshape<allowzero=1>(t, s)", False, {"s": [0, 0], "x": "N,4,6,0"}),
        ("Squeeze(t, s)", False, {"s": [2, 3], "x": "N,4,1,1"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_flattens(text, found, options, constant_nodes):
    shape = {"s": np.int64(options["s"])} if "s" in options else {}
    known = facts(text, constant_nodes=constant_nodes, **{**options, **shape})
    assert with_effect(known, SpatialEffect.FLATTEN) == ({"op"} if found else set())


def test_a_flatten_whose_shape_is_computed():
    text = """g (float[N,4,6,5] x) => (float[N,B] y) {
        s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, at) c = Concat<axis=0>(u, rest) [op] y = Reshape(x, c)
    }"""
    constants = {"zero": np.int64(0), "at": np.int64([0]), "rest": np.int64([-1])}
    assert with_effect(OnnxNetwork.load(model_from_text(text, **constants), "model").facts(), SpatialEffect.FLATTEN) == {"op"}


@pytest.mark.parametrize(
    ("x", "bound", "found"),
    [
        ("N,4,6,5", (4, 1, 1), True),
        ("N,4,6,5", (1, 4, 1, 1), True),
        ("N,4,6,5", (1, 1, 5), False),
        ("N,4,6,5", (2, 4, 1, 1), False),
        ("N,4,6,4", (4,), False),
        ("N,4", (4,), True),
        ("N,C", (4,), True),
        ("N,1,6,5", (4, 1, 1), False),
        ("N,4,4", (4, 1), True),
        ("4", (4,), False),
        ("4", (1,), True),
    ],
)
def test_bounds_per_channel(x, bound, found):
    low = np.arange(np.prod(bound), dtype=np.float32).reshape(bound)
    rank = x.count(",") + 1
    activation = facts("Max(t, low)", x=x, y=",".join("ABCD"[:rank]), low=low).activation("op").type
    expected = tuple(low.ravel().tolist()) if low.size > 1 else low.item()
    assert activation.bounds == ((expected, np.inf) if found else None)


def test_bounds_of_a_tensor_of_unknown_rank():
    nodes = "r = Reshape(x, s) y = Max(r, a) z = Max(r, b)"
    text = f"g (float[N,4,6,5] x, int64[R] s) => (float[A,B,C,D] y, float[A,B,C,D] z) {{ {nodes} }}"
    model = model_from_text(text, a=np.float32(1), b=np.ones((4, 1, 1), np.float32))
    known = OnnxNetwork.load(model, "model").facts()
    assert known.activation("Max:y").type.bounds == (1.0, np.inf)
    assert known.activation("Max:z").type.bounds is None
