"""`correct`: a quantized model in, the same model with corrected biases and a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration import batches_from_data, number_of_batches
from biascorr.model.methods import input_means, mean_shift
from biascorr.model.network import Layer, LayerReport, Network
from biascorr.quantization import Quantization, fake_quantize


@dataclass(frozen=True, eq=False)
class Correction:
    """A corrected model and what was done to it.

    Parameters
    ----------
    network : Network
        The corrected network.
    report : sequence of LayerReport
        One entry per layer, in topological order; those left alone have a reason.
    samples : int
        Batches of data that were used.
    """

    network: Network
    report: Sequence[LayerReport]
    samples: int

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
    data: Any,
    *,
    quantized: Any = None,
    method: str = "mean",
    weight_bits: int = 8,
    per_channel: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Correction:
    """Takes the bias that weight quantization leaves in a model's layers out of their biases.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        The float model.
    data : array, mapping, iterable, CalibrationDataReader or path
        Calibration samples, as the model takes them. An array, or a mapping from input names to arrays, holds samples along
        the first axis. An iterable or a `CalibrationDataReader` gives batches: arrays, tuples with one array per input, or
        mappings. A path is an .npy or .npz file or a folder of them, one batch per file.
    quantized : path, bytes or onnx.ModelProto, optional
        The same model quantized, in QDQ format; its biases are corrected. None: the weights of the float model are
        quantized in simulation, and the float model with corrected biases is returned.
    method : "mean"
        One pass: weight error times the mean input of each layer, per kernel tap.
    weight_bits : int
        Simulated quantization: bits of the weights, 2 to 32, symmetric.
    per_channel : bool
        Simulated quantization: a scale per output channel instead of one per tensor.
    progress : callable, optional
        Called with the batches done and their total (None if unknown) after each batch.

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
    TypeError
        The model or the data is of a kind that is not understood; a sample has another dtype than the input.
    ValueError
        The method is unknown; a model is invalid; the quantized model is not of this float model; there are no samples; a
        sample has other names or shapes than the inputs, or nan.
    """
    if method != "mean":
        raise ValueError(f"method: {method!r}, expected 'mean'")
    if not 2 <= weight_bits <= 32:
        raise ValueError(f"weight_bits: {weight_bits}, expected 2 to 32")
    reference = _network(model, "model")
    measured = _simulated(reference, weight_bits, per_channel) if quantized is None else _network(quantized, "quantized")
    weights = _matching_weights(reference, measured)
    layers, untouched = _split(measured, weights)
    total = number_of_batches(data)
    on_batch = None if progress is None else lambda done: progress(done, total)
    means, done = input_means(measured, layers, batches_from_data(data, measured.inputs), on_batch)
    corrected = reference if quantized is None else measured
    reports = {layer.name: _corrected(corrected, layer, weights[layer.name], means[layer.name]) for layer in layers}
    reports |= {report.name: report for report in (*untouched, *measured.left_alone)}
    return Correction(corrected, [reports[name] for name in measured.order if name in reports], done)


def _network(model: Any, name: str) -> Network:
    try:
        from biascorr.onnx.network import OnnxNetwork
    except ImportError as error:
        raise ImportError(f'correcting a model needs {error.name}: pip install "biascorr[onnx]"') from error
    return OnnxNetwork.load(model, name)


def _simulated(network: Network, bits: int, per_channel: bool) -> Network:
    return network.with_weights({layer.name: _fake_quantized(layer, bits, per_channel) for layer in network.layers})


def _fake_quantized(layer: Layer, bits: int, per_channel: bool) -> NDArray[Any]:
    axis = layer.layout.index("O")
    others = tuple(k for k in range(layer.weights.ndim) if k != axis) if per_channel else None
    low, high = layer.weights.min(axis=others, initial=0.0), layer.weights.max(axis=others, initial=0.0)
    try:
        quantization = Quantization.from_range(low, high, bits, asymmetric=False)
    except ValueError as error:
        raise ValueError(f"layer {layer.name}: weights: {error}") from None
    return fake_quantize(layer.weights, quantization, axis=axis)


def _matching_weights(reference: Network, quantized: Network) -> dict[str, NDArray[Any]]:
    """The float weights of each quantized layer, by its name. Raises ValueError where they are not what was quantized."""
    counterparts = _counterparts(reference.layers, quantized.layers)
    for layer in quantized.layers:
        if layer.name in counterparts:
            _check_weights(layer, counterparts[layer.name].weights)
    if quantized.layers and not counterparts:
        raise ValueError(f"quantized: not of this float model: no layer named {quantized.layers[0].name} in it")
    return {name: layer.weights for name, layer in counterparts.items()}


def _counterparts(reference: Sequence[Layer], quantized: Sequence[Layer]) -> dict[str, Layer]:
    """Float layers by the name of the quantized one: of the same name; the rest in order, where they are alike one by one."""
    by_name = {layer.name: layer for layer in reference}
    found = {layer.name: by_name[layer.name] for layer in quantized if layer.name in by_name}
    rest = [layer for layer in quantized if layer.name not in found]
    left = [layer for layer in reference if layer.name not in found]
    if [(layer.op, layer.weights.shape) for layer in rest] == [(layer.op, layer.weights.shape) for layer in left]:
        found |= {layer.name: counterpart for layer, counterpart in zip(rest, left)}
    return found


def _check_weights(layer: Layer, weights: NDArray[Any]) -> None:
    """Raises ValueError where no rounding can have made a layer's weights from these.

    Rounding to a grid with 0 on it moves no weight further than 0 is away, so the error is smaller than the weights; and most
    weights, those that do not saturate, move by less than a step.
    """
    of_another = f"quantized: not of this float model: layer {layer.name} has"
    if weights.shape != layer.weights.shape:
        raise ValueError(f"{of_another} weights of shape {layer.weights.shape}, expected {weights.shape}")
    error = np.abs(np.subtract(weights, layer.weights, dtype=np.float64))
    far = layer.weight_step is not None and error.size > 0 and np.median(error / layer.weight_step) > 1.0
    if far or np.linalg.norm(error) > np.linalg.norm(weights.astype(np.float64)):
        raise ValueError(f"{of_another} other weights (was a BatchNormalization folded, or the model scaled?)")


def _split(network: Network, weights: Mapping[str, NDArray[Any]]) -> tuple[list[Layer], list[LayerReport]]:
    """The layers to correct, and the reports of those that need or allow no correction."""
    layers, untouched = [], []
    for layer in network.layers:
        report = LayerReport(layer.name, layer.op, channels=layer.channels)
        if layer.name not in weights:
            untouched.append(replace(report, reason="no layer of this name in the float model"))
        elif not np.isfinite(layer.weights).all() or not np.isfinite(weights[layer.name]).all():
            untouched.append(replace(report, reason="weights are not finite"))
        elif np.array_equal(layer.weights, weights[layer.name]):
            untouched.append(replace(report, shift_before=0.0, shift_after=0.0, reason="weights are not quantized"))
        else:
            layers.append(layer)
    return layers, untouched


def _corrected(network: Network, layer: Layer, weights: NDArray[Any], input_mean: NDArray[Any]) -> LayerReport:
    report = LayerReport(layer.name, layer.op, channels=layer.channels)
    shift = mean_shift(layer, weights, input_mean)
    if not np.isfinite(shift).all():
        return replace(report, reason="its mean input is not finite")
    change = network.add_to_bias(layer, shift)
    before, after = (float(np.abs(x).mean()) for x in (shift, shift - change.applied))
    return replace(report, method="mean", shift_before=before, shift_after=after, reason=change.note)
