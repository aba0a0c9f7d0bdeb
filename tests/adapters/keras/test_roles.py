"""Roles of layers and operations of Keras: what is folded and scaled through them leaves the function as it was."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from biascorr import equalize, fold_all_batch_norms
from biascorr.adapters.keras.network import KerasNetwork
from biascorr.equalization.result import Equalization
from keras_networks import Array, assert_close, fill, of_keras, run
from networks import samples

pytestmark = [of_keras, pytest.mark.filterwarnings("ignore:the float outputs moved:UserWarning")]

LAST, FIRST = "channels_last", "channels_first"
every_format = pytest.mark.parametrize("form", [LAST, FIRST])


def image(form: str, channels: int = 3, height: int = 7, width: int = 11) -> tuple[int, ...]:
    """Of more columns than channels: as many, and Keras adds biases of channels along them."""
    return (height, width, channels) if form == LAST else (channels, height, width)


def conv(form: str, filters: int, taps: int = 3, **options: Any) -> Any:
    return layers.Conv2D(filters, taps, data_format=form, **options)


def axis_of(form: str) -> int:
    return -1 if form == LAST else 1


def one(layer: Callable[[], Any]) -> Callable[[str], Any]:
    """For either format."""
    return lambda _: layer()


def function(apply: Callable[[Any], Any]) -> Callable[[str], Any]:
    """For either format."""
    return lambda _: apply


def maximum_of_columns(form: str) -> Callable[[Any], Any]:
    other = {LAST: FIRST, FIRST: LAST}[form]
    return lambda y: ops.maximum(y, along(other, np.linspace(-1, 0, y.shape[axis_of(other)])))


def uneven(model: keras.Model, seed: int = 0) -> keras.Model:
    """Channels of other ranges."""
    rng = np.random.default_rng(seed)
    fill(model, seed)
    for variable in model.weights:
        if len(variable.shape) > 1 and "alpha" not in variable.path:
            variable.assign(variable.numpy() * 2.0 ** rng.integers(-3, 3, variable.shape[-1]))
    return model


def same_function(model: keras.Model, *, data: bool = False, tolerance: float = 1e-5) -> Equalization:
    """Equalizes; that nothing but rounding changed, in the network and in the model that is made of it."""
    x = samples(6, *model.inputs[0].shape[1:]) - 0.5
    expected = keras.tree.flatten(run(model, x))
    result = equalize(model, x if data else None)
    name = result.network.inputs[0].name
    computed = result.network.part({name: x}, result.network.outputs)({name: x})
    assert_close([computed[each] for each in result.network.outputs], expected, tolerance)
    assert_close(keras.tree.flatten(run(result.model, x)), expected, tolerance)
    return result


PASSED: dict[str, tuple[Callable[[str], Any], int]] = {
    "nothing": (function(lambda y: y), 1),
    "ReLU": (one(lambda: layers.ReLU()), 1),
    "ReLU6": (one(lambda: layers.ReLU(max_value=6.0)), 1),
    "ReLU of 0.5": (one(lambda: layers.ReLU(max_value=0.5)), 1),
    "leaky ReLU": (one(lambda: layers.ReLU(negative_slope=0.25)), 1),
    "ReLU with a threshold": (one(lambda: layers.ReLU(threshold=0.5)), 0),
    "limited leaky ReLU": (one(lambda: layers.ReLU(max_value=2.0, negative_slope=0.25)), 0),
    "Activation relu": (one(lambda: layers.Activation("relu")), 1),
    "Activation relu6": (one(lambda: layers.Activation("relu6")), 1),
    "Activation linear": (one(lambda: layers.Activation("linear")), 1),
    "Activation leaky_relu": (one(lambda: layers.Activation("leaky_relu")), 1),
    "Activation gelu": (one(lambda: layers.Activation("gelu")), 0),
    "Activation softmax": (one(lambda: layers.Activation("softmax")), 0),
    "LeakyReLU": (one(lambda: layers.LeakyReLU(0.125)), 1),
    "PReLU": (lambda form: layers.PReLU(shared_axes=[1, 2] if form == LAST else [2, 3]), 1),
    "PReLU of each value": (one(lambda: layers.PReLU()), 1),
    "ELU": (one(lambda: layers.ELU()), 0),
    "Dropout": (one(lambda: layers.Dropout(0.5)), 1),
    "SpatialDropout2D": (lambda form: layers.SpatialDropout2D(0.5, data_format=form), 1),
    "GaussianNoise": (one(lambda: layers.GaussianNoise(0.5)), 1),
    "GaussianDropout": (one(lambda: layers.GaussianDropout(0.5)), 1),
    "Identity": (one(lambda: layers.Identity()), 1),
    "ZeroPadding2D": (lambda form: layers.ZeroPadding2D(((0, 1), (2, 1)), data_format=form), 1),
    "MaxPooling2D": (lambda form: layers.MaxPooling2D(data_format=form), 0),
    "ops.relu": (function(ops.relu), 1),
    "ops.relu6": (function(ops.relu6), 1),
    "ops.leaky_relu": (function(lambda y: ops.leaky_relu(y, 0.125)), 1),
    "ops.clip": (function(lambda y: ops.clip(y, -1.0, 3.0)), 1),
    "ops.minimum": (function(lambda y: ops.minimum(y, 1.5)), 1),
    "ops.maximum": (function(lambda y: ops.maximum(-0.5, y)), 1),
    "ops.minimum of channels": (lambda form: lambda y: ops.minimum(y, along(form, np.linspace(0.5, 4, 4))), 1),
    "ops.maximum of columns": (maximum_of_columns, 0),
    "ops.sigmoid": (function(ops.sigmoid), 0),
    "ops.add of a number": (function(lambda y: y + 1.0), 0),
    "ops.softmax": (function(ops.softmax), 0),
    "ReLU and padding": (lambda form: lambda y: layers.ZeroPadding2D(1, data_format=form)(layers.ReLU()(y)), 1),
}  # fmt: skip


def channels_of(y: Any, form: str) -> int:
    return int(y.shape[axis_of(form)])


def along(form: str, values: Array) -> Array:
    return values.reshape((-1,) if form == LAST else (-1, 1, 1)).astype(np.float32)


@every_format
@pytest.mark.parametrize("name", PASSED)
def test_channels_are_scaled_through(name: str, form: str) -> None:
    make, count = PASSED[name]
    x = keras.Input(image(form))
    y = make(form)(conv(form, 4, name="a")(x))
    model = uneven(keras.Model(x, conv(form, 5, 2, name="b")(y)))
    result = same_function(model)
    has_little_to_gain = any("need a bound" in reason for reason in result.left.values())
    assert len(result.chains) == (0 if has_little_to_gain else count), result.left


ENDS: dict[str, Callable[[str], Any]] = {
    "Flatten": lambda form: layers.Flatten(data_format=form),
    "Flatten as if channels were last": one(lambda: layers.Flatten()),
    "Reshape": one(lambda: layers.Reshape((-1,))),
    "ops.reshape": function(lambda y: ops.reshape(y, (-1, 180))),
    "GlobalAveragePooling2D": lambda form: layers.GlobalAveragePooling2D(data_format=form),
    "keepdims": lambda form: lambda y: layers.Flatten()(layers.GlobalAveragePooling2D(data_format=form, keepdims=True)(y)),
    "keepdims and Reshape": lambda form: (
        lambda y: layers.Reshape((4,))(layers.GlobalAveragePooling2D(data_format=form, keepdims=True)(y))
    ),
    "ops.mean": lambda form: lambda y: ops.mean(y, (1, 2) if form == LAST else (2, 3)),
    "ReLU and Flatten": lambda form: lambda y: layers.Flatten(data_format=form)(layers.ReLU()(y)),
    "Dropout and Flatten": lambda form: lambda y: layers.Dropout(0.1)(layers.Flatten(data_format=form)(y)),
}


@every_format
@pytest.mark.parametrize("name", ENDS)
def test_channels_are_scaled_up_to_a_row(name: str, form: str) -> None:
    x = keras.Input(image(form, 3, 7, 11))
    y = ENDS[name](form)(conv(form, 4, name="a")(x))
    model = uneven(keras.Model(x, layers.Dense(5, name="b")(y)))
    result = same_function(model)
    by_mean_of_first_axes = name == "ops.mean" and form == FIRST  # whose axes are not known to be those of space
    assert len(result.chains) == (0 if by_mean_of_first_axes else 1), result.left


@every_format
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str)
@pytest.mark.parametrize("place", ["after", "before", "between"])
def test_batch_norms_are_folded(place: str, options: dict[str, Any], form: str) -> None:
    x = keras.Input(image(form))
    norm = layers.BatchNormalization(axis=axis_of(form), name="norm", **options)
    y = norm(x) if place == "before" else x
    y = conv(form, 4, name="a", use_bias=False)(y)
    y = norm(y) if place == "after" else layers.ReLU()(norm(layers.ReLU()(y))) if place == "between" else y
    model = uneven(keras.Model(x, conv(form, 5, 2, name="b")(y)))
    folded, pairs = fold_all_batch_norms(model)[:2]
    array = samples(6, *image(form))
    assert_close(run(folded, array), run(model, array))
    assert len(pairs) == (place != "between")
    assert any(isinstance(layer, layers.BatchNormalization) for layer in folded.layers) == (place == "between")
    result = same_function(model)
    assert [fold.batch_norm for fold in result.folds] == ["norm"] * (place != "between")


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_batch_norm_along_another_axis_is_not_folded(axis: int) -> None:
    x = keras.Input((5, 4, 3))
    y = layers.BatchNormalization(axis=axis)(layers.Conv2D(4, 1)(x))
    model = uneven(keras.Model(x, y))
    assert len(same_function(model).folds) == (axis == 3)


def test_batch_norm_after_other_layers_is_folded() -> None:
    """Dense of rows, of sequences; transposed, grouped and depthwise convolutions, and of signals."""
    for form in (LAST, FIRST):
        axis = axis_of(form)
        x = keras.Input(image(form, 4, 5, 11))
        y = x
        for layer in (
            layers.DepthwiseConv2D(2, depth_multiplier=2, data_format=form),
            layers.Conv2DTranspose(6, 3, strides=2, padding="same", data_format=form),
            layers.Conv2D(4, 2, groups=2, data_format=form),
            layers.SeparableConv2D(5, 2, data_format=form),
        ):
            y = layers.ReLU()(layers.BatchNormalization(axis=axis)(layer(y)))
        y = layers.BatchNormalization()(layers.Dense(6)(layers.Flatten(data_format=form)(y)))
        result = same_function(uneven(keras.Model(x, y)))
        assert len(result.folds) == 5, result.left


def test_high_biases_are_folded() -> None:
    for form in (LAST, FIRST):
        x = keras.Input(image(form))
        y = layers.BatchNormalization(axis=axis_of(form), name="norm")(conv(form, 4, name="a")(x))
        model = uneven(keras.Model(x, conv(form, 5, 2, name="b")(layers.ReLU()(y))))
        model.get_layer("norm").beta.assign([9.0, 0.5, 12.0, 7.0])
        result = same_function(model, data=True)
        assert len(result.high_biases) == 1, result.left


class Growth:
    """A random network, of what equalization passes and of what ends it."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.form = LAST if seed % 2 else FIRST

    def one_of(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def model(self) -> keras.Model:
        x = keras.Input(image(self.form, int(self.rng.integers(2, 5)), 11, 13))
        y = x
        for _ in range(self.rng.integers(2, 5)):
            y = self.block(y)
        y = self.one_of(layers.Flatten(data_format=self.form), layers.GlobalAveragePooling2D(data_format=self.form))(y)
        for _ in range(self.rng.integers(1, 3)):
            y = self.one_of(layers.ReLU(), layers.Dropout(0.3), layers.LeakyReLU())(
                layers.Dense(int(self.rng.integers(2, 6)))(y)
            )
        return uneven(keras.Model(x, y), int(self.rng.integers(1000)))

    def block(self, y: Any) -> Any:
        form, before = self.form, y
        own: dict[str, Any] = {"data_format": form, "padding": self.one_of("same", "valid")}
        own["use_bias"] = self.one_of(True, False)
        filters, taps = int(self.rng.integers(2, 6)), int(self.rng.integers(1, 4))
        own["activation"] = self.one_of(None, None, None, "relu", "relu6", "leaky_relu", "tanh")
        y = self.one_of(
            layers.Conv2D(filters, taps, strides=self.one_of(1, 1, 2), **own),
            layers.Conv2D(filters, taps, **own),
            layers.DepthwiseConv2D(taps, depth_multiplier=self.one_of(1, 1, 2), **own),
            layers.DepthwiseConv2D(taps, **own),
            layers.SeparableConv2D(filters, taps, **own),
            layers.Conv2DTranspose(filters, taps, strides=self.one_of(1, 2), **own),
        )(y)
        if self.one_of(True, True, False):
            y = layers.BatchNormalization(axis=axis_of(form), scale=self.one_of(True, False), center=self.one_of(True, False))(
                y
            )
        y = self.activated(y)
        if y.shape == before.shape:
            y = layers.Add()([y, before])
        space = [y.shape[2 - (form == LAST)], y.shape[3 - (form == LAST)]]
        return (
            layers.ZeroPadding2D(4, data_format=form)(y)
            if (min(space) < 16 and channels_of(y, form) > 4) or min(space) < 9
            else y
        )

    def activated(self, y: Any) -> Any:
        channels = channels_of(y, self.form)
        bounds = along(self.form, self.rng.uniform(0.5, 3, channels))
        apply = self.one_of(
            layers.ReLU(), layers.ReLU(), layers.ReLU(max_value=6.0), layers.ReLU(max_value=1.0), layers.LeakyReLU(),
            layers.PReLU(shared_axes=[1, 2] if self.form == LAST else [2, 3]), layers.Activation("relu6"), ops.relu,
            lambda y: ops.minimum(y, bounds), lambda y: ops.maximum(y, -bounds), lambda y: ops.clip(y, -0.5, 1.5),
            layers.Dropout(0.5), lambda y: y, layers.ZeroPadding2D(1, data_format=self.form), layers.ELU(),
        )  # fmt: skip
        return apply(y)


@pytest.mark.parametrize("seed", range(16))
def test_random_networks(seed: int) -> None:
    keras.utils.clear_session()
    model = Growth(seed).model()
    result = same_function(model, tolerance=1e-4)
    names = {layer.name for layer in KerasNetwork.load(model, "model").layers}
    scaled = {link.first.name for chain in result.chains for link in chain.chain.links}
    assert names == scaled | (result.left.keys() & names)
    norms = {layer.name for layer in model.layers if isinstance(layer, layers.BatchNormalization)}
    assert norms == {fold.batch_norm for fold in result.folds} | (result.left.keys() & norms)
