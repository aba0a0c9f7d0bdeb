"""A Keras model as steps from tensor to tensor: nested models written out, biases and activations split off their layers.

A call of the layer "c" with a fused activation is the steps "c" (product and bias, makes the tensor "c/linear") and
"c/activation" (makes "c"). A later call of the same layer is "c:2", what is inside of a nested model "nested/c". Where Keras
passes a mask along with a tensor, the mask is a tensor of its own here, "c/mask", so that a model can be cut anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from biascorr.adapters.keras.linear import Linear, linears_of, why_unsupported
from biascorr.graph.reasons import Reason
from biascorr.quantization import Quantization

Compute = Callable[..., Sequence[Any]]
"""From the tensors that a step reads to those that it makes."""


@dataclass(frozen=True, eq=False)
class Step:
    """A step.

    Parameters
    ----------
    name : str
        Its name.
    first : str
        The name of the same step of the first call of the operation; its own name there.
    inputs, outputs : tuple of str
        The tensors that it reads and makes.
    operation : keras.Operation
        The operation that is called.
    compute : callable or None
        What it does; None for the product of a layer.
    linear : Linear, optional
        The product with weights that it is, if it is one.
    function : callable, optional
        The function of each value that it applies, of a fused activation or an Activation layer.
    constants : sequence
        What the operation is given beside tensors.
    quantization : Quantization, optional
        The grid that it moves a tensor to, where that is all it does.
    """

    name: str
    first: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operation: Any
    compute: Compute | None = None
    linear: Linear | None = None
    function: Callable[[Any], Any] | None = None
    constants: Sequence[Any] = ()
    quantization: Quantization | None = None


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a model, in topological order.

    Parameters
    ----------
    inputs, outputs : list of str
        Tensors.
    steps : list of Step
        The steps.
    shapes : dict from str to tuple
        Shapes of tensors, None for an axis of any size.
    others : set of str
        Tensors that are no arrays of numbers: text, sparse and ragged ones.
    left : dict from str to Reason
        Steps that have weights and are not corrected, by name, and why.
    """

    inputs: list[str]
    outputs: list[str]
    steps: list[Step]
    shapes: dict[str, tuple[int | None, ...]]
    others: set[str]
    left: dict[str, Reason]

    @property
    def operations(self) -> list[Any]:
        """The operations that are called, each once."""
        return list({id(step.operation): step.operation for step in self.steps}.values())

    @property
    def calls(self) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        """The name of each step, and the tensors that it reads and makes."""
        return [(step.name, step.inputs, step.outputs) for step in self.steps]


def steps_of(model: Any) -> Steps:
    """The steps of a functional or sequential model."""
    walker = _Walker()
    graph = graph_of(model)
    for tensor in graph.inputs:
        walker.tensors[id(tensor)] = walker.tensor(input_name(tensor), tensor)
    inputs = list(walker.tensors.values())
    walker.walk(graph, "")
    outputs = [walker.tensors[id(tensor)] for tensor in graph.outputs]
    return Steps(inputs, outputs, walker.steps, walker.shapes, walker.others, walker.left)


def graph_of(model: Any) -> Any:
    """The graph of a model: itself, or what a sequential one is inside."""
    return model._functional if isinstance(model, keras.Sequential) else model


def input_name(tensor: Any) -> str:
    """The name of an input of a model: that of its layer, which an unnamed tensor has not."""
    return str(tensor._keras_history.operation.name)


def is_graph(operation: Any) -> bool:
    """Whether an operation is a model with a graph that it runs as it is."""
    bases: list[Any] = [cls for cls in type(operation).__mro__ if cls.__name__ in ("Functional", "Sequential")]
    return (
        bool(bases)
        and getattr(type(operation), "call", None) is bases[0].call
        and hasattr(graph_of(operation), "_nodes_by_depth")
    )


