"""The metadata of a model that keeps the statistics of batch normalizations that became part of layers.

    metadata_props["biascorr.folded"] = {"<tensor>": ["<name of the normalization>", "<beta>", "<gamma>", "<digest>"], ...}

in JSON, beta and gamma as float32, little-endian, in base64: fewer bytes than the normalization had. The digest is that of the
constants that make the tensor, back to the layers before it: who changes them makes the entry say nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from biascorr.adapters.onnx.graph import Graph
from biascorr.adapters.onnx.operators import LAYERS, operator_of
from biascorr.graph.operations import BatchNorm

_KEY = "biascorr.folded"

_STORED = np.dtype("<f4")


def folded_of(graph: Graph) -> dict[str, BatchNorm]:
    """Statistics of the tensors that are made as they were when these were written, by name.

    Raises ValueError where the metadata is not as it is written here.
    """
    text = next((entry.value for entry in graph.model.metadata_props if entry.key == _KEY), "{}")
    try:
        entries = {tensor: (_batch_norm(entry), entry[3:]) for tensor, entry in json.loads(text).items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"metadata {_KEY!r}: {error}; expected what biascorr writes there, or nothing") from None
    return {
        tensor: norm for tensor, (norm, digest) in entries.items() if graph.has(tensor) and digest == [_digest(graph, tensor)]
    }


def keep_folded(graph: Graph, folded: Mapping[str, BatchNorm]) -> None:
    """Writes statistics of tensors, as they are made now, in place of those in the metadata."""
    model = graph.model
    others = [entry for entry in model.metadata_props if entry.key != _KEY]
    if folded:
        entries = {
            tensor: [norm.name, _text(norm.beta), _text(norm.gamma), _digest(graph, tensor)] for tensor, norm in folded.items()
        }
        others.append(onnx.StringStringEntryProto(key=_KEY, value=json.dumps(entries, separators=(",", ":"))))
    del model.metadata_props[:]
    model.metadata_props.extend(others)


def _batch_norm(entry: Any) -> BatchNorm:
    name, *texts = entry[:3]
    beta, gamma = (_array(text) for text in texts)
    if not isinstance(name, str) or beta.shape != gamma.shape:
        raise ValueError(f"{name!r} with {beta.size} and {gamma.size} channels")
    if not (np.isfinite(beta).all() and (gamma >= 0).all()):
        raise ValueError(f"{name!r} with a mean that is not finite, or a standard deviation below 0")
    return BatchNorm(name, beta, gamma, beta, gamma**2, 0.0)


def _digest(graph: Graph, tensor: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    waiting, seen = [tensor], set[int]()
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        for name in filter(graph.is_constant, node.input):
            values = graph.value(name)
            digest.update(f"{values.dtype}{values.shape}".encode())
            digest.update(values.tobytes())
        if operator_of(node) not in LAYERS:
            waiting += [name for name in node.input if not graph.is_constant(name)]
    return digest.hexdigest()


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.astype(_STORED).tobytes()).decode()


def _array(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), _STORED).astype(np.float64)
