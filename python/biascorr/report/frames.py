"""Rows as a pandas.DataFrame. Needs pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biascorr.report.records import Record

if TYPE_CHECKING:
    import pandas

_FEW = 2
"""Rows for each value of a column at least, where it is taken for a category."""


def frame_from_rows(rows: Sequence[Record]) -> pandas.DataFrame:
    """A data frame: whole numbers and truth values that may be missing, real ones with nan, categories, text.

    Raises ImportError where pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a data frame needs pandas: pip install pandas") from error
    columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
    return pandas.DataFrame({key: pandas.Series(values, dtype=_dtype(values)) for key, values in columns.items()})


def _dtype(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return "boolean"
    if known and all(isinstance(value, int) for value in known):
        return "Int64"
    if all(isinstance(value, (int, float)) for value in known):
        return "float64"
    return "category" if len(set(known)) * _FEW <= len(values) else "string"
