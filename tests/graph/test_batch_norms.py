"""Batch normalizations and activations around layers, as ONNX models of any opset say them."""

import contextlib
import pickle

import numpy as np
import onnx
import pytest

from biascorr import ActivationType, ConvBnInfoType, find_all_convs_bn_with_activation
from biascorr.adapters.onnx.network import OnnxNetwork
from networks import as_constant_nodes, biases, model_from_text, weights

CHANNELS = 4
NONE, RELU, RELU6, OTHER = (getattr(ActivationType, name) for name in ("no_activation", "relu", "relu6", "other"))


def statistics(name="norm", channels=CHANNELS):
    """What a BatchNormalization of that name reads besides its input."""
    parameters = {"gamma": biases(channels), "beta": biases(channels, seed=2), "mean": biases(channels, seed=3)}
    parameters["var"] = np.arange(1, channels + 1, dtype=np.float32)
    return {f"{name}_{key}": array for key, array in parameters.items()}


def norm(x, y, name="norm", attributes="<epsilon=0.25>"):
    return f"[{name}] {y} = BatchNormalization{attributes}({x}, {name}_gamma, {name}_beta, {name}_mean, {name}_var)"


def before(between, *, layer="Conv(t, w)", x="N,4,6,5", y="N,3,6,5", w=(3, 4, 1, 1), **options):
    """norm -> what makes `t` of `n` -> layer."""
    text = f"g (float[{x}] x) => (float[{y}] y) {{ {norm('x', 'n')} {between} [layer] y = {layer} }}"
    return model_from_text(text, **{"w": weights(*w), **statistics(), **options})


def around_layer(model):
    return find_all_convs_bn_with_activation(model).get("layer", ConvBnInfoType())


def newest_opset():
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        with contextlib.suppress(Exception):
            OnnxNetwork.load(model_from_text("g (float[1] x) => (float[1] y) { y = Relu(x) }", opset=opset), "model")
            return opset
    raise AssertionError("onnxruntime takes no opset that onnx knows")


def test_what_a_batch_normalization_is():
    info = around_layer(before("t = Identity(n)"))
    assert info.input_bn.name == "norm"
    assert info.input_bn.epsilon == 0.25
    for field, key in {"gamma": "gamma", "beta": "beta", "mean": "mean", "variance": "var"}.items():
        array = getattr(info.input_bn, field)
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, statistics()[f"norm_{key}"])
    assert (info.in_activation_type, info.output_bn, info.out_activation_type) == (NONE, None, NONE)


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 21, newest_opset()])
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_every_opset(opset, constant_nodes):
    model = before("t = Relu(n)", opset=opset, ir_version=3 if opset < 9 else 8)
    if constant_nodes:
        del model.graph.input[1:]
        model = as_constant_nodes(model)
    info = around_layer(model)
    assert info.input_bn.name == "norm"
    assert info.in_activation_type == RELU


def test_computed_constants():
    model = before("t = Relu(n)")
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["norm_beta", "norm_beta"], ["squares"]))
    model.graph.node[1].input[2] = "squares"
    np.testing.assert_array_equal(around_layer(model).input_bn.beta, statistics()["norm_beta"] ** 2)


@pytest.mark.parametrize("opset", [14, 15, newest_opset()])
def test_a_batch_normalization_in_training(opset):
    model = before("t = Relu(n)", opset=opset)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    model.graph.node[0].output.extend(["running_mean", "running_var"])
    assert find_all_convs_bn_with_activation(model) == {}


def test_a_batch_normalization_with_statistics_of_every_value():
    values = {key: np.ones((CHANNELS, 6, 5), np.float32) for key in statistics()}
    model = before("t = Relu(n)", opset=7, **values)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("spatial", 0))
    assert find_all_convs_bn_with_activation(model) == {}


def test_statistics_that_are_computed_at_run_time():
    model = before("t = Relu(n)", x="1,4,6,5", y="1,3,6,5")
    nodes = model_from_text("g (float[1,4,6,5] x) => (float[4] m) { m = ReduceMax<axes=[0,2,3], keepdims=0>(x) }").graph.node
    model.graph.node.insert(0, nodes[0])
    model.graph.node[1].input[2] = "m"
    assert find_all_convs_bn_with_activation(model) == {}


