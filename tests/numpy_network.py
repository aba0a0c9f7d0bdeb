"""A second adapter, as small as one can be: networks of plain numpy operations whose channels are along the last axis.

    conv2d        (N, H, W, I) -> (N, H', W', O)   weights HWIO; strides, padding ((before, after), (before, after)), groups
    depthwise     (N, H, W, C) -> (N, H', W', C*M) weights HWCM; strides, padding
    dense         (N, *S, I) -> (N, *S, O)         weights IO
    batch_norm    over the last axis               beta, gamma, mean, variance, epsilon
    clip          min(max(x, low), high)           each a number or (C,): relu is clip(0, inf)
    leaky, hard_swish, identity, softmax, add      element by element; the softmax over channels
    pad           zeros around positions           pads, as the padding of a conv2d
    average       over all positions               keepdims
    flatten       (N, H, W, C) -> (N, H*W*C)       channels are tiled
    quantize, dequantize                           step, zero_point, dtype of the codes

Everything is computed in float64 and rounded once, to float32. There is a class for each protocol of
:mod:`biascorr.graph.network`, and each is all that an adapter of that ability has.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from biascorr.graph.axes import Order
from biascorr.graph.layer import Layer
from biascorr.graph.network import Allocator, BiasChange, Edits, Feeds, ModelInput, Shift
from biascorr.graph.operations import (
    Activation,
    ActivationType,
    BatchNorm,
    Bound,
    ChannelPreserving,
    Facts,
    Kind,
    Leaky,
    Operation,
    Role,
    SpatialEffect,
)
from biascorr.graph.reasons import LayerReport, ReasonCode
from biascorr.quantization import Quantization
from biascorr.windows import Window

Array = np.ndarray[Any, np.dtype[Any]]
Given = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Node:
    """An operation of the module's table; `given` are its constants, a bias of a layer among them.

    A later call of a layer has the weights and the bias of the first, which `call_of` names.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    given: Given = field(default_factory=dict)
    call_of: str | None = None

    @property
    def first_call(self) -> str:
        """The name that weights and biases are given by."""
        return self.call_of or self.name

    def with_given(self, **given: Any) -> Node:
        """With other constants; None leaves one as it is."""
        return replace(self, given={**self.given, **{key: each for key, each in given.items() if each is not None}})


def node(name: str, op: str, inputs: str, output: str, **given: Any) -> Node:
    """Its inputs are separated by blanks."""
    return Node(name, op, tuple(inputs.split()), output, given)


def call(name: str, first: Node, inputs: str, output: str) -> Node:
    """A later call of a layer."""
    return replace(first, name=name, inputs=tuple(inputs.split()), output=output, call_of=first.name)


LAYOUTS = {"conv2d": "HWIO", "depthwise": "HWCM", "dense": "IO"}
"""Layers, and the axes of their weights."""

_KINDS = {"quantize": Kind.QUANTIZE, "dequantize": Kind.DEQUANTIZE} | dict.fromkeys(
    ("add", "batch_norm", "clip", "fake_quantize", "hard_swish", "identity", "leaky"), Kind.POINTWISE
)


# What operations do: arrays are float64


