"""The digest of a Keras model: of its steps, the configurations of their operations, and weights, not of a file with dates."""

from __future__ import annotations

import base64
import hashlib
import json
import marshal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import keras
import numpy as np

from biascorr.adapters.keras.linear import array_of
from biascorr.adapters.keras.running import Values
from biascorr.adapters.keras.steps import Steps
from biascorr.graph.operations import BatchNorm

_NOT_COMPUTED = {"build_config", "compile_config", "module", "registered_name", "shared_object_id"}
"""Entries of configurations that make no difference to what is computed; a class of a script is in another module elsewhere."""


def digest_of(steps: Steps, values: Values, statistics: Mapping[str, BatchNorm]) -> str:
    """SHA-256, in hexadecimal, of steps, what they compute with, and what is known of tensors."""
    operations = steps.operations
    position = {id(each): k for k, each in enumerate(operations)}
    whole = {
        "ends": [steps.inputs, steps.outputs],
        "calls": [[*call, step.first, position[id(step.operation)]] for call, step in zip(steps.calls, steps.steps)],
        "shapes": steps.shapes,
        "operations": [[type(each).__name__, each.get_config()] for each in operations],
        "constants": [list(step.constants) for step in steps.steps],
        "removed": sorted(values.removed),
        "grids": {name: [float(each.scale), int(each.zero_point), each.bits] for name, each in values.quantizers.items()},
    }
    text = json.dumps(_plain(keras.saving.serialize_keras_object(whole)), sort_keys=True)
    digest = hashlib.sha256(text.encode(errors="backslashreplace"))
    digest.update(digest_of_weights(steps).encode())
    known = {name: (each.beta, each.gamma, each.mean, each.variance) for name, each in statistics.items()}
    others = {name: (each.name, each.epsilon, each.channel_axis) for name, each in statistics.items()}
    digest.update(repr(sorted(others.items())).encode(errors="backslashreplace"))
    for entries in (values.weights, values.biases, values.limits, known):
        for name in sorted(entries):
            digest.update(repr(name).encode(errors="backslashreplace"))
            _add(digest, *(entries[name] if isinstance(entries[name], tuple) else [entries[name]]))
    return digest.hexdigest()


def digest_of_weights(steps: Steps) -> str:
    """SHA-256, in hexadecimal, of all that the operations of steps keep beside their configurations."""
    digest = hashlib.sha256()
    for operation in steps.operations:
        if isinstance(operation, keras.Layer):
            _add(digest, *operation.weights)
            for layer in operation._flatten_layers():
                if hasattr(layer, "save_assets"):
                    with tempfile.TemporaryDirectory() as folder:
                        layer.save_assets(folder)
                        _add(digest, *(np.fromfile(each, np.uint8) for each in sorted(Path(folder).iterdir())))
    return digest.hexdigest()


def _add(digest: Any, *arrays: Any) -> None:
    for each in arrays:
        array = np.asarray(array_of(each), order="C")
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))


def _plain(config: Any) -> Any:
    """A configuration without what is not computed with, the code of its functions as what it does."""
    if isinstance(config, dict):
        if config.get("class_name") == "function" and isinstance(config.get("config"), str):
            return {"function": config["config"].rpartition(">")[2]}  # without the package that it is registered in
        others = {key: value for key, value in config.items() if key not in _NOT_COMPUTED}
        return {key: _of_code(value) if key == "code" else _plain(value) for key, value in others.items()}
    return [_plain(each) for each in config] if isinstance(config, (list, tuple)) else config


def _of_code(value: Any) -> Any:
    try:
        return _described(marshal.loads(base64.b64decode(value)))
    except (TypeError, ValueError, EOFError):
        return _plain(value)


def _described(code: Any) -> Any:
    """Code apart from where it was written: marshal does not write the same code as the same bytes each time."""
    if isinstance(code, CodeType):
        own = [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        return [*own, [_described(each) for each in code.co_consts]]
    return sorted(map(repr, code)) if isinstance(code, frozenset) else repr(code)
