"""Prints what a command did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from biascorr.correction.result import Correction
from biascorr.equalization.result import Equalization
from biascorr.graph.layer import without_later_calls
from biascorr.graph.reasons import ReasonCode
from biascorr.report.lines import printable
from biascorr.report.terminal import (
    table_from_chains,
    table_from_changes,
    table_from_left,
    table_from_report,
    table_from_scores,
)

NOTHING_CORRECTED = 3
"""The status where the output is written although no layer could be corrected."""

_WIDEST = 10_000  # characters of a line in a file


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Lets the caller know, where rich would end with an error."""
        raise


def print_correction(result: Correction, output: Path) -> None:
    if result.equalization is not None:
        _print_steps(result.equalization)
    scores = table_from_scores(result.scores, result.method, result.deployed)
    _print_tables(table_from_report(result.report), scores)
    for note in result.notes:
        print(f"note: {printable(note)}")
    corrected = sum(layer.method is not None for layer in result.report)
    how = f"by {result.choice.label} " if corrected else ""
    is_equalized = ", equalized" if result.choice.is_equalized else ", not equalized"
    equalized = "" if result.equalization is None else is_equalized
    layers = f"{corrected} of {len(result.report)} layers corrected"
    kind = "; a float model: quantize it now" if result.is_simulated else ""
    if result.choice.method == "none" and len(result.scores) > 1 and len(result.deployed) < 2:
        print("no candidate is surely better than the uncorrected model, in SQNR, noise and divergence, or by the metric")
    if result.is_refitted:
        print(f"{result.choice.label} was chosen on held-out samples, then fitted to all samples")
    print(f"{printable(output)}: {layers} {how}from {result.samples} samples{equalized}{kind}", flush=True)
    if not corrected and result.left != ReasonCode.NOT_BETTER():
        print(f"nothing could be corrected: {result.left or 'the model has no layers'}", flush=True)
        raise SystemExit(NOTHING_CORRECTED)


def print_equalization(result: Equalization, output: Path) -> None:
    _print_steps(result)
    scaled = len({layer.name for each in result.chains for layer in each.chain.layers})
    layers = f"{scaled} of {len(without_later_calls(result.network.layers))} layers scaled"
    print(f"{printable(output)}: {len(result.folds)} batch normalizations folded, {layers}", flush=True)


def _print_steps(result: Equalization) -> None:
    _print_tables(table_from_chains(result.chains, result.high_biases), table_from_left(result.reasons))
    if result.changes:
        _print_tables(table_from_changes(result.changes))
    elif result.is_anything_done:
        print("change of the float outputs: not measured, no --data")
    if silent := sum(np.count_nonzero(each.silent) for each in result.chains):
        print(f"note: {silent} channels pass on nothing, their weights became 0")
    if result.replaced:
        print(f"note: {len(result.replaced)} ReLU6 became ReLU")


def _print_tables(*tables: Table) -> None:
    console = _Console()
    anywhere = console.options.update(width=_WIDEST)
    for table in (each for each in tables if each.row_count):
        if not console.is_terminal:
            console.width = max(console.width, console.measure(table, options=anywhere).maximum)
        console.print(table)