def _windows(given: Given, x: Array) -> Array:
    """What each output position sees, (N, H', W', C, KH, KW)."""
    rows, columns = given.get("strides", (1, 1))
    padded = np.pad(x, ((0, 0), *given.get("padding", ((0, 0), (0, 0))), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, given["weights"].shape[:2], (1, 2))[:, ::rows, ::columns]


def _conv2d(given: Given, x: Array) -> Array:
    groups = given.get("groups", 1)
    parts = zip(np.split(_windows(given, x), groups, axis=3), np.split(given["weights"], groups, axis=3))
    products = [np.tensordot(seen, kernel.astype(np.float64), ((4, 5, 3), (0, 1, 2))) for seen, kernel in parts]
    return np.concatenate(products, axis=-1) + given.get("bias", 0.0)


def _depthwise(given: Given, x: Array) -> Array:
    products = np.einsum("nxychw,hwcm->nxycm", _windows(given, x), given["weights"].astype(np.float64))
    return products.reshape(*products.shape[:3], -1) + given.get("bias", 0.0)


def _dense(given: Given, x: Array) -> Array:
    return x @ given["weights"].astype(np.float64) + given.get("bias", 0.0)


def _batch_norm(given: Given, x: Array) -> Array:
    gamma, beta, mean, variance = (given[key].astype(np.float64) for key in ("gamma", "beta", "mean", "variance"))
    return gamma * (x - mean) / np.sqrt(variance + given["epsilon"]) + beta


def _softmax(_: Given, x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _average(given: Given, x: Array) -> Array:
    return x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=given["keepdims"])


def _quantize(given: Given, x: Array) -> Array:
    limits = np.iinfo(given["dtype"])
    return np.clip(np.rint(x / given["step"]) + given["zero_point"], limits.min, limits.max).astype(given["dtype"])


def _fake_quantize(given: Given, x: Array) -> Array:
    quantization, scale = given["quantization"], np.float32(given["quantization"].scale)
    least = -(2 ** (quantization.bits - 1)) - quantization.zero_point
    steps = (x * scale).astype(np.float32)  # rounded as float32 rounds it: samples may be half way between two steps
    return np.rint(np.clip(steps, least, least + 2**quantization.bits - 1)).astype(np.float64) / scale


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "conv2d": _conv2d,
    "depthwise": _depthwise,
    "dense": _dense,
    "batch_norm": _batch_norm,
    "clip": lambda given, x: np.minimum(np.maximum(x, given["low"]), given["high"]),
    "leaky": lambda given, x: np.where(x < 0, given["alpha"] * x, x),
    "hard_swish": lambda _, x: x * np.clip(x / 6 + 0.5, 0, 1),
    "identity": lambda _, x: x,
    "softmax": _softmax,
    "add": lambda _, x, y: x + y,
    "pad": lambda given, x: np.pad(x, ((0, 0), *given["pads"], (0, 0))),
    "average": _average,
    "flatten": lambda _, x: x.reshape(len(x), -1),
    "quantize": _quantize,
    "dequantize": lambda given, x: (x - given["zero_point"]) * np.float64(given["step"]),
    "fake_quantize": _fake_quantize,
}


def _computed(step: Node, arrays: Sequence[Array]) -> Array:
    """A new array: codes, or float32."""
    result = _FUNCTIONS[step.op](step.given, *(array.astype(np.float64) for array in arrays))
    return result if result.dtype.kind in "iu" else result.astype(np.float32)


def _bound(value: ArrayLike) -> Bound:
    """One for all channels, where they have the same."""
    array = np.atleast_1d(np.asarray(value, dtype=np.float64))
    return float(array[0]) if (array == array[0]).all() else tuple(array.tolist())


# The protocols


