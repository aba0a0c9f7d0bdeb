"""The statistics of tensors, as text that is kept with a model; see :class:`biascorr.graph.operations.Facts`.

    {"<tensor>": ["<name of the normalization>", "<beta>", "<gamma>", "<digest>", <channel axis>], ...}

in JSON, beta and gamma as float32, little-endian, in base64: fewer bytes than the normalization had. The digest is that of the
constants that make the tensor, back to the layers before it: who changes them makes the entry say nothing. The axis of channels
is left out where it is 1.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.operations import BatchNorm

_STORED = np.dtype("<f4")

_AXIS = 1


def statistics_from_text(text: str, has: Callable[[str], bool], digest_of: Callable[[str], str]) -> dict[str, BatchNorm]:
    """Statistics of the tensors that a model has, made as they were when these were written, by name.

    Raises ValueError where the text is not as it is written here.
    """
    try:
        entries = {tensor: (_batch_norm(entry), entry[3:4]) for tensor, entry in json.loads(text).items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{error}; expected what biascorr writes there, or nothing") from None
    return {tensor: norm for tensor, (norm, digest) in entries.items() if has(tensor) and digest == [digest_of(tensor)]}


def text_from_statistics(statistics: Mapping[str, BatchNorm], digest_of: Callable[[str], str]) -> str:
    """The text, of tensors as they are made now."""
    entries = {}
    for tensor, norm in statistics.items():
        axis = [] if norm.channel_axis == _AXIS else [norm.channel_axis]
        entries[tensor] = [norm.name, _text(norm.beta), _text(norm.gamma), digest_of(tensor), *axis]
    return json.dumps(entries, separators=(",", ":"))


def _batch_norm(entry: Any) -> BatchNorm:
    name, *texts = entry[:3]
    beta, gamma = (_array(text) for text in texts)
    axis = entry[4] if len(entry) > 4 else _AXIS
    if not isinstance(name, str) or not isinstance(axis, int) or beta.shape != gamma.shape:
        raise ValueError(f"{name!r} with {beta.size} and {gamma.size} channels")
    if not (np.isfinite(beta).all() and (gamma >= 0).all()):
        raise ValueError(f"{name!r} with a mean that is not finite, or a standard deviation below 0")
    return BatchNorm(name, beta, gamma, beta, gamma**2, 0.0, axis)


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.astype(_STORED).tobytes()).decode()


def _array(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), _STORED).astype(np.float64)
