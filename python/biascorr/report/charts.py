"""Charts as inline SVG: text that names classes of a style sheet, and no colors of its own.

All that is written into them is escaped. Each has a title and a description, for those who do not see it.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from biascorr.report.lines import elided, printable
from biascorr.report.numbers import decibels, number, round_number

Pair = tuple[float | None, float | None]
"""A number before and after; None where it is not known."""

_WIDTH, _HEIGHT = 760, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 14, 40
_PER_LAYER = 4.0
"""Pixels of a layer at least, so that thousands of them are a chart that scrolls."""

_WIDEST = 8000
_MOST_STEPS = 7
"""Steps from tick to tick along an axis."""

_DOTS = 160
"""More layers than this are lines without dots."""

_MOST_SAMPLES = 120


@dataclass(frozen=True)
class Axis:
    """Where the values of an axis are.

    Parameters
    ----------
    low, high : float
        Its ends, as logarithms where it is logarithmic.
    start, end : float
        The pixels of these.
    is_log : bool
        Whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, within its ends."""
        place: float = (math.log10(value) if value > 0 else self.low) if self.is_log else value
        share = (min(max(place, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """A few round values."""
        if self.is_log:
            every = max(1, math.ceil((self.high - self.low) / _MOST_STEPS))
            return [10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1, every)]
        step = _round_step((self.high - self.low) / _MOST_STEPS)
        first = math.ceil(self.low / step - 1e-9)
        return [place * step for place in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def linear(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis with room for these values, that starts and ends at round ones."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - 1.0, high + 1.0
    step = _round_step((high - low) / (_MOST_STEPS - 2))  # the ends are rounded by two of them at most
    return Axis(math.floor(low / step) * step, math.ceil(high / step) * step, start, end)


def logarithmic(values: Sequence[float], start: float, end: float, decades: int = 5) -> Axis:
    """An axis of whole decades with room for the largest of these values, and for those so many decades below at most."""
    logs = [math.log10(value) for value in values if value > 0] or [0.0]
    high = math.ceil(max(logs))
    low = max(math.floor(min(logs)), high - decades)
    return Axis(low, high if high > low else low + 1, start, end, True)


class Chart:
    """The pieces of an SVG.

    Parameters
    ----------
    name : str
        Its name in the page, a word.
    title, description : str
        What it is, and what it shows, in words.
    width, height : float
        Its pixels, which the page scales.
    """

    def __init__(self, name: str, title: str, description: str, width: float = _WIDTH, height: float = _HEIGHT) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_px(width)} {_px(height)}" '
            f'width="{_px(width)}" height="{_px(height)}" aria-labelledby="{name}-title {name}-text">',
            f'<title id="{name}-title">{_text(title)}</title><desc id="{name}-text">{_text(description)}</desc>',
        ]
        self.width, self.height = width, height

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self._parts.append(f'<line class="{kind}" x1="{_px(x1)}" y1="{_px(y1)}" x2="{_px(x2)}" y2="{_px(y2)}"/>')

    def path(self, points: Sequence[tuple[float, float] | None], kind: str) -> None:
        """Lines from point to point, with a gap at each None."""
        runs = [list(run) for is_known, run in itertools.groupby(points, lambda point: point is not None) if is_known]
        steps = ("M" + "L".join(f"{_px(x)} {_px(y)}" for x, y in run if run) for run in _known(runs))
        self._parts.append(f'<path class="{kind}" d="{"".join(steps)}"/>')

    def dot(self, x: float, y: float, radius: float, kind: str) -> None:
        """A circle."""
        self._parts.append(f'<circle class="{kind}" cx="{_px(x)}" cy="{_px(y)}" r="{_px(radius)}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A rectangle."""
        size = f'width="{_px(max(width, 0.0))}" height="{_px(max(height, 0.0))}"'
        self._parts.append(f'<rect class="{kind}" x="{_px(x)}" y="{_px(y)}" {size}/>')

    def write(self, x: float, y: float, text: str, kind: str = "tick", anchor: str = "start") -> None:
        """Text on a base line."""
        self._parts.append(f'<text class="{kind}" x="{_px(x)}" y="{_px(y)}" text-anchor="{anchor}">{_text(text)}</text>')

    def open(self, title: str, kind: str = "mark") -> None:
        """Starts a group with a title that shows where the pointer is over it."""
        self._parts.append(f'<g class="{kind}"><title>{_text(title)}</title>')

    def close(self) -> None:
        """Ends a group."""
        self._parts.append("</g>")

    def horizontal(self, axis: Axis, label: str) -> None:
        """The lines of a vertical axis and what it is of."""
        for value in axis.ticks():
            self.line(_LEFT, axis(value), self.width - _RIGHT, axis(value), "grid")
            self.write(_LEFT - 7, axis(value) + 4, round_number(value), anchor="end")
        self._parts.append(
            f'<text class="label" transform="translate(13 {_px((axis.start + axis.end) / 2)}) rotate(-90)" '
            f'text-anchor="middle">{_text(label)}</text>'
        )

    def numbers(self, axis: Axis, count: int, label: str) -> None:
        """The numbers of things along a horizontal axis."""
        foot = self.height - _BOTTOM
        every = max(1, math.ceil(_round_step(count / max(1, (self.width - _LEFT) / 75))))
        for k in range(count):
            if k == 0 or (k + 1) % every == 0:
                self.write(axis(k), foot + 16, str(k + 1), anchor="middle")
        self.write(_LEFT, foot + 33, label, "label")

    def __str__(self) -> str:
        return "".join([*self._parts, "</svg>"])


