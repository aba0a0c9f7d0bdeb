"""onnxruntime, as this package uses it: sessions that compute what the graph says, errors in one line."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from biascorr.adapters.onnx.files import fits_in_a_message, write_with_external_data
from biascorr.calibration.storage import Buffers

_FATAL = 4

_WORTH_BINDING = 128 << 10
"""Bytes of outputs below which new memory costs less than to say where else they go (measured)."""


def session(model: onnx.ModelProto, name: str, *, threads: int = 0) -> Any:
    """A session on the CPU. Raises ValueError, naming the model, where onnxruntime does not take it.

    No optimization merges a quantizer into its neighbours, whose integer arithmetic may saturate on some CPUs, or rounds real
    weights between quantizers to 8 bits: what runs is the graph, in floating point, on every machine.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers = ["CPUExecutionProvider"]
    with _one_line(name):
        if fits_in_a_message(model):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        with tempfile.TemporaryDirectory(prefix="biascorr-") as folder:
            path = Path(folder) / "model.onnx"
            write_with_external_data(model, path)
            return onnxruntime.InferenceSession(str(path), options, providers=providers)


def run(running: Any, names: Sequence[str], feeds: Any, name: str) -> list[NDArray[Any]]:
    """One run of a session. Raises ValueError, naming what ran, where onnxruntime fails."""
    with _one_line(name):
        outputs: list[NDArray[Any]] = running.run(list(names), dict(feeds))
    return outputs


class Runner:
    """A session that runs again and again and, where the sizes of its outputs are known by then, writes into given memory.

    Parameters
    ----------
    running : onnxruntime.InferenceSession
        What runs; several threads may call.
    names : sequence of str
        Its outputs.
    name : str
        What errors call it.
    buffers : Buffers or None
        Where outputs are written; None: each run has new memory.
    """

    def __init__(self, running: Any, names: Sequence[str], name: str, buffers: Buffers | None) -> None:
        self._running = running
        self._names = list(names)
        self._name = name
        self._buffers = buffers
        self._outputs: dict[Any, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}  # by the shapes of the inputs

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        key = tuple(array.shape for array in feeds.values())
        if self._buffers is not None and key in self._outputs:
            try:
                return self._bound(feeds, [self._buffers.take(*each) for each in self._outputs[key]])
            except Exception:  # sizes may depend on values; what else is wrong fails below too
                self._buffers = None
        arrays = run(self._running, self._names, feeds, self._name)
        plain = all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and array.size for array in arrays)
        if plain and sum(array.nbytes for array in arrays) >= _WORTH_BINDING:
            self._outputs[key] = [(array.shape, array.dtype) for array in arrays]
        return arrays

    def _bound(self, feeds: Mapping[str, NDArray[Any]], arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        binding = self._running.io_binding()
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # has to live as long as it runs
        for name, array in contiguous.items():
            binding.bind_cpu_input(name, array)
        for name, array in zip(self._names, arrays):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._running.run_with_iobinding(binding)
        return arrays


def run_constants(model: onnx.ModelProto) -> list[NDArray[Any]]:
    """The outputs of a model without inputs."""
    name = "constant weights"
    return run(session(model, name), [output.name for output in model.graph.output], {}, name)


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        message = " ".join(str(error).split())
        raise ValueError(f"{name}: onnxruntime cannot run it: {message}") from error
