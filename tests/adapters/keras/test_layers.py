"""Every kind of layer of Keras, by brute force: what it computes, its mean output, and the bias that it gets."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from biascorr import QuantParams, correct
from biascorr.adapters.keras.network import KerasNetwork
from biascorr.sweep.measurements import empty_mean
from keras_networks import assert_close, fake_quantized, feeds_of, fill, of_keras, outputs_of, run
from networks import BITS, Array, samples

pytestmark = of_keras

FIRST = "channels_first"
VARIABLES = ("depthwise_kernel", "pointwise_kernel", "kernel", "bias")


@dataclass(frozen=True)
class Case:
    """A network of one layer: what it reads, its options; `axes` of the kernel hold output channels."""

    name: str
    kind: type
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    axes: tuple[int, ...] = (-1,)

    def model(self, *, bias: bool = True, activation: Any = None) -> keras.Model:
        own = dict(self.options)
        if self.kind is layers.EinsumDense:
            own["bias_axes"] = own.get("bias_axes") if bias else None
        else:
            own["use_bias"] = bias
        inside = self.kind(name="layer", activation=activation, **own)
        layer = layers.TimeDistributed(inside, name="layer") if self.name.startswith("time") else inside
        x = keras.Input(self.shape[1:], name="x")
        return fill(keras.Model(x, layer(x)))

    def samples(self) -> Array:
        return samples(*self.shape)

    def grid_axes(self, kernel: str, per_channel: bool) -> tuple[int, ...] | None:
        if not per_channel:
            return None
        return (-2, -1) if kernel == "depthwise_kernel" else (-1,) if kernel == "pointwise_kernel" else self.axes

    def quantized(self, model: keras.Model, per_channel: bool, bias: Any = None) -> keras.Model:
        """The model, without its activation, with fake-quantized weights, and another bias."""
        copy = self.linear(model)
        for name in kernels_of(copy):
            variable = getattr(own_layer(copy), name)
            variable.assign(fake_quantized(variable.numpy(), self.grid_axes(name, per_channel)))
        if bias is not None:
            own_layer(copy).bias.assign(bias)
        return copy

    def linear(self, model: keras.Model) -> keras.Model:
        """The model without its activation."""
        copy = self.model(bias=own_layer(model).bias is not None)
        for name in VARIABLES:
            variable = getattr(own_layer(model), name, None)
            if variable is not None:
                getattr(own_layer(copy), name).assign(variable)
        return copy


def own_layer(model: keras.Model) -> Any:
    layer = model.get_layer("layer")
    return layer.layer if isinstance(layer, layers.TimeDistributed) else layer


def kernels_of(model: keras.Model) -> list[str]:
    return [name for name in VARIABLES[:3] if getattr(own_layer(model), name, None) is not None]


def case(name: str, kind: type, shape: tuple[int, ...], *args: Any, axes: tuple[int, ...] = (-1,), **options: Any) -> Case:
    names = () if kind in (layers.Dense, layers.EinsumDense) else ("kernel_size",)
    first = "equation" if kind is layers.EinsumDense else "units" if kind is layers.Dense else "filters"
    if kind in (layers.DepthwiseConv1D, layers.DepthwiseConv2D):
        return Case(name, kind, shape, dict(zip(names, args)) | options, (-2, -1))
    if kind is layers.EinsumDense:
        names = ("output_shape", "bias_axes")
    axes = (-2,) if "Transpose" in kind.__name__ else axes
    return Case(name, kind, shape, dict(zip((first, *names), args)) | options, axes)


ROWS, SIGNALS, IMAGES, VOLUMES = (12, 7), (6, 12, 3), (5, 9, 8, 3), (3, 5, 6, 4, 2)


def first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1])


D, E = layers.Dense, layers.EinsumDense
C1, C2, C3 = layers.Conv1D, layers.Conv2D, layers.Conv3D
D1, D2, S1, S2 = layers.DepthwiseConv1D, layers.DepthwiseConv2D, layers.SeparableConv1D, layers.SeparableConv2D
T1, T2, T3 = layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose

CASES = [
    case("dense", D, ROWS, 5),
    case("dense of sequences", D, (6, 4, 7), 5),
    case("dense of images", D, (4, 3, 5, 6), 5),
    case("dense, one output", D, ROWS, 1),
    case("time distributed dense", D, (6, 4, 7), 5),
    case("time distributed dense of images", D, (4, 3, 5, 6), 5),
    case("einsum", E, (6, 4, 7), "abc,cd->abd", (4, 5), "d"),
    case("einsum of rows", E, ROWS, "ab,bc->ac", 5, "c"),
    case("einsum, several produced", E, (6, 4, 7), "abc,cde->abde", (4, 2, 3), "de", axes=(-2, -1)),
    case("einsum, several produced, bias in other order", E, (6, 4, 7), "abc,cde->abde", (4, 2, 3), "ed", axes=(-2, -1)),
    case("einsum, several contracted", E, (6, 4, 2, 3), "abcd,cde->abe", (4, 5), "e"),
    case("einsum, contracted in other order", E, (6, 4, 2, 3), "abcd,dce->abe", (4, 5), "e"),
    case("einsum, first axis of the kernel produced", E, (6, 4, 7), "abc,dc->abd", (4, 5), "d", axes=(0,)),
    case("einsum, several of both", E, (5, 2, 4, 3), "abcd,debf->acfe", (4, 2, 3), "fe", axes=(1, 3)),
    case("einsum, produced before others", E, (6, 4, 7), "abc,cd->adb", (5, 4), "d"),
    case("einsum, others turned", E, (6, 4, 2, 7), "abcd,de->acbe", (2, 4, 5), "e"),
    case("einsum, produced between", E, (6, 4, 2, 7), "abcd,dfe->aecfb", (3, 2, 5, 4), "ef", axes=(-2, -1)),
    case("einsum, ellipsis left", E, (6, 4, 4, 7), "...x,xy->...y", 5, "y"),
    case("einsum, ellipsis right", E, (6, 7, 4, 2), "ab...,bc->ac...", 5, "c"),
    case("einsum, ellipsis right, several produced", E, (6, 7, 4), "ab...,bcd->adc...", (2, 3), "cd", axes=(-2, -1)),
    case("conv of signals", C1, SIGNALS, 5, 4),
    case("conv of signals, same", C1, SIGNALS, 5, 4, padding="same", strides=2),
    case("causal conv", C1, SIGNALS, 5, 4, padding="causal"),
    case("causal conv, dilated", C1, SIGNALS, 5, 3, padding="causal", dilation_rate=2),
    case("causal conv, strides", C1, SIGNALS, 5, 3, padding="causal", strides=2),
    case("causal conv, groups", C1, (6, 12, 4), 6, 3, padding="causal", groups=2),
    case("dilated conv of signals, same", C1, SIGNALS, 5, 3, padding="same", dilation_rate=3),
    case("conv of signals, channels first", C1, first(SIGNALS), 5, 4, data_format=FIRST, padding="same"),
    case("causal conv, channels first", C1, first(SIGNALS), 5, 3, data_format=FIRST, padding="causal", dilation_rate=2),
    case("conv", C2, IMAGES, 5, 3),
    case("conv, 1x1", C2, IMAGES, 5, 1, strides=2),
    case("conv, same", C2, IMAGES, 5, 3, padding="same"),
    case("conv, same, strides", C2, IMAGES, 5, (2, 3), padding="same", strides=(2, 3)),
    case("conv, same, stride beyond the kernel", C2, IMAGES, 5, (1, 2), padding="same", strides=3),
    case("conv, valid, strides", C2, IMAGES, 5, (3, 2), strides=(3, 2)),
    case("conv, same, dilated", C2, IMAGES, 5, 3, padding="same", dilation_rate=(2, 3)),
    case("conv, valid, dilated", C2, IMAGES, 5, 2, dilation_rate=(3, 2)),
    case("conv, kernel beyond the input", C2, (4, 3, 4, 3), 5, 5, padding="same"),
    case("conv, groups", C2, (5, 9, 8, 4), 6, 3, groups=2, padding="same"),
    case("conv, one group per channel", C2, (5, 9, 8, 4), 8, 3, groups=4, strides=2),
    case("conv, one output", C2, IMAGES, 1, 3),
    case("conv, channels first", C2, first(IMAGES), 5, 3, data_format=FIRST),
    case("conv, channels first, same, strides", C2, first(IMAGES), 5, (2, 3), data_format=FIRST, padding="same", strides=2),
    case("conv, channels first, groups", C2, (5, 4, 9, 7), 6, 3, data_format=FIRST, groups=2),
    case("conv of volumes", C3, VOLUMES, 3, (2, 3, 2)),
    case("conv of volumes, same, strides", C3, VOLUMES, 3, (2, 3, 2), padding="same", strides=(2, 1, 3)),
    case("conv of volumes, dilated", C3, VOLUMES, 3, 2, padding="same", dilation_rate=(2, 1, 1)),
    case("conv of volumes, groups", C3, VOLUMES, 4, 2, groups=2),
    case("conv of volumes, channels first", C3, first(VOLUMES), 3, 2, data_format=FIRST, padding="same"),
    case("depthwise of signals", D1, SIGNALS, 4),
    case("depthwise of signals, multiplier", D1, SIGNALS, 4, depth_multiplier=3, padding="same", strides=2),
    case("depthwise of signals, dilated", D1, SIGNALS, 3, dilation_rate=2, padding="same"),
    case("depthwise of signals, channels first", D1, first(SIGNALS), 3, depth_multiplier=2, data_format=FIRST),
    case("depthwise", D2, IMAGES, 3, padding="same"),
    case("depthwise, multiplier", D2, IMAGES, (2, 3), depth_multiplier=3),
    case("depthwise, strides", D2, IMAGES, 3, padding="same", strides=2),
    case("depthwise, dilated", D2, IMAGES, 3, padding="same", dilation_rate=2),
    case("depthwise, channels first", D2, first(IMAGES), 3, padding="same", data_format=FIRST, strides=2),
    case("depthwise, channels first, multiplier", D2, first(IMAGES), 2, depth_multiplier=3, data_format=FIRST, dilation_rate=2),
    case("transposed of signals", T1, SIGNALS, 5, 4),
    case("transposed of signals, same", T1, SIGNALS, 5, 4, padding="same", strides=2),
    case("transposed of signals, dilated", T1, SIGNALS, 5, 3, padding="same", dilation_rate=2),
    case("transposed of signals, channels first", T1, first(SIGNALS), 5, 3, padding="same", strides=2, data_format=FIRST),
    *(
        case(
            f"transposed, {padding}, kernel {taps}, stride {stride}", T2, (4, 4, 3, 3), 5, taps, padding=padding, strides=stride
        )
        for padding in ("valid", "same")
        for taps, stride in (((3, 2), 1), ((3, 2), 2), ((4, 1), 3), ((5, 3), (2, 3)), (1, 1), (2, 3))
    ),
    case("transposed, valid, output padding", T2, (4, 4, 3, 3), 5, (3, 2), strides=(2, 3), output_padding=(0, 1)),
    case("transposed, same, output padding", T2, (4, 4, 3, 3), 5, 3, strides=3, padding="same", output_padding=(1, 2)),
    case("transposed, same, even kernel, output padding", T2, (4, 4, 3, 3), 5, 4, strides=2, padding="same", output_padding=1),
    case("transposed, dilated", T2, (4, 4, 3, 3), 5, (3, 2), dilation_rate=(2, 2)),
    case("transposed, same, dilated", T2, (4, 4, 5, 3), 5, (3, 2), dilation_rate=(2, 2), padding="same"),
    case("transposed, channels first", T2, (4, 3, 4, 3), 5, 3, data_format=FIRST, strides=2, padding="same"),
    case("transposed, channels first, valid", T2, (4, 3, 4, 4), 5, (2, 3), data_format=FIRST, strides=(2, 1)),
    case("transposed of volumes", T3, (3, 2, 3, 2, 2), 3, (2, 3, 1), strides=(2, 1, 2)),
    case("transposed of volumes, same", T3, (3, 2, 3, 2, 2), 3, (2, 3, 3), strides=2, padding="same"),
    case("transposed of volumes, channels first", T3, (3, 2, 2, 3, 2), 3, 2, strides=2, data_format=FIRST),
    case("separable of signals", S1, SIGNALS, 5, 3, padding="same"),
    case("separable of signals, multiplier", S1, SIGNALS, 5, 4, depth_multiplier=2, strides=2),
    case("separable of signals, channels first", S1, first(SIGNALS), 5, 3, data_format=FIRST, dilation_rate=2),
    case("separable", S2, IMAGES, 5, 3, padding="same", strides=2),
    case("separable, multiplier", S2, IMAGES, 5, (2, 3), depth_multiplier=3),
    case("separable, dilated", S2, IMAGES, 5, 3, padding="same", dilation_rate=2),
    case("separable, channels first", S2, first(IMAGES), 5, 3, data_format=FIRST, padding="same", depth_multiplier=2),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "_") for case in CASES])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


ACTIVATIONS = [None, "relu", "softmax", lambda: layers.LeakyReLU(negative_slope=0.25), "gelu", "relu6"]


def activation_of(case: Case, bias: bool) -> Any:
    """One after the other, so that every kind of layer has some."""
    if case.options.get("filters", case.options.get("units")) == 1:
        return "relu"  # of one channel, Keras warns of a softmax
    found = ACTIVATIONS[(2 * CASES.index(case) + bias) % len(ACTIVATIONS)]
    return found() if callable(found) else found


@with_and_without_bias
@every_case
def test_parts_compute_what_the_model_computes(case: Case, bias: bool) -> None:
    activation = activation_of(case, bias)
    model = case.model(bias=bias, activation=activation)
    network, feeds = KerasNetwork.load(model, "model"), {"x": case.samples()}
    tensors = network.part(feeds, [name for step in network.operations for name in step.outputs])(feeds)
    assert_close([tensors[name] for name in network.outputs], [run(model, feeds["x"])])
    before = network.layers[-1].output
    after = next((each for each in network.operations if each.name == "layer/split"), None)
    linear = tensors[before if after is None else after.outputs[0]]
    assert_close(linear, run(case.linear(model), feeds["x"]))
    is_fused = activation is not None
    assert ("layer/activation" in network.order) == is_fused
    assert network.outputs == ["layer"]
    for name, array in tensors.items():
        known = network.facts().shapes.get(name, array.shape)
        assert len(known) == array.ndim
        assert all(size in (None, found) for size, found in zip(known, array.shape)), name
    for layer in network.layers:
        assert tensors[layer.output].shape[layer.output_axis] == layer.channels
        assert ({**feeds, **tensors})[layer.input].shape[layer.channel_axis] == layer.input_channels


@every_case
def test_mean_output_follows_from_the_mean_input(case: Case) -> None:
    """Of each tap: what the Window of a layer says is what TensorFlow does."""
    network, feeds = KerasNetwork.load(case.model(), "model"), {"x": case.samples()}
    for layer in network.layers:
        mean = empty_mean(layer)
        tensors = network.part(feeds, [layer.input, layer.output])(feeds)
        mean.update(tensors[layer.input])
        expected = tensors[layer.output].astype(np.float64)
        expected = np.moveaxis(expected, layer.output_axis, 0).reshape(layer.channels, -1).mean(axis=1)
        found = through(layer, mean.mean(None))
        np.testing.assert_allclose(found, expected - np.ravel(0 if layer.bias is None else layer.bias), rtol=1e-5, atol=1e-5)


def through(layer: Any, mean: Array) -> Array:
    """Weights times a mean input, (C,) or (*K, C)."""
    weights, layout = np.asarray(layer.weights, np.float64), layer.layout
    space = "".join(letter for letter in layout if letter in "DHW")
    if "C" in layout:
        return np.einsum(f"{layout},{space}C->CM", weights, mean).ravel()
    parts = np.split(weights, layer.groups, axis=layout.index("O"))
    means = np.split(mean, layer.groups, axis=-1)
    return np.concatenate([np.einsum(f"{layout},{space}I->O", *each) for each in zip(parts, means)])


def aligned_bias(model: keras.Model, rank: int) -> Array:
    """The bias of the layer, as it broadcasts to its output; 0 where there is none."""
    layer = own_layer(model)
    if layer.bias is None:
        return np.zeros((1,) * rank)
    bias = layer.bias.numpy().astype(np.float64)
    if getattr(layer, "data_format", None) == FIRST:
        bias = bias.reshape(-1, *[1] * (rank - 2))
    return bias.reshape((1,) * (rank - bias.ndim) + bias.shape)


def corrected(model: keras.Model, x: Array, method: str, per_channel: bool, **options: Any) -> Any:
    """Small layers, which read what these tests are about: their outputs may get worse."""
    params = QuantParams("tf", weight_bits=BITS, per_channel=per_channel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"{method} made the outputs worse", UserWarning)
        return correct(model, [x], method=method, quant_params=params, **options)


@pytest.mark.parametrize("method", ["mean", "empirical"])
@every_case
def test_bias_moves_by_the_brute_force_shift(case: Case, method: str) -> None:
    index = CASES.index(case)
    bias, per_channel = bool(index % 2) == (method == "mean"), bool(index % 4 > 1)
    model, x = case.model(bias=bias, activation=activation_of(case, bias)), case.samples()
    difference = run(case.linear(model), x).astype(np.float64) - run(case.quantized(model, per_channel), x)
    correction = corrected(model, x, method, per_channel)
    before, after = (aligned_bias(each, difference.ndim) for each in (model, correction.model))
    axes = tuple(k for k, size in enumerate(after.shape) if size == 1)
    expected = difference.mean(axis=axes, keepdims=True)
    assert np.abs(expected).max() > 1e-3
    size = np.abs(expected).max()
    # what a depthwise product is corrected by goes through float weights into the bias, but through quantized ones in a sweep
    second_order = 0.1 if len(correction.report) > 1 and method == "empirical" else 1e-5
    np.testing.assert_allclose(after - before, expected, rtol=0, atol=second_order * size)
    mean = run(case.quantized(model, per_channel, own_layer(correction.model).bias), x) if bias else None
    if mean is not None and second_order < 0.1:
        moved = run(case.linear(model), x).mean(axis=axes) - mean.mean(axis=axes)
        np.testing.assert_allclose(moved, 0, atol=1e-5 * max(np.abs(difference).max(), 5))
    assert [each.method for each in correction.report] == [method] * len(correction.report)
    assert_close([run(correction.model, x)], outputs_of(correction.network, feeds_of(correction.network, x)))


def built(layer: Any, *shape: int | None) -> keras.Model:
    x = keras.Input(shape, name="x")
    return fill(keras.Model(x, layer(x)))


LEFT = {
    "no matrix": (E("abc,bcd->abd", (4, 5), bias_axes="d", name="layer"), (4, 7), "abc,bcd->abd is no product with one matrix"),
    "element by element": (E("ab,b->ab", 7, name="layer"), (7,), "ab,b->ab is no product with one matrix"),
    "summed over the input": (E("abc,cd->ad", 5, name="layer"), (4, 7), "abc,cd->ad is no product with one matrix"),
    "bias per position": (
        E("abc,cd->abd", (4, 5), bias_axes="bd", name="layer"),
        (4, 7),
        "its bias is along axes bd, expected one for each channel along d",
    ),
    "bias of some produced axes": (
        E("abc,cde->abde", (4, 2, 3), bias_axes="e", name="layer"),
        (4, 7),
        "its bias is along axes e, expected one for each channel along de",
    ),
    "bias that Keras adds along columns": (
        C2(5, 3, data_format=FIRST, name="layer"),
        (3, 9, 7),
        "its bias is along axes 3, expected one for each channel along 1",
    ),
    "bias that Keras would add along columns": (
        D2(3, data_format=FIRST, use_bias=False, padding="same", name="layer"),
        (6, 9, 6),
        "its bias is along axes 3, expected one for each channel along 1",
    ),
    "bias of an einsum that Keras adds along columns": (
        E("ab...,bc->ac...", 4, bias_axes="c", name="layer"),
        (7, 3, 4),
        "its bias is along axes 3, expected one for each channel along 1",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_are_left(name: str) -> None:
    layer, shape, reason = LEFT[name]
    model = built(type(layer).from_config(layer.get_config()), *shape)
    network = KerasNetwork.load(model, "model")
    assert [(each.name, each.op, each.reason) for each in network.unsupported] == [("layer", type(layer).__name__, reason)]
    assert not network.layers
    x = samples(5, *shape)
    if name != "bias that Keras adds along columns":  # which TensorFlow does only where it runs operations one by one
        assert_close(outputs_of(network, {"x": x}), [run(model, x)])


@keras.saving.register_keras_serializable("tests")
def squared(x: Any) -> Any:
    return x * x


@pytest.mark.parametrize("activation", ["relu", "softmax", "layer", "function"])
@pytest.mark.parametrize("kind", [D, E, C2, D2, S2, T2], ids=lambda kind: kind.__name__)
def test_fused_activations(kind: type, activation: str) -> None:
    case = next(each for each in CASES if each.kind is kind and len(each.shape) < 5 and "time" not in each.name)
    chosen = {"layer": layers.LeakyReLU(negative_slope=0.25), "function": squared}.get(activation, activation)
    model, x = case.model(activation=chosen), case.samples()
    network = KerasNetwork.load(model, "model")
    before = "layer/linear"
    tensors = network.part({"x": x}, [before, "layer"])({"x": x})
    assert_close(tensors[before], run(case.linear(model), x))
    assert_close(tensors["layer"], run(model, x))
    assert network.operations[-1].name == "layer/activation"
    assert network.operations[-1].inputs == (before,)
    assert_close(outputs_of(network, {"x": x}), [tensors["layer"]])
