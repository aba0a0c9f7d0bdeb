"""Steps of a Keras model as one function of TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from numpy.typing import NDArray

from biascorr.adapters.keras.steps import Step, graph_of
from biascorr.graph.network import Allocator, Feeds
from biascorr.quantization import Quantization


@dataclass(frozen=True, eq=False)
class Values:
    """The values that steps compute with, where they are not those of the model; by the names of steps.

    Parameters
    ----------
    weights, biases : dict from str to ndarray or LazyArray
        Of products, in their layouts; aligned with their outputs.
    limits : dict from str to (ndarray, ndarray)
        Of activations, aligned with their tensors.
    quantizers : dict from str to Quantization
        The grids that products move their input to.
    removed : set of str
        Steps that give out what they read.
    """

    weights: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    limits: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    quantizers: Mapping[str, Quantization] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()


def prepared(
    steps: Sequence[Step],
    values: Values,
    given: Feeds,
    wanted: Sequence[str],
    shapes: Mapping[str, tuple[int | None, ...]],
    allocator: Allocator | None,
) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
    """A function that computes the wanted tensors from given ones; the steps are those that this needs, in order."""
    names = list(given)
    computed = [name for name in dict.fromkeys(wanted) if name not in given]
    constants = {step.name: _constants(step, values) for step in steps}
    signature = [
        tf.TensorSpec(_shape(given[name], shapes.get(name)), given[name].dtype, f"x{k}") for k, name in enumerate(names)
    ]

    def run(*tensors: Any) -> list[Any]:
        known = dict(zip(names, tensors))
        for step in steps:
            read = [known[name] for name in step.inputs]
            known.update(zip(step.outputs, _computed(step, read, values, constants[step.name])))
        return [ops.convert_to_tensor(known[name]) for name in computed]

    function = tf.function(run, input_signature=signature, autograph=False).get_concrete_function()

    def compute(feeds: Feeds) -> dict[str, NDArray[Any]]:
        outputs = function(*(tf.convert_to_tensor(feeds[name]) for name in names))
        found = {name: _array(output, allocator) for name, output in zip(computed, outputs)}
        return {name: found[name] if name in found else feeds[name] for name in wanted}

    return compute


def _shape(array: NDArray[Any], known: tuple[int | None, ...] | None) -> list[int | None]:
    """The sizes that all batches have."""
    return [None] * array.ndim if known is None or len(known) != array.ndim else list(known)


def _array(tensor: Any, allocator: Allocator | None) -> NDArray[Any]:
    """The values, in memory that may be written to."""
    array = tensor.numpy()
    if allocator is None or not isinstance(array, np.ndarray):
        return np.array(array)
    out = allocator.take(array.shape, array.dtype)
    np.copyto(out, array)
    return out


def _constants(step: Step, values: Values) -> list[Any]:
    """Weights and bias of a product as tensors: those of the model itself, or other ones."""
    linear = step.linear
    if linear is None:
        return []
    weights, bias = values.weights.get(step.first), values.biases.get(step.first)
    if bias is None:
        bias = linear.bias
    if weights is None:
        weights = getattr(linear.layer, linear.variable) if linear.matrix is None else linear.weights
    both = [weights, bias]
    return [each if each is None or hasattr(each, "assign") else tf.convert_to_tensor(np.asarray(each)) for each in both]


def _computed(step: Step, tensors: Sequence[Any], values: Values, constants: Sequence[Any]) -> Sequence[Any]:
    if step.first in values.removed:
        return tensors[:1]
    if step.linear is not None:
        weights, bias = constants
        x = tensors[0]
        quantization = values.quantizers.get(step.name)
        product = step.linear.compute(x if quantization is None else _on_grid(x, quantization), weights)
        return [product if bias is None else _with_bias(product, ops.cast(bias, product.dtype))]
    if step.first in values.limits:
        low, high = (ops.cast(bound, tensors[0].dtype) for bound in values.limits[step.first])
        return [ops.minimum(ops.maximum(tensors[0], low), high)]
    return step.compute(*tensors) if step.compute is not None else []


def _with_bias(product: Any, bias: Any) -> Any:
    """The sum; keras.ops.add may take a bias of several axes for one along another axis."""
    return ops.add(product, bias) if len(bias.shape) == 1 else tf.add(product, bias)


def _on_grid(x: Any, quantization: Quantization) -> Any:
    """round(clip(x * scale)) / scale, in float32, of any number of bits."""
    least = -(2 ** (quantization.bits - 1)) - quantization.zero_point
    steps = ops.clip(ops.cast(x, "float32") * np.float32(quantization.scale), least, least + 2**quantization.bits - 1)
    return ops.cast(ops.round(steps) / np.float32(quantization.scale), x.dtype)


def packed(model: Any, feeds: Sequence[Any]) -> Any:
    """Tensors in the structure that a model takes them in."""
    return keras.tree.pack_sequence_as(graph_of(model).input, list(feeds))
