"""Records for the terminal: what was done and how good it is, in as many columns as there are. Needs rich.

The last line is the result. What takes the most room shows the rows that matter; all of them where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from biascorr.report.grouping import groups_of
from biascorr.report.lines import (
    correction_in_short,
    count_of_scaled,
    counted,
    elided,
    elided_alike,
    label_of,
    left_because,
    printable,
)
from biascorr.report.records import Record

_SHOWN = 10
"""Rows of a table, where not all are asked for."""

_NAMES = 2
"""Names in a row for all that were left as they were for the same reason."""

_NARROWEST = 8
"""Columns of a name at least."""

_GAP = 2
"""Columns between two columns of a table."""


def render(record: Record, console: Console, *, output: str | None = None, all_rows: bool = False) -> None:
    """Prints a record.

    Parameters
    ----------
    record : dict
        What `to_dict` of a result gives.
    console : Console
        Where to.
    output : str, optional
        The file that the result is in, for the last line.
    all_rows : bool
        Whether tables have all of their rows, however long.
    """
    printer = _Printer(console, all_rows)
    for line in printer.lines_of(record):
        printer.say(line)
    end = _SIMULATED_END if record.get("is_simulated") else ""
    if output is None:
        printer.say(f"{_last_line(record)}{end}", style="bold")
    else:
        printer.result(_last_line(record), f"-> {output}{end}")


_SIMULATED = "simulated quantization: the result is the float model with corrected biases, to be quantized now"
_SIMULATED_END = "; a float model, quantize it now"


class _Printer:
    """Prints the parts of a record.

    Parameters
    ----------
    console : Console
        Where to.
    all_rows : bool
        Whether tables have all of their rows.
    """

    def __init__(self, console: Console, all_rows: bool) -> None:
        self._console = console
        self._all = all_rows
        self._is_first = True

    def say(self, line: str, style: str = "") -> None:
        """Prints a line, wrapped where it is too long."""
        self._is_first = False
        self._console.print(Text(printable(line), style=style))

    def result(self, line: str, written: str) -> None:
        """Prints the result and what was written: in one line, but for a terminal that is too narrow."""
        width = self._console.width
        if not self._console.is_terminal:
            self._console.print(Text(printable(f"{line} {written}")), soft_wrap=True)
            return
        if len(printable(f"{line} {written}")) <= width:
            line, written = f"{line} {written}", ""
        elif len(printable(line)) > width:  # the time goes with the file, so that it is not alone
            line, _, time = line.rpartition(", ")
            line, written = f"{line},", f"{time} {written}"
        self.say(line, style="bold")
        if written:
            self._console.print(Text(printable(written), style="bold"), soft_wrap=True)

    def table(self, title: str, table: Table) -> None:
        """Prints a table below its title, and an empty line before that."""
        if not self._is_first:
            self._console.print()
        self.say(title, style="bold")
        self._console.print(table)

    def note(self, text: str) -> None:
        """Prints a remark, wrapped."""
        self._console.print(Text(f"note: {printable(text)}"))

    def lines_of(self, record: Record) -> Sequence[str]:
        """Prints all but the last line of a record; gives what comes right before that."""
        parts: dict[str, Callable[[Record], Sequence[str]]] = {
            "correction": self._correction,
            "equalization": self._equalization,
            "folding": self._folding,
            "comparison": self._comparison,
            "inspection": self._inspection,
            "demo": self._demo,
        }
        return parts.get(record["kind"], self._other)(record)

    def _correction(self, record: Record) -> Sequence[str]:
        if record["is_simulated"]:
            self.say(_SIMULATED)
        if record["equalization"] is not None:
            is_taken = record["method"].startswith("equalized")
            self._equalization(record["equalization"]) if self._all else self._equalized(record["equalization"], is_taken)
        layers = record["layers"]
        columns = {
            "|shift|": lambda each: _number(each["shift_before"]),
            "before, dB": lambda each: _decibels(each["sqnr_before"]),
            "after, dB": lambda each: _decibels(each["sqnr_after"]),
        }
        if self._all:
            columns = {"method": lambda each: each["method"] or "", "channels": _count("channels")} | columns
        if self._all or any(each["method"] is not None for each in layers):
            self._layers("layers", layers, _changed_most(layers), columns)
        self._reasons("layers left as they are", [each for each in layers if each["method"] is None])
        self._reasons("layers corrected, and what else was done", [each for each in layers if each["method"] is not None])
        self._scores(record)
        for note in record["notes"]:
            self.note(note)
        return _why_nothing(record)

    def _scores(self, record: Record) -> None:
        scores, deployed = record["scores"], {each["candidate"]: each for each in record["deployed"]}
        if not scores:
            return
        scored, samples = record["scored_samples"], counted(record["samples"], "sample")
        of = f"{scored} {'held-out ' if record['is_held_out'] else ''}of " if scored != record["samples"] else ""
        title = f"outputs beside those of the float model, mean of {of}{samples}"
        table = _table()
        table.add_column("candidate", no_wrap=True)
        metric = scores[0]["metric"] is not None
        measures = {"sqnr": "SQNR, dB"} | ({"divergence": "KL, nats"} if scores[0]["divergence"] is not None else {})
        measures |= {"metric": "metric"} if metric else {}
        for heading in (*measures.values(), "gain"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for each in scores:
            cells = [label_of(each["candidate"]), *(_measure(measure, each) for measure in measures)]
            cells.append(_gain(each["gains"].get("metric" if metric else "sqnr")))
            table.add_row(*map(_cell, (*cells, _verdict(each, record))), style="bold" if each["is_taken"] else "")
        self.table(title, table)
        if len(deployed) > 1:
            (_, before), (name, after) = list(deployed.items())[:2]
            change = f"{_measure('sqnr', before)} -> {_measure('sqnr', after)} dB"
            self.say(f"{name} as the runtime runs it on this CPU: {change}{'' if after['is_taken'] else ', not taken'}")
        if record["is_refitted"]:
            self.say("chosen on held-out samples, then fitted to all samples")

    def _equalized(self, record: Record, is_taken: bool) -> None:
        """One line of the equalization that came before a correction, or was tried."""
        bits = sum(each["bits"] or 0.0 for each in record["chains"])
        title = "the float model equalized" if is_taken else "tried, not taken: the float model equalized"
        self.say(f"{title}: {_equalized(record)}, {bits:.1f} bits gained")

    def _equalization(self, record: Record) -> Sequence[str]:
        chains = record["chains"]
        if chains:
            columns = {
                "factors": lambda each: f"{_number(each['factors']['min'])}..{_number(each['factors']['max'])}",
                "bits gained": lambda each: f"{each['bits']:.2f}",
            }
            if any(each["bounds"] for each in chains):
                columns["bounds"] = lambda each: str(each["bounds"] or "")
            named = [{**each, "name": " -> ".join(each["layers"])} for each in chains]
            best = sorted(named, key=lambda each: -(each["bits"] or 0))[:_SHOWN]
            title, why = "chains of layers scaled together", "gained most bits"
            self._layers(title, named, best, columns, why, "layers", is_named=True)
        if record["high_biases"]:
            folded = {each["first"]: each["largest"] for each in record["high_biases"]}
            largest = max((each for each in folded.values() if each is not None), default=None)
            self.say(f"high biases of {counted(len(folded), 'layer')} folded into the next ones, up to {_number(largest)}")
        self._reasons("left as they are", record["left"])
        if record["changes"]:
            table = _table()
            table.add_column("after")
            for heading in ("largest", "of the largest output"):
                table.add_column(heading, justify="right")
            for each in record["changes"]:
                relative = "nan" if each["relative"] is None else f"{each['relative']:.1e}"
                table.add_row(_cell(each["step"]), _number(each["absolute"]) or "nan", relative)
            self.table("change of the float outputs", table)
        elif any(record[key] for key in ("folds", "replaced", "chains", "high_biases")):
            self.say("change of the float outputs: not measured, no --data")
        if silent := sum(each["silent"] for each in chains):
            verb = "passes" if silent == 1 else "pass"
            self.note(f"{counted(silent, 'channel')} {verb} on nothing, whose weights became 0")
        if record["replaced"]:
            self.note(f"{len(record['replaced'])} ReLU6 became ReLU")
        return ()

    def _folding(self, record: Record) -> Sequence[str]:
        folds = [{"name": each["batch_norm"], **each} for each in record["folds"]]
        into = {"into layer": lambda each: each["layer"]}
        self._layers("batch normalizations", folds, folds[:_SHOWN], into, "come first", "batch normalization")
        self._reasons("left as they are", record["left"])
        for note in record["notes"]:
            self.note(note)
        return ()

    def _comparison(self, record: Record) -> Sequence[str]:
        models, reference = record["models"], record["reference"]
        has = {key for key in ("divergence", "top1") if any(each[key] is not None for each in models)}
        headings = {"sqnr": "SQNR, dB", "divergence": "KL, nats", "top1": "top-1", "largest_change": "change", "seconds": "s"}
        keys = [key for key in headings if key in has or key not in ("divergence", "top1")]
        rows: list[tuple[str, Mapping[str, Any]]] = [(str(reference["name"]), reference)]
        for each in models:
            rows.append((str(each["name"]), each))
            if len(each["outputs"]) > 1:
                rows += [(f"  {output['name']}", output) for output in each["outputs"]]
        columns = {headings[key]: [_measure(key, row) for _, row in rows] for key in keys}
        columns["size"] = [_bytes(row.get("size")) for _, row in rows]
        names = elided_alike([name for name, _ in rows], self._room(columns))
        table = _table()
        table.add_column("model", no_wrap=True)
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for cells in zip(names, *columns.values()):
            table.add_row(*map(_cell, cells))
        self.table(f"models beside {elided(reference['name'])}, mean of {counted(record['samples'], 'sample')}", table)
        for note in record["notes"]:
            self.note(note)
        return ()

    def _inspection(self, record: Record) -> Sequence[str]:
        by = record["quantizer"] or record["producer"]
        made = f", {'quantized' if record['quantizer'] else 'made'} by {by}" if by else ""
        self.say(f"{record['format']}{made}{_comma(_bytes(record['size']))}")
        for title in ("inputs", "outputs"):
            for each in record[title]:
                self.say(f"{title[:-1]} {elided(each['name'], 40)}: {_tensor(each)}")
        layers = record["layers"]
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {}
        if not all(each["is_correctable"] for each in layers):
            columns["corrects"] = lambda each: "yes" if each["is_correctable"] else "no"
        weights = {_weights(each) for each in layers if each["dtype"] is not None}
        if len(weights) == 1 and len(layers) > 1:
            self.say(f"weights: {weights.pop()}")
        else:
            columns["weights"] = _weights
        columns |= {"range": _range, "spread": lambda each: _decibels(each["channel_bits"])}
        for key, heading in (("weight_sqnr", "SQNR, dB"), ("chain_bits", "gain")):
            if any(each[key] is not None for each in layers):
                columns[heading] = _digits(key)
        if record["is_quantized"] and any(each["weight_sqnr"] is not None for each in layers):
            first, why = [each for each in layers if each["weight_sqnr"] is not None], "lose most"
            first.sort(key=lambda each: each["weight_sqnr"])
        else:
            first, why = [each for each in layers if each["channel_bits"] is not None], "spread most"
            first.sort(key=lambda each: -each["channel_bits"])
        kept = {each["name"] for each in first[:_SHOWN]} or {each["name"] for each in layers[:_SHOWN]}
        self._layers("layers", layers, [each for each in layers if each["name"] in kept], columns, why)
        self._reasons("layers that cannot be corrected", [each for each in layers if not each["is_correctable"]])
        chains = [each for each in record["chains"] if each["bits"] and each["bits"] >= _WORTH]
        if chains:
            best = " -> ".join(elided(name, 24) for name in chains[0]["layers"])
            gain, of = sum(each["bits"] for each in chains), counted(len(chains), "chain")
            self.say(f"equalization would gain {gain:.1f} bits in {of} of layers, most ({chains[0]['bits']:.1f}) in {best}")
        for note in record["notes"]:
            self.note(note)
        return ()

    def _demo(self, record: Record) -> Sequence[str]:
        table = _table()
        for heading in record["table"]:
            table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
        for cells in zip(*record["table"].values()):
            table.add_row(*map(_cell, cells))
        self.table(f"{record['calibrated']} batches calibrated, {record['scored']} others scored", table)
        return ()

    def _other(self, record: Record) -> Sequence[str]:
        for key, value in record.items():
            if isinstance(value, (str, int, float)) and key != "kind":
                self.say(f"{key}: {value}")
        return ()

    def _layers(
        self,
        title: str,
        layers: Sequence[Mapping[str, Any]],
        shown: Sequence[Mapping[str, Any]],
        columns: Mapping[str, Callable[[Any], str]],
        why: str = "changed most",
        heading: str = "layer",
        *,
        is_named: bool = False,
    ) -> None:
        """A table of layers; of those that matter, unless all are wanted."""
        if not layers:
            return
        rows = layers if self._all else shown
        if len(rows) < len(layers):
            title = f"{len(rows)} of {len(layers)} {title}: those that {why} (--verbose: all)"
        else:
            title = f"{len(layers)} {title}" if len(layers) > 1 else title
        operator = {} if is_named or "operator" not in rows[0] else {"operator": lambda each: each["operator"]}
        texts = {name: [printable(cell(each)) for each in rows] for name, cell in (operator | dict(columns)).items()}
        names = [printable(each["name"]) for each in rows]
        if self._room(texts) < max(map(len, names)):
            texts = {name: elided_alike(cells, _WIDE) for name, cells in texts.items()}
        if self._console.width < _UNLIMITED:
            room = max(self._room(texts), len(heading))
            names = [elided(name, room) for name in names] if is_named else elided_alike(names, room)
        table = _table()
        table.add_column(heading, no_wrap=True)
        for name in texts:
            table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
        for cells in zip(names, *texts.values()):
            table.add_row(*map(_cell, cells))
        self.table(title, table)

    def _room(self, columns: Mapping[str, Sequence[str]]) -> int:
        """Columns that are left for a name beside columns of these headings and cells."""
        widths = [max(map(len, (heading, *cells))) for heading, cells in columns.items()]
        return max(_NARROWEST, self._console.width - sum(widths) - _GAP * len(widths))

    def _reasons(self, title: str, layers: Sequence[Record]) -> None:
        """One row for all that have the same reasons, whatever names and numbers are in them."""
        groups = groups_of(layers)
        if not groups:
            return
        table = _table()
        table.add_column("", justify="right")
        table.add_column("why", ratio=3)
        table.add_column("layers", ratio=2)
        for group in groups:
            names = [elided(name, _WIDE) for name in group.names[:_NAMES]]
            shown = ", ".join(names) + (", ..." if len(group.names) > _NAMES else "")
            table.add_row(str(len(group.names)), _cell(group.text), _cell(shown))
        self.table(title, table)


_WIDE = 24
"""Columns of a cell that is no name, at most."""

_LEFT = ("operator", "method", "corrects", "weights", "into layer")
"""Columns of text."""

_UNLIMITED = 1000
"""Columns of a console where nothing is cut."""

_WORTH = 0.1
"""Bits of a chain that are worth a word."""


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _cell(text: object) -> Text:
    return Text(printable(text))  # names may look like markup


def _changed_most(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers that were changed most, in their order; those that were corrected where nothing is measured."""

    def change(each: Mapping[str, Any]) -> tuple[bool, float, float]:
        before, after = each["sqnr_before"], each["sqnr_after"]
        gain = abs(after - before) if before is not None and after is not None else -1.0
        return each["method"] is not None, gain, each["shift_before"] or 0.0

    kept = {each["name"] for each in sorted(layers, key=change, reverse=True)[:_SHOWN]}
    return [each for each in layers if each["name"] in kept]


