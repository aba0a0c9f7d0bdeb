"""Pages about results: one file that needs no other, with nothing that runs in it. Needs jinja2.

All text of a record is escaped twice: control characters and what turns the direction of text as a terminal would show them,
then what HTML has a meaning for. The page forbids itself all scripts, frames and requests.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

from biascorr.report import charts
from biascorr.report.grouping import groups_of
from biascorr.report.lines import count_of_scaled, elided, label_of, scores_of, two_lines
from biascorr.report.numbers import NONE, decibels, gain, number, signed
from biascorr.report.records import Record
from biascorr.whole_file import whole_file

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(f'a report as a page needs {error.name}: pip install "biascorr[report]"') from error

_TEMPLATES = Path(__file__).parent / "templates"

_LONGEST_NAME = 96
_LONGEST_TEXT = 2000
_MOST_WORST = 10
"""Layers whose worst channels the page names."""

_MOST_CHAINS = 3
"""Chains whose channels are drawn: those that gained most."""


def page(record: Record) -> str:
    """The page about a record, as HTML."""
    views = {"correction": _correction, "equalization": _equalization}
    view = views.get(record["kind"], _other)(record)
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = _environment().get_template(f"{record['kind'] if record['kind'] in views else 'other'}.html")
    view["subject"] = _subject(record.get("files") or {})
    return str(template.render(record=record, lines=two_lines(record), style=Markup(style), digest=Markup(digest), **view))


def save_page(record: Record, path: str | PathLike[str], *, force: bool = False) -> None:
    """Writes the page about a record. Raises as :meth:`Reported.save_report`."""
    text = page(record)
    with whole_file(path, force=force) as file:
        file.write_text(text, encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "decibels": decibels,
        "number": number,
        "signed": signed,
        "name": lambda text: elided(text, _LONGEST_NAME),
    }
    return environment


def _subject(files: Mapping[str, str]) -> str | None:
    """The name of the model's file."""
    given = [files[name] for name in ("quantized", "reference") if name in files]
    return PurePath(given[0]).name if given else None


def _shown(value: Any) -> Any:
    """What a value is in the page."""
    if value is None:
        return NONE
    return elided(value, _LONGEST_TEXT) if isinstance(value, str) and not isinstance(value, Markup) else value


def _correction(record: Record) -> dict[str, Any]:
    layers = record["layers"]
    scores, names = scores_of(record), [layer["name"] for layer in layers]
    view: dict[str, Any] = {
        "hero": None if scores is None else _hero(*scores),
        "candidates": _candidates(record),
        "shares_scale": any(each["gains"] for each in record["scores"]),
        "left": groups_of(layer for layer in layers if layer["method"] is None),
        "remarks": groups_of(layer for layer in layers if layer["method"] is not None),
        "worst": _worst(layers),
        "corrected": sum(layer["method"] is not None for layer in layers),
        "samples_chart": None if scores is None else _samples_chart(*scores),
        "layers_chart": None,
        "shifts_chart": None,
        "equalization": None if record["equalization"] is None else _equalization(record["equalization"]),
    }
    errors = [(layer["sqnr_before"], layer["sqnr_after"]) for layer in layers]
    if any(value is not None for pair in errors for value in pair):
        view["layers_chart"] = Markup(charts.layers_chart(names, errors))
    shifts = [(layer["shift_before"], layer["shift_after"]) for layer in layers]
    if any(before for before, _ in shifts):
        view["shifts_chart"] = Markup(charts.shifts_chart(names, shifts))
    return view


