"""Keras models in and out of files, and what is no such model."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras

from biascorr.adapters.frameworks import Framework, check_backend, check_suffix
from biascorr.adapters.keras.linear import array_of
from biascorr.adapters.keras.rebuilding import made_again, own_objects
from biascorr.adapters.keras.steps import graph_of, is_graph, nodes_of, steps_of
from biascorr.whole_file import kind_of, whole_file

FOLDED = "biascorr.json"
"""The member of a .keras file that keeps the statistics of batch normalizations that became part of layers."""


PROVENANCE = "biascorr_provenance.json"
"""The member of a .keras file that says how a model was made."""


def load(model: Any, name: str) -> tuple[Any, str]:
    """A model, given itself or by the path of a file, and the statistics that are in that file.

    Raises
    ------
    FileNotFoundError
        The file is missing.
    OSError
        It is no file.
    TypeError
        It is no model with a graph: one of a derived class, or that is not built.
    ValueError
        The file cannot be read; Keras runs by something else than TensorFlow.
    """
    check_backend(keras.backend.backend(), name)
    text = "{}"
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        name = f"{name}: {path}"
        model, text = _from_file(path, name)
    _check_graph(model, name)
    return model, text


def _from_file(path: Path, name: str) -> tuple[Any, str]:
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file")
    if not path.is_file():
        raise OSError(f"{name}: {kind_of(path)}")
    try:
        model = loaded(path, name)
        text = "{}"
        if path.suffix == Framework.KERAS.suffix:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(FOLDED).decode() if FOLDED in archive.namelist() else text
        return model, text
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # Keras, zipfile, json and h5py raise a dozen kinds at files that are damaged
        raise ValueError(
            f"{name}: Keras cannot read it: {reason_of(error)}; a model with layers of your own: load it with "
            "keras.saving.load_model(path, custom_objects=...) and give the model"
        ) from error


def loaded(path: Path, name: str, *, safe_mode: bool = True) -> Any:
    """The model in a file; not compiled, with a warning, where its optimizer, losses or metrics cannot be made again."""
    try:
        return keras.saving.load_model(path, safe_mode=safe_mode)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # options of an optimizer of Keras 2, functions of the caller's own
        model = keras.saving.load_model(path, compile=False, safe_mode=safe_mode)
        warnings.warn(f"{name}: compile the model that is returned yourself: {reason_of(error)}", stacklevel=2)
        return model


def reason_of(error: Exception) -> str:
    """What is wrong, without the configuration that Keras says before."""
    said = str(error).rpartition("Exception encountered: ")[2].partition("Full object config:")[0]
    return " ".join(said.split())[:300]


def _check_graph(model: Any, name: str) -> None:
    if isinstance(model, keras.Sequential) and not model.built:
        raise TypeError(f"{name}: a sequential model that is not built, expected one with an Input: call it on a batch once")
    if not is_graph(model):
        raise TypeError(
            f"{name}: {type(model).__name__} computes what its method call does, expected a functional or sequential model: "
            "inputs = keras.Input(...); keras.Model(inputs, model.call(inputs)) often makes one with the same weights"
        )
    _check_layers(model, name)


def _check_layers(model: Any, name: str) -> None:
    """Raises TypeError where a layer could not be made again for the model that is returned."""
    for operation in {id(node.operation): node.operation for node in nodes_of(graph_of(model))}.values():
        if is_graph(operation):
            _check_layers(operation, name)
            continue
        try:
            made_again(operation, operation.get_config())
        except Exception as error:
            raise TypeError(
                f"{name}: layer {operation.name} ({type(operation).__name__}) cannot be made again from its get_config(), as "
                f"saving it needs too: {reason_of(error)}"
            ) from error


def save(
    model: Any, statistics: str, path: str | os.PathLike[str], *, force: bool = False, provenance: str | None = None
) -> None:
    """Writes a .keras file, whole or not at all.

    Raises as :func:`biascorr.whole_file.whole_file`, and ValueError for a name with another suffix, and for a model that Keras
    does not read as it wrote it.
    """
    check_suffix(path, Framework.KERAS)
    with whole_file(path, force=force) as temporary:
        keras.saving.save_model(model, temporary)
        _check_written(temporary, model, path)
        members = {FOLDED: statistics if json.loads(statistics) else None, PROVENANCE: provenance}
        for member, text in members.items():
            if text is not None:
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.writestr(member, text)


def _check_written(file: Path, model: Any, name: str | os.PathLike[str]) -> None:
    """Raises ValueError where Keras does not read from a file what it wrote there."""
    try:
        with keras.saving.custom_object_scope(own_objects(model)):
            read = keras.saving.load_model(file, compile=False, safe_mode=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{name}: Keras cannot read what it writes of this model: {reason_of(error)}") from error
    if steps_of(read).calls != steps_of(model).calls or not all(map(_are_equal, read.weights, model.weights)):
        raise ValueError(
            f"{name}: Keras does not read what it writes of this model, as where a layer is called outside and inside of a "
            "nested model; the model itself is right"
        )


def _are_equal(variable: Any, other: Any) -> bool:
    return array_of(variable).tobytes() == array_of(other).tobytes()
