"""The report of a correction as a table for the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
