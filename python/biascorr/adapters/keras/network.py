"""A Keras model as a network that the engine reads, runs and edits."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from biascorr.adapters.keras import files
from biascorr.adapters.keras.digest import digest_of
from biascorr.adapters.keras.folded import folded_of, keep_folded, keep_text, text_of
from biascorr.adapters.keras.linear import DEPTHWISE, Linear, array_of
from biascorr.adapters.keras.rebuilding import rebuilt
from biascorr.adapters.keras.roles import kind_of, roles_of
from biascorr.adapters.keras.running import Functions, Values, packed
from biascorr.adapters.keras.sending import Sent, received, sent
from biascorr.adapters.keras.steps import Step, Steps, steps_of
from biascorr.graph.axes import aligned
from biascorr.graph.layer import Constant, Layer
from biascorr.graph.network import Allocator, BiasChange, Edits, Feeds, ModelInput, Shift
from biascorr.graph.operations import (
    Activation,
    ActivationType,
    BatchNorm,
    Bound,
    ChannelPreserving,
    Facts,
    Operation,
    Role,
    SpatialEffect,
)
from biascorr.graph.origin import Origin
from biascorr.graph.reasons import LayerReport, ReasonCode
from biascorr.quantization import Quantization


class KerasNetwork:
    """A model, and what is other than in it.

    Parameters
    ----------
    source : keras.Model
        A functional or sequential model, which is never changed.
    steps : Steps
        Its steps.
    functions : Functions
        Those that its steps were made into.
    values : Values
        What is other.
    statistics : mapping from str to BatchNorm
        See :class:`biascorr.graph.operations.Facts`.
    """

    keeps_provenance = True

    packages = ("keras", "tensorflow")

    def __init__(
        self, source: Any, steps: Steps, functions: Functions, values: Values, statistics: Mapping[str, BatchNorm]
    ) -> None:
        self._source = source
        self._all = steps
        self._functions = functions
        self._values = values
        self._statistics = statistics
        self._steps, self._shapes = _with_quantizers(_without(steps, values.removed), values.quantizers, steps.shapes)
        self.inputs = [_input(name, tensor) for name, tensor in zip(steps.inputs, source.inputs)]
        self.outputs = list(steps.outputs)
        self.operations = [self._operation(step) for step in self._steps]
        self.layers = [self._layer(step) for step in self._steps if step.linear is not None]
        operators = {step.name: type(step.operation).__name__ for step in steps.steps}
        self.unsupported = [LayerReport(name, operators[name], reasons=(reason,)) for name, reason in steps.left.items()]

    @classmethod
    def load(cls, model: Any, name: str) -> KerasNetwork:
        """From a path or a model; see :func:`biascorr.adapters.keras.files.load` for the errors."""
        loaded, text = files.load(model, name)
        if loaded is not model:
            keep_text(loaded, text)
        steps = steps_of(loaded)
        try:
            return cls(loaded, steps, Functions(), Values(), folded_of(loaded, steps))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        weights = {name: array_of(each) for name, each in self._values.weights.items()}
        return _arrived, (sent(self._source, self._all), replace(self._values, weights=weights), self._statistics)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the steps, what they compute with, and statistics."""
        return digest_of(self._all, self._values, self._statistics)

    @functools.cached_property
    def model(self) -> Any:
        """The model with what is other in it, a new one; made when it is first asked for."""
        model = rebuilt(self._source, self._all, self._values)
        if self._statistics:
            keep_folded(model, steps_of(model), self._statistics)
        return model

    @property
    def origin(self) -> Origin:
        """The format of the model."""
        outputs = [_input(name, tensor) for name, tensor in zip(self.outputs, self._source.outputs) if tensor.dtype != "string"]
        return Origin("Keras", outputs=outputs)

    @property
    def order(self) -> Sequence[str]:
        """Names of all steps, in topological order."""
        return [step.name for step in self._steps]

    def facts(self) -> Facts:
        """Facts about operations and tensors; found at the first call."""
        return self._facts

    @functools.cached_property
    def _facts(self) -> Facts:
        roles: dict[str, Role] = roles_of(replace(self._all, steps=self._steps, shapes=self._shapes))
        for step in self._steps:
            if step.first in self._values.removed:
                roles[step.name] = ChannelPreserving(SpatialEffect.NONE)
            elif step.first in self._values.limits:
                role = roles[step.name]
                assert isinstance(role, Activation)  # nothing else can be limited
                roles[step.name] = replace(role, type=ActivationType.clip(*map(_bound, self._values.limits[step.first])))
        return Facts(roles, self._shapes, self._statistics)

    def part(
        self,
        given: Feeds,
        wanted: Sequence[str],
        *,
        threads: int = 0,  # noqa: ARG002  (TensorFlow's are those of the process)
        allocator: Allocator | None = None,
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """Prepares a function of TensorFlow that computes the wanted tensors."""
        needed, steps = set(wanted).difference(given), []
        for step in reversed(self._steps):
            if not needed.isdisjoint(step.outputs):
                steps.append(step)
                needed.update(name for name in step.inputs if name not in given)
        if not steps:
            return lambda feeds: {name: feeds[name] for name in wanted}
        return self._functions.prepared(steps[::-1], self._values, given, wanted, self._shapes, allocator)

    def deployed(self, *, threads: int = 0, optimized: bool = True) -> Callable[[Feeds], dict[str, Any]]:  # noqa: ARG002
        """Prepares the model to run as Keras runs it."""
        model, names = self.model, [each.name for each in self.inputs]

        def run(tensors: Sequence[Any]) -> list[Any]:
            return list(keras.tree.flatten(model(packed(model, tensors), training=False)))

        function = tf.function(run, autograph=False)

        def compute(feeds: Feeds) -> dict[str, Any]:
            outputs = function([tf.convert_to_tensor(feeds[name]) for name in names])
            return dict(zip(self.outputs, map(array_of, outputs)))

        return compute

    def check(self) -> None:
        """Raises ValueError where the model cannot be made again with what is other in it."""
        try:
            self.model  # noqa: B018
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self._source.name}: {error}") from error

    def bias_change(self, layer: Layer, shift: Shift) -> BiasChange:
        """The change that adding a shift to the bias of a layer would make."""
        before = np.zeros(()) if layer.bias is None else layer.bias.astype(np.float64)
        after = self._biases({layer.name: shift})[self._step(layer.name).first]
        if not np.isfinite(after).all():
            return BiasChange(None, (ReasonCode.BIAS_BEYOND_DTYPE(dtype=after.dtype),))
        reasons = (ReasonCode.BIAS_ADDED(),) if layer.bias is None else ()
        if _linear(self._step(layer.name)).part == DEPTHWISE:
            reasons = (ReasonCode.BIAS_IN_NEXT(),)
        return BiasChange((after.astype(np.float64) - before).reshape(-1), reasons)

    def with_shifts(self, shifts: Mapping[str, Shift]) -> KerasNetwork:
        """A copy with these shifts added to the biases of layers.

        They are to keep means as they are, so what is known of these stays.
        """
        biases = {**self._values.biases, **self._biases(shifts)}
        return self._with(replace(self._values, biases=biases))

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> KerasNetwork:
        """A copy in which layers read their input moved to a grid."""
        quantizers = {**self._values.quantizers, **quantizations}
        return self._with(replace(self._values, quantizers=quantizers))

    def edited(self, edits: Edits) -> KerasNetwork:
        """A copy with these edits. Raises ValueError for what is not in the model, or has another shape."""
        self._check(edits)
        layers = {layer.name: layer for layer in self.layers}
        weights = {self._step(name).first: _variable(self._step(name), each) for name, each in edits.weights.items()}
        biases = {self._step(name).first: _bias(layers[name], each) for name, each in edits.biases.items()}
        limits = {self._step(name).first: (np.asarray(low), np.asarray(high)) for name, (low, high) in edits.limits.items()}
        values = Values(
            {**self._values.weights, **weights},
            {**self._values.biases, **biases},
            {**self._values.limits, **limits},
            self._values.quantizers,
            self._values.removed | {self._step(name).first for name in edits.removed},
        )
        return self._with(values, self._edited_statistics(edits, values))

    def _with(self, values: Values, statistics: Mapping[str, BatchNorm] | None = None) -> KerasNetwork:
        known = self._statistics if statistics is None else statistics
        return KerasNetwork(self._source, self._all, self._functions, values, known)

    def _edited_statistics(self, edits: Edits, values: Values) -> dict[str, BatchNorm]:
        """Where two tensors have become one, the later one counts."""
        renamed = _renamed(self._all, values.removed)
        position = {name: k for k, step in enumerate(self._all.steps) for name in step.outputs}
        statistics = {}
        for entries in (self._statistics, edits.statistics):
            for tensor in sorted(entries, key=lambda name: position.get(name, -1)):
                statistics[renamed.get(tensor, tensor)] = entries[tensor]
        return statistics

    def _check(self, edits: Edits) -> None:
        layers = {layer.name: layer for layer in self.layers}
        names = {"layer": {*edits.weights, *edits.biases} - set(layers), "operation": {*edits.limits, *edits.removed}}
        names["operation"] -= set(self.order)
        for kind, unknown in names.items():
            for name in sorted(unknown):
                raise ValueError(f"edits: {name!r} is no {kind} of the model")
        for name, weights in edits.weights.items():
            if tuple(weights.shape) != layers[name].weights.shape:
                raise ValueError(f"layer {name}: weights of shape {weights.shape}, expected {layers[name].weights.shape}")

    def _biases(self, shifts: Mapping[str, Shift]) -> dict[str, NDArray[Any]]:
        """The biases of layers with these shifts added, by the first calls of the layers."""
        found = {}
        for layer in self.layers:
            if layer.name in shifts:
                shift = aligned(shifts[layer.name], layer.output_axis)
                before = np.zeros(()) if layer.bias is None else layer.bias
                with np.errstate(over="ignore"):
                    found[self._step(layer.name).first] = (before + shift).astype(_bias_dtype(layer))
        return found

    def _step(self, name: str) -> Step:
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self._steps}

    def _operation(self, step: Step) -> Operation:
        is_lasting = self._all.others.isdisjoint(step.outputs)
        inputs = tuple(dict.fromkeys(step.inputs))
        return Operation(step.name, inputs, step.outputs, kind_of(step), is_lasting, self._is_called_again(step))

    def _layer(self, step: Step) -> Layer:
        linear = _linear(step)
        weights = self._values.weights.get(step.first)
        bias = self._values.biases.get(step.first)
        return Layer(
            step.name,
            type(linear.layer).__name__,
            linear.weights if weights is None else linear.weights_of(weights),
            linear.layout,
            step.inputs[0],
            None,
            linear.axis,
            step.outputs[0],
            linear.axis,
            groups=linear.groups,
            window=linear.window,
            bias=linear.bias if bias is None else bias,
            shares_weights=self._is_called_again(step),
            call_of=None if step.name == step.first else step.first,
        )

    def _is_called_again(self, step: Step) -> bool:
        return self._calls[step.first] > 1

    @functools.cached_property
    def _calls(self) -> collections.Counter[str]:
        return collections.Counter(step.first for step in self._all.steps)

    def save(self, path: str | PathLike[str], *, force: bool = False, provenance: str | None = None) -> None:
        """Writes a .keras file, whole or not at all.

        Provenance is a member of it, :data:`biascorr.adapters.keras.files.PROVENANCE`.
        """
        files.save(self.model, text_of(self.model), path, force=force, provenance=provenance)


