"""Models in forms that onnxruntime takes beside the usual one: nameless and unsorted nodes, other domains, sparse weights."""

import random
import time
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from biascorr import QuantParams, correct
from biascorr.adapters.onnx.network import OnnxNetwork, axes_of_product
from networks import (
    BITS,
    batch_norm,
    batch_norm_constants,
    biases,
    constants_of,
    mean_corrected,
    model_from_text,
    run,
    samples,
    weights,
)

PARAMS = QuantParams("tf", weight_bits=BITS)


def corrected(model, data, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made the outputs worse", UserWarning)
        return correct(model, data, quant_params=PARAMS, **options)


def recurrent(is_named):
    """Two recurrent operators whose first output is left out, and layers around them."""
    text = """g (float[5,N,6] x) => (float[1,N,4] y) {
        [a] t = MatMul(x, w)
        u = Neg(t)
        [first] , h = LSTM<hidden_size=3>(t, W, R)
        [second] , k = LSTM<hidden_size=3>(u, W2, R2)
        [b] m = MatMul(k, v)
        c = Concat<axis=2>(h, m)
        [last] y = MatMul(c, o)
    }"""
    gates = {"W": (1, 12, 5), "R": (1, 12, 3), "W2": (1, 12, 5), "R2": (1, 12, 3)}
    constants = {name: weights(*shape, seed=k) / 4 for k, (name, shape) in enumerate(gates.items())}
    model = model_from_text(text.replace("] , ", "] _, "), **constants, w=weights(6, 5), v=weights(3, 3), o=weights(6, 4))
    for node in model.graph.node:
        node.output[:] = ["" if name == "_" else name for name in node.output]
        node.name = node.name if is_named else ""
    return model


@pytest.mark.parametrize("method", ["empirical", "iterative", "mean", "activation", "auto"])
def test_nodes_without_names_are_told_apart(method):
    data = [samples(5, 2, 6, seed=k) for k in range(8)]
    found, expected = (corrected(recurrent(is_named), data, method=method) for is_named in (False, True))
    assert len({layer.name for layer in found.report}) == len(found.report) == len(expected.report) == 5
    for layer, other in zip(found.report, expected.report):
        assert (layer.op, layer.method, layer.shift_before) == (other.op, other.method, other.shift_before)
    for (name, array), expected_array in zip(constants_of(found.model).items(), constants_of(expected.model).values()):
        np.testing.assert_array_equal(array, expected_array, err_msg=name)


def test_a_name_that_is_made_up_is_never_that_of_another_node():
    text = "g (float[N,4] x) => (float[N,4] y) { [a] t = MatMul(x, w) r = Relu(t) y = MatMul(r, v) }"
    model = model_from_text(text, w=weights(4, 4), v=weights(4, 4, seed=1))
    model.graph.node[0].name, model.graph.node[2].name = "MatMul:y", ""
    names = [layer.name for layer in OnnxNetwork.load(model, "model").layers]
    assert names == ["MatMul:y", "MatMul:y_1"]
    assert [layer.method for layer in corrected(model, samples(8, 4), method="mean").report] == ["mean", "mean"]


BRANCHED = """g (float[N,3,6,6] x) => (float[N,4,6,6] y) {
    [a] t = Conv<pads=[1,1,1,1]>(x, w, b)
    n = BatchNormalization(t, norm_gamma, norm_beta, norm_mean, norm_variance)
    r = Relu(n)
    [c] u = Conv<pads=[1,1,1,1]>(r, v)
    l = LeakyRelu(r)
    y = Add(u, l)
}"""


def branched():
    constants = {"w": weights(4, 3, 3, 3), "b": biases(4), "v": weights(4, 4, 3, 3, seed=1)}
    norm = batch_norm_constants(4)
    text = BRANCHED.replace("n = BatchNormalization(t, norm_gamma, norm_beta, norm_mean, norm_variance)", batch_norm("t", "n"))
    return model_from_text(text, **constants, **norm)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["auto", "mean", "activation", "analytical"])
def test_nodes_in_any_order(seed, method):
    model, data = branched(), samples(12, 3, 6, 6)
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model)
    nodes = list(model.graph.node)
    random.Random(seed).shuffle(nodes)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    found, expected = (corrected(each, data, method=method, fold=True) for each in (shuffled, model))
    np.testing.assert_allclose(run(found.model, {"x": data})[0], run(expected.model, {"x": data})[0], rtol=1e-5, atol=1e-5)
    assert found.scores == expected.scores


