"""A result in a notebook: a few lines of HTML."""

from __future__ import annotations

import html

from biascorr.report.lines import two_lines
from biascorr.report.records import Record


def excerpt(record: Record) -> str:
    """The two lines of a record as HTML."""
    first, second = map(html.escape, two_lines(record))
    return f"<div><strong>{first}</strong><br>{second}</div>"
