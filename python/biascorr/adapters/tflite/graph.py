"""The graph of a TFLite model: the tensors, constants and operators of the subgraph that runs first.

A graph is never changed: an edit makes another one, which has all in common that is as it was. As long as nothing changed but
bytes of buffers that one tensor has for itself, these are patched in the file as it was given; any other change writes it anew.
"""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from biascorr.adapters.tflite import files
from biascorr.adapters.tflite.tensors import PACKED, grid_of, indices, name_of, real_tensor, type_of, values_of

_KINDS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}

_IMPURE = ("CALL_ONCE", "CUSTOM", "IF", "VAR_HANDLE", "WHILE")
"""Operators that may give out something else each time, of whatever they read."""


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator of a graph.

    Parameters
    ----------
    kind : str
        As the schema calls it: "CONV_2D".
    inputs, outputs : tuple of int
        Tensors by their index; -1 for an input that is left out.
    table : OperatorT
        Its options, and what else the file says of it.
    code : OperatorCodeT
        What it runs by.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    table: Any
    code: Any

    @property
    def options(self) -> Any:
        """The options of a builtin operator; None where it has none."""
        return self.table.builtinOptions

    @property
    def tensors(self) -> list[int]:
        """All tensors that it has, those that recurrent ones keep what is between their products in among them."""
        return [index for index in (*self.inputs, *self.outputs, *indices(self.table.intermediates)) if index >= 0]

    def input(self, position: int) -> int | None:
        """One of its inputs; None where it is left out."""
        index = self.inputs[position] if position < len(self.inputs) else -1
        return None if index < 0 else index


def operator(kind: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None, *, version: int = 1) -> Operator:
    """An operator that the file does not have."""
    code, table = schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
    if options is not None:
        table.builtinOptions = options
        table.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
    return Operator(kind, tuple(inputs), tuple(outputs), table, code)


