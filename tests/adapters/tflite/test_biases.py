"""How biases are written into TFLite files: which bytes change, by how much, and what LiteRT makes of it."""

import collections
import functools
import io
import zipfile

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.graph.reasons import ReasonCode
from tflite_models import MODELS, UNSUPPORTED, Builder, deduplicated, packed, samples_for, several_signatures, unpacked
from tflite_networks import (
    EACH,
    FLOATS,
    QUANTIZED,
    SOME,
    batches,
    content_of,
    kind_of,
    litert,
    network_of,
    run,
    samples_of,
    steps_of,
    tensors_of,
)
from tflite_quantizers import quantized

pytestmark = pytest.mark.usefixtures("trusted")


@functools.lru_cache(4)
def loaded(content):
    return TfliteNetwork.load(content, "model")


# The file, by the schema alone


def places_of(content):
    """(start, end) of the bytes of each buffer in a file."""
    model, base = schema.Model.GetRootAs(content, 0), np.frombuffer(content, np.uint8).ctypes.data
    places = []
    for k in range(model.BuffersLength()):
        buffer = model.Buffers(k)
        start = buffer.DataAsNumpy().ctypes.data - base if buffer.DataLength() else buffer.Offset()
        places.append((start, start + (buffer.DataLength() or buffer.Size())))
    return places


PLACES = {
    getattr(schema.BuiltinOperator, kind): position
    for kind, position in {
        "CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "CONV_3D": 2, "TRANSPOSE_CONV": 3
    }.items()
}  # fmt: skip
"""Which input of each operator its bias is."""


parsed = functools.lru_cache(8)(unpacked)
"""For those who change nothing."""


def bias_tensor(content, name):
    """The stored tensor that is the bias of a layer, and the step of its products; None where there is none."""
    model = parsed(content)
    tensors, operators = model.subgraphs[0].tensors, model.subgraphs[0].operators
    made = {index: each for each in operators for index in each.outputs}
    maker = made[loaded(content)._lowered.products[name].output]  # names are not unique
    kind = kind_of(model, maker)
    if kind == schema.BuiltinOperator.ADD:
        (index,) = [index for index in maker.inputs if index not in made]
        return index, None
    if len(maker.inputs) <= PLACES.get(kind, 9) or maker.inputs[PLACES[kind]] < 0:
        return None, None
    index = maker.inputs[PLACES[kind]]
    while index in made:  # of float16
        index = made[index].inputs[0]
    if tensors[index].type not in (schema.TensorType.INT32, schema.TensorType.INT64):
        return index, None
    read, weights = (tensors[maker.inputs[k]].quantization.scale for k in ((2, 1) if PLACES[kind] == 3 else (0, 1)))
    return index, read.astype(np.float64) * weights.astype(np.float64)


def elements_of(content, index):
    model = parsed(content)
    tensor = model.subgraphs[0].tensors[index]
    dtype = {kind: name.lower() for name, kind in vars(schema.TensorType).items()}[tensor.type]
    return np.frombuffer(model.buffers[tensor.buffer].data, dtype)


def is_shared(content, index):
    """Whether other tensors, or other operators, have the bytes of this one."""
    model = parsed(content)
    tensors = model.subgraphs[0].tensors
    same = [k for k, tensor in enumerate(tensors) if tensor.buffer == tensors[index].buffer]
    return sum(list(each.inputs).count(k) for each in model.subgraphs[0].operators for k in same) > 1


def plain(tree):
    """Objects of the schema as what can be compared; buffers of tensors apart."""
    if isinstance(tree, (list, tuple, np.ndarray)):
        return [plain(each) for each in tree]
    if hasattr(tree, "__dict__"):
        return {name: plain(value) for name, value in vars(tree).items() if name not in ("buffer", "opcodeIndex")}
    return tree


def constants_of(model, graph):
    return [
        None if model.buffers[each.buffer].data is None else model.buffers[each.buffer].data.tobytes() for each in graph.tensors
    ]


