"""`correct`: a quantized model in, the same model with corrected biases and a report out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from biascorr.adapters.loading import network_from_model
from biascorr.calibration.samples import ONE_OF, Progress, Samples
from biascorr.calibration.storage import Storage, default_budget
from biascorr.correction.candidates import Candidate, Workshop
from biascorr.correction.methods import Activation, Empirical, Mean, Shift
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.scoring import NOT_JUDGED, Score
from biascorr.correction.simulation import simulated
from biascorr.equalization.equalize import Equalization, equalized
from biascorr.graph.matching import counterparts
from biascorr.graph.network import Layer, LayerReport, Network

METHODS = ("auto", "mean", "iterative", "empirical", "activation", "analytical", "hybrid")

_SCALED = ("empirical", "activation")
"""Methods whose shifts can be scaled."""

_AUTO = (
    ("mean",),
    ("iterative",),
    ("empirical", 1.0),
    ("empirical", 0.5),
    ("activation", 1.0),
    ("activation", 0.5),
    ("activation", 1.0, True),
)
"""What `auto` tries: method, strength, whether shrunk. Which one wins differs by network (docs/models.md)."""

_AS_IT_CAME, _EQUALIZED = "none", "equalized"
"""What candidates without correction are called."""

_FEW = 8
"""Fewer samples than these tell too little of a network to judge it."""


@dataclass(frozen=True, eq=False)
class Correction:
    """A corrected model and what was done to it.

    Parameters
    ----------
    network : Network
        The corrected network.
    method : str
        How it was corrected: the method asked for, or the one that `auto` chose, with its strength ("mean", "empirical 0.5",
        "activation shrunk"); "none" where nothing was better, or there was nothing to correct. It starts with "equalized" if
        the model was: "equalized, mean", or "equalized" alone without correction.
    report : sequence of LayerReport
        One entry per layer, in topological order; those left alone have a reason.
    scores : mapping from str to Score
        How near the outputs of each candidate come to those of the float network, by its name, the uncorrected one ("none")
        first: `sqnr` in dB, and `divergence` in nats where an output is probabilities, else None. Empty where nothing could be
        judged.
    notes : sequence of str
        What is worth knowing about the judgement: few samples, outputs that got worse, nothing judged.
    samples, batches : int
        How many were read; a batch counts as one sample where the model fixes its size.
    equalization : Equalization or None
        What equalization does to the float model, whether that was better or not; None where it was not asked for.
    """

    network: Network
    method: str
    report: Sequence[LayerReport]
    scores: Mapping[str, Score]
    notes: Sequence[str]
    samples: int
    batches: int
    equalization: Equalization | None = None

    @property
    def model(self) -> Any:
        """The corrected model, of the framework's own type (onnx.ModelProto)."""
        return self.network.model

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Writes the corrected model, whole or not at all.

        Raises FileExistsError if the file exists and `force` is not set, OSError where it cannot be written.
        """
        self.network.save(path, force=force)


def correct(
    model: Any,
    data: Any = None,
    *,
    quantized: Any = None,
    method: str = "auto",
    strength: float = 1.0,
    shrunk: bool = False,
    quant_params: QuantParams | None = None,
    equalize: bool = False,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> Correction:
    """Takes the bias that quantization leaves in a model's layers out of their biases.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        The float model.
    data : array, mapping, iterable, CalibrationDataReader or path, optional
        Calibration samples, as the model takes them. An array, or a mapping from input names to arrays, holds samples along
        the first axis. An iterable, be it a `CalibrationDataReader`, a `tf.data.Dataset` or a torch `DataLoader`, gives
        batches: arrays, tuples with one array per input, or mappings. A path is an .npy or .npz file or a folder of them, one
        batch per file. Only the method "analytical" does without.
    quantized : path, bytes or onnx.ModelProto, optional
        The same model quantized, in QDQ or QOperator format or with MatMulNBits; its biases are corrected. None: the float
        model is quantized in simulation, and the float model with corrected biases is returned.
    method : str
        "auto": one sample of four is held back. The methods below but "hybrid", some also with other strengths, correct with
        the other samples, and the model whose outputs for those held back are nearest to the float model's is returned. The
        model as it came is among them, so the result is never worse there. With fewer than four samples, all correct and
        all judge.

        By name, from all samples:

        - "mean": weight error times the mean input of each layer, per kernel tap, all measured in one pass.
        - "iterative": the same, each layer behind corrected ones.
        - "empirical": the mean output of each layer becomes that of the float one, each behind corrected ones.
        - "activation": the same of what is behind the layer's activation.
        - "analytical": weight error times the mean input that a BatchNormalization before the layer tells, through ReLU or
          Clip; of the layers that read the model's inputs, their mean in the data, if there is any. Other layers are left
          alone.
        - "hybrid": analytical where a BatchNormalization tells the mean input, else empirical.
    strength : float
        The part of each shift that is corrected, above 0 up to 1; only for "empirical" and "activation".
    shrunk : bool
        Whether the shift s of each channel is multiplied by s^2 / (s^2 + its variance over the samples), so that little is
        done where samples disagree; only for "empirical" and "activation".
    quant_params : QuantParams, optional
        How quantization is simulated, where no quantized model is given; None: `QuantParams()`, 8-bit weights.
    equalize : bool
        Whether the float model is equalized before quantization is simulated, as :func:`biascorr.equalize` does it. "auto" also
        tries it as it came, and returns what is best.
    memory_budget : int, optional
        Bytes of activations held in memory; what comes beyond goes to a temporary folder that is removed at the end. None: half
        of the memory that is free.
    progress : callable, optional
        Called with what is being done, how much of it is done, and how much there is (None if unknown).

    Returns
    -------
    Correction
        The corrected model and a report. The models and files given are not changed.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ImportError
        onnx and onnxruntime are not installed (``pip install "biascorr[onnx]"``).
    OSError
        The temporary folder is full.
    TypeError
        The model or the data is of a kind that is not understood; a sample has another dtype than the input.
    ValueError
        An option has a value that is not allowed; a model is invalid; the quantized model is not of this float model; there
        are no samples for a method that needs some; a sample has other names or shapes than the inputs, or nan.

    Warns
    -----
    UserWarning
        A method asked for by name made the outputs worse.

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     network (float[N,2] x) => (float[N,2] y) <float[2,2] w = {0.1, 0.2, 0.3, 0.4}> { [layer] y = MatMul(x, w) }''')
    >>> samples = np.ones((32, 2), np.float32)
    >>> correction = correct(model, samples, quant_params=QuantParams("tf", weight_bits=3), method="mean")
    >>> correction.report[0].reason
    'it had no bias; one was added'
    """
    _check_options(method, strength, shrunk, memory_budget, data is not None)
    for name, is_given in {"quant_params": quant_params is not None, "equalize": equalize}.items():
        if quantized is not None and is_given:
            raise ValueError(f"{name}: only for simulated quantization, but there is a quantized model")
    reference = network_from_model(model, "model")
    given = None if quantized is None else network_from_model(quantized, "quantized")
    _check_inputs_and_outputs(reference, given or reference)
    report_progress = progress or (lambda *_: None)
    activated, judge = method in ("auto", "activation"), None if data is None else reference
    with Storage(default_budget() if memory_budget is None else memory_budget) as storage:
        samples = Samples(storage, held_back=method == "auto")
        if data is not None:
            samples.read(data, (given or reference).inputs, report_progress)

        def attempt(name: str, network: Network, is_corrected: bool) -> _Attempt:
            measured = given or simulated(network, quant_params or QuantParams(), samples.feeds())
            same = {layer.name: layer for layer in network.layers}
            pairs, untouched = _split(measured, same if given is None else counterparts(network.layers, given.layers))
            workshop = Workshop(network, measured, pairs, samples, report_progress, activated=activated, judge=judge)
            made = _candidates(workshop, method, strength, shrunk) if is_corrected and pairs else []
            named = made if name == _AS_IT_CAME else [replace(each, name=f"{name}, {each.name}") for each in made]
            return _Attempt(network, measured, untouched, [workshop.uncorrected(name, measured), *named])

        equalization = equalized(reference, samples, report_progress) if equalize else None
        is_equalized = equalization is not None and equalization.is_anything_done
        attempts = [attempt(_AS_IT_CAME, reference, method == "auto" or not is_equalized)]
        if equalization is not None and is_equalized:
            attempts.append(attempt(_EQUALIZED, equalization.network.copy(), True))
    candidates = [candidate for each in attempts for candidate in each.candidates]
    best = _best(candidates) if method == "auto" else candidates[-1]
    chosen = next(each for each in attempts if best in each.candidates)
    if given is None:
        add_shifts(chosen.reference, best.shifts)
    reports = best.reports | {report.name: report for report in (*chosen.untouched, *chosen.measured.left_alone)}
    return Correction(
        chosen.reference if given is None else best.network,
        best.name,
        [reports[name] for name in chosen.measured.order if name in reports],
        {each.name: each.score for each in candidates if each.score is not NOT_JUDGED},
        _notes(best, candidates[0], samples),
        samples.count,
        samples.batches,
        equalization,
    )


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A float network, what quantization made of it, and what corrections made of that.

    Parameters
    ----------
    reference, measured : Network
        Float and quantized.
    untouched : sequence of LayerReport
        The layers that need or allow no correction.
    candidates : sequence of Candidate
        The uncorrected one first.
    """

    reference: Network
    measured: Network
    untouched: Sequence[LayerReport]
    candidates: Sequence[Candidate]


def _check_options(method: str, strength: float, shrunk: bool, memory_budget: int | None, has_data: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"method: {method!r}, expected one of {', '.join(METHODS)}")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength: {strength}, expected above 0 up to 1")
    if strength != 1.0 and method not in _SCALED:
        raise ValueError(f"strength: {strength}, expected 1 with method {method!r}")
    if shrunk and method not in _SCALED:
        raise ValueError(f"shrunk: {shrunk}, expected False with method {method!r}")
    if not has_data and method != "analytical":
        raise ValueError(f"data: None, expected samples with method {method!r}; only 'analytical' does without")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget: {memory_budget}, expected bytes, 0 or more")


def _check_inputs_and_outputs(reference: Network, quantized: Network) -> None:
    """Raises ValueError where the networks do not take the same samples, or give out something else."""
    expected, found = ({each.name: each.dtype for each in network.inputs} for network in (reference, quantized))
    if found != expected:
        listed = [", ".join(f"{name} ({dtype})" for name, dtype in inputs.items()) for inputs in (found, expected)]
        raise ValueError(f"quantized: not of this float model: takes {listed[0]}, expected {listed[1]}")
    if len(reference.outputs) != len(quantized.outputs):
        counts = f"{len(quantized.outputs)} outputs, expected {len(reference.outputs)}"
        raise ValueError(f"quantized: not of this float model: {counts}")


def _candidates(workshop: Workshop, method: str, strength: float, shrunk: bool) -> list[Candidate]:
    """What `auto` chooses from, or what was asked for by name."""
    if method != "auto":
        return [_candidate(workshop, method, strength, shrunk)]
    made = [_candidate(workshop, *each) for each in _AUTO]
    return [*made, workshop.analytical()] if workshop.analytical_shifts else made


def _candidate(workshop: Workshop, method: str, strength: float = 1.0, shrunk: bool = False) -> Candidate:
    if method == "mean":
        return workshop.with_shifts(method, workshop.mean_shifts)
    if method == "iterative":
        return workshop.swept(method, Mean(workshop.weights), inputs=True)
    if method == "analytical":
        return workshop.analytical()
    if method == "hybrid":
        return workshop.hybrid()
    name = " ".join([method, *([f"{strength:g}"] if strength != 1.0 else []), *(["shrunk"] if shrunk else [])])
    kind = Empirical if method == "empirical" else Activation
    return workshop.swept(name, kind(workshop.reference, strength, shrunk), activated=method == "activation")


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The best candidate that is in no way worse than the first, the uncorrected one."""
    before = candidates[0].score
    if before is NOT_JUDGED:
        raise ValueError(
            "quantized: gives out integers in place of the float model's real numbers; name a method to go unjudged"
        )
    return max((each for each in candidates if not each.score.is_worse_than(before)), key=lambda each: each.score.order)


def _notes(best: Candidate, before: Candidate, samples: Samples) -> list[str]:
    """What is worth knowing about the judgement; warns where the model got worse."""
    if before.score is NOT_JUDGED:
        return ["nothing was judged, which needs " + ("real outputs" if samples.count else "data")]
    notes = []
    judges = samples.count if samples.all_judge else samples.count // ONE_OF
    kind = ("held-back sample" if samples.held_back else "fitted sample") + ("" if judges == 1 else "s")
    if judges < _FEW:
        notes.append(f"judged by {judges} {kind}: too few to be sure, {_FEW * ONE_OF} samples in all would do")
    if best.score.is_worse_than(before.score):
        notes.append(f"{best.name} made the outputs worse: {before.score} before, {best.score} after, of {judges} {kind}")
        warnings.warn(notes[-1], stacklevel=3)
    return notes


def add_shifts(network: Network, shifts: Mapping[str, Shift]) -> None:
    """Gives the layers of a float network the shifts that its simulated quantization was given."""
    layers = {layer.name: layer for layer in network.layers}
    for name, shift in shifts.items():
        network.add_to_bias(layers[name], shift)


def _split(network: Network, matching: Mapping[str, Layer]) -> tuple[dict[str, tuple[Layer, Layer]], list[LayerReport]]:
    """The layers to correct with their float counterparts, and the reports of those that need or allow no correction."""
    pairs, untouched = {}, []
    for layer in network.layers:
        report = LayerReport(layer.name, layer.op, channels=layer.channels)
        counterpart = matching.get(layer.name)
        if counterpart is None:
            untouched.append(replace(report, reason="no layer of this name in the float model, nor one of its weights"))
        elif not np.isfinite(layer.weights).all() or not np.isfinite(counterpart.weights).all():
            untouched.append(replace(report, reason="weights are not finite"))
        elif np.array_equal(layer.weights, counterpart.weights):
            untouched.append(replace(report, shift_before=0.0, shift_after=0.0, reason="weights are not quantized"))
        else:
            pairs[layer.name] = (counterpart, layer)
    return pairs, untouched
