"""How the shift of a layer is found.

    mean         weight error times mean input, the inputs measured in one pass
    iterative    the same, the inputs measured behind corrected layers
    empirical    strength * (E[y float] - E[y quantized]), y behind corrected layers
    activation   strength * s,  E[f(y quantized + s)] = E[f(y float)]  for the activation f behind the layer
    analytical   weight error times what a batch normalization says of the input (analytical.py)
    hybrid       analytical where it can be had, else empirical

A pre-activation mean may be dominated by values in the flat part of the activation, which nothing behind it sees; the last
method matches the mean that is seen. s is found by the secant method from the empirical shift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.samples import SampleMeans
from biascorr.correctors import MeanBiasCorrector
from biascorr.graph.network import Layer
from biascorr.sweep.sweep import Measured

Shift = NDArray[np.float64]
Method = Callable[[Layer, Measured], Shift]
"""The shift of a quantized layer, (channels,) in real units, from what a sweep has measured of it."""

_LEAST_SLOPE = 0.02
"""Of an activation that is inverted: a channel that is flat almost everywhere is not moved far to gain little."""

_SECANT_STEPS = 2
"""More change nothing that matters (measured)."""


def mean_shift(layer: Layer, weights: NDArray[Any], input_mean: NDArray[Any]) -> Shift:
    """The shift of a quantized layer against the same layer with its float `weights`, (channels,) in real units."""
    corrector = MeanBiasCorrector(input_mean, groups=layer.groups, layout=layer.layout)
    shift = corrector.calculate(weights.astype(np.float64), layer.weights)
    return np.asarray(layer.gain * shift, dtype=np.float64)


@dataclass(frozen=True)
class Mean:
    """The weight error times the mean input, by the float weights of each layer."""

    weights: Mapping[str, NDArray[Any]]

    def __call__(self, layer: Layer, measured: Measured) -> Shift:
        assert measured.input is not None
        return mean_shift(layer, self.weights[layer.name], measured.input)


@dataclass(frozen=True)
class Empirical:
    """The difference of the mean outputs.

    Parameters
    ----------
    reference : mapping
        What was measured of each layer in the float network.
    strength : float
        The part of the difference that is made up for.
    shrunk : bool
        Whether the shift s of a channel is multiplied by s^2 / (s^2 + its variance over the samples).
    """

    reference: Mapping[str, Measured]
    strength: float = 1.0
    shrunk: bool = False

    def __call__(self, layer: Layer, measured: Measured) -> Shift:
        expected = self.reference[layer.name].output
        shift = expected.mean - measured.output.mean
        factor = _consistency(expected, measured.output) if self.shrunk else 1.0
        return np.asarray(self.strength * factor * shift)


@dataclass(frozen=True)
class Activation:
    """The shift that makes the means behind the activations equal; the empirical one where there is none."""

    reference: Mapping[str, Measured]
    strength: float = 1.0
    shrunk: bool = False

    def __call__(self, layer: Layer, measured: Measured) -> Shift:
        expected = self.reference[layer.name]
        shift = empirical = expected.output.mean - measured.output.mean
        goal, start = expected.activated, measured.activated
        if goal is not None and start is not None and goal.means.shape == start.means.shape == measured.output.means.shape:
            wanted = goal.mean - start.mean
            for _ in range(_SECANT_STEPS):
                slope = np.divide(measured.change_behind(shift), shift, out=np.ones_like(shift), where=shift != 0)
                shift = np.where(slope > 0, wanted / np.maximum(slope, _LEAST_SLOPE), empirical)
        factor = _consistency(expected.output, measured.output) if self.shrunk else 1.0
        return np.asarray(self.strength * factor * shift)


def _consistency(expected: SampleMeans, found: SampleMeans) -> NDArray[np.float64]:
    """s^2 / (s^2 + variance over samples) of the differences s of each channel: 1 where every sample says the same."""
    differences = expected.means - found.means
    square = np.square((differences * found.weights).sum(axis=0))
    variance = (np.square(differences) * found.weights).sum(axis=0) - square
    return np.asarray(np.divide(square, square + variance, out=np.ones_like(square), where=square + variance > 0))


@dataclass(frozen=True)
class Hybrid:
    """The shifts that are known, by layer name, and for all other layers those of another method."""

    known: Mapping[str, Shift]
    otherwise: Method

    def __call__(self, layer: Layer, measured: Measured) -> Shift:
        shift = self.known.get(layer.name)
        return self.otherwise(layer, measured) if shift is None else shift