def assert_all_else_is_kept(before, after, *, changed=(), added=0):
    """Of the file: its tensors but what these have, and so many more; operators but what they read; all the rest."""
    first, second = unpacked(before), unpacked(after)
    assert first.description == second.description
    assert first.version == second.version
    assert plain(first.signatureDefs) == plain(second.signatureDefs)
    contents = [
        {each.name: model.buffers[each.buffer].data.tobytes() for each in model.metadata or []} for model in (first, second)
    ]
    assert contents[0] == contents[1]
    assert len(first.subgraphs) == len(second.subgraphs)
    for number, (one, other) in enumerate(zip(first.subgraphs, second.subgraphs)):
        count = len(one.tensors)
        assert len(other.tensors) == count + (0 if number else added)
        assert plain(one.tensors) == plain(other.tensors[:count])
        constants = constants_of(first, one), constants_of(second, other)
        for k in range(count):
            if number or k not in changed:
                assert constants[0][k] == constants[1][k], one.tensors[k].name
        assert [kind_of(first, each) for each in one.operators] == [kind_of(second, each) for each in other.operators]
        assert list(one.inputs) == list(other.inputs)
        assert list(one.outputs) == list(other.outputs)
        assert one.name == other.name
        for each, same in zip(one.operators, other.operators):
            assert list(each.outputs) == list(same.outputs)
            assert plain(each.builtinOptions) == plain(same.builtinOptions)
            given, read = list(each.inputs), list(same.inputs)
            differing = [k for k in range(len(read)) if k >= len(given) or read[k] != given[k]]
            assert all(read[k] >= count for k in differing)
            assert len(differing) <= (0 if number else min(added, 1))


# Which bytes change


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_only_bytes_of_biases_change(name):
    content, network = content_of(name), network_of(name)
    indices = {layer.name: bias_tensor(content, layer.name)[0] for layer in network.layers}
    own = {layer: index for layer, index in indices.items() if index is not None and not is_shared(content, index)}
    shifts = {layer.name: np.full(layer.channels, 0.37) for layer in network.layers if layer.name in own}
    made = network.with_shifts(shifts).model
    assert len(made) == len(content)
    places, tensors = places_of(content), unpacked(content).subgraphs[0].tensors
    allowed = np.zeros(len(content), bool)
    for index in own.values():
        start, end = places[tensors[index].buffer]
        allowed[start:end] = True
        assert made[start:end] != content[start:end]
    differs = np.frombuffer(content, np.uint8) != np.frombuffer(made, np.uint8)
    assert differs.any() == bool(own)
    assert not (differs & ~allowed).any()
    assert network.model == content  # the given one stays as it is
    litert(made, samples_of(name, 1))


@pytest.mark.parametrize("recipe", [None, "int8", "dynamic"])
@pytest.mark.parametrize("model", ["residual", "fully_connected"])
def test_buffers_behind_the_flatbuffer(model, recipe):
    given = MODELS[model]()
    given = quantized(given, recipe, samples_for(given)) if recipe else given
    content = packed(unpacked(given), behind=True)
    assert content != given
    samples, network = samples_for(given), loaded(content)
    layer = network.layers[0]
    shift = np.linspace(-0.2, 0.2, layer.channels)
    made = network.with_shifts({layer.name: shift}).model
    assert len(made) == len(content)
    (place,) = {places_of(content)[unpacked(content).subgraphs[0].tensors[bias_tensor(content, layer.name)[0]].buffer]}
    differs = np.flatnonzero(np.frombuffer(content, np.uint8) != np.frombuffer(made, np.uint8))
    assert place[0] <= differs[0] <= differs[-1] < place[1]
    expected = loaded(given).with_shifts({layer.name: shift}).model
    for output, found in litert(made, samples).items():
        np.testing.assert_array_equal(found, litert(expected, samples)[output])