@dataclass(frozen=True, eq=False)
class ReadableNetwork:
    """A network that can be read and run.

    Parameters
    ----------
    inputs : sequence of ModelInput
        With shapes.
    nodes : sequence of Node
        In topological order; their names are unique.
    outputs : sequence of str
        Tensors.
    statistics : mapping from str to BatchNorm
        See :class:`~biascorr.graph.operations.Facts`.
    counts_from_start : bool
        Whether axes are counted from the start, as far as the engine allows both, instead of from the end.
    """

    inputs: Sequence[ModelInput]
    nodes: Sequence[Node]
    outputs: Sequence[str]
    statistics: Mapping[str, BatchNorm] = field(default_factory=dict)
    counts_from_start: bool = False

    unsupported: tuple[LayerReport, ...] = field(default=(), init=False)

    @property
    def order(self) -> Sequence[str]:
        return [each.name for each in self.nodes]

    @property
    def operations(self) -> Sequence[Operation]:
        return [Operation(each.name, each.inputs, (each.output,), _KINDS.get(each.op, Kind.OTHER)) for each in self.nodes]

    @functools.cached_property
    def layers(self) -> Sequence[Layer]:
        return [self._layer(each) for each in self.nodes if each.op in LAYOUTS]

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(repr((self.inputs, self.outputs, sorted(self.statistics.items()))).encode())
        for each in self.nodes:
            digest.update(repr((each.name, each.op, each.inputs, each.output, each.call_of)).encode())
            for name, value in sorted(each.given.items()):
                array = np.asarray(value)
                digest.update(
                    f"{name} {array.dtype} {array.shape}".encode()
                    + (array.tobytes() if array.dtype.kind != "O" else repr(value).encode())
                )
        return digest.hexdigest()

    def facts(self) -> Facts:
        roles = {each.name: self._role(each) for each in self.nodes}
        return Facts({name: role for name, role in roles.items() if role is not None}, self._shapes, self.statistics)

    def part(
        self,
        given: Feeds,
        wanted: Sequence[str],
        *,
        threads: int = 0,  # noqa: ARG002
        allocator: Allocator | None = None,
    ) -> Callable[[Feeds], dict[str, Array]]:
        needed, steps = set(wanted).difference(given), []
        for each in reversed(self.nodes):
            if each.output in needed:
                steps.append(each)
                needed.update(name for name in each.inputs if name not in given)

        def compute(feeds: Feeds) -> dict[str, Array]:
            tensors = dict(feeds)
            for step in reversed(steps):
                tensors[step.output] = _computed(step, [tensors[name] for name in step.inputs])
            return {name: feeds[name] if name in feeds else _written(tensors[name], allocator) for name in wanted}

        return compute

    @functools.cached_property
    def _shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        """Sizes that stay where those that may be any are others."""
        names = [each.name for each in self.inputs] + [each.output for each in self.nodes]
        shapes = []
        for size in (16, 32):
            shape_of = {each.name: [size if n is None else n for n in each.shape or ()] for each in self.inputs}
            feeds = {each.name: np.zeros(shape_of[each.name], each.dtype) for each in self.inputs}
            shapes.append({name: array.shape for name, array in self.part(feeds, names)(feeds).items()})
        return {name: tuple(a if a == b else None for a, b in zip(*(each[name] for each in shapes))) for name in names}

    def _axis(self, tensor: str) -> int:
        """Of the channels of a tensor."""
        return len(self._shapes[tensor]) - 1 if self.counts_from_start else -1

    def _layer(self, each: Node) -> Layer:
        weights, tensor, quantization = each.given["weights"], *self._read(each.inputs[0])
        window = None
        if each.op != "dense":
            strides, pads = each.given.get("strides", (1, 1)), each.given.get("padding", ((0, 0), (0, 0)))
            window = Window(weights.shape[:2], strides, (1, 1), pads)
        return Layer(
            each.name,
            each.op,
            weights,
            LAYOUTS[each.op],
            tensor,
            quantization,
            self._axis(tensor),
            each.output,
            -1,
            groups=each.given.get("groups", 1),
            window=window,
            bias=each.given.get("bias"),
            shares_weights=sum(other.first_call == each.first_call for other in self.nodes) > 1,
            call_of=each.call_of,
        )

    def _read(self, tensor: str) -> tuple[str, Quantization | None]:
        """Codes and their quantization, where a tensor is dequantized from some."""
        for each in self.nodes:
            if each.output == tensor and each.op == "dequantize":
                return each.inputs[0], Quantization.from_step(float(each.given["step"]), each.given["zero_point"])
        return tensor, None

    def _role(self, each: Node) -> Role | None:
        given, axes = each.given, (self._axis(each.inputs[0]), self._axis(each.output))
        if each.op == "batch_norm":
            parameters = (given[key].astype(np.float64) for key in ("beta", "gamma", "mean", "variance"))
            return BatchNorm(each.name, *parameters, given["epsilon"], axes[0])
        if each.op == "clip":
            return Activation(ActivationType.clip(_bound(given["low"]), _bound(given["high"])), axes[0], True)
        passages = {
            "identity": ChannelPreserving(SpatialEffect.NONE),
            "average": ChannelPreserving(SpatialEffect.AVERAGE, *axes),
            "pad": ChannelPreserving(SpatialEffect.PADDING, *axes),
            "flatten": ChannelPreserving(SpatialEffect.FLATTEN, *axes, Order.TILED),
        }
        others = {"leaky": Leaky(), "hard_swish": Activation(ActivationType.other, axes[0], False)}
        return (passages | others).get(each.op)