def nodes_of(graph: Any) -> Iterator[Any]:
    """The calls of operations in a graph, in topological order."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        yield from (node for node in graph._nodes_by_depth[depth] if node.operation and not node.is_input)


@dataclass
class _Walker:
    steps: list[Step] = field(default_factory=list)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    left: dict[str, Reason] = field(default_factory=dict)
    tensors: dict[int, str] = field(default_factory=dict)  # the names of Keras' own tensors, by id
    _masks: dict[str, str] = field(default_factory=dict)  # the names of the masks of tensors
    _names: set[str] = field(default_factory=set)
    _first: dict[int, str] = field(default_factory=dict)  # the name of the first call of each operation, by id

    def walk(self, graph: Any, prefix: str) -> None:
        for node in nodes_of(graph):
            operation = node.operation
            name = self._fresh(f"{prefix}{operation.name}")
            self._first.setdefault(id(operation), name)
            inner = self._inputs_of_nested(node) if is_graph(operation) else None
            if inner is not None:
                self._walk_nested(node, graph_of(operation), name, inner)
                continue
            found = linears_of(operation, len(node.input_tensors[0].shape), node.outputs[0].shape)
            if isinstance(found, list):
                self._add_layer(name, node, found)
                continue
            constants = [each for each in _flat_arguments(node) if not isinstance(each, keras.KerasTensor)]
            reason = found if isinstance(found, Reason) else why_unsupported(operation, constants)
            if reason is not None:
                self.left[name] = reason
            self._add_call(name, node, constants)

    def tensor(self, name: str, like: Any) -> str:
        """Notes the shape of a tensor under a name, which is returned."""
        self.shapes[name] = tuple(like.shape)
        if like.dtype == "string" or like.sparse or getattr(like, "ragged", False):
            self.others.add(name)
        return name

    def _fresh(self, name: str) -> str:
        found, number = name, 1
        while found in self._names:
            number += 1
            found = f"{name}:{number}"
        self._names.add(found)
        return found

    def _inputs_of_nested(self, node: Any) -> list[Any] | None:
        """The tensors that a nested model is called with, in the order of its inputs; None where it cannot be written out."""
        graph, args = graph_of(node.operation), node.arguments.args
        given = args[0] if len(args) == 1 else None
        if isinstance(given, dict) and set(given) == {input_name(each) for each in graph.inputs}:
            given = [given[input_name(each)] for each in graph.inputs]
        flat: list[Any] = keras.tree.flatten(given)
        is_plain = len(flat) == len(graph.inputs) and all(isinstance(each, keras.KerasTensor) for each in flat)
        others = {key: value for key, value in node.arguments.kwargs.items() if key != "training"}
        is_masked = any(each is not None for each in keras.tree.flatten(others))
        if not is_plain or is_masked or any(len(a.shape) != len(b.shape) for a, b in zip(flat, graph.inputs)):
            return None
        return flat

    def _walk_nested(self, node: Any, graph: Any, name: str, inputs: Sequence[Any]) -> None:
        for outer, inner in zip(inputs, graph.inputs):
            tensor = self.tensors[id(outer)]
            if outer.dtype != inner.dtype:
                cast = self.tensor(self._fresh(f"{name}/{input_name(inner)}"), inner)
                compute = _casting(inner.dtype)
                self.steps.append(Step(cast, cast, (tensor,), (cast,), node.operation, compute))
                self._pass_mask(tensor, cast)
                tensor = cast
            self.tensors[id(inner)] = tensor
        self.walk(graph, f"{name}/")
        for outer, inner in zip(node.outputs, graph.outputs):
            self.tensors[id(outer)] = self.tensors[id(inner)]

    def _add_layer(self, name: str, node: Any, linears: Sequence[Linear]) -> None:
        """The products of a layer, then its activation."""
        operation, first = node.operation, self._first[id(node.operation)]
        tensor = source = self.tensors[id(node.input_tensors[0])]
        function = linears[-1].layer.activation
        is_linear = function is None or function is keras.activations.linear
        for linear in linears:
            is_last = linear is linears[-1]
            made = f"{name}/{linear.part}" if linear.part else name if is_linear else f"{name}/linear"
            step_name, step_first = (f"{each}/{linear.part}" if linear.part else each for each in (name, first))
            matrix = linear.matrix
            if matrix is not None:
                tensor = self._add_form(f"{name}/merged", first, operation, tensor, matrix.merged)
            after = f"{name}/product" if matrix is not None else made
            self.steps.append(Step(step_name, step_first, (tensor,), (after,), operation, linear=linear))
            self._names.add(step_name)
            if matrix is not None:
                split = functools.partial(matrix.split, sizes=linear.sizes(matrix.produced))
                self._add_form(f"{name}/split", first, operation, after, split, made)
            tensor = made
            if not is_last:
                self.shapes[made] = (None,) * len(node.outputs[0].shape)
        self.tensor(tensor, node.outputs[0])
        if operation.supports_masking:
            self._pass_mask(source, tensor)
        if not is_linear:
            activated = self.tensor(name, node.outputs[0])
            both = (f"{name}/activation", f"{first}/activation")
            compute = _applying(function)
            self.steps.append(Step(*both, (tensor,), (activated,), operation, compute, function=function))
            self._pass_mask(tensor, activated)
            tensor = activated
        self.tensors[id(node.outputs[0])] = tensor

    def _add_form(
        self, name: str, first: str, operation: Any, source: str, form: Callable[[Any], Any], made: str | None = None
    ) -> str:
        """A step that moves axes."""
        own = first + name[name.rindex("/") :]
        self.steps.append(Step(name, own, (source,), (made or name,), operation, _applying(form)))
        return made or name

    def _pass_mask(self, source: str, tensor: str) -> None:
        if source in self._masks:
            self._masks[tensor] = self._masks[source]

    def _add_call(self, name: str, node: Any, constants: Sequence[Any]) -> None:
        operation = node.operation
        read = [self.tensors[id(each)] for each in node.input_tensors]
        masks = {each: self._masks[each] for each in read if each in self._masks}
        made = [self.tensor(name if k == 0 else f"{name}/{k}", each) for k, each in enumerate(node.outputs)]
        masked = _shapes_of_masks(node, {read.index(each): self.shapes[mask] for each, mask in masks.items()})
        for k, shape in masked.items():
            self._masks[made[k]] = f"{made[k]}/mask"
            self.shapes[f"{made[k]}/mask"] = shape
        self.tensors.update(zip(map(id, node.outputs), made))
        self.steps.append(
            Step(
                name,
                self._first[id(operation)],
                (*read, *masks.values()),
                (*made, *(self._masks[made[k]] for k in masked)),
                operation,
                _calling(node, [read.index(each) for each in masks], list(masked)),
                function=operation.activation if isinstance(operation, keras.layers.Activation) else None,
                constants=constants,
            )
        )


def _shapes_of_masks(node: Any, given: Mapping[int, tuple[int | None, ...]]) -> dict[int, tuple[int | None, ...]]:
    """The outputs of a call that have a mask, where inputs have these: Keras' own tensors know it of unmasked inputs alone."""
    if not given:
        return _found_masks(node.outputs)
    found: dict[int, tuple[int | None, ...]] = {}

    def call(*tensors: Any) -> None:
        found.update(_found_masks(_calling(node, list(given), [])(*tensors)))

    inputs = [tf.TensorSpec(each.shape, each.dtype) for each in node.input_tensors]
    masks = [tf.TensorSpec(shape, "bool") for shape in given.values()]
    tf.function(call, input_signature=[*inputs, *masks], autograph=False).get_concrete_function()
    return found


