"""The analytical shift: values of the expectation, and the means of networks that it must predict."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from biascorr import ActivationType, ConvBnInfoType
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.analytical import analytical_shift, expected_input
from biascorr.graph.batch_norms import batch_norms_around_layers
from biascorr.graph.network import Edits
from biascorr.graph.operations import BatchNorm
from networks import biases, channel_mean, fake_quantized, model_from_text, run, samples, weights

NORM = "n = BatchNormalization<epsilon=0.0>(x, gamma, beta, mean, var)"


def statistics(beta, gamma):
    """Of inputs with mean 0 and variance 1."""
    beta, gamma = np.float32(beta), np.float32(gamma)
    return {"beta": beta, "gamma": gamma, "mean": np.zeros_like(beta), "var": np.ones_like(beta)}


def info(beta, gamma, activation=ActivationType.no_activation):
    beta, gamma = np.float64(beta), np.float64(gamma)
    norm = BatchNorm("norm", beta, gamma, np.zeros_like(beta), np.ones_like(beta), 0.0)
    return ConvBnInfoType(norm, in_activation_type=activation)


class Quantized:
    """A network, the same with fake-quantized weights, and its last layer."""

    def __init__(self, model):
        self.float = OnnxNetwork.load(model, "model")
        layer = self.float.layers[-1]
        self.weights = layer.weights
        self.network = self.float.edited(Edits(weights={layer.name: fake_quantized(layer.weights, layer.layout.index("O"))}))
        self.layer = self.network.layers[-1]
        self.info = batch_norms_around_layers(self.float)[layer.name]

    def predicted(self, shape="known"):
        shape = self.float.facts().shapes.get(self.layer.input) if shape == "known" else shape
        return analytical_shift(self.layer, self.weights, self.info, shape)

    def measured(self, x):
        """By how much the quantized weights lower the mean output."""
        outputs = [run(network.model, {"x": x})[0].astype(np.float64) for network in (self.float, self.network)]
        return channel_mean(outputs[0] - outputs[1], self.layer.output_axis)


IMAGES = (2, 4, 9, 8)

CASES = {
    "signals": ("Conv<pads=[1,2], strides=[2]>(t, w, b)", (2, 4, 11), (5, 4, 4)),
    "volumes": ("Conv<pads=[1,0,1,0,1,2]>(t, w, b)", (2, 4, 5, 6, 4), (3, 4, 2, 3, 2)),
    "no pads": ("Conv(t, w, b)", IMAGES, (5, 4, 3, 3)),
    "pads": ("Conv<pads=[1,1,1,1]>(t, w)", IMAGES, (5, 4, 3, 3)),
    "asymmetric pads": ("Conv<pads=[0,2,1,3]>(t, w, b)", IMAGES, (5, 4, 3, 3)),
    "pads, strides, dilations": ("Conv<pads=[2,1,0,3], strides=[2,1], dilations=[1,2]>(t, w, b)", IMAGES, (5, 4, 3, 3)),
    "pads wider than the image": ("Conv<pads=[9,9,9,9], strides=[7,8]>(t, w, b)", IMAGES, (5, 4, 3, 3)),
    "SAME_UPPER": ('Conv<auto_pad="SAME_UPPER", strides=[2,2]>(t, w, b)', IMAGES, (5, 4, 3, 3)),
    "SAME_LOWER": ('Conv<auto_pad="SAME_LOWER", strides=[2,3]>(t, w, b)', IMAGES, (5, 4, 2, 4)),
    "groups": ("Conv<pads=[1,1,1,1], group=2>(t, w, b)", IMAGES, (6, 2, 3, 3)),
    "depthwise": ("Conv<pads=[1,1,1,1], group=4>(t, w, b)", IMAGES, (4, 1, 3, 3)),
    "multiplier": ("Conv<pads=[1,1,1,1], group=4>(t, w, b)", IMAGES, (12, 1, 3, 3)),
    "one input channel": ("Conv<pads=[1,1,1,1]>(t, w, b)", (2, 1, 9, 8), (5, 1, 3, 3)),
    "one output channel": ("Conv<pads=[1,1,1,1]>(t, w, b)", IMAGES, (1, 4, 3, 3)),
    "gemm": ("Gemm<transB=1, alpha=0.5>(t, w, b)", (6, 4), (5, 4)),
    "matmul": ("MatMul(v, t)", (6, 4, 3), (5, 4)),
    "matmul of averages": ("MatMul(f, v)", IMAGES, (4, 5)),
}


def network(name, activation="t = Relu(n)", beta=None, gamma=None, *, dynamic=False, **options):
    layer, x, w = CASES[name]
    shape = [size if axis < 2 or not dynamic else "?" for axis, size in enumerate(x)]
    shapes = ", ".join(map(str, ["N", *shape[1:]])), ", ".join("?" * (2 if "averages" in name else len(x)))
    between = f"{activation} m = GlobalAveragePool(t) f = Flatten(m)" if "averages" in name else activation
    text = f"g (float[{shapes[0]}] x) => (float[{shapes[1]}] y) {{ {NORM} {between} [layer] y = {layer} }}"
    beta = [0.5, -0.25, 1.25, 2.0][: x[1]] if beta is None else beta
    constants = statistics(beta, np.zeros(x[1]) if gamma is None else gamma) | options
    constants["v" if "MatMul" in layer else "w"] = weights(*w)
    return model_from_text(text, **constants, **({"b": biases(w[0])} if ", b)" in layer else {}))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("activation", ["t = Identity(n)", "t = Relu(n)", "t = Clip(n, low, high)", "t = Clip(n, , high)"])
def test_a_constant_input_is_exact(name, activation):
    bounds = {key: value for key, value in {"low": np.float32(-0.125), "high": np.float32(0.875)}.items() if key in activation}
    quantized = Quantized(network(name, activation, **bounds))
    measured = quantized.measured(samples(*CASES[name][1]))
    assert np.abs(measured).max() > 1e-3
    np.testing.assert_allclose(quantized.predicted(), measured, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["pads", "SAME_UPPER", "volumes"])
def test_the_shape_may_be_that_of_a_sample(name):
    quantized = Quantized(network(name, dynamic=True))
    x = samples(*CASES[name][1])
    measured = quantized.measured(x)
    np.testing.assert_allclose(quantized.predicted(x.shape), measured, rtol=1e-6, atol=1e-6)
    assert np.abs(quantized.predicted() - measured).max() > 1e-3
    unweighted = analytical_shift(quantized.layer, quantized.weights, quantized.info)
    np.testing.assert_array_equal(quantized.predicted(), unweighted)


def test_channels_may_be_last():
    quantized = Quantized(network("asymmetric pads"))
    n, channels, *space = CASES["asymmetric pads"][1]
    layer = replace(quantized.layer, channel_axis=-1)
    shift = analytical_shift(layer, quantized.weights, quantized.info, (n, *space, channels))
    np.testing.assert_array_equal(shift, quantized.predicted())


def normal_samples(channels, size):
    """One image a channel of quantiles of the normal distribution, each in another order."""
    quantiles = [NormalDist().inv_cdf((k + 0.5) / size**2) for k in range(size**2)]
    rng = np.random.default_rng(5)
    return np.float32([rng.permutation(quantiles).reshape(size, size) for _ in range(channels)])[None]


@pytest.mark.parametrize(
    ("activation", "bounds"),
    [
        ("t = Identity(n)", {}),
        ("t = Relu(n)", {}),
        ("t = Clip(n, low, high)", {"low": 0, "high": 6}),
        ("t = Clip(n, low, high)", {"low": -0.5, "high": 1.25}),
        ("t = Clip(n, low)", {"low": -0.5}),
        ("t = Clip(n, , high)", {"high": 0.25}),
        ("t = Min(n, high)", {"high": [[[0.25]], [[-1]], [[np.inf]], [[5]]]}),
        ("t = Max(low, n)", {"low": [[[0.25]], [[-1]], [[-np.inf]], [[5]]]}),
    ],
    ids=str,
)
def test_a_normal_input(activation, bounds):
    """Positive, zero and negative gamma alike; the padding is a small share of so large an image."""
    bounds = {key: np.float32(value) for key, value in bounds.items()}
    quantized = Quantized(network("pads", activation, [0.5, -1, 2, 5.5], [-2, 0.5, 0, -1], dynamic=True, **bounds))
    x = normal_samples(4, 128)
    predicted, measured = quantized.predicted(x.shape), quantized.measured(x)
    assert np.abs(measured).max() > 0.02
    np.testing.assert_allclose(predicted, measured, atol=0.01 * np.abs(measured).max())


@pytest.mark.parametrize(
    ("beta", "gamma", "relu", "relu6"),
    [
        (0, 1, 0.398942280, 0.398942280),
        (1, 1, 1.083315471, 1.083315417),
        (3, 2, 3.058613588, 3.0),
        (7, 1, 7.0, 5.916684529),
        (7, -1, 7.0, 5.916684529),
        (7, 0, 7.0, 6.0),
        (-1, 0, 0.0, 0.0),
    ],
)
def test_values_of_the_expectation(beta, gamma, relu, relu6):
    layer = Quantized(network("gemm")).layer
    expected = {ActivationType.no_activation: beta, ActivationType.relu: relu, ActivationType.relu6: relu6}
    for activation, value in expected.items():
        mean = expected_input(layer, info([beta], [gamma], activation))
        np.testing.assert_allclose(mean, [value], rtol=1e-9, atol=1e-9)


def test_without_what_the_expectation_needs():
    quantized = Quantized(network("pads"))
    with pytest.raises(ValueError, match="layer layer: no batch normalization before it, expected one"):
        analytical_shift(quantized.layer, quantized.weights, ConvBnInfoType(output_bn=quantized.info.input_bn))
    with pytest.raises(ValueError, match="layer layer: activation before it: other, expected a Clip or none"):
        analytical_shift(quantized.layer, quantized.weights, info([1] * 4, [1] * 4, ActivationType.other))
    with pytest.raises(ValueError, match="3"):
        analytical_shift(quantized.layer, quantized.weights, info([1] * 3, [1] * 3))
