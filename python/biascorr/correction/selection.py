"""Which layers are corrected: by their names, patterns of names, or operators."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from biascorr.graph.network import Network

_LISTED = 8
"""Layers that an error names."""


def excluded_layers(network: Network, only: Iterable[str] | None, exclude: Iterable[str]) -> set[str]:
    """The names of the layers that are not to be corrected.

    Parameters
    ----------
    network : Network
        The network whose layers are corrected.
    only, exclude : iterable of str
        Names of layers, patterns of names with ``*`` and ``?``, or operators. None: all of them.

    Raises
    ------
    TypeError
        One is a string, or has something else in it.
    ValueError
        One of them is no layer's.
    """
    operators = {layer.first_call: layer.op for layer in network.layers} | {each.name: each.op for each in network.unsupported}
    chosen = set(operators) if only is None else _named(operators, only, "only")
    return set(operators) - chosen | _named(operators, exclude, "exclude")


def _named(operators: dict[str, str], patterns: Iterable[str], argument: str) -> set[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}: {patterns!r}, expected a list of names, patterns of names or operators")
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: {pattern!r}, expected names, patterns of names or operators")
        matching = {name for name, op in operators.items() if pattern in (name, op) or fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(
                f"{argument}: {pattern!r} is neither name nor operator of a layer; the layers are {_list(operators)}"
            )
        found |= matching
    return found


def _list(operators: dict[str, str]) -> str:
    names = [f"{name} ({op})" for name, op in operators.items()]
    more = f" and {len(names) - _LISTED} more; patterns take * and ?" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
