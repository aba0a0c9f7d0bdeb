"""The products with weights in Keras layers: their axes, how kernels move, and how TensorFlow computes them.

Dense                 (N, *S, I) x (I, O)               TimeDistributed(Dense) too
EinsumDense           letters that only the input and the kernel have are I, those of the kernel and the output O
Conv1D, 2D, 3D        (N, *S, I) x (*K, I / groups, O)
Conv*Transpose        (N, *S, I) x (*K, O, I)
DepthwiseConv1D, 2D   (N, *S, C) x (*K, C, M)
SeparableConv1D, 2D   a depthwise convolution, then one with a kernel of 1
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from biascorr.graph.axes import aligned
from biascorr.graph.layer import LazyArray
from biascorr.graph.reasons import Reason, ReasonCode
from biascorr.windows import TransposedWindow, Window

_SPACE = {1: "W", 2: "HW", 3: "DHW"}

DEPTHWISE = "depthwise"
"""The part of a separable convolution that comes first."""


def array_of(values: Any) -> NDArray[Any]:
    """The values of a variable, a tensor or a number; Keras' own conversion is deprecated by numpy 2."""
    values = values.value if isinstance(values, keras.Variable) else values
    return np.asarray(values.numpy() if hasattr(values, "numpy") else values)


@dataclass(frozen=True, eq=False)
class Matrix:
    """How an EinsumDense is a product with one matrix: the axes of its input, kernel and output, by their letters.

    Parameters
    ----------
    source, kernel, target : str
        The equation, a letter for each axis.
    contracted, produced : str
        The letters that become I and O.
    """

    source: str
    kernel: str
    target: str
    contracted: str
    produced: str

    @property
    def others(self) -> str:
        """The letters that the input and the output have in common, in the order of the output."""
        return "".join(letter for letter in self.target if letter in self.source)

    def merged(self, x: Any) -> Any:
        """The input with its contracted axes as the last one."""
        x = ops.transpose(x, [self.source.index(letter) for letter in self.others + self.contracted])
        return ops.reshape(x, (*ops.shape(x)[: len(self.others)], math.prod(x.shape[len(self.others) :])))

    def split(self, y: Any, sizes: Sequence[int]) -> Any:
        """The product (*others, O) with its axes as those of the output."""
        letters = self.others + self.produced
        y = ops.reshape(y, (*ops.shape(y)[:-1], *sizes))
        return ops.transpose(y, [letters.index(letter) for letter in self.target])

    def from_kernel(self, kernel: Any) -> Any:
        """(I, O), of an array or a tensor."""
        module = np if isinstance(kernel, np.ndarray) else ops
        turned = module.transpose(kernel, [self.kernel.index(letter) for letter in self.contracted + self.produced])
        return module.reshape(turned, (math.prod(turned.shape[: len(self.contracted)]), -1))

    def to_kernel(self, matrix: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """The inverse, for a kernel of this shape."""
        letters = self.contracted + self.produced
        split = matrix.reshape([shape[self.kernel.index(letter)] for letter in letters])
        return split.transpose([letters.index(letter) for letter in self.kernel])

    def from_bias(self, bias: NDArray[Any]) -> NDArray[Any]:
        """(O,)"""
        whole = bias.reshape((1,) * (len(self.target) - bias.ndim) + bias.shape)
        return whole.transpose([self.target.index(letter) for letter in self.others + self.produced]).reshape(-1)

    def to_bias(self, values: NDArray[Any], sizes: Sequence[int]) -> NDArray[Any]:
        """The inverse, with an axis for each one of the output; `sizes` are those of the produced axes."""
        letters = self.others + self.produced
        split = values.reshape((1,) * len(self.others) + tuple(sizes))
        return split.transpose([letters.index(letter) for letter in self.target])


@dataclass(frozen=True, eq=False)
class Linear:
    """The product with weights that a Keras layer does, without its bias and its activation.

    Parameters
    ----------
    layer : keras.Layer
        The layer that has the weights.
    variable : str
        The attribute that they are.
    layout : str
        Their axes, as :class:`biascorr.graph.layer.Layer` names them.
    product : callable
        Computes it, from the input and the weights.
    axis : int
        The axis of channels, in the input and the output, from the end.
    groups, window
        As there.
    matrix : Matrix, optional
        For an EinsumDense.
    part : str
        :data:`DEPTHWISE`, of a layer that has another product after this one, and its bias there.
    """

    layer: Any
    variable: str
    layout: str
    product: Callable[[Any, Any], Any]
    axis: int = -1
    groups: int = 1
    window: Window | TransposedWindow | None = None
    matrix: Matrix | None = None
    part: str = ""

    @property
    def weights(self) -> LazyArray:
        """The weights of the layer, read when they are needed."""
        return self.weights_of(getattr(self.layer, self.variable))

    def weights_of(self, variable: Any) -> LazyArray:
        """Weights in their layout, of a variable or a tensor like that of the layer."""
        shape = tuple(variable.shape)
        if self.matrix is not None:
            shape = (math.prod(self.sizes(self.matrix.contracted)), math.prod(self.sizes(self.matrix.produced)))
        dtype = np.dtype(keras.backend.standardize_dtype(variable.dtype))
        dtype = np.dtype(np.float32) if dtype.name == "bfloat16" else dtype
        return LazyArray(shape, dtype, lambda: self.from_variable(array_of(variable).astype(dtype, copy=False)))

    def sizes(self, letters: str) -> tuple[int, ...]:
        """Sizes of axes of the kernel of an EinsumDense."""
        shape = getattr(self.layer, self.variable).shape
        return tuple(shape[self.matrix.kernel.index(letter)] for letter in letters) if self.matrix else ()

    def from_variable(self, values: NDArray[Any]) -> NDArray[Any]:
        """Weights in their layout, from those of the layer."""
        return values if self.matrix is None else np.asarray(self.matrix.from_kernel(values))

    def to_variable(self, weights: NDArray[Any]) -> NDArray[Any]:
        """The inverse."""
        shape = tuple(getattr(self.layer, self.variable).shape)
        return weights.reshape(shape) if self.matrix is None else self.matrix.to_kernel(weights, shape)

    @property
    def bias(self) -> NDArray[Any] | None:
        """The bias, its axes aligned with the last ones of the product; None where there is none, or it comes later."""
        variable = None if self.part else self.layer.bias
        if variable is None:
            return None
        bias = array_of(variable)
        return self.matrix.from_bias(bias) if self.matrix else aligned(bias, self.axis)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The shape of a bias of the layer, as it broadcasts to its output."""
        if self.matrix is not None:
            return self.matrix.to_bias(np.empty(self.weights.shape[1]), self.sizes(self.matrix.produced)).shape
        count = self.weights.shape[-2] if self.layout.endswith("OI") else self.weights.shape[-1]
        return aligned(np.empty(count * (self.weights.shape[-2] if self.layout.endswith("CM") else 1)), self.axis).shape

    def bias_to_variable(self, values: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """A bias as the layer has it, with this shape."""
        if self.matrix is not None:
            values = self.matrix.to_bias(values, self.sizes(self.matrix.produced))
        return values.reshape(shape)

    def compute(self, x: Any, weights: Any) -> Any:
        """The product, in the layer's own type, with weights as the layer has them."""
        dtype = self.layer.compute_dtype
        weights = weights if self.matrix is None else self.matrix.from_kernel(weights)
        return self.product(ops.cast(x, dtype), ops.cast(weights, dtype))


def linears_of(operation: Any, rank: int, output_shape: Sequence[int | None]) -> list[Linear] | Reason | None:
    """The products that a layer does with an input of this rank; why they cannot be corrected; None for other operations."""
    layer = operation.layer if isinstance(operation, layers.TimeDistributed) else operation
    made = next((make for cls, make in _KINDS.items() if isinstance(layer, cls) and _calls_as(layer, cls)), None)
    if made is None or (layer is not operation and not isinstance(layer, layers.Dense)):
        return None
    if layer is not operation and not _acts_on_rows(layer.activation):
        return ReasonCode.LAYERS_INSIDE()
    if getattr(layer, "quantization_mode", None) is not None:
        return ReasonCode.DYNAMIC()
    if getattr(layer, "lora_enabled", False):
        return ReasonCode.WEIGHTS_COMPUTED()
    found = made(layer, rank)
    return found if isinstance(found, Reason) else _misplaced(found[-1], output_shape) or found


def _acts_on_rows(activation: Any) -> bool:
    """Whether an activation is the same for any number of axes before the last one."""
    is_of_each_value = isinstance(activation, (layers.ELU, layers.LeakyReLU, layers.ReLU))
    return activation is None or is_of_each_value or activation in vars(keras.activations).values()


def _misplaced(linear: Linear, output_shape: Sequence[int | None]) -> Reason | None:
    """Where Keras adds the bias along another axis than that of channels, one that is as long (keras.ops.add, as of 3.15)."""
    rank = len(output_shape)
    shape = linear.bias_shape
    long = [(rank - len(shape) + k, size) for k, size in enumerate(shape) if size > 1]
    if len(long) != 1 or rank < 2:
        return None
    ((axis, size),) = long
    taken = next((each for each in (rank - 1, 1) if output_shape[each] == size), axis)
    return None if taken == axis else ReasonCode.BIAS_AXES(axes=taken, channels=axis)


def _calls_as(layer: Any, cls: type) -> bool:
    """Whether a layer, perhaps of a derived class, does what this class does."""
    own = {name: getattr(cls, name, None) for name in ("call", "convolution_op")}
    return all(getattr(type(layer), name, None) is method for name, method in own.items())


def _dense(layer: Any, rank: int) -> list[Linear]:  # noqa: ARG001
    return [Linear(layer, "kernel", "IO", ops.matmul)]


def _einsum(layer: Any, rank: int) -> list[Linear] | Reason:
    matrix = _matrix_of(layer.equation, rank)
    if matrix is None:
        return ReasonCode.NO_MATRIX_PRODUCT(equation=layer.equation)
    if layer.bias is not None and set(layer.bias_axes) != set(matrix.produced):
        return ReasonCode.BIAS_AXES(axes=layer.bias_axes, channels=matrix.produced)
    return [Linear(layer, "kernel", "IO", ops.matmul, matrix=matrix)]


def _matrix_of(equation: str, rank: int) -> Matrix | None:
    source, kernel, target = re.split(",|->", equation.replace(" ", ""))
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    implied = "".join(unused[: rank - len(source.replace("...", ""))])
    source, target = source.replace("...", implied), target.replace("...", implied)
    contracted = "".join(letter for letter in kernel if letter in source and letter not in target)
    produced = "".join(letter for letter in kernel if letter in target and letter not in source)
    others = [letter for letter in target if letter in source]
    expected = (sorted([*others, *contracted]), sorted(contracted + produced), sorted([*others, *produced]))
    is_matrix = contracted and produced and expected == (sorted(source), sorted(kernel), sorted(target))
    return Matrix(source, kernel, target, contracted, produced) if is_matrix else None


def _convolution(layer: Any, rank: int) -> list[Linear]:
    window = _window(layer, rank)
    product = functools.partial(
        _convolve,
        strides=list(layer.strides),
        padding="valid" if layer.padding == "causal" else layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
        causal=window.pads[0][0] if layer.padding == "causal" else 0,
    )
    layout = f"{_SPACE[rank - 2]}IO"
    return [Linear(layer, "kernel", layout, product, _axis(layer, rank), groups=layer.groups, window=window)]


def _convolve(x: Any, kernel: Any, *, causal: int, data_format: str, **options: Any) -> Any:
    if causal:
        pads = [(0, 0), (causal, 0), (0, 0)] if data_format == "channels_last" else [(0, 0), (0, 0), (causal, 0)]
        x = ops.pad(x, pads)
    return ops.conv(x, kernel, data_format=data_format, **options)


def _window(layer: Any, rank: int) -> Window:
    pads = ((0, 0),) * (rank - 2)
    if layer.padding == "causal":
        pads = ((layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0),)
    auto_pad = "SAME_UPPER" if layer.padding == "same" else "NOTSET"
    return Window(tuple(layer.kernel_size), tuple(layer.strides), tuple(layer.dilation_rate), pads, auto_pad)


def _depthwise(layer: Any, rank: int) -> list[Linear]:
    product = functools.partial(
        ops.depthwise_conv,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    layout = f"{_SPACE[rank - 2]}CM"
    return [Linear(layer, "kernel", layout, product, _axis(layer, rank), window=_window(layer, rank))]


def _separable(layer: Any, rank: int) -> list[Linear]:
    (first,) = _depthwise(layer, rank)
    space, axis = rank - 2, _axis(layer, rank)
    product = functools.partial(ops.conv, strides=1, padding="valid", data_format=layer.data_format)
    ones = (1,) * space
    window = Window(ones, ones, ones, ((0, 0),) * space)
    return [
        Linear(layer, "depthwise_kernel", first.layout, first.product, axis, window=first.window, part=DEPTHWISE),
        Linear(layer, "pointwise_kernel", f"{_SPACE[space]}IO", product, axis, window=window),
    ]


def _transposed(layer: Any, rank: int) -> list[Linear]:
    product = functools.partial(
        ops.conv_transpose,
        strides=list(layer.strides),
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    layout = f"{_SPACE[rank - 2]}OI"
    return [Linear(layer, "kernel", layout, product, _axis(layer, rank), window=_transposed_window(layer))]


def _transposed_window(layer: Any) -> TransposedWindow:
    taps, strides, dilations = map(tuple, (layer.kernel_size, layer.strides, layer.dilation_rate))
    given = layer.output_padding
    paddings = [given] * len(taps) if given is None or isinstance(given, int) else list(given)
    pads, added = [], []
    for tap, stride, dilation, padding in zip(taps, strides, dilations, paddings):
        reach = (tap - 1) * dilation + 1
        if layer.padding == "same":
            extra = stride - reach if padding is None else reach % 2 + padding - reach
        else:
            extra = max(stride - reach, 0) if padding is None else padding
        cut = max(-extra, 0)
        pads.append((cut // 2, cut - cut // 2))
        added.append(max(extra, 0))
    return TransposedWindow(taps, strides, dilations, tuple(pads), tuple(added))


def _axis(layer: Any, rank: int) -> int:
    return -1 if layer.data_format == "channels_last" else 1 - rank


_KINDS: dict[type, Callable[[Any, int], list[Linear] | Reason]] = {
    layers.Dense: _dense,
    layers.EinsumDense: _einsum,
    layers.DepthwiseConv1D: _depthwise,
    layers.DepthwiseConv2D: _depthwise,
    layers.SeparableConv1D: _separable,
    layers.SeparableConv2D: _separable,
    layers.Conv1DTranspose: _transposed,
    layers.Conv2DTranspose: _transposed,
    layers.Conv3DTranspose: _transposed,
    layers.Conv1D: _convolution,
    layers.Conv2D: _convolution,
    layers.Conv3D: _convolution,
}

_WITHOUT_PRODUCT = (
    layers.BatchNormalization,
    layers.Embedding,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.Normalization,
    layers.PReLU,
)
"""Layers whose weights of several axes multiply nothing, or element by element."""

_PRODUCTS = ("Conv", "ConvTranspose", "DepthwiseConv", "Dot", "Einsum", "Inner", "Matmul", "SeparableConv", "Tensordot", "Vdot")
"""Operations of keras.ops that multiply with weights where these are constant."""


def why_unsupported(operation: Any, constants: Sequence[Any]) -> Reason | None:
    """Why an operation that is no layer of the table is left as it is; None where it has no weights to correct for."""
    if not isinstance(operation, keras.Layer):
        has_weights = any(len(getattr(each, "shape", ())) > 1 for each in constants)
        return ReasonCode.OPERATOR_UNSUPPORTED() if has_weights and type(operation).__name__ in _PRODUCTS else None
    if isinstance(operation, (layers.RNN, layers.Bidirectional)):
        return ReasonCode.RECURRENT()
    inside = [each for each in operation._flatten_layers(include_self=False) if _has_matrix(each)]
    if inside:
        return ReasonCode.LAYERS_INSIDE()
    return ReasonCode.OPERATOR_UNSUPPORTED() if _has_matrix(operation) else None


def _has_matrix(layer: Any) -> bool:
    if isinstance(layer, _WITHOUT_PRODUCT):
        return False
    return any(
        sum(size > 1 for size in variable.shape) > 1 for variable in layer._trainable_variables + layer._non_trainable_variables
    )
