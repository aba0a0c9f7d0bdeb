"""Small Keras models with seeded weights, and what tests ask of them.

Weights and samples are those of :mod:`networks`: sums of products are exact in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from biascorr import Quantization, fake_quantize
from biascorr.adapters.keras.network import KerasNetwork
from networks import BITS, Array, biases, weights

of_keras = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
"""Lets pass what Keras 3 itself warns of where it reads variables of TensorFlow."""


def fill(model: keras.Model, seed: int = 0) -> keras.Model:
    """Gives all variables of a model seeded values: normalizations, far from doing nothing."""
    for k, variable in enumerate(model.weights):
        name, shape = variable.path.split("/")[-1], tuple(variable.shape)
        if variable.dtype != "float32" and not variable.dtype.startswith(("float", "bfloat")):
            continue
        if name in ("gamma", "moving_variance"):
            values = np.random.default_rng([seed, k]).uniform(0.5, 1.5, shape)
            values *= np.where(np.arange(values.size) % 3 == 1, -1, 1) if name == "gamma" else 1
        elif name == "alpha":
            values = np.random.default_rng([seed, k]).uniform(0, 1, shape)
        elif len(shape) < 2:
            values = biases(*shape, seed=seed + k + 1)
        else:
            values = weights(*shape, axis=-1, seed=seed + k) * (2 if min(shape) < 3 else 1)
        variable.assign(values)
    return model


def run(model: keras.Model, x: Any) -> Any:
    """The outputs for a batch, as they are used, not trained."""
    return keras.tree.map_structure(ops.convert_to_numpy, model(x, training=False))


def feeds_of(network: KerasNetwork, *arrays: Array) -> dict[str, Array]:
    """A batch, by the names of the inputs."""
    return {each.name: array for each, array in zip(network.inputs, arrays, strict=True)}


def outputs_of(network: KerasNetwork, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs, as the adapter computes them."""
    computed = network.part(feeds, network.outputs)(feeds)
    return [computed[name] for name in network.outputs]


def fake_quantized(kernel: Array, axes: Sequence[int] | None, bits: int = BITS) -> Array:
    """Weights on a symmetric grid: one for each index along these axes, or one in all."""
    if axes is None:
        return fake_quantize(kernel, Quantization.from_range(kernel.min(), kernel.max(), bits, asymmetric=False))
    moved = np.moveaxis(kernel, axes, range(len(axes)))
    rows = moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1)
    grid = Quantization.from_range(rows.min(axis=1), rows.max(axis=1), bits, asymmetric=False)
    return np.moveaxis(fake_quantize(rows, grid, axis=0).reshape(moved.shape), range(len(axes)), axes)


def assert_close(computed: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """That no array moves by more than this part of its largest magnitude."""
    for found, wanted in zip(keras.tree.flatten(computed), keras.tree.flatten(expected), strict=True):
        assert found.shape == wanted.shape
        wanted = np.asarray(wanted, np.float64)
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max(initial=1e-9))
