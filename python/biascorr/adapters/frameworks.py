"""What tells the frameworks of models apart before any of them is imported: names and first bytes of files, backends."""

from __future__ import annotations

import enum
import os
from pathlib import Path

IDENTIFIER = b"TFL3"
"""Bytes 4 to 8 of every TFLite file."""


class Framework(enum.Enum):
    """The frameworks of models; the values are the suffixes of their files, the one that is written first."""

    ONNX = (".onnx",)
    KERAS = (".keras", ".h5", ".hdf5")
    TFLITE = (".tflite", ".lite")

    @property
    def suffix(self) -> str:
        """Of the files that are written."""
        return str(self.value[0])


def framework_of_name(path: str | os.PathLike[str]) -> Framework | None:
    """The framework whose files end so; None for any other name."""
    suffix = Path(path).suffix.lower()
    return next((each for each in Framework if suffix in each.value), None)


_BACKEND = "tensorflow"


def check_backend(backend: str, name: str) -> None:
    """Raises ValueError where Keras runs by something else than TensorFlow."""
    if backend != _BACKEND:
        raise ValueError(
            f"{name}: Keras runs by {backend!r}, expected {_BACKEND!r}: set KERAS_BACKEND={_BACKEND}, or save the model as "
            ".keras and give its path to a process that has it so"
        )


def check_suffix(path: str | os.PathLike[str], framework: Framework) -> None:
    """Raises ValueError where a file of this name is to have a model of another framework, or cannot be told from one."""
    named = framework_of_name(path)
    is_any = framework is Framework.ONNX  # which has no name of its own: .onnx, .ort, .model
    if Path(path).suffix != framework.suffix and not (is_any and named in (None, Framework.ONNX)):
        kind = {Framework.ONNX: "ONNX", Framework.KERAS: "Keras", Framework.TFLITE: "TFLite"}[framework]
        raise ValueError(f"{path}: expected a name that ends with {framework.suffix}, which is how {kind} models are saved")