def _arrived(given: Sent, values: Values, statistics: Mapping[str, BatchNorm]) -> KerasNetwork:
    """The network that was pickled."""
    source, steps = received(given)
    weights = {name: tf.convert_to_tensor(each) for name, each in values.weights.items()}
    return KerasNetwork(source, steps, Functions(), replace(values, weights=weights), statistics)


def _linear(step: Step) -> Linear:
    assert step.linear is not None
    return step.linear


def _input(name: str, tensor: Any) -> ModelInput:
    if tensor.dtype == "string":
        raise ValueError(f"input {name} takes text, expected a model of numbers: give the one after the text is vectorized")
    return ModelInput(name, np.dtype(tensor.dtype), tuple(tensor.shape))


def _variable(step: Step, weights: Constant) -> Any:
    """Weights as the layer has them."""
    linear = _linear(step)
    values = np.asarray(weights).astype(linear.weights.dtype, copy=False)
    return tf.convert_to_tensor(linear.to_variable(values), getattr(linear.layer, linear.variable).dtype)


def _bound(limit: NDArray[Any]) -> Bound:
    return tuple(np.asarray(limit, dtype=np.float64).ravel().tolist())


def _bias_dtype(layer: Layer) -> np.dtype[Any]:
    return layer.weights.dtype if layer.bias is None else layer.bias.dtype


