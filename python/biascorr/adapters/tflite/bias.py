"""Where the biases of TFLite layers are, how they change, and how they are written.

    real bias = code * (scale of the input * scale of the weights)      int32, or int64 beside int16 inputs
    real bias = (code - zero_point) * scale                             int8 or int16, of an ADD after the product
    real bias                                                           float32, or float16 that is dequantized

The kernels take the step of a bias from its input and weights, whatever scale the file gives it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from biascorr.adapters.tflite.graph import Editor, Graph, operator
from biascorr.adapters.tflite.products import Product
from biascorr.adapters.tflite.tensors import Grid, grid_of, grid_of_codes, real_tensor, tensor_like, type_of
from biascorr.graph.network import BiasChange, Shift
from biascorr.graph.reasons import Reason, ReasonCode

_LARGEST = 2**44
"""Steps of an int64 bias that LiteRT's sums hold: measured, those beyond 2^46 wrap."""


@dataclass(frozen=True, eq=False)
class Bias:
    """The bias of a layer.

    Parameters
    ----------
    graph : Graph
        The graph.
    product : Product
        The layer.
    """

    graph: Graph
    product: Product

    @functools.cached_property
    def stored(self) -> int | None:
        """The tensor whose bytes it is; None where there is none."""
        return None if self.product.bias is None else self.graph.source(self.product.bias)

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements, or of those that it would get."""
        if self.stored is not None:
            return self.graph.value(self.stored).dtype
        if self._steps_of_products is None:
            return np.dtype(np.float32)
        is_wide = self.graph.tensors[self.product.input].type == schema.TensorType.INT16
        return np.dtype(np.int64 if is_wide else np.int32)

    @functools.cached_property
    def grid(self) -> Grid | None:
        """The real numbers that its codes stand for, one scale for each channel or one for all; None where it is real."""
        if self.dtype.kind not in "iu":
            return None
        own = None if self.stored is None else grid_of(self.graph.tensors[self.stored])
        is_direct = self.product.adder is None and self.stored == self.product.bias
        if self._steps_of_products is not None and (is_direct or own is None):
            steps = self._steps_of_products
            return Grid(steps, np.zeros(len(steps), np.int64), 0)
        return own or Grid(np.ones(1), np.zeros(1, np.int64), 0)

    @functools.cached_property
    def _steps_of_products(self) -> NDArray[np.float64] | None:
        """The step of a product of codes, (1,) or (channels,); None where input or weights are real."""
        tensors, weights = self.graph.tensors, self.graph.source(self.product.weights)
        given = grid_of_codes(tensors[self.product.input])
        by = grid_of(tensors[weights]) if weights is not None else None
        return None if given is None or by is None or self.product.adder is not None else given.scale * by.scale

    @functools.cached_property
    def real(self) -> NDArray[np.float64] | None:
        """It in real numbers, (channels,); None where there is none."""
        if self.stored is None:
            return None
        values = self.graph.value(self.stored).reshape(-1)
        if self.grid is None:
            return values.astype(np.float64)
        return (values.astype(np.float64) - self.grid.zero_point) * self.grid.scale

    def change(self, shift: Shift) -> BiasChange:
        """The change that adding a shift makes."""
        if self.product.bias_position is None:
            return BiasChange(None, (ReasonCode.NO_PLACE_FOR_BIAS(),))
        new, reasons = self._with(shift)
        if self.grid is None and not np.isfinite(new).all():
            return BiasChange(None, (ReasonCode.BIAS_BEYOND_DTYPE(dtype=self.dtype),))
        before = 0.0 if self.stored is None else self.graph.value(self.stored).reshape(-1).astype(np.float64)
        steps = new.astype(np.float64) - before
        if self.stored is None:
            reasons = (ReasonCode.BIAS_ADDED(), *reasons)
            steps = steps if self.grid is None else steps - self.grid.zero_point
        elif not self.is_own:
            reasons = (ReasonCode.BIAS_SEPARATED(), *reasons)
        return BiasChange(np.asarray(steps if self.grid is None else steps * self.grid.scale), reasons)

    def _with(self, shift: Shift) -> tuple[NDArray[Any], tuple[Reason, ...]]:
        """Its elements, (channels,), with a shift added, and remarks."""
        size = self.product.channels
        before = np.zeros(size, self.dtype) if self.stored is None else self.graph.value(self.stored).reshape(-1)
        if self.grid is None:
            with np.errstate(over="ignore"):
                return (before.astype(np.float64) + shift).astype(self.dtype), ()
        scale, limits = np.broadcast_to(self.grid.scale, (size,)), np.iinfo(self.dtype)
        steps = np.round(np.divide(shift, scale, out=np.zeros(size), where=scale > 0))
        wanted = before.astype(np.float64) + steps
        least, most = np.minimum(max(limits.min, -_LARGEST), before), np.maximum(min(limits.max, _LARGEST), before)
        is_beyond = (wanted > most) | (wanted < least)
        limit = np.where(wanted > 0, most, least)
        new = np.where(is_beyond, limit, before.astype(np.int64) + np.where(is_beyond, 0, steps).astype(np.int64))
        counts = {ReasonCode.BIAS_CANNOT_MOVE: scale == 0, ReasonCode.BIAS_SATURATES: is_beyond}
        found = {code: int(np.count_nonzero(channels)) for code, channels in counts.items()}
        reasons = (code(dtype=self.dtype, count=count, channels=size) for code, count in found.items() if count)
        return new.astype(self.dtype), tuple(reasons)

    @functools.cached_property
    def is_own(self) -> bool:
        """Whether its bytes in the file are for it alone."""
        return self.product.bias is not None and self.graph.is_own(self.product.bias)

    def write(self, editor: Editor, shift: Shift) -> None:
        """Adds a shift to it, in the graph that is made."""
        self._put(editor, self._with(shift)[0])

    def set(self, editor: Editor, values: NDArray[np.float64]) -> None:
        """Makes it other real numbers, (channels,), in the graph that is made: of float32, as the weights that it gets.

        Of an operator that takes none, an operator of its own adds it.
        """
        assert self.grid is None  # what is quantized is not edited
        self._put(editor, values.astype(np.float32))

    def _put(self, editor: Editor, values: NDArray[Any]) -> None:
        bias, stored, position = self.product.bias, self.stored, self.product.bias_position
        shape = (self.product.channels, *[1] * (-1 - self.product.axis)) if stored is None else self.graph.value(stored).shape
        if stored is not None and self.is_own and values.dtype == self.dtype:
            editor.store(stored, values.reshape(shape))
            return
        tensor = real_tensor(shape, f"{self.graph.names[self.product.output]}/bias")
        if stored != bias:  # dequantized, of what others read too
            values = values.astype(np.float32) if self.grid is None else self.grid.real(values)
        elif self.grid is not None:
            tensor.quantization = _quantization(self.grid)
        tensor.type = type_of(values.dtype)
        index = editor.add_tensor(tensor, values.reshape(shape))
        if position is not None:
            editor.set_input(self.product.last, position, index)
        else:
            self._add(editor, index)

    def _add(self, editor: Editor, bias: int) -> None:
        """Adds a bias after the product, whose output is that of the sum from then on."""
        output, product = self.product.output, self.product.operator
        made = editor.add_tensor(tensor_like(self.graph.tensors[output], f"{self.graph.names[output]}/product"))
        editor.set_output(product, made)
        editor.insert_after(product, operator("ADD", [made, bias], [output], schema.AddOptionsT()))


def _quantization(grid: Grid) -> Any:
    made = schema.QuantizationParametersT()
    made.scale, made.zeroPoint = grid.scale.astype(np.float32), np.array(grid.zero_point)
    return made
