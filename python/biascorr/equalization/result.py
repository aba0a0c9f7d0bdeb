"""What `equalize` returns: an equalized float model and what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from biascorr.equalization.folding import Fold
from biascorr.equalization.high_bias import HighBias
from biascorr.equalization.scaling import ScaledChain
from biascorr.graph.network import EditableNetwork
from biascorr.graph.reasons import Reason, text_of


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


@dataclass(frozen=True, eq=False)
class Equalization:
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
    """

    network: EditableNetwork
    folds: Sequence[Fold]
    replaced: Sequence[str]
    chains: Sequence[ScaledChain]
    high_biases: Sequence[HighBias]
    reasons: Mapping[str, tuple[Reason, ...]]
    changes: Mapping[str, OutputChange]

    @property
    def model(self) -> Any:
        """The equalized model, of the framework's own type: onnx.ModelProto, bytes of a .tflite file, keras.Model."""
        return self.network.model

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

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Writes the equalized model, whole or not at all.

        Raises FileExistsError if the file exists and `force` is not set, OSError where it cannot be written.
        """
        self.network.save(path, force=force)
