"""Which layer of the float network each layer of a quantized one was, and whether it can have been that."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.network import Layer

_SUFFIX = re.compile(r"(_quant|(_matmul)?_Q\d+)$")
"""What onnxruntime appends to names: of operators with quantized weights inside, and of those in blocks of few bits."""


def counterparts(reference: Sequence[Layer], quantized: Sequence[Layer]) -> dict[str, Layer]:
    """The float layer of each quantized one, by the name of the latter; those that have none are missing.

    It has the same name; or else the name without what the quantizer appended; or else the nearest weights that quantization
    can have made these of. Only layers that share their weights can have the same counterpart.

    Raises ValueError where a layer of the same name has other weights, or no layer has a counterpart.
    """
    by_name = {layer.name: layer for layer in reference}
    found: dict[str, Layer] = {}
    owners: dict[str, Layer] = {}
    for candidates in (_of_same_name, _of_name_before_suffix, _of_nearest_weights):
        for layer in quantized:
            if layer.name not in found:
                free = (each for each in candidates(layer, by_name) if _is_free(layer, owners.get(each.name)))
                for match in sorted(free, key=lambda each: each.name in owners)[:1]:
                    found[layer.name], owners[match.name] = match, layer
    for layer in quantized:
        if layer.name in found:
            _check_weights(layer, found[layer.name].weights)
    if quantized and not found:
        raise ValueError(
            f"quantized: not of this float model: no layer named {quantized[0].name} in it, nor one of its weights"
        )
    return found


def _of_same_name(layer: Layer, by_name: Mapping[str, Layer]) -> list[Layer]:
    return [by_name[layer.name]] if layer.name in by_name else []


def _of_name_before_suffix(layer: Layer, by_name: Mapping[str, Layer]) -> list[Layer]:
    match = by_name.get(_SUFFIX.sub("", layer.name))
    return [match] if match is not None and _is_alike(layer, match) else []


def _of_nearest_weights(layer: Layer, by_name: Mapping[str, Layer]) -> list[Layer]:
    """Nearest first."""
    alike = [each for each in by_name.values() if _is_alike(layer, each) and not _difference(layer, each.weights)]
    return sorted(alike, key=lambda each: float(np.linalg.norm(_error(layer, each.weights))))


def _is_alike(layer: Layer, each: Layer) -> bool:
    return (each.op, each.weights.shape) == (layer.op, layer.weights.shape)


def _is_free(layer: Layer, owner: Layer | None) -> bool:
    return owner is None or np.array_equal(owner.weights, layer.weights)


def _check_weights(layer: Layer, weights: NDArray[Any]) -> None:
    """Raises ValueError where no rounding can have made a layer's weights from these."""
    difference = _difference(layer, weights)
    if difference:
        raise ValueError(f"quantized: not of this float model: layer {layer.name} has {difference}")


def _difference(layer: Layer, weights: NDArray[Any]) -> str:
    """What keeps a layer's weights from being these, rounded; empty where nothing does.

    Rounding to a grid with 0 on it moves no weight further than 0 is away, so the error is smaller than the weights; and most
    weights, those that do not saturate, move by less than a step.
    """
    if weights.shape != layer.weights.shape:
        return f"weights of shape {layer.weights.shape}, expected {weights.shape}"
    error = _error(layer, weights)
    far = layer.weight_step is not None and 2 * np.count_nonzero(error > layer.weight_step) > error.size
    if far or np.linalg.norm(error) > np.linalg.norm(weights.astype(np.float64)):
        return "other weights (was a BatchNormalization folded, or the model scaled?)"
    return ""


def _error(layer: Layer, weights: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.abs(np.subtract(weights, layer.weights, dtype=np.float64)))
