"""Keras models on their way to other processes: as Keras saves them, with the classes and functions that it asks for again."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import keras
from numpy.typing import NDArray

from biascorr.adapters.keras import files
from biascorr.adapters.keras.digest import digest_of_weights
from biascorr.adapters.keras.linear import array_of
from biascorr.adapters.keras.rebuilding import own_objects
from biascorr.adapters.keras.steps import Steps, steps_of

_UNREADABLE = "it cannot be sent: Keras does not read what it writes of it"


class Sent(NamedTuple):
    """A model as it is sent.

    Parameters
    ----------
    name : str
        The name of the model.
    content : bytes
        A .keras file.
    objects : dict from str to class or function
        Those of the caller's own that are named in the file.
    values : dict from int to list of ndarray
        The weights of operations that files may keep otherwise: of the caller's own classes, or with a LoRA, which is merged.
    calls, weights
        What its steps and the digest of their weights must be again.
    """

    name: str
    content: bytes
    objects: dict[str, Any]
    values: dict[int, list[NDArray[Any]]]
    calls: list[tuple[str, tuple[str, ...], tuple[str, ...]]]
    weights: str


def sent(model: Any, steps: Steps) -> Sent:
    """A model with these steps, as it is sent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        keras.saving.save_model(model, path)
        content = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            config = archive.read("config.json").decode()
    objects: dict[str, Any] = {}
    for operation in (model, *steps.operations):
        for name, each in own_objects(operation).items():
            objects |= {name: each, keras.saving.get_registered_name(each): each}
    named = {name: each for name, each in objects.items() if f'"{name}"' in config}
    operations = enumerate(steps.operations)
    values = {k: [array_of(each) for each in operation.weights] for k, operation in operations if _has_own_ways(operation)}
    return Sent(model.name, content, named, values, steps.calls, digest_of_weights(steps))


def _has_own_ways(operation: Any) -> bool:
    """Whether a layer may save something else than its weights, or change them when it is called."""
    inside = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    return any(not type(each).__module__.startswith("keras.") or getattr(each, "lora_enabled", False) for each in inside)


def received(given: Sent) -> tuple[Any, Steps]:
    """The model that was sent, and its steps. Raises ValueError where Keras does not read it as it wrote it."""
    try:
        with tempfile.TemporaryDirectory() as folder, keras.saving.custom_object_scope(given.objects):
            path = Path(folder, "model.keras")
            path.write_bytes(given.content)
            model = files.loaded(path, given.name, safe_mode=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{given.name}: {_UNREADABLE}: {files.reason_of(error)}") from error
    steps = steps_of(model)
    operations = steps.operations
    for k, arrays in given.values.items() if steps.calls == given.calls else ():
        for variable, array in zip(operations[k].weights, arrays):
            if tuple(variable.shape) == array.shape:
                variable.assign(array)
    if steps.calls != given.calls or digest_of_weights(steps) != given.weights:
        raise ValueError(f"{given.name}: {_UNREADABLE}")
    return model, steps