def _known(runs: Sequence[Sequence[tuple[float, float] | None]]) -> Iterator[list[tuple[float, float]]]:
    yield from ([point for point in run if point is not None] for run in runs)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(text: str) -> str:
    return html.escape(printable(text))


def samples_chart(pairs: Sequence[tuple[float, float]], name: str = "samples") -> str:
    """SQNR of each scored sample before and after, from the worst one before to the best."""
    ordered = sorted(pairs)
    if len(ordered) > _MOST_SAMPLES:
        ordered = [ordered[round(k * (len(ordered) - 1) / (_MOST_SAMPLES - 1))] for k in range(_MOST_SAMPLES)]
    better = sum(after > before for before, after in pairs)
    title = "SQNR of each scored sample, before and after"
    chart = Chart(name, title, f"{better} of {len(pairs)} samples are nearer to the float model after it.", height=240)
    y = linear([value for pair in ordered for value in pair], chart.height - _BOTTOM, _TOP)
    x = Axis(-0.5, len(ordered) - 0.5, _LEFT, chart.width - _RIGHT)
    chart.horizontal(y, "SQNR, dB")
    radius = 4.5 if len(ordered) <= 40 else 2.5
    for k, (before, after) in enumerate(ordered):
        chart.open(f"{decibels(before)} → {decibels(after)} dB")
        chart.line(x(k), y(before), x(k), y(after), "change")
        chart.dot(x(k), y(before), radius, "before")
        chart.dot(x(k), y(after), radius, "after")
        chart.close()
    shown = "" if len(ordered) == len(pairs) else f"{len(ordered)} of "
    chart.write(_LEFT, chart.height - 7, f"{shown}{len(pairs)} samples, sorted by their SQNR before", "label")
    return str(chart)


def _layers(chart: Chart, names: Sequence[str]) -> tuple[Axis, float]:
    """The axis of layers and how wide each is."""
    x = Axis(-0.5, len(names) - 0.5, _LEFT, chart.width - _RIGHT)
    chart.numbers(x, len(names), "layer, in the order in which they run: numbers as in the table below")
    return x, (x.end - x.start) / max(len(names), 1)


def _width_of(layers: int) -> float:
    return min(max(_WIDTH, _LEFT + _RIGHT + _PER_LAYER * layers), _WIDEST)


def layers_chart(names: Sequence[str], pairs: Sequence[Pair], name: str = "network") -> str:
    """SQNR of the output of each layer before and after, along the network."""
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    better = sum(after > before for before, after in known)
    description = f"{better} of {len(known)} layers that were compared are nearer to the float ones after it."
    chart = Chart(name, "SQNR of each layer, before and after", description, _width_of(len(names)))
    y = linear([value for pair in pairs for value in pair if value is not None], chart.height - _BOTTOM, _TOP)
    chart.horizontal(y, "SQNR, dB")
    x, width = _layers(chart, names)
    for which, kind in enumerate(("before", "after")):
        found = [pair[which] for pair in pairs]
        chart.path([None if value is None else (x(k), y(value)) for k, value in enumerate(found)], f"series {kind}")
    for k, (layer, pair) in enumerate(zip(names, pairs)):
        chart.open(f"{k + 1}: {elided(layer)}: {decibels(pair[0])} → {decibels(pair[1])} dB")
        chart.box(x(k) - width / 2, _TOP, width, y.start - _TOP, "hit")
        for value, kind in zip(pair, ("before", "after")):
            if value is not None and len(names) <= _DOTS:
                chart.dot(x(k), y(value), 3.5, kind)
        chart.close()
    return str(chart)


