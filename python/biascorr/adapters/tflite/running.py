"""Parts of a network, cut out of the flatbuffer and run by LiteRT."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

from biascorr.adapters.tflite import files
from biascorr.adapters.tflite.lowering import Lowered, Node
from biascorr.adapters.tflite.products import CONTROL
from biascorr.adapters.tflite.tensors import axes_of, dtype_of, grid_of_codes, scales_of_blocks, shape_of
from biascorr.graph.network import Allocator, Feeds

Arrays: TypeAlias = Mapping[int, NDArray[Any]]

_TRIAL = """
import sys
sys.path[:] = filter(None, sys.path)  # without the working folder, which may have anything in it
import contextlib
from ai_edge_litert.interpreter import Interpreter, OpResolverType
for size in sys.argv[1:]:
    content = sys.stdin.buffer.read(int(size))
    for kernels in OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES:
        with contextlib.suppress(Exception):
            interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kernels)
            interpreter.allocate_tensors()
            for given in interpreter.get_input_details():
                interpreter.tensor(given["index"])()[...] = 0
            interpreter.invoke()
"""

NO_SUCH_OPERATOR = ("custom op", "Select TensorFlow op")
"""How LiteRT says that it does not have an operator."""

_LARGE = 64 << 20
"""Bytes of a model that are not held more often than has to be: LiteRT keeps a copy of the weights for each interpreter."""

_KILLED = -9
"""What a process gives out that was ended by another one, as where memory is short."""

_PATIENCE = 300
"""Seconds after which a file has no end: one batch takes a few, of the largest networks."""

_survived: set[bytes] = set()
"""Digests of the files that were tried."""


def check(lowered: Lowered, content: bytes, name: str) -> None:
    """Raises ValueError where LiteRT does not take a file, or does not survive it or its nodes.

    LiteRT checks much of a file, but not all that its kernels rely on; so a file is run in a process of its own before it is in
    this one, and so are its nodes, unless it is large.
    """
    if (digest := hashlib.sha256(content).digest()) not in _survived:
        tried = [content] if len(content) >= _LARGE else [content, _whole(lowered)]
        command = [sys.executable, "-c", _TRIAL, *(str(len(each)) for each in tried)]
        with contextlib.suppress(OSError):  # no other process can be started
            try:
                given = b"".join(tried)
                trial = subprocess.run(command, input=given, capture_output=True, check=False, timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                raise ValueError(f"{name}: LiteRT does not come to an end with it, in {_PATIENCE} seconds") from None
            if trial.returncode < 0 and trial.returncode != _KILLED:
                raise ValueError(
                    f"{name}: LiteRT crashes when it runs it (signal {-trial.returncode}): a damaged file, or too little memory"
                )
        _survived.add(digest)
    runner = Runner(content, name)
    is_any_size = any(None in axes_of(lowered.graph.tensors[index]) for index in lowered.graph.inputs)
    if not is_any_size or lowered.graph.has_custom:
        runner.allocate()


def _whole(lowered: Lowered) -> bytes:
    """All nodes as one model, for one batch."""
    given = {index: np.zeros(shape_of(lowered.tensors[index]), np.bool_) for index in lowered.inputs}
    return files.packed_in_front(_model(lowered, _needed(lowered, given, set(lowered.outputs)), given, lowered.outputs))


class Runner:
    """Interpreters of one model, as many as there are threads that run it at once; one where it is large.

    Parameters
    ----------
    content : bytes
        The model.
    name : str
        What errors call it.
    threads : int
        Threads of each interpreter; 0: those that LiteRT takes.
    optimized : bool
        Whether XNNPACK runs what it can.
    """

    def __init__(self, content: bytes, name: str, *, threads: int = 0, optimized: bool = True) -> None:
        self._content = content
        self._name = name
        self._threads = threads or None
        self._kernels = OpResolverType.AUTO if optimized else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._first = self._made()
        self._idle: queue.SimpleQueue[_Ready] = queue.SimpleQueue()
        self._idle.put(self._first)

    def _made(self) -> _Ready:
        with runs(self._name):
            return _Ready(
                Interpreter(model_content=self._content, num_threads=self._threads, experimental_op_resolver_type=self._kernels)
            )

    def allocate(self) -> None:
        """Prepares one for batches as the model has them. Raises ValueError where LiteRT cannot."""
        with runs(self._name):
            self._first.allocate()

    def __call__(self, feeds: Sequence[NDArray[Any]], allocator: Allocator | None = None) -> list[NDArray[Any]]:
        """The outputs of a batch, in their order, for inputs in theirs."""
        try:
            ready = self._idle.get(block=len(self._content) >= _LARGE)
        except queue.Empty:
            ready = self._made()
        try:
            with runs(self._name):
                return ready(feeds, allocator)
        finally:
            self._idle.put(ready)


class _Ready:
    """An interpreter, with its tensors allocated for batches of some shapes."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._inputs = [each["index"] for each in interpreter.get_input_details()]
        self._outputs = [each["index"] for each in interpreter.get_output_details()]
        self._shapes: list[tuple[int, ...]] | None = None

    def allocate(self) -> None:
        """Allocates its tensors for batches of the shapes that the model has."""
        self._interpreter.allocate_tensors()

    def __call__(self, feeds: Sequence[NDArray[Any]], allocator: Allocator | None) -> list[NDArray[Any]]:
        interpreter, shapes = self._interpreter, [array.shape for array in feeds]
        if shapes != self._shapes:
            for detail, shape in zip(interpreter.get_input_details(), shapes):
                if tuple(detail["shape"]) != shape:
                    interpreter.resize_tensor_input(detail["index"], shape)
            interpreter.allocate_tensors()
            self._shapes = shapes
        interpreter.reset_all_variables()
        for index, array in zip(self._inputs, feeds):
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return [_taken(interpreter, index, allocator) for index in self._outputs]