def test_nothing_changes_without_shifts():
    for name in ("residual-int8", "fixture:equal_biases_int8"):
        assert network_of(name).with_shifts({}).model == content_of(name)


def test_shifts_add_up():
    network = network_of("residual-int8")
    layer = network.layers[0]
    step = np.ravel(layer.weight_step)[0] * 0 + bias_tensor(network.model, layer.name)[1]
    twice = network.with_shifts({layer.name: 3 * step}).with_shifts({layer.name: -step})
    assert twice.model == network.with_shifts({layer.name: 2 * step}).model
    assert twice.with_shifts({layer.name: -2 * step}).model == network.model


# By how much


SIZES = [0.0, 0.4, 1.0, -1.0, 10.6, -1234.4, 20000.0]
"""In steps of the bias."""


@pytest.mark.parametrize("name", [name for name in EACH if "int8" in name or "int16" in name])
def test_codes_move_by_whole_steps_of_products(name):
    """Of the input's scale times that of the weights, whatever scale the bias has."""
    content, network, is_any = content_of(name), network_of(name), False
    for layer in network.layers:
        index, step = bias_tensor(content, layer.name)
        if index is None or step is None or is_shared(content, index):
            continue
        is_any = True
        before = elements_of(content, index)
        assert before.dtype == (np.int64 if "int16x8" in name else np.int32)
        for start in (0, 4):
            sizes = np.resize(np.roll(SIZES, start), before.shape)
            shift = sizes * step
            after = elements_of(network.with_shifts({layer.name: shift}).model, index)
            np.testing.assert_array_equal(after - before, np.round(sizes))
            change = network.bias_change(layer, shift)
            np.testing.assert_allclose(change.applied, np.round(sizes) * step, rtol=1e-12)
            assert change.reasons == ()
    is_none = name.endswith(("weights_int8", "int8x4")) or name.startswith(("matmul", "fixture:equal"))
    assert is_any or is_none


@pytest.mark.parametrize("name", EACH)
def test_what_is_applied_is_what_outputs_move_by(name):
    """Of each layer, by the file that is written and read again."""
    network = network_of(name)
    feeds = batches(samples_of(name))[0]
    whole, count = tensors_of(network, feeds), 0
    for layer in network.layers:
        shift = np.random.default_rng(count).normal(0, 0.1, layer.channels)
        change = network.bias_change(layer, shift)
        if change.applied is None:
            assert change.reasons[0].code is ReasonCode.NO_PLACE_FOR_BIAS
            continue
        count += 1
        made = loaded(network.with_shifts({layer.name: shift}).model)
        after = next(each for each in made.layers if each.name == layer.name)
        held = {layer.input: whole[layer.input]}
        found = made.part(held, [after.output], threads=1)(held)[after.output]
        moved = np.moveaxis(found - whole[layer.output], layer.output_axis, -1).reshape(-1, layer.channels).mean(axis=0)
        np.testing.assert_allclose(moved, change.applied, atol=1e-5 * max(1, np.abs(found).max()))
        assert np.abs(change.applied - shift).max() < (0.5 if layer.op == "BATCH_MATMUL" else 0.01)  # which has 8 bits there
        if layer.bias is not None:
            np.testing.assert_allclose(np.ravel(after.bias) - np.ravel(layer.bias), change.applied, atol=1e-6)
    assert count or name.startswith("matmul")