def _verdict(score: Mapping[str, Any], record: Record) -> str:
    """Whether a candidate was taken, and why not."""
    scores, deployed = record["scores"], [each["candidate"] for each in record["deployed"]]
    if score["is_taken"]:
        return "taken"
    gains = score["gains"]
    if not gains:
        return ""
    first = gains.get("metric") or gains["sqnr"]
    if first["mean"] is None:
        return "not scored"
    if first["mean"] < 0:
        return "worse"
    if first["mean"] <= (first["error"] or 0.0):
        return "gain not sure"
    if "divergence" in gains and (gains["divergence"]["mean"] or 0.0) <= 0:
        return "KL not better"
    if score["candidate"] in deployed:
        return "unsure deployed"
    chosen = [each for each in scores if each["candidate"] in deployed[1:]] or [each for each in scores if each["is_taken"]]
    best = (chosen or scores)[0]
    if not best["gains"]:
        return "noise not less"
    other = (best["gains"].get("metric") or best["gains"]["sqnr"])["mean"]
    return "not surely better" if other is None or first["mean"] >= other else "less"


def _why_nothing(record: Record) -> list[str]:
    """Why no layer was corrected; nothing where one was."""
    if any(each["method"] is not None for each in record["layers"]):
        return []
    if len(record["scores"]) > 1 and len(record["deployed"]) < 2 and record["method"] == "none":
        by = "by the metric" if record["scores"][0]["metric"] is not None else "in SQNR, noise and divergence"
        return [f"no candidate is surely better than the uncorrected model, {by}"]
    reason = left_because(record)
    return [] if reason is None else [f"nothing could be corrected: {reason}"]


