"""Figures about results. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biascorr.report.lines import elided, label_of, two_lines
from biascorr.report.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE, _AFTER, _OTHER = "#b4530a", "#1a5fd0", "#59616c"
_LAYERS, _ROOM, _CANDIDATE = 3.6, 1.0, 0.25
"""Inches of the height of a figure."""

_HALF = 0.4
"""Of the width of a layer: where its bars are."""


def figure(record: Record) -> Figure:
    """The figure about a record of a correction or an equalization.

    Raises ImportError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'a plot needs {error.name}: pip install "biascorr[report]"') from error
    candidates = len(record.get("scores", ()))
    made = Figure(figsize=(10, _LAYERS + _ROOM + _CANDIDATE * candidates), layout="constrained")
    draw = {"correction": _correction, "equalization": _equalization}[record["kind"]]
    draw(record, made)
    made.suptitle(_plain(two_lines(record)[0]))
    return made


def _correction(record: Record, made: Figure) -> None:
    """SQNR of each layer before and after; below, the scores of the candidates."""
    layers, scores = made.subplots(2, 1, height_ratios=(_LAYERS, _ROOM + _CANDIDATE * len(record["scores"])))
    numbers = range(1, len(record["layers"]) + 1)
    for key, label, color, style in (("sqnr_before", "before", _BEFORE, "--"), ("sqnr_after", "after", _AFTER, "-")):
        values = [_or_nan(layer[key]) for layer in record["layers"]]
        layers.plot(numbers, values, style, color=color, marker=".", label=label)
    layers.set(xlabel="layer", ylabel="SQNR, dB", title="output of each layer")
    layers.legend()
    names = [_plain(label_of(each["candidate"])) for each in record["scores"]]
    errors = [_or_nan((each["gains"].get("sqnr") or {}).get("error")) for each in record["scores"]]
    colors = [_AFTER if each["is_taken"] else _OTHER for each in record["scores"]]
    scores.barh(names, [_or_nan(each["sqnr"]) for each in record["scores"]], xerr=errors, color=colors, capsize=3)
    scores.invert_yaxis()
    scores.set(xlabel="SQNR of the outputs, dB; the line is the standard error of the gain", title="candidates")


def _equalization(record: Record, made: Figure) -> None:
    """The least, middle and greatest range of the channels of each scaled layer, before and after."""
    axes: Any = made.subplots()
    ranges = [each for chain in record["chains"] for each in chain["ranges"]]
    for key, color, side in (("before", _BEFORE, -_HALF / 2), ("after", _AFTER, _HALF / 2)):
        known = [sorted(value for value in each[key] if value) or [float("nan")] for each in ranges]
        places = [number + side for number in range(1, len(ranges) + 1)]
        axes.vlines(places, [part[0] for part in known], [part[-1] for part in known], color=color, label=key)
        axes.plot(places, [part[len(part) // 2] for part in known], ".", color=color)
    axes.set(xlabel="scaled layer", ylabel="max |weight| of a channel", title="ranges of output channels")
    if ranges:
        axes.set_yscale("log")
        axes.legend()


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _plain(text: str) -> str:
    """Text without what matplotlib takes for mathematics."""
    return elided(text, 90).replace("$", r"\$")
