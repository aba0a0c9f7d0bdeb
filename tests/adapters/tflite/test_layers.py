"""What a TFLite network says of its layers, by brute force: their products, the steps of their weights, their mean inputs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import biascorr
from biascorr.adapters.tflite import files, running
from biascorr.adapters.tflite.graph import Graph
from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.correction.methods import mean_shift
from biascorr.graph.reasons import ReasonCode
from biascorr.sweep.measurements import empty_mean
from biascorr.windows import TransposedWindow
from tflite_models import MODELS, UNSUPPORTED, Builder, packed, samples_for, several_signatures, unpacked
from tflite_networks import (
    CORRECTABLE,
    FLOATS,
    QUANTIZED,
    SOME,
    content_of,
    float_of,
    kind_of,
    litert,
    network_of,
    run,
    samples_of,
    tensors_of,
)
from tflite_quantizers import BLOCKS, quantized

LAYERS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL", "CONV_3D"}

pytestmark = pytest.mark.usefixtures("trusted")


def loaded(content):
    return TfliteNetwork.load(content, "model")


# The product, by what TensorFlow says of padding


def same_pads(size, taps, stride, dilation):
    """Zeros before and after: those that ceil(size / stride) outputs need, the odd one after."""
    total = max((-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def by_tap(layer):
    """The weights of each tap as (groups, inputs of one, outputs of one)."""
    weights = np.asarray(layer.weights, np.float64)
    if layer.layout == "HWCM":
        return weights[..., None, :]
    weights = np.moveaxis(weights, 0, -1) if layer.layout == "OHWI" else weights
    *taps, inputs, outputs = weights.shape
    return np.moveaxis(weights.reshape(*taps, inputs, layer.groups, outputs // layer.groups), -2, -3)


def through_tap(x, weights):
    """(..., C) by (groups, I, O)."""
    groups, inputs, outputs = weights.shape
    rows = np.einsum("...gi,gio->...go", x.reshape(*x.shape[:-1], groups, inputs), weights)
    return rows.reshape(*x.shape[:-1], groups * outputs)


def convolved(layer, x):
    window, weights = layer.window, by_tap(layer)
    sizes = x.shape[1:-1]
    pads = window.pads
    if window.auto_pad == "SAME_UPPER":
        pads = [same_pads(*each) for each in zip(sizes, window.taps, window.strides, window.dilations)]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    reach = [(taps - 1) * dilation + 1 for taps, dilation in zip(window.taps, window.dilations)]
    outputs = [(size - over) // stride + 1 for size, over, stride in zip(x.shape[1:-1], reach, window.strides)]
    total = 0.0
    for tap in itertools.product(*map(range, window.taps)):
        starts = [k * dilation for k, dilation in zip(tap, window.dilations)]
        slices = [slice(s, s + (n - 1) * stride + 1, stride) for s, n, stride in zip(starts, outputs, window.strides)]
        total = total + through_tap(x[(slice(None), *slices)], weights[tap])
    return total


def spread(layer, x, shape):
    """A transposed convolution, cut or filled up to a shape: SAME cuts as its convolution would pad, VALID cuts at the end."""
    window, weights = layer.window, by_tap(layer)
    sizes = x.shape[1:-1]
    full = [(size - 1) * stride + taps for size, stride, taps in zip(sizes, window.strides, window.taps)]
    room = [max(size, wanted) for size, wanted in zip(full, shape)]
    total = np.zeros((len(x), *room, layer.channels))
    for tap in itertools.product(*map(range, window.taps)):
        slices = [slice(k, k + (n - 1) * stride + 1, stride) for k, n, stride in zip(tap, sizes, window.strides)]
        total[(slice(None), *slices)] += through_tap(x, weights[tap])
    is_same = window.auto_pad == "SAME_UPPER"
    starts = [max(size - wanted, 0) // 2 if is_same else 0 for size, wanted in zip(full, shape)]
    return total[(slice(None), *(slice(start, start + wanted) for start, wanted in zip(starts, shape)))]


def product(layer, x, shape):
    """The output of a layer without its bias, (N, *S, C) or any axes around; `shape` is what it should have."""
    x = x.astype(np.float64)
    if layer.window is not None:
        return spread(layer, x, shape[1:-1]) if isinstance(layer.window, TransposedWindow) else convolved(layer, x)
    weights = np.asarray(layer.weights, np.float64)
    made = np.moveaxis(x, layer.channel_axis, -1) @ (weights.T if layer.layout == "OI" else weights)
    return np.moveaxis(made, -1, layer.output_axis)


def codes_between(content, name):
    """The scale and limits of what an ADD of this output reads of a product, which is quantized there; None for others."""
    model = unpacked(content)
    tensors, operators = model.subgraphs[0].tensors, model.subgraphs[0].operators
    makers = {tensors[index].name.decode(): each for each in operators for index in each.outputs}
    if kind_of(model, makers.get(name, operators[0])) != schema.BuiltinOperator.ADD:
        return None
    (between,) = [tensors[index] for index in makers[name].inputs if tensors[index].name.decode() in makers]
    dtype = {schema.TensorType.INT8: np.int8, schema.TensorType.INT16: np.int16}.get(between.type)
    if dtype is None:
        return None
    limits, (scale,), (zero,) = np.iinfo(dtype), between.quantization.scale, between.quantization.zeroPoint
    return float(scale), *((float(code) - zero) * scale for code in (limits.min, limits.max))


@pytest.mark.parametrize("name", [*FLOATS, *QUANTIZED])
def test_layers_compute_what_is_said_of_them(name):
    network = network_of(name)
    whole = tensors_of(network, {each: rows[:1] for each, rows in samples_of(name).items()})
    assert network.layers
    assert not network.unsupported
    for layer in network.layers:
        x, y = whole[layer.input], whole[layer.output]
        grid = codes_between(content_of(name), layer.name)
        found = np.clip(product(layer, x, y.shape), *(grid[1:] if grid else (-np.inf, np.inf)))
        found += 0 if layer.bias is None else layer.bias.astype(np.float64)
        assert layer.op in LAYERS
        assert found.shape == y.shape
        assert y.shape[layer.output_axis] == layer.channels
        assert x.shape[layer.channel_axis] == layer.input_channels
        tolerance = 0.51 * grid[0] if grid else 2e-6 * np.abs(found).max() + 1e-6
        np.testing.assert_allclose(y, found, rtol=1e-5, atol=tolerance, err_msg=layer.name)


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_every_product_of_a_file_is_a_layer(name):
    model = unpacked(content_of(name))
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    kinds = {code: kind for kind, code in vars(schema.BuiltinOperator).items() if kind in LAYERS}
    expected = [kinds[codes[each.opcodeIndex]] for each in model.subgraphs[0].operators if codes[each.opcodeIndex] in kinds]
    found = [layer.op for layer in network_of(name).layers]
    if "attention" in name:
        expected = [kind for kind in expected if kind != "BATCH_MATMUL"]  # of two computed sides
    assert found == expected


def test_the_two_sides_of_a_product_of_matrices():
    plain, turned, last = network_of("matmul_right").layers
    assert [layer.layout for layer in (plain, turned, last)] == ["IO", "OI", "IO"]
    assert {(layer.channel_axis, layer.output_axis) for layer in (plain, turned, last)} == {(-1, -1)}
    plain, turned = network_of("matmul_left").layers
    assert [plain.layout, turned.layout] == ["OI", "IO"]
    assert {(layer.channel_axis, layer.output_axis) for layer in (plain, turned)} == {(-2, -2)}
    assert plain.bias.shape == (5, 1)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("taps", [(1, 1), (2, 3), (3, 2), (4, 5), (5, 1)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3), (3, 1)])
def test_windows_of_any_size(taps, strides, padding):
    b = Builder()
    x = b.input("x", (2, 7, 9, 2))
    y = b.conv2d(x, b.weights(3, *taps, 2), b.bias(3), strides=strides, padding=padding, name="conv")
    y = b.depthwise(
        x, b.weights(1, *taps, 4, fan_in=8), b.bias(4), strides=(strides[0],) * 2, padding=padding, name="depthwise"
    )
    b.output(y, "depthwise")
    b.output(b.graph.operators[0].outputs[0], "conv")
    t = b.transpose_conv(x, b.weights(3, *taps, 2), b.bias(3), strides=strides, padding=padding, name="transposed")
    b.output(t, "transposed")
    b.signature()
    network = loaded(b.bytes())
    whole = tensors_of(network, {"x": np.random.default_rng(0).normal(size=(2, 7, 9, 2)).astype(np.float32)})
    for layer in network.layers:
        y = whole[layer.output]
        np.testing.assert_allclose(y, product(layer, whole[layer.input], y.shape) + layer.bias, rtol=1e-5, atol=1e-5)
        assert_means_are_exact(layer, whole[layer.input], y.shape)


@pytest.mark.parametrize("shape", [(3, 3), (1, 5), (4, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_volumes_and_dilations(shape, dilation):
    b = Builder()
    x = b.input("x", (1, 9, 9, 4))
    y = b.conv2d(x, b.weights(6, *shape, 2), b.bias(6), dilation=dilation, name="grouped")
    b.output(b.depthwise(y, b.weights(1, *shape, 12, fan_in=9), b.bias(12), dilation=dilation, name="multiplied"), "y")
    b.signature()
    network = loaded(b.bytes())
    whole = tensors_of(network, samples_for(b.bytes(), 1))
    for layer in network.layers:
        y = whole[layer.output]
        np.testing.assert_allclose(y, product(layer, whole[layer.input], y.shape) + layer.bias, rtol=1e-5, atol=1e-5)
    assert [layer.groups for layer in network.layers] == [2, 1]


# Their means


def assert_means_are_exact(layer, x, shape):
    """The mean of what other weights would change, by the mean input."""
    other = np.asarray(layer.weights) + np.random.default_rng(0).normal(0, 0.1, layer.weights.shape).astype(np.float32)
    mean = empty_mean(layer)
    mean.update(x)
    difference = product(replace(layer, weights=other), x, shape) - product(layer, x, shape)
    expected = np.moveaxis(difference, layer.output_axis, 0).reshape(layer.channels, -1).mean(axis=1)
    np.testing.assert_allclose(mean_shift(layer, other, mean.mean(None)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_the_mean_of_a_product_is_the_product_of_the_mean(name):
    network = network_of(name)
    whole = tensors_of(network, {each: rows[:1] for each, rows in samples_of(name).items()})
    for layer in network.layers:
        assert_means_are_exact(layer, whole[layer.input], whole[layer.output].shape)


# Their weights and biases


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_whole_steps(name):
    network, originals = network_of(name), {layer.name: layer for layer in loaded(float_of(name)).layers}
    has_steps = False
    for layer in network.layers:
        weights, step = np.asarray(layer.weights), layer.weight_step
        assert weights.dtype == np.float32
        assert weights.shape == layer.weights.shape
        if layer.name in originals:  # others are matched by their weights
            given = np.asarray(originals[layer.name].weights)
            limit = np.broadcast_to(np.abs(given).max() / 1000 if step is None else 0.501 * step, given.shape)
            assert (np.abs(weights - given) <= limit).all()
        if step is None:
            continue
        has_steps = True
        assert step.ndim == weights.ndim
        codes = weights / step
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
        axes = tuple(axis for axis, size in enumerate(step.shape) if size == 1)
        top = 7 if "int4" in name or "int8x4" in name else 127
        assert (np.abs(np.round(codes)).max(axis=axes) == top).all()
        assert step.size > 1 or "per_tensor" in name or layer.op == "BATCH_MATMUL" or "decoder" in name
    assert has_steps == (name in CORRECTABLE and not name.endswith("float16"))


def test_steps_and_codes_of_made_up_weights():
    first, logits = network_of("int8_weights").layers
    np.testing.assert_allclose(np.ravel(first.weight_step), np.float32(np.linspace(1, 3, 8) / 500), rtol=1e-7)
    assert first.weight_step.shape == (8, 1, 1, 1)
    np.testing.assert_allclose(logits.weight_step, np.float32([[0.004]]), rtol=1e-7)
    rng = Builder().rng
    codes = rng.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8)
    np.testing.assert_allclose(np.asarray(first.weights), codes * np.float32(first.weight_step), rtol=1e-6)


@pytest.mark.parametrize(("bits", "dtype"), [(4, "INT4"), (2, "INT2")])
@pytest.mark.parametrize("inputs", [3, 4, 5, 8])
def test_packed_weights(bits, dtype, inputs):
    """Of an odd count too: the first code is in the lowest bits."""
    kind = getattr(schema.TensorType, dtype, None)
    if kind is None:
        pytest.skip("this LiteRT has no such type")
    codes = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, inputs))
    fields = (codes.ravel() & (2**bits - 1)).astype(np.uint8)
    raw = np.packbits(((fields[:, None] >> np.arange(bits)) & 1).astype(np.uint8).ravel(), bitorder="little")
    b = Builder()
    x = b.input("x", (1, inputs))
    scale = np.float32([0.5, 0.25, 2.0])
    weights = b.constant(np.zeros((3, inputs), np.int8), scale=scale)
    tensor = b.graph.tensors[weights]
    tensor.type, b.model.buffers[tensor.buffer].data = kind, raw
    b.output(b.fully_connected(x, b.dequantize(weights), b.bias(3), name="dense"), "y")
    b.signature()
    try:
        network = loaded(b.bytes())
    except ValueError as error:
        if "LiteRT cannot run it" not in str(error):
            raise
        pytest.skip("this LiteRT does not dequantize it")
    (layer,) = network.layers
    np.testing.assert_array_equal(np.asarray(layer.weights), codes * scale[:, None])


def test_weights_are_read_each_time():
    layer = network_of("residual-int8").layers[0]
    assert np.asarray(layer.weights) is not np.asarray(layer.weights)


def test_shared_weights_are_known():
    for name in ("shared_weights", "shared_weights-int8"):
        assert [layer.shares_weights for layer in network_of(name).layers] == [True, True, False]
    assert not any(layer.shares_weights for layer in network_of("residual-int8").layers)


@pytest.mark.parametrize("name", SOME)
def test_biases_are_those_of_the_float_file_rounded(name):
    originals = {layer.name: layer for layer in loaded(float_of(name)).layers}
    for layer in network_of(name).layers:
        if layer.name not in originals:
            continue
        given = originals[layer.name].bias
        assert (layer.bias is None) == (given is None)
        if given is not None:
            tolerance = np.abs(given).max() / 200 + 1e-6  # those of ADD have 8 bits, others the step of products
            np.testing.assert_allclose(layer.bias, given, atol=tolerance)


# What cannot be corrected


def reasons_of(network):
    return {report.name: (report.op, report.reasons[0].code) for report in network.unsupported}


def test_layers_of_other_subgraphs():
    network = loaded(UNSUPPORTED["control_flow"]())
    assert [layer.name for layer in network.layers] == ["before", "after"]
    other = "FULLY_CONNECTED", ReasonCode.OTHER_SUBGRAPH
    assert reasons_of(network) == {"then/in_then": other, "else/in_else": other}
    assert "it is in subgraph then" in network.unsupported[0].reason
    assert list(network.order)[-2:] == ["then/in_then", "else/in_else"]


def test_the_first_of_several_signatures():
    network = loaded(several_signatures())
    assert [layer.name for layer in network.layers] == ["encode_first", "encode_last"]
    assert [code for _, code in reasons_of(network).values()] == [ReasonCode.OTHER_SUBGRAPH] * 2
    assert ([each.name for each in network.inputs], network.outputs) == (["x"], ["y"])
    turned = unpacked(several_signatures())
    turned.signatureDefs.reverse()
    assert [layer.name for layer in loaded(packed(turned)).layers] == ["encode_first", "encode_last"]


def test_recurrent_layers():
    network = loaded(UNSUPPORTED["lstm"]())
    assert [layer.name for layer in network.layers] == ["after"]
    ((op, code),) = reasons_of(network).values()
    assert (op, code) == ("UNIDIRECTIONAL_SEQUENCE_LSTM", ReasonCode.RECURRENT)


def test_parts_have_all_tensors_of_recurrent_operators(monkeypatch):
    """Those that integer ones keep what is between their products in are neither inputs nor outputs."""
    model = unpacked(UNSUPPORTED["lstm"]())
    graph = model.subgraphs[0]
    for k in range(5):
        grid = schema.QuantizationParametersT(None, None, [0.1 + k], [0])
        graph.tensors.append(schema.TensorT([1], schema.TensorType.INT16, 0, f"inner {k}", grid))
    graph.operators[0].intermediates = list(range(len(graph.tensors) - 5, len(graph.tensors)))
    network, made = loaded(packed(model)), []
    monkeypatch.setattr(running, "Runner", lambda content, *_, **__: made.append(unpacked(content).subgraphs[0]))
    network.part({"image": np.zeros((1, 5, 8), np.float32)}, network.outputs)
    names = [made[0].tensors[index].name.decode() for index in made[0].operators[0].intermediates]
    assert names == [f"inner {k}" for k in range(5)]


def test_sparse_weights():
    network = loaded(UNSUPPORTED["sparse_weights"]())
    assert reasons_of(network) == {"sparse": ("FULLY_CONNECTED", ReasonCode.WEIGHTS_FORMAT)}
    assert network.unsupported[0].reason == "its weights are sparse, which is not read"
    assert [layer.name for layer in network.layers] == ["after"]


def test_weights_of_blocks():
    model, recipe = BLOCKS
    content = MODELS[model]()
    content = quantized(content, recipe, samples_for(content))
    network = loaded(content)
    assert reasons_of(network) == {"flattening": ("FULLY_CONNECTED", ReasonCode.WEIGHTS_FORMAT)}
    assert network.unsupported[0].reason == "its weights are quantized in blocks, which is not read"
    samples = samples_for(content)
    expected, found = litert(content, samples), run(network, samples)  # with the scales of blocks, which are tensors
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-5)


def test_computed_weights():
    network = loaded(UNSUPPORTED["computed_weights"]())
    assert reasons_of(network) == {"of_computed": ("FULLY_CONNECTED", ReasonCode.WEIGHTS_COMPUTED)}
    assert [layer.name for layer in network.layers] == ["before"]


def test_a_computed_bias():
    b = Builder()
    x = b.input("x", (1, 4))
    bias = b.reshape(b.fully_connected(x, b.weights(3, 4), b.bias(3), name="before"), (3,))
    b.output(b.fully_connected(x, b.weights(3, 4), bias, name="after"), "y")
    network = loaded(b.bytes())
    assert reasons_of(network) == {"after": ("FULLY_CONNECTED", ReasonCode.BIAS_COMPUTED)}


@pytest.mark.parametrize("kind", ["custom_operator", "flex_operator"])
@pytest.mark.parametrize("method", ["auto", "empirical"])
def test_what_is_before_operators_that_litert_does_not_have_is_corrected(kind, method):
    content = UNSUPPORTED[kind]()
    network = TfliteNetwork.load(content, "model")
    assert reasons_of(network) == {
        "custom_1": ("CUSTOM", ReasonCode.OPERATOR_UNSUPPORTED),
        "after": ("FULLY_CONNECTED", ReasonCode.AFTER_CUSTOM),
    }
    assert [layer.name for layer in network.layers] == ["before"]
    assert network.outputs == ["before"]
    samples = {each.name: np.random.default_rng(0).random((24, *each.shape[1:]), np.float32) for each in network.inputs}
    correction = biascorr.correct(content, samples, method=method, quant_params=biascorr.QuantParams("tf", weight_bits=3))
    assert [(layer.name, layer.method is not None) for layer in correction.report] == [
        ("before", True), ("custom_1", False), ("after", False),
    ]  # fmt: skip
    before, after = unpacked(content), unpacked(correction.model)
    changed = [
        k for k, (one, other) in enumerate(zip(before.buffers, after.buffers)) if not np.array_equal(one.data, other.data)
    ]
    graph = before.subgraphs[0]
    assert changed == [graph.tensors[graph.operators[0].inputs[2]].buffer]


def test_a_model_of_which_nothing_runs_is_an_error():
    b = Builder()
    b.output(b.op("CUSTOM", [b.input("x", (1, 4))], (1, 4), custom="Unheard"), "y")
    with pytest.raises(ValueError, match=r"^model: LiteRT cannot run it: .*Unheard"):
        TfliteNetwork.load(b.bytes(), "model")


def test_custom_operators_that_litert_knows():
    """Which no layer is seen in, but maybe is."""
    b = Builder()
    x = b.input("x", (1, 8))
    y = b.op("CUSTOM", [b.fully_connected(x, b.weights(6, 8), b.bias(6), name="before")], (1, 6), custom="TFLite_Unheard")
    b.output(b.fully_connected(y, b.weights(3, 6), b.bias(3), name="after"), "y")
    content, model = files.load(b.bytes(), "model")
    network = TfliteNetwork(Graph(content, model), "model")
    assert [layer.name for layer in network.layers] == ["before", "after"]
    assert reasons_of(network) == {"custom_1": ("CUSTOM", ReasonCode.OPERATOR_UNSUPPORTED)}
    feeds, before = {"serving_default_x:0": np.ones((1, 8), np.float32)}, network.layers[0].output
    assert network.part(feeds, [before])(feeds)[before].shape == (1, 6)  # a part without them runs


@pytest.mark.parametrize("shape", [(2, 8, 5), (3, 2, 8, 5)])
def test_products_with_several_matrices(shape):
    b = Builder()
    x = b.input("x", (*shape[:-2], 6, 8))
    b.output(b.matmul(x, b.weights(*shape), name="product"), "y")
    network = loaded(b.bytes())
    assert reasons_of(network) == {"product": ("BATCH_MATMUL", ReasonCode.NOT_ONE_MATRIX)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_products_of_a_turned_input(side):
    b = Builder()
    x = b.input("x", (1, 8, 6))
    weights = b.weights(8, 5) if side == "right" else b.weights(5, 6)
    y = b.matmul(x, weights, adj_x=True) if side == "right" else b.matmul(weights, x, adj_y=True)
    b.output(y, "y")
    ((_, code),) = reasons_of(loaded(b.bytes())).values()
    assert code is ReasonCode.NO_MATRIX_PRODUCT


def test_a_product_of_two_computed_sides_is_no_layer():
    network = network_of("attention-int8")
    assert [layer.op for layer in network.layers] == ["FULLY_CONNECTED"] * 4
    assert not network.unsupported


def test_products_of_constants_are_no_layers():
    b = Builder()
    x = b.input("x", (1, 4))
    constant = b.fully_connected(b.constant(np.ones((1, 4), np.float32)), b.weights(3, 4), b.bias(3), name="constant")
    b.output(b.add(b.fully_connected(x, b.weights(3, 4), b.bias(3), name="layer"), constant), "y")
    b.signature()
    network = loaded(b.bytes())
    assert [layer.name for layer in network.layers] == ["layer"]
    assert not network.unsupported
    samples = samples_for(b.bytes())
    assert np.isfinite(run(network, samples)["y"]).all()
