"""The classic interface: its recipes, what they promise of mean outputs, and what it says of wrong arguments."""

import inspect
import itertools
import os
from dataclasses import replace

import numpy as np
import onnx
import pytest

from biascorr import (
    ActivationType,
    BiasCorrection,
    BiasCorrectionParams,
    ConvBnInfoType,
    QuantParams,
    correct,
    find_all_convs_bn_with_activation,
)
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.simulation import input_quantizations, simulated
from biascorr.graph.operations import BatchNorm
from networks import Reader, biases, channel_mean, constants_of, model_from_text, ranges_in, run, samples, two_layers, weights

X = samples(12, 3, 6, 6)
PARAMS = BiasCorrectionParams(4, 12, 12, ["x"], ["y"])
QUANT = QuantParams("tf", weight_bits=4)


def network():
    """first -> norm -> relu -> second (no bias) -> depthwise, and a branch of the input; a matrix product at the end."""
    text = """g (float[N,3,6,6] x) => (float[N,5] y) {
        [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [norm] n = BatchNormalization<epsilon=0.0>(a, gamma, beta, center, one)
        [relu] r = Relu(n)
        [second] c = Conv<pads=[1,1,1,1]>(r, w2)
        [side] s = Conv(x, w3, b3)
        [sum] t = Add(c, s)
        [clip] l = Relu(t)
        [third] d = Conv<group=4, strides=[2,2]>(l, w4, b4)
        [mean] m = GlobalAveragePool(d)
        [flatten] f = Flatten(m)
        [last] y = MatMul(f, w5)
    }"""
    shapes = {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "w3": (4, 3, 1, 1), "w4": (8, 1, 3, 3)}
    constants = {name: weights(*shape) for name, shape in shapes.items()} | {"w5": weights(8, 5, axis=1)}
    constants |= {"b1": biases(4), "b3": biases(4), "b4": biases(8)}
    norm = {"gamma": [0.5, 1, -1, 2], "beta": [0.25, -0.5, 1, 0], "center": [1, 0, -1, 0.5], "one": [1, 1, 1, 1]}
    return model_from_text(text, **constants, **{name: np.float32(values) for name, values in norm.items()})


OUTPUTS = {"first": "a", "second": "c", "side": "s", "third": "d", "last": "y"}


def means(model, *, quant_params=None):
    """Of the output of each layer; `quant_params`: quantized, inputs in the ranges that the uncorrected network has."""
    if quant_params is not None:
        given = OnnxNetwork.load(model, "model")
        quantized = simulated(given, replace(quant_params, activation_bits=None))
        if quant_params.activation_bits is not None:
            uncorrected = OnnxNetwork.load(network(), "model")
            ranges = input_quantizations(uncorrected.layers, ranges_in(uncorrected, [{"x": X}]), quant_params.activation_bits)
            quantized = quantized.with_quantizers(ranges)
        model = quantized.model
    return dict(zip(OUTPUTS, (channel_mean(array, 1) for array in run(model, {"x": X}, list(OUTPUTS.values())))))


def assert_same_means(found, expected, layers=OUTPUTS):
    for name in layers:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)


def assert_same_constants(found, expected, **tolerance):
    first, second = constants_of(found), constants_of(expected)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], **tolerance, err_msg=name)


def corrected(model=None, data=X, params=PARAMS, quant_params=QUANT, **options):
    return BiasCorrection.correct_bias(network() if model is None else model, params, quant_params, data, **options)


# The recipes


def test_empirical():
    model = network()
    found = corrected(model)
    assert isinstance(found, onnx.ModelProto)
    onnx.checker.check_model(found, full_check=True)
    before, expected = means(model, quant_params=QUANT), means(model)
    assert all(np.abs(before[name] - expected[name]).max() > 0.01 for name in OUTPUTS)
    assert_same_means(means(found, quant_params=QUANT), expected)


def test_empirical_and_analytical():
    model = network()
    norms = find_all_convs_bn_with_activation(model)
    found = corrected(model, conv_bn_dict=norms, perform_only_empirical_bias_corr=False)
    with pytest.warns(UserWarning, match="^not folded: 1 batch normalization, "):
        hybrid = correct(model, X, method="hybrid", quant_params=QUANT)
    assert [layer.method for layer in hybrid.report] == ["empirical", "analytical", "empirical", "empirical", "empirical"]
    assert_same_constants(found, hybrid.model, rtol=1e-6, atol=1e-7)
    assert_same_means(means(found, quant_params=QUANT), means(model), OUTPUTS.keys() - {"second"})