def _taken(interpreter: Any, index: int, allocator: Allocator | None) -> NDArray[Any]:
    """An output, in memory of its own."""
    if allocator is None:
        return np.asarray(interpreter.get_tensor(index))
    view = interpreter.tensor(index)()
    out = allocator.take(view.shape, view.dtype)
    np.copyto(out, view)
    return out


@contextlib.contextmanager
def runs(name: str) -> Iterator[None]:
    """What LiteRT says of a model that it does not run, as one error."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:400]
        raise ValueError(f"{name}: LiteRT cannot run it: {said}") from error


def part(
    lowered: Lowered, given: Feeds, wanted: Sequence[str], name: str, *, threads: int, allocator: Allocator | None
) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
    """Prepares the computation of wanted tensors from given ones."""
    index = {name: position for position, name in enumerate(lowered.names)}
    feeds: Arrays = {index[name]: array for name, array in given.items()}
    computed = [name for name in dict.fromkeys(wanted) if name not in given]
    nodes = _needed(lowered, feeds, {index[name] for name in computed})
    if not computed:
        return lambda feeds: {name: feeds[name] for name in wanted}
    read = [each for each in feeds if any(each in node.operator.inputs for node in nodes)]
    content = files.packed_in_front(
        _model(lowered, nodes, {each: feeds[each] for each in read}, [index[name] for name in computed])
    )
    runner = Runner(content, name, threads=threads)
    names = [lowered.names[each] for each in read]

    def compute(feeds: Feeds) -> dict[str, NDArray[Any]]:
        results = dict(zip(computed, runner([feeds[name] for name in names], allocator)))
        return {name: feeds[name] if name in feeds else results[name] for name in wanted}

    return compute


def _needed(lowered: Lowered, given: Mapping[int, Any], wanted: set[int]) -> list[Node]:
    """The nodes that wanted tensors need, in order."""
    needed, nodes = set(wanted), []
    for node in reversed(lowered.nodes):
        if needed.isdisjoint(node.operator.outputs) or (node.is_back and node.operator.inputs[0] not in given):
            continue
        nodes.append(node)
        needed.difference_update(node.operator.outputs)
        needed.update(each for each in node.operator.inputs if each >= 0 and each not in given)
    return nodes[::-1]


def _model(lowered: Lowered, nodes: Sequence[Node], given: Arrays, wanted: Sequence[int]) -> Any:
    """A model of some nodes."""
    used = dict.fromkeys([*given, *wanted, *(index for node in nodes for index in node.operator.tensors)])
    used |= dict.fromkeys(scales for index in used for scales in scales_of_blocks(lowered.tensors[index]))
    place = {index: position for position, index in enumerate(used)}
    model, subgraph = schema.ModelT(), schema.SubGraphT()
    model.version, model.description = 3, b""
    model.buffers, model.operatorCodes, model.subgraphs = [schema.BufferT()], [], [subgraph]
    subgraph.tensors = [_tensor(lowered, index, given, place, model) for index in used]
    subgraph.inputs = np.array([place[index] for index in given], np.int32)
    subgraph.outputs = np.array([place[index] for index in wanted], np.int32)
    subgraph.operators = [_table(node, place, model) for node in nodes]
    if any(node.operator.kind in CONTROL for node in nodes):
        _add_subgraphs(lowered, model)
    return model


def _table(node: Node, place: Mapping[int, int], model: Any) -> Any:
    table = copy.copy(node.operator.table)
    table.inputs = np.array([place.get(index, -1) for index in node.operator.inputs], np.int32)
    table.outputs = np.array([place[index] for index in node.operator.outputs], np.int32)
    if table.intermediates is not None:
        table.intermediates = np.array([place[index] for index in table.intermediates], np.int32)
    table.opcodeIndex = len(model.operatorCodes)
    model.operatorCodes.append(node.operator.code)
    return table


def _tensor(lowered: Lowered, index: int, given: Arrays, place: Mapping[int, int], model: Any) -> Any:
    tensor = copy.copy(lowered.tensors[index])
    tensor.buffer = 0
    if scales_of_blocks(tensor):
        tensor.quantization = copy.copy(tensor.quantization)
        details = tensor.quantization.details = copy.copy(tensor.quantization.details)
        details.scales, details.zeroPoints = (place.get(each, -1) for each in (details.scales, details.zeroPoints))
    if index in given:
        tensor.shape, tensor.shapeSignature = np.array(given[index].shape, np.int32), None
    elif index in lowered.values:
        tensor.buffer = _added(model, np.frombuffer(np.ascontiguousarray(lowered.values[index]).tobytes(), np.uint8))
    elif index < len(lowered.graph.tensors) and lowered.graph.is_stored(index):
        tensor.buffer = _added(model, lowered.graph.raw(index))
    return tensor


def _added(model: Any, raw: NDArray[np.uint8] | None) -> int:
    model.buffers.append(schema.BufferT(raw))
    return len(model.buffers) - 1


def _add_subgraphs(lowered: Lowered, model: Any) -> None:
    """The subgraphs that control flow runs, as they are."""
    whole = lowered.graph.model
    first = len(model.operatorCodes)
    model.operatorCodes.extend(whole.operatorCodes)
    for subgraph in whole.subgraphs[1:]:
        added = copy.copy(subgraph)
        added.tensors = [copy.copy(each) for each in subgraph.tensors or []]
        for tensor in added.tensors:
            tensor.buffer = _added(model, whole.buffers[tensor.buffer].data) if tensor.buffer else 0
        added.operators = [copy.copy(each) for each in subgraph.operators or []]
        for table in added.operators:
            table.opcodeIndex += first
        model.subgraphs.append(added)


def deployed(lowered: Lowered, content: bytes, name: str, *, optimized: bool) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
    """Prepares a file to run as it is; takes and gives real numbers."""
    graph, tensors = lowered.graph, lowered.graph.tensors
    runner = _prepared(content, name, optimized)
    inputs = [(lowered.names[given], tensors[index]) for given, index in zip(lowered.inputs, graph.inputs)]
    outputs = [(lowered.names[real], tensors[index]) for real, index in zip(lowered.outputs, graph.ends)]

    def compute(feeds: Feeds) -> dict[str, NDArray[Any]]:
        found = runner([_codes(tensor, feeds[name]) for name, tensor in inputs])
        return {name: _real(tensor, array) for (name, tensor), array in zip(outputs, found)}

    return compute


def _prepared(content: bytes, name: str, optimized: bool) -> Runner:
    """With XNNPACK, too, where other kernels do not take the file: they take no groups of one scale."""
    if not optimized:
        with contextlib.suppress(ValueError):
            runner = Runner(content, name, optimized=False)
            runner.allocate()
            return runner
    return Runner(content, name)


def _codes(tensor: Any, array: NDArray[Any]) -> NDArray[Any]:
    grid, dtype = grid_of_codes(tensor), dtype_of(tensor)
    return array if grid is None or dtype is None else grid.codes(array, dtype)


def _real(tensor: Any, array: NDArray[Any]) -> NDArray[Any]:
    grid = grid_of_codes(tensor)
    return array if grid is None else grid.real(array)
