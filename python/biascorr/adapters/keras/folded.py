"""The statistics of batch normalizations that became part of the layers of a Keras model.

A model has no place for them that is saved with it: they are known as long as the model is there, and kept in the .keras files
that this package writes.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from biascorr.adapters.keras.linear import array_of
from biascorr.adapters.keras.steps import Steps
from biascorr.graph.folded import statistics_from_text, text_from_statistics
from biascorr.graph.operations import BatchNorm

_KNOWN: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def keep_text(model: Any, text: str) -> None:
    """Keeps the text of statistics with a model."""
    _KNOWN[model] = text


def text_of(model: Any) -> str:
    """The text that is kept with a model."""
    return _KNOWN.get(model, "{}")


def folded_of(model: Any, steps: Steps) -> dict[str, BatchNorm]:
    """Statistics of tensors that a model makes as it did when they were kept, by name.

    Raises ValueError where the text is broken.
    """
    return statistics_from_text(text_of(model), steps.shapes.__contains__, functools.partial(_digest, steps))


def keep_folded(model: Any, steps: Steps, folded: Mapping[str, BatchNorm]) -> None:
    """Keeps statistics of tensors, as a model makes them now."""
    keep_text(model, text_from_statistics(folded, functools.partial(_digest, steps)))


def _digest(steps: Steps, tensor: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    makers = {name: step for step in steps.steps for name in step.outputs}
    waiting, seen = [tensor], set[str]()
    while waiting:
        step = makers.get(waiting.pop())
        if step is None or step.name in seen:
            continue
        seen.add(step.name)
        if step.linear is not None:
            constants = [np.asarray(step.linear.weights), step.linear.bias]
        else:
            constants = [array_of(each) for each in getattr(step.operation, "weights", ()) if step.compute]
            waiting += step.inputs
        for values in constants:
            digest.update(b"none" if values is None else f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()
