"""How the shift of a layer is found from what a sweep measures.

    mean         weight error times mean input, the inputs measured in one pass
    iterative    the same, the inputs measured after corrected layers
    empirical    strength * (E[y float] - E[y quantized]), y after corrected layers
    activation   strength * s,  E[f(y quantized + s)] = E[f(y float)]  for the activation f after the layer
    squared      s that makes E[(f(y quantized + s) - f(y float))^2] least, y after corrected layers
    analytical   weight error times the mean input that a batch normalization gives (analytical.py)
    hybrid       analytical where it can be had, else empirical

A pre-activation mean may be dominated by values in the flat part of the activation, which nothing after it sees; the last
method matches the mean that is seen. s is found by the secant method from the empirical shift.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import _kernels
from biascorr.calibration.samples import SampleMeans
from biascorr.graph.layer import Constant, Layer
from biascorr.graph.network import Shift
from biascorr.sweep.measurements import Measured, Wanted

_LEAST_SLOPE = 0.02
"""The least slope of an activation that is inverted: a channel that is flat almost everywhere is not moved far."""

_SECANT_STEPS = 2
"""More change nothing that matters (measured)."""


class Method(abc.ABC):
    """Finds the shifts of the layers of a stage: first ones, which may be refined by their effect, and what is left of them."""

    wanted = Wanted()
    """The measurements that it needs."""

    refinements = 0
    """How often shifts are refined."""

    steps = 0
    """How often they are refined with the float network beside."""

    @abc.abstractmethod
    def shift(self, layer: Layer, measured: Measured) -> Shift:
        """The first shift of a quantized layer, (channels,) in real units; nan where it is not known."""

    def refined(self, layer: Layer, measured: Measured, shift: Shift, after: SampleMeans) -> Shift:  # noqa: ARG002
        """A better shift, from the means after the activation of the layer with this one."""
        return shift

    def final(self, layer: Layer, measured: Measured, shift: Shift) -> Shift:  # noqa: ARG002
        """The part of a shift that is corrected."""
        return shift


def mean_shift(layer: Layer, weights: Constant, input_mean: NDArray[Any]) -> Shift:
    """The shift of a quantized layer against the same layer with its float `weights`, (channels,) in real units."""
    given, quantized, mean = np.asarray(weights), np.asarray(layer.weights), np.asarray(input_mean, dtype=np.float64)
    return np.asarray(layer.gain * _kernels.weight_error(given, quantized, mean, layer.groups, layer.layout, True))


class Mean(Method):
    """The weight error times the mean input, by the float weights of each layer."""

    wanted = Wanted(outputs=False, inputs=True)

    def __init__(self, weights: Mapping[str, Constant]) -> None:
        self._weights = weights

    def shift(self, layer: Layer, measured: Measured) -> Shift:
        if measured.input is None:
            return np.full(layer.channels, np.nan)
        return mean_shift(layer, self._weights[layer.name], measured.input)


class Empirical(Method):
    """The difference of the mean outputs.

    Parameters
    ----------
    reference : mapping
        Measurements of each layer in the float network.
    strength : float
        The part of the difference that is corrected.
    shrunk : bool
        Whether the shift s of a channel is multiplied by s^2 / (s^2 + its variance over the samples).
    """

    def __init__(self, reference: Mapping[str, Measured], strength: float = 1.0, shrunk: bool = False) -> None:
        self._reference = reference
        self._strength = strength
        self._shrunk = shrunk

    def shift(self, layer: Layer, measured: Measured) -> Shift:
        return np.asarray(self._reference[layer.name].output.mean - measured.output.mean)

    def final(self, layer: Layer, measured: Measured, shift: Shift) -> Shift:
        factor = _consistency(self._reference[layer.name].output, measured.output) if self._shrunk else 1.0
        return np.asarray(self._strength * factor * shift)


class Activation(Empirical):
    """The shift that makes the means after the activations equal; the empirical one where there is none.

    Parameters
    ----------
    reference, strength, shrunk
        As for :class:`Empirical`.
    activated : mapping from str to str
        The tensors after the activations of layers of the quantized network, by layer name.
    """

    refinements = _SECANT_STEPS

    def __init__(
        self, reference: Mapping[str, Measured], strength: float = 1.0, shrunk: bool = False, *, activated: Mapping[str, str]
    ) -> None:
        super().__init__(reference, strength, shrunk)
        self.wanted = Wanted(activated=activated)

    def refined(self, layer: Layer, measured: Measured, shift: Shift, after: SampleMeans) -> Shift:
        goal, start = self._reference[layer.name].activated, measured.activated
        if goal is None or start is None or not goal.means.shape == start.means.shape == measured.output.means.shape:
            return shift
        wanted, change = goal.mean - start.mean, after.mean - start.mean
        slope = np.divide(change, shift, out=np.ones_like(shift), where=shift != 0)
        return np.where(slope > 0, wanted / np.maximum(slope, _LEAST_SLOPE), self.shift(layer, measured))


class Squared(Empirical):
    """The shift that makes the squared error after the activation least, value by value; the empirical one without one."""

    steps = 3
    """Steps of Gauss and Newton; more change nothing that matters (measured)."""


def _consistency(expected: SampleMeans, found: SampleMeans) -> NDArray[np.float64]:
    """s^2 / (s^2 + variance over samples) of the differences s of each channel: 1 where every sample says the same."""
    differences = expected.means - found.means
    square = np.square((differences * found.weights).sum(axis=0))
    variance = (np.square(differences) * found.weights).sum(axis=0) - square
    return np.asarray(np.divide(square, square + variance, out=np.ones_like(square), where=square + variance > 0))
