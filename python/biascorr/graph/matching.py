"""Matching: which float layer each layer of a quantized network was, and what became of its weights.

Layers are compared by whole weights only where their names pair them, or where a signature does not separate them: the sums s
of 32 parts of the weights, with signs that are always the same. By the Cauchy-Schwarz inequality,

    |W - Wq|^2 >= sum over parts of (s - sq)^2 / (weights of the part)

so that the nearest weights are found without comparing each layer with each.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.layer import Layer

_SUFFIX = re.compile(r"(_quant|(_matmul)?_Q\d+)$")
"""Suffixes that onnxruntime appends to names: of operators with quantized weights inside, and in blocks of few bits."""

_PARTS = 32
"""Parts of the weights that a signature has the sums of."""

_SIGNS = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), 4093)
"""Signs that are repeated over the weights, a prime number of them: no layout of weights makes the sums cancel."""

_ROUNDING = 1e-3
"""Part of a bound that may be rounding of the sums in it."""

_BLOCK = 1 << 22
"""Weights that are compared at once, so that comparing takes little memory."""


@dataclass(frozen=True)
class Match:
    """A quantized layer and the float layer that it was.

    Parameters
    ----------
    reference, quantized : Layer
        The two.
    is_quantized : bool
        Whether the weights differ.
    is_finite : bool
        Whether all weights are finite.
    """

    reference: Layer
    quantized: Layer
    is_quantized: bool
    is_finite: bool


def match_layers(reference: Sequence[Layer], quantized: Sequence[Layer]) -> dict[str, Match]:
    """The match of each quantized layer by its name; those that have none are missing.

    It has the same name; or else the name without what the quantizer appended; or else the nearest weights that quantization
    can have made these of. Only layers that share their weights can have the same match.

    Raises ValueError where a layer of the same name has other weights, or no layer has a match.
    """
    matching = _Matching(reference)
    for candidates in (matching.of_same_name, matching.of_name_before_suffix, matching.of_nearest_weights):
        matching.match(quantized, candidates)
    if quantized and not matching.found:
        raise ValueError(
            f"quantized: not of this float model: no layer named {quantized[0].name} in it, nor one of its weights"
        )
    return {layer.name: matching.checked(layer) for layer in quantized if layer.name in matching.found}


class _Matching:
    def __init__(self, reference: Sequence[Layer]) -> None:
        self._by_name = {layer.name: layer for layer in reference}
        self._owners: dict[str, Layer] = {}
        self._groups: dict[tuple[str, tuple[int, ...]], tuple[list[Layer], NDArray[np.float64]]] = {}
        self.found: dict[str, Layer] = {}

    def match(self, quantized: Sequence[Layer], candidates: Callable[[Layer], Iterator[Layer]]) -> None:
        """Matches what has no match yet with the first candidate that is free, one that no layer has before one that has."""
        for layer in quantized:
            if layer.name in self.found:
                continue
            taken = None
            for each in candidates(layer):
                if each.name not in self._owners:
                    taken = each
                    break
                if taken is None and self._is_free(layer, each):
                    taken = each  # shared weights: one that no layer has is better
            if taken is not None:
                self.found[layer.name], self._owners[taken.name] = taken, layer

    def _is_free(self, layer: Layer, match: Layer) -> bool:
        owner = self._owners.get(match.name)
        return owner is None or _are_equal(owner, layer)

    def of_same_name(self, layer: Layer) -> Iterator[Layer]:
        if layer.name in self._by_name:
            yield self._by_name[layer.name]

    def of_name_before_suffix(self, layer: Layer) -> Iterator[Layer]:
        match = self._by_name.get(_SUFFIX.sub("", layer.name))
        if match is not None and _kind(match) == _kind(layer):
            yield match

    def of_nearest_weights(self, layer: Layer) -> Iterator[Layer]:
        """Nearest first."""
        alike, signatures = self._group(_kind(layer))
        if not alike:
            return
        bounds = np.nan_to_num(np.linalg.norm(signatures - _signature(layer), axis=1), nan=0.0, posinf=0.0)
        order = np.argsort(bounds, kind="stable")
        following = [*bounds[order[1:]], np.inf]
        compared: list[tuple[float, int]] = []
        for k, bound in zip(order, following):
            comparison = _Comparison(layer, alike[k])
            if not comparison.difference:
                heapq.heappush(compared, (comparison.error, int(k)))
            while compared and compared[0][0] <= bound * (1 + _ROUNDING):
                yield alike[heapq.heappop(compared)[1]]

    def _group(self, kind: tuple[str, tuple[int, ...]]) -> tuple[list[Layer], NDArray[np.float64]]:
        """The float layers of this operator and shape, and their signatures."""
        if kind not in self._groups:
            alike = [each for each in self._by_name.values() if _kind(each) == kind]
            self._groups[kind] = alike, np.array([_signature(each) for each in alike])
        return self._groups[kind]

    def checked(self, layer: Layer) -> Match:
        """Raises ValueError where no rounding can have made a layer's weights from those of its match."""
        match = self.found[layer.name]
        comparison = _Comparison(layer, match)
        if comparison.difference:
            raise ValueError(f"quantized: not of this float model: layer {layer.name} has {comparison.difference}")
        return Match(match, layer, not comparison.is_equal, comparison.is_finite)


