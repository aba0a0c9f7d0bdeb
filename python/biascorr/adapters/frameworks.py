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
    named, suffix = framework_of_name(path), framework.suffix
    kinds = {Framework.ONNX: "an ONNX", Framework.KERAS: "a Keras", Framework.TFLITE: "a TFLite"}
    if framework is Framework.ONNX:  # which goes by other names, too
        if named not in (None, framework):
            raise ValueError(f"{path}: a name of {kinds[named]} model, expected one for an ONNX model: {suffix}")
    elif Path(path).suffix != suffix:
        kind = kinds[framework].removeprefix("a ")
        raise ValueError(f"{path}: expected a name that ends with {suffix}, which is how {kind} models are saved")
