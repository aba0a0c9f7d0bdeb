"""Keras models that once came out wrong: the ones returned compute what the ones given do."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from biascorr import QuantParams, correct, equalize, fold_all_batch_norms
from keras_networks import Array, assert_close, fill, of_keras, run
from networks import samples

pytestmark = of_keras

IMAGES = (8, 6, 6, 3)


def shared_norm() -> keras.Model:
    """A normalization of two tensors, one of which something else reads too."""
    x = keras.Input(IMAGES[1:])
    a, b = (layers.Conv2D(4, 3, name=name)(x) for name in "ab")
    norm = layers.BatchNormalization(name="norm")
    return fill(keras.Model(x, layers.Conv2D(2, 1, name="c")(norm(a) + norm(b) + b)))


def shared_relu6() -> keras.Model:
    """A limit for two tensors, in a chain whose channels are scaled one by one."""
    x = keras.Input(IMAGES[1:])
    relu = layers.ReLU(6.0, name="relu")
    y = relu(layers.Conv2D(4, 3, name="a")(x))
    y = relu(layers.DepthwiseConv2D(3, name="b")(y))
    model = fill(keras.Model(x, layers.Conv2D(2, 1, name="c")(y)))
    kernel = model.get_layer("a").kernel
    kernel.assign(kernel.numpy() * np.float32([0.1, 1, 4, 20]))
    return model


@pytest.mark.parametrize("make", [shared_norm, shared_relu6])
@pytest.mark.parametrize("replace_relu6", [False, True])
@pytest.mark.filterwarnings("ignore:the float outputs moved")  # where ReLU takes the place of ReLU6
def test_layers_that_are_called_twice_are_not_changed_for_one_call(make: Callable[[], keras.Model], replace_relu6: bool):
    model, images = make(), samples(*IMAGES)
    found = equalize(model, images, replace_relu6=replace_relu6)
    if not replace_relu6:
        assert_close(run(found.model, images), run(model, images), 1e-4)
    network = found.network
    feeds = {network.inputs[0].name: images}
    computed = network.part(feeds, network.outputs)(feeds)[network.outputs[0]]
    assert_close(run(found.model, images), computed)


def test_a_shared_normalization_is_not_folded():
    model, images = shared_norm(), samples(*IMAGES)
    folded, pairs = fold_all_batch_norms(model)
    assert not pairs
    assert_close(run(folded, images), run(model, images))


def test_the_limits_of_a_shared_relu6_are_a_reason():
    reasons = equalize(shared_relu6(), samples(*IMAGES)).reasons
    assert [str(reason) for reason in reasons["a"]] == ["relu limits another tensor too"]


@pytest.mark.parametrize("around", [False, True])
def test_what_preprocessing_layers_have_learned_is_kept(around: bool):
    rows = samples(20, 3)
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(rows * 5 + 2)
    inside = keras.Sequential([keras.Input((3,)), normalization], name="inside") if around else normalization
    x = keras.Input((3,))
    model = keras.Model(x, layers.Dense(2)(inside(x)))
    made = fold_all_batch_norms(model)[0]
    assert_close(run(made, rows), run(model, rows))


@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_a_vocabulary_is_kept():
    lookup = layers.IntegerLookup(output_mode="multi_hot")
    lookup.adapt(np.array([[5], [9], [11]]))
    x = keras.Input((3,), dtype="int64")
    model = fill(keras.Model(x, layers.Dense(2)(lookup(x))))
    rows = np.array([[5, 9, 11], [5, 5, 7], [9, 9, 9], [1, 2, 3]])
    made = correct(model, rows, method="mean").model
    assert_close(run(fold_all_batch_norms(model)[0], rows), run(model, rows))
    assert made.layers[1].get_vocabulary() == lookup.get_vocabulary()


class Scale(layers.Layer):
    """Computes with what it makes of its weights when these are loaded."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.factor = self.add_weight(shape=shape[-1:], name="factor", initializer="ones")
        self.doubled = np.float32(2)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self.doubled = self.factor.numpy() * 2

    def call(self, x: Any) -> Any:
        return x * self.doubled


def test_layers_that_load_their_state_do_so():
    x = keras.Input((3,))
    scale = Scale()
    model, rows = keras.Model(x, layers.Dense(2)(scale(x))), samples(8, 3)
    scale.load_own_variables({"0": np.float32([1, 2, 3])})
    assert_close(run(fold_all_batch_norms(model)[0], rows), run(model, rows))


def last_norm(policy: str) -> keras.Model:
    """A normalization that is folded, and whose output is the model's, so that an identity takes its place."""
    x = keras.Input(IMAGES[1:])
    y = layers.Conv2D(4, 3, dtype=policy)(x)
    return fill(keras.Model(x, layers.BatchNormalization(dtype=policy)(y)))


@pytest.mark.parametrize("policy", ["float32", "float64", "float16", "mixed_float16", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("current", ["float32", "mixed_float16", "float64"])
def test_the_type_of_outputs_stays(policy: str, current: str, tmp_path: Any):
    model, images = last_norm(policy), samples(*IMAGES)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(current)
    try:
        folded, pairs = fold_all_batch_norms(model)
        assert len(pairs) == 1
        assert keras.backend.standardize_dtype(folded.output.dtype) == model.output.dtype
        folded.save(tmp_path / "folded.keras")
        again = keras.saving.load_model(tmp_path / "folded.keras")
    finally:
        keras.config.set_dtype_policy(before)
    tolerance = 1e-6 if "16" not in policy else 0.03
    assert_close(run(folded, images), run(model, images), tolerance)
    assert_close(run(again, images), run(folded, images), tolerance)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_weights_in_bfloat16_are_corrected(policy: str):
    model, images = last_norm(policy), samples(*IMAGES)
    made = correct(model, images, method="empirical", fold=True, quant_params=QuantParams(weight_bits=4))
    assert made.report[0].method == "empirical"
    assert made.model.layers[1].kernel.dtype == model.layers[1].kernel.dtype


def less_the_first(x: Any) -> Any:
    return x - x[:, :1]


def of_dense(activation: Any) -> tuple[keras.Model, Array]:
    x = keras.Input((5, 3))
    layer = layers.TimeDistributed(layers.Dense(4, activation=activation, name="inside"), name="layer")
    return keras.Model(x, layers.Dense(2, name="last")(layer(x))), samples(6, 5, 3)


@pytest.mark.parametrize("activation", [layers.PReLU(), less_the_first])
def test_activations_that_know_the_axes_of_a_row_stay_inside(activation: Any):
    model, rows = of_dense(activation)
    expected = run(model, rows)  # which builds the activation
    made = correct(model, rows, method="empirical", quant_params=QuantParams(weight_bits=8))
    assert [(each.name, each.method) for each in made.report] == [("layer", None), ("last", "empirical")]
    assert_close(run(made.model, rows), expected, 0.05)


def test_the_weights_of_an_activation_are_kept():
    x = keras.Input(IMAGES[1:])
    layer = layers.Conv2D(4, 3, activation=layers.PReLU(), name="layer")
    model, images = keras.Model(x, layer(x)), samples(*IMAGES)
    run(model, images)
    fill(model)
    assert_close(run(fold_all_batch_norms(model)[0], images), run(model, images))
