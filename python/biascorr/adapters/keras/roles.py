"""The roles of Keras layers and operations between layers: normalizations, activations, what passes channels on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from biascorr.adapters.keras.linear import array_of
from biascorr.adapters.keras.steps import Step, Steps
from biascorr.graph.axes import Order
from biascorr.graph.operations import (
    Activation,
    ActivationType,
    BatchNorm,
    Bound,
    ChannelPreserving,
    Kind,
    Leaky,
    Role,
    SpatialEffect,
)

_FUNCTIONS = {
    getattr(keras.activations, name)
    for name in (
        "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu", "linear",
        "log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink", "softplus", "softsign", "sparse_plus",
        "squareplus", "tanh", "tanh_shrink", "threshold",
    )
    if hasattr(keras.activations, name)
}  # fmt: skip
"""Activation functions of each value; softmax is none."""

_SAME = (
    layers.ActivityRegularization, layers.AlphaDropout, layers.Dropout, layers.GaussianDropout, layers.GaussianNoise,
    layers.Identity, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D,
)  # fmt: skip
"""Layers that do nothing to what they read but in training."""

_POINTWISE = (
    *_SAME, layers.Add, layers.Average, layers.BatchNormalization, layers.ELU, layers.LeakyReLU, layers.Maximum, layers.Minimum,
    layers.Multiply, layers.PReLU, layers.ReLU, layers.Rescaling, layers.Subtract,
)  # fmt: skip
"""Layers each element of whose output depends on the same elements of their inputs."""

_POINTWISE_OPERATIONS = {
    "Absolute", "Abs", "Add", "Cast", "Celu", "Clip", "Divide", "Elu", "Erf", "Exp", "Gelu", "HardShrink", "HardSigmoid",
    "HardSilu", "HardTanh", "Identity", "LeakyRelu", "LogSigmoid", "Maximum", "Minimum", "Multiply", "Negative", "Power",
    "Relu", "Relu6", "Selu", "Sigmoid", "Silu", "SoftShrink", "Softplus", "Softsign", "SparsePlus", "Sqrt", "Square",
    "Squareplus", "Subtract", "Tanh", "TanhShrink", "Threshold", "TrueDivide",
}  # fmt: skip
"""Operations of keras.ops of the same kind, by their classes."""

_PADDING = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)

_AVERAGES = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)


def kind_of(step: Step) -> Kind:
    """The kind of a step that is no product."""
    operation = step.operation
    if step.quantization is not None:
        is_pointwise = True
    elif step.function is not None:
        is_pointwise = isinstance(step.function, _POINTWISE) or step.function in _FUNCTIONS
    elif isinstance(operation, keras.Layer):
        is_pointwise = isinstance(operation, _POINTWISE)
    else:
        is_pointwise = operation_of(step) in _POINTWISE_OPERATIONS
    return Kind.POINTWISE if is_pointwise and step.linear is None else Kind.OTHER


def operation_of(step: Step) -> str:
    """The class of an operation of keras.ops; empty for anything else."""
    operation = step.operation
    is_own = not isinstance(operation, keras.Layer) and type(operation).__module__.startswith("keras.")
    return type(operation).__name__ if is_own else ""


def channel_axes(steps: Steps) -> dict[str, int]:
    """The axis of channels of each tensor, from the end: that of the nearest layer before it; the last one where none says."""
    axes: dict[str, int] = {}
    for step in steps.steps:
        source = step.inputs[0]
        rank = len(steps.shapes.get(step.outputs[0], ()))
        axis = axes.get(source, -1) if len(steps.shapes.get(source, ())) == rank else -1
        if step.linear is not None:
            axis = step.linear.axis
        elif isinstance(step.operation, layers.BatchNormalization):
            axis = step.operation.axis - rank if step.operation.axis >= 0 else step.operation.axis
        axes.update(dict.fromkeys(step.outputs, axis))
    return axes


def roles_of(steps: Steps) -> dict[str, Role]:
    """The roles of steps, by name."""
    axes = channel_axes(steps)
    found = {step.name: _role(step, steps.shapes, axes) for step in steps.steps if step.linear is None}
    return {name: role for name, role in found.items() if role is not None}


def _role(step: Step, shapes: Mapping[str, tuple[int | None, ...]], axes: Mapping[str, int]) -> Role | None:
    operation, axis = step.operation, axes.get(step.inputs[0], -1)
    if step.quantization is not None:
        return None
    if step.function is not None:
        return _role_of_function(step.function, axis)
    if isinstance(operation, layers.BatchNormalization):
        return _batch_norm(step.name, operation)
    if isinstance(operation, (layers.ReLU, layers.LeakyReLU, layers.PReLU)):
        return _role_of_relu(operation, axis)
    if isinstance(operation, layers.ELU):
        return Activation(ActivationType.other, axis, False)
    if isinstance(operation, _SAME) or operation_of(step) == "Identity":
        return ChannelPreserving(SpatialEffect.NONE)
    if not isinstance(operation, keras.Layer):
        return _role_of_operation(step, shapes, axis)
    before, after = (shapes.get(name, ()) for name in (step.inputs[0], step.outputs[0]))
    first = getattr(operation, "data_format", "channels_last") == "channels_first"
    own = 1 if first else -1
    if isinstance(operation, _PADDING):
        return ChannelPreserving(SpatialEffect.PADDING, own, own)
    if isinstance(operation, _AVERAGES):
        return ChannelPreserving(SpatialEffect.AVERAGE, own, own if operation.keepdims else -1)
    if isinstance(operation, layers.Flatten):
        return _flatten(before, 1 if first else axis, moves_channels=first)
    if isinstance(operation, layers.Reshape):
        return _reshape(before, after, axis)
    return None


def _role_of_function(function: Callable[[Any], Any], axis: int) -> Role | None:
    if function is keras.activations.linear:
        return ChannelPreserving(SpatialEffect.NONE)
    if function is keras.activations.leaky_relu:
        return Leaky()
    if isinstance(function, (layers.ReLU, layers.LeakyReLU, layers.PReLU)):
        return _role_of_relu(function, axis)
    limiting = {keras.activations.relu: ActivationType.relu, keras.activations.relu6: ActivationType.relu6}
    if isinstance(function, keras.Layer) or function not in _FUNCTIONS:
        return None
    return Activation(limiting.get(function, ActivationType.other), axis, function in limiting)


def _role_of_relu(layer: Any, axis: int) -> Role:
    if not isinstance(layer, layers.ReLU):
        return Leaky()
    slope, threshold, limit = (float(each or 0.0) for each in (layer.negative_slope, layer.threshold, layer.max_value))
    if threshold or (slope and layer.max_value is not None):
        return Activation(ActivationType.other, axis, False)
    if slope:
        return Leaky()
    return Activation(ActivationType.clip(0.0, math.inf if layer.max_value is None else limit), axis, True)


def _batch_norm(name: str, layer: Any) -> BatchNorm:
    mean, variance = (array_of(each).astype(np.float64) for each in (layer.moving_mean, layer.moving_variance))
    gamma = array_of(layer.gamma).astype(np.float64) if layer.scale else np.ones_like(mean)
    beta = array_of(layer.beta).astype(np.float64) if layer.center else np.zeros_like(mean)
    return BatchNorm(name, beta, gamma, mean, variance, layer.epsilon, layer.axis)


def _role_of_operation(step: Step, shapes: Mapping[str, tuple[int | None, ...]], axis: int) -> Role | None:
    name, operation = operation_of(step), step.operation
    before, after = (shapes.get(each, ()) for each in (step.inputs[0], step.outputs[0]))
    if name in ("Relu", "Relu6"):
        return Activation(ActivationType.relu if name == "Relu" else ActivationType.relu6, axis, True)
    if name == "LeakyRelu":
        return Leaky()
    if name in ("Clip", "Maximum", "Minimum"):
        bounds = _bounds(step, name, before, axis)
        return None if bounds is None else Activation(ActivationType.clip(*bounds), axis, True)
    if name == "Mean" and axis == -1 and _are_spatial(operation.axis, len(before)):
        return ChannelPreserving(SpatialEffect.AVERAGE, -1, -1)
    if name == "Reshape":
        return _reshape(before, after, axis)
    is_other = name in _POINTWISE_OPERATIONS and len(step.inputs) == 1 and not step.constants
    return Activation(ActivationType.other, axis, False) if is_other else None


def _bounds(step: Step, name: str, shape: tuple[int | None, ...], axis: int) -> tuple[Bound, Bound] | None:
    """The limits that an operation sets its only tensor: numbers, or one for each channel."""
    given = (
        [step.operation.x_min, step.operation.x_max]
        if name == "Clip"
        else [each for each in step.constants if each is not None]
    )
    bounds = [_bound(each, shape, axis) for each in given]
    if len(step.inputs) != 1 or len(bounds) != (2 if name == "Clip" else 1) or None in bounds:
        return None
    low, high = bounds if name == "Clip" else [bounds[0], math.inf] if name == "Maximum" else [-math.inf, bounds[0]]
    return low, high  # type: ignore[return-value]


def _bound(value: Any, shape: tuple[int | None, ...], axis: int) -> Bound | None:
    if isinstance(value, keras.KerasTensor):
        return None
    array = np.asarray(array_of(value), dtype=np.float64)
    if np.isnan(array).any():
        return None
    if array.size == 1:
        return float(array.item())
    aligned = (1,) * (len(shape) - array.ndim) + array.shape
    is_along = len(aligned) == len(shape) and aligned[axis] == array.size == shape[axis]
    return tuple(array.ravel().tolist()) if is_along else None


def _are_spatial(axes: Any, rank: int) -> bool:
    """Whether axes to average over are neither that of samples nor the last one."""
    given: Iterable[int] = [axes] if isinstance(axes, int) else axes or ()
    found = {each % rank for each in given} if rank else set()
    return bool(found) and not found & {0, rank - 1}


def _flatten(before: tuple[int | None, ...], axis: int, *, moves_channels: bool = False) -> ChannelPreserving:
    """A Flatten; for channels first, Keras moves them to the end before. One value per channel stays as it is."""
    is_each_one = [size == 1 for k, size in enumerate(before) if k not in (0, axis % len(before))]
    if before and all(is_each_one):
        return ChannelPreserving(SpatialEffect.NONE, axis, -1)
    is_last = axis in (-1, len(before) - 1)
    order = Order.TILED if is_last or moves_channels else Order.REPEATED
    return ChannelPreserving(SpatialEffect.FLATTEN, axis, -1, order)


def _reshape(before: tuple[int | None, ...], after: tuple[int | None, ...], axis: int) -> ChannelPreserving | None:
    if _is_row(before) and _is_row(after) and before[-1] == after[-1]:
        return ChannelPreserving(SpatialEffect.NONE, -1, -1)
    rest = before[1:]
    is_known = len(before) > 2 and None not in rest and before[0] is None
    is_flat = is_known and len(after) == 2 and after[0] is None and after[1] == math.prod(rest)  # type: ignore[arg-type]
    is_outer = axis in (-1, 1 - len(before))
    return _flatten(before, axis) if is_flat and is_outer else None


def _is_row(shape: tuple[int | None, ...]) -> bool:
    """Whether each sample has one value per channel, along the last axis."""
    return len(shape) > 1 and shape[-1] is not None and all(size == 1 for size in shape[1:-1])
