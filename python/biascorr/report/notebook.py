"""A result in a notebook: two lines and a small table, as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from biascorr.report.lines import elided, label_of, two_lines
from biascorr.report.numbers import NONE, decibels, gain, number
from biascorr.report.records import Record, rows

_MOST_ROWS = 10


def excerpt(record: Record) -> str:
    """The two lines of a record and a table of its candidates, models or layers, the first ones of many."""
    first, second = (html.escape(elided(line, 200)) for line in two_lines(record))
    found = _candidates(record) if record["kind"] == "correction" else _rows(record)
    more = len(found) - 1 - _MOST_ROWS
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    return f"<div><p><strong>{first}</strong><br>{second}</p>{_table(found[: 1 + _MOST_ROWS])}{rest}</div>"


def _candidates(record: Record) -> list[list[str]]:
    table = [["candidate", "SQNR, dB", "gain", ""]]
    for each in record["scores"]:
        mean, error = next(((gained["mean"], gained["error"]) for gained in each["gains"].values()), (None, None))
        said = "" if mean is None or error is None else gain(mean, error)
        table.append([label_of(each["candidate"]), decibels(each["sqnr"]), said, "taken" if each["is_taken"] else ""])
    return table if len(table) > 1 else []


def _rows(record: Record) -> list[list[str]]:
    found = rows(record)
    return [list(found[0]), *([_text(value) for value in row.values()] for row in found)] if found else []


def _text(value: Any) -> str:
    if value is None:
        return NONE
    return number(value) if isinstance(value, float) else elided(value)


def _table(cells: Sequence[Sequence[str]]) -> str:
    if not cells:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
