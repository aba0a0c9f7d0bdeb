"""The report of a correction as tables for the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from biascorr.model.judging import Score
from biascorr.model.network import LayerReport


def table_from_report(report: Sequence[LayerReport]) -> Table:
    """One row per layer: what it is, the mean absolute shift of its channels before and after, and what is worth knowing."""
    table = Table(title="mean |shift| of the output channels", title_justify="left")
    for heading in ("layer", "operator", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("channels", "before", "after"):
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    for layer in report:
        numbers = (_number(layer.shift_before), _number(layer.shift_after))
        channels = "" if layer.channels is None else str(layer.channels)
        cells = (layer.name, layer.op, layer.method or "left alone", channels, *numbers, layer.reason)
        table.add_row(*map(Text, cells))  # names may look like markup
    return table


def table_from_scores(scores: Mapping[str, Score], method: str) -> Table:
    """One row per candidate: how near its outputs are to the float ones; the row of `method`, which was taken, is marked.

    There is a column for the Kullback-Leibler divergence where an output is probabilities.
    """
    table = Table(title="outputs against the float ones", title_justify="left")
    table.add_column("candidate")
    table.add_column("SQNR, dB", justify="right")
    classifies = any(score.divergence is not None for score in scores.values())
    if classifies:
        table.add_column("KL, nats", justify="right")
    table.add_column("")
    for name, score in scores.items():
        cells = [f"{score.sqnr:.2f}", *([_number(score.divergence)] if classifies else [])]
        table.add_row("uncorrected" if name == "none" else name, *cells, "taken" if name == method else "")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
