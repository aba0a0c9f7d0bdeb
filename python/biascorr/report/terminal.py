"""Reports as tables for the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from biascorr.correction.scoring import Score
from biascorr.equalization.equalize import OutputChange
from biascorr.equalization.high_bias import HighBias
from biascorr.equalization.scaling import ScaledChain
from biascorr.graph.reasons import LayerReport, Reason

_SHOWN = 2
"""Names in a row for all that were left as they were for the same reason."""


def printable(text: object) -> str:
    """The text with escapes for what a terminal would not show but act on, and for what is no character at all."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def _cell(text: object) -> Text:
    return Text(printable(text))  # names may look like markup


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
        cells = (layer.name, layer.op, layer.method or "left as it is", channels, *numbers, layer.reason)
        table.add_row(*map(_cell, cells))
    return table


def table_from_scores(scores: Mapping[str, Score], method: str, deployed: Mapping[str, Score]) -> Table:
    """One row per candidate: how near its outputs are to the float ones; the row of `method`, which was taken, is marked.

    There is a column for the Kullback-Leibler divergence where an output is probabilities, and one for the SQNR in dB of those
    that were deployed, too.
    """
    table = Table(title="outputs against the float ones", title_justify="left")
    table.add_column("candidate")
    table.add_column("SQNR, dB", justify="right")
    classifies = any(score.divergence is not None for score in scores.values())
    if classifies:
        table.add_column("KL, nats", justify="right")
    if deployed:
        table.add_column("deployed", justify="right")
    table.add_column("")
    for name, score in scores.items():
        cells = [f"{score.sqnr:.2f}", *([_number(score.divergence)] if classifies else [])]
        cells += [f"{deployed[name].sqnr:.2f}" if name in deployed else ""] if deployed else []
        table.add_row("uncorrected" if name == "none" else name, *cells, "taken" if name == method else "")
    return table


def table_from_chains(chains: Sequence[ScaledChain], high_biases: Sequence[HighBias]) -> Table:
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


def table_from_changes(changes: Mapping[str, OutputChange]) -> Table:
    """One row per step: how far the float outputs have moved after it."""
    table = Table(title="change of the float outputs", title_justify="left")
    table.add_column("after")
    for heading in ("largest", "of the largest output"):
        table.add_column(heading, justify="right")
    for step, change in changes.items():
        table.add_row(step, _number(change.absolute), f"{change.relative:.1e}")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