def _bias(layer: Layer, bias: NDArray[Any]) -> NDArray[Any]:
    """A bias aligned with the output of a layer, in its type."""
    shape = aligned(np.empty(layer.channels), layer.output_axis).shape
    if bias.size != layer.channels:
        raise ValueError(f"layer {layer.name}: bias of shape {bias.shape}, expected {(layer.channels,)}")
    return bias.reshape(shape).astype(_bias_dtype(layer))


def _renamed(steps: Steps, removed: frozenset[str]) -> dict[str, str]:
    """The tensors of removed steps, and those in their place; outputs of the model stay."""
    renamed: dict[str, str] = {}
    for step in steps.steps:
        if step.first in removed and step.outputs[0] not in steps.outputs:
            renamed |= {made: renamed.get(read, read) for read, made in zip(step.inputs, step.outputs)}
    return renamed


def _without(steps: Steps, removed: frozenset[str]) -> list[Step]:
    """The steps that are left, reading what is in the place of removed tensors."""
    renamed = _renamed(steps, removed)
    kept = [step for step in steps.steps if step.outputs[0] not in renamed]
    return [replace(step, inputs=tuple(renamed.get(name, name) for name in step.inputs)) for step in kept]


def _with_quantizers(
    steps: Sequence[Step], quantizers: Mapping[str, Quantization], shapes: Mapping[str, tuple[int | None, ...]]
) -> tuple[list[Step], dict[str, tuple[int | None, ...]]]:
    """The steps with one before each layer that is to read its input on a grid; the shapes of tensors."""
    made: list[Step] = []
    known = dict(shapes)
    for step in steps:
        if step.linear is not None and step.name in quantizers:
            moved, name = f"{step.name}/quantized", f"{step.name}/quantizer"
            made.append(Step(name, name, step.inputs, (moved,), step.operation, quantization=quantizers[step.name]))
            known |= {moved: shapes[step.inputs[0]]} if step.inputs[0] in shapes else {}
            step = replace(step, inputs=(moved,))
        made.append(step)
    return made, known
