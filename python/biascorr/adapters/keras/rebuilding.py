"""A Keras model made again, with other weights, biases and activations. The given one and its layers stay as they are."""

from __future__ import annotations

import itertools
import tempfile
import types
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from biascorr.adapters.keras.linear import Linear, array_of
from biascorr.adapters.keras.running import Values
from biascorr.adapters.keras.steps import Step, Steps, graph_of, input_name, is_graph, nodes_of
from biascorr.graph.axes import aligned


def rebuilt(model: Any, steps: Steps, values: Values) -> Any:
    """A copy of a model with these values: names, types, flags and what it was compiled with are as they were."""
    return _Rebuilder(steps, values).made(model)


def made_again(operation: Any, config: dict[str, Any]) -> Any:
    """An operation like this one, with this configuration; classes and functions of the caller's own are known by its objects.

    Raises what its `from_config` does where that is not enough.
    """
    if isinstance(operation, layers.Lambda):  # which Keras makes again only where it is told to trust it
        mask, shape = operation.mask, operation._output_shape
        return layers.Lambda(operation.function, shape, mask, operation.arguments, name=operation.name, dtype=config["dtype"])
    with keras.saving.custom_object_scope(own_objects(operation)):
        return type(operation).from_config(config)


def own_objects(operation: Any) -> dict[str, Any]:
    """The classes and functions of a layer, and of those inside of it, that Keras does not have, by name."""
    inside = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    values = [each for layer in inside for each in (layer, *vars(layer).values())]
    kinds = [each if hasattr(each, "__name__") else type(each) for each in values if not isinstance(each, types.ModuleType)]
    return {kind.__name__: kind for kind in kinds if kind.__module__.split(".")[0] not in ("builtins", "keras", "tensorflow")}


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
        return is_plain and not any(_needs_operations(layer, *each) for layer in model.layers for each in self._limits(layer))

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
        copy = _class_of(model)([_input(source), *map(self._copy, kept)], name=model.name)
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
            is_removed = self._is_removed(node.operation) and not outside & set(map(id, node.outputs))
            is_limit = bool(self._limits(node.operation)) and not isinstance(node.operation, keras.Layer)
            self._names -= {node.operation.name} if is_limit else set()
            if is_removed or is_limit:
                outputs = tensors[id(node.input_tensors[0])]
            elif self._is_identity(node.operation):
                outputs = self._copy(node.operation)(tensors[id(node.input_tensors[0])])
            else:
                outputs = self._copy(node.operation)(*args, **kwargs)
                self._fill(node.operation)
            outputs = self._limited(node.operation, outputs)
            tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs)))
        outputs = keras.tree.map_structure(lambda tensor: tensors[id(tensor)], graph.output)
        kind = keras.Model if isinstance(model, keras.Sequential) else _class_of(model)
        return kind(inputs, outputs, name=model.name)

    def _copy(self, operation: Any) -> Any:
        """The operation again, the same one at each call."""
        if id(operation) not in self._made:
            if is_graph(operation):
                return self._model(operation)
            if self._is_identity(operation):  # which keeps its name
                copy = layers.Identity(name=operation.name, dtype=operation.dtype_policy.name)
            else:
                copy = made_again(operation, self._config(operation))
                copy.name = operation.name  # which a get_config of the caller's own may lack
            self._made[id(operation)] = copy
        return self._made[id(operation)]

    def _is_identity(self, operation: Any) -> bool:
        """Whether a layer is removed, or a ReLU that is to limit its tensor to more than positive numbers."""
        is_no_relu = isinstance(operation, layers.ReLU) and not all(_is_zero(low) for low, _ in self._limits(operation))
        return is_no_relu or self._is_removed(operation)

    def _config(self, operation: Any) -> dict[str, Any]:
        config: dict[str, Any] = operation.get_config()
        own = config["layer"]["config"] if isinstance(operation, layers.TimeDistributed) else config
        for step in self._steps.get(id(operation), ()):
            if step.linear is not None and step.first in self._values.biases and step.linear.layer.bias is None:
                own |= _with_bias(step.linear)
        for low, high in self._limits(operation):
            if isinstance(operation, layers.ReLU):
                own["max_value"] = float(high) if high.ndim == 0 and np.isfinite(high) else None
            elif "activation" in own:
                own["activation"] = "relu" if _is_zero(low) else "linear"
        return config

    def _limited(self, operation: Any, outputs: Any) -> Any:
        """What an operation makes, in its type, within the limits that it does not set itself."""
        for low, high in self._limits(operation):
            if np.isfinite(low).any() and not (isinstance(operation, keras.Layer) and _is_zero(low)):
                outputs = self._named(ops.maximum(outputs, low.astype(outputs.dtype)), operation)
            if np.isfinite(high).any() and not (isinstance(operation, layers.ReLU) and high.ndim == 0):
                outputs = self._named(ops.minimum(outputs, high.astype(outputs.dtype)), operation)
        return outputs

    def _named(self, tensor: Any, operation: Any) -> Any:
        """A tensor whose operation gets a name that no other one has."""
        candidates = itertools.chain([operation.name], (f"{operation.name}_limit{k or ''}" for k in itertools.count()))
        name = next(each for each in candidates if each not in self._names)
        self._names.add(name)
        tensor._keras_history.operation.name = name
        return tensor

    def _fill(self, operation: Any) -> None:
        """Gives the copy of a layer its values."""
        copy = self._made[id(operation)]
        products = [(step, step.linear) for step in self._steps.get(id(operation), ()) if step.linear is not None]
        if is_graph(operation) or not isinstance(operation, keras.Layer) or self._is_identity(operation):
            return
        if not products:
            _fill_as_it_is(operation, copy)
            return
        own = copy.layer if isinstance(operation, layers.TimeDistributed) else copy
        for source, clone in _inner_pairs(products[0][1].layer, own)[1:]:  # activations that are layers
            _fill_as_it_is(source, clone)
        for step, linear in products:
            weights = self._values.weights.get(step.first)
            source = getattr(linear.layer, linear.variable)
            getattr(own, linear.variable).assign(source if weights is None else weights)
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
        own = self._values.weights.get(step.first)
        weights = np.asarray(linear.weights if own is None else own, dtype=np.float64)
        through = first.ravel() @ weights.reshape(weights.shape[-2:])
        return np.asarray(bias + through.reshape(bias.shape))


