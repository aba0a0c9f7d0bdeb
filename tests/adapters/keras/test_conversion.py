"""Models that were corrected and equalized are converted to TFLite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import biascorr
from command_line import run


@pytest.fixture(params=["float32", "mixed_bfloat16"])
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def images(count):
    return np.random.default_rng(count).gamma(2.0, 0.5, (count, 8, 8, 3)).astype(np.float32)


def model_with_relu6():
    """Convolutions with channels of uneven ranges, and a ReLU6 between them."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((8, 8, 3), name="images")
    first, second = layers.Conv2D(8, 3, name="first"), layers.Conv2D(4, 1, name="second")
    model = keras.Model(inputs, second(layers.ReLU(6.0, name="relu")(first(inputs))))
    second.kernel.assign(rng.normal(0.0, 0.5, second.kernel.shape))
    first.kernel.assign(rng.normal(0.05, 0.3, first.kernel.shape) * np.exp(rng.normal(0.0, 1.5, 8)))
    return model


def test_an_equalized_model_computes_in_the_types_of_the_model(policy):
    model = model_with_relu6()
    equalization = biascorr.equalize(model)
    assert [chain.limits for chain in equalization.chains] == [["relu"]]
    of_outputs = {layer.name: layer.output.dtype for layer in equalization.model.layers}
    assert set(of_outputs.values()) - {"float32"} == ({"bfloat16"} if "mixed" in policy else set())


@pytest.mark.filterwarnings("ignore")  # those of TFLiteConverter and its interpreter
def test_a_model_that_is_equalized_and_corrected_is_converted():
    samples, held_out = images(32), images(16)
    model = model_with_relu6()
    correction = biascorr.correct(biascorr.equalize(model, samples).model, samples, method="empirical")
    converter = tf.lite.TFLiteConverter.from_keras_model(correction.model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    run = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner()
    (name,) = run.get_input_details()
    found = np.concatenate([*run(**{name: held_out[:1]}).values()])
    expected = model(held_out[:1]).numpy()
    assert np.square(found - expected).sum() < 0.1 * np.square(expected).sum()


def test_the_command_writes_keras_files(tmp_path):
    model_with_relu6().save(tmp_path / "model.keras")
    np.savez(tmp_path / "samples.npz", images=images(4))
    for command in (["correct", "--method", "mean"], ["equalize"]):
        arguments = [command[0], "model.keras", "--data", "samples.npz", "-o", f"{command[0]}.keras", *command[1:]]
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert keras.saving.load_model(tmp_path / f"{command[0]}.keras").get_layer("first")
