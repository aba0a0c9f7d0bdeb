"""The metadata of a model that keeps the statistics of batch normalizations that became part of layers.

    metadata_props["biascorr.folded"] = {"<tensor>": ["<name of the normalization>", "<beta>", "<gamma>"], ...}

in JSON, beta and gamma as float32, little-endian, in base64: fewer bytes than the normalization had.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from biascorr.graph.operations import BatchNorm

_KEY = "biascorr.folded"

_STORED = np.dtype("<f4")


def folded_of(model: onnx.ModelProto) -> dict[str, BatchNorm]:
    """Statistics of tensors, by name. Raises ValueError where the metadata is not as it is written here."""
    text = next((entry.value for entry in model.metadata_props if entry.key == _KEY), "{}")
    try:
        return {tensor: _batch_norm(entry) for tensor, entry in json.loads(text).items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"metadata {_KEY!r}: {error}; expected what biascorr writes there, or nothing") from None


def keep_folded(model: onnx.ModelProto, folded: Mapping[str, BatchNorm]) -> None:
    """Writes statistics of tensors in place of those in the metadata."""
    others = [entry for entry in model.metadata_props if entry.key != _KEY]
    if folded:
        entries = {tensor: [norm.name, _text(norm.beta), _text(norm.gamma)] for tensor, norm in folded.items()}
        others.append(onnx.StringStringEntryProto(key=_KEY, value=json.dumps(entries, separators=(",", ":"))))
    del model.metadata_props[:]
    model.metadata_props.extend(others)


def _batch_norm(entry: Any) -> BatchNorm:
    name, *texts = entry
    beta, gamma = (_array(text) for text in texts)
    if not isinstance(name, str) or beta.shape != gamma.shape:
        raise ValueError(f"{name!r} with {beta.size} and {gamma.size} channels")
    if not (np.isfinite(beta).all() and (gamma >= 0).all()):
        raise ValueError(f"{name!r} with a mean that is not finite, or a standard deviation below 0")
    return BatchNorm(name, beta, gamma, beta, gamma**2, 0.0)


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.astype(_STORED).tobytes()).decode()


def _array(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), _STORED).astype(np.float64)