def _with_bias(linear: Linear) -> dict[str, Any]:
    """What gives a layer without a bias one."""
    if linear.matrix is None:
        return {"use_bias": True}
    return {"bias_axes": "".join(letter for letter in linear.matrix.target if letter in linear.matrix.produced)}


def _needs_operations(layer: Any, low: NDArray[Any], high: NDArray[Any]) -> bool:
    """Whether a layer does not set its limits itself."""
    return not _is_zero(low) or bool(np.isfinite(high).any() and (high.ndim > 0 or not isinstance(layer, layers.ReLU)))


def _is_zero(low: NDArray[Any]) -> bool:
    return bool((low == 0).all())


def _input(tensor: Any) -> Any:
    layer = tensor._keras_history.operation
    others = {name: True for name in ("optional", "ragged") if getattr(layer, name, False)}  # which older versions lack
    copy = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse, name=input_name(tensor), **others)
    copy.name = tensor.name  # which Keras finds the arrays of a mapping by
    return copy


def _class_of(model: Any) -> Any:
    """The class of a model where it is made as Keras' own are; else their class, with a warning."""
    own: Any = next(cls for cls in type(model).__mro__ if cls.__name__ in ("Functional", "Sequential"))
    if type(model).__init__ in (own.__init__, keras.Model.__init__):
        return type(model)
    warnings.warn(
        f"{model.name}: the model that is returned is no {type(model).__name__}, whose constructor takes something else than "
        "inputs and outputs: its own methods are lost",
        stacklevel=2,
    )
    return own


def _inner_pairs(layer: Any, clone: Any) -> list[tuple[Any, Any]]:
    """A layer and those inside of it."""
    own = [layer._flatten_layers(), clone._flatten_layers()]
    return [(a, b) for a, b in zip(*map(list, own)) if isinstance(a, keras.Layer)]


def _fill_as_it_is(layer: Any, copy: Any) -> None:
    """Gives the copy of a layer the values of all variables, and what layers keep beside them or make of them."""
    for source, clone in _inner_pairs(layer, copy):
        if hasattr(source, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                source.save_assets(folder)
                clone.load_assets(folder)
        if hasattr(source, "finalize_state") or not type(source).__module__.startswith("keras."):
            store: dict[str, Any] = {}
            source.save_own_variables(store)
            clone.load_own_variables(store)
    if [each.shape for each in layer.variables] != [each.shape for each in copy.variables]:
        raise ValueError(f"layer {layer.name}: other variables than it had, when it is made again from its get_config()")
    for source, variable in zip(layer.variables, copy.variables):
        variable.assign(source)


def _compile(model: Any, copy: Any) -> None:
    """Compiles a copy as the model was; where that cannot be, a warning says so."""
    if not model.compiled:
        return
    try:
        copy.compile(**keras.tree.map_structure(_compiled_with, dict(model._compile_config.config)))
        if copy.optimizer is not None:
            copy.optimizer.build(copy.trainable_variables)
            _fill_optimizer(model.optimizer, copy.optimizer)
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        warnings.warn(f"{model.name}: compile the model that is returned yourself: {message}", stacklevel=2)


def _compiled_with(value: Any) -> Any:
    """What a model is compiled with, for another model: again, where it has variables."""
    return type(value).from_config(value.get_config()) if isinstance(value, (keras.Metric, keras.Optimizer)) else value


def _fill_optimizer(optimizer: Any, copy: Any) -> None:
    """Gives an optimizer the values of another one, of all variables that are the same."""
    before, after = optimizer.variables, copy.variables
    if [each.shape for each in before] == [each.shape for each in after]:
        pairs = list(zip(before, after))
    else:
        named = [{each.path.partition("/")[2]: each for each in variables} for variables in (before, after)]
        pairs = [(named[0][name], each) for name, each in named[1].items() if name in named[0]]
    for source, variable in pairs:
        value = array_of(source.value)
        if value.shape == tuple(variable.shape):  # others of the same name are not, nor those of a training that failed
            variable.assign(value)
