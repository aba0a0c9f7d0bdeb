"""How near the outputs of a network are to those of its float reference.

SQNR = 10 log10(sum r^2 / sum (q - r)^2)  in dB, averaged over the outputs of the model
KL   = mean over positions of sum_c r_c log(r_c / q_c) - r_c + q_c, where an output is probabilities

The last two terms cancel if both sum to 1; with them no rounding, nor an output of another kind, makes KL less than 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CEILING = 300.0
"""dB of an output without any error: beyond what float64 resolves."""

_LEAST_PROBABILITY = 1e-9
"""Less is taken for this much, so that one class that vanishes does not outweigh all others."""


@dataclass(frozen=True)
class Score:
    """How near a network's outputs are to the float ones.

    Parameters
    ----------
    sqnr : float
        Signal to quantization noise ratio in dB, the mean over the outputs.
    divergence : float or None
        Kullback-Leibler divergence in nats, the mean over the outputs that are probabilities; None where none is.
    """

    sqnr: float
    divergence: float | None = None

    def is_worse_than(self, other: Score) -> bool:
        """Whether any measure is worse."""
        return self.sqnr < other.sqnr or (self.divergence or 0.0) > (other.divergence or 0.0)

    def __str__(self) -> str:
        return f"{self.sqnr:.2f} dB" + ("" if self.divergence is None else f", KL {self.divergence:.3g}")

    @property
    def order(self) -> tuple[float, float]:
        """Greater is better: by divergence for classifiers, else by SQNR."""
        return -(self.divergence or 0.0), self.sqnr


NOT_SCORED = Score(float("nan"))
"""The score of outputs that cannot be compared."""


class _Output:
    """Errors of one output, batch by batch."""

    def __init__(self) -> None:
        self.signal = self.noise = self.divergence = 0.0
        self.positions = 0
        self.probabilities = True

    def add(self, reference: NDArray[Any], computed: NDArray[Any]) -> None:
        is_real = reference.dtype.kind == "f"
        if reference.shape != computed.shape or not is_real:
            alike = reference.shape == computed.shape and reference == computed
            self.signal += reference.size
            self.noise += reference.size - np.count_nonzero(alike)
            self.probabilities = False
            return
        r, q = reference.astype(np.float64), computed.astype(np.float64)
        known = np.isfinite(r)
        self.signal += float(np.square(r, where=known, out=np.zeros_like(r)).sum())
        self.noise += float(np.square(np.subtract(q, r, where=known, out=np.zeros_like(r))).sum())
        self.probabilities &= bool(r.ndim > 0 and (r >= 0).all() and np.allclose(r.sum(axis=-1), 1.0, atol=1e-3))
        if self.probabilities:
            logs = np.log(np.maximum(r, _LEAST_PROBABILITY)) - np.log(np.maximum(q, _LEAST_PROBABILITY))
            self.divergence += float((r * logs - r + q).sum())
            self.positions += r.size // r.shape[-1]

    @property
    def sqnr(self) -> float:
        if np.isnan(self.noise):
            return -np.inf
        with np.errstate(divide="ignore"):
            ratio = 10.0 * (np.log10(self.signal) - np.log10(self.noise)) if self.noise else _CEILING
        return float(np.clip(ratio, -_CEILING, _CEILING))


class OutputErrors:
    """The errors of a network's outputs, collected batch by batch."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def add(self, name: str, reference: Iterable[NDArray[Any]], computed: Iterable[NDArray[Any]]) -> None:
        """Compares some values of an output with the float ones; codes cannot be compared with real numbers."""
        for expected, found in zip(reference, computed):
            if expected.dtype.kind == found.dtype.kind:
                self._outputs.setdefault(name, _Output()).add(expected, found)

    @property
    def score(self) -> Score:
        outputs = self._outputs.values()
        if not outputs:
            return NOT_SCORED
        divergences = [each.divergence / each.positions for each in outputs if each.probabilities and each.positions]
        return Score(float(np.mean([each.sqnr for each in outputs])), float(np.mean(divergences)) if divergences else None)
