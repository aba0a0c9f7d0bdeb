"""What `correct` returns: a corrected model and what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from biascorr.correction.candidates import Choice
from biascorr.correction.scoring import Gain, Score
from biascorr.equalization.result import Equalization
from biascorr.graph.network import BiasNetwork
from biascorr.graph.reasons import LayerReport, Reason, ReasonCode


@dataclass(frozen=True, eq=False)
class Correction:
    """A corrected model and its report.

    Parameters
    ----------
    network : BiasNetwork
        The corrected network.
    choice : Choice
        The candidate that was returned: its `method`, the one asked for or the one that "auto" chose ("none" for the
        uncorrected model), its `strength`, whether it is `shrunk`, and whether the float model `is_equalized`.
    report : sequence of LayerReport
        One entry per layer, in topological order; those whose bias is as it was have a reason.
    scores : mapping from str to Score
        How near the outputs of each candidate come to those of the float network, by its label, the uncorrected one ("none")
        first: `sqnr` in dB, and `divergence` in nats where an output is probabilities, else None. Empty where nothing could be
        scored.
    notes : sequence of str
        Remarks about the scores: few samples, outputs that got worse, nothing scored.
    samples, batches : int
        How many were read; a batch counts as one sample where the model fixes its size, or makes samples depend on each other.
    equalization : Equalization or None
        The equalization of the float model, whether that was better or not; None where it was not asked for.
    is_simulated : bool
        Whether quantization was simulated: then the corrected model is the float one, to be quantized now.
    deployed : mapping from str to Score
        The scores of the uncorrected and of the best candidate as their own runtime runs them with its default options, on this
        CPU.
        Empty where quantization is simulated, or nothing could be scored.
    is_refitted : bool
        Whether the corrected model was fitted again, to the held-out samples too, after it had been chosen by them.
    """

    network: BiasNetwork
    choice: Choice
    report: Sequence[LayerReport]
    scores: Mapping[str, Score]
    notes: Sequence[str]
    samples: int
    batches: int
    equalization: Equalization | None = None
    is_simulated: bool = False
    deployed: Mapping[str, Score] = field(default_factory=dict)
    is_refitted: bool = False

    @property
    def method(self) -> str:
        """The label of the choice, as in `scores`: "mean", "empirical 0.5", "equalized, activation shrunk", "none"."""
        return str(self.choice)

    @property
    def gains(self) -> Mapping[str, Gain]:
        """How sure the gain over the uncorrected model is: the mean over the samples that were scored and its standard error.

        By measure: "sqnr" in dB, "divergence" in nats, or "metric"; empty where nothing was scored.
        """
        return self.scores[self.method].gains_over(self.scores["none"]) if self.scores else {}

    @property
    def left(self) -> Reason | None:
        """Why nothing was corrected: nothing was better, or else the reason that most layers have; None where a layer was."""
        reasons = [reason for layer in self.report for reason in layer.reasons]
        if not reasons or any(layer.method is not None for layer in self.report):
            return None
        return ReasonCode.NOT_BETTER() if ReasonCode.NOT_BETTER() in reasons else max(reasons, key=reasons.count)

    @property
    def model(self) -> Any:
        """The corrected model, of the framework's own type: onnx.ModelProto, bytes of a .tflite file, keras.Model."""
        return self.network.model

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Writes the corrected model, whole or not at all.

        Raises FileExistsError if the file exists and `force` is not set, OSError where it cannot be written.
        """
        self.network.save(path, force=force)
