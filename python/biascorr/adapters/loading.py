"""A model of any framework as a network."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from biascorr.adapters.frameworks import IDENTIFIER, Framework, check_backend, check_suffix, framework_of_name
from biascorr.graph.network import Network, is_network

_TENSORFLOW = (
    'a Keras model needs {}: pip install "biascorr[keras]", and tensorflow or tensorflow-cpu, not both; what Keras runs by is '
    "TensorFlow unless KERAS_BACKEND or ~/.keras/keras.json says otherwise"
)
_LITERT = 'a TFLite model needs {}: pip install "biascorr[tflite]"'
_ONNX = 'reading a model needs {}: pip install "biascorr[onnx]"'


def network_from_model(model: Any, name: str) -> Network:
    """The network of a path, bytes, an onnx.ModelProto or a keras.Model, or one that an adapter has made; errors use the name.

    Raises
    ------
    FileNotFoundError
        The file or its external data is missing.
    ImportError
        What runs such a model is not installed.
    TypeError
        It is none of the above.
    ValueError
        It is not a valid model.
    """
    if is_network(model):
        return cast(Network, model)
    framework = framework_of(model, name)
    if framework is Framework.TFLITE:
        with _needed(_LITERT):
            from biascorr.adapters.tflite.network import TfliteNetwork
        return TfliteNetwork.load(model, name)
    if framework is Framework.KERAS:
        if "keras" not in sys.modules:  # which may fail to load a library that is not wanted
            check_backend(os.environ.get("KERAS_BACKEND") or "tensorflow", name)
        with _needed(_TENSORFLOW):
            from biascorr.adapters.keras.network import KerasNetwork
        return KerasNetwork.load(model, name)
    with _needed(_ONNX):
        from biascorr.adapters.onnx.network import OnnxNetwork
    return OnnxNetwork.load(model, name)


def sizes_by_file(path: Path, name: str) -> dict[Path, int]:
    """The files that a model is in, with the bytes that it has in each. Raises as :func:`network_from_model`."""
    if framework_of(path, name) is not Framework.ONNX:
        return {path: path.stat().st_size if path.is_file() else 0}
    with _needed(_ONNX):
        from biascorr.adapters.onnx import files
    return files.sizes_by_file(path, name)


def check_output_of(model: Path, output: Path, name: str) -> None:
    """Raises ValueError where a file of this name is to have a model of another framework than this one.

    Raises TypeError as :func:`network_from_model` too.
    """
    check_suffix(output, framework_of(model, name))


def check_same_framework(reference: Any, quantized: Any) -> None:
    """Raises ValueError where a quantized model is known to be of another framework than the float one; TypeError as above."""
    expected, found = (_identified(each, name) for each, name in ((reference, "reference"), (quantized, "quantized")))
    if expected is not None and found is not None and found is not expected:
        raise ValueError(
            f"quantized: not of this float model, but of another framework: {found.suffix}, expected {expected.suffix}; "
            f"convert the float model to {found.suffix} too, without quantizing it"
        )


def _identified(model: Any, name: str) -> Framework | None:
    """The framework of a model, where something says it."""
    found = framework_of(model, name)
    if found is not Framework.ONNX or isinstance(model, (bytes, bytearray)) or type(model).__module__.startswith("onnx"):
        return found
    return framework_of_name(model) if isinstance(model, (str, os.PathLike)) else None


def framework_of(model: Any, name: str) -> Framework:
    """The framework of a model, or of its path; ONNX where nothing says. Raises TypeError for other models of TensorFlow."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if (path / "saved_model.pb").exists():
            raise TypeError(
                f"{name}: {path} is a SavedModel, expected the model that was exported, as a .keras or .h5 file, or the "
                ".tflite file that it was converted to"
            )
        return framework_of_name(path) or (Framework.TFLITE if _is_tflite(_start_of(path)) else Framework.ONNX)
    if isinstance(model, (bytes, bytearray, memoryview)):
        return Framework.TFLITE if _is_tflite(bytes(model[:8])) else Framework.ONNX
    if _is_of("tf_keras", model):
        raise TypeError(f"{name}: a model of tf_keras (Keras 2), expected one of Keras 3: save it as .h5 and give its path")
    return Framework.KERAS if _is_of("keras", model) else Framework.ONNX


def _start_of(path: Path) -> bytes:
    """The first bytes of a file; none of what is no file, or cannot be read."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return file.read(8)
    except OSError:
        return b""


def _is_tflite(start: bytes) -> bool:
    return start[4:] == IDENTIFIER


def _is_of(module: str, model: Any) -> bool:
    """Whether it is a model of this module, which has been imported then."""
    kind = getattr(sys.modules.get(module), "Model", None)
    return isinstance(kind, type) and isinstance(model, kind)


@contextlib.contextmanager
def _needed(message: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(message.format(error.name)) from error
