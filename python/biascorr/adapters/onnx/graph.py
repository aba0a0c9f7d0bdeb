"""An ONNX graph: who makes and who reads a tensor, what is constant; edits that keep every name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from biascorr.adapters.onnx.runtime import run_constants

_RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


class Graph:
    """The main graph of a model, indexed. Every edit goes through its methods.

    Parameters
    ----------
    model : onnx.ModelProto
        Edited in place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {output: node for node in model.graph.node for output in node.output if output}
        self._readers: dict[str, int] = {}
        self._nodes_reading: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            self._add_reader(node)
        for name in (name for node in model.graph.node for name in captured(node)):
            self._readers[name] = self._readers.get(name, 0) + 1
        self.outputs = {output.name for output in model.graph.output}
        self._names = {*self.producer, *self.initializers, *(each.name for each in model.graph.input)}
        self._names |= {node.name for node in model.graph.node}
        self._constant = self._find_constants()
        self._values: dict[str, NDArray[Any]] = {}
        self._gone: set[str] = set()

    def _add_reader(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            self._readers[name] = self._readers.get(name, 0) + 1
            self._nodes_reading.setdefault(name, []).append(node)

    def _find_constants(self) -> set[str]:
        """Tensors that follow from initializers and constants alone."""
        constant = set(self.initializers)
        for node in self.model.graph.node:
            pure = node.op_type not in _RANDOM and not any(_subgraphs(node))
            if pure and all(not name or name in constant for name in node.input):
                constant.update(node.output)
        return constant

    def function_nodes(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes of the model's own function that a node calls, and of those that it calls."""
        for function in self.model.functions:
            if (function.domain, function.name) == (node.domain, node.op_type):
                for inner in function.node:
                    yield inner
                    yield from self.function_nodes(inner)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators; 0 where the model uses none."""
        return max((each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")), default=0)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        nodes: Sequence[onnx.NodeProto] = self.model.graph.node
        return nodes

    def has(self, name: str) -> bool:
        """Whether a node makes a tensor of this name, or the model's caller gives it."""
        return name in self.producer or any(each.name == name for each in self.model.graph.input)

    def is_constant(self, name: str) -> bool:
        return name in self._constant

    def values(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The values of constant tensors."""
        wanted = {name for name in names if name not in self._values}
        for name in wanted & set(self.initializers):
            self._values[name] = numpy_helper.to_array(self.initializers[name])
        computed = sorted(wanted - set(self.initializers))
        self._values.update(zip(computed, run_constants(self.part([], computed))) if computed else ())
        return {name: self._values[name] for name in names}

    def value(self, name: str) -> NDArray[Any]:
        return self.values([name])[name]

    def part(self, given: Sequence[onnx.ValueInfoProto], wanted: Sequence[str]) -> onnx.ModelProto:
        """A model that computes the wanted tensors from given ones."""
        known = {value.name for value in given}
        needed = set(wanted)
        nodes = []
        for node in reversed(self.nodes):
            if any(name in needed and name not in known for name in node.output):
                needed.update(node.input, captured(node))
                nodes.append(node)
        graph = helper.make_graph(
            nodes[::-1],
            "part",
            list(given),
            [onnx.ValueInfoProto(name=name) for name in wanted],
            [tensor for name, tensor in self.initializers.items() if name in needed and name not in known],
        )
        return helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version, functions=self.model.functions
        )

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None where others do, a subgraph or the model's caller among them."""
        alone = self._readers.get(name, 0) == 1 and name not in self.outputs
        nodes = self._nodes_reading.get(name, [])
        return nodes[0] if alone and len(nodes) == 1 else None

    def read(self) -> set[str]:
        """The tensors that something reads, the model's caller among them."""
        return {name for name, count in self._readers.items() if name and count} | self.outputs

    def is_captured(self, name: str) -> bool:
        """Whether a subgraph reads a tensor."""
        return self._readers.get(name, 0) > len(self._nodes_reading.get(name, ()))

    def fresh_name(self, base: str) -> str:
        name, k = base, 1
        while name in self._names:
            name, k = f"{base}_{k}", k + 1
        self._names.add(name)
        return name

    def set_constant(self, node: onnx.NodeProto, index: int, array: NDArray[Any], base: str) -> None:
        """Makes an input of a node this constant: in place where it is the node's own, else under a fresh name."""
        name = node.input[index] if index < len(node.input) else ""
        if name and self.only_reader(name) is node:
            own = self._own_tensor(name)
            if own is not None:
                own.CopyFrom(_tensor(array, own))
                self._forget(name)
                self._set_declared_shape(name, array.shape)
                return
        self.set_input(node, index, self.add_initializer(base, array))

    def _forget(self, name: str) -> None:
        """Drops the value of a constant that changed, and of what is computed from it."""
        self._values.pop(name, None)
        readers = self._nodes_reading.get(name, [])
        for output in (output for node in readers for output in node.output if output in self._constant):
            self._forget(output)

    def _own_tensor(self, name: str) -> onnx.TensorProto | None:
        """Where the values of a constant are kept; None where they are computed."""
        if name in self.initializers:
            initializer: onnx.TensorProto = self.initializers[name]
            return initializer
        node = self.producer[name]
        is_tensor = node.op_type == "Constant" and node.attribute[0].name == "value"
        tensor: onnx.TensorProto | None = node.attribute[0].t if is_tensor else None
        return tensor

    def _set_declared_shape(self, name: str, shape: Sequence[int]) -> None:
        for value in (*self.model.graph.input, *self.model.graph.value_info):
            if value.name == name and value.type.tensor_type.HasField("shape"):
                value.CopyFrom(helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, shape))

    def add_initializer(self, base: str, array: NDArray[Any]) -> str:
        tensor = numpy_helper.from_array(np.asarray(array), self.fresh_name(base))
        self.model.graph.initializer.append(tensor)
        self.initializers[tensor.name] = self.model.graph.initializer[-1]
        self._constant.add(tensor.name)
        if self.model.ir_version < 4:  # there, initializers are defaults of inputs
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            self.model.graph.input.append(value)
        return tensor.name

    def set_input(self, node: onnx.NodeProto, index: int, name: str) -> None:
        while len(node.input) <= index:
            node.input.append("")
        old = node.input[index]
        if old:
            self._readers[old] -= 1
            self._nodes_reading[old].remove(node)
        node.input[index] = name
        self._readers[name] = self._readers.get(name, 0) + 1
        self._nodes_reading.setdefault(name, []).append(node)

    def insert(self, node: onnx.NodeProto, beside: onnx.NodeProto, *, after: bool) -> onnx.NodeProto:
        """Puts a node next to another; returns it as it is in the graph."""
        index = next(k for k, each in enumerate(self.nodes) if each is beside) + after
        self.model.graph.node.insert(index, node)
        inserted: onnx.NodeProto = self.model.graph.node[index]
        self._add_reader(inserted)
        self.producer.update(dict.fromkeys(inserted.output, inserted))
        if all(name in self._constant for name in inserted.input):
            self._constant.update(inserted.output)
        return inserted

    def redirect(self, name: str, to: str) -> None:
        """Lets the nodes that read a tensor read another one; what subgraphs and the model's caller read stays."""
        for node in list(self._nodes_reading.get(name, ())):
            for index, each in enumerate(node.input):
                if each == name:
                    self.set_input(node, index, to)

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor that a node makes a name that nothing has; subgraphs and the model's caller must not read it."""
        node = self.producer.pop(name)
        node.output[list(node.output).index(name)] = new
        self.producer[new] = node
        self._gone.discard(new)
        self._gone.add(name)
        self.redirect(name, new)

    def give_up_output(self, node: onnx.NodeProto, base: str) -> None:
        """Gives the first output of a node a fresh name, so that another node can take over the one it had."""
        node.output[0] = self.fresh_name(base)
        self.producer[node.output[0]] = node

    def replace(self, node: onnx.NodeProto, op: str, inputs: Sequence[str], **given: Any) -> None:
        """Makes a node compute its first output otherwise: by another operator of ONNX, from other inputs."""
        for index in range(len(inputs), len(node.input)):
            self.set_input(node, index, "")
        for index, name in enumerate(inputs):
            self.set_input(node, index, name)
        self._lose(node.output[1:])
        del node.input[len(inputs) :], node.output[1:], node.attribute[:]
        node.op_type, node.domain = op, ""
        node.attribute.extend(helper.make_attribute(key, value) for key, value in given.items())

    def remove(self, node: onnx.NodeProto) -> None:
        """Takes out a node whose outputs nothing has to make any more."""
        del self.model.graph.node[next(k for k, each in enumerate(self.nodes) if each is node)]
        for name in (*node.input, *captured(node)):
            self._readers[name] -= 1
        for name in node.input:
            self._nodes_reading[name].remove(node)
        self._lose(node.output)

    def _lose(self, names: Iterable[str]) -> None:
        for name in filter(None, names):
            self.producer.pop(name, None)
            self._gone.add(name)

    def remove_unread(self, names: Collection[str]) -> None:
        """Takes out what makes only tensors that nothing reads, some of these among them; then what nothing says more about."""
        for node in list(self.nodes)[::-1]:
            if any(name in names for name in node.output) and not any(map(self._is_read, filter(None, node.output))):
                self.remove(node)
        for name in [name for name in self.initializers if name in names and not self._is_read(name)]:
            self.initializers.pop(name)
            self._gone.add(name)
        graph = self.model.graph
        for fields in (graph.initializer, graph.input, graph.value_info):
            _remove_where(fields, lambda each: each.name in self._gone)
        _remove_where(graph.quantization_annotation, lambda each: each.tensor_name in self._gone)

    def _is_read(self, name: str) -> bool:
        return self._readers.get(name, 0) > 0 or name in self.outputs


def _remove_where(fields: Any, is_gone: Callable[[Any], bool]) -> None:
    """From a repeated field, in place: what stays is not copied."""
    for index in reversed(range(len(fields))):
        if is_gone(fields[index]):
            del fields[index]


def named_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Nodes by name; by operator and output where they have none of their own."""
    nodes: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        own = node.name if node.name and node.name not in nodes else f"{node.op_type}:{node.output[0]}"
        nodes[own] = node
    return nodes


def weight_index(node: onnx.NodeProto, graph: Graph) -> int:
    """Which input of a convolution or matrix product is its constant one."""
    return 0 if node.op_type == "MatMul" and graph.is_constant(node.input[0]) else 1


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def subgraph_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """All nodes inside the subgraphs of a node."""
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from subgraph_nodes(inner)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the subgraphs of a node read or give out; those of the main graph are among them."""
    for inner in subgraph_nodes(node):
        yield from inner.input
    for subgraph in (subgraph for each in (node, *subgraph_nodes(node)) for subgraph in _subgraphs(each)):
        yield from (output.name for output in subgraph.output)


def _tensor(array: NDArray[Any], like: onnx.TensorProto) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.asarray(array, order="C"), like.name)
    if like.doc_string:
        tensor.doc_string = like.doc_string
    return tensor