@pytest.mark.parametrize("name", EACH)
def test_what_is_applied_is_what_litert_moves_by(name):
    """Of the last layer, in the file itself."""
    network, samples = network_of(name), samples_of(name)
    producers = {output: step for step in network.operations for output in step.outputs}
    layer = network.layers[-1]
    outputs = [each for each in network.outputs if is_made_by(producers, each, layer)]
    assert outputs or name.startswith(("fully_connected", "scaled", "several", "fixture", "squeezed", "attention", "conv3d"))
    before, step = litert(content_of(name), samples), steps_of(content_of(name))
    for output in outputs:
        for size in (0.003, -0.05, 0.4):
            shift = np.full(layer.channels, size)
            change = network.bias_change(layer, shift)
            if change.applied is None:
                continue
            after = litert(network.with_shifts({layer.name: shift}).model, samples)[output]
            both = np.stack([before[output], after])
            inside = ((both > both[0].min()) & (both < both[0].max())).all(axis=0) | (step[output] == 0)  # codes go further
            moved = np.broadcast_to(layer.along_channels(change.applied), after.shape)
            np.testing.assert_allclose((after - before[output])[inside], moved[inside], atol=1.01 * step[output] + 1e-5)


def is_made_by(producers, output, layer):
    """Whether an output is that of a layer, quantized and dequantized maybe, without an activation."""
    while output != layer.output:
        step = producers.get(output)
        if step is None or step.kind.name not in ("QUANTIZE", "DEQUANTIZE"):
            return False
        output = step.inputs[0]
    return True


def added(name, layer):
    network = network_of(name)
    return network, next(each for each in network.layers if each.name == layer or not layer)


@pytest.mark.parametrize(
    ("name", "layer", "dtype"),
    [
        ("matmul_right-int8", "plain_biased", np.int8),
        ("matmul_right-int16x8", "plain_biased", np.int16),
        ("residual-int8", "projected", np.int32),
        ("residual-int16x8", "projected", np.int64),
        ("residual-dynamic", "projected", np.float32),
        ("residual", "projected", np.float32),
        ("float16_weights", "first", np.float16),
        ("fixture:classifier_float16", "", np.float16),
    ],
)
def test_dtypes(name, layer, dtype):
    content, (network, layer) = content_of(name), added(name, layer)
    index, _ = bias_tensor(content, layer.name)
    before = elements_of(content, index)
    assert before.dtype == dtype
    shift = np.full(layer.channels, 0.25)
    after = elements_of(network.with_shifts({layer.name: shift}).model, index)
    tensor = unpacked(content).subgraphs[0].tensors[index]
    applied = network.bias_change(layer, shift).applied
    if dtype in (np.int8, np.int16):
        scale = float(tensor.quantization.scale[0])
        expected = np.clip(before.astype(int) + round(0.25 / scale), np.iinfo(dtype).min, np.iinfo(dtype).max)
        np.testing.assert_array_equal(after, expected)
        np.testing.assert_allclose(applied, (expected - before.astype(int)) * scale)
    elif np.issubdtype(dtype, np.floating):
        np.testing.assert_array_equal(after, (before.astype(np.float64) + 0.25).astype(dtype))
        np.testing.assert_array_equal(applied, after.astype(np.float64) - before)


LIMITS = [("matmul_right-int8", "plain_biased"), ("residual-int8", "projected"), ("residual-int16x8", "projected")]


@pytest.mark.parametrize(("name", "layer"), [*LIMITS, ("matmul_right-int16x8", "plain_biased")])
@pytest.mark.parametrize("sign", [-1, 1])
def test_biases_saturate(name, layer, sign):
    content, (network, layer) = content_of(name), added(name, layer)
    index, _ = bias_tensor(content, layer.name)
    before = elements_of(content, index)
    shift = np.zeros(layer.channels)
    shift[1] = sign * 1e30
    change = network.bias_change(layer, shift)
    after = elements_of(network.with_shifts({layer.name: shift}).model, index)
    limits = np.iinfo(before.dtype)
    largest = 2**44  # as LiteRT's sums of int64 hold
    assert after[1] == (min(limits.max, largest) if sign > 0 else max(limits.min, -largest))
    np.testing.assert_array_equal(np.delete(after, 1), np.delete(before, 1))
    (reason,) = change.reasons
    assert str(reason) == f"{before.dtype} bias saturates in 1 of {layer.channels} channels"
    assert np.sign(change.applied[1]) == sign
    assert not np.delete(change.applied, 1).any()
    made = loaded(network.with_shifts({layer.name: shift}).model)
    after = next(each for each in made.layers if each.name == layer.name)
    moved = np.ravel(after.bias).astype(np.float64) - np.ravel(layer.bias)
    np.testing.assert_allclose(moved, change.applied, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer", "shift"),
    [("residual", "projected", 1e39), ("float16_weights", "first", 1e5), ("residual", "head", np.inf)],
)
def test_real_biases_that_are_beyond_their_dtype_stay(name, layer, shift):
    network, layer = added(name, layer)
    change = network.bias_change(layer, np.full(layer.channels, shift))
    assert change.applied is None
    assert change.reasons[0].code is ReasonCode.BIAS_BEYOND_DTYPE


