"""Networks of many layers: each tensor, computed from the inputs or from any others, is what the model computes."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from biascorr import QuantParams, correct
from biascorr.adapters.keras.network import KerasNetwork
from biascorr.adapters.keras.running import packed
from biascorr.adapters.keras.steps import graph_of, input_name
from keras_networks import Array, assert_close, feeds_of, fill, of_keras, outputs_of, run
from networks import samples

pytestmark = [of_keras, pytest.mark.filterwarnings("ignore:Layer '.*' .*was passed an input with a mask attached:UserWarning")]

Made = tuple[keras.Model, list[Array]]
"""A model, and a batch of each of its inputs."""


def shared() -> Made:
    x = keras.Input((6, 5, 3))
    conv = layers.Conv2D(3, 3, padding="same", activation="relu", name="c")
    y = conv(layers.ReLU()(conv(x)))
    return keras.Model(x, layers.Dense(2, name="d")(y)), [samples(4, 6, 5, 3)]


def nested_in_sequential() -> Made:
    x = keras.Input((6, 5, 3))
    block = keras.Model(x, layers.Add()([x, layers.Conv2D(3, 3, padding="same", name="c")(x)]), name="block")
    inner = keras.Sequential([keras.Input((6, 5, 3)), block, layers.ReLU()], name="inner")
    outside = keras.Sequential([keras.Input((6, 5, 3)), inner, layers.Flatten(), layers.Dense(4, name="d")])
    return outside, [samples(4, 6, 5, 3)]


def nested_twice() -> Made:
    x = keras.Input((7,))
    block = keras.Sequential([keras.Input((7,)), layers.Dense(7, activation="relu", name="d")], name="block")
    return keras.Model(x, block(ops.add(block(x), x))), [samples(6, 7)]


def nested_dict() -> Made:
    given = {"b": keras.Input((7,), name="b"), "a": keras.Input((5,), name="a")}
    both = {"sum": layers.Dense(4, name="p")(given["a"]) + layers.Dense(4, name="q")(given["b"]), "same": given["a"]}
    block = keras.Model(given, both, name="block")
    x, y = keras.Input((5,), name="x"), keras.Input((7,), name="y")
    made = block({"a": x, "b": y})
    return keras.Model([x, y], [made["sum"], layers.Dense(3, name="r")(made["same"])]), [samples(6, 5), samples(6, 7)]


def nested_list() -> Made:
    p, q = keras.Input((5,)), keras.Input((5,))
    block = keras.Model([p, q], [layers.Dense(4, name="p")(p) - layers.Dense(4, name="q")(q), p], name="block")
    x, y = keras.Input((5,)), keras.Input((5,))
    made, same = block([y, x])
    again, _ = block((x, same))
    return keras.Model((x, y), [made, again]), [samples(6, 5), samples(6, 5, seed=5)]


def mixed(policy: str) -> Callable[[], Made]:
    def make() -> Made:
        x = keras.Input((6, 5, 3))
        y = layers.Conv2D(4, 3, dtype=policy, name="c", activation="relu")(x)
        y = layers.BatchNormalization(dtype=policy)(y)
        y = layers.DepthwiseConv2D(2, dtype=policy, use_bias=False, name="w")(y)
        return keras.Model(x, layers.Dense(3, dtype="float32", name="d")(layers.Flatten()(y))), [samples(4, 6, 5, 3)]

    return make


def dictionaries() -> Made:
    x, y = keras.Input((5,), name="x"), keras.Input((7,), name="y")
    p, q = layers.Dense(4, name="p")(x), layers.Dense(4, name="q")(y)
    return keras.Model({"y": y, "x": x}, {"sum": p + q, "all": {"p": p, "q": q}}), [samples(6, 5), samples(6, 7)]


def operations() -> Made:
    x = keras.Input((8, 6))
    y = layers.Conv1D(6, 3, padding="same", name="c")(x) + 0.5
    y = ops.relu6(y * 2.0)[:, 1:]
    y = ops.minimum(y, np.linspace(1, 4, 6, dtype="float32"))
    y = ops.concatenate([y, ops.clip(y, -1, 3)], axis=-1)
    y = ops.reshape(y, (-1, 7, 3, 4))
    y = layers.Dense(5, name="d")(ops.mean(y, axis=2))
    return keras.Model(x, ops.maximum(y, 0.25) / (1.0 + ops.exp(-y))), [samples(5, 8, 6)]


def embedded() -> tuple[Any, list[Array]]:
    x = keras.Input((7,), dtype="int32", name="words")
    words = np.random.default_rng(0).integers(0, 4, (5, 7)).astype("int32")
    words[:, 0] = 3
    return layers.Embedding(5, 6, mask_zero=True, name="words_to_vectors")(x), [x, words]


def masked_lstm() -> Made:
    y, (x, words) = embedded()
    y = layers.Dense(6, activation="relu", name="d")(y)
    y, state, _ = layers.LSTM(4, return_sequences=True, return_state=True, name="lstm")(y)
    return keras.Model(x, [layers.GlobalAveragePooling1D()(y), layers.Dense(3, name="e")(state)]), [words]


def masked_pooling() -> Made:
    y, (x, words) = embedded()
    y = layers.Dropout(0.5)(layers.Dense(6, name="d")(y))
    return keras.Model(x, layers.Dense(3, name="e")(layers.GlobalAveragePooling1D()(y))), [words]


def masked_attention() -> Made:
    y, (x, words) = embedded()
    z = layers.MultiHeadAttention(2, 3, name="attention")(y, y)
    return keras.Model(x, layers.Dense(3, name="e")(layers.Flatten()(layers.Add()([y, z])))), [words]


def masked_convolution() -> Made:
    y, (x, words) = embedded()
    y = layers.Masking()(layers.LayerNormalization()(y))
    y = layers.GRU(4, return_sequences=True)(layers.Activation("relu")(y))
    return keras.Model(x, layers.Conv1D(3, 3, name="c")(y)), [words]


def masked_nested() -> Made:
    y, (x, words) = embedded()
    z = keras.Input((7, 6))
    inner = keras.Model(z, layers.GlobalAveragePooling1D()(layers.Dense(5, name="d")(z)), name="inner")
    return keras.Model(x, inner(y)), [words]


def masked_by_nested() -> Made:
    y, (x, words) = embedded()
    inner = keras.Model(x, layers.ReLU()(layers.Dense(5, name="d")(y)), name="inner")
    again = keras.Input((7,), dtype="int32")
    return keras.Model(again, layers.Dense(3, name="e")(layers.LSTM(4, name="lstm")(inner(again)))), [words]


def masked_padding() -> Made:
    """A mask that is given, not passed along."""
    x, mask = keras.Input((7, 6), name="x"), keras.Input((7,), dtype="bool", name="mask")
    y = layers.GlobalAveragePooling1D()(layers.Dense(5, name="d")(x), mask=mask)
    return keras.Model([x, mask], y), [samples(5, 7, 6), np.random.default_rng(0).integers(0, 2, (5, 7)).astype(bool) | True]


def trained() -> Made:
    x = keras.Input((7,))
    y = layers.Dropout(0.5)(layers.Dense(6, name="d")(x), training=True)
    y = layers.BatchNormalization()(y, training=True)
    return keras.Model(x, layers.Dense(3, name="e")(y)), [samples(6, 7)]


def fixed_batch() -> Made:
    x = keras.Input(batch_shape=(4, 6, 5, 3))
    y = layers.Flatten()(layers.Conv2D(4, 3, activation="relu", name="c")(x))
    return keras.Model(x, layers.Dense(3, name="d")(y)), [samples(4, 6, 5, 3)]


def any_size() -> Made:
    x = keras.Input((None, None, 3))
    y = layers.Conv2DTranspose(4, 3, strides=2, padding="same", name="t")(layers.Conv2D(4, 3, padding="same", name="c")(x))
    return keras.Model(x, layers.Dense(3, name="d")(layers.GlobalAveragePooling2D()(y))), [samples(4, 6, 5, 3)]


def einsums() -> Made:
    x = keras.Input((4, 7))
    y = layers.EinsumDense("abc,cde->abde", (4, 2, 3), bias_axes="de", activation="relu", name="e")(x)
    return keras.Model(x, layers.EinsumDense("abde,def->abf", (4, 5), name="f")(y)), [samples(6, 4, 7)]


def separable() -> Made:
    x = keras.Input((6, 5, 3))
    y = layers.SeparableConv2D(4, 3, activation="relu", use_bias=False, name="s")(x)
    return keras.Model(x, layers.SeparableConv2D(4, 2, padding="same", name="t")(y)), [samples(4, 6, 5, 3)]


def same_twice() -> Made:
    x = keras.Input((7,), name="x")
    y = layers.Dense(5, name="d")(x)
    return keras.Model(x, [y, y, x]), [samples(6, 7)]


def names_in_common() -> Made:
    """Layers of nested models, and an outer one, whose names are those of other tensors."""
    x = keras.Input((7,), name="d")
    inner = keras.Sequential([keras.Input((7,)), layers.Dense(7, name="c"), layers.Dense(7, name="d")], name="n")
    return keras.Model(x, layers.Dense(7, name="c", activation="tanh")(inner(x))), [samples(6, 7)]


NETWORKS = {
    make.__name__: make
    for make in (
        shared, nested_in_sequential, nested_twice, nested_dict, nested_list, dictionaries, operations, masked_lstm,
        masked_pooling, masked_attention, masked_convolution, masked_nested, masked_by_nested, masked_padding, trained,
        fixed_batch, any_size,
        einsums, separable, same_twice, names_in_common,
    )
}  # fmt: skip
NETWORKS |= {policy: mixed(policy) for policy in ("mixed_float16", "mixed_bfloat16")}
LAYERS = {
    "shared": ["c", "c:2", "d"],
    "nested_in_sequential": ["inner/block/c", "d"],
    "nested_twice": ["block/d", "block:2/d"],
    "nested_dict": ["block/p", "block/q", "r"],
    "nested_list": ["block/p", "block/q", "block:2/p", "block:2/q"],
    "dictionaries": ["p", "q"],
    "operations": ["c", "d"],
    "masked_lstm": ["d", "e"],
    "masked_pooling": ["d", "e"],
    "masked_attention": ["e"],
    "masked_convolution": ["c"],
    "masked_nested": [],
    "masked_by_nested": ["inner/d", "e"],
    "masked_padding": ["d"],
    "trained": ["d", "e"],
    "fixed_batch": ["c", "d"],
    "any_size": ["c", "t", "d"],
    "einsums": ["e", "f"],
    "separable": ["s/depthwise", "s", "t/depthwise", "t"],
    "same_twice": ["d"],
    "mixed_float16": ["c", "w", "d"],
    "mixed_bfloat16": ["c", "w", "d"],
}
UNSUPPORTED = {
    "masked_lstm": {"lstm": "it is recurrent, which is not corrected"},
    "masked_attention": {"attention": "it has layers inside, which are not corrected"},
    "masked_nested": {"inner": "it has layers inside, which are not corrected"},
    "masked_by_nested": {"lstm": "it is recurrent, which is not corrected"},
    "masked_convolution": {"gru": "it is recurrent, which is not corrected"},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> tuple[keras.Model, KerasNetwork, dict[str, Array]]:
    keras.utils.clear_session()
    model, arrays = NETWORKS[name]()
    network = KerasNetwork.load(fill(model), "model")
    names = list("xy") if name == "dictionaries" else [input_name(each) for each in model.inputs]
    given = dict(zip(names, arrays))
    return model, network, {each.name: given[each.name] for each in network.inputs}


def expected_of(model: keras.Model, feeds: dict[str, Array]) -> list[Array]:
    return keras.tree.flatten(run(model, packed(model, list(feeds.values()))))


def tolerance_of(name: str) -> float:
    return {"mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}.get(name, 1e-5)


@every_network
def test_outputs_and_names(name: str) -> None:
    model, network, feeds = made(name)
    if name == "trained":
        feeds = {key: np.zeros_like(array) for key, array in feeds.items()}
    assert_close(outputs_of(network, feeds), expected_of(model, feeds), tolerance_of(name))
    assert [layer.name for layer in network.layers] == LAYERS.get(name, [layer.name for layer in network.layers])
    assert {each.name: each.reason for each in network.unsupported} == UNSUPPORTED.get(name, {})
    assert len(set(network.order)) == len(network.order)
    tensors = [tensor for each in network.operations for tensor in each.outputs]
    assert len({*tensors, *feeds}) == len(tensors) + len(feeds)
    assert {layer.name: layer.call_of for layer in network.layers if layer.call_of} == {
        each: each.replace(":2", "") for each in LAYERS.get(name, ()) if ":2" in each
    }


@every_network
def test_cut_anywhere(name: str) -> None:
    """Each tensor from those that its step reads, and the outputs from any tensors that the rest of the model needs."""
    _, network, feeds = made(name)
    known = dict(feeds)
    for each in network.operations:
        given = {tensor: known[tensor] for tensor in each.inputs}
        known |= network.part(given, each.outputs)(given)
    assert_close([known[tensor] for tensor in network.outputs], outputs_of(network, feeds), tolerance_of(name))
    steps = list(network.operations)
    for at in range(1, len(steps), 3):
        later = {tensor for each in steps[at:] for tensor in each.inputs} | set(network.outputs)
        made_later = {tensor for each in steps[at:] for tensor in each.outputs}
        given = {tensor: known[tensor] for tensor in sorted(later - made_later)}
        computed = network.part(given, network.outputs)(given)
        assert_close([computed[tensor] for tensor in network.outputs], [known[tensor] for tensor in network.outputs], 1e-6)


@every_network
def test_model_is_made_again(name: str) -> None:
    """With other biases: the new model computes what the network does, and the given one is as it was."""
    model, network, feeds = made(name)
    before = [value.numpy() for value in model.weights]
    own = [layer for layer in network.layers if layer.call_of is None]
    shifts = {layer.name: np.linspace(0.5, 1 + k, layer.channels) for k, layer in enumerate(own)}
    moved = network.with_shifts(shifts)
    own = [layer for layer in moved.layers if not layer.name.endswith("depthwise")]
    assert_close(expected_of(moved.model, feeds), outputs_of(moved, feeds), max(1e-5, 2 * tolerance_of(name)))
    assert not network.layers or any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(expected_of(moved.model, feeds), expected_of(model, feeds))
    )
    again = KerasNetwork.load(moved.model, "model")
    assert [layer.name for layer in again.layers] == [layer.name for layer in network.layers]
    for layer, found in zip(own, [each for each in again.layers if not each.name.endswith("depthwise")], strict=True):
        if "separable" not in name:
            np.testing.assert_array_equal(np.ravel(found.bias), np.ravel(layer.bias))
    assert_close([value.numpy() for value in model.weights], before, 0)
    assert graph_of(moved.model).output_names == graph_of(model).output_names
    names = [keras.tree.map_structure(input_name, graph_of(each).input) for each in (moved.model, model)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["operations", "masked_lstm", "einsums", "any_size", "mixed_float16", "nested_dict"])
def test_correct(name: str) -> None:
    """From end to end: mean outputs of all layers become those of the float model."""
    _, network, feeds = made(name)
    model = network.model
    params = QuantParams("tf", weight_bits=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "empirical made the outputs worse|not folded", UserWarning)
        correction = correct(model, [feeds], quant_params=params, method="empirical")
    assert {each.name for each in correction.report if each.method} == {layer.name for layer in network.layers}
    assert_close(expected_of(correction.model, feeds), outputs_of(correction.network, feeds), max(1e-5, tolerance_of(name)))


def test_images_of_any_size() -> None:
    _, network, feeds = made("any_size")
    compute = network.part(feeds, network.outputs)
    other = {name: samples(2, 9, 7, 3) for name in feeds}
    assert_close(compute(other)[network.outputs[0]], expected_of(network.model, other)[0])


class Matrix(layers.Layer):
    """A layer of somebody's own, with a matrix."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.matrix = self.add_weight(shape=(shape[-1], 4), name="matrix")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.matrix)


