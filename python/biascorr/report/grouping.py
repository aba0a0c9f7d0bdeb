"""Layers with the same reasons, together, whatever names and numbers are in these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from biascorr.graph.reasons import ReasonCode
from biascorr.report.records import Record


@dataclass(frozen=True)
class Group:
    """Layers with the same reasons.

    Parameters
    ----------
    text : str
        The reasons, with "..." in place of what differs between them.
    names : sequence of str
        The layers.
    """

    text: str
    names: Sequence[str]


def groups_of(layers: Iterable[Record]) -> list[Group]:
    """The groups of records with a name and reasons, the largest first; those without reasons are left out.

    Examples
    --------
    >>> reasons = [{"code": "NEXT_LAYER", "arguments": {"layer": name, "reason": "no"}, "text": ""} for name in "ab"]
    >>> groups_of([{"name": "x", "reasons": reasons[:1]}, {"name": "y", "reasons": reasons[1:]}])
    [Group(text='followed by ...: no', names=['x', 'y'])]
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for layer in layers:
        if layer["reasons"]:
            groups.setdefault(tuple(map(_codes, layer["reasons"])), []).append(layer)
    found = [
        Group(
            "; ".join(_common_text(reasons) for reasons in zip(*(each["reasons"] for each in group))),
            [each["name"] for each in group],
        )
        for group in groups.values()
    ]
    return sorted(found, key=lambda group: -len(group.names))


def _is_reason(value: Any) -> bool:
    return isinstance(value, dict) and "code" in value


def _codes(reason: Record) -> tuple[Any, ...]:
    """The code of a reason, and those of the reasons in it."""
    return reason["code"], *(_codes(value) for value in reason["arguments"].values() if _is_reason(value))


class _Varies:
    """Stands for an argument that differs between reasons."""

    def __format__(self, specification: str) -> str:
        return "..."


def _common_text(reasons: Sequence[Record]) -> str:
    """The text of reasons with the same codes, dots in place of the arguments that differ."""
    arguments: dict[str, object] = {}
    for name in reasons[0]["arguments"]:
        values = [reason["arguments"][name] for reason in reasons]
        if _is_reason(values[0]):
            arguments[name] = _common_text(values)
        else:
            arguments[name] = values[0] if all(value == values[0] for value in values) else _Varies()
    try:
        return ReasonCode[reasons[0]["code"]].value.format(**arguments)
    except (KeyError, ValueError):  # of another version of this package
        return str(reasons[0]["text"])