def with_function(model, operator, domain="example.com", body=None):
    """The model with the nodes of an operator calling a function of this name in another domain."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    called = [node for node in copy.graph.node if node.op_type == operator]
    inputs = [f"i{k}" for k in range(max(len(node.input) for node in called))]
    nodes = body or [helper.make_node("Mul", [inputs[0], inputs[0]], ["o"])]
    copy.functions.append(
        helper.make_function(domain, operator, inputs, ["o"], nodes, [helper.make_opsetid("", copy.opset_import[0].version)])
    )
    for node in called:
        node.domain = domain
        del node.attribute[:]
    copy.opset_import.append(helper.make_opsetid(domain, 1))
    return copy


def test_an_operator_of_another_domain_is_another_operator():
    model = model_from_text(
        "g (float[N,4] x) => (float[N,4] y) { [a] t = MatMul(x, w) r = Relu(t) [b] u = MatMul(r, v) y = Add(u, c) }",
        w=weights(4, 4), v=weights(4, 4, seed=1), c=biases(4),
    )  # fmt: skip
    for operator in ("Relu", "Add"):
        other = with_function(model, operator)
        network = OnnxNetwork.load(other, "model")
        assert [layer.name for layer in network.layers] == ["a", "b"]
        assert network.facts().activation("Relu:r") is None or operator != "Relu"
        assert (network.layers[1].bias is None) == (operator == "Add")
        correction = corrected(other, samples(8, 4), method="empirical")
        onnxruntime.InferenceSession(correction.model.SerializeToString())
    other = with_function(model, "MatMul", body=[helper.make_node("Mul", ["i0", "i0"], ["o"])])
    assert OnnxNetwork.load(other, "model").layers == []
    assert [layer.op for layer in corrected(other, samples(8, 4)).report] == []


def test_a_function_with_a_layer_has_a_row():
    model = model_from_text(
        "g (float[N,4] x) => (float[N,4] y) { [a] t = MatMul(x, w) y = Gemm(t, v) }", w=weights(4, 4), v=weights(4, 4)
    )
    body = [helper.make_node("MatMul", ["i0", "i1"], ["o"])]
    rows = {
        row.name: row.reason for row in corrected(with_function(model, "Gemm", body=body), samples(8, 4), method="mean").report
    }
    assert rows["Gemm:y"] == "its function has layers, which are not corrected"


def nested(levels, node):
    """A model whose function calls another one twice, and so on."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[N,4] x) => (float[N,4] y) { t = Identity(x) y = f.f0(t) }'
    )
    for k in range(levels):
        inner = [
            helper.make_node(f"f{k + 1}", ["i"], ["t"], domain="f"),
            helper.make_node(f"f{k + 1}", ["t"], ["o"], domain="f"),
        ]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        model.functions.append(helper.make_function("f", f"f{k}", ["i"], ["o"], inner, opsets))
    model.functions.append(helper.make_function("f", f"f{levels}", ["i"], ["o"], [node], opsets))
    return model


def test_functions_that_are_written_out_to_too_many_nodes():
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^reference: its functions are written out to 4194305 nodes, up to 1000000 can be run$"
    ):
        correct(nested(22, helper.make_node("Relu", ["i"], ["o"])), samples(8, 4))
    with pytest.raises(ValueError, match=r"^reference: function f3 of domain 'f' calls itself$"):
        correct(nested(5, helper.make_node("f3", ["i"], ["o"], domain="f")), samples(8, 4))
    with pytest.raises(ValueError, match=r"^reference: its functions call each other more than 100 deep, which cannot be run$"):
        correct(nested(2000, helper.make_node("Relu", ["i"], ["o"])), samples(8, 4))
    assert time.monotonic() - start < 5
    assert correct(nested(4, helper.make_node("Relu", ["i"], ["o"])), samples(8, 4)).report == []


def sparse(array, name, flat):
    indices = np.flatnonzero(array) if flat else np.argwhere(array)
    values = numpy_helper.from_array(array.ravel()[np.flatnonzero(array)], name)
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(indices.astype(np.int64), f"{name}_indices"), list(array.shape)
    )


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("is_node", [True, False])
def test_sparse_weights(flat, is_node):
    w = weights(6, 5, axis=1) * (np.arange(30).reshape(6, 5) % 3 > 0)
    text = "g (float[N,6] x) => (float[N,5] y) { [layer] y = MatMul(x, w) }"
    dense, model = model_from_text(text, w=w), model_from_text(text)
    if is_node:
        constant = helper.make_node("Constant", [], ["w"])
        attribute = onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
        attribute.sparse_tensor.CopyFrom(sparse(w, "", flat))
        constant.attribute.append(attribute)
        model.graph.node.insert(0, constant)
    else:
        model.graph.sparse_initializer.append(sparse(w, "w", flat))
    found, expected = (mean_corrected(each, samples(8, 6)) for each in (model, dense))
    assert found.report == expected.report
    x = samples(8, 6, seed=9)
    np.testing.assert_array_equal(run(found.model, {"x": x})[0], run(expected.model, {"x": x})[0])