def _written(array: Array, allocator: Allocator | None) -> Array:
    """In memory of the allocator, where there is one."""
    if allocator is None:
        return array
    out = allocator.take(array.shape, array.dtype)
    out[...] = array
    return out


class BiasedNetwork(ReadableNetwork):
    """A network whose biases can be changed, and nothing else of it."""

    @property
    def model(self) -> BiasedNetwork:
        """It is its own model."""
        return self

    def check(self) -> None:
        """There is nothing that does not take it."""

    def deployed(self, *, threads: int = 0, optimized: bool = True) -> Callable[[Feeds], dict[str, Any]]:  # noqa: ARG002
        return lambda feeds: self.part(feeds, self.outputs, threads=threads)(feeds)

    def bias_change(self, layer: Layer, shift: Shift) -> BiasChange:
        before = np.zeros(layer.channels) if layer.bias is None else layer.bias
        change = np.subtract((before + shift).astype(np.float32), before, dtype=np.float64)
        return BiasChange(change, (ReasonCode.BIAS_ADDED(),) if layer.bias is None else ())

    def with_shifts(self, shifts: Mapping[str, Shift]) -> BiasedNetwork:
        biases = {
            layer.name: ((0.0 if layer.bias is None else layer.bias) + shifts[layer.name]).astype(np.float32)
            for layer in self.layers
            if layer.name in shifts
        }
        return replace(self, nodes=[each.with_given(bias=biases.get(each.first_call)) for each in self.nodes])

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        if Path(path).exists() and not force:
            raise FileExistsError(f"{path} exists")
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_bytes(pickle.dumps(self))
        unfinished.replace(path)


class NumpyNetwork(BiasedNetwork):
    """A network whose weights, bounds and operations can be changed too."""

    def edited(self, edits: Edits) -> NumpyNetwork:
        named = {*edits.weights, *edits.biases, *edits.limits, *edits.removed}
        for name in sorted(named.difference(self.order)):
            raise ValueError(f"edits: {name!r} is no operation of the model")
        for name in sorted({*edits.weights, *edits.biases}.intersection(each.name for each in self.nodes if each.call_of)):
            raise ValueError(f"edits: {name!r} is a later call of a layer")
        renamed: dict[str, str] = {}
        nodes = []
        for each in self.nodes:
            inputs = tuple(renamed.get(name, name) for name in each.inputs)
            if each.name in edits.removed and each.output in self.outputs:  # which keep their names
                nodes.append(Node(each.name, "identity", inputs, each.output))
            elif each.name in edits.removed:
                renamed[each.output] = inputs[0]
            else:
                nodes.append(replace(each, inputs=inputs).with_given(**dict(_edited(each, edits))))
        position = {each.output: k for k, each in enumerate(self.nodes)}
        statistics = {}
        for entries in (self.statistics, edits.statistics):  # where two tensors have become one, the later one counts
            for tensor in sorted(entries, key=lambda name: position.get(name, -1)):
                statistics[renamed.get(tensor, tensor)] = entries[tensor]
        return replace(self, nodes=nodes, statistics=statistics)

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> NumpyNetwork:
        nodes = []
        for each in self.nodes:
            if each.name in quantizations:
                (tensor,), moved = each.inputs, f"{each.name}_input"
                nodes.append(node(f"{moved}_quantizer", "fake_quantize", tensor, moved, quantization=quantizations[each.name]))
                each = replace(each, inputs=(moved,))
            nodes.append(each)
        return replace(self, nodes=nodes)


def _edited(each: Node, edits: Edits) -> Iterator[tuple[str, Array]]:
    """The constants of a node that are different."""
    layer = each.first_call
    if layer in edits.weights:
        yield "weights", np.asarray(edits.weights[layer]).astype(np.float32)
    if layer in edits.biases:
        yield "bias", edits.biases[layer].astype(np.float32)
    if each.name in edits.limits:
        for key, limit in zip(("low", "high"), edits.limits[each.name]):
            yield key, np.asarray(limit, dtype=np.float32)