def _last_line(record: Record) -> str:
    """The result in one line."""
    lines = {
        "correction": _corrected,
        "equalization": _equalized,
        "folding": _folded,
        "comparison": _compared,
        "inspection": _inspected,
        "demo": _shown,
    }
    line = lines[record["kind"]](record) if record["kind"] in lines else str(record["kind"])
    return line + _comma(_seconds(record.get("seconds")))


def _corrected(record: Record) -> str:
    layers = record["layers"]
    corrected = sum(each["method"] is not None for each in layers)
    return f"{correction_in_short(record)}, {corrected} of {counted(len(layers), 'layer')}"


def _equalized(record: Record) -> str:
    folds = counted(len(record["folds"]), "batch normalization")
    return f"{count_of_scaled(record)} of {counted(record['layer_count'], 'layer')} scaled, {folds} folded"


def _folded(record: Record) -> str:
    count = len(record["folds"])
    return f"{count} of {counted(count + len(record['left']), 'batch normalization')} folded"


def _shown(record: Record) -> str:
    places = [f"{name}: {record[key]}" for name, key in (("picture", "picture"), ("models", "folder")) if record[key]]
    return ", ".join(places) or "nothing was written"


def _compared(record: Record) -> str:
    known = [each for each in record["models"] if each["sqnr"] is not None]
    if not known:
        return "nothing could be compared"
    best = max(known, key=lambda each: float(each["sqnr"]))
    top1 = "" if best["top1"] is None else f", top-1 {_measure('top1', best)}"
    of = f"nearest of {len(known)}: " if len(known) > 1 else ""
    return f"{of}{elided(best['name'])}, {best['sqnr']:.2f} dB{top1} on {counted(record['samples'], 'sample')}"


