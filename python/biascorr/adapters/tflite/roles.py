"""The roles of TFLite operators between layers: activations, what passes channels on. Channels are last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from biascorr.adapters.tflite.graph import Graph, Operator
from biascorr.graph.axes import Order
from biascorr.graph.operations import Activation, ActivationType, Bound, ChannelPreserving, Kind, Leaky, Role, SpatialEffect

_LIMITS = {
    "RELU": ActivationType.relu,
    "RELU6": ActivationType.relu6,
    "RELU_0_TO_1": ActivationType.clip(0.0, 1.0),
    "RELU_N1_TO_1": ActivationType.clip(-1.0, 1.0),
}

_ACTIVATIONS = ("ELU", "GELU", "HARD_SWISH", "LOGISTIC", "TANH")
"""Those that do more than limit values."""

_POINTWISE = {
    *_LIMITS, *_ACTIVATIONS, "ABS", "ADD", "ADD_N", "CAST", "CEIL", "COS", "DIV", "EXP", "FLOOR", "FLOOR_DIV", "FLOOR_MOD",
    "LEAKY_RELU", "LOG", "MAXIMUM", "MINIMUM", "MUL", "NEG", "POW", "PRELU", "ROUND", "RSQRT", "SIGN", "SIN", "SQRT", "SQUARE",
    "SQUARED_DIFFERENCE", "SUB",
}  # fmt: skip
"""Operators each element of whose output depends on the same elements of their inputs."""

_RESHAPES = ("EXPAND_DIMS", "RESHAPE", "SQUEEZE")


def kind_of(operator: Operator) -> Kind:
    """The kind of an operator that is no layer."""
    kinds = {"QUANTIZE": Kind.QUANTIZE, "DEQUANTIZE": Kind.DEQUANTIZE, "SHAPE": Kind.SHAPE}
    return kinds.get(operator.kind, Kind.POINTWISE if operator.kind in _POINTWISE else Kind.OTHER)


def role_of(graph: Graph, operator: Operator, source: tuple[int | None, ...], made: tuple[int | None, ...]) -> Role | None:
    """The role of an operator that reads a tensor of one shape, and makes one of another."""
    kind, constants = operator.kind, [each for each in operator.inputs if each in graph.constants and graph.is_stored(each)]
    if kind in _LIMITS:
        return Activation(_LIMITS[kind], -1, True)
    if kind in _ACTIVATIONS:
        return Activation(ActivationType.other, -1, False)
    if kind == "LEAKY_RELU" or (kind == "PRELU" and len(constants) == 1):
        return Leaky()
    if kind in ("MAXIMUM", "MINIMUM") and len(constants) == 1 and operator.inputs[1] == constants[0]:
        bound = _bound(graph.real(constants[0]), source)
        both = (bound, math.inf) if kind == "MAXIMUM" else (-math.inf, bound)
        return None if bound is None else Activation(ActivationType.clip(*both), -1, True)
    if kind in ("PAD", "PADV2") and _pads_space(graph, operator):
        return ChannelPreserving(SpatialEffect.PADDING, -1, -1)
    if kind == "MEAN" and len(constants) == 1 and _are_spatial(graph.value(constants[0]).ravel().tolist(), len(source)):
        return ChannelPreserving(SpatialEffect.AVERAGE, -1, -1)
    return _reshape(source, made) if kind in _RESHAPES else None


def _bound(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], shape: tuple[int | None, ...]) -> Bound | None:
    """A number, or one for each channel."""
    if np.isnan(values).any() or values.ndim > max(1, len(shape)):
        return None
    if values.size == 1:
        return float(values.item())
    is_along = bool(shape) and values.shape[-1] == values.size == shape[-1]
    return tuple(values.ravel().astype(np.float64).tolist()) if is_along else None


def _pads_space(graph: Graph, operator: Operator) -> bool:
    """Whether zeros are put around positions alone."""
    constants = [index for index in operator.inputs[1:] if graph.is_stored(index)]
    if len(constants) != len(operator.inputs) - 1:
        return False
    pads = graph.value(constants[0])
    is_zero = len(constants) == 1 or not np.any(graph.real(constants[1]))
    return is_zero and pads.ndim == 2 and not pads[[0, -1]].any()


def _are_spatial(axes: Sequence[int], rank: int) -> bool:
    """Whether axes to average over are neither that of samples nor the last one."""
    found = {axis % rank for axis in axes} if rank else set()
    return bool(found) and not found & {0, rank - 1}


def _reshape(source: tuple[int | None, ...], made: tuple[int | None, ...]) -> Role | None:
    """A reshape of one value per channel, or one that makes rows of all positions and channels."""
    if _is_row(source) and _is_row(made) and source[-1] == made[-1]:
        return ChannelPreserving(SpatialEffect.NONE, -1, -1)
    rest = source[1:]
    is_flat = len(source) > 2 and len(made) == 2 and None not in rest and made[1] == math.prod(each or 0 for each in rest)
    return ChannelPreserving(SpatialEffect.FLATTEN, -1, -1, Order.TILED) if is_flat and source[0] == made[0] else None


def _is_row(shape: tuple[int | None, ...]) -> bool:
    """Whether each sample has one value per channel, along the last axis."""
    return len(shape) > 1 and shape[-1] is not None and all(size == 1 for size in shape[1:-1])