def test_new_names_are_in_no_subgraph():
    """Names in a branch hide those around it only where they are other tensors: onnxruntime takes no name twice."""
    text = """g (float[N,3] x, bool c) => (float[N,3] y) {
        [layer] t = MatMul(x, w)
        y = If(c) <then_branch = {then}, else_branch = {other}>
    }"""
    then = "a () => (float[N,3] o) { t_bias = Neg(t) t_before_bias = Neg(t_bias) o = Neg(t_before_bias) }"
    other = "b () => (float[N,3] p) { t_add_bias = Neg(t) p = Identity(t_add_bias) }"
    model = model_from_text(text.replace("{then}", then).replace("{other}", other), w=weights(3, 3))
    correction = mean_corrected(model, [{"x": samples(1, 3, seed=k), "c": np.array(k % 2 == 0)} for k in range(8)])
    onnx.checker.check_model(correction.model)
    onnxruntime.InferenceSession(correction.model.SerializeToString())
    assert correction.report[0].method == "mean"


EINSUMS = {
    "nd,dk->nk": ("IO", -1, -1), "nd,kd->nk": ("OI", -1, -1), "ntd,dk->ntk": ("IO", -1, -1), "ntd,dk->nkt": ("IO", -1, -2),
    "ndt,dk->nkt": ("IO", -2, -2), "...d,dk->...k": ("IO", -1, -1), "dn,dk->nk": ("IO", -2, -1), "nd,dk->kn": ("IO", -1, -2),
    "n t d, d k -> n t k": ("IO", -1, -1),
}  # fmt: skip
NO_PRODUCTS = [
    "nd,dk->n",
    "nd,dk->nkd",
    "ntd,dk->nk",
    "nd,nk->nk",
    "dd,dk->k",
    "nd,dk",
    "d...,dk->k...",
    "n,dk->ndk",
    "nd,dhk->nhk",
]


@pytest.mark.parametrize("equation", [*EINSUMS, *NO_PRODUCTS])
def test_axes_of_a_product(equation):
    assert axes_of_product(equation, 1) == EINSUMS.get(equation)
    terms, _, output = equation.partition("->")
    swapped = ",".join(terms.split(",")[::-1]) + ("->" + output if output else "")
    assert axes_of_product(swapped, 0) == EINSUMS.get(equation)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("equation", [each for each in EINSUMS if "..." not in each])
def test_einsum_that_is_a_matrix_product(equation, is_first, has_bias):
    (layout, channel_axis, output_axis), sizes = EINSUMS[equation], {"n": 1, "t": 4, "d": 6, "k": 5}
    left, right = equation.replace(" ", "").partition("->")[0].split(",")
    output = equation.replace(" ", "").partition("->")[2]
    shape, made = ([sizes[letter] for letter in term] for term in (left, output))
    w = weights(*(sizes[letter] for letter in right), axis=layout.index("O"))
    operands, terms = ("w, x", f"{right},{left}") if is_first else ("x, w", f"{left},{right}")
    body = f'[layer] t = Einsum<equation="{terms}->{output}">({operands})'
    constants = (
        {"b": biases(5).reshape([5 if k == len(made) + output_axis else 1 for k in range(len(made))])} if has_bias else {}
    )
    tail = "y = Add(t, b)" if has_bias else "y = Identity(t)"
    text = f"g (float[{', '.join(map(str, shape))}] x) => (float[{', '.join(map(str, made))}] y) {{ {body} {tail} }}"
    data = [samples(*shape, seed=k) for k in range(8)]
    model = model_from_text(text, w=w, **constants)
    correction = mean_corrected(model, data)
    (row,) = correction.report
    assert (row.op, row.method, row.channels) == ("Einsum", "mean", 5)
    assert row.shift_after < 1e-5 * row.shift_before
    quantized = OnnxNetwork.load(model, "model").layers[0]
    assert (quantized.layout, quantized.channel_axis, quantized.output_axis) == (layout, channel_axis, output_axis)


