"""Matching: which float layer each layer of a quantized network was, and what became of its weights.

Layers are compared by whole weights only where their names pair them, or where a signature does not separate them: the sums s
of 32 parts of the weights, with signs that are always the same. By the Cauchy-Schwarz inequality,

    |W - Wq|^2 >= sum over parts of (s - sq)^2 / (weights of the part)

so that the nearest weights are found without comparing each layer with each.

A layer is its product, not its name or operator: a MatMul may have become a Gemm, with its weights transposed or scaled.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.layer import Layer, LazyArray

_SUFFIX = re.compile(r"(_quant|(_matmul)?_Q\d+)$")
"""Suffixes that onnxruntime appends to names: of operators with quantized weights inside, and in blocks of few bits."""

_PARTS = 32
"""Parts of the weights that a signature has the sums of."""

_SIGNS = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), 4093)
"""Signs that are repeated over the weights, a prime number of them: no layout of weights makes the sums cancel."""

_ROUNDING = 1e-3
"""Part of a bound that may be rounding of the sums in it."""

_REMEDY = (
    "give the float model that was quantized: where a pre-processing step folded batch normalizations or scaled layers, the "
    "file that this step wrote"
)

_COARSE = 0.25
"""Part of the weights that rounding to few values may change: a float layer of the same name may be another one."""

_NEARER = 0.9
"""Part of the error of the float layer of the same name below which another one is nearer, and not by chance."""

_BLOCK = 1 << 16
"""Weights that are compared at once: as many as a core's cache holds."""


_SMALL = 1e-24
"""A sum of squares in single precision below which some of these may have been rounded to 0."""


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
    error : float
        Norm of the difference of the weights, as a part of the norm of the float ones.
    """

    reference: Layer
    quantized: Layer
    is_quantized: bool
    is_finite: bool
    error: float


def match_layers(reference: Sequence[Layer], quantized: Sequence[Layer]) -> dict[str, Match]:
    """The match of each quantized layer by its name; those that have none are missing.

    It has the same name; or else the name without what the quantizer appended; or else the nearest weights that quantization
    can have made these of. Only layers that share their weights can have the same match. The reference of a match has its
    weights in the form of the quantized layer.

    Raises ValueError where two layers of the same name are left over whose weights differ, or no layer has a match.
    """
    matching = _Matching(reference)
    for candidates in (matching.of_same_name, matching.of_name_before_suffix, matching.of_nearest_weights):
        matching.match(quantized, candidates)
    for layer in quantized:
        matching.check_left(layer)
    if quantized and not matching.found:
        raise ValueError(
            f"quantized: not of this float model: no layer named {quantized[0].name} in it, nor one of its weights; {_REMEDY}"
        )
    return {layer.name: matching.found[layer.name] for layer in quantized if layer.name in matching.found}


class _Matching:
    def __init__(self, reference: Sequence[Layer]) -> None:
        self._by_name = {layer.name: layer for layer in reference}
        self._owners: dict[str, Layer] = {}
        self._groups: dict[_Kind, tuple[list[Layer], NDArray[np.float64]]] = {}
        self._comparisons: dict[tuple[str, str], _Comparison] = {}
        self.found: dict[str, Match] = {}

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
                self.found[layer.name], self._owners[taken.name] = self._match(layer, taken), layer

    def _match(self, layer: Layer, match: Layer) -> Match:
        comparison = self._compared(layer, match)
        return Match(comparison.reference, layer, not comparison.is_equal, comparison.is_finite, comparison.part)

    def _compared(self, layer: Layer, other: Layer) -> _Comparison:
        key = layer.name, other.name
        if key not in self._comparisons:
            self._comparisons[key] = _Comparison(layer, other)
        return self._comparisons[key]

    def _is_free(self, layer: Layer, match: Layer) -> bool:
        owner = self._owners.get(match.name)
        return owner is None or _are_equal(owner, layer)

    def of_same_name(self, layer: Layer) -> Iterator[Layer]:
        yield from self._plausible(layer, layer.name)

    def of_name_before_suffix(self, layer: Layer) -> Iterator[Layer]:
        yield from self._plausible(layer, _SUFFIX.sub("", layer.name))

    def _plausible(self, layer: Layer, name: str) -> Iterator[Layer]:
        """The float layer of this name: exporters count names, and another network may have the same ones."""
        comparison = self._compared(layer, self._by_name[name]) if name in self._by_name else None
        if comparison is None or comparison.difference:
            return
        nearest = next(self.of_nearest_weights(layer), None) if comparison.part > _COARSE else None
        if nearest is None or self._compared(layer, nearest).error > _NEARER * comparison.error:
            yield self._by_name[name]

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
            comparison = self._compared(layer, alike[k])
            if not comparison.difference:
                heapq.heappush(compared, (comparison.error, int(k)))
            while compared and compared[0][0] <= bound * (1 + _ROUNDING):
                yield alike[heapq.heappop(compared)[1]]

    def _group(self, kind: _Kind) -> tuple[list[Layer], NDArray[np.float64]]:
        """The float layers of this kind, and their signatures."""
        if kind not in self._groups:
            alike = [each for each in self._by_name.values() if _kind(each) == kind]
            self._groups[kind] = alike, np.array([_signature(each) for each in alike])
        return self._groups[kind]

    def check_left(self, layer: Layer) -> None:
        """Raises ValueError where a layer has no match, and the float layer of its name is nobody's: weights were changed."""
        for name in (layer.name, _SUFFIX.sub("", layer.name)):
            if layer.name not in self.found and name in self._by_name and name not in self._owners:
                difference = self._compared(layer, self._by_name[name]).difference
                raise ValueError(f"quantized: not of this float model: layer {layer.name} has {difference}; {_REMEDY}")


