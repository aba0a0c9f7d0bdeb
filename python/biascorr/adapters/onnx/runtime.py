"""onnxruntime, as this package uses it: sessions that compute what the graph says, errors in one line."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from biascorr.adapters.onnx.operators import operator_of, subgraph_nodes, subgraphs
from biascorr.adapters.onnx.tensors import Values, array_of, is_foreign, is_packed, key_of, whole_tensor
from biascorr.graph.network import Allocator

_FATAL = 4

_REWRITING = [
    "ClipQuantRewrite",
    "DoubleQDQPairsRemover",
    "DynamicQuantizeMatMulFusion",
    "EliminateDropout",
    "MatMulIntegerToFloatFusion",
    "ReluQuantRewrite",
]
"""Optimizers that may change the arithmetic: a Relu before a quantizer to float8 is lost, or a Dropout that trains."""


class Optimizations(enum.Enum):
    """The optimizers of onnxruntime that a session uses."""

    SAME_ARITHMETIC = enum.auto()
    """None changes the arithmetic of quantizers, merges one into its neighbours, whose integer arithmetic may saturate on some
    CPUs, or rounds real weights between quantizers to 8 bits: what runs is the graph, in floating point, on every machine."""
    DEFAULT = enum.auto()
    NONE = enum.auto()


_WORTH_BINDING = 128 << 10
"""Bytes of outputs below which new memory costs less than to say where else they go (measured)."""


class Session:
    """A session on the CPU.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; owned by this object.
    values : mapping
        The values of its detached tensors.
    name : str
        The name that errors give it.
    threads : int
        Threads of each run; 0: all there are.
    optimizations : Optimizations
        What is done to the model before it runs.

    Raises
    ------
    ValueError
        onnxruntime does not take the model, which is named.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        values: Values,
        name: str,
        *,
        threads: int = 0,
        optimizations: Optimizations = Optimizations.SAME_ARITHMETIC,
    ) -> None:
        self._name = name
        options = _options(optimizations)
        options.intra_op_num_threads = threads
        self._given, self._made = _as_float32(model)
        _make_initializers(model)
        _remove_unread(model)
        self._held = _shared(model, values)  # onnxruntime may read them as long as it runs
        options.add_external_initializers(list(self._held), list(self._held.values()))
        with _one_line(name):
            self._session = _made(model, options, optimizations)

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs. Raises ValueError, naming what ran, where onnxruntime fails."""
        with _one_line(self._name):
            made = [self._made.get(name, name) for name in names]
            outputs: list[NDArray[Any]] = self._session.run(made, {self._given.get(key, key): feeds[key] for key in feeds})
        return outputs

    def run_into(self, arrays: Mapping[str, NDArray[Any]], feeds: Mapping[str, NDArray[Any]]) -> None:
        """Writes outputs into these arrays, which have their types and shapes."""
        binding = self._session.io_binding()
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # has to live as long as it runs
        for name, array in contiguous.items():
            binding.bind_cpu_input(self._given.get(name, name), array)
        for name, array in arrays.items():
            binding.bind_output(self._made.get(name, name), "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)


def check(model: onnx.ModelProto, values: Values, name: str, optimizations: Optimizations = Optimizations.NONE) -> None:
    """Raises ValueError, naming the model, where onnxruntime does not take it.

    Its large tensors are declared as inputs, so that none of them is read or copied; an operator that insists on constants is
    given them.
    """
    declared = onnx.ModelProto()
    declared.CopyFrom(model)
    _make_initializers(declared)
    large = [tensor for tensor in declared.graph.initializer if key_of(tensor) is not None]
    inputs = {value.name for value in declared.graph.input}
    for tensor in large:
        if tensor.name not in inputs:
            declared.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    kept = [tensor for tensor in declared.graph.initializer if key_of(tensor) is None]
    if large:
        del declared.graph.initializer[:]
        declared.graph.initializer.extend(kept)
    options = _options(optimizations)
    options.intra_op_num_threads = 1  # none runs
    try:
        with _one_line(name):
            _made(declared, options, optimizations)
    except ValueError:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        Session(whole, values, name, optimizations=optimizations)


def _options(optimizations: Optimizations) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    if optimizations is Optimizations.NONE:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimizations is Optimizations.SAME_ARITHMETIC:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _made(model: onnx.ModelProto, options: Any, optimizations: Optimizations) -> Any:
    disabled = _REWRITING if optimizations is Optimizations.SAME_ARITHMETIC else None
    return onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled,
        enable_fallback=0,  # which prints what is wrong, and tries again with all optimizers
    )


def _as_float32(model: onnx.ModelProto) -> tuple[dict[str, str], dict[str, str]]:
    """Has inputs and outputs of types that numpy has not cross as float32, which holds all their values; their names there."""
    given = {each.name: f"{each.name}/given" for each in model.graph.input if is_foreign(each.type.tensor_type.elem_type)}
    made = {each.name: f"{each.name}/made" for each in model.graph.output if is_foreign(each.type.tensor_type.elem_type)}
    for value in model.graph.input:
        if value.name in given:
            to = value.type.tensor_type.elem_type
            model.graph.node.insert(0, helper.make_node("Cast", [given[value.name]], [value.name], to=to))
    for value in model.graph.output:
        if value.name in made:
            model.graph.node.append(helper.make_node("Cast", [value.name], [made[value.name]], to=onnx.TensorProto.FLOAT))
    for values, names in ((model.graph.input, given), (model.graph.output, made)):
        for value in values:
            if value.name in names:
                value.name, value.type.tensor_type.elem_type = names[value.name], onnx.TensorProto.FLOAT
    return given, made


def _make_initializers(model: onnx.ModelProto) -> None:
    """Makes initializers of Constant nodes with detached values."""
    nodes = model.graph.node
    for k in reversed([k for k, node in enumerate(nodes) if operator_of(node) == "Constant"]):
        if len(nodes[k].attribute) == 1 and key_of(nodes[k].attribute[0].t) is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(nodes[k].attribute[0].t)
            tensor.name = nodes[k].output[0]
            del nodes[k]


def _remove_unread(model: onnx.ModelProto) -> None:
    """Removes detached initializers that nothing reads: onnxruntime does, too, and then misses them."""
    nodes = [inner for node in model.graph.node for inner in (node, *subgraph_nodes(node))]
    graphs = [model.graph, *(graph for node in nodes for graph in subgraphs(node))]
    read = {name for node in nodes for name in node.input} | {output.name for graph in graphs for output in graph.output}
    tensors = model.graph.initializer
    for k in reversed([k for k, each in enumerate(tensors) if key_of(each) is not None and each.name not in read]):
        del tensors[k]


def _shared(model: onnx.ModelProto, values: Values) -> dict[str, Any]:
    """The values of detached initializers, as onnxruntime takes them; those that it does not take go into the model."""
    shared = {}
    for tensor in model.graph.initializer:
        if key_of(tensor) is None:
            continue
        if is_packed(tensor.data_type):
            tensor.CopyFrom(whole_tensor(tensor, values))
            continue
        array = np.require(array_of(tensor, values), requirements=["A", "C"])
        if array.dtype.char in "?bBhHiIlLqQefd":
            shared[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        elif hasattr(onnxruntime.OrtValue, "ortvalue_from_numpy_with_onnx_type"):  # types that numpy has not
            bits = array.view(f"u{array.dtype.itemsize}")
            shared[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, tensor.data_type)
        else:  # before onnxruntime 1.20
            tensor.CopyFrom(whole_tensor(tensor, values))
    return shared


class Runner:
    """A session that runs again and again and, where the sizes of its outputs are known by then, writes into given memory.

    Parameters
    ----------
    session : Session
        The session; several threads may call.
    names : sequence of str
        Its outputs.
    allocator : Allocator or None
        Gives the memory.
    """

    def __init__(self, session: Session, names: Sequence[str], allocator: Allocator | None) -> None:
        self._session = session
        self._names = list(names)
        self._allocator = allocator
        self._outputs: dict[Any, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}  # by the shapes of the inputs

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        key = tuple(array.shape for array in feeds.values())
        if self._allocator is not None and key in self._outputs:
            try:
                arrays = [self._allocator.take(*each) for each in self._outputs[key]]
                self._session.run_into(dict(zip(self._names, arrays)), feeds)
                return arrays
            except Exception:  # sizes may depend on values; what else is wrong fails below too
                self._allocator = None
        arrays = self._session.run(self._names, feeds)
        plain = all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and array.size for array in arrays)
        if plain and sum(array.nbytes for array in arrays) >= _WORTH_BINDING:
            self._outputs[key] = [(array.shape, array.dtype) for array in arrays]
        return arrays


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        message = " ".join(str(error).split())
        raise ValueError(f"{name}: onnxruntime cannot run it: {message}") from error