ROWS = {
    "Attention of onnxruntime": (
        "t = com.microsoft.Attention<num_heads=2>(x, w, b)",
        {"w": (6, 18), "b": (18,)},
        "operator is not supported",
    ),
    "Einsum": ('t = Einsum<equation="ntd,dhk->nhtk">(x, w)', {"w": (6, 2, 3)}, "ntd,dhk->nhtk is no product with one matrix"),
    "LSTM": (
        "_, t = LSTM<hidden_size=3>(x, w, r)",
        {"w": (1, 12, 6), "r": (1, 12, 3)},
        "it is recurrent, which is not corrected",
    ),
    "GRU": ("_, t = GRU<hidden_size=3>(x, w, r)", {"w": (1, 9, 6), "r": (1, 9, 3)}, "it is recurrent, which is not corrected"),
    "FusedMatMul": ("t = com.microsoft.FusedMatMul(x, w)", {"w": (6, 5)}, "operator is not supported"),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_each_operator_with_weights_has_a_row(name):
    body, shapes, reason = ROWS[name]
    text = f"g (float[N,4,6] x) => (float t) {{ {body} }}".replace("float t)", "float[] t)")
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> {text}')
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(numpy_helper.from_array(weights(*shape), key) for key, shape in shapes.items())
    (row,) = correct(model, [samples(1, 4, 6, seed=k) for k in range(8)]).report
    assert row.reason == reason


PLAIN = {
    "positions": ("t = Add(x, w)", (4, 6)), "scales": ("t = Mul(x, w)", (4, 6)),
    "table": ("i = Cast<to=7>(x) t = Gather(w, i)", (9, 6)),
    "norm": ("t = LayerNormalization(x, w)", (6,)), "choice": ("c = Greater(x, w) t = Where(c, x, w)", (4, 6)),
    "concat": ("t = Concat<axis=0>(x, w)", (1, 4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_operators_that_multiply_with_no_weights_have_no_row(name):
    body, shape = PLAIN[name]
    model = model_from_text(
        f"g (float[1,4,6] x) => (float[?,?,?] y) {{ {body} y = Identity(t) }}",
        w=weights(*shape) if len(shape) > 1 else biases(*shape),
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert OnnxNetwork.load(model, "model").unsupported == []


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("method", ["mean", "empirical", "auto"])
def test_vectors(left, method):
    product = "MatMul(w, x)" if left else "MatMul(x, w)"
    model = model_from_text(
        f"g (float[6] x) => (float[4] y) {{ [layer] y = {product} }}", w=weights(*((4, 6) if left else (6, 4)), axis=1 - left)
    )
    correction = corrected(model, list(samples(16, 6)), method=method)
    (row,) = correction.report
    assert row.channels == 4
    if method != "auto":
        assert row.method == method
        assert row.shift_after < 1e-5 * row.shift_before
    onnxruntime.InferenceSession(correction.model.SerializeToString())


def branch(name, *nodes):
    return helper.make_graph(
        [*nodes, helper.make_node("Slice", ["x", "from", "to", "axes"], [name])],
        "branch",
        [],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.int64([each]), key) for key, each in (("from", 0), ("to", 3), ("axes", 1))],
    )


def with_branches(then, other):
    """A model of two layers after an If."""
    model = model_from_text(
        "g (float[N,4] x) => (float[N,3] y) { [a] t = MatMul(i, w) r = Relu(t) [b] y = MatMul(r, v) }",
        w=weights(3, 5), v=weights(5, 3), condition=np.array(True),
    )  # fmt: skip
    node = helper.make_node("If", ["condition"], ["i"], then_branch=then, else_branch=other)
    nodes = [node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("name", ["t", "r", "y"])
@pytest.mark.parametrize("method", ["mean", "empirical"])
def test_tensors_of_subgraphs_that_are_called_like_others(name, method):
    found, expected = (
        corrected(with_branches(branch(each), branch(each)), samples(8, 4), method=method) for each in (name, "inner")
    )
    assert [layer.method for layer in found.report] == [method, method]
    assert [layer.shift_before for layer in found.report] == [layer.shift_before for layer in expected.report]
    network = OnnxNetwork.load(with_branches(branch(name), branch(name)), "model")
    assert network.order[1:] == ["a", "Relu:r", "b"]


def test_a_loop_that_carries_a_tensor_called_like_another():
    body = parser.parse_graph(
        "body (int64 k, bool c, float[N,4] y) => (bool d, float[N,4] z) { d = Identity(c) z = Add(y, x) }"
    )
    model = model_from_text(
        "g (float[N,4] x) => (float[N,3] y) { [a] y = MatMul(i, w) }", w=weights(4, 3), n=np.int64(3), c=np.array(True)
    )
    nodes = [helper.make_node("Loop", ["n", "c", "x"], ["i"], body=body), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [layer.method for layer in corrected(model, samples(8, 4), method="empirical").report] == ["empirical"]


@pytest.mark.parametrize("where", ["branch of the model", "branch of the function"])
def test_a_function_with_a_layer_between_subgraphs_has_a_row(where):
    inner = helper.make_node("MatMul", ["i0", "i0"], ["o"])
    if where == "branch of the function":
        value = helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, None)
        block = helper.make_graph([helper.make_node("MatMul", ["i0", "i0"], ["m"])], "b", [], [value])
        constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
        inner = [constant, helper.make_node("If", ["c"], ["o"], then_branch=block, else_branch=block)]
        model = model_from_text("g (float[4,4] x) => (float[4,4] y) { t = Neg(x) [b] y = MatMul(t, w) }", w=weights(4, 4))
        model = with_function(model, "Neg", body=inner)
        name = "Neg:t"
    else:
        call = helper.make_node("Square", ["square"], ["unread"], domain="example.com")
        cut = helper.make_node("Slice", ["x", "from4", "to4", "axes4"], ["square"])
        model = with_branches(branch("o", cut, call), branch("o"))
        for key, each in (("from4", 0), ("to4", 1), ("axes4", 1)):
            model.graph.initializer.append(numpy_helper.from_array(np.int64([each]), key))
        transposed = helper.make_node("Transpose", ["i0"], ["i1"])
        body = [transposed, helper.make_node("MatMul", ["i1", "i0"], ["o"])]
        model.functions.append(
            helper.make_function("example.com", "Square", ["i0"], ["o"], body, [helper.make_opsetid("", 17)])
        )
        model.opset_import.append(helper.make_opsetid("example.com", 1))
        name = "If:i"
    rows = {row.name: row.reason for row in corrected(model, [samples(4, 4)] * 4, method="mean").report}
    assert rows[name] == "its function has layers, which are not corrected"


def test_functions_of_one_name_are_told_apart():
    model = model_from_text(
        "g (float[4,4] x) => (float[4,4] y) { [one] t = Neg(x) [two] u = Neg(t) [a] y = MatMul(u, w) }",
        w=weights(4, 4),
        ir_version=10,
    )
    model = with_function(model, "Neg")
    other = helper.make_node("MatMul", ["i0", "i0"], ["o"])
    model.functions.add().CopyFrom(model.functions[0])
    model.functions[1].overload = model.graph.node[1].overload = "other"
    model.functions[1].node[0].CopyFrom(other)
    rows = [row.name for row in corrected(model, [samples(4, 4)] * 4, method="mean").report]
    assert rows == ["two", "a"]


def test_a_function_that_draws_numbers_is_no_constant():
    model = model_from_text("g (float[N,4] x) => (float[N,4] y) { t = Neg(one) y = Add(x, t) }", one=np.float32([1, 1, 1, 1]))
    body = [helper.make_node("RandomUniformLike", ["i0"], ["o"])]
    network = OnnxNetwork.load(with_function(model, "Neg", body=body), "model")
    assert [operation.name for operation in network.operations] == ["Neg:t", "Add:y"]


def test_branches_in_branches_are_counted_once():
    node = helper.make_node("Identity", ["x"], ["o0"])
    for depth in range(22):
        value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        other = helper.make_graph(
            [helper.make_node("Neg", ["x"], [f"e{depth}"])], "e", [], [onnx.ValueInfoProto(name=f"e{depth}")]
        )
        then = helper.make_graph([node], "t", [], [onnx.ValueInfoProto(name=value.name)])
        node = helper.make_node("If", ["c"], [f"o{depth + 1}"], then_branch=then, else_branch=other)
    call = helper.make_node("Twice", [node.output[0]], ["y"], domain="f")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    function = helper.make_function("f", "Twice", ["i"], ["o"], [helper.make_node("Add", ["i", "i"], ["o"])], opsets[:1])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    constants = [numpy_helper.from_array(np.array(True), "c")]
    graph = helper.make_graph([node, call], "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    start = time.monotonic()
    assert correct(model, samples(8, 4)).report == []
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("kind", ["the long name of the domain", "no import of the domain"])
def test_models_that_onnx_infers_no_shapes_of(kind):
    text = "g (float[N,4] x) => (float[N,4] y) { [a] t = MatMul(x, w) y = Relu(t) }"
    model = model_from_text(text, w=weights(4, 4))
    if kind == "the long name of the domain":
        model.graph.node[0].domain = "ai.onnx"
    else:
        model.graph.node[1].op_type, model.graph.node[1].domain = "Gelu", "com.microsoft"
    assert [row.name for row in corrected(model, samples(16, 4)).report] == ["a"]
