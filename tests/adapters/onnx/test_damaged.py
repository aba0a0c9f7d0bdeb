"""Models in which things do not fit, all of which onnxruntime takes until it runs them."""

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import QuantFormat

import biascorr
from networks import (
    batch_norm,
    batch_norm_constants,
    biases,
    mean_corrected,
    model_from_text,
    quantized,
    samples,
    two_layers,
    weights,
    with_constants,
)

X = samples(4, 3, 6, 6)


def refused(model, match):
    with pytest.raises(ValueError, match=match):
        biascorr.inspect(model if isinstance(model, bytes) else model.SerializeToString())


# Files


def test_files_that_are_damaged_after_large_tensors(tmp_path):
    """They are mapped into memory, of which an error must keep no part."""
    model = model_from_text("g (float[N,16] x) => (float[N,20] y) { y = MatMul(x, w) }", w=weights(16, 20, axis=1))
    content, output = model.SerializeToString(), model.graph.output[0].SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(content.replace(bytes([len(output)]) + output, b"\x7f" + output))
    with pytest.raises(ValueError, match=r"model: .*model\.onnx: not an ONNX model, or a truncated one"):
        biascorr.inspect(path)


@pytest.mark.parametrize("text", [b"first", b"tests", b"b1", b"Flatten", b"pads"])
def test_names_that_are_no_text(text):
    """Of a node, of what wrote the model, of a tensor, of an operator, of an attribute."""
    model = two_layers()
    model.graph.node[4].domain = "com.microsoft"
    content = model.SerializeToString()
    refused(
        content.replace(text, b"\xbb" + text[1:]),
        r"^model: not an ONNX model, or a damaged one: b'\\xbb.*' is no text in UTF-8",
    )


@pytest.mark.parametrize("equation", ["nij\x01", "nij,jk\t->nik", "nij,jé->niK", "\0"])
def test_equations_that_onnxruntime_does_not_come_to_the_end_of(equation):
    text = 'g (float[N,3,6] x) => (float[N,3,4] y) { [layer] y = Einsum<equation="nij,jk->nik">(x, w) }'
    model = model_from_text(text, w=weights(6, 4, axis=1))
    assert mean_corrected(model, samples(4, 3, 6)).report[0].method == "mean"
    model.graph.node[0].attribute[0].s = equation.encode()
    refused(model, "^model: node layer: equation b'.*', expected letters, commas, dots and ->")


def test_nothing_is_printed_where_onnxruntime_fails(capfd, monkeypatch):
    """Nor is the model tried again with optimizers that change the arithmetic."""
    monkeypatch.setattr("biascorr.adapters.onnx.files.check_texts", lambda *_: None)
    model = two_layers()
    model.graph.node[0].op_type = "Unknown"
    refused(model.SerializeToString().replace(b"Unknown", b"\xbbnknown"), "^model: onnxruntime cannot run it: ")
    assert capfd.readouterr() == ("", "")


# Shapes


def test_biases_in_integers_of_another_length():
    model = quantized(two_layers(), [{"x": X}], quant_format=QuantFormat.QOperator)
    layer = next(node for node in model.graph.node if node.name == "second_quant")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == layer.input[8])
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(5, np.int32), tensor.name))
    refused(model, r"^model: a damaged ONNX model: layer second_quant: a bias of shape \(5, 1, 1\) for 6 output channels")


def test_biases_of_another_length():
    refused(
        with_constants(two_layers(), b1=biases(3)),
        r"^model: a damaged ONNX model: layer first: a bias of shape \(3, 1, 1\) for 4 output channels",
    )


@pytest.mark.parametrize("groups", [0, -1, 3, 2**40])
def test_groups_that_do_not_divide_channels(groups):
    model = two_layers()
    model.graph.node[0].attribute.append(helper.make_attribute("group", groups))
    refused(model, f"^model: a damaged ONNX model: layer first: weights of shape .* for {groups} groups")


@pytest.mark.parametrize("axis", [7, -3, 1])
def test_scales_along_an_axis_that_is_none_or_has_another_length(axis):
    model = quantized(two_layers(), [{"x": X}], per_channel=True)
    node = next(node for node in model.graph.node if node.output[0] == "w3_DequantizeLinear_Output")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", axis))
    scales = rf"w3_DequantizeLinear_Output: scales of shape \(5,\) along axis {axis} of \(5, 6\)"
    refused(model, f"^model: a damaged ONNX model: {scales}")