LOW, HIGH = {"low": np.float32(-1.5)}, {"high": np.float32(4)}
PER_CHANNEL = {"high": np.float32([1, 2, 3, np.inf]).reshape(4, 1, 1)}


@pytest.mark.parametrize(
    ("between", "activation", "options"),
    [
        ("t = Relu(n)", RELU, {}),
        ("t = Identity(n)", NONE, {}),
        ("t = Clip(n, low, high)", ActivationType("clip", (-1.5, 4.0)), LOW | HIGH),
        ("t = Clip(n, low, high)", RELU6, {"low": np.float32(0), "high": np.float32(6)}),
        ("t = Clip(n, low, high)", RELU6, {"low": np.float32([0]), "high": np.float32([6])}),
        ("t = Clip(n, low, high)", ActivationType("clip", (2.0, 2.0)), {"low": np.float32(3), "high": np.float32(2)}),
        ("t = Clip(n, , high)", ActivationType("clip", (-np.inf, 4.0)), HIGH),
        ("t = Clip(n, low)", ActivationType("clip", (-1.5, np.inf)), LOW),
        ("t = Clip(n, low)", RELU, {"low": np.float32(0)}),
        ("t = Clip(n)", NONE, {}),
        ("a = Constant<value_float=0.0>() b = Constant<value_float=6.0>() t = Clip(n, a, b)", RELU6, {}),
        ("t = Clip<min=-1.5, max=4.0>(n)", ActivationType("clip", (-1.5, 4.0)), {"opset": 9}),
        ("t = Clip<min=0.0, max=6.0>(n)", RELU6, {"opset": 6 + 1}),
        ("t = Clip<max=4.0>(n)", ActivationType("clip", (-np.inf, 4.0)), {"opset": 10}),
        ("t = Clip<min=0.0>(n)", RELU, {"opset": 10}),
        ("t = Clip<min=0.0, max=3.4028234663852886e38>(n)", RELU, {"opset": 10}),
        ("t = Clip<min=-3.4028234663852886e38>(n)", NONE, {"opset": 10}),
        ("t = Max(n, low)", RELU, {"low": np.float32(0)}),
        ("t = Max(low, n)", ActivationType("clip", (-1.5, np.inf)), LOW),
        ("t = Min(n, high)", ActivationType("clip", (-np.inf, 4.0)), {"high": np.float32([[[[4]]]])}),
        ("t = Min(n, high)", ActivationType("clip", (-np.inf, (1.0, 2.0, 3.0, np.inf))), PER_CHANNEL),
        ("t = Max(high, n)", ActivationType("clip", ((1.0, 2.0, 3.0, np.inf), np.inf)), PER_CHANNEL | {"opset": 8}),
        ("r = Relu(n) t = Relu(r)", RELU, {}),
        ("r = Relu(n) t = Clip(r, low, high)", ActivationType("clip", (0.0, 4.0)), LOW | HIGH),
        ("r = Relu(n) t = Min(r, high)", ActivationType("clip", (0.0, (1.0, 2.0, 3.0, np.inf))), PER_CHANNEL),
        (
            "r = Min(n, high) t = Min(r, least)",
            ActivationType("clip", (-np.inf, (1.0, 2.0, 2.5, 2.5))),
            PER_CHANNEL | {"least": np.float32(2.5)},
        ),
        ("i = Identity(n) r = Relu(i) t = Identity(r)", RELU, {}),
        ("i = Dropout(n) r = Relu(i) t = Dropout(r)", RELU, {"opset": 9}),
        ("i, mask = Dropout(n) t = Relu(i)", RELU, {"opset": 13}),
        ("t = Dropout(n, ratio, trains)", NONE, {"ratio": np.float32(0.5), "trains": np.bool_(False)}),
    ],
    ids=str,
)
def test_activations_before_a_layer(between, activation, options):
    info = around_layer(before(between, **options))
    assert info.input_bn.name == "norm"
    assert info.in_activation_type == activation


