"""What `equalize` returns: an equalized float model and what was done to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import __version__
from biascorr.equalization.folding import Fold
from biascorr.equalization.high_bias import HighBias
from biascorr.equalization.scaling import ScaledChain
from biascorr.graph.layer import without_later_calls
from biascorr.graph.network import EditableNetwork, versions_of
from biascorr.graph.reasons import Reason, text_of
from biascorr.report.records import Record, plain, provenance_text, reason_record
from biascorr.report.reported import Plotted, Saved
from biascorr.typing import Model_co

_MOST_RANGES = 64
"""Channels whose ranges are in a record."""


@dataclass(frozen=True)
class OutputChange:
    """How far the outputs of a float network have moved.

    Parameters
    ----------
    absolute : float
        The largest change of any value; nan where a value that was finite is not any more.
    relative : float
        The largest change of any output as a part of the largest magnitude in it.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def __str__(self) -> str:
        return f"{self.absolute:.3g} ({self.relative:.1e} of the largest)"


def largest_change(expected: NDArray[Any], computed: NDArray[Any]) -> float:
    """The largest change of any value: nan and infinities that stayed do not count.

    nan where a number became one of them, or the shape another.
    """
    if expected.shape != computed.shape:
        return np.nan
    expected, computed = expected.astype(np.float64), computed.astype(np.float64)
    with np.errstate(invalid="ignore"):
        differences = np.abs(computed - expected)
    stayed = (expected == computed) | (np.isnan(expected) & np.isnan(computed))
    return float(np.where(stayed, 0.0, differences).max(initial=0.0))


@dataclass(frozen=True, eq=False, repr=False)
class Equalization(Saved[Model_co], Plotted):
    """An equalized float model and what was done to it.

    Parameters
    ----------
    network : EditableNetwork
        The equalized network.
    folds : sequence of Fold
        The batch normalizations that became part of layers.
    replaced : sequence of str
        The ReLU6 activations that became ReLU, by name.
    chains : sequence of ScaledChain
        The layers whose channels were scaled, and by how much.
    high_biases : sequence of HighBias
        The high biases that moved to the next layers.
    reasons : mapping from str to tuple of Reason
        Layers and batch normalizations that are as they were, by name, and why.
    changes : mapping from str to OutputChange
        After each step, how far the float outputs have moved from those of the given model, over all of the data; empty without
        data.
    data_digest : str or None
        SHA-256 of the samples as they were read; None without data.
    seconds : float or None
        The time that all of it took.
    files : mapping from str to str, or None
        The paths that were given, by the names of the parameters; None where none was.
    command : str or None
        The command that does the same again; None where it was none.
    """

    network: EditableNetwork
    folds: Sequence[Fold]
    replaced: Sequence[str]
    chains: Sequence[ScaledChain]
    high_biases: Sequence[HighBias]
    reasons: Mapping[str, tuple[Reason, ...]]
    changes: Mapping[str, OutputChange]
    data_digest: str | None = None
    seconds: float | None = None
    files: Mapping[str, str] | None = None
    command: str | None = None

    @property
    def left(self) -> dict[str, str]:
        """The reasons as text, by the names of layers and batch normalizations."""
        return {name: text_of(reasons) for name, reasons in self.reasons.items()}

    @property
    def is_anything_done(self) -> bool:
        """Whether the equalized model differs from the given one."""
        return any((self.folds, self.replaced, self.chains, self.high_biases))

    @property
    def change(self) -> OutputChange | None:
        """How far the float outputs have moved in all; None without data, and where nothing was done."""
        return list(self.changes.values())[-1] if self.changes else None

    def to_dict(self) -> Record:
        """The record of the equalization: dicts, lists, text, numbers, bool and None, as JSON can hold them.

        Returns
        -------
        dict
            What is above, by the same names; each of the `chains` has its `layers`, the `bits` it gained, its smallest and
            largest of all `factors`, how many activations got `bounds` for each channel, and the `ranges` of the channels of
            each layer, `before` and `after`: of 64 of them, where there are more. Layers and batch normalizations that were
            `left` as they are have their `reasons`. Besides, the `layer_count` of the model, the version of this package
            (`biascorr`) and of others (`versions`). Numbers that are not finite are None.
        """
        return {
            "kind": "equalization",
            "biascorr": __version__,
            "layer_count": len(without_later_calls(self.network.layers)),
            "folds": [{"batch_norm": each.batch_norm, "layer": each.layer} for each in self.folds],
            "replaced": list(self.replaced),
            "chains": list(map(_chain_record, self.chains)),
            "high_biases": [
                {"first": each.first, "second": each.second, "largest": plain(np.abs(each.folded).max())}
                for each in self.high_biases
            ],
            "left": [{"name": name, "reasons": list(map(reason_record, each))} for name, each in self.reasons.items()],
            "changes": [{"step": step, **plain(dataclasses.asdict(each))} for step, each in self.changes.items()],
            "data_digest": self.data_digest,
            "seconds": plain(self.seconds),
            "versions": dict(versions_of(self.network)),
            "files": None if self.files is None else dict(self.files),
            "command": self.command,
        }

    def _provenance(self) -> str | None:
        return provenance_text(method="equalize", data=self.data_digest) if self.is_anything_done else None


def _chain_record(each: ScaledChain) -> Record:
    factors = np.concatenate(each.factors)
    return {
        "layers": [layer.name for layer in each.chain.layers],
        "bits": plain(each.bits),
        "factors": {"min": plain(factors.min()), "max": plain(factors.max())},
        "bounds": len(each.limits),
        "silent": int(np.count_nonzero(each.silent)),
        "ranges": [
            {"layer": layer.name, "channels": len(before), **_range_record(before, after)}
            for layer, (before, after) in zip(each.chain.layers, each.ranges)
        ],
    }


def _range_record(before: NDArray[np.float64], after: NDArray[np.float64]) -> Record:
    """The ranges of the channels; of some, from the widest to the narrowest one before, where there are many."""
    if len(before) > _MOST_RANGES:
        taken = np.linspace(0, len(before) - 1, _MOST_RANGES).round().astype(int)
        places = np.argsort(-before, kind="stable")[taken]
        before, after = before[places], after[places]
    return {"before": plain(before), "after": plain(after)}
