"""The nodes that a graph is run by: each layer written as a product of real numbers, its activation apart.

    a quantized layer    codes -> DEQUANTIZE -> product -> activation -> QUANTIZE -> codes
    any other operator   as it is

The weights and biases of a product are real numbers that stand for what is stored. Every tensor of codes is dequantized, so
that whoever looks at the network sees real numbers; operators that compute with codes read these all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from biascorr.adapters.tflite.bias import Bias
from biascorr.adapters.tflite.graph import Graph, Operator, operator, unique
from biascorr.adapters.tflite.products import Product, products_of
from biascorr.adapters.tflite.tensors import has_codes, real_tensor, shape_of, tensor_like
from biascorr.graph.layer import Constant, LazyArray
from biascorr.graph.reasons import Reason
from biascorr.quantization import Quantization

FUSED = {
    schema.ActivationFunctionType.RELU: "RELU",
    schema.ActivationFunctionType.RELU_N1_TO_1: "RELU_N1_TO_1",
    schema.ActivationFunctionType.RELU6: "RELU6",
}
"""The operators of fused activations; the others, TANH and SIGN_BIT, LiteRT leaves out of products."""

_DEQUANTIZED = 2
"""The version of QUANTIZE and DEQUANTIZE that knows int8."""


@dataclass(frozen=True, eq=False)
class Node:
    """An operator that runs.

    Parameters
    ----------
    name : str
        What the engine calls it.
    operator : Operator
        It, by the tensors of the lowered graph.
    is_back : bool
        Whether it only makes codes of their real numbers, where these are given and the codes are not.
    """

    name: str
    operator: Operator
    is_back: bool = False


@dataclass(eq=False)
class Lowered:
    """The nodes of a graph, and its tensors, more than the file has.

    Parameters
    ----------
    graph : Graph
        The graph.
    quantizers : mapping from str to Quantization
        The grids that layers, by name, read their input on.
    input_names : sequence of str
        What inputs are called; as the signature does where there are none.
    """

    graph: Graph
    quantizers: Mapping[str, Quantization] = field(default_factory=dict)
    input_names: Sequence[str] = ()
    nodes: list[Node] = field(default_factory=list)
    products: dict[str, Product] = field(default_factory=dict)
    """The layers by their names, in order."""
    left: dict[str, tuple[str, Reason]] = field(default_factory=dict)
    """The operators that cannot be corrected, by name, and why."""
    fused: dict[str, str] = field(default_factory=dict)
    """The layers that activations are fused into, by the names of these."""
    read: dict[str, int] = field(default_factory=dict)
    """The tensor that each layer reads."""
    made: dict[str, int] = field(default_factory=dict)
    """The tensor that each layer makes, before its activation."""
    real: dict[int, int] = field(default_factory=dict)
    """The real numbers of each tensor of codes."""
    values: dict[int, Constant] = field(default_factory=dict)
    """The constants that stand for those in the file."""

    def __post_init__(self) -> None:
        self.tensors = list(self.graph.tensors)
        self._ends = self._called_ends()
        self._taken, self._taken_by_nodes = set(self._ends.values()), set(self.graph.names)
        self.names = [self._ends.get(k) or unique(name, self._taken) for k, name in enumerate(self.graph.names)]
        products, self.left = products_of(self.graph)
        last = {id(product.last): product for product in products}
        apart = {id(product.operator) for product in products}
        self.inputs = [self._input(index) for index in self.graph.inputs]
        for each in self.graph.runnable:
            if id(each) in last:
                self._add_product(last[id(each)])
            elif id(each) not in apart:
                self._add_other(each)
        self.outputs = [self.real.get(index, index) for index in self.graph.ends]

    def _called_ends(self) -> dict[int, str]:
        """Names of inputs and outputs: those that are wanted, those of the signature, those of the tensors."""
        named = dict(zip(self.graph.inputs, self.input_names))
        for signature in self.graph.model.signatureDefs or []:
            if signature.subgraphIndex == 0:
                for each in (*(signature.inputs or []), *(signature.outputs or [])):
                    named.setdefault(int(each.tensorIndex), each.name.decode(errors="backslashreplace"))
                break
        taken: set[str] = set()
        ends = dict.fromkeys([*self.graph.inputs, *self.graph.ends])
        return {index: unique(named.get(index, self.graph.names[index]), taken) for index in ends}

    def new(self, tensor: Any) -> int:
        """Adds a tensor, whose name may become another one."""
        return self._new(tensor, unique(tensor.name.decode(), self._taken))

    def _new(self, tensor: Any, name: str) -> int:
        self.tensors.append(tensor)
        self.names.append(name)
        return len(self.tensors) - 1

    def _after(self, index: int, suffix: str) -> int:
        """A tensor of real numbers of the shape of another one."""
        return self.new(tensor_like(self.tensors[index], f"{self.graph.names[index]}/{suffix}"))

    def _add(self, name: str, added: Operator) -> None:
        """Adds the node that makes a tensor of the file, called as this is called there."""
        self.nodes.append(Node(name, added))

    def _add_own(self, name: str, added: Operator, *, is_back: bool = False) -> None:
        """Adds another node, whose name may become another one."""
        self.nodes.append(Node(unique(name, self._taken_by_nodes), added, is_back))

    def _input(self, index: int) -> int:
        """The tensor of real numbers that is given for an input of the graph."""
        if not has_codes(self.tensors[index]):
            return index
        real = self._real_end(index)
        self._add_own(f"{self.graph.names[index]}/quantize", _quantize(real, index))
        self._add_real(index)
        return real

    def _real_end(self, index: int) -> int:
        """The real numbers of an input or output of codes, which has its name."""
        name = self.names[index]
        self.names[index] = unique(f"{name}/codes", self._taken)
        return self._new(tensor_like(self.tensors[index], name), name)

    def _add_real(self, index: int) -> None:
        """Dequantizes a tensor of codes."""
        real = self._real_end(index) if index in self.graph.ends else self._after(index, "real")
        name, self.real[index] = self.graph.names[index], real
        dequantize = operator("DEQUANTIZE", [index], [real], schema.DequantizeOptionsT(), version=_DEQUANTIZED)
        self._add_own(f"{name}/dequantize", dequantize)
        self._add_own(f"{name}/requantize", _quantize(real, index), is_back=True)

    def _add_other(self, each: Operator) -> None:
        self._add(self.graph.names[each.outputs[0]] if each.outputs else each.kind, each)
        for index in each.outputs:
            if index not in self.graph.constants and has_codes(self.tensors[index]):
                self._add_real(index)

    def _add_product(self, product: Product) -> None:
        name = self.graph.names[product.output]
        self.products[name] = product
        stand_ins = {product.input: self._source(product, name), product.weights: self._weights(product)}
        if product.bias is not None:
            stand_ins[product.bias] = self._bias(product)
        fused, output = FUSED.get(product.activation), product.output
        is_quantized = has_codes(self.tensors[output])
        made = self.made[name] = self._after(output, "linear") if fused or is_quantized else output
        if product.adder is not None:
            (between,) = product.operator.outputs
            stand_ins[between] = self._add_between(product.operator, stand_ins)
        self._add(name, _with(product.last, stand_ins, made))
        if fused:
            activated = self._after(output, "activated") if is_quantized else output
            self._add_own(f"{name}/activation", operator(fused, [made], [activated]))
            self.fused[self.nodes[-1].name] = name
            made = activated
        if is_quantized:
            self._add_own(f"{name}/quantize", _quantize(made, output))
            self._add_real(output)

    def _add_between(self, product: Operator, stand_ins: Mapping[int, int]) -> int:
        """A product whose bias is added after it; quantized as it is there."""
        (between,), name = product.outputs, self.graph.names[product.outputs[0]]
        is_quantized = has_codes(self.tensors[between])
        made = self._after(between, "linear") if is_quantized else between
        self._add(name, _with(product, stand_ins, made))
        if not is_quantized:
            return made
        self._add_own(f"{name}/quantize", _quantize(made, between))
        self._add_real(between)
        return self.real[between]

    def _source(self, product: Product, name: str) -> int:
        """The real numbers that a product reads, as rows or on a grid where that is so."""
        source = self.real.get(product.input, product.input)
        if product.is_flattening:
            width = product.shape[1]
            count = max(1, int(np.prod(shape_of(self.tensors[source]))) // width)
            tensor = real_tensor((count, width), f"{name}/rows")
            tensor.shapeSignature = np.array([-1, width], np.int32)
            rows, shape = self.new(tensor), self._constant(np.array([-1, width], np.int32), f"{name}/rows/shape")
            options = schema.ReshapeOptionsT()
            options.newShape = [-1, width]
            self._add_own(self.names[rows], operator("RESHAPE", [source, shape], [rows], options))
            source = rows
        if name in self.quantizers:
            source = self._on_grid(source, self.quantizers[name], name)
        self.read[name] = source
        return source

    def _on_grid(self, source: int, quantization: Quantization, name: str) -> int:
        """round(clip(x * scale)) / scale, in float32, of any number of bits."""
        scale, least = float(quantization.scale), -(2 ** (quantization.bits - 1)) - int(quantization.zero_point)
        limits = least, least + 2**quantization.bits - 1
        steps = [("MUL", scale), ("MAXIMUM", limits[0]), ("MINIMUM", limits[1]), ("ROUND", None), ("DIV", scale)]
        for kind, by in steps:
            made = self.new(tensor_like(self.tensors[source], f"{name}/{kind.lower()}"))
            given = [] if by is None else [self._constant(np.array(by, np.float32), f"{name}/{kind.lower()}/by")]
            self._add_own(self.names[made], operator(kind, [source, *given], [made], _OPTIONS.get(kind, lambda: None)()))
            source = made
        return source

    def _constant(self, values: Constant, name: str) -> int:
        """Adds a constant."""
        tensor = real_tensor(values.shape, name)
        tensor.type = schema.TensorType.INT32 if values.dtype == np.int32 else tensor.type
        index = self.new(tensor)
        self.values[index] = values
        return index

    def _weights(self, product: Product) -> int:
        """The weights as they are, if they are real; else real ones, which are made each time they are read."""
        graph, index = self.graph, product.weights
        tensor = graph.tensors[index]
        if tensor.type == schema.TensorType.FLOAT32:
            return index
        values = LazyArray(shape_of(tensor), np.dtype(np.float32), lambda: graph.real(index))
        return self._constant(values, f"{graph.names[index]}/real")

    def _bias(self, product: Product) -> int:
        """The bias, the same way."""
        index = product.bias
        assert index is not None
        tensor = self.graph.tensors[index]
        if tensor.type == schema.TensorType.FLOAT32:
            return index
        real = Bias(self.graph, product).real
        assert real is not None
        return self._constant(real.astype(np.float32).reshape(shape_of(tensor)), f"{self.graph.names[index]}/real")


_OPTIONS = {
    "MUL": schema.MulOptionsT,
    "DIV": schema.DivOptionsT,
    "MAXIMUM": schema.MaximumMinimumOptionsT,
    "MINIMUM": schema.MaximumMinimumOptionsT,
}


def _quantize(real: int, codes: int) -> Operator:
    return operator("QUANTIZE", [real], [codes], schema.QuantizeOptionsT(), version=_DEQUANTIZED)


def _with(each: Operator, stand_ins: Mapping[int, int], made: int) -> Operator:
    """An operator that reads other tensors in place of its own, makes another one, and has no activation."""
    table = copy.copy(each.table)
    if getattr(table.builtinOptions, "fusedActivationFunction", 0):
        table.builtinOptions = copy.copy(table.builtinOptions)
        table.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
    return Operator(each.kind, tuple(stand_ins.get(index, index) for index in each.inputs), (made,), table, each.code)