def match_by_name(reference: Sequence[Layer], simulated: Sequence[Layer]) -> dict[str, Match]:
    """The match of each layer of a network that was quantized in simulation, where nothing but the weights changes."""
    by_name: Mapping[str, Layer] = {layer.name: layer for layer in reference}
    compared = {layer.name: (layer, _Comparison(layer, by_name[layer.name])) for layer in simulated}
    return {
        name: Match(by_name[name], layer, not comparison.is_equal, comparison.is_finite, comparison.part)
        for name, (layer, comparison) in compared.items()
    }


_Kind: TypeAlias = tuple[str, tuple[int, ...]]


def _kind(layer: Layer) -> _Kind:
    """What layers of the same product have in common: of a matrix, its sizes (inputs, outputs)."""
    if not _is_matrix(layer):
        return layer.op, layer.weights.shape
    return "product", tuple(layer.weights.shape[layer.layout.index(letter)] for letter in "IO")


def _is_matrix(layer: Layer) -> bool:
    return layer.window is None and sorted(layer.layout) == ["I", "O"]


def _in_form_of(layer: Layer, other: Layer) -> Layer:
    """A layer whose weights are laid out and scaled as those of another one of its kind."""
    weights = layer.weights
    factor = 1.0 if layer.gain == other.gain else float(np.divide(layer.gain, other.gain)) if other.gain else np.nan
    if _is_matrix(layer) and layer.layout != other.layout:
        turned = weights
        weights = LazyArray(turned.shape[::-1], turned.dtype, lambda: np.asarray(turned).T)
    if factor != 1.0:
        plain = weights
        weights = LazyArray(plain.shape, plain.dtype, lambda: np.asarray(plain) * plain.dtype.type(factor))
    return layer if weights is layer.weights else replace(layer, weights=weights, layout=other.layout, gain=other.gain)


def _are_equal(one: Layer, other: Layer) -> bool:
    return _kind(one) == _kind(other) and _Comparison(one, other).is_equal


def _signature(layer: Layer) -> NDArray[np.float64]:
    """Signed sums of equal parts of the weights, each divided by the root of how many there are, (parts,)."""
    array = np.asarray(layer.weights)
    flat = (array.T if layer.layout == "OI" and _is_matrix(layer) else array).ravel()
    parts = min(_PARTS, flat.size)
    if not parts:
        return np.zeros(0)
    starts = np.linspace(0, flat.size, parts, endpoint=False, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        sums = np.add.reduceat(flat * np.resize(_SIGNS, flat.size), starts, dtype=np.float64)
    return np.asarray(layer.gain * sums / np.sqrt(np.diff([*starts, flat.size])))


class _Comparison:
    """The weights of a quantized layer beside those of a float one.

    Parameters
    ----------
    quantized, reference : Layer
        The two.

    Attributes
    ----------
    reference : Layer
        In the form of the quantized layer.
    difference : str
        Why the weights cannot be the float ones, rounded; empty where they can.
    error, part : float
        Norm of what rounding changed, and as a part of that of the float weights.
    is_equal, is_finite : bool
        Whether the weights are the same; whether all are finite.

    Notes
    -----
    Rounding to a grid with 0 on it moves no weight further than 0 is away, so the error is smaller than the weights; and most
    weights, those that do not saturate, move by less than a step.
    """

    def __init__(self, quantized: Layer, reference: Layer) -> None:
        shape = quantized.weights.shape
        self.error, self.part, self.is_equal, self.is_finite, self.reference = np.inf, np.inf, False, True, reference
        if _kind(reference) != _kind(quantized):
            same = reference.weights.shape == shape
            self.difference = (
                f"operator {quantized.op}, expected {reference.op}"
                if same
                else f"weights of shape {shape}, expected {reference.weights.shape}"
            )
            return
        self.reference = _in_form_of(reference, quantized)
        given, expected = np.asarray(quantized.weights), np.asarray(self.reference.weights)
        step = None if quantized.weight_step is None else np.asarray(quantized.weight_step)
        square = norm = 0.0
        far, self.is_equal = 0, True
        for rows in _blocks(shape):
            found, wanted = (
                each[rows].astype(np.result_type(given, expected, np.float32), copy=False) for each in (given, expected)
            )
            with np.errstate(over="ignore", invalid="ignore"):
                error = np.abs(wanted - found)  # exact where the two are near
            self.is_equal &= np.array_equal(found, wanted)
            self.is_finite &= bool(np.isfinite(found).all() and np.isfinite(wanted).all())
            square, norm = square + _square(error), norm + _square(wanted)
            if step is not None:
                far += int(np.count_nonzero(error > np.broadcast_to(step, shape)[rows]))
        self.error = float(np.nan_to_num(np.sqrt(square), nan=np.inf))
        self.part = self.error / np.sqrt(norm) if norm > 0 else self.error
        is_far = 2 * far > given.size or np.sqrt(square) > np.sqrt(norm)
        self.difference = "other weights" if is_far else ""


def _square(values: NDArray[Any]) -> float:
    """The sum of squares, in double precision where these are too small or too large for another one."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.vdot(values, values))
        return square if _SMALL < square < np.inf else float(np.square(values, dtype=np.float64).sum())


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array along its first axis."""
    if not shape:
        yield ()
        return
    rows = max(1, _BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield (slice(start, start + rows),)