def test_one_layer_empirical():
    model = network()
    found = BiasCorrection.bias_correction_per_layer(model, model, PARAMS, "third", X, quant_params=QUANT)
    assert_same_means(means(found, quant_params=QUANT), means(model), ["third"])
    assert_same_constants(found, model_with(model, b4=constants_of(found)["b4"]))
    assert np.abs(constants_of(found)["b4"] - constants_of(model)["b4"]).max() > 0.01


def test_one_layer_analytical():
    model = network()
    info = find_all_convs_bn_with_activation(model)["second"]
    found = BiasCorrection.analytical_bias_correction_per_layer(model, "second", info, QUANT)
    with pytest.warns(UserWarning, match="^not folded: 1 batch normalization, "):
        expected = correct(model, method="analytical", quant_params=QUANT).model
    assert_same_constants(found, expected)
    assert len(constants_of(found)) == len(constants_of(model)) + 1


# What is promised


def model_with(model, **arrays):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return copy


@pytest.mark.parametrize(
    "quant_params", [QUANT, QuantParams(weight_bits=3, per_channel=True), QuantParams("tf", activation_bits=8)]
)
def test_mean_outputs_are_those_of_the_reference(quant_params):
    model = network()
    found = corrected(model, quant_params=quant_params)
    assert_same_means(means(found, quant_params=quant_params), means(model))


def test_layers_one_by_one_are_all_layers():
    """In topological order, each behind those corrected before it; a second round changes nothing."""
    model = network()
    found = model
    for name in OUTPUTS:
        found = BiasCorrection.bias_correction_per_layer(model, found, PARAMS, name, X, quant_params=QUANT)
    assert_same_constants(found, corrected(model), rtol=1e-5, atol=2e-6)
    again = found
    for name in OUTPUTS:
        again = BiasCorrection.bias_correction_per_layer(model, again, PARAMS, name, X, quant_params=QUANT)
    assert_same_constants(again, found, rtol=0, atol=1e-6)


def test_a_second_correction_of_a_quantized_model_changes_nothing():
    model = network()
    given = simulated(OnnxNetwork.load(model, "model"), QUANT).model
    once = correct(model, X, quantized=given, method="empirical").model
    twice = correct(model, X, quantized=once, method="empirical").model
    assert_same_constants(twice, once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [2, 1, 9], [12]], ids=str)
def test_the_batch_size_changes_nothing(sizes):
    batches = np.split(X, np.cumsum(sizes)[:-1])
    found = corrected(data=batches, params=BiasCorrectionParams(1, 1, len(batches), ["x"], ["y"]))
    assert_same_constants(found, corrected(), rtol=1e-6, atol=1e-6)


def test_layers_without_a_bias_get_one():
    before, after = network(), corrected()
    assert len(after.graph.node) == len(before.graph.node) + 1  # the bias of a MatMul is an Add
    assert len(next(node for node in after.graph.node if node.name == "second").input) == 3


@pytest.mark.parametrize("only_empirical", [True, False])
def test_ignored_layers_are_skipped(only_empirical):
    """Neither quantized nor corrected, although what they read has changed."""
    model = network()
    quant_params = QuantParams("tf", weight_bits=4, ops_to_ignore=["third", "second"])
    found = corrected(model, quant_params=quant_params, perform_only_empirical_bias_corr=only_empirical)
    np.testing.assert_array_equal(constants_of(found)["b4"], constants_of(model)["b4"])
    assert len(next(node for node in found.graph.node if node.name == "second").input) == 2
    assert_same_means(means(found, quant_params=quant_params), means(model), ["first", "side", "last"])
    same = BiasCorrection.bias_correction_per_layer(model, model, PARAMS, "third", X, quant_params=quant_params)
    assert same == model
    info = find_all_convs_bn_with_activation(model)["second"]
    assert BiasCorrection.analytical_bias_correction_per_layer(model, "second", info, quant_params) == model


