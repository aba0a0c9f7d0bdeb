"""A Flatten of one value per channel does nothing, so the statistics of a batch normalization reach the layer after it."""

import keras
import pytest
from keras import layers

import biascorr


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("keepdims", [False, True])
def test_statistics_pass_a_flatten_of_averages(data_format, keepdims):
    shape, axis = ((4, 4, 3), -1) if data_format == "channels_last" else ((3, 4, 4), 1)
    x = inputs = keras.Input(shape, name="x")
    for layer in (
        layers.BatchNormalization(axis=axis, name="norm"),
        layers.ReLU(),
        layers.GlobalAveragePooling2D(data_format=data_format, keepdims=keepdims),
        layers.Flatten(data_format=data_format),
        layers.Dense(2, name="dense"),
    ):
        x = layer(x)
    model = keras.Model(inputs, x)
    found = biascorr.find_all_convs_bn_with_activation(model)
    assert found["dense"].input_bn is not None
    assert found["dense"].in_activation_type.name == "relu"


def test_statistics_end_at_a_flatten_of_several_positions():
    x = inputs = keras.Input((4, 4, 3), name="x")
    for layer in (layers.BatchNormalization(name="norm"), layers.Flatten(), layers.Dense(2, name="dense")):
        x = layer(x)
    assert "dense" not in biascorr.find_all_convs_bn_with_activation(keras.Model(inputs, x))
