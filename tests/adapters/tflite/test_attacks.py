"""Files that are valid but odd, or damaged: what comes back is right, or it is an error that says why."""

import io
import struct
import zipfile

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import biascorr
from biascorr.adapters.tflite import running
from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.graph.reasons import ReasonCode
from tflite_models import MODELS, Builder, deduplicated, packed, samples_for, unpacked
from tflite_networks import content_of, litert, run, samples_of
from tflite_quantizers import quantized

pytestmark = pytest.mark.usefixtures("trusted")


def loaded(content):
    return TfliteNetwork.load(content, "model")


def assert_same_function(content, other, samples):
    expected, found = litert(content, samples), litert(other, samples)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values, rtol=0, atol=1e-5 * np.abs(values).max())


# Weights of float16, which are dequantized


@pytest.mark.parametrize("name", ["fixture:classifier_float16", "fixture:decoder_float16", "float16_weights"])
def test_files_of_float16_are_equalized(name):
    content, samples = content_of(name), samples_of(name)
    equalization = biascorr.equalize(content, samples)
    assert equalization.chains
    assert equalization.change.relative < 1e-5
    assert_same_function(content, equalization.model, samples)


def test_biases_of_float16_stay_where_they_are():
    network = loaded(MODELS["float16_weights"]())
    shifts = {layer.name: np.full(layer.channels, 0.125) for layer in network.layers}
    assert not any(network.bias_change(layer, shifts[layer.name]).reasons for layer in network.layers)
    found = network.with_shifts(shifts)
    assert len(found.model) == len(network.model)
    for before, after in zip(network.layers, loaded(found.model).layers):
        np.testing.assert_allclose(after.bias, before.bias + 0.125, atol=1e-3)


# Buffers


def test_buffers_of_the_same_bytes_behind_the_flatbuffer():
    """Patching one of them would change the others."""
    content = content_of("shared_biases-int8")
    model = schema.ModelT.InitFromPackedBuf(packed(unpacked(content), behind=True))
    behind = packed(unpacked(content), behind=True)
    start, first = min(each.offset for each in model.buffers if each.offset), {}
    for each in model.buffers:
        each.offset = first.setdefault(behind[each.offset : each.offset + each.size], each.offset) if each.offset else 0
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    assert_only_the_first_layer_changes(bytes(builder.Output()).ljust(start, b"\0") + behind[start:], content)


def test_buffers_of_the_same_bytes_in_the_flatbuffer():
    content = content_of("shared_biases-int8")
    joined, first = bytearray(packed(unpacked(content))), {}
    root = schema.Model.GetRootAs(joined, 0)
    vector = root._tab.Vector(root._tab.Offset(12))
    for index in range(root.BuffersLength()):
        buffer = root.Buffers(index)
        if buffer.DataLength():
            table = first.setdefault(buffer.DataAsNumpy().tobytes(), buffer._tab.Pos)
            struct.pack_into("<I", joined, vector + 4 * index, table - vector - 4 * index)
    assert_only_the_first_layer_changes(bytes(joined), content)


def assert_only_the_first_layer_changes(content, same):
    samples = samples_of("shared_biases-int8")
    assert_same_function(same, content, samples)
    network = loaded(content)
    shift = np.full(8, 0.5)
    assert network.bias_change(network.layers[0], shift).reasons == (ReasonCode.BIAS_SEPARATED(),)
    found = loaded(network.with_shifts({"first": shift}).model)
    for before, after in zip(network.layers, found.layers):
        np.testing.assert_allclose(after.bias, before.bias + (0.5 if before.name == "first" else 0), atol=1e-3)


def test_buffers_that_overlap():
    content = packed(unpacked(content_of("convolutions-int8")), behind=True)
    model = schema.ModelT.InitFromPackedBuf(content)
    start = min(each.offset for each in model.buffers if each.offset)
    model.buffers[-1].offset -= 16
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    with pytest.raises(ValueError, match=r"model: a damaged TFLite file: two buffers have the byte"):
        loaded(bytes(builder.Output()).ljust(start, b"\0") + content[start:])


# What is behind the flatbuffer


def rewritten(tail):
    """A file with this behind it, and what becomes of it where biases get buffers of their own."""
    content = deduplicated(content_of("shared_biases-int8")) + tail
    network = loaded(content)
    return network.with_shifts({"first": np.full(8, 0.5)}).model


@pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 100])
def test_few_bytes_behind_the_flatbuffer_stay(size):
    tail = bytes(range(1, size + 1))
    assert rewritten(tail).endswith(tail)


def archive(content, method=zipfile.ZIP_DEFLATED):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as file:
        file.writestr("labels.txt", content)
        file.comment = b"all labels"
    return made.getvalue()


def test_an_archive_keeps_its_comment():
    with zipfile.ZipFile(io.BytesIO(rewritten(archive("cat\ndog\n")))) as file:
        assert (file.comment, file.read("labels.txt")) == (b"all labels", b"cat\ndog\n")


def test_an_archive_that_cannot_be_read_stays_as_it_is():
    whole = archive("cat\n" * 1000)
    encrypted, damaged = bytearray(whole), bytearray(whole)
    encrypted[whole.index(b"PK\1\2") + 8] |= 1
    damaged[40:50] = bytes(10)
    for tail in (encrypted, damaged):
        assert rewritten(bytes(tail)).endswith(tail)


# Graphs


def test_an_output_that_is_a_constant():
    b = Builder()
    x = b.input("x", (1, 4))
    b.output(b.fully_connected(x, b.weights(3, 4), b.bias(3), name="layer"), "y")
    b.output(b.constant(np.float32([1, 2, 3])), "anchors")
    b.signature()
    network, feeds = loaded(b.bytes()), {"x": np.ones((1, 4), np.float32)}
    for compute in (network.part(feeds, network.outputs), network.deployed()):
        np.testing.assert_array_equal(compute(feeds)["anchors"], [1, 2, 3])
    assert biascorr.correct(b.bytes(), np.ones((8, 4), np.float32)).report[0].method


def test_an_output_that_nothing_makes():
    b = Builder()
    x = b.input("x", (1, 4))
    b.output(b.fully_connected(x, b.weights(3, 4), b.bias(3), name="layer"), "y")
    b.output(b.tensor("lost", (1, 3)), "z")
    with pytest.raises(ValueError, match=r"a damaged TFLite file: output 4 \(lost\) of subgraph main is made by nothing"):
        loaded(b.bytes())


@pytest.mark.parametrize("kind", ["fully_connected", "matmul"])
def test_operators_without_options(kind):
    """Which LiteRT takes for 0."""
    b = Builder()
    x = b.input("x", (1, 2, 4))
    y = b.matmul(x, b.weights(4, 3)) if kind == "matmul" else b.fully_connected(x, b.weights(3, 4))
    b.output(y, "y")
    b.signature()
    b.graph.operators[0].builtinOptions, b.graph.operators[0].builtinOptionsType = None, 0
    samples = {"x": np.random.default_rng(0).normal(size=(1, 2, 4)).astype(np.float32)}
    np.testing.assert_array_equal(run(loaded(b.bytes()), samples)["y"], litert(b.bytes(), samples)["y"])


def test_tensors_called_as_fused_activations_would_be():
    b = Builder()
    y = b.conv2d(b.input("x", (1, 6, 6, 3)), b.weights(8, 3, 3, 3), b.bias(8), activation="RELU6", name="conv")
    y = b.conv2d(y, b.weights(8, 3, 3, 8), b.bias(8), name="second")
    y = b.unary("RELU6", y, name="conv/activation")
    b.output(b.conv2d(y, b.weights(4, 1, 1, 8), b.bias(4), name="last"), "y")
    b.signature()
    samples = {"x": np.random.default_rng(0).normal(0, 10, (4, 6, 6, 3)).astype(np.float32)}
    equalization = biascorr.equalize(b.bytes(), samples)
    assert equalization.chains
    assert_same_function(b.bytes(), equalization.model, samples)
    assert biascorr.equalize(b.bytes(), replace_relu6=True).replaced == ["conv/activation (2)", "conv/activation"]


