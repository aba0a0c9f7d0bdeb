"""`fold`: a float model in, the same function out, with its batch normalizations in the layers around them.

Converters and quantizers do this before they quantize: the folded model is the one whose weights are rounded.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from biascorr import __version__
from biascorr.adapters.loading import network_from_model
from biascorr.arguments import paths_of
from biascorr.equalization.folding import Fold, fold_batch_norms
from biascorr.graph.network import EditableNetwork, keeps_batch_norms, require_edits, require_float, versions_of
from biascorr.graph.reasons import Reason
from biascorr.report.records import Record, plain, provenance_text, reason_record
from biascorr.report.reported import Saved
from biascorr.typing import Model, Model_co, ModelFile

_FOLD_FIRST = "fold the batch normalizations of the float model, then quantize it"


@dataclass(frozen=True, eq=False, repr=False)
class Folding(Saved[Model_co]):
    """A float model whose batch normalizations were folded into layers.

    Parameters
    ----------
    network : EditableNetwork
        The folded network.
    folds : sequence of Fold
        The batch normalizations that became part of layers, in topological order.
    reasons : mapping from str to Reason
        The batch normalizations that are as they were, by name, and why.
    notes : sequence of str
        Remarks.
    seconds : float or None
        What it took.
    files : mapping from str to str, or None
        The paths that were given, by the names of the parameters; None where none was.
    command : str or None
        The command that does the same again; None where it was none.
    """

    network: EditableNetwork
    folds: Sequence[Fold]
    reasons: Mapping[str, Reason]
    notes: Sequence[str] = ()
    seconds: float | None = None
    files: Mapping[str, str] | None = None
    command: str | None = None

    @property
    def left(self) -> dict[str, str]:
        """The reasons as text, by the names of the batch normalizations that stay."""
        return {name: str(reason) for name, reason in self.reasons.items()}

    @property
    def is_anything_done(self) -> bool:
        """Whether the folded model differs from the given one."""
        return bool(self.folds)

    def to_dict(self) -> Record:
        return {
            "kind": "folding",
            "biascorr": __version__,
            "folds": [dataclasses.asdict(each) for each in self.folds],
            "left": [{"name": name, "reasons": [reason_record(each)]} for name, each in self.reasons.items()],
            "notes": list(self.notes),
            "seconds": plain(self.seconds),
            "versions": dict(versions_of(self.network)),
            "files": None if self.files is None else dict(self.files),
            "command": self.command,
        }

    def _provenance(self) -> str | None:
        return provenance_text(method="fold", data=None) if self.is_anything_done else None


def fold(reference: Model | ModelFile) -> Folding[Model]:
    """Folds the batch normalizations of a float model into the layers around them, as far as they can be.

    The function stays the same but for rounding. The statistics of the folded batch normalizations stay with the model, for
    analytical bias correction.

    Parameters
    ----------
    reference : path, bytes, onnx.ModelProto or keras.Model
        The float model: ONNX, TFLite or Keras. A TFLite model has none any more: its converter has folded them.

    Returns
    -------
    Folding
        The folded model, what was folded, and what was not and why. The model and the files given are not changed.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError
        As :func:`biascorr.correct`.
    ValueError
        The model is invalid or quantized.

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]> network (float[N,1,4] x) => (float[N,1,4] y)
    ...     <float[1,1,1] w = {2}, float[1] g = {3}, float[1] b = {1}, float[1] m = {0}, float[1] v = {1}>
    ...     { [conv] t = Conv(x, w)  [norm] y = BatchNormalization<epsilon = 0.0>(t, g, b, m, v) }''')
    >>> folding = fold(model)
    >>> folding.folds
    [Fold(layer='conv', batch_norm='norm', is_after=True)]
    >>> [node.op_type for node in folding.model.graph.node]
    ['Conv']
    """
    started = time.perf_counter()
    network = require_edits(network_from_model(reference, "reference"), "reference", "folding")
    require_float(network, "reference", _FOLD_FIRST)
    notes = [] if keeps_batch_norms(network) else ["such a model has no batch normalizations: its converter has folded them"]
    folded, folds, left = fold_batch_norms(network)
    seconds = time.perf_counter() - started
    return Folding(folded, folds, left, notes, seconds, paths_of({"reference": reference}))