def _inspected(record: Record) -> str:
    layers = record["layers"]
    count = sum(each["is_correctable"] for each in layers)
    kind = "" if record["is_quantized"] else ", once it is quantized"
    return f"{count} of {counted(len(layers), 'layer')} can be corrected{kind}"


def _comma(text: str) -> str:
    return f", {text}" if text else ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda each: "" if each[key] is None else str(each[key])


def _digits(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda each: _decibels(each[key])


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _gain(gain: Mapping[str, float | None] | None) -> str:
    if gain is None or gain["mean"] is None:
        return ""
    mean, error = gain["mean"], gain["error"] or 0.0
    scale = error or abs(mean) or 1.0
    digits = max(2, 1 - math.floor(math.log10(scale)))
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def _measure(key: str, row: Mapping[str, Any]) -> str:
    value = row.get(key)
    return "" if value is None else format(value, _FORMATS.get(key, ".3g"))


_FORMATS = {"sqnr": ".2f", "seconds": ".2f", "top1": ".2%", "metric": ".4g"}


def _bytes(size: int | None) -> str:
    if size is None:
        return ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _tensor(each: Mapping[str, Any]) -> str:
    shape = each["shape"]
    axes = "any shape" if shape is None else "(" + ", ".join("?" if axis is None else str(axis) for axis in shape) + ")"
    layout = f", {each['layout']}" if each["layout"] else ""
    limits = f", quantized from {_number(each['range'][0])} to {_number(each['range'][1])}" if each["range"] else ""
    return f"{each['dtype']} {axes}{layout}{limits}"


def _weights(each: Mapping[str, Any]) -> str:
    """The bits and the scales of weights."""
    if each["bits"] is None:
        return str(each["dtype"] or "")
    return f"{each['bits']} bits/{each['scales']}" if each["scales"] else f"{each['bits']} bits"


def _range(each: Mapping[str, Any]) -> str:
    low, high = each["weight_min"], each["weight_max"]
    return "" if low is None or high is None else f"{low:.2g}..{high:.2g}"
