"""The recipes in examples/keras_classic.py do what they say, and leave the given model as it is."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

PATH = Path(__file__).parent.parent.parent.parent / "examples" / "keras_classic.py"

LAYERS = ["conv", "depthwise", "project", "logits"]


def loaded():
    spec = importlib.util.spec_from_file_location("keras_classic", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipes = loaded()

IMAGES = recipes.random_images(64, seed=1)
HELD_OUT = recipes.random_images(64, seed=2)


@pytest.fixture(scope="module")
def model():
    return recipes.small_model(IMAGES)


@pytest.fixture(scope="module")
def dataset():
    return tf.data.Dataset.from_tensor_slices(IMAGES).batch(16)


def means(model, name):
    """The mean outputs of a layer over the calibration images."""
    output = keras.Model(model.inputs[0], model.get_layer(name).output)(IMAGES).numpy()
    return output.astype(np.float64).mean(axis=tuple(range(output.ndim - 1)))


def assert_same_mean(model, corrected, name):
    expected = means(model, name)
    np.testing.assert_allclose(means(recipes.quantized(corrected), name), expected, atol=2e-5 * np.abs(expected).max())


def mean_error_of_own_weights(model, corrected, name):
    """How far the mean outputs of a layer are from those of the model with the weights of this layer alone quantized."""
    quantized = recipes.quantized(corrected)
    for layer in model.layers:
        if layer.name != name:
            quantized.get_layer(layer.name).set_weights(layer.get_weights())
    return np.abs(means(quantized, name) - means(model, name)).max()


def changed_layers(model, corrected):
    """The layers whose variables are not those of the model, once a layer without a bias has one of zeros there too."""
    changed = []
    for layer in model.layers:
        before, after = layer.get_weights(), corrected.get_layer(layer.name).get_weights()
        if len(after) > len(before):
            before.append(np.zeros_like(after[-1]))
        if not all(map(np.array_equal, before, after)):
            changed.append(layer.name)
    return changed


def names_of(model):
    return [layer.name for layer in model.layers]


def improvement(model, corrected, before=None):
    return recipes.sqnr(model, corrected, HELD_OUT) - recipes.sqnr(model, before or model, HELD_OUT)


@pytest.fixture(autouse=True)
def unchanged(model):
    config, weights = model.get_config(), model.get_weights()
    yield
    assert model.get_config() == config
    assert all(map(np.array_equal, model.get_weights(), weights))


def test_empirical_makes_the_mean_outputs_equal(model, dataset):
    corrected = recipes.bias_correction_empirical(model, dataset)
    assert names_of(corrected) == names_of(model)
    assert changed_layers(model, corrected) == LAYERS
    for name in LAYERS:
        assert_same_mean(model, corrected, name)
    assert improvement(model, corrected) > 6


def test_empirical_and_analytical_corrects_the_first_layer_by_data(model, dataset):
    corrected = recipes.bias_correction_empirical_analytical(model, dataset)
    assert names_of(corrected) == names_of(model)
    assert changed_layers(model, corrected) == LAYERS
    assert_same_mean(model, corrected, "conv")
    assert improvement(model, corrected) > 3


def test_after_equalization_the_dictionary_from_before_serves(model, dataset):
    corrected = recipes.bias_correction_after_cle(model, dataset)
    assert names_of(corrected) == [name for name in names_of(model) if "norm" not in name]
    equalized = recipes.equalize_model(model)
    assert_same_mean(equalized, corrected, "conv")
    assert changed_layers(equalized, corrected) == LAYERS
    assert improvement(model, corrected, before=equalized) > 3
    np.testing.assert_allclose(equalized(HELD_OUT), model(HELD_OUT), atol=1e-4)


def test_one_layer_empirical_makes_its_mean_output_equal_and_leaves_the_others(model, dataset):
    corrected = recipes.bias_correction_single_layer_empirical(model, dataset)
    assert names_of(corrected) == names_of(model)
    assert changed_layers(model, corrected) == ["logits"]
    assert_same_mean(model, corrected, "logits")
    assert improvement(model, corrected) > 6


def test_one_layer_analytical_leaves_the_others(model):
    corrected = recipes.bias_correction_single_layer_analytical(model)
    assert names_of(corrected) == names_of(model)
    assert changed_layers(model, corrected) == ["depthwise"]
    before, after = (mean_error_of_own_weights(model, each, "depthwise") for each in (model, corrected))
    assert after < before / 3
    assert improvement(model, corrected) > 0.5


def test_the_example_prints_that_each_recipe_helps(capsys):
    recipes.main()
    found = dict(re.findall(r"^(\S.*?) +(-?[\d.]+) dB$", capsys.readouterr().out, re.MULTILINE))
    before, equalized = float(found.pop("uncorrected")), float(found.pop("equalized, uncorrected"))
    assert len(found) == 5
    assert float(found.pop("bias_correction_after_cle")) > equalized
    assert all(float(each) > before for each in found.values())