@pytest.mark.parametrize(
    ("between", "options"),
    [
        ("t = LeakyRelu(n)", {}),
        ("t = PRelu(n, slope)", {"slope": np.float32([[[0.5]]] * 4)}),
        ("t = Sigmoid(n)", {}),
        ("t = Max(n, least)", {"least": np.float32([0, 1, 2, 3, 4])}),
        ("t = Max(n, least)", {"least": np.float32(np.nan)}),
        ("t = Max(n, x)", {}),
        ("t = Max(n)", {}),
        ("t = Min(n, least, most)", {"least": np.float32(1), "most": np.float32(2)}),
        ("t = Mul(n, n)", {}),
        ("t = Add(n, x)", {}),
        ("r = Relu(n) t = Sigmoid(r)", {}),
        ("r = Sigmoid(n) t = Relu(r)", {}),
        ("r = ReduceMax<keepdims=0>(x) t = Clip(n, , r)", {}),
        ("t = MaxPool<kernel_shape=[1,1]>(n)", {}),
        ("t = AveragePool<kernel_shape=[1,1]>(n)", {}),
        ("t = Dropout(n, ratio, trains)", {"ratio": np.float32(0.5), "trains": np.bool_(True)}),
        ("t = Transpose<perm=[0,1,3,2]>(n)", {"y": "N,3,5,6"}),
    ],
    ids=str,
)
def test_what_ends_the_search(between, options):
    assert (
        around_layer(before(between, **options)) == ConvBnInfoType()
        or around_layer(before(between, **options)).input_bn is None
    )


DENSE = {"layer": "Gemm<transB=1>(t, w)", "y": "N,3", "w": (3, 4)}
PRODUCT = {"layer": "MatMul(t, w)", "y": "N,3", "w": (4, 3)}
VIEW = """r = Relu(n) p = GlobalAveragePool(r) q = Shape(p) d = Gather<axis=0>(q, zero) e = Unsqueeze(d, first)
    s = Concat<axis=0>(e, rest) t = Reshape(p, s)"""
TAIL = np.int64([2, 3])


@pytest.mark.parametrize(
    ("between", "found", "options"),
    [
        ("r = Relu(n) p = GlobalAveragePool(r) t = Flatten(p)", True, DENSE),
        ("r = Relu(n) p = GlobalAveragePool(r) t = Reshape(p, s)", True, DENSE | {"s": np.int64([-1, 4])}),
        ("r = Relu(n) p = GlobalAveragePool(r) t = Reshape(p, s)", True, DENSE | {"s": np.int64([0, 4])}),
        ("r = Relu(n) p = GlobalAveragePool(r) t = Squeeze<axes=[2,3]>(p)", True, PRODUCT | {"opset": 11}),
        ("r = Relu(n) p = GlobalAveragePool(r) t = Squeeze(p, s)", True, PRODUCT | {"s": TAIL}),
        ("r = Relu(n) t = ReduceMean<axes=[2,3], keepdims=0>(r)", True, PRODUCT | {"opset": 13}),
        ("r = Relu(n) t = ReduceMean<axes=[-1,-2], keepdims=0>(r)", True, PRODUCT | {"opset": 9}),
        ("r = Relu(n) t = ReduceMean<keepdims=0>(r, s)", True, DENSE | {"s": TAIL, "opset": 18}),
        ("r = Relu(n) t = ReduceMean<axes=[3]>(r)", True, {"opset": 13, "y": "N,3,6,1"}),
        ("r = Relu(n) t = GlobalAveragePool(r)", True, {"y": "N,3,1,1"}),
        (VIEW, True, DENSE | {"zero": np.int64(0), "first": np.int64([0]), "rest": np.int64([4])}),
        ("p = GlobalAveragePool(n) r = Relu(p) t = Flatten(r)", False, DENSE),
        ("r = Relu(n) p = GlobalMaxPool(r) t = Flatten(p)", False, DENSE),
        ("r = Relu(n) t = ReduceMean<axes=[1,3]>(r)", False, {"opset": 13, "y": "N,3,6,1", "w": (3, 1, 1, 1)}),
        ("r = Relu(n) t = ReduceMean(r)", False, {"opset": 13, "y": "1,3,1,1", "w": (3, 1, 1, 1)}),
        ("r = Relu(n) p = GlobalAveragePool(r) t = Reshape(p, s)", False, PRODUCT | {"s": np.int64([-1, 2]), "w": (2, 3)}),
        ("r = Relu(n) t = Flatten(r)", False, DENSE | {"w": (3, 120)}),
        ("t = Relu(n)", True, DENSE | {"x": "N,4"}),
        ("t = Relu(n)", True, PRODUCT | {"x": "N,4"}),
        ("t = Relu(n)", False, PRODUCT | {"x": "N,4,4", "y": "N,4,3"}),
        ("t = Relu(n)", True, {"layer": "MatMul(w, t)", "x": "N,4,5", "y": "N,3,5", "w": (3, 4)}),
        ("t = Relu(n)", False, DENSE | {"x": "4,4", "layer": "Gemm<transA=1, transB=1>(t, w)", "y": "4,3"}),
    ],
    ids=str,
)
def test_means_of_channels(between, found, options):
    info = around_layer(before(between, **options))
    assert (info.input_bn is not None, info.in_activation_type) == (found, RELU if found else NONE)