def test_all_layers_may_be_ignored():
    assert corrected(quant_params=QuantParams(ops_to_ignore=list(OUTPUTS))) == network()


def test_a_layer_that_quantization_does_not_change_makes_up_for_those_before_it():
    model = model_with(network(), w4=np.ones((8, 1, 3, 3), np.float32))
    found = corrected(model)
    assert_same_means(means(found, quant_params=QUANT), means(model))
    assert np.abs(constants_of(found)["b4"] - constants_of(model)["b4"]).max() > 0.01


VALUES = [
    (0, 1, 0.398942280, 0.398942280),
    (1, 1, 1.083315471, 1.083315417),
    (3, 2, 3.058613588, 3.0),
    (7, 1, 7.0, 5.916684529),
    (7, -1, 7.0, 5.916684529),
]


@pytest.mark.parametrize(("beta", "gamma", "relu", "relu6"), VALUES)
def test_values_of_the_analytical_correction(beta, gamma, relu, relu6):
    """One weight of 0.3 that becomes 0.25: the bias grows by 0.05 times the expectation."""
    w = np.float32([[-1.0, 0.3]])
    model = model_from_text(
        "g (float[N,2] x) => (float[N,1] y) { [layer] y = Gemm<transB=1>(x, w, b) }", w=w, b=np.float32([1])
    )
    quant_params = QuantParams("tf", weight_bits=4, symmetric=False)
    rounding = w[0] - quant_params.fake_quantized(OnnxNetwork.load(model, "model").layers[0])[0]
    assert abs(rounding[1]) > 0.02
    norm = BatchNorm("norm", np.float64([0, beta]), np.float64([0, gamma]), np.zeros(2), np.ones(2), 0.0)
    expectations = {ActivationType.no_activation: beta, ActivationType.relu: relu, ActivationType.relu6: relu6}
    for activation, expectation in expectations.items():
        info = ConvBnInfoType(norm, in_activation_type=activation)
        found = BiasCorrection.analytical_bias_correction_per_layer(model, "layer", info, quant_params)
        np.testing.assert_allclose(constants_of(found)["b"], 1 + rounding[1] * expectation, rtol=1e-6)


def test_statistics_are_taken_from_the_dictionary():
    model = network()
    norms = find_all_convs_bn_with_activation(model)
    other = norms["second"].input_bn
    other = BatchNorm("other", other.beta + 1, other.gamma, other.mean, other.variance, other.epsilon)
    given = {"second": ConvBnInfoType(other, in_activation_type=ActivationType.relu), "third": ConvBnInfoType(output_bn=other)}
    found, default = (corrected(conv_bn_dict=each, perform_only_empirical_bias_corr=False) for each in (given, None))
    expected = BiasCorrection.analytical_bias_correction_per_layer(model, "second", given["second"], QUANT)
    for result, is_same in ((found, True), (default, False)):
        bias = next(iter(constants_of(expected).keys() - constants_of(model).keys()))
        assert np.allclose(constants_of(result)[bias], constants_of(expected)[bias], rtol=1e-6) == is_same
    assert corrected(conv_bn_dict=given) == corrected()
    nothing = corrected(conv_bn_dict={}, perform_only_empirical_bias_corr=False)
    assert nothing == corrected()


def test_a_first_layer_without_statistics_is_left_alone():
    model = network()
    for info in (None, ConvBnInfoType()):  # the entry of a layer with a normalization behind it says nothing of its input
        assert BiasCorrection.analytical_bias_correction_per_layer(model, "first", info, QUANT, is_first_conv=True) == model
    with pytest.raises(ValueError, match="preceeding_bn_layer_info: None for layer first, expected one unless is_first_conv"):
        BiasCorrection.analytical_bias_correction_per_layer(model, "first", None, QUANT)
    info = find_all_convs_bn_with_activation(model)["second"]
    wrong = ConvBnInfoType(info.input_bn, in_activation_type=ActivationType.other)
    with pytest.raises(ValueError, match="layer second: activation before it: other"):
        BiasCorrection.analytical_bias_correction_per_layer(model, "second", wrong, QUANT)


# Models and data


