"""An ONNX graph: who makes and who reads a tensor, what is constant; edits that keep every name.

Edits take a time that does not depend on the size of the graph: nodes are put into their order when the edited model is asked
for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from biascorr.adapters.onnx.functions import called_by
from biascorr.adapters.onnx.operators import operator_of, subgraph_nodes, subgraphs
from biascorr.adapters.onnx.runtime import Session
from biascorr.adapters.onnx.shapes import Shapes, Types, inferred_types, known_shapes
from biascorr.adapters.onnx.tensors import Values, array_of, bytes_of, key_of, tensor_of
from biascorr.graph.layer import Constant, LazyArray

_RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}

_NEWEST_OPSET = 17
"""The newest opset that all releases of onnxruntime that can be used have."""

_KEPT = 1 << 16
"""Bytes of a computed constant up to which its value is kept; larger ones are computed each time they are read."""


class Graph:
    """The main graph of a model, indexed. Every edit goes through its methods.

    Parameters
    ----------
    model : onnx.ModelProto
        The model, edited in place.
    values : mapping
        The values of its detached tensors, edited in place.
    """

    def __init__(self, model: onnx.ModelProto, values: Values) -> None:
        self.values = values
        self._model = model
        self._ordered: list[onnx.NodeProto] = _in_topological_order(model.graph.node)
        self._position = {id(node): k for k, node in enumerate(self._ordered)}
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._removed: set[int] = set()
        self.is_rewired = False  # whether any edit changed more than the values of constants
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input}
        self.outputs = {output.name for output in model.graph.output}
        self.producer = {output: node for node in self._ordered for output in node.output if output}
        self._readers: dict[str, dict[int, list[Any]]] = {}  # tensor -> node by id: [node, how often it reads it]
        self._captured: dict[str, int] = {}
        for node in self._ordered:
            self._add_reader(node)
            for name in captured(node):
                self._captured[name] = self._captured.get(name, 0) + 1
        self._sparse = {tensor.values.name: tensor for tensor in model.graph.sparse_initializer}
        self._names = set(_names_in(model.graph))
        self.functions = {(each.domain, each.name, each.overload): each for each in model.functions}
        self._called: dict[tuple[str, str, str], set[str]] = {}
        self._constant = self._find_constants()
        self._kept: dict[str, NDArray[Any]] = {}
        self._gone: set[str] = set()
        self._declared: dict[str, list[onnx.ValueInfoProto]] = {}
        for value in (*model.graph.input, *model.graph.value_info):
            self._declared.setdefault(value.name, []).append(value)

    @property
    def model(self) -> onnx.ModelProto:
        """The model with all edits; nodes are copied where any came or went."""
        if self._is_edited:
            nodes = [_copy(node) for node in self.nodes]
            self._model.graph.ClearField("node")
            self._model.graph.node.extend(nodes)
        return self._model

    @property
    def _is_edited(self) -> bool:
        """Whether nodes came or went."""
        return bool(self._before or self._after or self._removed)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """In topological order."""
        return list(self._in_order(self._ordered))

    def _in_order(self, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield from self._in_order(self._before.get(id(node), ()))
            if id(node) not in self._removed:
                yield node
            yield from self._in_order(reversed(self._after.get(id(node), ())))

    def _add_reader(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            entry = self._readers.setdefault(name, {}).setdefault(id(node), [node, 0])
            entry[1] += 1

    def _remove_reader(self, node: onnx.NodeProto, name: str) -> None:
        entry = self._readers[name][id(node)]
        entry[1] -= 1
        if not entry[1]:
            del self._readers[name][id(node)]

    def _find_constants(self) -> set[str]:
        """Tensors that follow from initializers and constants alone."""
        constant = {*self.initializers, *self._sparse}
        for node in self._ordered:
            is_pure = not subgraphs(node) and _RANDOM.isdisjoint({operator_of(node), *self.called_operators(node)})
            if is_pure and all(not name or name in constant for name in node.input):
                constant.update(filter(None, node.output))
        return constant

    def called_operators(self, node: onnx.NodeProto) -> set[str]:
        """The operators in the model's own functions that a node or its subgraphs call, and in those that these call."""
        if not self.functions:
            return set()
        return set().union(*(self._operators_of(called_by(each)) for each in (node, *subgraph_nodes(node))))

    def _operators_of(self, function: tuple[str, str, str]) -> set[str]:
        if function not in self.functions:
            return set()
        if function not in self._called:
            nodes = self.functions[function].node
            inner = {operator_of(each) for node in nodes for each in (node, *subgraph_nodes(node))}
            self._called[function] = inner.union(*map(self.called_operators, nodes))
        return self._called[function]

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators; 0 where the model uses none."""
        return max((each.version for each in self._model.opset_import if each.domain in ("", "ai.onnx")), default=0)

    def has(self, name: str) -> bool:
        """Whether a node makes a tensor of this name, or the model's caller gives it."""
        return name in self.producer or name in self.inputs

    def is_constant(self, name: str) -> bool:
        return name in self._constant

    def is_read(self, name: str) -> bool:
        """Whether a node, a subgraph or the model's caller reads a tensor."""
        return bool(self._readers.get(name)) or self._captured.get(name, 0) > 0 or name in self.outputs

    def rank(self, name: str) -> int | None:
        """How many axes a tensor has; None where that is not known without running the model."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    @functools.cached_property
    def types(self) -> Types:
        """What is known of tensors without running the model; of those that were there when it was first asked for."""
        return inferred_types(self._model)

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The shapes among :attr:`types`."""
        return known_shapes(self.types)

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The tensor that has the values of a constant; None where they are computed."""
        found: onnx.TensorProto | None = self.initializers.get(name)
        if found is not None:
            return found
        node = self.producer.get(name)
        is_tensor = node is not None and operator_of(node) == "Constant" and node.attribute[0].name == "value"
        if node is not None and is_tensor:
            found = node.attribute[0].t
        return found

    def _sparse_tensor(self, name: str) -> onnx.SparseTensorProto | None:
        node = self.producer.get(name)
        found: onnx.SparseTensorProto | None = self._sparse.get(name)
        if node is not None and operator_of(node) == "Constant" and node.attribute[0].name == "sparse_value":
            found = node.attribute[0].sparse_tensor
        return found

    def value(self, name: str) -> NDArray[Any]:
        """The value of a constant tensor."""
        return self.compute([name])[name]

    def compute(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The values of constant tensors, those that have to be computed all at once."""
        found, computed = {}, []
        for name in dict.fromkeys(names):
            tensor = self.tensor(name)
            if tensor is not None:
                found[name] = array_of(tensor, self.values)
            elif name in self._kept:
                found[name] = self._kept[name]
            elif (real := self._dequantized(name)) is not None:
                found[name] = real
            elif (sparse := self._sparse_tensor(name)) is not None:
                found[name] = _dense(sparse)
            else:
                computed.append(name)
        if computed:
            session = Session(self.part([], computed), self.values, "constant weights")
            found |= dict(zip(computed, session.run(computed, {})))
            others = [name for name in computed if not isinstance(found[name], np.ndarray)]
            if others:
                raise ValueError(f"constant weights: {others[0]} is no tensor, expected one")
        self._kept |= {name: array for name, array in found.items() if self.tensor(name) is None and array.nbytes <= _KEPT}
        return found

    def constant(self, name: str) -> Constant:
        """The value of a constant tensor, read when it is needed."""
        tensor = self.tensor(name)
        if tensor is not None and bytes_of(tensor) <= _KEPT:
            return self.value(name)
        if tensor is not None:
            shape, dtype = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
        elif (described := self._described(name)) is not None:
            shape, dtype = described
        else:
            value = self.value(name)
            if name in self._kept:
                return value
            shape, dtype = value.shape, value.dtype
        return LazyArray(shape, dtype, lambda: self.value(name))

    def _parameters_of_dequantizer(self, name: str) -> tuple[onnx.NodeProto, onnx.TensorProto] | None:
        """The DequantizeLinear of a tensor that is in the model, per tensor or along an axis, and that tensor."""
        node = self.producer.get(name)
        if node is None or operator_of(node) != "DequantizeLinear":
            return None
        quantized = self.tensor(node.input[0])
        given = {attribute.name for attribute in node.attribute}
        has_parameters = all(self.tensor(each) is not None for each in node.input[1:] if each)
        if quantized is None or not has_parameters or not given <= {"axis"}:
            return None
        return node, quantized

    def _described(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
        found = self._parameters_of_dequantizer(name)
        return None if found is None else (tuple(found[1].dims), self.value(found[0].input[1]).dtype)

    def _dequantized(self, name: str) -> NDArray[Any] | None:
        """The value of a tensor that is dequantized, as onnxruntime computes it: in float32; None for other tensors."""
        found = self._parameters_of_dequantizer(name)
        if found is None:
            return None
        node, _ = found
        codes, step = self.value(node.input[0]), self.value(node.input[1])
        if codes.dtype.kind not in "iu" or step.ndim > 1 or step.dtype.kind != "f":
            return None
        zero_point = self.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros_like(step, np.int32)
        shape = [1] * codes.ndim
        if step.size > 1:
            axis = attributes(node).get("axis", 1)
            if not -codes.ndim <= axis < codes.ndim or codes.shape[axis] != step.size:
                return None  # onnxruntime says what is wrong
            shape[axis] = -1
        if zero_point.size != step.size:
            return None
        offset = zero_point.astype(np.int32).reshape(shape)
        real = np.subtract(codes, offset, dtype=np.int32).astype(np.float32)
        real *= step.astype(np.float32).reshape(shape)
        return np.asarray(real, dtype=step.dtype)

    def part(self, given: Sequence[onnx.ValueInfoProto], wanted: Sequence[str]) -> onnx.ModelProto:
        """A model that computes the wanted tensors from given ones."""
        known = {value.name for value in given}
        needed, following = set(wanted), list(wanted)
        nodes: dict[int, onnx.NodeProto] = {}
        while following:
            name = following.pop()
            node = None if name in known else self.producer.get(name)
            if node is not None and id(node) not in nodes:
                nodes[id(node)] = node
                new = [each for each in (*node.input, *captured(node)) if each not in needed]
                needed.update(new)
                following += new
        place = {id(node): k for k, node in enumerate(self.nodes)} if self._is_edited else self._position
        initializers = [self.initializers[name] for name in needed if name in self.initializers and name not in known]
        graph = helper.make_graph(
            sorted(nodes.values(), key=lambda node: place[id(node)]),
            "part",
            list(given),
            [onnx.ValueInfoProto(name=name) for name in wanted],
            sorted(initializers, key=lambda tensor: tensor.name),
        )
        graph.sparse_initializer.extend(self._sparse[name] for name in sorted(needed) if name in self._sparse)
        model = self._model
        return helper.make_model(
            graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
        )

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None where others do, a subgraph or the model's caller among them."""
        readers = list(self._readers.get(name, {}).values())
        alone = len(readers) == 1 and readers[0][1] == 1 and not self._captured.get(name) and name not in self.outputs
        return readers[0][0] if alone else None

    def read(self) -> set[str]:
        """The tensors that something reads, the model's caller among them."""
        return {name for name in (*self._readers, *self._captured) if name and self.is_read(name)} | self.outputs

    def is_captured(self, name: str) -> bool:
        """Whether a subgraph reads a tensor."""
        return self._captured.get(name, 0) > 0

    def fresh_name(self, base: str) -> str:
        name, k = base, 1
        while name in self._names:
            name, k = f"{base}_{k}", k + 1
        self._names.add(name)
        return name

    def set_constant(self, node: onnx.NodeProto, index: int, array: NDArray[Any], base: str) -> None:
        """Makes an input of a node this constant: in place where it is the node's own, else under a fresh name."""
        name = node.input[index] if index < len(node.input) else ""
        own = self.tensor(name) if name and self.only_reader(name) is node else None
        if own is None:
            self.set_input(node, index, self.add_initializer(base, array))
            return
        self.is_rewired |= tuple(own.dims) != array.shape
        self.values.pop(key_of(own) or "", None)
        tensor = tensor_of(array, own.name, self.values)
        if own.doc_string:
            tensor.doc_string = own.doc_string
        own.CopyFrom(tensor)
        self._forget(name)
        for value in self._declared.get(name, ()):
            if value.type.tensor_type.HasField("shape"):
                value.CopyFrom(helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, array.shape))

    def _forget(self, name: str) -> None:
        """Drops the value of a constant that changed, and of what is computed from it."""
        self._kept.pop(name, None)
        readers = [node for node, _ in self._readers.get(name, {}).values()]
        for output in (output for node in readers for output in node.output if output in self._constant):
            self._forget(output)

    def add_initializer(self, base: str, array: NDArray[Any]) -> str:
        tensor = tensor_of(array, self.fresh_name(base), self.values)
        self._model.graph.initializer.append(tensor)
        self.initializers[tensor.name] = self._model.graph.initializer[-1]
        self._constant.add(tensor.name)
        if self._model.ir_version < 4:  # there, initializers are defaults of inputs
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            self._model.graph.input.append(value)
        return str(tensor.name)

    def set_input(self, node: onnx.NodeProto, index: int, name: str) -> None:
        self.is_rewired = True
        while len(node.input) <= index:
            node.input.append("")
            self._readers.setdefault("", {}).setdefault(id(node), [node, 0])[1] += 1
        self._remove_reader(node, node.input[index])
        for output in self._constant.intersection(node.output):
            self._forget(output)
        node.input[index] = name
        self._readers.setdefault(name, {}).setdefault(id(node), [node, 0])[1] += 1

    def insert(self, node: onnx.NodeProto, beside: onnx.NodeProto, *, after: bool) -> onnx.NodeProto:
        """Puts a node next to another; returns it."""
        self.is_rewired = True
        self._import_domain(node.domain)
        places = self._after if after else self._before
        places.setdefault(id(beside), []).append(node)
        self._add_reader(node)
        self.producer.update(dict.fromkeys(node.output, node))
        if all(name in self._constant for name in node.input):
            self._constant.update(node.output)
        return node

    def _import_domain(self, domain: str) -> None:
        """Lets the model use ONNX's own operators, where it uses none yet: of the newest opset that its IR version has."""
        if domain == "" and not self.opset:
            opsets = (row[2] for row in helper.VERSION_TABLE if row[1] <= self._model.ir_version)
            opset = max(opsets, default=1)  # before IR version 3 there were no others
            self._model.opset_import.append(helper.make_opsetid("", min(opset, _NEWEST_OPSET)))

    def redirect(self, name: str, to: str) -> None:
        """Lets the nodes that read a tensor read another one; what subgraphs and the model's caller read stays."""
        for node, _ in list(self._readers.get(name, {}).values()):
            for index, each in enumerate(node.input):
                if each == name:
                    self.set_input(node, index, to)

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor that a node makes a name that nothing has; subgraphs and the model's caller must not read it."""
        self.is_rewired = True
        node = self.producer.pop(name)
        node.output[list(node.output).index(name)] = new
        self.producer[new] = node
        self._gone.discard(new)
        self._gone.add(name)
        self.redirect(name, new)

    def give_up_output(self, node: onnx.NodeProto, base: str) -> None:
        """Gives the first output of a node a fresh name, so that another node can take over the one it had."""
        self.is_rewired = True
        node.output[0] = self.fresh_name(base)
        self.producer[node.output[0]] = node

    def replace(self, node: onnx.NodeProto, op: str, inputs: Sequence[str], **given: Any) -> None:
        """Makes a node compute its first output otherwise: by another operator of ONNX, from other inputs."""
        self.is_rewired = True
        for name in node.input:
            self._remove_reader(node, name)
        del node.input[:]
        node.input.extend(inputs)
        self._add_reader(node)
        self._lose(node.output[1:])
        del node.output[1:], node.attribute[:]
        node.op_type, node.domain = op, ""
        node.attribute.extend(helper.make_attribute(key, value) for key, value in given.items())

    def remove(self, node: onnx.NodeProto) -> None:
        """Removes a node whose outputs nothing has to make any more."""
        self.is_rewired = True
        self._removed.add(id(node))
        for name in node.input:
            self._remove_reader(node, name)
        for name in captured(node):
            self._captured[name] -= 1
        self._lose(node.output)

    def _lose(self, names: Iterable[str]) -> None:
        for name in filter(None, names):
            self.producer.pop(name, None)
            self._gone.add(name)

    def remove_dead(self, read: Collection[str]) -> None:
        """Removes nodes and initializers that became dead: whose outputs were read, and are not any more."""
        for node in self.nodes[::-1]:
            if any(name in read for name in node.output) and not any(map(self.is_read, filter(None, node.output))):
                self.remove(node)
        for name in [name for name in self.initializers if name in read and not self.is_read(name)]:
            self.values.pop(key_of(self.initializers.pop(name)) or "", None)
            self._gone.add(name)
        graph = self._model.graph
        self._gone.update(name for name in self._sparse if name in read and not self.is_read(name))
        _remove_where(graph.sparse_initializer, lambda each: each.values.name in self._gone)
        for fields in (graph.initializer, graph.input, graph.value_info):
            _remove_where(fields, lambda each: each.name in self._gone)
        _remove_where(graph.quantization_annotation, lambda each: each.tensor_name in self._gone)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _remove_where(fields: Any, is_gone: Callable[[Any], bool]) -> None:
    """From a repeated field, in place: what stays is not copied."""
    for index in reversed(range(len(fields))):
        if is_gone(fields[index]):
            del fields[index]


