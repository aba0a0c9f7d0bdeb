"""`correct` and `equalize` of TFLite files: what is returned is no worse in LiteRT, and another file in its biases alone."""

import re

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import biascorr
from biascorr import QuantParams, correct
from biascorr.adapters.tflite.network import TfliteNetwork
from biascorr.correction.scoring import OutputErrors, Terms
from biascorr.graph.network import Edits
from biascorr.graph.reasons import ReasonCode
from tflite_fixtures import images, path_of
from tflite_models import UNSUPPORTED, Builder, deduplicated, of_uint8, random_file, samples_for, several_signatures, unpacked
from tflite_networks import EACH, FLOATS, content_of, float_of, kind_of, litert, run, samples_of
from tflite_quantizers import RECIPES, quantized

pytestmark = [pytest.mark.usefixtures("trusted"), pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")]

EDITABLE = [name for name in FLOATS if name != "int8_weights"]

HELD_OUT = slice(3, None, 4)
"""The samples that are scored."""


def loaded(content):
    return TfliteNetwork.load(content, "model")


def sqnr(reference, content, samples):
    """As LiteRT runs them, in dB, the mean over samples and outputs."""
    expected, found, errors = litert(reference, samples), litert(content, samples), OutputErrors()
    for name, values in expected.items():
        for k in range(len(values)):
            errors.add(name, Terms.of([values[k : k + 1]], [found[name][k : k + 1]]))
    return errors.score.sqnr


def energy(values):
    return np.square(values, dtype=np.float64).sum()


def held_out(samples):
    return {name: rows[HELD_OUT] for name, rows in samples.items()}


def weights_of(content):
    """All that the layers of a file multiply with."""
    return {layer.name: np.asarray(layer.weights) for layer in loaded(content).layers}


def assert_only_biases_differ(given, returned):
    """As the network has them; tests of biases look at the bytes."""
    before, after = weights_of(given), weights_of(returned)
    assert list(before) == list(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    models = unpacked(given), unpacked(returned)
    kinds = [[kind_of(model, each) for each in model.subgraphs[0].operators] for model in models]
    assert kinds[0] == kinds[1]
    counts = [len(model.subgraphs[0].tensors) for model in models]
    assert counts[0] <= counts[1] <= counts[0] + len(before)


# Not worse


@pytest.mark.parametrize("name", EACH[::4])
def test_auto_is_not_worse_in_litert(name):
    samples, reference, content = samples_of(name, 8), float_of(name), content_of(name)
    scored = held_out(samples)
    correction = correct(reference, samples, validation=scored, quantized=content, threads=1)
    assert isinstance(correction.model, bytes)
    before, after = (sqnr(reference, each, scored) for each in (content, correction.model))
    assert after >= before - 1e-9
    assert (correction.model == content) == (correction.method == "none")
    for label, found in (("none", before), (correction.method, after)):
        assert correction.deployed[label].sqnr == pytest.approx(found, abs=0.01)
    assert_only_biases_differ(content, correction.model)
    names = {layer.name for layer in correction.report}
    assert names == {layer.name for layer in loaded(content).layers}


@pytest.mark.parametrize("model", ["convolutions", "depthwise", "fully_connected", "transpose_conv", "residual", "activations"])
def test_files_of_uint8(model):
    reference, samples = content_of(model), samples_of(model, 8)
    content = of_uint8(content_of(f"{model}-int8_per_tensor"))
    np.testing.assert_array_equal(run(loaded(content), samples)["output"], litert(content, samples)["output"])
    correction = correct(reference, samples, quantized=content, threads=1)
    before, after = (sqnr(reference, each, held_out(samples)) for each in (content, correction.model))
    assert after >= before - 1e-9
    assert_only_biases_differ(content, correction.model)


@pytest.mark.parametrize("network", ["classifier", "decoder"])
def test_a_shift_of_the_weights_is_found(network):
    """Biases that are wrong: what is left after a correction is what rounding made."""
    reference, content = (content_of(f"fixture:{network}_{form}") for form in ("float", "int8"))
    broken = loaded(content)
    rng = np.random.default_rng(0)
    broken = broken.with_shifts({layer.name: rng.normal(0, 0.1, layer.channels) for layer in broken.layers[1:]}).model
    samples = samples_of(f"fixture:{network}_int8", 24, seed=5)
    before, wrong = (sqnr(reference, each, held_out(samples)) for each in (content, broken))
    correction = correct(reference, samples, validation=held_out(samples), quantized=broken, threads=1)
    found = sqnr(reference, correction.model, held_out(samples))
    assert correction.method != "none"
    assert found > wrong + 3
    assert found > before - 3
    assert correction.scores[correction.method].sqnr == pytest.approx(found, abs=0.5)


@pytest.mark.parametrize("method", ["mean", "iterative", "empirical", "activation"])
@pytest.mark.parametrize("name", ["residual-int8", "matmul_right-int16x8", "two_inputs-int8_in_out", "depthwise-dynamic_int4"])
def test_methods_by_name(name, method):
    samples, reference, content = samples_of(name, 8), float_of(name), content_of(name)
    correction = correct(reference, samples, quantized=content, method=method, threads=1)
    assert correction.method == method
    assert {layer.method for layer in correction.report if layer.method} == {method}
    assert_only_biases_differ(content, correction.model)
    assert set(correction.scores) == {"none", method}


@pytest.mark.parametrize("recipe", ["int8", "dynamic_int4", "weights_int4"])
def test_the_empirical_method_makes_mean_outputs_equal(recipe):
    """Of the last layer, whose output is real here, as LiteRT runs the file."""
    name = f"pooling-{recipe}"
    samples, reference, content = samples_of(name, 32), float_of(name), content_of(name)
    returned = correct(reference, samples, quantized=content, method="empirical", threads=1).model
    expected, before, after = (litert(each, samples)["output"].mean(axis=0) for each in (reference, content, returned))
    assert np.median(np.abs(after - expected)) < 0.3 * np.median(np.abs(before - expected))  # one is clipped in int8


def test_paths(tmp_path):
    for part in ("float", "int8"):
        (tmp_path / f"{part}.tflite").write_bytes(content_of(f"fixture:classifier_{part}"))
    samples = samples_of("fixture:classifier_int8", 8)
    np.save(tmp_path / "samples.npy", samples["image"])
    by_path = correct(tmp_path / "float.tflite", tmp_path / "samples.npy", quantized=tmp_path / "int8.tflite", threads=1)
    by_bytes = correct(
        content_of("fixture:classifier_float"), samples, quantized=content_of("fixture:classifier_int8"), threads=1
    )
    assert by_path.model == by_bytes.model
    by_path.save(tmp_path / "out.tflite", provenance=False)
    assert (tmp_path / "out.tflite").read_bytes() == by_path.model


def test_new_biases_may_be_left_out():
    name = "fully_connected-int8"
    samples, content = samples_of(name, 8), content_of(name)
    correction = correct(float_of(name), samples, quantized=content, method="empirical", new_biases="skip", threads=1)
    (skipped,) = [layer for layer in correction.report if layer.name == "without_bias"]
    assert skipped.reasons[0].code is ReasonCode.BIAS_SKIPPED
    assert len(correction.model) == len(content)


def test_shared_buffers_are_reported():
    name = "shared_biases-int8"
    content = deduplicated(content_of(name))
    correction = correct(float_of(name), samples_of(name, 8), quantized=content, method="empirical", threads=1)
    separated = [
        layer.name for layer in correction.report if ReasonCode.BIAS_SEPARATED in {each.code for each in layer.reasons}
    ]
    assert separated == ["first", "second", "third"]
    assert_only_biases_differ(content, correction.model)


def test_a_product_without_a_place_for_a_bias_is_reported():
    name = "matmul_right-int8"
    correction = correct(float_of(name), samples_of(name, 8), quantized=content_of(name), method="empirical", threads=1)
    (left,) = [layer for layer in correction.report if layer.method is None]
    assert (left.name, left.reasons[0].code) == ("without_bias", ReasonCode.NO_PLACE_FOR_BIAS)


# Refused


@pytest.mark.parametrize("method", ["analytical", "hybrid"])
def test_methods_that_need_batch_normalizations_are_refused(method):
    name = "residual-int8"
    for options in ({"quantized": content_of(name)}, {}):
        with pytest.raises(ValueError, match=f"method: '{method}' needs the statistics of batch normalizations"):
            correct(float_of(name), samples_of(name), method=method, **options)


def test_models_that_are_exchanged_are_refused():
    with pytest.raises(ValueError, match="quantized weights"):
        correct(content_of("residual-int8"), samples_of("residual"), quantized=content_of("residual"))
    with pytest.raises(ValueError, match="quantized weights"):
        correct(content_of("residual-int8"), samples_of("residual"))
    with pytest.raises(ValueError, match="nothing in it is quantized"):
        correct(content_of("residual"), samples_of("residual"), quantized=content_of("residual"))
    with pytest.raises(ValueError, match="not of this float model"):
        correct(content_of("residual"), samples_of("residual"), quantized=content_of("pooling-int8"))
    with pytest.raises(ValueError, match="equalize the float model"):
        biascorr.equalize(content_of("residual-int8"))


def test_layers_that_cannot_be_corrected_are_reported():
    content = UNSUPPORTED["control_flow"]()
    samples = samples_for(content, 8)
    correction = correct(content, samples, quant_params=QuantParams("tf", weight_bits=3), method="empirical", threads=1)
    by_name = {layer.name: layer for layer in correction.report}
    assert {name for name, layer in by_name.items() if layer.method} == {"before", "after"}
    for name in ("then/in_then", "else/in_else"):
        assert by_name[name].reasons[0].code is ReasonCode.OTHER_SUBGRAPH
    correction = correct(
        several_signatures(), {"x": samples["image"]}, quant_params=QuantParams("tf", weight_bits=3), threads=1
    )
    assert {layer.name for layer in correction.report} >= {"encode_first", "encode_last", "decode/decode_first"}


# A float file alone


@pytest.mark.parametrize("name", EDITABLE)
def test_a_float_file_alone(name):
    content, samples = content_of(name), samples_of(name, 8)
    params = QuantParams("tf", weight_bits=4, per_channel=True)
    correction = correct(content, samples, quant_params=params, method="empirical", threads=1)
    assert correction.is_simulated
    assert_only_biases_differ(content, correction.model)
    assert any(layer.method for layer in correction.report)
    litert(correction.model, samples)
    if correction.scores["none"].sqnr < 30:
        assert correction.scores["empirical"].sqnr > correction.scores["none"].sqnr - 0.5


def test_inputs_of_layers_are_moved_to_grids():
    name = "residual"
    content, samples = content_of(name), samples_of(name, 64)
    scores = {}
    for bits in (None, 16, 8, 4, 2):
        correction = correct(content, samples, quant_params=QuantParams("tf", activation_bits=bits), method="mean", threads=1)
        scores[bits] = correction.scores["none"].sqnr
        assert_only_biases_differ(content, correction.model)  # whose inputs have no grids
    assert scores[None] >= scores[16] - 0.1
    assert scores[16] > scores[8] > scores[4] > scores[2]


@pytest.mark.parametrize("name", FLOATS)
def test_grids_are_those_of_fake_quantize(name):
    """Each layer reads its input on its own grid, flattened or not; other readers do not."""
    network, samples = loaded(content_of(name)), samples_of(name, 1)
    read = network.part(samples, [layer.input for layer in network.layers])(samples)
    for bits in (8, 16):
        grids = {
            layer.name: biascorr.Quantization.from_range(
                float(read[layer.input].min()), float(read[layer.input].max()), bits=bits
            )
            for layer in network.layers
        }
        for layer in network.layers:
            gridded = network.with_quantizers({layer.name: grids[layer.name]})
            (after,) = [each for each in gridded.layers if each.name == layer.name]
            found = gridded.part(samples, [after.input])(samples)[after.input]
            expected = biascorr.fake_quantize(read[layer.input], grids[layer.name])
            step = 1 / float(grids[layer.name].scale)
            errors = np.abs(found - expected)  # float32 may round to the next code
            assert errors.max() <= 1.01 * step
            assert (errors > 1e-3 * step + 1e-6).mean() < 0.01
            assert gridded.model == network.model
            if layer.input in network.outputs:
                np.testing.assert_array_equal(gridded.part(samples, [layer.input])(samples)[layer.input], read[layer.input])


# Equalization


@pytest.mark.parametrize("name", [*EDITABLE, "fixture:classifier_float16", "fixture:decoder_float16"])
def test_equalization_keeps_the_function(name):
    content, samples = content_of(name), samples_of(name, 8)
    result = biascorr.equalize(content, samples, threads=1)
    expected = litert(content, samples)
    for output, values in litert(result.model, samples).items():
        np.testing.assert_allclose(values, expected[output], rtol=0, atol=2e-6 * np.abs(expected[output]).max())
    assert (result.model == content) == (not result.is_anything_done)


CHAINED = {
    "convolutions": 2, "grouped": 1, "depthwise": 2, "fully_connected": 1, "fully_connected_of_steps": 1, "transpose_conv": 2,
    "matmul_left": 1, "conv3d": 2, "residual": 2, "squeezed": 1, "scaled_relu6": 1, "shared_biases": 3, "shared_weights": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINED)
def test_layers_are_scaled(name):
    assert len(biascorr.equalize(content_of(name)).chains) == CHAINED[name]


def uneven(activation, *, channels=8, spread=2.0):
    """Two layers whose channels have ranges that differ by so many powers of ten, ReLU6 or another activation between them."""
    b = Builder(1)
    factors = np.float32(10 ** np.linspace(-spread / 2, spread / 2, channels))
    x = b.input("image", (1, 8, 8, 3))
    first = b.rng.normal(0, 0.2, (channels, 3, 3, 3)).astype(np.float32) * factors[:, None, None, None]
    bias = b.constant(np.abs(b.rng.normal(0.5, 0.2, channels)).astype(np.float32) * factors)
    last = b.rng.normal(0, 0.2, (4, 3, 3, channels)).astype(np.float32) / factors
    y = activation(b, b.constant(first), bias, x)
    b.output(b.conv2d(y, b.constant(last), b.bias(4), name="last"), "output")
    b.signature()
    return b.bytes()


def fused(kind):
    return lambda b, weights, bias, x: b.conv2d(x, weights, bias, activation=kind, name="first")


def apart(kind):
    return lambda b, weights, bias, x: b.unary(kind, b.conv2d(x, weights, bias, name="first"), name="activation")


def minimum(bound):
    return lambda b, weights, bias, x: b.minimum(
        b.conv2d(x, weights, bias, activation="RELU", name="first"), b.constant(np.float32(bound)), name="bounded"
    )


BETWEEN = {
    "RELU6, fused": fused("RELU6"),
    "RELU6": apart("RELU6"),
    "RELU, fused": fused("RELU"),
    "RELU_N1_TO_1, fused": fused("RELU_N1_TO_1"),
    "RELU_N1_TO_1": apart("RELU_N1_TO_1"),
    "MINIMUM": minimum(1.5),
    "MINIMUM of each channel": minimum(np.linspace(0.5, 3, 8)),
    "LEAKY_RELU": apart("LEAKY_RELU"),
    "none": fused("NONE"),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_uneven_channels_are_scaled_through_bounds(between):
    content = uneven(BETWEEN[between])
    samples = samples_for(content, 8)
    result = biascorr.equalize(content, samples, threads=1)
    assert len(result.chains) == 1, result.left
    expected = litert(content, samples)["output"]
    np.testing.assert_allclose(litert(result.model, samples)["output"], expected, atol=2e-6 * np.abs(expected).max())
    first = np.asarray(loaded(result.model).layers[0].weights)
    ranges = np.abs(first).max(axis=(1, 2, 3))
    assert ranges.max() < 20 * ranges.min()  # 100 before
    forms = [quantized(each, "int8_per_tensor", samples) for each in (content, result.model)]
    before, after = (sqnr(content, each, samples) for each in forms)
    assert after > before + 3
    kinds = {kind_of(unpacked(result.model), each) for each in unpacked(result.model).subgraphs[0].operators}
    if "RELU6" in between or "MINIMUM" in between:
        assert schema.BuiltinOperator.MINIMUM in kinds


def test_correction_may_equalize_first():
    content = uneven(BETWEEN["RELU6, fused"])
    samples = samples_for(content, 16)
    correction = correct(content, samples, quant_params=QuantParams("tf", weight_bits=8), equalize=True, threads=1)
    assert correction.choice.is_equalized
    assert correction.scores[correction.method].sqnr > correction.scores["none"].sqnr + 3
    assert correction.equalization.is_anything_done
    expected = correction.equalization.network
    assert weights_of(correction.model).keys() == weights_of(content).keys()
    for layer in expected.layers:
        np.testing.assert_array_equal(weights_of(correction.model)[layer.name], np.asarray(layer.weights))
    made = quantized(correction.model, "int8_per_tensor", samples)
    assert (
        sqnr(content, made, held_out(samples))
        > sqnr(content, quantized(content, "int8_per_tensor", samples), held_out(samples)) + 3
    )


def test_replaced_relu6():
    content = content_of("residual")
    result = biascorr.equalize(content, replace_relu6=True)
    assert result.replaced == ["expanded/activation", "depthwise/activation"]
    kinds = {layer.name: result.network.facts().activation(f"{layer.name}/activation") for layer in result.network.layers[:2]}
    assert all(each.type.bounds == (0.0, np.inf) for each in kinds.values())


LIMITS = {
    "relu": (0.0, np.inf),
    "relu6": (0.0, 6.0),
    "relu_n1_to_1": (-1.0, 1.0),
    "numbers": (0.0, 0.7),
    "below": (-np.inf, 0.4),
    "above": (0.1, np.inf),
    "none": (-np.inf, np.inf),
    "each": (0.0, np.linspace(0.1, 1, 8)),
    "each below": (-np.inf, np.linspace(0.1, 1, 8)),
    "each, both": (np.linspace(-0.5, 0.1, 8), np.linspace(0.2, 1, 8)),
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("between", ["RELU6, fused", "RELU6", "RELU, fused", "RELU_N1_TO_1", "MINIMUM"])
def test_other_limits(between, limits):
    network = loaded(uneven(BETWEEN[between], spread=0.0))
    samples = samples_for(network.model, 2)
    (name,) = {"RELU6": ["activation"], "RELU_N1_TO_1": ["activation"], "MINIMUM": ["bounded"]}.get(
        between, ["first/activation"]
    )
    low, high = LIMITS[limits]
    given = run(network, samples, [network.layers[0].output, network.layers[1].input])
    edited = network.edited(Edits(limits={name: (low, high)}))
    again = loaded(edited.model)
    found = run(again, samples, [again.layers[1].input])[again.layers[1].input]
    before = given[network.layers[0].output]
    before = np.maximum(before, 0) if between == "MINIMUM" else before
    np.testing.assert_allclose(found, np.clip(before, low, high), atol=1e-6)
    np.testing.assert_array_equal(litert(edited.model, samples)["output"], run(edited, samples)["output"])
    assert network.model == uneven(BETWEEN[between], spread=0.0)


@pytest.mark.parametrize("name", EDITABLE)
def test_other_weights_and_biases(name):
    network = loaded(content_of(name))
    rng, samples = np.random.default_rng(0), samples_of(name, 2)
    weights = {layer.name: rng.normal(0, 0.2, layer.weights.shape).astype(np.float32) for layer in network.layers}
    biases = {layer.name: rng.normal(0, 0.2, layer.channels) for layer in network.layers if layer.bias is not None}
    edited = network.edited(Edits(weights=weights, biases=biases))
    for each in (edited, loaded(edited.model)):
        for layer in each.layers:
            np.testing.assert_array_equal(np.asarray(layer.weights), weights[layer.name])
            if layer.bias is not None:
                np.testing.assert_allclose(np.ravel(layer.bias), biases[layer.name], rtol=1e-6)
    expected = run(edited, samples)
    for output, values in litert(edited.model, samples).items():
        np.testing.assert_allclose(values, expected[output], rtol=1e-5, atol=1e-6)
    assert network.model == content_of(name)


# Any file


RUNS = [recipe for recipe in RECIPES if recipe not in ("int4_blocks", "dynamic_per_tensor")]


METHODS = "auto", "mean", "auto", "iterative", "auto", "empirical", "auto", "activation"


@pytest.mark.parametrize("seed", range(len(RUNS) * 2))
def test_any_file(seed):
    recipe, method = RUNS[seed % len(RUNS)], METHODS[seed % len(METHODS)]
    reference = random_file(seed)
    samples = samples_for(reference, 8, seed=seed)
    content = quantized(reference, recipe, samples)
    try:
        litert(content, samples)
    except RuntimeError:
        return  # LiteRT does not take what the quantizer made
    given = [weights.tobytes() for weights in weights_of(reference).values()]
    if all(weights.tobytes() in given for weights in weights_of(content).values()):
        return  # it has nothing that the recipe quantizes
    correction = correct(reference, samples, quantized=content, method=method, threads=1)
    assert_only_biases_differ(content, correction.model)
    before, after = (sqnr(reference, each, held_out(samples)) for each in (content, correction.model))
    if method == "auto":
        assert after >= before - 1e-6
    for layer in correction.report:
        assert layer.method or layer.reasons


@pytest.mark.parametrize("name", ["int8", "int8_in_out", "uint8_in_out", "int16x8"])
def test_samples_that_are_scaled_otherwise_are_remarked(name):
    def notes(factor):
        given = path_of(f"classifier_{name}")
        samples = factor * images()
        found = biascorr.correct(path_of("classifier_float"), samples, quantized=given, max_samples=8).notes
        return [note for note in found if "outside" in note]

    assert not notes(1)
    (note,) = notes(100)
    assert re.match(r"99% of the values of input image are outside of \S+ to 6.743, .*: are the samples scaled as", note)


def test_a_function_of_samples_is_to_be_called():
    with pytest.raises(TypeError, match="^data: function, expected .* or a path: call it, and give what it returns$"):
        biascorr.correct(path_of("classifier_float"), lambda: images())


def test_models_of_other_kinds_are_told_apart(tmp_path):
    given = path_of("classifier_int8")
    (tmp_path / "float.onnx").write_bytes(b"no model")
    with pytest.raises(
        ValueError, match="^quantized: not of this float model, but of another framework: .tflite, expected .onnx"
    ):
        biascorr.correct(tmp_path / "float.onnx", images(), quantized=given)
    with pytest.raises(FileNotFoundError, match="no such file"):
        biascorr.correct(tmp_path / "float", images(), quantized=given)
    with pytest.raises(TypeError, match="^reference: int, expected a path, bytes or"):
        biascorr.correct(3, images(), quantized=given)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_product_that_takes_no_bias_gets_one_by_an_edit(side):
    b = Builder()
    x = b.input("x", (1, 5, 6))
    weights = b.weights(6, 4) if side == "right" else b.weights(3, 5)
    b.output(b.unary("RELU", b.matmul(*((x, weights) if side == "right" else (weights, x)), name="layer")), "y")
    b.signature()
    content = b.bytes()
    network, samples = loaded(content), samples_for(content)
    (layer,) = network.layers
    bias = np.linspace(-0.3, 0.3, layer.channels)
    edited = network.edited(Edits(biases={"layer": bias}))
    (found,) = edited.layers
    assert found.name == "layer"
    np.testing.assert_allclose(np.ravel(found.bias), bias, rtol=1e-6)
    inner = {name: rows[:1] for name, rows in samples.items()}
    before, after = (
        each.part(inner, [made.output], threads=1)(inner)[made.output] for each, made in ((network, layer), (edited, found))
    )
    np.testing.assert_allclose(after - before, np.broadcast_to(layer.along_channels(bias), before.shape), atol=1e-6)
    assert litert(edited.model, samples)["y"].shape == litert(content, samples)["y"].shape