def test_variables_that_last():
    """What is run in parts does not have what other batches left in them."""
    b = Builder()
    handle = b.op("VAR_HANDLE", [], (), dtype=np.int32, sharedName="state", container="")
    b.graph.tensors[handle].type = schema.TensorType.RESOURCE
    old = b.op("READ_VARIABLE", [handle], (1, 8))
    y = b.fully_connected(b.input("x", (1, 4)), b.weights(8, 4), b.bias(8), activation="RELU", name="layer")
    b.graph.operators.append(schema.OperatorT(b._code("ASSIGN_VARIABLE", None, 1), [handle, y], []))
    b.output(b.add(old, b.fully_connected(y, b.weights(8, 8), b.bias(8), name="last")), "y")
    with pytest.raises(ValueError, match="model: it keeps variables from one batch to the next"):
        loaded(b.bytes())


@pytest.mark.parametrize("kind", ["STRING", "RESOURCE"])
def test_a_bias_of_no_numbers(kind):
    b = Builder()
    bias = b.bias(3)
    b.graph.tensors[bias].type = getattr(schema.TensorType, kind)
    b.output(b.fully_connected(b.input("x", (1, 4)), b.weights(3, 4), bias, name="layer"), "y")
    with pytest.raises(ValueError, match="model: a damaged TFLite file"):
        loaded(b.bytes())


def test_a_window_without_options():
    b = Builder()
    b.output(b.conv2d(b.input("x", (1, 4, 4, 3)), b.weights(3, 1, 1, 3), b.bias(3), name="layer"), "y")
    b.graph.operators[0].builtinOptions, b.graph.operators[0].builtinOptionsType = None, 0
    with pytest.raises(ValueError, match="model: a damaged TFLite file"):
        loaded(b.bytes())


def test_a_layer_that_depends_on_nothing():
    b = Builder()
    y = b.fully_connected(b.input("x", (1, 4)), b.weights(8, 4), b.bias(8), name="layer")
    b.output(b.add(y, b.fully_connected(b.tensor("lost", (1, 4)), b.weights(8, 4), b.bias(8), name="other")), "y")
    with pytest.raises(ValueError, match="model: a damaged TFLite file: layer other reads what nothing makes"):
        loaded(b.bytes())


# Biases


def test_channels_of_tiny_weights_in_int16x8():
    """Steps of their biases are so small that as many as int64 holds would wrap in the sums of LiteRT."""
    b = Builder()
    values = b.rng.normal(size=(8, 3, 3, 3)).astype(np.float32)
    values[4] *= 1e-30
    x = b.input("image", (1, 6, 6, 3))
    y = b.conv2d(x, b.constant(values), b.bias(8), activation="RELU", name="first")
    b.output(b.conv2d(y, b.weights(4, 1, 1, 8), b.bias(4), name="last"), "output")
    b.signature()
    samples = samples_for(b.bytes(), 32)
    network = loaded(quantized(b.bytes(), "int16x8", samples))
    for shift in (np.full(8, 0.5), np.full(8, -1.0)):
        network = network.with_shifts({"first": shift})
        expected, found = litert(network.model, samples), run(network, samples)
        np.testing.assert_allclose(found["output"], expected["output"], atol=0.02)
        assert ReasonCode.BIAS_SATURATES in {each.code for each in network.bias_change(network.layers[0], shift).reasons}