def test_models_may_be_paths_and_bytes_and_stay_as_they_are(tmp_path, monkeypatch):
    model, expected = network(), corrected()
    onnx.save(model, tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    monkeypatch.chdir(tmp_path)
    for each in ("model.onnx", tmp_path / "model.onnx", model.SerializeToString(), model):
        assert corrected(each) == expected
        assert BiasCorrection.bias_correction_per_layer(each, each, PARAMS, "third", X) != model
    assert os.listdir() == ["model.onnx"]  # noqa: PTH208
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert model == network()


@pytest.mark.parametrize(
    "form",
    [
        lambda batches: batches,
        lambda batches: (batch for batch in batches),
        lambda batches: [(batch,) for batch in batches],
        lambda batches: [{"x": batch} for batch in batches],
        lambda batches: Reader({"x": batch} for batch in batches),
        np.concatenate,
        lambda batches: {"x": np.concatenate(batches)},
    ],
    ids=["list", "generator", "tuples", "mappings", "reader", "array", "mapping"],
)
def test_data_of_every_form(form):
    """Of what there is, as many batches are read as are asked for."""
    data = form(np.split(samples(24, 3, 6, 6), 6))
    expected = corrected(data=np.split(samples(24, 3, 6, 6), 6)[:3])
    assert_same_constants(corrected(data=data, params=BiasCorrectionParams(4, 1, 9, ["x"], ["y"])), expected)


def test_no_more_batches_are_read_than_are_used():
    batches = iter(np.split(X, 6))
    corrected(data=batches, params=BiasCorrectionParams(2, 100, 7, ["x"], ["y"]))
    assert len(list(batches)) == 2


def test_an_infinite_data_set_is_read_as_far_as_it_is_used():
    class Infinite:
        """Like a tf.data.Dataset of single samples."""

        def __init__(self):
            self.read = 0
            self.element_spec = X[0]

        def cardinality(self):
            return -1

        def __iter__(self):
            for x in itertools.cycle(X):
                self.read += 1
                yield x

    data = Infinite()
    assert_same_constants(corrected(data=data, params=BiasCorrectionParams(4, 100, 12, ["x"], ["y"])), corrected())
    assert data.read == 12


def test_data_that_ends_early_is_warned_of():
    with pytest.warns(UserWarning, match="data_set: ended after 3 batches, 5 were asked for"):
        found = corrected(data=iter(np.split(X, 3)), params=BiasCorrectionParams(4, 1, 20, ["x"], ["y"]))
    assert_same_constants(found, corrected())


@pytest.mark.parametrize("quant_params", [QUANT, QuantParams(activation_bits=8)])
def test_no_data_at_all_is_an_error(quant_params):
    with pytest.raises(ValueError, match="data_set: no samples, at least one is needed"):
        corrected(data=iter([]), quant_params=quant_params)
    with pytest.raises(ValueError, match="data_set: no samples, at least one is needed"):
        BiasCorrection.bias_correction_per_layer(network(), network(), PARAMS, "third", [], quant_params=quant_params)


def test_labels_beside_inputs_are_an_error_that_says_how_to_drop_them():
    with pytest.raises(ValueError, match=r"data_set\[0\]: 2 arrays.*drop labels, e.g. \(x for x, \*labels in data\)"):
        corrected(data=[(batch, np.zeros(4)) for batch in np.split(X, 3)])


@pytest.mark.filterwarnings("ignore:empirical made the outputs worse")
@pytest.mark.parametrize("ranged", [4, 12])
def test_ranges_of_activations_are_those_of_the_samples_for_it(ranged):
    """Whether they are fewer than those that biases are corrected with, or more."""
    x = X.copy()
    x[4:] *= 4
    quant_params = QuantParams("tf", activation_bits=4)
    fitted = 16 - ranged
    found = corrected(
        data=np.split(x, 3), params=BiasCorrectionParams(4, ranged, fitted, ["x"], ["y"]), quant_params=quant_params
    )
    given = OnnxNetwork.load(network(), "model")
    model = simulated(given, quant_params, ranges_in(given, [{"x": x[:ranged]}]))
    reference = network()
    expected = correct(reference, x[:fitted], quantized=model.model, method="empirical").model
    for name in ("b1", "b3", "b4"):
        np.testing.assert_allclose(constants_of(found)[name], constants_of(expected)[name], rtol=1e-5, atol=1e-5)


def test_arrays_of_a_batch_are_in_the_order_of_the_names():
    text = """g (float[N,4] left, float[N,4] right) => (float[N,3] y, float[N,2] z) {
        [one] y = Gemm(left, w1, b1)
        [two] z = Gemm(right, w2, b2)
    }"""
    constants = {"w1": weights(4, 3, axis=1), "b1": biases(3), "w2": weights(4, 2, axis=1), "b2": biases(2)}
    model = model_from_text(text, **constants)
    left, right = samples(6, 4), samples(6, 4, seed=9)
    found = [
        corrected(model, [pair], BiasCorrectionParams(6, 1, 6, names, ["z", "y"]))
        for names, pair in ((["left", "right"], (left, right)), (["right", "left"], (right, left)))
    ]
    assert found[0] == found[1] != model


@pytest.mark.parametrize(("own", "other"), [("", ":0"), (":0", "")])
def test_names_of_tensors_with_an_index_or_without(own, other):
    model = network()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.name += own
    model.graph.node[0].input[0] = model.graph.node[4].input[0] = f"x{own}"
    model.graph.node[-1].output[0] = f"y{own}"
    expected = corrected(model, X, BiasCorrectionParams(4, 12, 12, [f"x{own}"], [f"y{own}"]))
    assert corrected(model, X, BiasCorrectionParams(4, 12, 12, [f"x{other}"], [f"y{other}"])) == expected
    for names in (["x", "x:0"], ["x:1"], ["x:0:0"] if not own else ["x:0:0:0"]):
        with pytest.raises(ValueError, match=f"input_op_names: {', '.join(names)}; the inputs of reference_model are x{own}$"):
            corrected(model, X, BiasCorrectionParams(4, 12, 12, names, [f"y{own}"]))


def test_the_exact_name_goes_first():
    text = """g (float[N,4] x, float[N,4] x__0) => (float[N,3] y) { a = Gemm(x, w, b) c = Gemm(x__0, w, b) y = Sub(a, c) }"""
    model = model_from_text(text, w=weights(4, 3, axis=1), b=biases(3))
    model.graph.input[1].name = model.graph.node[1].input[0] = "x:0"
    found = BiasCorrectionParams(4, 4, 4, ["x:0", "x"], ["y:0"]).inputs_of(OnnxNetwork.load(model, "model"), "model")
    assert [each.name for each in found] == ["x:0", "x"]


# Cost


@pytest.fixture
def computed(monkeypatch):
    """The tensors that networks are asked for, once for each batch."""
    names, original = [], OnnxNetwork.part

    def part(self, given, wanted, **options):
        compute = original(self, given, wanted, **options)

        def counted(feeds):
            names.extend(name for name in wanted if name not in given)
            return compute(feeds)

        return counted

    monkeypatch.setattr(OnnxNetwork, "part", part)
    return names


def test_the_cost_is_one_pass_of_the_float_network_and_one_sweep(computed):
    corrected(data=np.split(X, 3))
    assert {name: computed.count(name) for name in OUTPUTS.values()} == dict.fromkeys(OUTPUTS.values(), 6)


def test_what_is_behind_the_one_layer_that_is_corrected_only_runs_in_the_float_network(computed):
    BiasCorrection.bias_correction_per_layer(network(), network(), PARAMS, "first", X)
    assert computed.count("a") == 6
    assert computed.count("y") == 3


# Errors


def test_names_of_inputs_and_outputs_are_checked():
    with pytest.raises(ValueError, match="input_op_names: image; the inputs of reference_model are x"):
        corrected(params=BiasCorrectionParams(4, 4, 4, ["image"], ["y"]))
    with pytest.raises(ValueError, match="input_op_names: none; the inputs of reference_model are x"):
        corrected(params=BiasCorrectionParams(4, 4, 4, [], ["y"]))
    with pytest.raises(ValueError, match="output_op_names: logits is no output of reference_model, which has y"):
        corrected(params=BiasCorrectionParams(4, 4, 4, ["x"], ["y", "logits"]))
    renamed = network()
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "other"
    with pytest.raises(ValueError, match="output_op_names: y is no output of corrected_model, which has other"):
        BiasCorrection.bias_correction_per_layer(network(), renamed, PARAMS, "third", X)


def test_names_of_layers_are_checked():
    layers = "is no layer; the layers are first, second, side, third, last"
    with pytest.raises(ValueError, match=f"reference_model: 'thrid' {layers}"):
        BiasCorrection.bias_correction_per_layer(network(), network(), PARAMS, "thrid", X)
    with pytest.raises(ValueError, match="corrected_model: 'third' is no layer; the layers are first, second, last"):
        BiasCorrection.bias_correction_per_layer(network(), two_layers(), PARAMS, "third", X)
    with pytest.raises(ValueError, match=f"corrected_model: 'thrid' {layers}"):
        BiasCorrection.analytical_bias_correction_per_layer(network(), "thrid", None, QUANT, True)
    with pytest.raises(ValueError, match=f"conv_bn_dict: 'thrid' {layers}"):
        corrected(conv_bn_dict={"thrid": ConvBnInfoType()}, perform_only_empirical_bias_corr=False)
    with pytest.raises(ValueError, match=f"ops_to_ignore: 'thrid' {layers}"):
        corrected(quant_params=QuantParams(ops_to_ignore=["thrid"]))
    with pytest.raises(ValueError, match="layer second: 6 channels in corrected_model, 4 in reference_model, expected as many"):
        BiasCorrection.bias_correction_per_layer(network(), two_layers(), PARAMS, "second", X)


def model_with_a_recurrent_layer():
    text = """g (float[T,N,3] x) => (float[T,N,2] y, float[T,1,N,4] z) {
        [first] y = MatMul(x, w)
        [recurrent] z = RNN<hidden_size=4>(x, u, v)
    }"""
    return model_from_text(text, w=weights(3, 2, axis=1), u=weights(1, 4, 3), v=weights(1, 4, 4))


def test_layers_that_cannot_be_corrected_are_not_passed_over_in_silence():
    model, params = model_with_a_recurrent_layer(), BiasCorrectionParams(5, 5, 5, ["x"], ["y", "z"])
    data = [samples(5, 2, 3)]
    with pytest.warns(UserWarning, match="layers left as they are: recurrent \\(RNN\\): ."):
        corrected(model, data, params)
    with pytest.raises(ValueError, match="reference_model: layer recurrent cannot be corrected: ."):
        BiasCorrection.bias_correction_per_layer(model, model, params, "recurrent", data)
    BiasCorrection.bias_correction_per_layer(model, model, params, "first", data)  # says nothing of the others


@pytest.mark.parametrize("name", ["batch_size", "num_quant_samples", "num_bias_correct_samples"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "8"])
def test_numbers_are_checked(name, value):
    numbers = {"batch_size": 1, "num_quant_samples": 1, "num_bias_correct_samples": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}: {value!r}, expected an integer of at least 1"):
        BiasCorrectionParams(**numbers, input_op_names=["x"], output_op_names=["y"])


@pytest.mark.parametrize("value", ["x", b"x", [3], ["x", None]])
def test_names_are_lists_of_names(value):
    with pytest.raises(TypeError, match="input_op_names: .*, expected a list of names"):
        BiasCorrectionParams(1, 1, 1, value, ["y"])
    with pytest.raises(TypeError, match="output_op_names: .*, expected a list of names"):
        BiasCorrectionParams(1, 1, 1, ["x"], value)


def test_signatures():
    """What is written for the classic interface elsewhere runs here."""
    signatures = {
        BiasCorrectionParams: "batch_size num_quant_samples num_bias_correct_samples input_op_names output_op_names",
        BiasCorrection.correct_bias: "reference_model bias_correct_params quant_params data_set conv_bn_dict=None "
        "perform_only_empirical_bias_corr=True",
        BiasCorrection.bias_correction_per_layer: "reference_model corrected_model bias_correct_params "
        f"layer_name_to_be_corrected data_set quant_params={QuantParams()}",
        BiasCorrection.analytical_bias_correction_per_layer: "corrected_model layer preceeding_bn_layer_info quant_params "
        "is_first_conv=False",
    }
    for function, expected in signatures.items():
        parameters = inspect.signature(function).parameters.values()
        assert " ".join(str(each.replace(annotation=each.empty)) for each in parameters) == expected
