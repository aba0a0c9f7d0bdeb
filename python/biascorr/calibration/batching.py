"""Where the samples of a batch are: along which axis of each input, and whether batches can be cut into their samples.

A model says so by the names of its open axes; without these, the first axis is taken for that of samples until a run shows
another one (sweep/independence.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from biascorr.graph.network import Feeds, ModelInput

Axes: TypeAlias = Mapping[str, int | None]
"""The axis of samples of each input, by name; None for one that all samples share."""

_NAMES = (r".*batch.*", r"b|bs", r"n")
"""Patterns of the names that exporters and people give the axis of samples, the surest ones first."""


@dataclass(frozen=True, eq=False)
class Batching:
    """How batches are taken apart.

    Parameters
    ----------
    axes : mapping from str to int or None
        See :data:`Axes`; nothing where a batch is one sample.
    can_be_cut : bool
        Whether the network takes a part of a batch.
    is_along_first_axis : bool
        Whether each tensor that is measured, and each output, has its samples along the first axis, in as many equal parts.
    """

    axes: Axes
    can_be_cut: bool = True
    is_along_first_axis: bool = True

    def size(self, feeds: Feeds) -> int:
        """Samples of a batch; 1 where its inputs do not agree in that."""
        sizes = {feeds[name].shape[axis] for name, axis in self.axes.items() if axis is not None and axis < feeds[name].ndim}
        return sizes.pop() if len(sizes) == 1 else 1

    def rows(self, feeds: Feeds, rows: Any) -> Feeds:
        """The inputs of some samples of a batch, by a slice, a mask or numbers."""
        return {name: _rows(array, self.axes.get(name), rows) for name, array in feeds.items()}


Batchings: TypeAlias = Callable[[Feeds], Batching]
"""Gives the batching of a network whose batches are like this one."""


def _rows(array: Any, axis: int | None, rows: Any) -> Any:
    if axis is None or array.ndim <= axis:
        return array
    return array[rows] if axis == 0 else np.ascontiguousarray(array[(np.s_[:],) * axis + (rows,)])


def named_axes(inputs: Sequence[ModelInput]) -> Axes | None:
    """The axes of samples by their names in the model; None where no name is that of samples."""
    symbols = list(dict.fromkeys(symbol for each in inputs for symbol in _before_others(each)))
    known = (symbol for pattern in _NAMES for symbol in symbols if re.fullmatch(pattern, symbol, re.IGNORECASE))
    found = next(known, None)
    if found is None:
        return None
    return {each.name: each.symbols.index(found) if found in each.symbols else _open_first_axis(each) for each in inputs}


def _before_others(model_input: ModelInput) -> Iterator[str]:
    """The names of its axes up to one of size 1, which is that of samples where there is one: N points may follow."""
    for symbol, size in zip(model_input.symbols, model_input.shape or ()):
        if size == 1:
            return
        if symbol:
            yield symbol


def _open_first_axis(model_input: ModelInput) -> int | None:
    """The first axis of an input that has the axis of samples under no known name: where it is open."""
    return 0 if model_input.shape is None or model_input.shape[:1] == (None,) else None


def assumed_axes(inputs: Sequence[ModelInput]) -> Axes:
    """The axes of samples as far as is known without a run: by name, or else the first."""
    return named_axes(inputs) or {each.name: None if each.shape == () else 0 for each in inputs}


def candidate_axes(inputs: Sequence[ModelInput]) -> Iterator[Axes]:
    """Axes that may be those of samples, the likeliest ones first: others than by name only where no name says."""
    yield assumed_axes(inputs)
    if named_axes(inputs) is None:
        ranks = [len(each.shape) for each in inputs if each.shape]
        for axis in range(1, min(ranks, default=0)):
            if all(each.shape[axis] is None for each in inputs if each.shape):
                yield {each.name: axis if each.shape else None for each in inputs}


def assumed(inputs: Sequence[ModelInput], axes: Axes | None = None) -> Batching:
    """How batches are taken apart as far as is known without a run, with the axes of samples if they are known."""
    axes = assumed_axes(inputs) if axes is None else axes
    return Batching(axes, can_be_cut=all(_is_open(each, axes[each.name]) for each in inputs))


def _is_open(model_input: ModelInput, axis: int | None) -> bool:
    return axis is None or model_input.shape is None or model_input.shape[axis] is None


def fixed_size(inputs: Sequence[ModelInput], axes: Axes) -> int:
    """Samples of a batch, 0 where the model leaves that open."""
    located = ((each.shape, axes[each.name]) for each in inputs if each.shape)
    return max((shape[axis] or 0 for shape, axis in located if axis is not None), default=0)