def test_channels_with_a_step_of_0_stay():
    model = unpacked(content_of("convolutions-int8"))
    graph = model.subgraphs[0]
    weights = next(each for each in graph.tensors if each.name == b"constant_1")
    weights.quantization.scale = np.where(np.arange(8) == 3, 0, weights.quantization.scale).astype(np.float32)
    content = packed(model)
    try:
        network = loaded(content)
    except ValueError as error:
        pytest.skip(f"this LiteRT refuses it: {error}")
    layer = network.layers[0]
    change = network.bias_change(layer, np.ones(8))
    assert change.applied[3] == 0
    np.testing.assert_allclose(np.delete(change.applied, 3), 1, rtol=1e-3)
    assert [str(each) for each in change.reasons] == ["int32 bias has a step of 0 in 1 of 8 channels, which stay"]
    litert(network.with_shifts({layer.name: np.ones(8)}).model, samples_of("convolutions-int8", 1))


# Biases that are added


WITHOUT = [
    ("fully_connected", "without_bias", 2),
    ("fully_connected_of_steps", "kept_without_bias", 2),
    ("transpose_conv", "valid", 3),
    ("conv3d", "second", 2),
]
FORMS = {"": np.float32, "-int8": np.int32, "-int8_in_out": np.int32, "-int16x8": np.int64, "-dynamic": np.float32}


@pytest.mark.parametrize("form", [*FORMS, "-weights_int8", "-float16"])
@pytest.mark.parametrize(("model", "name", "position"), WITHOUT)
def test_a_bias_is_added(model, name, position, form):
    content, (network, layer), samples = content_of(model + form), added(model + form, name), samples_of(model)
    assert layer.bias is None
    shift = np.linspace(-0.2, 0.3, layer.channels)
    change = network.bias_change(layer, shift)
    assert [each.code for each in change.reasons] == [ReasonCode.BIAS_ADDED]
    np.testing.assert_allclose(change.applied, shift, atol=0.02)
    made = network.with_shifts({name: shift}).model
    assert_all_else_is_kept(content, made, added=1)
    graph = unpacked(made).subgraphs[0]
    operator = next(each for each in graph.operators if graph.tensors[each.outputs[0]].name.decode() == name)
    tensor = graph.tensors[operator.inputs[position]]
    expected = np.float32 if model == "conv3d" else FORMS.get(form, np.float32)
    assert elements_of(made, operator.inputs[position]).dtype == expected
    assert list(tensor.shape) == [layer.channels]
    again = loaded(made)
    after = next(each for each in again.layers if each.name == name)
    np.testing.assert_allclose(np.ravel(after.bias), change.applied, rtol=1e-5, atol=1e-7)
    assert_files_move_alike(content, made, samples)
    zeros = network.with_shifts({name: np.zeros(layer.channels)}).model
    for output, values in litert(content, samples).items():
        tolerance = 1.01 * steps_of(content)[output] if form == "-int16x8" else 1e-6  # which rounds otherwise with a bias
        np.testing.assert_allclose(litert(zeros, samples)[output], values, rtol=1e-5, atol=tolerance)