def match_by_name(reference: Sequence[Layer], simulated: Sequence[Layer]) -> dict[str, Match]:
    """The match of each layer of a network that was quantized in simulation, where nothing but the weights changes."""
    by_name: Mapping[str, Layer] = {layer.name: layer for layer in reference}
    matching = {layer.name: (by_name[layer.name], layer) for layer in simulated}
    compared = {name: _Comparison(layer, match) for name, (match, layer) in matching.items()}
    return {
        name: Match(match, layer, not compared[name].is_equal, compared[name].is_finite)
        for name, (match, layer) in matching.items()
    }


def _kind(layer: Layer) -> tuple[str, tuple[int, ...]]:
    return layer.op, layer.weights.shape


def _are_equal(one: Layer, other: Layer) -> bool:
    return one.weights.shape == other.weights.shape and _Comparison(one, other).is_equal


def _signature(layer: Layer) -> NDArray[np.float64]:
    """Signed sums of equal parts of the weights, each divided by the root of how many there are, (parts,)."""
    flat = np.asarray(layer.weights).ravel()
    parts = min(_PARTS, flat.size)
    if not parts:
        return np.zeros(0)
    starts = np.linspace(0, flat.size, parts, endpoint=False, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        sums = np.add.reduceat(flat * np.resize(_SIGNS, flat.size), starts, dtype=np.float64)
    return np.asarray(sums / np.sqrt(np.diff([*starts, flat.size])))


class _Comparison:
    """The weights of a quantized layer beside those of a float one.

    Parameters
    ----------
    quantized, reference : Layer
        The two.

    Attributes
    ----------
    difference : str
        Why the weights cannot be the float ones, rounded; empty where they can.
    error : float
        Norm of what rounding changed.
    is_equal, is_finite : bool
        Whether the weights are the same; whether all are finite.

    Notes
    -----
    Rounding to a grid with 0 on it moves no weight further than 0 is away, so the error is smaller than the weights; and most
    weights, those that do not saturate, move by less than a step.
    """

    def __init__(self, quantized: Layer, reference: Layer) -> None:
        shape = quantized.weights.shape
        self.error, self.is_equal, self.is_finite = np.inf, False, True
        if reference.weights.shape != shape:
            self.difference = f"weights of shape {shape}, expected {reference.weights.shape}"
            return
        given, expected = np.asarray(quantized.weights), np.asarray(reference.weights)
        step = None if quantized.weight_step is None else np.asarray(quantized.weight_step)
        square = norm = 0.0
        far, self.is_equal = 0, True
        for rows in _blocks(shape):
            found, wanted = given[rows], expected[rows]
            self.is_equal &= np.array_equal(found, wanted)
            self.is_finite &= bool(np.isfinite(found).all() and np.isfinite(wanted).all())
            error = np.abs(np.subtract(wanted, found, dtype=np.float64))
            square, norm = square + float(np.vdot(error, error)), norm + float(np.square(wanted, dtype=np.float64).sum())
            if step is not None:
                far += int(np.count_nonzero(error > np.broadcast_to(step, shape)[rows]))
        self.error = float(np.nan_to_num(np.sqrt(square), nan=np.inf))
        is_far = 2 * far > given.size or np.sqrt(square) > np.sqrt(norm)
        self.difference = "other weights (was a BatchNormalization folded, or the model scaled?)" if is_far else ""


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array along its first axis."""
    if not shape:
        yield ()
        return
    rows = max(1, _BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield (slice(start, start + rows),)