def test_a_matrix_product_of_tensors_of_unknown_rank():
    model = before("t = Relu(n)", **PRODUCT | {"x": "N,4"})
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert around_layer(model).input_bn is None


def test_a_convolution_of_tensors_of_unknown_rank():
    model = before("t = Relu(n)")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert around_layer(model).input_bn.name == "norm"


def branches():
    """A batch normalization that two layers and a residual read, one layer behind another, and a bias in an Add."""
    text = f"""g (float[N,4,6,5] x) => (float[N,4,6,5] y, float[N,3,6,5] z) {{
        {norm("x", "n")}
        r = Relu(n)
        [first] a = Conv<pads=[1,1,1,1]>(r, w1)
        {norm("a", "b", "inner")}
        c = Clip(b, zero, six)
        [second] d = Conv(c, w2)
        {norm("d", "e", "outer")}
        y = Add(e, n)
        [third] p = Conv(r, w3)
        s = Add(p, b3)
        {norm("s", "z", "last")}
    }}"""
    parameters = statistics() | statistics("inner") | statistics("outer") | statistics("last", 3)
    kernels = {"w1": weights(4, 4, 3, 3), "w2": weights(4, 4, 1, 1), "w3": weights(3, 4, 1, 1), "b3": biases(1, 3, 1, 1)}
    return model_from_text(text, zero=np.float32(0), six=np.float32(6), **kernels, **parameters)


def names(model):
    return {
        name: (info.input_bn and info.input_bn.name, info.in_activation_type, info.output_bn and info.output_bn.name,
               info.out_activation_type)
        for name, info in find_all_convs_bn_with_activation(model).items()
    }  # fmt: skip


def test_branches(tmp_path):
    model = branches()
    data = model.SerializeToString()
    (tmp_path / "model.onnx").write_bytes(data)
    expected = {
        "first": ("norm", RELU, "inner", RELU6),
        "second": ("inner", RELU6, "outer", NONE),
        "third": ("norm", RELU, "last", NONE),
    }
    assert list(expected) == list(names(model))
    assert names(model) == names(data) == names(tmp_path / "model.onnx") == expected
    assert model.SerializeToString() == data


