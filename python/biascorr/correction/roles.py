"""The two models that are given: which is float, which is quantized, and whether one was made of the other."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from biascorr.equalization.folding import fold_batch_norms
from biascorr.graph.matching import Match, match_layers
from biascorr.graph.network import (
    BiasNetwork,
    EditableNetwork,
    Network,
    is_editable,
    is_renamable,
    keeps_batch_norms,
    require_float,
)
from biascorr.graph.operations import BatchNorm, Kind
from biascorr.graph.reasons import ReasonCode

_EQUAL = 1e-5
"""Part of the weights that folding them in another order of operations changes."""

_QUANTIZE_STATICALLY = "quantize it statically (onnxruntime: quantize_static), so that there are biases to correct"


@dataclass(frozen=True, eq=False)
class Pair:
    """A float network and the quantized layers that were made of its layers.

    Parameters
    ----------
    reference : Network
        Float; with its batch normalizations folded where the quantized one has none.
    matches : mapping from str to Match
        By the names of the quantized layers.
    notes : tuple of str
        What had to be done.
    """

    reference: Network
    matches: Mapping[str, Match]
    notes: tuple[str, ...] = ()


def check_method(method: str, reference: Network) -> None:
    """Raises ValueError where a method needs what models of this kind do not have."""
    if method in ("analytical", "hybrid") and not keeps_batch_norms(reference):
        raise ValueError(
            f"method: {method!r} needs the statistics of batch normalizations, which became part of layers when this model was "
            "converted; expected another method, which needs samples, but no labels"
        )


def with_inputs_of(reference: Network, quantized: BiasNetwork) -> BiasNetwork:
    """The quantized network, its inputs called as the float ones in their order, where a converter has renamed them all."""
    expected, found = ({each.name: each.dtype for each in network.inputs} for network in (reference, quantized))
    is_renamed = not expected.keys() & found.keys() and list(expected.values()) == list(found.values())
    return quantized.with_input_names(list(expected)) if is_renamed and is_renamable(quantized) else quantized


def check_roles(reference: Network, quantized: Network | None) -> None:
    """Raises ValueError where a model is given in place of another one."""
    if quantized is None:
        require_float(reference, "reference", "give the float model, and this one as `quantized` (--quantized)")
        return
    has_quantized = any(layer.weight_step is not None for layer in quantized.layers)
    codes = {reason.code for report in quantized.unsupported for reason in report.reasons}
    if not has_quantized and ReasonCode.DYNAMIC not in codes:
        require_float(reference, "reference", "and no layer of the other model has: exchange the two models")
    require_float(reference, "reference", "give the float model that was quantized")


def check_is_static(quantized: Network) -> None:
    """Raises ValueError where all layers are quantized when they run, so that there are no biases to correct."""
    codes = {reason.code for report in quantized.unsupported for reason in report.reasons}
    if not quantized.layers and codes == {ReasonCode.DYNAMIC}:
        operators = ", ".join(sorted({report.op for report in quantized.unsupported}))
        raise ValueError(f"quantized: it is quantized when it runs ({operators}); {_QUANTIZE_STATICALLY}")


def paired(reference: Network, quantized: Network) -> Pair:
    """Matches the layers of two networks; of the float one with its batch normalizations folded where that matches more.

    Raises ValueError where the quantized network is not of this float one, or the same.
    """
    try:
        found, error = match_layers(reference.layers, quantized.layers), None
    except ValueError as not_matched:
        found, error = {}, not_matched
    pair = Pair(reference, found)
    norms = _norms(reference)
    if len(found) < len(quantized.layers) or (norms and norms > _norms(quantized)):
        folded = _folded(reference, quantized)
        pair, error = (folded, None) if _fit(folded) > _fit(pair) else (pair, error)
    if error is not None:
        raise error
    quantizes = any(operation.kind is Kind.QUANTIZE for operation in quantized.operations)
    has_steps = any(layer.weight_step is not None for layer in quantized.layers)
    is_rounded = any(match.error > _EQUAL for match in pair.matches.values())
    if quantized.layers and not (quantized.unsupported or quantizes or has_steps or is_rounded):
        raise ValueError("quantized: its weights are those of the float model, and nothing in it is quantized")
    return pair


def _fit(pair: Pair) -> tuple[int, float]:
    """How well layers fit, the more the better: how many there are, and how little of their weights was rounded away."""
    return len(pair.matches), -sum(match.error for match in pair.matches.values())


def _norms(network: Network) -> int:
    return sum(isinstance(role, BatchNorm) for role in network.facts().roles.values())


def _folded(reference: Network, quantized: Network) -> Pair:
    """With the batch normalizations folded into the layers before them, or all of them: whichever fits best, if any."""
    best = Pair(reference, {})
    if not is_editable(reference):
        return best
    network = cast(EditableNetwork, reference)
    _, folds, _ = fold_batch_norms(network)
    before = [(fold.layer, fold.batch_norm) for fold in folds if fold.is_after]
    every = [(fold.layer, fold.batch_norm) for fold in folds]
    for wanted in [before, every] if before != every else [every]:
        folded, done, _ = fold_batch_norms(network, wanted)
        note = f"{len(done)} batch normalizations were folded into layers, as in the quantized model"
        with contextlib.suppress(ValueError):
            pair = Pair(folded, match_layers(folded.layers, quantized.layers) if done else {}, (note,))
            best = pair if pair.matches and _fit(pair) > _fit(best) else best
    return best