def assert_files_move_alike(before, after, samples):
    """Whether LiteRT has a file compute what its network says of it, as near as of the file before."""
    for output, values in litert(after, samples).items():
        error = np.abs(values - run(loaded(after), samples)[output]).max()
        given = np.abs(litert(before, samples)[output] - run(loaded(before), samples)[output]).max()
        assert error <= 2 * given + steps_of(after)[output] + 1e-6


def test_added_biases_move_litert():
    """The mean of the pre-activation output is not there in the file; that of a layer without one is."""
    b = Builder()
    x = b.input("x", (1, 3, 8))
    b.output(b.fully_connected(x, b.weights(6, 8), keep_dims=True, name="layer"), "y")
    b.signature()
    for recipe in (None, "int8", "int16x8", "dynamic", "weights_int8", "float16"):
        samples = samples_for(b.bytes(), 40)
        content = quantized(b.bytes(), recipe, samples) if recipe else b.bytes()
        network = loaded(content)
        (layer,) = network.layers
        shift = np.linspace(-0.1, 0.1, 6)
        made = network.with_shifts({"layer": shift}).model
        before, after = (litert(each, samples)["y"] for each in (content, made))
        step = steps_of(content)["y"]
        inside = (np.maximum(before, after) < before.max()) & (np.minimum(before, after) > before.min()) | (step == 0)
        moved = np.mean(after - before, axis=(0, 1), where=inside)
        np.testing.assert_allclose(moved, network.bias_change(layer, shift).applied, atol=0.15 * step + 1e-4)


def test_a_product_of_matrices_has_no_place_for_a_bias():
    network, layer = added("matmul_right-int8", "without_bias")
    change = network.bias_change(layer, np.ones(layer.channels))
    assert change.applied is None
    assert [each.code for each in change.reasons] == [ReasonCode.NO_PLACE_FOR_BIAS]


# Buffers that are shared

SHARED = {
    "fixture": lambda: (content_of("fixture:equal_biases_int8"), samples_of("fixture:equal_biases_int8")),
    "float": lambda: (deduplicated(content_of("shared_biases")), samples_of("shared_biases")),
    "int8": lambda: (deduplicated(content_of("shared_biases-int8")), samples_of("shared_biases")),
    "int16x8": lambda: (deduplicated(content_of("shared_biases-int16x8")), samples_of("shared_biases")),
    "dynamic": lambda: (deduplicated(content_of("shared_biases-dynamic")), samples_of("shared_biases")),
    "one tensor": lambda: (content_of("shared_weights"), samples_of("shared_weights")),
    "fixture, one tensor": lambda: (content_of("fixture:equal_biases_float"), samples_of("fixture:equal_biases_float")),
    "float16": lambda: (one_half(), samples_of("float16_weights")),
}


def one_half():
    """Two layers that read one bias, which is dequantized once."""
    b = Builder()
    x = b.input("image", (1, 8, 8, 3))
    bias = b.dequantize(b.constant(b.rng.normal(0, 0.3, 4).astype(np.float16)))
    y = b.conv2d(x, b.weights(4, 3, 3, 3), bias, activation="RELU", name="first")
    b.output(b.conv2d(y, b.weights(4, 3, 3, 4), bias, name="second"), "output")
    b.signature()
    return b.bytes()


def shared_layers(content):
    indices = {layer.name: bias_tensor(content, layer.name)[0] for layer in loaded(content).layers}
    counts = collections.Counter(indices.values())
    return {
        name: index for name, index in indices.items() if index is not None and (counts[index] > 1 or is_shared(content, index))
    }