def _hero(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """The numbers at the top: by the measure that decided."""
    measure, unit = ("metric", "") if before["metric"] is not None else ("sqnr", "dB")
    if before[measure] is None or after[measure] is None:
        return None
    form = decibels if unit else number
    gained = after["gains"].get(measure) or {}
    return {
        "before": form(before[measure]),
        "after": form(after[measure]),
        "unit": unit,
        "label": "SQNR of the outputs" if unit else "your metric",
        "gain": gain(gained["mean"], gained["error"]) if _is_whole(gained) else None,
        "is_changed": before is not after,
        "divergences": None if before["divergence"] is None else [number(each["divergence"]) for each in (before, after)],
    }


def _samples_chart(before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup | None:
    pairs = zip(before["sqnr_of_samples"], after["sqnr_of_samples"])
    known = [(first, second) for first, second in pairs if first is not None and second is not None]
    return Markup(charts.samples_chart(known)) if known and before is not after else None


def _candidates(record: Record) -> list[dict[str, Any]]:
    """The rows of the table of candidates, each with its gain by the measure that decided."""
    deployed = {each["candidate"]: each["sqnr"] for each in record["deployed"]}
    measure = "metric" if any("metric" in each["gains"] for each in record["scores"]) else "sqnr"
    gains = [each["gains"].get(measure) or {} for each in record["scores"]]
    ends = [each["mean"] + side * each["error"] for each in gains for side in (-1, 1) if _is_whole(each)]
    rows = []
    for k, (each, gained) in enumerate(zip(record["scores"], gains)):
        row = {**each, "gain": None, "chart": None, "deployed": deployed.get(each["candidate"])}
        row["label"] = label_of(each["candidate"])
        if _is_whole(gained):
            row["gain"] = gain(gained["mean"], gained["error"])
            label = f"Gain of {row['label']}: {row['gain']}"
            interval = gained["mean"], gained["error"]
            row["chart"] = Markup(charts.gain_chart(*interval, (min(ends), max(ends)), each["is_taken"], label, f"gain{k}"))
        rows.append(row)
    return rows


def _is_whole(gained: Mapping[str, float | None]) -> bool:
    return gained.get("mean") is not None and gained.get("error") is not None


def _worst(layers: Sequence[Record]) -> list[dict[str, Any]]:
    """The layers whose channels have the largest shifts of all, with these channels."""
    found = [
        {"number": number, "name": layer["name"], "channels": layer["worst_channels"]}
        for number, layer in enumerate(layers, start=1)
        if layer["worst_channels"] and layer["worst_channels"][0]["shift"] is not None
    ]
    found.sort(key=lambda each: -abs(each["channels"][0]["shift"]))
    return found[:_MOST_WORST]


def _equalization(record: Record) -> dict[str, Any]:
    chains = record["chains"]
    ranges = [each for chain in chains for each in chain["ranges"]]
    known = [{**each, **{part: [value or 0.0 for value in each[part]] for part in ("before", "after")}} for each in ranges]
    gained = sorted((chain for chain in chains if chain["ranges"]), key=lambda chain: -(chain["bits"] or 0.0))[:_MOST_CHAINS]
    return {
        "equalized": record,
        "scaled": count_of_scaled(record),
        "equalization_left": groups_of(record["left"]),
        "ranges_chart": Markup(
            charts.ranges_chart([each["layer"] for each in known], [(each["before"], each["after"]) for each in known])
        )
        if known
        else None,
        "scaled_layers": [each["layer"] for each in known],
        "channels_charts": [
            [
                (each["layer"], each["channels"], _channels_chart(each, f"channels{k}-{number}"))
                for number, each in enumerate(chain["ranges"])
            ]
            for k, chain in enumerate(gained)
        ],
    }


def _channels_chart(ranges: Record, name: str) -> Markup:
    before, after = ([value or 0.0 for value in ranges[part]] for part in ("before", "after"))
    label = f"Ranges of the channels of {elided(ranges['layer'])}, before and after"
    return Markup(charts.channels_chart(before, after, label, name))


def _other(record: Record) -> dict[str, Any]:
    """Tables of any record: of each list of dicts, those in them apart; all else as facts."""
    tables = {}
    for key, value in record.items():
        if _is_table(value) and key not in _REPRODUCED:
            nested = {column for row in value for column in row if _is_table(row[column]) and "text" not in row[column][0]}
            tables[key] = _table([{name: each for name, each in row.items() if name not in nested} for row in value])
            for column in sorted(nested):
                rows = [{key.removesuffix("s"): row.get("name"), **each} for row in value for each in row.get(column) or ()]
                tables[f"{column} of {key}"] = _table(rows)
    facts = {key: _text_of(value) for key, value in record.items() if key not in (*tables, *_REPRODUCED)}
    return {"tables": tables, "facts": {key: text for key, text in facts.items() if text}}


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _table(rows: Sequence[Record]) -> dict[str, Any]:
    """The columns that say anything, and whether each has numbers alone."""
    names = list(dict.fromkeys(column for row in rows for column in row))
    columns = [name for name in names if any(row.get(name) not in (None, [], "") for row in rows)]
    numbers = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    cells = [[_text_of(row.get(column)) for column in columns] for row in rows]
    return {"columns": columns, "numbers": numbers, "rows": cells}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


_REPRODUCED = {"kind", "biascorr", "notes", "versions", "files", "command", "data_digest"}
"""What each page says at its end, or at its top."""


def _text_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: NONE, True: "yes", False: "no"}[value]
    if isinstance(value, (int, float)):
        return number(value) if isinstance(value, float) else f"{value:,}"
    if isinstance(value, dict):
        return str(value["text"]) if "text" in value else ", ".join(f"{key} {_text_of(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ("; " if _is_table(value) else ", ").join(map(_text_of, value))
    return str(value)