def _found_masks(tensors: Sequence[Any]) -> dict[int, tuple[int | None, ...]]:
    masks = {k: getattr(each, "_keras_mask", None) for k, each in enumerate(tensors)}
    return {k: tuple(mask.shape) for k, mask in masks.items() if mask is not None}


def _flat_arguments(node: Any) -> list[Any]:
    return list(keras.tree.flatten((node.arguments.args, node.arguments.kwargs)))


def _casting(dtype: Any) -> Compute:
    return lambda x: [ops.cast(x, dtype)]


def _applying(function: Callable[[Any], Any]) -> Compute:
    return lambda x: [function(x)]


@contextlib.contextmanager
def _kept_losses(operation: Any) -> Iterator[None]:
    """Leaves a layer, and those inside, the losses of the last call, which the next one clears."""
    inside = list(operation._flatten_layers()) if isinstance(operation, keras.Layer) else []
    kept = [(values, values.copy()) for layer in inside for values in (layer._losses, layer._loss_ids)]
    try:
        yield
    finally:
        for values, before in kept:
            values.clear()
            (values.update if isinstance(values, set) else values.extend)(before)


def _calling(node: Any, masked_inputs: Sequence[int], masked_outputs: Sequence[int]) -> Compute:
    """Calls the operation as the model does when it is used, not trained; masks come after the tensors, and go so too.

    What it does to its own variables, seeds among them, or adds to its losses, is dropped.
    """
    operation, sources = node.operation, node.input_tensors
    training = {"training": False} if "training" in inspect.signature(operation.call).parameters else {}

    def compute(*tensors: Any) -> list[Any]:
        for k, mask in zip(masked_inputs, tensors[len(sources) :]):
            tensors[k]._keras_mask = mask
        args, kwargs = node.arguments.fill_in(dict(zip(map(id, sources), tensors)))
        with keras.StatelessScope(), _kept_losses(operation):
            outputs = keras.tree.flatten(operation(*args, **{**kwargs, **training}))
        return [*outputs, *(outputs[k]._keras_mask for k in masked_outputs)]

    return compute