@pytest.mark.parametrize("changes", [{"axis": 2}, {"axis": 1}, {"block_size": 2}])
def test_blocks_that_are_not_those_of_the_scales(changes):
    text = """g (float[N,8] x) => (float[N,6] y) {
        [weights] w = DequantizeLinear<axis=0, block_size=4>(codes, scales)
        [layer] y = MatMul(x, w)
    }"""
    codes, scales = np.random.default_rng(0).integers(-8, 8, (8, 6)).astype(np.int8), np.ones((2, 6), np.float32)
    model = model_from_text(text, opset=21, ir_version=10, codes=codes, scales=scales)
    assert biascorr.inspect(model).layers[0].block_size == 4
    for attribute in model.graph.node[0].attribute:
        attribute.i = changes.get(attribute.name, attribute.i)
    refused(model, "^model: ")


def test_layers_of_one_channel_may_have_biases_that_make_more_of_it():
    text = "g (float[N,3,6] x) => (float[N,3,5] y) { [layer] a = MatMul(x, w) y = Add(a, b) }"
    model = model_from_text(text, w=weights(6, 1, axis=1), b=biases(5))
    assert mean_corrected(model, samples(4, 3, 6)).report[0].method == "mean"


def test_a_layer_that_nothing_runs_says_that_data_does_not_fit():
    model = model_from_text(
        "g (float[N,K] x) => (float[N,K] y) { [layer] a = MatMul(x, w) y = Relu(x) }", w=weights(6, 4, axis=1)
    )
    with pytest.raises(ValueError, match="^layer layer: input_mean: shape "):
        biascorr.correct(model, samples(4, 2), method="analytical")


def test_a_layer_that_nothing_runs_and_whose_batch_normalization_has_other_channels():
    text = f"""g (float[N,4,6,6] x) => (float[N,4,6,6] y) {{
        {batch_norm("x", "n")}
        [layer] a = Conv<group=4>(n, w)
        y = Relu(x)
    }}"""
    model = model_from_text(text, w=weights(4, 3, 3, 3), **batch_norm_constants(4))
    with pytest.raises(ValueError, match="^layer layer: input_mean: shape "):
        biascorr.correct(model, samples(4, 4, 6, 6), method="analytical")


def test_limits_that_are_no_numbers():
    text = "g (float[N,6] x) => (float[N,4] y) { [layer] a = MatMul(x, w) y = Clip(a, low) }"
    model = model_from_text(text, w=weights(6, 4, axis=1), low=np.float32([0, 1]))
    refused(model, "^model: a damaged ONNX model: ")


def test_pads_that_are_not_two_for_each_axis():
    text = "g (float[N,4,5] x) => (float[N,K,M] y) { [layer] a = Conv(x, w) y = Pad(a, pads) }"
    model = model_from_text(text, w=weights(4, 4, 1), pads=np.array([0, 0, 1, 0, 0]))
    refused(model, "^model: ")


def test_an_output_of_a_type_that_there_is_not():
    """Which onnxruntime does not look at where the output is a constant."""
    model = model_from_text("g (float[N,6] x) => (float[N,4] y, float[6,4] w) { [layer] y = MatMul(x, w) }", w=weights(6, 4))
    model.graph.output[1].type.tensor_type.elem_type = -(2**31)
    refused(model, "^model: a damaged ONNX model: w: unknown data type -2147483648")


def test_a_version_that_never_was():
    """With no opset either, where a bias needs an operator of ONNX."""
    model = model_from_text("g (float[N,6] x) => (float[N,4] y) { [layer] y = MatMul(x, w) }", w=weights(6, 4, axis=1))
    model.ir_version = -1
    model.opset_import[0].domain = "own"
    with pytest.raises(ValueError, match="^reference: onnxruntime cannot run it: "):
        mean_corrected(model, samples(4, 6))


def test_sizes_below_zero_are_not_known():
    text = f"""g (float[N,3,6,6] x) => (float[N,4,M,M] y) {{
        {batch_norm("x", "n")}
        [layer] y = Conv<pads=[1,1,1,1]>(n, w)
    }}"""
    model = model_from_text(text, w=weights(4, 3, 3, 3), **batch_norm_constants(3))
    model.graph.value_info.append(helper.make_tensor_value_info("n", onnx.TensorProto.FLOAT, [1, 3, -6, 6]))
    params = biascorr.QuantParams(weight_bits=4)
    assert biascorr.correct(model, method="analytical", quant_params=params).report[0].method == "analytical"
