"""Files that Keras 2 wrote are read, though their optimizers are none of Keras 3."""

import h5py
import keras
import numpy as np
import pytest

from biascorr import QuantParams, correct


@pytest.fixture
def path(tmp_path):
    """A model whose optimizer has an option that Keras 3 does not take."""
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, keras.layers.Dense(3, name="layer")(inputs))
    model.compile("adam", "mse")
    path = tmp_path / "model.h5"
    model.save(path)
    with h5py.File(path, "a") as file:
        file.attrs["training_config"] = file.attrs["training_config"].replace("learning_rate", "lr")
    return path


def test_a_model_whose_optimizer_is_of_keras_2_comes_without_it(path):
    with pytest.raises(ValueError, match="lr"):
        keras.saving.load_model(path)
    samples = np.random.default_rng(0).gamma(2.0, 1.0, (40, 4)).astype(np.float32)
    with pytest.warns(UserWarning, match="model.h5: compile the model that is returned yourself: .*lr"):
        correction = correct(path, samples, quant_params=QuantParams(weight_bits=4), method="mean")
    assert not correction.model.compiled
    assert [layer.method for layer in correction.report] == ["mean"]


def test_a_file_that_is_damaged_is_an_error(path):
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="model.h5: Keras cannot read it"):
        correct(path, np.ones((8, 4), np.float32))
