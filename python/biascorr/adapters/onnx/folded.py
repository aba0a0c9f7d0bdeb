"""The metadata of a model that keeps the statistics of batch normalizations that became part of layers.

metadata_props["biascorr.folded"] = the text of :mod:`biascorr.graph.folded`
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import onnx

from biascorr.adapters.onnx.graph import Graph
from biascorr.adapters.onnx.operators import LAYERS, operator_of
from biascorr.graph.folded import statistics_from_text, text_from_statistics
from biascorr.graph.operations import BatchNorm

_KEY = "biascorr.folded"


def folded_of(graph: Graph) -> dict[str, BatchNorm]:
    """Statistics of the tensors that are made as they were when these were written, by name.

    Raises ValueError where the metadata is not as it is written here.
    """
    text = next((entry.value for entry in graph.model.metadata_props if entry.key == _KEY), "{}")
    try:
        return statistics_from_text(text, graph.has, functools.partial(_digest, graph))
    except ValueError as error:
        raise ValueError(f"metadata {_KEY!r}: {error}") from None


def keep_folded(graph: Graph, folded: Mapping[str, BatchNorm]) -> None:
    """Writes statistics of tensors, as they are made now, in place of those in the metadata."""
    model = graph.model
    others = [entry for entry in model.metadata_props if entry.key != _KEY]
    if folded:
        text = text_from_statistics(folded, functools.partial(_digest, graph))
        others.append(onnx.StringStringEntryProto(key=_KEY, value=text))
    del model.metadata_props[:]
    model.metadata_props.extend(others)


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
