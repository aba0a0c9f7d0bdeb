"""A Keras model made again, with other weights, biases and activations. The given one and its layers stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from biascorr.adapters.keras.linear import Linear
from biascorr.adapters.keras.running import Values
from biascorr.adapters.keras.steps import Step, Steps, graph_of, is_graph, nodes_of
from biascorr.graph.axes import aligned


def rebuilt(model: Any, steps: Steps, values: Values) -> Any:
    """A copy of a model with these values: names, types, flags and what it was compiled with are as they were."""
    return _Rebuilder(steps, values).made(model)


class _Rebuilder:
    def __init__(self, steps: Steps, values: Values) -> None:
        self._values = values
        self._names = {step.operation.name for step in steps.steps}
        self._steps: dict[int, list[Step]] = {}  # of each operation, by its id
        for step in steps.steps:
            if step.name == step.first:
                self._steps.setdefault(id(step.operation), []).append(step)
        self._made: dict[int, Any] = {}

    def made(self, model: Any) -> Any:
        """A copy of a model, its layers built and filled."""
        copy = self._model(model)
        for source, clone in self._pairs(model, copy):
            clone.trainable = source.trainable  # from the outside in: that of a model holds for all its layers
        _compile(model, copy)
        return copy

    def _pairs(self, model: Any, copy: Any) -> list[tuple[Any, Any]]:
        """The model and all layers that have a copy."""
        pairs = [(model, copy)]
        for operation in model._layers if isinstance(model, keras.Sequential) else graph_of(model).layers:
            if id(operation) in self._made:
                clone = self._made[id(operation)]
                pairs += self._pairs(operation, clone) if is_graph(operation) else _inner_pairs(operation, clone)
        return pairs

    def _model(self, model: Any) -> Any:
        self._made[id(model)] = self._sequential(model) if self._stays_sequential(model) else self._functional(model)
        return self._made[id(model)]

    def _stays_sequential(self, model: Any) -> bool:
        """Whether each layer of a sequential model is one layer again."""
        if not isinstance(model, keras.Sequential):
            return False
        is_plain = all(isinstance(layer, keras.Layer) for layer in model.layers)
        return is_plain and not any(self._limits(layer) for layer in model.layers)

    def _limits(self, operation: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """The limits that an operation gets."""
        found = self._steps.get(id(operation), ())
        return [self._values.limits[step.first] for step in found if step.first in self._values.limits]

    def _is_removed(self, operation: Any) -> bool:
        return any(step.first in self._values.removed for step in self._steps.get(id(operation), ()))

    def _sequential(self, model: Any) -> Any:
        (source,) = graph_of(model).inputs
        inside = list(model.layers)
        kept = [layer for layer in inside if not self._is_removed(layer) or layer is inside[-1]]
        copy = keras.Sequential([_input(source), *map(self._copy, kept)], name=model.name)
        for layer in kept:
            self._fill(layer)
        return copy

    def _functional(self, model: Any) -> Any:
        graph = graph_of(model)
        inputs = keras.tree.map_structure(_input, graph.input)
        tensors = dict(zip(map(id, graph.inputs), keras.tree.flatten(inputs)))
        outside = {id(tensor) for tensor in graph.outputs}
        for node in nodes_of(graph):
            args, kwargs = node.arguments.fill_in(tensors)
            if self._is_removed(node.operation):
                outputs = tensors[id(node.input_tensors[0])]
                if outside & set(map(id, node.outputs)):
                    outputs = self._copy(node.operation)(outputs)  # an identity, without what else a normalization is given
            else:
                outputs = self._limited(node.operation, self._copy(node.operation)(*args, **kwargs))
                self._fill(node.operation)
            tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs)))
        outputs = keras.tree.map_structure(lambda tensor: tensors[id(tensor)], graph.output)
        return _class_of(model)(inputs, outputs, name=model.name)

    def _copy(self, operation: Any) -> Any:
        """The operation again, the same one at each call."""
        if id(operation) not in self._made:
            if is_graph(operation):
                return self._model(operation)
            if self._is_removed(operation):  # but it makes an output, which keeps its name
                copy = layers.Identity(name=operation.name)
            else:
                copy = type(operation).from_config(self._config(operation))
            self._made[id(operation)] = copy
        return self._made[id(operation)]

    def _config(self, operation: Any) -> dict[str, Any]:
        config: dict[str, Any] = operation.get_config()
        own = config["layer"]["config"] if isinstance(operation, layers.TimeDistributed) else config
        for step in self._steps.get(id(operation), ()):
            if step.linear is not None and step.first in self._values.biases and step.linear.layer.bias is None:
                own |= _with_bias(step.linear)
        for low, _ in self._limits(operation):
            if isinstance(operation, layers.ReLU):
                own["max_value"] = None
            own |= {"activation": "relu" if _is_relu(low) else "linear"} if "activation" in own else {}
        return config

    def _limited(self, operation: Any, outputs: Any) -> Any:
        """What an operation makes, within the limits that it does not set itself."""
        for low, high in self._limits(operation):
            is_own = "activation" in operation.get_config() or isinstance(operation, layers.ReLU)
            if not (is_own and _is_relu(low)) and np.isfinite(low).any():
                outputs = self._named(ops.maximum(outputs, low), operation)
            if np.isfinite(high).any():
                outputs = self._named(ops.minimum(outputs, high), operation)
        return outputs

    def _named(self, tensor: Any, operation: Any) -> Any:
        """A tensor whose operation gets a name that no other one has."""
        name = next(
            each for k in range(len(self._names) + 1) if (each := f"{operation.name}_limit{k or ''}") not in self._names
        )
        self._names.add(name)
        tensor._keras_history.operation.name = name
        return tensor

    def _fill(self, operation: Any) -> None:
        """Gives the copy of a layer its values."""
        copy = self._made[id(operation)]
        products = [(step, step.linear) for step in self._steps.get(id(operation), ()) if step.linear is not None]
        if is_graph(operation) or not isinstance(operation, keras.Layer) or self._is_removed(operation):
            return
        if not products:
            for source, variable in zip(operation.variables, copy.variables):
                variable.assign(source)
            return
        own = copy.layer if isinstance(operation, layers.TimeDistributed) else copy
        for step, linear in products:
            weights = self._values.weights.get(step.first)
            source = getattr(linear.layer, linear.variable)
            getattr(own, linear.variable).assign(source if weights is None else linear.to_variable(np.asarray(weights)))
        if own.bias is not None:
            own.bias.assign(products[-1][1].bias_to_variable(self._bias(products), own.bias.shape))

    def _bias(self, products: Sequence[tuple[Step, Linear]]) -> NDArray[Any]:
        """The bias of a layer; that of a depthwise product goes through the weights of the one after it."""
        step, linear = products[-1]
        bias = self._values.biases.get(step.first, linear.bias)
        if bias is None:
            bias = aligned(np.zeros(linear.weights.shape[-1]), linear.axis)
        first = self._values.biases.get(products[0][0].first) if len(products) > 1 else None
        if first is None:
            return np.asarray(bias)
        weights = np.asarray(self._values.weights.get(step.first, linear.weights), dtype=np.float64)
        through = first.ravel() @ weights.reshape(weights.shape[-2:])
        return np.asarray(bias + through.reshape(bias.shape))


def _with_bias(linear: Linear) -> dict[str, Any]:
    """What gives a layer without a bias one."""
    if linear.matrix is None:
        return {"use_bias": True}
    return {"bias_axes": "".join(letter for letter in linear.matrix.target if letter in linear.matrix.produced)}


def _is_relu(low: NDArray[Any]) -> bool:
    return bool((np.asarray(low) == 0).all())


def _input(tensor: Any) -> Any:
    layer = tensor._keras_history.operation
    optional = getattr(layer, "optional", False)
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse, name=tensor.name, optional=optional)


def _class_of(model: Any) -> Any:
    """The class of a model where it is made from inputs and outputs, else that of a plain one."""
    plain = type(graph_of(model))
    is_like = not isinstance(model, keras.Sequential) and type(model).__init__ in (plain.__init__, keras.Model.__init__)
    return type(model) if is_like else keras.Model


def _inner_pairs(layer: Any, clone: Any) -> list[tuple[Any, Any]]:
    """A layer and those inside of it."""
    own = [layer._flatten_layers(), clone._flatten_layers()]
    return [(a, b) for a, b in zip(*map(list, own)) if isinstance(a, keras.Layer)]


def _compile(model: Any, copy: Any) -> None:
    """Compiles a copy as the model was; losses and metrics that cannot be made again are left out, with a warning."""
    if not model.compiled:
        return
    try:
        copy.compile_from_config(model.get_compile_config())
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        warnings.warn(f"{model.name}: compile the model that is returned yourself: {message}", stacklevel=2)
        return
    before, after = (getattr(each.optimizer, "variables", []) for each in (model, copy))
    if [each.shape for each in before] == [each.shape for each in after]:
        for source, variable in zip(before, after):
            variable.assign(source)
