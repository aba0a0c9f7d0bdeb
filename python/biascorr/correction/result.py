"""What `correct` returns: a corrected model and what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from biascorr import __version__
from biascorr.correction.candidates import Choice
from biascorr.correction.scoring import Gain, Score
from biascorr.equalization.result import Equalization
from biascorr.graph.network import BiasNetwork, versions_of
from biascorr.graph.reasons import LayerReport, Reason, ReasonCode
from biascorr.report.records import Record, layer_record, plain, provenance_text
from biascorr.report.reported import Plotted, Saved
from biascorr.typing import Model_co


@dataclass(frozen=True, eq=False, repr=False)
class Correction(Saved[Model_co], Plotted):
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
    scored_samples : int
        How many were scored.
    is_held_out : bool
        Whether these are others than those that candidates were fitted to, when they were chosen.
    data_digest : str or None
        SHA-256 of the samples as they were read, validation data among them; None without data.
    seconds : float or None
        The time that all of it took.
    files : mapping from str to str, or None
        The paths that were given, by the names of the parameters; None where none was.
    command : str or None
        The command that does the same again; None where it was none.
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
    scored_samples: int = 0
    is_held_out: bool = False
    data_digest: str | None = None
    seconds: float | None = None
    files: Mapping[str, str] | None = None
    command: str | None = None

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

    def to_dict(self) -> Record:
        """The record of the correction: dicts, lists, text, numbers, bool and None, as JSON can hold them.

        Returns
        -------
        dict
            What is above, by the same names; `layers` are those of `report`, each with its `reasons` (`code`, `arguments` and
            `text`) and its `worst_channels` (`channel` and `shift`); `scores` and `deployed` have an entry for each candidate:
            its `sqnr`, `divergence`, `metric`, `sqnr_of_samples`, its `gains` over the uncorrected one (`mean` and `error`),
            and whether it `is_taken`. Besides, the version of this package (`biascorr`) and of others (`versions`). Numbers
            that are not finite are None.
        """
        return {
            "kind": "correction",
            "biascorr": __version__,
            "method": self.method,
            "samples": self.samples,
            "batches": self.batches,
            "scored_samples": self.scored_samples,
            "is_held_out": self.is_held_out,
            "is_simulated": self.is_simulated,
            "is_refitted": self.is_refitted,
            "seconds": plain(self.seconds),
            "scores": self._score_records(self.scores),
            "deployed": self._score_records(self.deployed),
            "layers": list(map(layer_record, self.report)),
            "notes": list(self.notes),
            "equalization": None if self.equalization is None else self.equalization.to_dict(),
            "data_digest": self.data_digest,
            "versions": dict(versions_of(self.network)),
            "files": None if self.files is None else dict(self.files),
            "command": self.command,
        }

    def _score_records(self, scores: Mapping[str, Score]) -> list[Record]:
        before = next(iter(scores.values()), None)
        return [
            {
                "candidate": name,
                "sqnr": plain(score.sqnr),
                "divergence": plain(score.divergence),
                "metric": plain(score.metric),
                "sqnr_of_samples": plain(score.sqnrs),
                "gains": {} if before is None or score is before else _gain_records(score.gains_over(before)),
                "is_taken": name == self.method,
            }
            for name, score in scores.items()
        ]

    def _provenance(self) -> str | None:
        is_changed = self.choice.is_equalized or any(layer.method is not None for layer in self.report)
        return provenance_text(method=self.method, data=self.data_digest) if is_changed else None


def _gain_records(gains: Mapping[str, Gain]) -> Record:
    return {measure: {"mean": plain(gain.mean), "error": plain(gain.error)} for measure, gain in gains.items()}
