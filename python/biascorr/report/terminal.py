"""Records for the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from biascorr.graph.reasons import LayerReport, Reason
from biascorr.report.lines import elided, printable, two_lines
from biascorr.report.records import Record, rows

_SHOWN = 2
"""Names in a row for all that were left as they were for the same reason."""


def render(record: Record, console: Console) -> None:
    """Prints a record."""
    first, second = two_lines(record)
    found = rows(record)
    columns = [key for key in (found[0] if found else ()) if key not in ("reasons", "note", "shift_after")]
    table = Table(*columns)
    for row in found:
        cells = (row[key] for key in columns)
        table.add_row(
            *(_cell(f"{each:.3g}" if isinstance(each, float) else elided("" if each is None else each, 24)) for each in cells)
        )
    console.print(table)
    for note in record.get("notes", ()):
        console.print(_cell(f"note: {note}"))
    console.print(Text(first))
    console.print(Text(second))


def _cell(text: object) -> Text:
    return Text(printable(text))  # names may look like markup


def table_from_report(report: Sequence[LayerReport]) -> Table:
    """One row per layer: what it is, the mean absolute shift of its channels, how near its output is to the float one before
    and after the correction of all layers, and what is worth knowing."""
    table = Table(
        title="layers: mean |shift| of the channels; SQNR of the output against the float one, in dB", title_justify="left"
    )
    for heading in ("layer", "operator", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("channels", "|shift|", "before", "after"):
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    for layer in report:
        numbers = (_number(layer.shift_before), _decibels(layer.sqnr_before), _decibels(layer.sqnr_after))
        channels = "" if layer.channels is None else str(layer.channels)
        cells = (layer.name, layer.op, layer.method or "left as it is", channels, *numbers, layer.reason)
        table.add_row(*map(_cell, cells))
    return table


def table_from_scores(scores: Mapping[str, Any], method: str, deployed: Mapping[str, Any]) -> Table:
    """One row per candidate: how near its outputs are to the float ones, and what it gains over the uncorrected model, with the
    standard error of that; the row of `method`, which was taken, is marked.

    There is a column for the Kullback-Leibler divergence where an output is probabilities, one for the user's own metric, and
    one for the SQNR in dB of those that were deployed, too.
    """
    table = Table(title="outputs against the float ones, mean over the samples", title_justify="left")
    table.add_column("candidate")
    before = next(iter(scores.values()), None)
    columns: dict[str, Callable[[str, Any], str]] = {"SQNR, dB": lambda _, score: f"{score.sqnr:.2f}"}
    if any(score.divergence is not None for score in scores.values()):
        columns["KL, nats"] = lambda _, score: _number(score.divergence)
    if before is not None and before.metric is not None:
        columns["metric"] = lambda _, score: _number(score.metric)
    columns["gain"] = lambda _, score: "" if score is before else str(next(iter(score.gains_over(before).values())))
    if deployed:
        columns["deployed"] = lambda name, _: f"{deployed[name].sqnr:.2f}" if name in deployed else ""
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, score in scores.items():
        cells = [cell(name, score) for cell in columns.values()]
        table.add_row("uncorrected" if name == "none" else name, *cells, "taken" if name == method else "")
    return table


def table_from_chains(chains: Sequence[Any], high_biases: Sequence[Any]) -> Table:
    """One row per chain of scaled layers: its factors, what it gained, what else had to change for it."""
    table = Table(title="layers scaled together", title_justify="left")
    table.add_column("layers", overflow="fold")
    for heading in ("factors", "bits\ngained", "bounds per\nchannel", "folded\nbias"):
        table.add_column(heading, justify="right", no_wrap=True)
    folded = {each.first: float(np.abs(each.folded).max()) for each in high_biases}
    for chain in chains:
        factors = np.concatenate(chain.factors)
        biases = [folded[link.first.name] for link in chain.chain.links if link.first.name in folded]
        table.add_row(
            _cell(" -> ".join(layer.name for layer in chain.chain.layers)),
            f"{factors.min():.3g}..{factors.max():.3g}",
            f"{chain.bits:.2f}",
            str(len(chain.limits) or ""),
            _number(max(biases, default=None)),
        )
    return table


def table_from_left(left: Mapping[str, tuple[Reason, ...]]) -> Table:
    """One row for all that were left as they were for the same reason, whatever names and numbers are in it."""
    table = Table(title="left as it is", title_justify="left")
    table.add_column("", justify="right")
    for heading in ("reason", "layer or batch normalization"):
        table.add_column(heading, overflow="fold")
    groups: dict[tuple[object, ...], dict[str, tuple[Reason, ...]]] = {}
    for name, reasons in left.items():
        groups.setdefault(tuple(map(_codes, reasons)), {})[name] = reasons
    for group in groups.values():
        names = list(group)
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        text = "; ".join(map(_common_text, zip(*group.values())))
        table.add_row(str(len(names)), _cell(text), _cell(shown))
    return table


def _codes(reason: Reason) -> tuple[object, ...]:
    """The code of a reason, and those of the reasons in it."""
    return reason.code, *(_codes(value) for _, value in reason.arguments if isinstance(value, Reason))


class _Varies:
    """Stands for an argument that differs between reasons."""

    def __format__(self, specification: str) -> str:
        return "..."


def _common_text(reasons: Sequence[Reason]) -> str:
    """The text of reasons with the same codes, dots in place of the arguments that differ."""
    arguments: dict[str, object] = {}
    for name, value in reasons[0].arguments:
        values = [dict(each.arguments)[name] for each in reasons]
        nested = [each for each in values if isinstance(each, Reason)]
        varies: object = _common_text(nested) if nested else _Varies()
        arguments[name] = value if all(each == value for each in values) else varies
    return reasons[0].code.value.format(**arguments)


def table_from_changes(changes: Mapping[str, Any]) -> Table:
    """One row per step: how far the float outputs have moved after it."""
    table = Table(title="change of the float outputs", title_justify="left")
    table.add_column("after")
    for heading in ("largest", "of the largest output"):
        table.add_column(heading, justify="right")
    for step, change in changes.items():
        table.add_row(step, _number(change.absolute), f"{change.relative:.1e}")
    return table


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
