"""Two lines that say what a record holds, for a prompt and for the top of a page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from biascorr.graph.reasons import ReasonCode
from biascorr.report.records import Record

_ENOUGH = 60
"""Characters of a name."""


def printable(text: object) -> str:
    """The text with escapes for what a terminal would not show but act on, and for what is no character at all."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def elided(text: object, width: int = _ENOUGH) -> str:
    """The printable text, without its middle where it is longer than this.

    Examples
    --------
    >>> elided("backbone/block/conv", 13)
    'backbo…k/conv'
    """
    shown = printable(text)
    half = (width - 1) // 2
    return shown if len(shown) <= width else f"{shown[: width - 1 - half]}…{shown[len(shown) - half :]}"


def elided_alike(texts: Sequence[str], width: int = _ENOUGH) -> list[str]:
    """Printable texts, of which those that are longer than this lose what they share or, if that is not enough, their start,
    middle or end: where most of them differ still.

    Examples
    --------
    >>> elided_alike(["net/layer.1/query/MatMul", "net/layer.1/key/MatMul", "net/layer.2/query/MatMul"], 17)
    ['…/layer.1/query/…', '…/layer.1/key/…', '…/layer.2/query/…']
    """
    shown = [printable(text) for text in texts]
    if len(set(shown)) < 2 or all(len(text) <= width for text in shown):
        return [elided(text, width) for text in shown]
    parts = [text.split("/") for text in shown]
    first = _shared(parts)
    if any(each[0] for each in parts) or first > 1:  # not the empty part before a slash alone
        parts = [["…", *each[first:]] for each in parts] if first else parts
    if max(len("/".join(each)) for each in parts) > width and (last := _shared([each[::-1] for each in parts])):
        parts = [[*each[:-last], "…"] for each in parts]
    ways = [[_cut("/".join(each), width, kept) for each in parts] for kept in (width // 2, width - 1, 0)]
    return max(ways, key=lambda way: len(set(way)))


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many of the first parts are the same in all, which leaves each at least one."""
    shared = sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*parts)))
    return min(shared, *(len(each) - 1 for each in parts))


def _cut(text: str, width: int, kept: int) -> str:
    """The text, or as much of its start as is kept, and of its end as there is room for."""
    end = width - 1 - kept
    return text if len(text) <= width else f"{text[:kept]}…{text[len(text) - end :]}"


def two_lines(record: Record) -> tuple[str, str]:
    """The result, and what it was made of."""
    lines = {"correction": _correction, "equalization": _equalization, "comparison": _comparison, "inspection": _inspection}
    lines |= {"folding": _folding, "demo": _demo}
    return lines.get(record["kind"], _other)(record)


def scores_of(record: Record) -> tuple[Mapping[str, float | None], Mapping[str, float | None]] | None:
    """The scores of the uncorrected and of the returned model; None where nothing was scored."""
    scores = record["scores"]
    taken = next((each for each in scores if each["is_taken"]), None)
    return None if taken is None else (scores[0], taken)


def counted(count: int, noun: str) -> str:
    """So many of them, in the plural but for one.

    Examples
    --------
    >>> counted(1, "layer"), counted(2, "layer")
    ('1 layer', '2 layers')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def change_of_scores(record: Record) -> str:
    """The score of a correction before and after it, by the measure that decided: "25.97 -> 48.48 dB"."""
    found = scores_of(record)
    if found is None:
        return "not scored"
    before, after = found
    name, unit = ("metric", "") if before["metric"] is not None else ("sqnr", " dB")
    numbers = [each[name] for each in found]
    if None in numbers:
        return "not scored"
    digits = ".4g" if name == "metric" else ".2f"
    change = f"{before[name]:{digits}}" if before is after else f"{before[name]:{digits}} -> {after[name]:{digits}}"
    return f"{'metric ' if name == 'metric' else ''}{change}{unit}"


def label_of(candidate: str) -> str:
    """What a candidate is called where people read it."""
    return "uncorrected" if candidate == "none" else candidate


def correction_in_short(record: Record) -> str:
    """How good a correction is, on how many samples, and by which method."""
    kind = "held-out sample" if record["is_held_out"] else "sample"
    scored = f" on {counted(record['scored_samples'], kind)}" if record["scored_samples"] else ""
    simulated = "simulated: " if record["is_simulated"] else ""
    return f"{simulated}{change_of_scores(record)}{scored}, {label_of(record['method'])}"


def left_because(record: Record) -> str | None:
    """The reason that most layers of a correction have of which none could be corrected; None where one was, or could."""
    reasons = [reason for each in record["layers"] for reason in each["reasons"]]
    if any(each["method"] is not None for each in record["layers"]):
        return None
    if any(reason["code"] == ReasonCode.NOT_BETTER.name for reason in reasons):
        return None
    texts = [reason["text"] for reason in reasons]
    return max(texts, key=texts.count) if texts else "the model has no layers"


def count_of_scaled(record: Record) -> int:
    """How many layers an equalization scaled."""
    return len({name for chain in record["chains"] for name in chain["layers"]})


def _correction(record: Record) -> tuple[str, str]:
    corrected = sum(layer["method"] is not None for layer in record["layers"])
    seconds = "" if record["seconds"] is None else f", {record['seconds']:.1f} s"
    return (
        f"Correction: {correction_in_short(record)}",
        f"{corrected} of {counted(len(record['layers']), 'layer')} corrected, {counted(record['samples'], 'sample')} read"
        f"{seconds}",
    )


def _equalization(record: Record) -> tuple[str, str]:
    changes = record["changes"]
    change = "change of the float outputs not measured"
    if changes:
        change = f"the float outputs moved by {_number(changes[-1]['relative'])} of the largest"
    return (
        f"Equalization: {counted(len(record['folds']), 'batch normalization')} folded, {count_of_scaled(record)} of "
        f"{counted(record['layer_count'], 'layer')} scaled",
        f"high biases of {counted(len(record['high_biases']), 'layer')} folded, {change}",
    )


def _comparison(record: Record) -> tuple[str, str]:
    models = record["models"]
    best = max((each for each in models if each.get("sqnr") is not None), key=lambda each: float(each["sqnr"]), default=None)
    nearest = "not scored" if best is None else f"nearest: {elided(best['name'])}, {best['sqnr']:.2f} dB"
    reference = elided(record.get("reference", {}).get("name", "a reference"))
    return f"Comparison: {counted(len(models), 'model')} with {reference}", nearest


def _inspection(record: Record) -> tuple[str, str]:
    by = f", quantized by {printable(record['quantizer'])}" if record.get("quantizer") else ""
    return (
        f"Inspection: {printable(record.get('format', 'model'))}{by}",
        f"{counted(len(record.get('layers', ())), 'layer')}, {counted(len(record.get('inputs', ())), 'input')}",
    )


def _folding(record: Record) -> tuple[str, str]:
    count, left = len(record["folds"]), len(record["left"])
    layers = len({each["layer"] for each in record["folds"]})
    return (
        f"Folding: {count} of {counted(count + left, 'batch normalization')} folded into {counted(layers, 'layer')}",
        f"{left} left as they are" if left else "none is left",
    )


def _demo(record: Record) -> tuple[str, str]:
    found = {each["name"]: each["SQNR, dB"] for each in record["models"]}
    before, after = (_decibels(found[name]) for name in ("quantized", "corrected"))
    return f"Demonstration: {before} quantized, {after} corrected", f"scored on {record['scored']} held-out batches"


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def _other(record: Record) -> tuple[str, str]:
    sizes = [counted(len(value), key.removesuffix("s")) for key, value in record.items() if isinstance(value, list)]
    return str(record["kind"]).capitalize(), ", ".join(sizes) or "nothing"


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.2g}"