class Scaled(layers.Layer):
    """One that multiplies with a vector."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.scale = self.add_weight(shape=(1, shape[-1]), name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale


class Doubled(layers.Dense):
    """A layer of a derived class, which does something else."""

    def call(self, x: Any) -> Any:
        return 2 * super().call(x)


class Same(layers.Dense):
    """A layer of a derived class, which does the same."""


def quantized(layer: Any) -> Any:
    layer.build((None, 4, 6))
    layer.quantize("int8")
    return layer


def with_lora(layer: Any) -> Any:
    layer.build((None, 4, 6))
    layer.enable_lora(2)
    return layer


RECURRENT, INSIDE = "it is recurrent, which is not corrected", "it has layers inside, which are not corrected"
DYNAMIC = "it is quantized when it runs, which is not corrected: quantize it statically"
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "lstm": (lambda: layers.LSTM(3), RECURRENT),
    "gru": (lambda: layers.GRU(3), RECURRENT),
    "bidirectional": (lambda: layers.Bidirectional(layers.LSTM(3)), RECURRENT),
    "custom": (Matrix, "operator is not supported"),
    "doubled": (lambda: Doubled(4), "operator is not supported"),
    "quantized dense": (lambda: quantized(layers.Dense(4)), DYNAMIC),
    "quantized einsum": (lambda: quantized(layers.EinsumDense("abc,cd->abd", (4, 5))), DYNAMIC),
    "lora": (lambda: with_lora(layers.Dense(4)), "weights are computed at run time"),
    "time distributed convolution": (lambda: layers.TimeDistributed(layers.Conv1D(2, 3)), INSIDE),
    "batch norm": (layers.BatchNormalization, ""),
    "layer norm": (layers.LayerNormalization, ""),
    "group norm": (lambda: layers.GroupNormalization(2), ""),
    "prelu": (layers.PReLU, ""),
    "vector": (Scaled, ""),
    "same": (lambda: Same(4), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers(name: str) -> None:
    make, reason = OTHERS[name]
    shape = (5, 4, 6) if "convolution" in name else (4, 6)
    x, layer = keras.Input(shape), make()
    model = keras.Model(x, layer(x))
    network = KerasNetwork.load(model, "model")
    assert [each.reason for each in network.unsupported] == ([reason] if reason else [])
    assert len(network.layers) == (name == "same")
    array = samples(3, *shape)
    assert_close(outputs_of(network, feeds_of(network, array)), [run(model, array)])