def named_nodes(nodes: Iterable[onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """Nodes by name; by operator and output where they have none of their own."""
    nodes = list(nodes)
    taken, named = {node.name for node in nodes}, dict[str, onnx.NodeProto]()
    for node in nodes:
        own = node.name
        if not own or own in named:
            base = own = f"{node.op_type}:{next(filter(None, node.output), '')}"
            numbers = itertools.count(1)
            while own in taken:
                own = f"{base}_{next(numbers)}"
            taken.add(own)
        named[own] = node
    return named


def _in_topological_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes in their own order as far as none reads what a later one makes, which onnxruntime allows."""
    nodes = list(nodes)
    producer = {output: k for k, node in enumerate(nodes) for output in node.output if output}
    ordered: list[onnx.NodeProto] = []
    state = [0] * len(nodes)  # 0: not seen, 1: what it reads is being placed, 2: placed
    for start in range(len(nodes)):
        waiting = [start]
        while waiting:
            k = waiting[-1]
            sources = (producer.get(name) for name in (*nodes[k].input, *captured(nodes[k])))
            missing = [source for source in sources if source is not None and not state[source]] if state[k] == 0 else []
            state[k] = max(state[k], 1)
            if missing:
                waiting += reversed(missing)
                continue
            waiting.pop()
            if state[k] == 1:
                state[k] = 2
                ordered.append(nodes[k])
    return ordered


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """All names in a graph and in its subgraphs: what is added needs another one, even where it would hide one of these."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output
        for subgraph in subgraphs(node):
            yield from _names_in(subgraph)


def _dense(sparse: onnx.SparseTensorProto) -> NDArray[Any]:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense[np.unravel_index(indices, dense.shape) if indices.ndim == 1 else tuple(indices.T)] = values
    return dense


def weight_index(node: onnx.NodeProto, graph: Graph) -> int:
    """Which input of a convolution or matrix product is its constant one."""
    return 0 if operator_of(node) in ("Einsum", "MatMul") and graph.is_constant(node.input[0]) else 1


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the subgraphs of a node read or give out and do not make: those may be other tensors of the same name."""
    for graph in subgraphs(node):
        made = {value.name for value in (*graph.input, *graph.initializer)}
        made.update(tensor.values.name for tensor in graph.sparse_initializer)
        made.update(name for inner in graph.node for name in inner.output)
        read = itertools.chain.from_iterable((*inner.input, *captured(inner)) for inner in graph.node)
        yield from (name for name in (*read, *(value.name for value in graph.output)) if name not in made)