@dataclass(frozen=True, eq=False)
class Graph:
    """The first subgraph of a model.

    Parameters
    ----------
    content : bytes
        The file that it was read from.
    model : ModelT
        What is in it now; buffers behind the flatbuffer are like any other.
    patches : mapping from int to ndarray, or None
        Other bytes of some of its buffers; None where it has to be written anew.
    lacks_custom : bool
        Whether LiteRT does not have the custom operators of the model.
    """

    content: bytes
    model: Any
    patches: Mapping[int, NDArray[np.uint8]] | None = field(default_factory=dict)
    lacks_custom: bool = False

    @property
    def subgraph(self) -> Any:
        """The subgraph."""
        return self.model.subgraphs[0]

    @functools.cached_property
    def tensors(self) -> list[Any]:
        """Its tensors."""
        return list(self.subgraph.tensors or [])

    @functools.cached_property
    def inputs(self) -> list[int]:
        """Its inputs."""
        return indices(self.subgraph.inputs)

    @functools.cached_property
    def outputs(self) -> list[int]:
        """Its outputs."""
        return indices(self.subgraph.outputs)

    @functools.cached_property
    def operators(self) -> list[Operator]:
        """Its operators, in the order in which they run."""
        return operators_of(self.model, self.subgraph)

    @functools.cached_property
    def has_custom(self) -> bool:
        """Whether it has operators that are not of LiteRT."""
        return any(each.kind == "CUSTOM" for each in self.operators)

    @functools.cached_property
    def runnable(self) -> list[Operator]:
        """The operators that LiteRT runs: all but custom ones that it does not have, and what depends on these."""
        blocked: set[int] = set()
        found = []
        for each in self.operators:
            if self.lacks_custom and (each.kind == "CUSTOM" or not blocked.isdisjoint(each.inputs)):
                blocked.update(each.outputs)
            else:
                found.append(each)
        return found

    @functools.cached_property
    def ends(self) -> list[int]:
        """Its outputs; where some do not run, those that do, and what operators that do not run would read."""
        if not self.lacks_custom:
            return self.outputs
        computed = {index for each in self.runnable for index in each.outputs} - self.constants
        read = [index for each in self.operators if each not in self.runnable for index in each.inputs]
        return [index for index in dict.fromkeys([*self.outputs, *read]) if index in computed]

    @functools.cached_property
    def producers(self) -> dict[int, Operator]:
        """The operator that makes each tensor."""
        return {index: each for each in self.operators for index in each.outputs}

    @functools.cached_property
    def readers(self) -> dict[int, list[Operator]]:
        """The operators that read each tensor, one as often as it reads it."""
        found: dict[int, list[Operator]] = {}
        for each in self.operators:
            for index in each.inputs:
                found.setdefault(index, []).append(each)
        return found

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the tensors, each another one.

        A converter names what it fused by all the parts, "conv/Relu;conv/BiasAdd;...": the first one is enough where no other
        tensor that is computed, and not only converted, starts with it.
        """
        named = [name_of(tensor) or f"tensor {index}" for index, tensor in enumerate(self.tensors)]
        converting = ("QUANTIZE", "DEQUANTIZE")
        made = [index for index, each in self.producers.items() if each.kind not in converting]
        computed = [*self.inputs, *made]
        starts = collections.Counter(named[index].partition(";")[0] for index in computed)
        short = {index: start for index in computed if starts[start := named[index].partition(";")[0]] == 1}
        found, taken = dict.fromkeys([*computed, *range(len(named))], ""), set[str]()
        for index in found:  # constants after all others
            found[index] = unique(short.get(index, named[index]), taken)
        return [found[index] for index in range(len(named))]

    @functools.cached_property
    def constants(self) -> set[int]:
        """The tensors that do not depend on the inputs: stored, or made of such ones."""
        found = {index for index in range(len(self.tensors)) if self.is_stored(index)}
        for each in self.operators:
            given = [index for index in each.inputs if index >= 0]
            if given and each.kind not in _IMPURE and found.issuperset(given):
                found.update(each.outputs)
        return found

    def is_stored(self, index: int) -> bool:
        """Whether the elements of a tensor are in the file."""
        return self.raw(index) is not None

    def raw(self, index: int) -> NDArray[np.uint8] | None:
        """The bytes of a tensor in the file; None where there are none."""
        raw = self.model.buffers[self.tensors[index].buffer].data
        return None if raw is None or not len(raw) else raw

    def value(self, index: int) -> NDArray[Any]:
        """The elements of a tensor that is stored, as they are."""
        raw = self.raw(index)
        assert raw is not None  # asked for stored ones alone
        return values_of(self.tensors[index], raw)

    def source(self, index: int) -> int | None:
        """The stored tensor whose elements this one has, maybe dequantized; None where there is none."""
        if self.is_stored(index):
            return index
        made = self.producers.get(index)
        is_same = made is not None and made.kind == "DEQUANTIZE" and index in self.constants
        return self.source(made.inputs[0]) if is_same and made is not None else None

    def real(self, index: int) -> NDArray[Any]:
        """The elements of a tensor with a source, as real numbers."""
        source = self.source(index)
        assert source is not None
        values, grid = self.value(source), grid_of(self.tensors[source])
        return values.astype(np.float32, copy=False) if grid is None else grid.real(values)

    @functools.cached_property
    def uses(self) -> collections.Counter[int]:
        """How many tensors of all subgraphs, and entries of metadata, are in each buffer."""
        entries = [tensor.buffer for each in self.model.subgraphs for tensor in each.tensors or []]
        entries += [each.buffer for each in self.model.metadata or []]
        return collections.Counter([*entries, *indices(self.model.metadataBuffer)])

    def is_own(self, index: int) -> bool:
        """Whether one operator alone reads a constant that has its bytes for itself, so that these can be others.

        So does what dequantizes it, where it is not stored itself.
        """
        tensor = self.tensors[index]
        if len(self.readers.get(index, ())) != 1 or index in self.outputs or tensor.isVariable or tensor.type in PACKED:
            return False
        if self.is_stored(index):
            return self.uses[tensor.buffer] == 1
        return self.source(index) is not None and self.is_own(self.producers[index].inputs[0])

    def as_run(self) -> bytes:
        """The file, or the part of it that runs."""
        if not self.lacks_custom:
            return self.written()
        model, subgraph = copy.copy(self.model), copy.copy(self.subgraph)
        subgraph.operators, subgraph.outputs = [each.table for each in self.runnable], np.array(self.ends, np.int32)
        model.subgraphs, model.signatureDefs = [subgraph, *self.model.subgraphs[1:]], None
        return files.packed(model)

    def written(self) -> bytes:
        """The file."""
        if self.patches is None:
            return files.with_tail(files.packed(self.model), self.content)
        patched = bytearray(self.content) if self.patches else self.content
        for index, raw in self.patches.items():
            start = files.place_of(self.content, index)
            patched[start : start + len(raw)] = raw.tobytes()  # type: ignore[index]
        return bytes(patched)


def patched(content: bytes, model: Any, patches: Mapping[int, NDArray[np.uint8]], *, lacks_custom: bool) -> Graph:
    """The graph of a file, with other bytes of some of its buffers."""
    for index, raw in patches.items():
        model.buffers[index] = schema.BufferT(raw)
    return Graph(content, model, patches, lacks_custom)


def operators_of(model: Any, subgraph: Any) -> list[Operator]:
    """The operators of a subgraph, in the order in which they run."""
    codes = model.operatorCodes
    return [_operator(each, codes[each.opcodeIndex]) for each in subgraph.operators or []]


def _operator(table: Any, code: Any) -> Operator:
    kind = _KINDS.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")
    return Operator(kind, tuple(indices(table.inputs)), tuple(indices(table.outputs)), table, code)


def unique(name: str, taken: set[str]) -> str:
    """The name, or one like it that is not taken; taken from then on."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name} ({count})"
    taken.add(found)
    return found


