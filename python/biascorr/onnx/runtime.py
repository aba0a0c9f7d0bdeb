"""onnxruntime, as this package uses it: sessions that compute what the graph says, errors in one line."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from biascorr.onnx.files import fits_in_a_message, write_with_external_data

_FATAL = 4


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
