"""What was done to a model, as tables for the terminal. Needs rich."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from biascorr.correction.scoring import Score
from biascorr.equalization.equalize import OutputChange
from biascorr.equalization.high_bias import Absorption
from biascorr.equalization.scaling import ScaledChain
from biascorr.graph.network import LayerReport

_SHOWN = 2
"""Names in a row for all that were left for the same reason."""


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


def table_from_chains(chains: Sequence[ScaledChain], absorptions: Sequence[Absorption]) -> Table:
    """One row per chain of scaled layers: its factors, what it gained, what else had to change for it."""
    table = Table(title="layers scaled together", title_justify="left")
    table.add_column("layers", overflow="fold")
    for heading in ("factors", "bits\ngained", "bounds per\nchannel", "absorbed\nbias"):
        table.add_column(heading, justify="right", no_wrap=True)
    absorbed = {each.first: float(np.abs(each.absorbed).max()) for each in absorptions}
    for chain in chains:
        factors = np.concatenate(chain.factors)
        biases = [absorbed[link.first.name] for link in chain.chain.links if link.first.name in absorbed]
        table.add_row(
            Text(" -> ".join(layer.name for layer in chain.chain.layers)),
            f"{factors.min():.3g}..{factors.max():.3g}",
            f"{chain.bits:.2f}",
            str(len(chain.limits) or ""),
            _number(max(biases, default=None)),
        )
    return table


def table_from_left(left: Mapping[str, str]) -> Table:
    """One row for all that were left for the same reason, whatever names and numbers are in it."""
    table = Table(title="left as it was", title_justify="left")
    table.add_column("", justify="right")
    for heading in ("reason", "layer or batch normalization"):
        table.add_column(heading, overflow="fold")
    for reason, names in _names_by_reason(left):
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        table.add_row(str(len(names)), Text(reason), Text(shown))
    return table


def _names_by_reason(left: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Reasons that differ in nothing but names and numbers, dots in their place, and what was left for them."""
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, reason in left.items():
        words = re.split("([,:]? )", reason)
        pattern = tuple(word if re.fullmatch("[A-Za-z'-]+|[,:]? ", word) else "" for word in words)
        groups.setdefault(pattern, {})[name] = words
    for group in groups.values():
        yield "".join(word if set(others) <= {word} else "..." for word, *others in zip(*group.values())), list(group)


def table_from_changes(changes: Mapping[str, OutputChange]) -> Table:
    """One row per step: how far the float outputs have moved after it."""
    table = Table(title="change of the float outputs", title_justify="left")
    table.add_column("behind")
    for heading in ("largest", "of the largest output"):
        table.add_column(heading, justify="right")
    for step, change in changes.items():
        table.add_row(step, _number(change.absolute), f"{change.relative:.1e}")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
