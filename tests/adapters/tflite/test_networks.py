"""A TFLite model as a network: its parts compute what the whole does, and the whole what the file does in LiteRT."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from biascorr.adapters.tflite import running
from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.graph.operations import Activation, ActivationType, ChannelPreserving, Kind, Leaky, SpatialEffect
from tflite_models import MODELS, UNSUPPORTED, Builder, packed, samples_for, unpacked
from tflite_networks import (
    FLOATS,
    QUANTIZED,
    SOME,
    batches,
    called,
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

ENDS = ("int8_in_out", "uint8_in_out")


def loaded(content):
    return TfliteNetwork.load(content, "model")


def format_of(name):
    return name.rpartition("-")[2] if "-" in name else name.partition("_")[2] if name.startswith("fixture:") else "float"


# What the whole computes


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_network_computes_the_same_bits_as_the_file(name):
    samples = samples_of(name)
    expected, found = litert(content_of(name), samples), run(network_of(name), samples)
    assert found.keys() == expected.keys()
    for output in expected:
        np.testing.assert_array_equal(found[output], expected[output])


CODES = {"int16x8": 8, "int8x4": 2}
"""Codes of the output's scale that kernels round otherwise: LiteRT rescales int16 with few bits; int4 is int8 to it."""

DYNAMIC = 0.02
"""Part of the largest value, where the kernels quantize what they read, which the network does not."""


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_network_computes_nearly_what_the_file_does(name):
    samples, form = samples_of(name), format_of(name)
    expected, found = litert(content_of(name), samples), run(network_of(name), samples)
    assert found.keys() == expected.keys()
    for output, step in steps_of(content_of(name)).items():
        assert found[output].dtype == np.float32
        tolerance = CODES.get(form, 0) * step * 1.001
        if "dynamic" in form or (form == "int8x4" and not step):
            tolerance = DYNAMIC * np.abs(expected[output]).max()
        np.testing.assert_allclose(found[output], expected[output], rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("name", SOME[::4] + [f"fixture:classifier_{end}" for end in ENDS])
def test_the_deployed_file_takes_and_gives_real_numbers(name, optimized):
    samples = samples_of(name)
    run_file = network_of(name).deployed(threads=1, optimized=optimized)
    found = [run_file(feeds) for feeds in batches(samples)]
    plain = {"experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
    expected = litert(content_of(name), samples, **({} if optimized else plain))
    assert list(found[0]) == list(network_of(name).outputs)
    for output in expected:
        np.testing.assert_array_equal(np.concatenate([each[output] for each in found]), expected[output])


@pytest.mark.parametrize("name", [each for each in QUANTIZED if each.endswith(ENDS)])
def test_inputs_and_outputs_of_codes_are_real_numbers(name):
    network, samples = network_of(name), samples_of(name)
    details = Interpreter(model_content=content_of(name)).get_input_details()
    assert all(each["dtype"] in (np.int8, np.uint8) for each in details)
    assert [each.dtype for each in network.inputs] == [np.dtype(np.float32)] * len(details)
    assert sorted(each.name for each in network.inputs) == sorted(samples)
    outputs = run(network, samples)
    for output, step in steps_of(content_of(name)).items():
        assert outputs[output].dtype == np.float32
        codes = outputs[output] / step
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
        assert len(np.unique(np.round(codes))) > 4


def test_an_input_of_codes_of_int16():
    """Which litert-quantizer makes at no recipe here: the input of a file of int16x8 without its QUANTIZE."""
    model = unpacked(content_of("convolutions-int16x8"))
    graph = model.subgraphs[0]
    first = graph.operators.pop(0)
    assert kind_of(model, first) == schema.BuiltinOperator.QUANTIZE
    graph.inputs = model.signatureDefs[0].inputs[0].tensorIndex = int(first.outputs[0])
    graph.inputs = [graph.inputs]
    samples = samples_of("convolutions-int16x8")
    content = packed(model)
    network = loaded(content)
    assert [(each.name, each.dtype) for each in network.inputs] == [("image", np.dtype(np.float32))]
    expected, found = litert(content_of("convolutions-int16x8"), samples), run(network, samples)
    np.testing.assert_allclose(found["output"], expected["output"], atol=8 * steps_of(content)["output"])
    np.testing.assert_array_equal(litert(content, samples)["output"], expected["output"])


# What parts compute


def cuts(network):
    """At each operation, the tensors that are there and still needed, and those that come."""
    steps = network.operations
    for position in range(1, len(steps)):
        before = {each.name for each in network.inputs} | {name for step in steps[:position] for name in step.outputs}
        after = [name for step in steps[position:] for name in step.outputs]
        read = {name for step in steps[position:] for name in step.inputs}
        yield sorted(before & read), after


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_a_network_cut_at_any_tensor_computes_the_same(name):
    network = network_of(name)
    feeds = batches(samples_of(name))[0]
    whole = tensors_of(network, feeds)
    for given, wanted in cuts(network):
        held = {each: whole[each] for each in given}
        found = network.part(held, wanted, threads=1)(held)
        assert list(found) == wanted
        for tensor in wanted:
            np.testing.assert_array_equal(found[tensor], whole[tensor], err_msg=f"{tensor} from {given}")


@pytest.mark.parametrize("name", SOME[1::3])
def test_each_tensor_from_the_inputs_of_its_operation(name):
    network = network_of(name)
    whole = tensors_of(network, batches(samples_of(name))[0])
    for step in network.operations:
        held = {each: whole[each] for each in step.inputs}
        found = network.part(held, step.outputs, threads=1)(held)
        for tensor in step.outputs:
            np.testing.assert_array_equal(found[tensor], whole[tensor], err_msg=tensor)


def test_given_tensors_are_passed_on_and_replace_what_makes_them():
    network = network_of("residual-int8")
    feeds = batches(samples_of("residual-int8"))[0]
    layer = network.layers[1]
    whole = tensors_of(network, feeds)
    held = {layer.output: whole[layer.output] + 1, "image": feeds["image"]}
    found = network.part(held, [layer.output, "image", "output"])(held)
    assert found[layer.output] is held[layer.output]
    assert found["image"] is feeds["image"]
    assert not np.array_equal(found["output"], whole["output"])
    assert network.part(feeds, ["image"])(feeds) == {"image": feeds["image"]}


def test_results_are_written_into_memory_of_the_allocator():
    network = network_of("residual-int8")
    feeds = batches(samples_of("residual-int8"))[0]
    taken = []

    class Memory:
        def take(self, shape, dtype):
            taken.append(np.empty(shape, dtype))
            return taken[-1]

    found = network.part(feeds, network.outputs, threads=1, allocator=Memory())(feeds)
    assert any(found["output"] is each for each in taken)
    np.testing.assert_array_equal(found["output"], network.part(feeds, network.outputs)(feeds)["output"])


@pytest.mark.parametrize("name", ["residual", "residual-int8", "attention-int16x8", "fixture:decoder_uint8_in_out"])
def test_several_threads_at_once_compute_the_same(name):
    network, rows = network_of(name), batches(samples_of(name, 24))
    part, file = network.part(rows[0], network.outputs, threads=1), network.deployed(threads=1)
    with ThreadPoolExecutor(4) as pool:
        for compute in (part, file):
            expected = [compute(feeds) for feeds in rows]
            for alone, together in zip(expected, pool.map(compute, rows)):
                for output in alone:
                    np.testing.assert_array_equal(together[output], alone[output])


def test_results_stay_as_they_are_when_more_is_computed():
    network, rows = network_of("residual"), batches(samples_of("residual", 2))
    compute = network.part(rows[0], network.outputs, threads=1)
    first = compute(rows[0])["output"]
    kept = first.copy()
    compute(rows[1])
    np.testing.assert_array_equal(first, kept)


# Batches


@pytest.mark.parametrize("recipe", [None, "int8", "int8_in_out", "dynamic"])
@pytest.mark.parametrize("model", ["convolutions", "depthwise", "residual", "fully_connected", "transpose_conv", "two_inputs"])
def test_batches_of_any_size(model, recipe):
    samples = samples_of(model, 5)
    content = MODELS[model](any_batch=True)
    content = quantized(content, recipe, samples) if recipe else content
    network = loaded(content)
    assert [each.shape[0] for each in network.inputs] == [None] * len(network.inputs)
    expected = run(network, samples)
    part, file = network.part(samples, network.outputs, threads=1), network.deployed(threads=1)
    for count in (5, 2, 3, 1):
        some = {name: rows[:count] for name, rows in samples.items()}
        for output, found in part(some).items():
            assert found.shape == (count, *expected[output].shape[1:])
            np.testing.assert_allclose(found, expected[output][:count], rtol=1e-5, atol=1e-6)
        rows = [file(feeds)["output"] for feeds in batches(some)]
        near = 1e-6 if recipe != "dynamic" else DYNAMIC  # whose kernels take one range for a whole batch in some layers
        np.testing.assert_allclose(file(some)["output"], np.concatenate(rows), rtol=1e-5, atol=near)


def test_a_file_of_the_converter_takes_batches():
    for name in ("fixture:any_batch_float", "fixture:any_batch_int8"):
        samples = samples_of(name, 3)
        network = network_of(name)
        assert network.inputs[0].shape == (None, 16, 16, 3)
        found = network.part(samples, network.outputs)(samples)["output_0"]
        np.testing.assert_allclose(found, litert(content_of(name), samples)["output_0"], rtol=1e-5, atol=1e-6)


# Names


def test_inputs_and_outputs_are_called_as_the_signature_does():
    network = network_of("two_inputs")
    assert [each.name for each in network.inputs] == ["image", "other"]
    assert network_of("several_outputs").outputs == ["classes", "boxes", "features"]
    assert network_of("two_inputs-int8_in_out").outputs == ["output"]


def test_without_a_signature_they_are_called_as_their_tensors():
    network = loaded(MODELS["two_inputs"](signature=None))
    assert [each.name for each in network.inputs] == ["serving_default_image:0", "serving_default_other:0"]
    assert network.outputs == ["logits"]
    assert [layer.name for layer in network.layers] == ["conv", "dense", "logits"]


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_layers_are_called_as_their_output_tensors(name):
    tensors = {each.name.decode() for each in unpacked(content_of(name)).subgraphs[0].tensors}
    tensors |= {each.partition(";")[0] for each in tensors}  # of names that the converter joined
    assert {layer.name for layer in network_of(name).layers} <= tensors
    assert set(called(content_of(name)).values()) == {each.name for each in network_of(name).inputs} | set(
        network_of(name).outputs
    )


def renamed(content, rename):
    """The file with other names of tensors; the signature keeps its own."""
    model = unpacked(content)
    for index, tensor in enumerate(model.subgraphs[0].tensors):
        tensor.name = rename(index, tensor.name.decode())
    return packed(model)


@pytest.mark.parametrize("rename", [lambda *_: "same", lambda *_: None, lambda *_: "output", lambda *_: "image", lambda *_: ""])
@pytest.mark.parametrize("name", ["residual-int8", "residual-int8_in_out", "activations"])
def test_names_that_several_tensors_have(name, rename):
    network, samples = loaded(renamed(content_of(name), rename)), samples_of(name)
    assert [each.name for each in network.inputs] == ["image"]
    assert network.outputs == ["output"]
    names = [layer.name for layer in network.layers]
    assert len(set(names)) == len(names) == len(network_of(name).layers)
    np.testing.assert_array_equal(run(network, samples)["output"], run(network_of(name), samples)["output"])
    outputs = [output for step in network.operations for output in step.outputs]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name", ["image", "dense", "third/linear", "output/codes", "third"])
def test_a_signature_whose_names_other_tensors_have(name):
    model = unpacked(content_of("convolutions-int8_in_out"))
    model.signatureDefs[0].outputs[0].name = name
    samples = samples_of("convolutions-int8_in_out")
    if name == "image":
        model.signatureDefs[0].inputs[0].name = "output"
        samples = {"output": samples["image"]}
    network = loaded(packed(model))
    assert network.outputs == [name]
    (found,) = run(network, samples).values()
    np.testing.assert_array_equal(found, run(network_of("convolutions-int8_in_out"), samples_of("convolutions-int8"))["output"])


def test_other_names_of_inputs():
    network = network_of("two_inputs-int8_in_out").with_input_names(["picture", "numbers"])
    assert [each.name for each in network.inputs] == ["picture", "numbers"]
    samples = samples_of("two_inputs-int8_in_out")
    found = run(network, dict(zip(["picture", "numbers"], samples.values())))
    np.testing.assert_array_equal(found["output"], run(network_of("two_inputs-int8_in_out"), samples)["output"])
    assert network.model == content_of("two_inputs-int8_in_out")


def test_an_input_that_is_an_output():
    b = Builder()
    x = b.input("x", (1, 4))
    b.output(b.fully_connected(x, b.weights(3, 4), b.bias(3), name="dense"), "y")
    b.graph.outputs.append(x)
    network = loaded(b.bytes())
    samples = {network.inputs[0].name: np.ones((1, 4), np.float32)}
    found = network.part(samples, network.outputs)(samples)
    np.testing.assert_array_equal(found[network.outputs[1]], samples[network.inputs[0].name])


def split(b):
    """An operator of several outputs, one of which is an output."""
    x = b.input("image", (1, 4, 4, 8))
    y = b.conv2d(x, b.weights(8, 1, 1, 8), b.bias(8), name="first")
    halves = b.op("SPLIT", [b.constant(np.int32(3)), y], (1, 4, 4, 4), (1, 4, 4, 4), name="halves", numSplits=2)
    y, z = (
        b.conv2d(half, b.weights(4, 3, 3, 4), b.bias(4), activation="RELU", name=f"conv_{k}") for k, half in enumerate(halves)
    )
    b.output(b.mul(y, z, name="product"), "output")
    b.output(halves[1], "half")


def of_constants(b):
    """Outputs that depend on no input, and an input that nothing depends on."""
    x = b.input("image", (1, 4))
    b.input("unread", (1, 3))
    constant = b.constant(np.float32([1, 2, 3]))
    b.output(b.fully_connected(x, b.weights(3, 4), b.bias(3), name="dense"), "output")
    b.output(constant, "constant")
    b.output(b.unary("EXP", constant), "computed")


@pytest.mark.parametrize(
    ("body", "recipe"), [(of_constants, None), *((split, recipe) for recipe in (None, "int8", "int8_in_out", "int16x8"))]
)
def test_other_graphs(body, recipe):
    b = Builder()
    body(b)
    b.signature()
    samples = samples_for(b.bytes())
    content = quantized(b.bytes(), recipe, samples) if recipe else b.bytes()
    network = loaded(content)
    expected, found = litert(content, samples), run(network, samples)
    tolerance = 8 * max(steps_of(content).values()) if recipe == "int16x8" else 0
    for output in expected:
        np.testing.assert_allclose(found[output], expected[output], rtol=0, atol=tolerance)
    whole = tensors_of(network, batches(samples)[0])
    for given, wanted in cuts(network):
        held = {each: whole[each] for each in given}
        for tensor, values in network.part(held, wanted, threads=1)(held).items():
            np.testing.assert_array_equal(values, whole[tensor])


@pytest.mark.parametrize("recipe", [None, "int8", "int16x8", "dynamic", "weights_int8"])
def test_inputs_of_integers_are_as_they_are(recipe):
    b = Builder()
    ids = b.input("ids", (1, 5), dtype=np.int32)
    table = b.constant(b.rng.normal(size=(10, 8)).astype(np.float32))
    y = b.op("GATHER", [table, ids], (1, 5, 8), name="embedded")
    b.output(b.fully_connected(y, b.weights(4, 8), b.bias(4), keep_dims=True, name="layer"), "output")
    b.signature()
    samples = {"ids": np.random.default_rng(0).integers(0, 10, (8, 5)).astype(np.int32)}
    content = quantized(b.bytes(), recipe, samples) if recipe else b.bytes()
    network = loaded(content)
    assert (network.inputs[0].name, network.inputs[0].dtype) == ("ids", np.dtype(np.int32))
    part, file = network.part(batches(samples)[0], ["output"], threads=1), network.deployed(threads=1)
    for feeds in batches(samples):
        tolerance = 0.02 if recipe == "dynamic" else 1e-3 if recipe == "int16x8" else 0
        np.testing.assert_allclose(part(feeds)["output"], file(feeds)["output"], rtol=0, atol=tolerance)


# Operations, facts and roles


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_operations_are_in_order_and_name_what_is_there(name):
    network = network_of(name)
    there = {each.name for each in network.inputs}
    names = [step.name for step in network.operations]
    assert len(set(names)) == len(names)
    for step in network.operations:
        assert there.issuperset(step.inputs), f"{step.name} reads what is not there"
        assert there.isdisjoint(step.outputs), f"{step.name} makes what is there"
        there.update(step.outputs)
    assert there.issuperset(network.outputs)
    whole = tensors_of(network, batches(samples_of(name))[0])
    assert whole.keys() == there
    order = list(network.order)
    assert len(set(order)) == len(order)
    assert order.index(names[0]) <= order.index(names[-1])
    assert [each for each in order if each in names] == names
    assert {layer.name for layer in network.layers} <= set(names)
    for layer in network.layers:
        (step,) = [each for each in network.operations if layer.output in each.outputs]
        assert step.name == layer.name
        assert layer.input in there


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_facts_have_the_shapes_of_tensors(name):
    network = network_of(name)
    facts, whole = network.facts(), tensors_of(network, batches(samples_of(name))[0])
    assert facts is network.facts()
    for tensor, values in whole.items():
        known = facts.shapes[tensor]
        assert len(known) == values.ndim, tensor
        assert all(size in (None, found) for size, found in zip(known, values.shape)), tensor
    names = {step.name: step for step in network.operations}
    real = {step.inputs[0]: step.outputs[0] for step in network.operations if step.kind is Kind.DEQUANTIZE}
    for operation, role in facts.roles.items():
        step = names[operation]
        source, made = whole[step.inputs[0]], whole[real.get(step.outputs[0], step.outputs[0])]
        if isinstance(role, Activation) and role.type.bounds is not None:
            np.testing.assert_allclose(
                made, np.clip(source, *map(np.float32, role.type.bounds)), atol=0.05 * np.abs(made).max()
            )
        elif isinstance(role, ChannelPreserving) and role.effect is SpatialEffect.AVERAGE:
            means = np.clip(source.mean(axis=tuple(range(1, source.ndim - 1))), made.min(), made.max())  # where codes end
            np.testing.assert_allclose(made.reshape(means.shape), means, atol=0.02 * np.abs(source).max())


@pytest.mark.parametrize("name", [*FLOATS, *SOME])
def test_quantizing_operations_are_known(name):
    network = network_of(name)
    kinds = {step.name: step.kind for step in network.operations}
    whole = tensors_of(network, batches(samples_of(name))[0])
    for step in network.operations:
        (made,), given = step.outputs[:1], [whole[each] for each in step.inputs]
        is_coded = whole[made].dtype.kind in "iu" and bool(given) and given[0].dtype.kind == "f"
        if step.kind is Kind.QUANTIZE:
            assert whole[made].dtype.kind in "iu"
        elif step.kind is Kind.DEQUANTIZE:
            assert whole[made].dtype == np.float32
            assert given[0].dtype.kind in "iuf"
        elif step.kind is Kind.SHAPE:
            assert whole[made].dtype.kind == "i"
        assert not (is_coded and step.name in {layer.name for layer in network.layers})
    assert all(kinds[layer.name] is Kind.OTHER for layer in network.layers)


@pytest.mark.parametrize("recipe", ["", "-int8", "-int16x8", "-dynamic"])
def test_activations_have_roles(recipe):
    network = network_of(f"activations{recipe}")
    facts, types = network.facts(), {}
    for layer in network.layers[:-1]:
        reached = {layer.output}  # through QUANTIZE and DEQUANTIZE, to the first role
        for step in network.operations:
            if not reached.isdisjoint(step.inputs) and step.kind in (Kind.QUANTIZE, Kind.DEQUANTIZE):
                reached.update(step.outputs)
            elif not reached.isdisjoint(step.inputs) and step.name in facts.roles:
                types[layer.name] = facts.roles[step.name]
    clip = ActivationType.clip
    expected = {"relu": ActivationType.relu, "relu6": ActivationType.relu6, "relu_n1_to_1": clip(-1.0, 1.0)}
    for kind, type_ in expected.items():
        assert types[f"before_{kind}"] == Activation(type_, -1, True)
    for kind in ("hard_swish", "logistic", "tanh", "elu", "gelu"):
        assert types[f"before_{kind}"] == Activation(ActivationType.other, -1, False)
    for kind in ("leaky", "prelu"):
        assert types[f"before_{kind}"] == Leaky()


FUSED = {"NONE": None, "RELU": (0.0, np.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}


@pytest.mark.parametrize("fused", FUSED)
def test_fused_activations_are_split_off(fused):
    b = Builder()
    x = b.input("x", (1, 5, 5, 3))
    b.output(b.conv2d(x, b.weights(4, 3, 3, 3), b.bias(4), activation=fused, name="layer"), "y")
    b.signature()
    network, samples = loaded(b.bytes()), {"x": 10 * np.random.default_rng(0).normal(size=(1, 5, 5, 3)).astype(np.float32)}
    whole, (layer,) = tensors_of(network, samples), network.layers
    bounds = FUSED[fused]
    expected = whole[layer.output] if bounds is None else np.clip(whole[layer.output], *bounds)
    np.testing.assert_array_equal(whole["y"], expected)
    np.testing.assert_array_equal(whole["y"], litert(b.bytes(), samples)["y"])
    assert (layer.output == "y") == (bounds is None)
    if bounds is not None:
        assert network.facts().activation("layer/activation").type.bounds == bounds
        assert not np.array_equal(whole[layer.output], whole["y"])


def bounded(kind, bound, *, first=False):
    b = Builder()
    x = b.input("x", (1, 4, 4, 3))
    y = b.conv2d(x, b.weights(4, 1, 1, 3), b.bias(4), name="layer")
    inputs = (b.constant(np.float32(bound)), y) if first else (y, b.constant(np.float32(bound)))
    b.output(b.binary(kind, *inputs, name="bounded"), "y")
    b.signature()
    return loaded(b.bytes())


@pytest.mark.parametrize("bound", [1.5, [1.5], [1.0, 2.0, 3.0, 4.0], [[[1.0, 2.0, 3.0, 4.0]]]])
@pytest.mark.parametrize("kind", ["MINIMUM", "MAXIMUM"])
def test_bounds_are_activations(kind, bound):
    numbers = np.ravel(bound).tolist()
    one = numbers[0] if len(numbers) == 1 else tuple(numbers)
    limits = (-np.inf, one) if kind == "MINIMUM" else (one, np.inf)
    assert bounded(kind, bound).facts().activation("bounded").type.bounds == limits


@pytest.mark.parametrize(
    "network",
    [
        lambda: bounded("MINIMUM", np.ones((4, 1))),
        lambda: bounded("MINIMUM", np.ones((1, 4, 4, 4))),
        lambda: bounded("MINIMUM", [np.nan, 1, 1, 1]),
        lambda: bounded("MINIMUM", 1.0, first=True),
        lambda: bounded("ADD", 1.0),
    ],
)
def test_other_bounds_have_no_role(network):
    assert network().facts().roles == {}


def reshaped(shape, made):
    b = Builder()
    x = b.input("x", shape)
    b.output(b.reshape(b.unary("EXP", x, name="before"), made, name="after"), "y")
    b.signature()
    return loaded(b.bytes()).facts().roles.get("after")


def test_reshapes_that_keep_channels_apart():
    assert reshaped((1, 1, 1, 6), (1, 6)) == ChannelPreserving(SpatialEffect.NONE, -1, -1)
    assert reshaped((1, 6), (1, 1, 1, 6)) == ChannelPreserving(SpatialEffect.NONE, -1, -1)
    assert reshaped((1, 2, 3, 6), (1, 36)).effect is SpatialEffect.FLATTEN
    assert reshaped((1, 2, 3, 6), (1, 6, 6)) is None
    assert reshaped((1, 6), (1, 2, 3)) is None
    assert reshaped((2, 3), (1, 6)) is None


def averaged(axes, keep_dims=False):
    b = Builder()
    x = b.input("x", (1, 3, 4, 6))
    b.output(b.mean(x, axes, keep_dims=keep_dims, name="mean"), "y")
    b.signature()
    return loaded(b.bytes()).facts().roles.get("mean")


def test_averages_over_positions():
    for axes in ((1, 2), (-3, -2), (2, 1)):
        assert averaged(axes, True) == ChannelPreserving(SpatialEffect.AVERAGE, -1, -1)
    assert averaged((3,)) is averaged((0,)) is averaged((1, 2, 3)) is averaged((-1,)) is None


def padded(amounts):
    b = Builder()
    x = b.input("x", (1, 3, 4, 6))
    b.output(b.pad(x, amounts, name="pad"), "y")
    b.signature()
    return loaded(b.bytes()).facts().roles.get("pad")


def test_padding_of_positions():
    assert padded([(0, 0), (1, 0), (0, 2), (0, 0)]) == ChannelPreserving(SpatialEffect.PADDING, -1, -1)
    assert padded([(0, 0), (1, 0), (0, 2), (0, 1)]) is None


def test_shapes_are_computed_of_what_is_given():
    """What makes sizes of other tensors runs in parts, too."""
    network = loaded(MODELS["transpose_conv"](any_batch=True))
    assert Kind.SHAPE in {step.kind for step in network.operations}
    samples = samples_of("transpose_conv", 3)
    whole = tensors_of(network, samples)
    for given, wanted in cuts(network):
        held = {each: whole[each] for each in given}
        for tensor, found in network.part(held, wanted, threads=1)(held).items():
            np.testing.assert_array_equal(found, whole[tensor])


# Files that run other subgraphs, and states


def test_control_flow_runs_in_parts():
    content = UNSUPPORTED["control_flow"]()
    network, samples = loaded(content), {"image": np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)}
    np.testing.assert_array_equal(run(network, samples)["output"], litert(content, samples)["output"])
    whole = tensors_of(network, batches(samples)[0])
    for given, wanted in cuts(network):
        held = {each: whole[each] for each in given}
        for tensor, found in network.part(held, wanted, threads=1)(held).items():
            np.testing.assert_array_equal(found, whole[tensor])


def test_states_begin_anew_with_each_batch():
    network = loaded(UNSUPPORTED["lstm"]())
    samples = {"image": np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)}
    compute = network.part(batches(samples)[0], network.outputs, threads=1)
    first = compute(batches(samples)[0])["output"]
    compute(batches(samples)[1])
    np.testing.assert_array_equal(compute(batches(samples)[0])["output"], first)


# Files that LiteRT does not take


def test_files_that_litert_does_not_survive_are_refused(monkeypatch):
    monkeypatch.setattr(running, "_survived", set())
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    b.output(b.depthwise(x, b.weights(1, 3, 3, 3, fan_in=9), name="without_bias"), "y")
    with pytest.raises(ValueError, match="model: LiteRT crashes when it runs it"):
        loaded(b.bytes())
    assert loaded(content_of("residual-int8")).layers
    assert len(running._survived) == 1