def shifts_chart(names: Sequence[str], pairs: Sequence[Pair], name: str = "shifts") -> str:
    """Mean shift of each layer, and what is left of it after rounding, on a logarithmic axis."""
    found = sum(bool(before) for before, _ in pairs)
    description = f"{found} of {len(pairs)} layers have a shift; what is left of it is what the format of their biases rounds."
    chart = Chart(name, "Mean magnitude of the shifts of each layer", description, _width_of(len(names)))
    y = logarithmic([value for pair in pairs for value in pair if value], chart.height - _BOTTOM, _TOP)
    chart.horizontal(y, "mean |shift|, real units")
    x, width = _layers(chart, names)
    radius = 3.5 if len(names) <= _DOTS else 1.5
    for k, (layer, (before, after)) in enumerate(zip(names, pairs)):
        chart.open(f"{k + 1}: {elided(layer)}: {number(before)}, {number(after)} left")
        chart.box(x(k) - width / 2, _TOP, width, y.start - _TOP, "hit")
        if before:
            chart.line(x(k), y(before), x(k), y(after or 0.0), "change")
            chart.dot(x(k), y(before), radius, "before")
            if after is not None:
                chart.dot(x(k), y(after), radius, "after")
        chart.close()
    return str(chart)


def gain_chart(mean: float, error: float, ends: tuple[float, float], is_taken: bool, label: str, name: str) -> str:
    """A gain with its standard error, on the axis that all gains of a table share; its left end, or a line in it, is 0."""
    chart = Chart(name, label, "The dot is the mean, the line one standard error to both sides.", 240, 26)
    x = Axis(min(*ends, 0.0), max(*ends, 0.0), 8, 232)
    kind = "after" if is_taken else "other"
    chart.line(x(0), 2, x(0), 24, "zero")
    chart.line(x(0), 13, x(mean), 13, f"stem {kind}")
    chart.line(x(mean - error), 13, x(mean + error), 13, f"interval {kind}")
    for end in (x(mean - error), x(mean + error)):
        chart.line(end, 8, end, 18, f"end {kind}")
    chart.dot(x(mean), 13, 5, kind)
    return str(chart)


def ranges_chart(names: Sequence[str], ranges: Sequence[tuple[Sequence[float], Sequence[float]]], name: str = "ranges") -> str:
    """From the smallest to the largest range of the channels of each layer, before and after, on a logarithmic axis."""
    closer = sum(_ratio(after) < _ratio(before) for before, after in ranges)
    description = f"In {closer} of {len(ranges)} layers, the ranges of channels are closer together after it."
    width = min(max(_WIDTH, _LEFT + _RIGHT + 3 * _PER_LAYER * len(names)), _WIDEST)
    chart = Chart(name, "Ranges of the weights of each layer's output channels, before and after", description, width)
    y = logarithmic([value for pair in ranges for part in pair for value in part], chart.height - _BOTTOM, _TOP)
    chart.horizontal(y, "max |weight| of a channel")
    x = Axis(-0.5, len(names) - 0.5, _LEFT, chart.width - _RIGHT)
    chart.numbers(x, len(names), "scaled layer, numbers as in the table of scaled layers")
    step = (x.end - x.start) / max(len(names), 1)
    bar = min(9.0, step * 0.3)
    for k, (layer, pair) in enumerate(zip(names, ranges)):
        texts = [f"{number(min(part, default=None))} to {number(max(part, default=None))}" for part in pair]
        chart.open(f"{k + 1}: {elided(layer)}: {texts[0]} before, {texts[1]} after")
        chart.box(x(k) - step / 2, _TOP, step, y.start - _TOP, "hit")
        for part, kind, side in zip(pair, ("before", "after"), (-1, 1)):
            ordered = sorted(value for value in part if value > 0)
            if ordered:
                least, low, middle, high, most = (y(ordered[round(q * (len(ordered) - 1))]) for q in (0, 0.1, 0.5, 0.9, 1))
                place = x(k) + side * bar * 0.6
                chart.line(place, least, place, most, f"whisker {kind}")
                chart.box(place - bar / 2, high, bar, max(2.0, low - high), f"bar {kind}")
                chart.line(place - bar / 2, middle, place + bar / 2, middle, "median")
        chart.close()
    return str(chart)


def channels_chart(before: Sequence[float], after: Sequence[float], label: str, name: str) -> str:
    """The ranges of the channels of one layer, from the widest to the narrowest one before, on a logarithmic axis."""
    chart = Chart(name, label, "Each point is an output channel, from the widest to the narrowest one before.", 240, 96)
    order = sorted(range(len(before)), key=lambda k: -before[k])
    y = logarithmic([*before, *after], 84, 8, decades=3)
    x = Axis(0, max(1, len(order) - 1), 42, 234)
    for value in (10.0**y.low, 10.0**y.high):
        chart.line(42, y(value), 234, y(value), "grid")
        chart.write(37, y(value) + 4, round_number(value), anchor="end")
    for part, kind in ((before, "before"), (after, "after")):
        points = [(x(place), y(part[k])) for place, k in enumerate(order)]
        chart.path(points, f"series {kind}")
        if len(points) == 1:
            chart.dot(*points[0], 3, kind)
    return str(chart)


def _ratio(part: Sequence[float]) -> float:
    known = [value for value in part if value > 0]
    return max(known) / min(known) if known else 1.0