def test_biases_of_4_bits_become_real():
    """Codes of fewer bits than a byte are packed, which nothing here writes."""
    b = Builder()
    codes = np.int8([1, -2, 3, 7])
    bias = b.constant(codes, scale=0.5)
    tensor = b.graph.tensors[bias]
    tensor.type = schema.TensorType.INT4
    b.model.buffers[tensor.buffer].data = ((codes[::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8)
    b.output(b.fully_connected(b.input("x", (1, 4)), b.weights(4, 4), b.dequantize(bias), name="layer"), "y")
    network = loaded(b.bytes())
    (layer,) = network.layers
    np.testing.assert_array_equal(layer.bias, codes * 0.5)
    (after,) = loaded(network.with_shifts({"layer": np.full(4, 1.0)}).model).layers
    np.testing.assert_array_equal(after.bias, codes * 0.5 + 1)


def test_large_files_that_litert_does_not_survive_are_refused(monkeypatch):
    monkeypatch.setattr(running, "_survived", set())
    monkeypatch.setattr(running, "_LARGE", 1 << 10)
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    b.output(b.depthwise(x, b.weights(1, 3, 3, 3, fan_in=9), name="without_bias"), "y")
    with pytest.raises(ValueError, match="model: LiteRT crashes when it runs it"):
        loaded(b.bytes() + bytes(1 << 10))


@pytest.mark.parametrize("recipe", [None, "int8"])
@pytest.mark.parametrize("fused", ["TANH", "SIGN_BIT"])
def test_fused_activations_that_litert_leaves_out(fused, recipe):
    b = Builder()
    x = b.input("image", (1, 5, 5, 3))
    b.output(b.conv2d(x, b.weights(4, 3, 3, 3), b.bias(4), activation="RELU", name="layer"), "output")
    b.signature()
    samples = samples_for(b.bytes())
    model = unpacked(quantized(b.bytes(), recipe, samples) if recipe else b.bytes())
    for each in model.subgraphs[0].operators:
        if hasattr(each.builtinOptions, "fusedActivationFunction"):
            each.builtinOptions.fusedActivationFunction = getattr(schema.ActivationFunctionType, fused)
    content = packed(model)
    expected, found = litert(content, samples)["output"], run(loaded(content), samples)["output"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tables_that_are_there_many_times():
    """A file of some KB that takes hours to read."""
    count, builder = 2000, flatbuffers.Builder()
    schema.TensorStart(builder)
    tensor = schema.TensorEnd(builder)
    schema.SubGraphStartTensorsVector(builder, count)
    for _ in range(count):
        builder.PrependUOffsetTRelative(tensor)
    tensors = builder.EndVector()
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, tensors)
    subgraph = schema.SubGraphEnd(builder)
    schema.ModelStartSubgraphsVector(builder, count)
    for _ in range(count):
        builder.PrependUOffsetTRelative(subgraph)
    subgraphs = builder.EndVector()
    schema.ModelStart(builder)
    schema.ModelAddSubgraphs(builder, subgraphs)
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    with pytest.raises(ValueError, match="its tables are in it more than once"):
        loaded(bytes(builder.Output()))


def test_nothing_of_the_working_folder_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "_survived", set())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contextlib.py").write_text("open('was_run', 'w')")
    loaded(content_of("residual-int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["contextlib.py"]


def test_files_that_only_plain_kernels_do_not_survive_are_refused(monkeypatch):
    monkeypatch.setattr(running, "_survived", set())
    model = unpacked(content_of("fixture:decoder_dynamic"))
    dense = schema.DimensionMetadataT(schema.DimensionType.DENSE, 7)
    model.subgraphs[0].tensors[12].sparsity = schema.SparsityParametersT([0], None, [dense])
    with pytest.raises(ValueError, match="model: LiteRT crashes when it runs it"):
        loaded(packed(model))


@pytest.mark.parametrize("shape", [[], [3], [1, 8, 8]])
def test_a_transposed_convolution_whose_output_has_no_shape_in_the_file(shape):
    model = unpacked(MODELS["transpose_conv"]())
    graph = model.subgraphs[0]
    graph.tensors[graph.operators[0].outputs[0]].shape = shape
    samples = samples_of("transpose_conv", 8)
    correction = biascorr.correct(packed(model), samples, method="mean")
    assert_same_function(MODELS["transpose_conv"](), packed(model), samples)
    assert correction.report[0].method == "mean"


def test_a_file_without_an_end(monkeypatch):
    b = Builder()
    x = b.input("x", (1, 4))
    before = b.fully_connected(x, b.weights(4, 4), b.bias(4), name="before")
    looped = b.op("WHILE", [before], (1, 4), condSubgraphIndex=1, bodySubgraphIndex=2)
    b.output(looped, "y")
    b.subgraph("always")
    inside = b.input("x", (1, 4))
    total = b.op("SUM", [inside, b.constant(np.int32([0, 1]))], ())
    b.output(b.op("EQUAL", [total, total], (), dtype=bool), "goes on")
    b.subgraph("body")
    inside = b.input("x", (1, 4))
    b.output(b.op("ABS", [inside], (1, 4)), "y")
    monkeypatch.setattr(running, "_survived", set())
    monkeypatch.setattr(running, "_PATIENCE", 3)
    with pytest.raises(ValueError, match="^model: LiteRT does not come to an end with it, in 3 seconds$"):
        TfliteNetwork.load(b.bytes(), "model")
