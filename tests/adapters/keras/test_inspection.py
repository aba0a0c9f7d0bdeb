"""`compare`, `inspect` and `fold` of Keras models; `quantize` says what quantizes them."""

import keras
import numpy as np
import pytest

from biascorr import compare, correct, fold, inspect, quantize

layers = keras.layers


@pytest.fixture(scope="module")
def model():
    first = [layers.Conv2D(4, 3, padding="same", use_bias=False, name="first"), layers.BatchNormalization(name="norm")]
    others = [layers.ReLU(), layers.Conv2D(5, 3, name="second"), layers.GlobalAveragePooling2D()]
    keras.utils.set_random_seed(0)
    return keras.Sequential([layers.Input((8, 8, 3)), *first, *others, layers.Dense(6, activation="softmax", name="last")])


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)


def test_a_keras_model_is_inspected(model):
    found = inspect(model)
    assert (found.format, found.is_quantized, found.batch_norms) == ("Keras", False, 1)
    assert (found.inputs[0].shape, found.inputs[0].layout) == ((None, 8, 8, 3), "NHWC")
    assert found.outputs[0].shape == (None, 6)
    assert [(each.operator, each.channels) for each in found.layers] == [("Conv2D", 4), ("Conv2D", 5), ("Dense", 6)]
    assert {chain.layers for chain in found.chains} == {("first", "second"), ("second", "last")}


def test_a_keras_model_is_folded_and_compared(model, data, tmp_path):
    folding = fold(model)
    assert [(each.batch_norm, each.layer) for each in folding.folds] == [("norm", "first")]
    assert len(folding.model.layers) == len(model.layers) - 1
    folding.save(tmp_path / "folded.keras")
    correction = correct(model, data, fold=True, method="mean")
    found = compare(model, {"folded": tmp_path / "folded.keras", "corrected": correction}, data)
    assert found["folded"].sqnr > 90
    assert found["folded"].top1 == 1
    assert found["folded"].divergence < 1e-9
    assert found["corrected"].largest_change < 0.1


def test_keras_models_are_quantized_by_their_converter(model, data):
    with pytest.raises(TypeError, match=r"a .keras model, expected ONNX: tf.lite.TFLiteConverter quantizes it"):
        quantize(model, data)
