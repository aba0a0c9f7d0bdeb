"""What tells the frameworks of models apart before any of them is imported: suffixes of files, the backend of Keras."""

from __future__ import annotations

import os
from pathlib import Path

KERAS_SUFFIX = ".keras"
"""Of the files that Keras models are saved in."""

KERAS_SUFFIXES = (KERAS_SUFFIX, ".h5", ".hdf5")
"""Of the files that Keras has written."""

_BACKEND = "tensorflow"


def check_backend(backend: str, name: str) -> None:
    """Raises ValueError where Keras runs by something else than TensorFlow."""
    if backend != _BACKEND:
        raise ValueError(
            f"{name}: Keras runs by {backend!r}, expected {_BACKEND!r}: set KERAS_BACKEND={_BACKEND}, or save the model as "
            ".keras and give its path to a process that has it so"
        )


def check_suffix(path: str | os.PathLike[str], *, is_keras: bool) -> None:
    """Raises ValueError where a file of this name is to have a model of another framework."""
    suffix = Path(path).suffix
    if is_keras and suffix != KERAS_SUFFIX:
        raise ValueError(f"{path}: expected a name that ends with {KERAS_SUFFIX}, which is how Keras models are saved")
    if not is_keras and suffix.lower() in KERAS_SUFFIXES:
        raise ValueError(f"{path}: a name of a Keras model, expected one for an ONNX model: .onnx")