class Editor:
    """Makes a graph that is other than a given one.

    Parameters
    ----------
    graph : Graph
        The given one; the two share what is not changed.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._patches = None if graph.patches is None else dict(graph.patches)
        self._model = copy.copy(graph.model)
        self._model.buffers = list(graph.model.buffers)
        self._model.operatorCodes = list(graph.model.operatorCodes)
        self._subgraph = copy.copy(graph.subgraph)
        self._model.subgraphs = [self._subgraph, *graph.model.subgraphs[1:]]
        self._subgraph.tensors = list(graph.tensors)
        self._operators = {id(each): copy.copy(each.table) for each in graph.operators}
        self._order = [self._operators[id(each)] for each in graph.operators]

    def store(self, index: int, values: NDArray[Any]) -> None:
        """Gives a tensor that has its bytes for itself other elements of its type."""
        buffer, raw = self._subgraph.tensors[index].buffer, np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self._model.buffers[buffer] = schema.BufferT(raw)
        if self._patches is not None:
            self._patches[buffer] = raw

    def add_tensor(self, tensor: Any, values: NDArray[Any] | None = None) -> int:
        """Adds a tensor, with elements if it is a constant."""
        self._patches = None
        if values is not None:
            tensor.buffer = self._add_buffer(np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8))
        self._subgraph.tensors.append(tensor)
        return len(self._subgraph.tensors) - 1

    def add_constant(self, values: NDArray[Any], name: str) -> int:
        """Adds a constant."""
        tensor = real_tensor(values.shape, name)
        tensor.type = type_of(values.dtype)
        return self.add_tensor(tensor, values)

    def _add_buffer(self, raw: NDArray[np.uint8]) -> int:
        self._patches = None
        self._model.buffers.append(schema.BufferT(raw))
        return len(self._model.buffers) - 1

    def set_input(self, changed: Operator, position: int, index: int) -> None:
        """Lets an operator read another tensor."""
        table, self._patches = self._operators[id(changed)], None
        inputs = [*indices(table.inputs), *[-1] * (position + 1 - len(indices(table.inputs)))]
        inputs[position] = index
        table.inputs = np.array(inputs, np.int32)

    def set_output(self, changed: Operator, index: int) -> None:
        """Lets an operator make another tensor."""
        self._patches = None
        self._operators[id(changed)].outputs = np.array([index], np.int32)

    def set_options(self, changed: Operator, **options: int) -> None:
        """Gives an operator other options."""
        table, self._patches = self._operators[id(changed)], None
        table.builtinOptions = copy.copy(table.builtinOptions)
        for name, value in options.items():
            setattr(table.builtinOptions, name, value)

    def replace(self, changed: Operator, by: Operator) -> None:
        """Puts an operator in the place of another."""
        self._fill(self._operators[id(changed)], by)

    def insert_after(self, before: Operator, added: Operator) -> None:
        """Puts an operator after another."""
        table = schema.OperatorT()
        self._fill(table, added)
        self._order.insert(self._order.index(self._operators[id(before)]) + 1, table)
        self._operators[id(added)] = table

    def redirect(self, index: int, other: int, *excepted: Operator) -> None:
        """Lets all operators that read a tensor, but some, read another one."""
        self._patches = None
        left = {id(self._operators[id(each)]) for each in excepted}
        for table in self._order:
            if id(table) not in left and index in indices(table.inputs):
                table.inputs = np.where(table.inputs == index, other, table.inputs).astype(np.int32)

    def _fill(self, table: Any, by: Operator) -> None:
        self._patches = None
        table.__dict__.update(copy.copy(by.table).__dict__)
        table.inputs, table.outputs = (np.array(each, np.int32) for each in (by.inputs, by.outputs))
        self._model.operatorCodes.append(by.code)
        table.opcodeIndex = len(self._model.operatorCodes) - 1

    def graph(self) -> Graph:
        """The graph that was made."""
        self._subgraph.operators = self._order
        return Graph(self._graph.content, self._model, self._patches, self._graph.lacks_custom)
