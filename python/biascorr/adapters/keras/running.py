"""Steps of a Keras model as one function of TensorFlow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    weights : dict from str to tensor
        Of products, as their layers have them.
    biases : dict from str to ndarray
        Of products, aligned with their outputs.
    limits : dict from str to (ndarray, ndarray)
        Of activations, aligned with their tensors.
    quantizers : dict from str to Quantization
        The grids that products read their input on; steps of their own move it there.
    removed : set of str
        Steps that give out what they read.
    """

    weights: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    limits: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    quantizers: Mapping[str, Quantization] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    @functools.cached_property
    def structure(self) -> tuple[Any, ...]:
        """What tells apart values other than weights and biases."""
        limits = [(name, low.tobytes(), high.tobytes()) for name, (low, high) in self.limits.items()]
        grids = [(name, float(each.scale), int(each.zero_point), each.bits) for name, each in self.quantizers.items()]
        return self.removed, tuple(limits), tuple(grids)


class Functions:
    """The functions that steps of one model were made into, for all networks that differ in weights and biases alone."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def prepared(
        self,
        steps: Sequence[Step],
        values: Values,
        given: Feeds,
        wanted: Sequence[str],
        shapes: Mapping[str, tuple[int | None, ...]],
        allocator: Allocator | None,
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """What computes the wanted tensors from given ones; the steps are those that this needs, in order."""
        computed = [name for name in dict.fromkeys(wanted) if name not in given]
        signature = {name: tf.TensorSpec(_shape(given[name], shapes.get(name)), given[name].dtype) for name in given}
        weights = {step.name: _weights(step, values) for step in steps if step.linear is not None}
        biases = {step.name: bias for step in steps if (bias := _bias(step, values)) is not None}
        key = (tuple(signature.items()), tuple(computed), tuple(weights), tuple(biases), values.structure)
        if key not in self._made:
            parameters = [
                {name: tf.TensorSpec(each.shape, each.dtype) for name, each in kind.items()} for kind in (weights, biases)
            ]
            run = functools.partial(_run, steps=steps, values=values, computed=computed)
            function = tf.function(
                lambda *arguments: run(*arguments), input_signature=[signature, *parameters], autograph=False
            )
            self._made[key] = function.get_concrete_function()
        function = self._made[key]

        def compute(feeds: Feeds) -> dict[str, NDArray[Any]]:
            with _one_line():
                outputs = function({name: tf.convert_to_tensor(feeds[name]) for name in signature}, weights, biases)
            found = {name: _array(output, allocator) for name, output in zip(computed, outputs)}
            return {name: found[name] if name in found else feeds[name] for name in wanted}

        return compute


def _run(
    tensors: Mapping[str, Any],
    weights: Mapping[str, Any],
    biases: Mapping[str, Any],
    *,
    steps: Sequence[Step],
    values: Values,
    computed: Sequence[str],
) -> list[Any]:
    known = dict(tensors)
    for step in steps:
        read = [known[name] for name in step.inputs]
        known.update(zip(step.outputs, _computed(step, read, values, weights.get(step.name), biases.get(step.name))))
    return [ops.convert_to_tensor(known[name]) for name in computed]


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(f"TensorFlow: {' '.join(error.message.split())[:200]}") from error
    except tf.errors.OpError as error:
        raise ValueError(f"TensorFlow cannot run it: {' '.join(error.message.split())[:500]}") from error


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


def _weights(step: Step, values: Values) -> Any:
    """The weights of a product, those of the model or other ones."""
    linear: Any = step.linear
    own = values.weights.get(step.first)
    return tf.convert_to_tensor(getattr(linear.layer, linear.variable)) if own is None else own


def _bias(step: Step, values: Values) -> Any:
    if step.linear is None:
        return None
    bias = values.biases.get(step.first, step.linear.bias)
    return None if bias is None else tf.convert_to_tensor(bias)


def _computed(step: Step, tensors: Sequence[Any], values: Values, weights: Any, bias: Any) -> Sequence[Any]:
    if step.first in values.removed:
        return tensors
    if step.quantization is not None:
        return [_on_grid(tensors[0], step.quantization)]
    if step.linear is not None:
        product = step.linear.compute(tensors[0], weights)
        return [product if bias is None else _with_bias(product, ops.cast(bias, product.dtype))]
    if step.first in values.limits:
        low, high = (ops.cast(bound, tensors[0].dtype) for bound in values.limits[step.first])
        return [ops.minimum(ops.maximum(tensors[0], low), high), *tensors[1:]]
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
