"""A TFLite model as a network; see :mod:`biascorr.graph.network`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.adapters.tflite import files, running
from biascorr.adapters.tflite.bias import Bias
from biascorr.adapters.tflite.edits import edited
from biascorr.adapters.tflite.graph import Editor, Graph, operators_of, patched
from biascorr.adapters.tflite.lowering import Lowered, Node
from biascorr.adapters.tflite.origin import format_of, producer_of, quantization_of
from biascorr.adapters.tflite.products import Product
from biascorr.adapters.tflite.roles import kind_of, role_of
from biascorr.adapters.tflite.tensors import axes_of, dtype_of, grid_of, grid_of_codes, has_codes
from biascorr.graph.layer import Layer, LazyArray
from biascorr.graph.network import Allocator, BiasChange, Edits, Feeds, ModelInput, Shift
from biascorr.graph.operations import Facts, Kind, Operation
from biascorr.graph.origin import Origin
from biascorr.graph.reasons import LayerReport
from biascorr.quantization import Quantization


class TfliteNetwork:
    """A model, and the nodes that it is run by.

    Parameters
    ----------
    graph : Graph
        The model, which is never changed.
    name : str
        The name that errors give it.
    quantizers : mapping from str to Quantization
        The grids that layers, by name, read their input on; not part of the model.
    input_names : sequence of str
        What its inputs are called; as the signature of the model calls them where there are none.
    """

    keeps_provenance = True

    packages = ("ai_edge_litert",)
    keeps_batch_norms = False

    def __init__(
        self, graph: Graph, name: str, quantizers: Mapping[str, Quantization] | None = None, input_names: Sequence[str] = ()
    ) -> None:
        self._graph = graph
        self._name = name
        self._input_names = input_names
        self._lowered = Lowered(graph, quantizers or {}, input_names)
        self._dynamic = self._found_dynamic()
        names, tensors = self._lowered.names, self._lowered.tensors
        self.inputs = [_input(names[index], tensors[index]) for index in self._lowered.inputs]
        self.outputs = [names[index] for index in self._lowered.outputs]
        self.layers = [self._layer(name) for name in self._lowered.products]
        self.unsupported = [LayerReport(name, op, reasons=(reason,)) for name, (op, reason) in self._lowered.left.items()]

    @classmethod
    def load(cls, model: Any, name: str) -> TfliteNetwork:
        """From a path or bytes; see :func:`biascorr.adapters.tflite.files.load` for the errors."""
        content, parsed = files.load(model, name)
        graph = Graph(content, parsed)
        _check_kinds(graph, name)
        network = cls._made(graph, name)
        try:
            network.check()
        except ValueError as error:
            if not (graph.has_custom and any(said in str(error) for said in running.NO_SUCH_OPERATOR)):
                raise
            network = cls._made(replace(graph, lacks_custom=True), name)
            if not network.outputs:
                raise
            network.check()
        return network

    @classmethod
    def _made(cls, graph: Graph, name: str) -> TfliteNetwork:
        """The network of a graph that LiteRT has not seen yet. Raises ValueError where it makes no sense."""
        try:
            network = cls(graph, name)
            network.facts()
        except files.DAMAGED as error:
            raise ValueError(f"{name}: a damaged TFLite file: {error}") from error
        for each in network.layers:
            if network._lowered.made[each.name] not in network._dynamic:
                raise ValueError(f"{name}: a damaged TFLite file: layer {each.name} reads what nothing makes")
        return network

    @property
    def arithmetic(self) -> str:
        """How the kernels of LiteRT compute otherwise than :meth:`part`."""
        if any(map(self._is_run_wrongly, self._lowered.products.values())):
            return "LiteRT runs BATCH_MATMUL of integers with a scale per channel wrongly: quantize that operator per tensor"
        if any(map(self._is_dynamic, self._lowered.products.values())):
            return "kernels of dynamic range quantize what they read, too"
        return "its kernels round elsewhere"

    @functools.cached_property
    def input_ranges(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest value of inputs that are quantized before anything else."""
        graph, found = self._graph, {}
        for given, each in zip(self.inputs, graph.inputs):
            readers = graph.readers.get(each, [])
            codes = graph.tensors[readers[0].outputs[0] if [each.kind for each in readers] == ["QUANTIZE"] else each]
            grid, dtype = grid_of_codes(codes), dtype_of(codes)
            if grid is not None and dtype is not None:
                limits = np.iinfo(dtype)
                low, high = grid.real(np.array([limits.min, limits.max])).tolist()
                found[given.name] = (low, high)
        return found

    def _is_dynamic(self, product: Product) -> bool:
        given, weights = (self._graph.tensors[index] for index in (product.input, product.weights))
        return not has_codes(given) and grid_of(weights) is not None

    def _is_run_wrongly(self, product: Product) -> bool:
        step, reads_codes = product.step_of(self._graph), has_codes(self._graph.tensors[product.input])
        return product.operator.kind == "BATCH_MATMUL" and reads_codes and step is not None and step.size > 1

    def __reduce__(self) -> tuple[Any, ...]:
        graph, lowered = self._graph, self._lowered
        content, patches = (graph.written(), {}) if graph.patches is None else (graph.content, graph.patches)
        return _arrived, (content, patches, graph.lacks_custom, self._name, lowered.quantizers, self._input_names)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the file but for its provenance, and of how it is run and called."""
        quantizers, names = self._lowered.quantizers, [each.name for each in self.inputs]
        grids = sorted((name, float(each.scale), int(each.zero_point), each.bits) for name, each in quantizers.items())
        whole = files.digest_of(self.model), self._graph.lacks_custom, names, grids
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    @property
    def model(self) -> bytes:
        """The file; made each time it is asked for."""
        return self._graph.written()

    @property
    def origin(self) -> Origin:
        """The format of the model, and who made it."""
        model, lowered = self._graph.model, self._lowered
        known = [index for index in lowered.outputs if dtype_of(lowered.tensors[index]) is not None]
        outputs = [_input(lowered.names[index], lowered.tensors[index]) for index in known]
        quantization, producer = quantization_of(model), producer_of(model)
        return Origin(format_of(model), quantization, producer if quantization else None, producer, outputs)

    @property
    def order(self) -> Sequence[str]:
        """Names of all nodes, in topological order; after them, those of layers in other subgraphs."""
        return list(dict.fromkeys([*(node.name for node in self._nodes), *self._lowered.left]))

    @property
    def _nodes(self) -> list[Node]:
        return [node for node in self._lowered.nodes if not node.is_back]

    def _found_dynamic(self) -> set[int]:
        """The tensors that depend on the inputs."""
        found = set(self._lowered.inputs)
        for node in self._lowered.nodes:
            if not node.is_back and not found.isdisjoint(node.operator.inputs):
                found.update(node.operator.outputs)
        return found

    @functools.cached_property
    def operations(self) -> list[Operation]:
        """All nodes that depend on the inputs."""
        lowered = self._lowered
        layers, made = set(lowered.products), []
        for node in self._nodes:
            each = node.operator
            outputs = tuple(lowered.names[index] for index in each.outputs)
            kind = Kind.OTHER if node.name in layers else kind_of(each)
            read = each.inputs if kind is Kind.DEQUANTIZE else [lowered.real.get(index, index) for index in each.inputs]
            inputs = tuple(dict.fromkeys(lowered.names[index] for index in read if index in self._dynamic))
            if any(index in self._dynamic for index in each.outputs):
                is_lasting = all(dtype_of(lowered.tensors[index]) is not None for index in each.outputs)
                made.append(Operation(node.name, inputs, outputs, kind, is_lasting))
        return made

    def facts(self) -> Facts:
        """Facts about operations and tensors; found at the first call."""
        return self._facts

    @functools.cached_property
    def _facts(self) -> Facts:
        lowered = self._lowered
        shapes = {name: axes_of(tensor) for name, tensor in zip(lowered.names, lowered.tensors)}
        roles = {}
        for node in self._nodes:
            each = node.operator
            if node.name not in lowered.products and each.outputs and each.inputs[:1] and each.inputs[0] in self._dynamic:
                ends = (shapes[lowered.names[index]] for index in (each.inputs[0], each.outputs[0]))
                roles[node.name] = role_of(lowered.graph, each, *ends)
        return Facts({name: role for name, role in roles.items() if role is not None}, shapes)

    def part(
        self, given: Feeds, wanted: Sequence[str], *, threads: int = 0, allocator: Allocator | None = None
    ) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
        """Prepares an interpreter that computes the wanted tensors."""
        return running.part(self._lowered, given, wanted, self._name, threads=threads, allocator=allocator)

    def deployed(self, *, threads: int = 0, optimized: bool = True) -> Callable[[Feeds], dict[str, Any]]:  # noqa: ARG002
        """Prepares the file itself to run, with XNNPACK or without; what it takes and gives as codes is real here.

        By one thread, which is the default of LiteRT: with several, some of its kernels compute something else.
        """
        return running.deployed(self._lowered, self._graph.as_run(), self._name, optimized=optimized)

    def check(self) -> None:
        """Raises ValueError where LiteRT does not take the model."""
        running.check(self._lowered, self._graph.as_run(), self._name)

    def bias_change(self, layer: Layer, shift: Shift) -> BiasChange:
        """The change that adding a shift to the bias of a layer would make."""
        return Bias(self._graph, self._lowered.products[layer.name]).change(shift)

    def with_shifts(self, shifts: Mapping[str, Shift]) -> TfliteNetwork:
        """A copy with these shifts added to the biases of layers."""
        editor = Editor(self._graph)
        for name, shift in shifts.items():
            Bias(self._graph, self._lowered.products[name]).write(editor, shift)
        return self._with(editor.graph())

    def edited(self, edits: Edits) -> TfliteNetwork:
        """A copy with these edits."""
        return self._with(edited(self._lowered, edits))

    def with_quantizers(self, quantizations: Mapping[str, Quantization]) -> TfliteNetwork:
        """A copy in which layers read their input moved to a grid; what it writes has no such grids."""
        quantizers = {**self._lowered.quantizers, **quantizations}
        return TfliteNetwork(self._graph, self._name, quantizers, self._input_names)

    def with_input_names(self, names: Sequence[str]) -> TfliteNetwork:
        """The same network, whose inputs are called so; the file keeps its own names."""
        return TfliteNetwork(self._graph, self._name, self._lowered.quantizers, names)

    def _with(self, graph: Graph) -> TfliteNetwork:
        return TfliteNetwork(graph, self._name, self._lowered.quantizers, self._input_names)

    def _layer(self, name: str) -> Layer:
        lowered, graph = self._lowered, self._graph
        product = lowered.products[name]
        bias = Bias(graph, product).real
        shape = product.shape
        return Layer(
            name,
            product.operator.kind,
            LazyArray(shape, np.dtype(np.float32), functools.partial(product.weights_of, graph)),
            product.layout,
            lowered.names[lowered.read[name]],
            None,
            product.axis,
            lowered.names[lowered.made[name]],
            product.axis,
            groups=product.groups,
            window=product.window,
            weight_step=product.step_of(graph),
            bias=None if bias is None else bias.astype(np.float32).reshape(-1, *[1] * (-1 - product.axis)),
            shares_weights=not graph.is_own(product.weights),
            weight_format=product.format_of(graph),
        )

    def save(self, path: str | PathLike[str], *, force: bool = False, provenance: str | None = None) -> None:
        """Writes a .tflite file, whole or not at all.

        Provenance is a file in the archive behind the flatbuffer, :data:`biascorr.adapters.tflite.files.PROVENANCE`.
        """
        files.save(self.model, path, force=force, provenance=provenance)


def _arrived(
    content: bytes,
    patches: Mapping[int, NDArray[np.uint8]],
    lacks_custom: bool,
    name: str,
    quantizers: Mapping[str, Quantization],
    input_names: Sequence[str],
) -> TfliteNetwork:
    """The network that was pickled."""
    graph = patched(*files.load(content, name), patches, lacks_custom=lacks_custom)
    return TfliteNetwork(graph, name, quantizers, input_names)


def _check_kinds(graph: Graph, name: str) -> None:
    """Raises ValueError for inputs that are no numbers, and for outputs that depend on more than the inputs."""
    for index in graph.inputs:
        if dtype_of(graph.tensors[index]) is None:
            given = graph.names[index]
            raise ValueError(f"{name}: input {given} is of a type that numpy does not have, expected a model of numbers")
    kinds = {each.kind for subgraph in graph.model.subgraphs for each in operators_of(graph.model, subgraph)}
    if "ASSIGN_VARIABLE" in kinds:
        raise ValueError(
            f"{name}: it keeps variables from one batch to the next (ASSIGN_VARIABLE), expected outputs that depend on its "
            "inputs alone"
        )


def _input(name: str, tensor: Any) -> ModelInput:
    dtype = dtype_of(tensor)
    assert dtype is not None  # others are not loaded
    return ModelInput(name, dtype, axes_of(tensor))
