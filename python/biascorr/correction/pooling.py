"""The one shift of a layer that a network calls several times: the mean of the shifts of its calls.

    shift = sum over calls of positions * shift of the call / sum over calls of positions

positions are those of a call's output that its shift is measured on. So the mean error over all positions of all calls is what
the shift cancels, and weight error times mean input is that of what all calls read together. Shifts that are not measured,
analytical ones, weigh the same.
"""

from __future__ import annotations

import numpy as np

from biascorr.graph.layer import Layer
from biascorr.graph.network import Shift


class PooledShifts:
    """The shifts of layers, each pooled over the calls that were added so far."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[Shift, float]]] = {}

    def add(self, call: Layer, shift: Shift, positions: float = 1.0) -> None:
        """Adds the shift of a call of a layer, measured on so many positions."""
        self._calls.setdefault(call.first_call, []).append((shift, positions))

    def by_layer(self) -> dict[str, Shift]:
        """The shift of each layer, by the name of its first call."""
        return {name: _mean(calls) for name, calls in self._calls.items()}

    def of(self, call: Layer) -> Shift | None:
        """The shift of the layer that is called; None where no call of it was added."""
        calls = self._calls.get(call.first_call)
        return None if calls is None else _mean(calls)


def _mean(calls: list[tuple[Shift, float]]) -> Shift:
    shifts, positions = zip(*calls)
    shares = np.array(positions) / sum(positions)
    return np.asarray((shares[:, None] * np.stack(shifts)).sum(axis=0))