@pytest.mark.parametrize("kind", SHARED)
def test_shared_biases_get_their_own(kind):
    content, samples = SHARED[kind]()
    network, shared = loaded(content), shared_layers(content)
    assert len(shared) > 1
    for layer in network.layers:
        if layer.bias is None:
            continue
        change = network.bias_change(layer, np.full(layer.channels, 0.2))
        assert ([each.code for each in change.reasons] == [ReasonCode.BIAS_SEPARATED]) == (layer.name in shared)
    layers = {layer.name: layer for layer in network.layers if layer.bias is not None}
    for count in (1, len(shared)):
        names = list(shared)[:count]
        nothing = network.with_shifts({name: np.zeros(layers[name].channels) for name in names}).model
        assert_all_else_is_kept(content, nothing, added=count)
        expected = litert(content, samples)
        rounding = 1e-6 if kind == "float16" else 0  # LiteRT has other kernels for biases that are dequantized
        for output, values in litert(nothing, samples).items():
            np.testing.assert_allclose(values, expected[output], rtol=rounding, atol=rounding)
        assert all(start % 16 == 0 for start, end in places_of(nothing) if end > start)
        shifts = {name: np.full(layers[name].channels, 0.1 * (k + 1)) for k, name in enumerate(names)}
        made = network.with_shifts(shifts).model
        after = {layer.name: layer for layer in loaded(made).layers}
        for name, layer in layers.items():
            moved = np.ravel(after[name].bias).astype(np.float64) - np.ravel(layer.bias)
            applied = network.bias_change(layer, shifts[name]).applied if name in shifts else 0 * moved
            np.testing.assert_allclose(moved, applied, atol=1e-6)
        assert not set(shared_layers(made)) & set(names)
        assert_files_move_alike(content, made, samples)


def test_a_separated_bias_is_patched_the_next_time():
    content, _ = SHARED["int8"]()
    first = loaded(content).with_shifts({"first": np.full(8, 0.1)}).model
    second = loaded(first).with_shifts({"first": np.full(8, 0.1)}).model
    assert len(second) == len(first)
    differs = np.flatnonzero(np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8))
    assert 0 < differs[-1] - differs[0] < 32


def test_biases_that_metadata_shares():
    model = unpacked(content_of("residual-int8"))
    graph = model.subgraphs[0]
    (bias,) = [each.buffer for each in [graph.tensors[bias_tensor(content_of("residual-int8"), "head")[0]]]]
    model.metadata = [*(model.metadata or []), schema.MetadataT("mine", bias)]
    content = packed(model)
    network = loaded(content)
    layer = next(each for each in network.layers if each.name == "head")
    made = network.with_shifts({"head": np.full(layer.channels, 0.3)}).model
    assert_all_else_is_kept(content, made, added=1)


# All else in the file


def full_file():
    """A file with metadata, a description, several subgraphs and signatures, and a layer without a bias."""
    model = unpacked(several_signatures())
    model.description = "a description"
    for subgraph in model.subgraphs:
        first = subgraph.operators[0]
        first.inputs = [*first.inputs[:2], -1]
    builder = Builder()
    builder.model = model
    builder.metadata("min_runtime_version", b"1.5.0".ljust(16, b"\0"))
    builder.metadata("labels", bytes(range(37)))
    return packed(model)


def archive(content, names=("labels.txt", "folder/vocabulary.txt")):
    """The file with files packed behind it, as tools for metadata do it."""
    made = io.BytesIO(content)
    with zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as packed_files:
        for name in names:
            packed_files.writestr(name, name * 20)
    return made.getvalue()


def assert_archive_is_kept(content, names=("labels.txt", "folder/vocabulary.txt")):
    with zipfile.ZipFile(io.BytesIO(content)) as found:
        assert found.testzip() is None
        assert {each: found.read(each).decode() for each in found.namelist()} == {name: name * 20 for name in names}


