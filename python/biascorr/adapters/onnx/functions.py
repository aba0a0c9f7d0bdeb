"""Functions that a model brings along: which one a node calls, and whether they can be run."""

from __future__ import annotations

import onnx

from biascorr.adapters.onnx.operators import subgraphs

_MANY_NODES = 1_000_000
"""Nodes that the functions of a model may be written out to; onnxruntime writes them out before it runs anything."""

_MOST_CALLS = 100
"""Functions inside each other; onnxruntime runs no more."""


def called_by(node: onnx.NodeProto) -> tuple[str, str, str]:
    """The key of the function of the model that a node calls, if it is one."""
    return node.domain, node.op_type, node.overload


def check_functions(model: onnx.ModelProto, name: str) -> None:
    """Raises ValueError where functions call themselves, or are deeper or written out to more nodes than can be run."""
    functions = {(each.domain, each.name, each.overload): each for each in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size_of(node: onnx.NodeProto, callers: tuple[tuple[str, str, str], ...]) -> int:
        key = called_by(node)
        if key in callers:
            raise ValueError(f"{name}: function {key[1]} of domain {key[0]!r} calls itself")
        if len(callers) > _MOST_CALLS:
            raise ValueError(f"{name}: its functions call each other more than {_MOST_CALLS} deep, which cannot be run")
        if key in functions and key not in sizes:
            sizes[key] = sum(size_of(each, (*callers, key)) for each in functions[key].node)
        inside = sum(size_of(each, callers) for graph in subgraphs(node) for each in graph.node)
        return sizes.get(key, 1) + inside

    written = sum(size_of(node, ()) for node in model.graph.node) if functions else 0
    if written > _MANY_NODES:
        raise ValueError(f"{name}: its functions are written out to {written} nodes, up to {_MANY_NODES} can be run")
