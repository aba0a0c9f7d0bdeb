"""Records: what a result says, as plain data that JSON can hold.

A record is a dict of dict, list, str, int, float, bool and None with str keys. Floats are finite; what is not is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from biascorr import __version__
from biascorr.graph.reasons import LayerReport, Reason

Record: TypeAlias = dict[str, Any]
"""A dict that JSON can hold."""

_NESTED = {"worst_channels"}
"""Columns that no table has, even where they are empty."""

ROWS = {"correction": "layers", "inspection": "layers", "comparison": "models", "demo": "models"}
"""By the kind of a record, the list that a table of it has the rows of."""


def plain(value: Any) -> Any:
    """A value as a record holds it: numbers of numpy as those of Python, other objects as text.

    Examples
    --------
    >>> import numpy as np
    >>> plain({"sqnr": np.float32(0.5), "error": np.inf, "shape": (np.int64(3), None)})
    {'sqnr': 0.5, 'error': None, 'shape': [3, None]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Reason):
        return reason_record(value)
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


def reason_record(reason: Reason) -> Record:
    """A reason: its code, what fills its text in, and the text."""
    return {"code": reason.code.name, "arguments": plain(dict(reason.arguments)), "text": str(reason)}


def layer_record(report: LayerReport) -> Record:
    """The report of a layer."""
    return {
        "name": report.name,
        "operator": report.op,
        "method": report.method,
        "channels": report.channels,
        "shift_before": plain(report.shift_before),
        "shift_after": plain(report.shift_after),
        "sqnr_before": plain(report.sqnr_before),
        "sqnr_after": plain(report.sqnr_after),
        "reasons": list(map(reason_record, report.reasons)),
        "worst_channels": [{"channel": channel, "shift": plain(shift)} for channel, shift in report.worst_channels],
    }


def rows(record: Record) -> list[Record]:
    """The rows of a record as a table: layers, models; each a flat dict, the same keys in all.

    Lists of texts and of reasons are one text, other lists and dicts are left out. Rows of an equalization are its layers and
    batch normalizations, each with what was done to it.
    """
    if record["kind"] == "equalization":
        return list(_equalized_rows(record))
    found = record.get(ROWS.get(record["kind"], "layers"), ())
    named = [key for key in dict.fromkeys(key for each in found for key in each) if key not in _NESTED]
    keys = [key for key in named if all(_is_flat(each.get(key)) for each in found)]
    return [{key: _cell(each.get(key)) for key in keys} for each in found]


def _is_flat(value: Any) -> bool:
    return not isinstance(value, (dict, list)) or isinstance(_cell(value), str)


def _cell(value: Any) -> Any:
    return _text(value) if isinstance(value, list) else value


def _text(values: list[Any]) -> str | None:
    """Texts or reasons as one text; None of anything else."""
    texts = [each.get("text") if isinstance(each, dict) else each for each in values]
    known = [each for each in texts if isinstance(each, str)]
    return "; ".join(known) if len(known) == len(texts) else None


def _equalized_rows(record: Record) -> Iterable[Record]:
    done: list[tuple[str, str, int | None, str | None]] = [
        (each["batch_norm"], "folded", None, each["layer"]) for each in record["folds"]
    ]
    done += [(name, "replaced", None, "ReLU6 became ReLU") for name in record["replaced"]]
    for number, chain in enumerate(record["chains"], start=1):
        done += [(name, "scaled", number, None) for name in chain["layers"]]
    done += [(each["first"], "high bias folded", None, each["second"]) for each in record["high_biases"]]
    done += [(each["name"], "left", None, _text(each["reasons"])) for each in record["left"]]
    for name, step, chain, note in done:
        yield {"name": name, "step": step, "chain": chain, "note": note}


def provenance_text(*, method: str, data: str | None) -> str:
    """What a file says of how it was made, as JSON: the version of this package, the method, a digest of the data.

    Examples
    --------
    >>> provenance_text(method="mean", data=None)  # doctest: +ELLIPSIS
    '{"version":"...","method":"mean","data":null}'
    """
    return json.dumps({"version": __version__, "method": method, "data": data}, separators=(",", ":"))
