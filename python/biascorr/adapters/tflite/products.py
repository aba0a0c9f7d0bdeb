"""Which operators of a TFLite graph are layers: products with constant weights, and where their weights and biases are.

CONV_2D             weights (O, H, W, I)      FULLY_CONNECTED   (O, I)
DEPTHWISE_CONV_2D   (1, H, W, C * M)          BATCH_MATMUL      (..., I, O) or (..., O, I), on either side
TRANSPOSE_CONV      (O, H, W, I)              CONV_3D           (D, H, W, I, O)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from biascorr.adapters.tflite.graph import Graph, Operator, operators_of
from biascorr.adapters.tflite.tensors import PACKED, axes_of, dtype_of, grid_of, name_of, shape_of, type_name
from biascorr.graph.layer import WeightFormat
from biascorr.graph.reasons import Reason, ReasonCode
from biascorr.windows import TransposedWindow, Window

_POSITIONS = {
    "BATCH_MATMUL": (0, 1, None),
    "CONV_2D": (0, 1, 2),
    "CONV_3D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}
"""Which input of each operator is its input, its weights, its bias."""

_RECURRENT = (
    "BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN", "LSTM", "RNN", "SVDF", "UNIDIRECTIONAL_SEQUENCE_LSTM",
    "UNIDIRECTIONAL_SEQUENCE_RNN",
)  # fmt: skip

CONTROL = ("CALL_ONCE", "IF", "WHILE", "STABLEHLO_CASE", "STABLEHLO_COMPOSITE", "STABLEHLO_WHILE")
"""Operators that run other subgraphs."""

_WEIGHTED = ("CONV_3D_TRANSPOSE", "STABLEHLO_CONVOLUTION", "STABLEHLO_DOT_GENERAL")
"""Products that are run, but not corrected."""


@dataclass(frozen=True, eq=False)
class Product:
    """A layer: an operator, its weights, and what adds its bias.

    Parameters
    ----------
    operator : Operator
        The product.
    adder : Operator or None
        The ADD after it that has its bias, where the product has no place for one.
    input, weights : int
        Tensors.
    bias : int or None
        The tensor that has its bias; None where there is none.
    bias_position : int or None
        Which input of the operator, or of the adder, it is; None where there is no place for one.
    layout : str
        The axes of the weights, as :class:`biascorr.graph.layer.Layer` has them.
    shape : tuple of int
        The shape of the weights in that layout.
    axis : int
        The axis of input and output that has the channels, from the end.
    groups : int
        Groups of a convolution.
    window : Window, TransposedWindow or None
        How its kernel moves.
    is_flattening : bool
        Whether its input becomes rows of as many elements as the weights read.
    """

    operator: Operator
    adder: Operator | None
    input: int
    weights: int
    bias: int | None
    bias_position: int | None
    layout: str
    shape: tuple[int, ...]
    axis: int = -1
    groups: int = 1
    window: Window | TransposedWindow | None = None
    is_flattening: bool = False

    @property
    def output(self) -> int:
        """The tensor that it makes, bias and activation included."""
        return self.last.outputs[0]

    @property
    def last(self) -> Operator:
        """The operator that makes its output."""
        return self.operator if self.adder is None else self.adder

    @property
    def activation(self) -> int:
        """The activation that is fused into it."""
        return option(self.last, "fusedActivationFunction")

    @property
    def channels(self) -> int:
        """Output channels."""
        return int(np.prod([size for letter, size in zip(self.layout, self.shape) if letter in "OCM"]))

    def weights_of(self, graph: Graph) -> NDArray[Any]:
        """Its weights in real numbers, in their layout."""
        return graph.real(self.weights).reshape(self.shape)

    def step_of(self, graph: Graph) -> NDArray[np.float64] | None:
        """Distance between neighbouring weights, as it broadcasts to them; None where they are real numbers."""
        source = graph.source(self.weights)
        assert source is not None
        grid = grid_of(graph.tensors[source])
        if grid is None:
            return None
        if len(grid.scale) == 1:
            return grid.scale.reshape((1,) * len(self.shape))
        if self.layout.endswith("CM"):
            return grid.scale.reshape(1, 1, *self.shape[2:])
        axis = grid.axis + len(self.shape) - len(shape_of(graph.tensors[source]))
        return grid.scale.reshape([-1 if position == axis else 1 for position in range(len(self.shape))])

    def format_of(self, graph: Graph) -> WeightFormat | None:
        """How the weights are stored; None where they are real numbers."""
        source = graph.source(self.weights)
        grid = None if source is None else grid_of(graph.tensors[source])
        if source is None or grid is None:
            return None
        tensor = graph.tensors[source]
        dtype = f"int{PACKED[tensor.type]}" if tensor.type in PACKED else str(dtype_of(tensor))
        return WeightFormat(dtype, "tensor" if len(grid.scale) == 1 else "channel")


def option(operator: Operator, name: str) -> int:
    """An option of an operator, a number; 0 where it has none, as LiteRT takes it."""
    return int(getattr(operator.options, name, 0) or 0)


def products_of(graph: Graph) -> tuple[list[Product], dict[str, tuple[str, Reason]]]:
    """The layers of a graph; by their names, the operators and reasons of those that cannot be corrected."""
    found, left = [], {}
    for operator in graph.operators:
        product = None if graph.constants.issuperset(operator.outputs) else _product(graph, operator)
        if isinstance(product, Product) and product.last not in graph.runnable:
            product = ReasonCode.AFTER_CUSTOM()
        if isinstance(product, Product):
            found.append(product)
        elif product is not None:
            left[name_of_operator(graph, operator)] = operator.kind, product
    left |= {name: (kind, reason) for name, kind, reason in _in_other_subgraphs(graph)}
    return found, left


def name_of_operator(graph: Graph, operator: Operator) -> str:
    """What reports call an operator: the tensor that it makes."""
    return graph.names[operator.outputs[0]] if operator.outputs else operator.kind


def _product(graph: Graph, operator: Operator) -> Product | Reason | None:
    if operator.kind in _RECURRENT:
        return ReasonCode.RECURRENT()
    if operator.kind in _WEIGHTED or operator.kind == "CUSTOM":
        return ReasonCode.OPERATOR_UNSUPPORTED()
    if operator.kind not in _POSITIONS:
        return None
    at_input, at_weights, at_bias = _POSITIONS[operator.kind]
    if operator.kind == "BATCH_MATMUL" and operator.inputs[0] in graph.constants:
        at_input, at_weights = 1, 0
    source, weights = operator.input(at_input), operator.input(at_weights)
    if source is None or weights is None or weights not in graph.constants:
        return None if operator.kind == "BATCH_MATMUL" else ReasonCode.WEIGHTS_COMPUTED()
    stored = graph.source(weights)
    if stored is None:
        return ReasonCode.WEIGHTS_COMPUTED()
    reason = _unreadable(graph, operator, stored)
    if reason is not None:
        return reason
    bias = None if at_bias is None else operator.input(at_bias)
    if bias is not None and graph.source(bias) is None:
        return ReasonCode.BIAS_COMPUTED()
    make = {"FULLY_CONNECTED": _fully_connected, "BATCH_MATMUL": _batch_matmul}.get(operator.kind, _convolution)
    return make(graph, operator, source, weights, bias, at_bias)


def _in_other_subgraphs(graph: Graph) -> Iterator[tuple[str, str, Reason]]:
    """The names and operators of products in other subgraphs, which control flow or other signatures run."""
    for subgraph in graph.model.subgraphs[1:]:
        label = (subgraph.name or b"").decode(errors="backslashreplace") or "subgraph"
        for each in operators_of(graph.model, subgraph):
            if each.kind in (*_POSITIONS, *_WEIGHTED, *_RECURRENT):
                made = name_of(subgraph.tensors[each.outputs[0]]) if each.outputs else each.kind
                yield f"{label}/{made}", each.kind, ReasonCode.OTHER_SUBGRAPH(subgraph=label)


def _unreadable(graph: Graph, operator: Operator, stored: int) -> Reason | None:
    """Why the weights in the file cannot be read."""
    tensor = graph.tensors[stored]
    if tensor.sparsity is not None:
        return ReasonCode.WEIGHTS_FORMAT(format="sparse")
    if option(operator, "weightsFormat"):
        return ReasonCode.WEIGHTS_FORMAT(format="shuffled")
    if tensor.quantization is not None and tensor.quantization.detailsType:
        return ReasonCode.WEIGHTS_FORMAT(format="quantized in blocks")
    dtype = dtype_of(tensor)
    return None if dtype is not None and dtype.kind in "iuf" else ReasonCode.WEIGHTS_FORMAT(format=type_name(tensor))


def _fully_connected(
    graph: Graph, operator: Operator, source: int, weights: int, bias: int | None, at_bias: int | None
) -> Product | Reason:
    shape = shape_of(graph.tensors[weights])
    if len(shape) != 2:
        return ReasonCode.NOT_ONE_MATRIX(shape=shape)
    given = axes_of(graph.tensors[source])
    is_flattening = not given or given[-1] != shape[1] or (len(given) != 2 and not option(operator, "keepNumDims"))
    return Product(operator, None, source, weights, bias, at_bias, "OI", shape, is_flattening=is_flattening)


def _batch_matmul(
    graph: Graph, operator: Operator, source: int, weights: int, _: int | None, __: int | None
) -> Product | Reason:
    shape = shape_of(graph.tensors[weights])
    if len(shape) < 2 or any(size != 1 for size in shape[:-2]):
        return ReasonCode.NOT_ONE_MATRIX(shape=shape)
    is_right = operator.inputs[1] == weights
    turns = option(operator, "adjX"), option(operator, "adjY")
    if turns[0 if is_right else 1]:
        return ReasonCode.NO_MATRIX_PRODUCT(equation="a product of a transposed input")
    is_turned = turns[1 if is_right else 0]
    layout = "OI" if is_right == is_turned else "IO"
    axis = -1 if is_right else -2
    adder, bias = _adder(graph, operator, axis, shape[-2:][layout.index("O")])
    at_bias = None if adder is None else adder.inputs.index(bias)
    return Product(operator, adder, source, weights, bias if adder else None, at_bias, layout, shape[-2:], axis)


def _adder(graph: Graph, operator: Operator, axis: int, channels: int) -> tuple[Operator | None, int]:
    """The ADD after a product that adds a constant with one number for each channel, and that constant."""
    (made,) = operator.outputs
    readers = graph.readers.get(made, [])
    if len(readers) != 1 or readers[0].kind != "ADD" or made in graph.outputs:
        return None, -1
    (bias,) = [index for index in readers[0].inputs if index != made] or [-1]
    if bias not in graph.constants or graph.source(bias) is None:
        return None, -1
    shape = shape_of(graph.tensors[bias])
    sizes = {position - len(shape): size for position, size in enumerate(shape)}
    is_along = sizes.pop(axis, None) == channels and all(size == 1 for size in sizes.values())
    return (readers[0], bias) if is_along else (None, -1)


def _convolution(
    graph: Graph, operator: Operator, source: int, weights: int, bias: int | None, at_bias: int | None
) -> Product | Reason:
    shape, given = shape_of(graph.tensors[weights]), axes_of(graph.tensors[source])
    channels = given[-1] if given else None
    rank = 5 if operator.kind == "CONV_3D" else 4
    if len(shape) != rank or len(given) != rank or not channels or not all(shape):
        return ReasonCode.OPERATOR_UNSUPPORTED()
    if operator.kind == "TRANSPOSE_CONV":
        window: Window | TransposedWindow = _transposed_window(graph, operator, given)
        return Product(operator, None, source, weights, bias, at_bias, "OHWI", shape, window=window)
    if operator.kind == "CONV_3D":
        return Product(
            operator, None, source, weights, bias, at_bias, "DHWIO", shape, window=_window(operator.options, shape[:3])
        )
    window = _window(operator.options, shape[1:3])
    if operator.kind == "CONV_2D":
        groups = channels // shape[3]
        return Product(operator, None, source, weights, bias, at_bias, "OHWI", shape, groups=groups, window=window)
    shape = (*shape[1:3], channels, shape[3] // channels)
    return Product(operator, None, source, weights, bias, at_bias, "HWCM", shape, window=window)


def _window(options: Any, taps: tuple[int, ...]) -> Window:
    space = "DHW"[-len(taps) :]
    strides = tuple(getattr(options, f"stride{axis}") for axis in space)
    dilations = tuple(getattr(options, f"dilation{axis}Factor") for axis in space)
    is_same = options.padding == schema.Padding.SAME
    return Window(tuple(taps), strides, dilations, ((0, 0),) * len(taps), "SAME_UPPER" if is_same else "NOTSET")


def _transposed_window(graph: Graph, operator: Operator, given: tuple[int | None, ...]) -> TransposedWindow:
    options, taps = operator.options, shape_of(graph.tensors[operator.inputs[1]])[1:3]
    strides = options.strideH, options.strideW
    shape = axes_of(graph.tensors[operator.outputs[0]])
    made = shape[1:3] if len(shape) == 4 else (None, None)  # of any rank, in the file
    none = (0,) * len(taps)
    if options.padding == schema.Padding.SAME:
        output = None if None in made else tuple(size or 0 for size in made)
        return TransposedWindow(taps, strides, (1, 1), ((0, 0),) * 2, none, output, "SAME_UPPER")
    pads, padding = ((0, 0),) * 2, none
    if None not in made and None not in given[1:3]:
        reach = [(size - 1) * stride + tap for size, stride, tap in zip(given[1:3], strides, taps)]  # type: ignore[operator]
        pads = tuple((0, max(0, full - (size or 0))) for full, size in zip(reach, made))  # type: ignore[assignment]
        padding = tuple(max(0, (size or 0) - full) for full, size in zip(reach, made))
    return TransposedWindow(taps, strides, (1, 1), pads, padding)
