"""Pages about results. Needs jinja2."""

from __future__ import annotations

from os import PathLike

from biascorr.report.notebook import excerpt
from biascorr.report.records import Record
from biascorr.whole_file import whole_file


def page(record: Record) -> str:
    """The page about a record, as HTML."""
    return f'<!doctype html><meta charset="utf-8">{excerpt(record)}'


def save_page(record: Record, path: str | PathLike[str], *, force: bool = False) -> None:
    """Writes the page about a record. Raises as :meth:`Reported.save_report`."""
    text = page(record)
    with whole_file(path, force=force) as file:
        file.write_text(text, encoding="utf-8")