@pytest.mark.parametrize(
    ("behind", "activation"),
    [
        ("y = Relu(n)", RELU),
        ("i = Identity(n) y = Relu(i)", RELU),
        ("y = Softplus(n)", OTHER),
        ("y = LeakyRelu(n)", OTHER),
        ("s = Sigmoid(n) y = Mul(s, n)", OTHER),
        ("r = Relu(n) y = Add(r, n)", OTHER),
        ("y = Add(n, n)", NONE),
        ("y = Identity(n)", NONE),
        ("r = Relu(n) s = Relu(n) y = Add(r, s)", RELU),
    ],
)
def test_activations_behind_a_layer(behind, activation):
    text = f"g (float[N,3,6,5] x) => (float[N,4,6,5] y) {{ [layer] c = Conv(x, w) {norm('c', 'n')} {behind} }}"
    info = around_layer(model_from_text(text, w=weights(4, 3, 1, 1), **statistics()))
    assert (info.input_bn, info.output_bn.name, info.out_activation_type) == (None, "norm", activation)


def test_a_batch_normalization_whose_output_the_caller_reads_too():
    text = f"""g (float[N,3,6,5] x) => (float[N,4,6,5] n, float[N,4,6,5] y) {{
        [layer] c = Conv(x, w) {norm("c", "n")} y = Relu(n) }}"""
    assert around_layer(model_from_text(text, w=weights(4, 3, 1, 1), **statistics())).out_activation_type == OTHER


def test_batch_normalizations_behind_a_layer_that_are_not_of_its_channels_or_not_one():
    product = f"g (float[N,4,3] x) => (float[N,4,4] y) {{ [layer] c = MatMul(x, w) {norm('c', 'y')} }}"
    assert find_all_convs_bn_with_activation(model_from_text(product, w=weights(3, 4), **statistics())) == {}
    two = f"""g (float[N,3,6,5] x) => (float[N,4,6,5] y, float[N,4,6,5] z) {{
        [layer] c = Conv(x, w) {norm("c", "y")} {norm("c", "z", "second")} }}"""
    constants = statistics() | statistics("second")
    assert find_all_convs_bn_with_activation(model_from_text(two, w=weights(4, 3, 1, 1), **constants)) == {}


def test_layers_of_matrix_products_before_a_batch_normalization():
    text = f"""g (float[N,3] x) => (float[N,4] y) {{
        [dense] a = Gemm(x, w) {norm("a", "n")} r = Relu(n) [product] p = MatMul(r, v) {norm("p", "y", "last")} }}"""
    model = model_from_text(text, w=weights(3, 4), v=weights(4, 4), **statistics(), **statistics("last"))
    assert names(model) == {"dense": (None, NONE, "norm", RELU), "product": ("norm", RELU, "last", NONE)}


@pytest.mark.parametrize("constant_nodes", [False, True])
def test_shapes_are_inferred_without_the_weights(constant_nodes, monkeypatch):
    model = before("p = GlobalAveragePool(n) t = Reshape(p, s)", **DENSE, s=np.int64([-1, 4]))
    network = OnnxNetwork.load(as_constant_nodes(model) if constant_nodes else model, "model")
    monkeypatch.setattr("biascorr.adapters.onnx.shapes._KNOWN_VALUES", 11)  # fewer than `w` has
    infer, seen = onnx.shape_inference.infer_shapes, []
    monkeypatch.setattr(
        "onnx.shape_inference.infer_shapes", lambda model, **options: seen.append(model) or infer(model, **options)
    )
    assert network.facts().shapes["t"] == (None, 4)
    (shapes_only,) = seen
    values = [tensor.name for tensor in shapes_only.graph.initializer] + [node.output[0] for node in shapes_only.graph.node]
    assert "s" in values
    assert "w" not in values
    assert [value.name for value in shapes_only.graph.input] == ["x", "w"]
    assert len(network.model.graph.input) == 1


def test_activation_types_are_values():
    assert ActivationType.clip(0, np.inf) is RELU
    assert ActivationType.clip(-np.inf, np.inf) is NONE
    assert ActivationType.clip(0, 4) == ActivationType("clip", (0.0, 4.0))
    assert len({NONE, RELU, RELU6, OTHER, ActivationType.clip(0, 4)}) == 5
    assert pickle.loads(pickle.dumps(RELU6)) == RELU6


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="model: no such file"):
        find_all_convs_bn_with_activation(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match="model: int, expected a path, bytes or an onnx.ModelProto"):
        find_all_convs_bn_with_activation(1)