TAILS = {
    "nothing": b"",
    "bytes": b"something else \x00\x01" * 7,
    "TFL3": b"\x08\0\0\0TFL3" * 5,
    "zeros": bytes(33),
    "odd": b"x",
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("is_behind", [False, True])
def test_all_else_is_kept_where_a_file_is_written_anew(is_behind, tail):
    content = packed(unpacked(full_file()), behind=is_behind) + TAILS[tail]
    network = loaded(content)
    made = network.with_shifts({"encode_first": np.full(6, 0.25), "encode_last": np.full(3, 0.25)}).model
    patched = [bias_tensor(content, "encode_last")[0]]
    assert_all_else_is_kept(content, made, changed=patched, added=1)
    assert tail == "zeros" or made.endswith(TAILS[tail])
    samples = {"x": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
    assert_files_move_alike(content, made, samples)
    assert all(start % 16 == 0 for start, end in places_of(made) if end > start)
    again = loaded(made).with_shifts({"encode_first": np.full(6, -0.25)}).model
    assert tail == "zeros" or again.endswith(TAILS[tail])
    assert len(again) == len(made)


@pytest.mark.parametrize("is_behind", [False, True])
def test_an_archive_behind_a_file_is_kept(is_behind):
    content = archive(packed(unpacked(full_file()), behind=is_behind))
    network = loaded(content)
    for name, channels in (("encode_last", 3), ("encode_first", 6)):  # patched; written anew
        made = network.with_shifts({name: np.full(channels, 0.25)}).model
        assert_archive_is_kept(made)
        assert_archive_is_kept(loaded(made).with_shifts({"encode_first": np.full(6, 0.5)}).model)
    litert(made, {"x": np.ones((1, 8), np.float32)})


def test_an_archive_behind_a_file_is_kept_as_it_was_made():
    """Comments, dates, and how its members are compressed."""
    made = io.BytesIO(full_file())
    with zipfile.ZipFile(made, "a") as packed_files:
        packed_files.comment = b"a comment"
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            entry = zipfile.ZipInfo(f"member {method}", (2020, 1, 2, 3, 4, 6))
            entry.compress_type, entry.comment = method, b"of a member"
            packed_files.writestr(entry, b"content" * 30)
    content = made.getvalue()
    found = loaded(content).with_shifts({"encode_first": np.full(6, 0.25)}).model
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(io.BytesIO(found)) as after:
        assert after.comment == before.comment
        for one, other in zip(before.infolist(), after.infolist(), strict=True):
            for attribute in ("filename", "date_time", "compress_type", "comment", "CRC", "file_size", "external_attr"):
                assert getattr(one, attribute) == getattr(other, attribute)


def test_subgraphs_of_control_flow_are_kept():
    content = UNSUPPORTED["control_flow"]()
    model = unpacked(content)
    model.subgraphs[0].operators[0].inputs = [*model.subgraphs[0].operators[0].inputs[:2], -1]
    content = packed(model)
    made = loaded(content).with_shifts({"before": np.full(6, 0.5)}).model
    assert_all_else_is_kept(content, made, added=1)
    assert_files_move_alike(content, made, {"image": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)})


@pytest.mark.parametrize("name", QUANTIZED[::3])
def test_all_biases_at_once(name):
    network = network_of(name)
    shifts = {layer.name: np.full(layer.channels, 0.02) for layer in network.layers}
    for layer in network.layers:
        if network.bias_change(layer, shifts[layer.name]).applied is None:
            del shifts[layer.name]
    made = network.with_shifts(shifts)
    expected = tensors_of(made, batches(samples_of(name))[0])
    again = loaded(made.model)
    for tensor, values in tensors_of(again, batches(samples_of(name))[0]).items():
        np.testing.assert_array_equal(values, expected[tensor])
    litert(made.model, samples_of(name, 1))


def test_files_are_saved_whole(tmp_path):
    network = network_of("residual-int8").with_shifts({"head": np.full(8, 0.1)})
    network.save(tmp_path / "out.tflite")
    assert (tmp_path / "out.tflite").read_bytes() == network.model
    with pytest.raises(FileExistsError):
        network.save(tmp_path / "out.tflite")
    network.save(tmp_path / "out.tflite", force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["out.tflite"]
