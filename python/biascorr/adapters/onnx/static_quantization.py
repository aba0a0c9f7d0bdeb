"""Static quantization of a float model by onnxruntime: its pre-processing, then `quantize_static` in QDQ format.

    constants to initializers -> opset with scales per channel -> quant_pre_process -> quantize_static

onnxruntime quantizes no weights that are in Constant nodes. Everything goes through files, as models may be too large for a
message; what the networks that are returned read of them stays there for them when they are removed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from biascorr.adapters.onnx import files
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.adapters.onnx.operators import operator_of
from biascorr.adapters.onnx.tensors import Values, whole_model
from biascorr.graph.network import Feeds

_TYPES = {
    "int8": quantization.QuantType.QInt8,
    "uint8": quantization.QuantType.QUInt8,
    "int16": quantization.QuantType.QInt16,
    "uint16": quantization.QuantType.QUInt16,
}

_CALIBRATIONS = {
    "minmax": quantization.CalibrationMethod.MinMax,
    "entropy": quantization.CalibrationMethod.Entropy,
    "percentile": quantization.CalibrationMethod.Percentile,
}

QUANTIZABLE = frozenset({*QDQRegistry, *QLinearOpsRegistry})
"""Operators that onnxruntime quantizes where none are named."""

_PER_CHANNEL_OPSET = 13
"""The opset that gave DequantizeLinear a step per channel."""

_WIDE_OPSET = 21
"""The opset that gave QuantizeLinear 16 bits."""

_LARGE = 1 << 30
"""Bytes of a model from which its tensors go to a file beside it: shapes that are inferred, and quantizers, add to it."""

_ERRORS_ONLY = 3
_WARNINGS = 2
"""The severity from which onnxruntime logs, as it starts."""


@dataclass(frozen=True)
class StaticQuantization:
    """How a model is quantized.

    Parameters
    ----------
    per_channel : bool
        Whether weights have a scale for each output channel.
    weight_type, activation_type : str
        "int8", "uint8", "int16" or "uint16".
    calibration : str
        How the range of a tensor is found: "minmax", "entropy" or "percentile".
    op_types : sequence of str
        The operators that are quantized; nothing: all that onnxruntime can quantize.
    reduce_range : bool
        Whether weights have 7 bits, for CPUs whose products of 8 bits saturate.
    """

    per_channel: bool
    weight_type: str
    activation_type: str
    calibration: str
    op_types: Sequence[str] = field(default=())
    reduce_range: bool = False

    def __str__(self) -> str:
        scales = "per channel" if self.per_channel else "per tensor"
        bits = ", of 7 bits" if self.reduce_range else ""
        return (
            f"{self.weight_type} weights {scales}{bits}, {self.activation_type} activations by {self.calibration}, "
            f"{', '.join(self.op_types) or 'all operators'}"
        )

    @property
    def is_wide(self) -> bool:
        """Whether anything has 16 bits."""
        return "16" in self.weight_type + self.activation_type


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Batches, all of them or one after the other."""

    def __init__(self, batches: Callable[[], Iterable[Feeds]], count: int) -> None:
        self._batches = iter(batches())
        self._count = count
        self._left = count

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        """Lets the next batches be read, so many of them."""
        self._left = end_index - start_index

    def get_next(self) -> dict[str, Any] | None:
        if not self._left:
            return None
        self._left -= 1
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


def statically_quantized(
    network: OnnxNetwork, batches: Callable[[], Iterable[Feeds]], count: int, options: StaticQuantization, folder: Path
) -> tuple[OnnxNetwork, OnnxNetwork]:
    """The float network as it was prepared for quantization, and the quantized one.

    Parameters
    ----------
    network : OnnxNetwork
        Float.
    batches : callable
        Gives the calibration samples.
    count : int
        How many batches these are.
    options : StaticQuantization
        How it is quantized.
    folder : Path
        An empty folder, which can be removed afterwards.

    Raises
    ------
    OSError
        The folder is full.
    ValueError
        onnxruntime cannot quantize it so.
    """
    with _quiet():
        given, prepared, quantized = (folder / each / "model.onnx" for each in ("given", "prepared", "quantized"))
        for path in (given, prepared, quantized):
            path.parent.mkdir()
        model, values = network.taken_apart()
        _make_initializers(model)
        model, values = _with_opset(model, values, options)
        files.save(model, values, given)
        is_large = sum(files.sizes_by_file(given, "reference").values()) >= _LARGE
        try:
            _prepare(given, prepared, is_large)
            _quantize(prepared, quantized, _Reader(batches, count), options, is_large)
            return OnnxNetwork.load(prepared, "reference"), OnnxNetwork.load(quantized, "quantized")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            text = " ".join(str(error).split()) or type(error).__name__
            broken = [layer.name for layer in network.layers if not np.isfinite(layer.weights).all()]
            cause = f": layer {broken[0]} has weights that are nan or infinite" if broken else ""
            raise ValueError(f"reference{cause}: onnxruntime cannot quantize it: {text}") from error


def quantized_plainly(
    model: onnx.ModelProto, prepared: Path, quantized: Path, batches: Sequence[Feeds], op_types: Sequence[str]
) -> None:
    """Writes a float model and what onnxruntime makes of it per tensor, in int8, by minimum and maximum: its defaults."""
    _make_initializers(model)
    onnx.save(model, prepared)
    with _quiet():
        quantization.quantize_static(
            prepared,
            quantized,
            _Reader(lambda: batches, len(batches)),
            op_types_to_quantize=list(op_types),
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _prepare(given: Path, prepared: Path, is_large: bool) -> None:
    """Fuses and folds what runtimes do, and infers shapes."""
    external = {"save_as_external_data": True, "all_tensors_to_one_file": True, "external_data_location": "model.data"}
    quant_pre_process(
        str(given),
        str(prepared),
        skip_symbolic_shape=True,  # needs sympy, and fails at much
        skip_optimization=is_large,  # would need the model in memory twice
        **(external if is_large else {}),
    )


def _quantize(prepared: Path, quantized: Path, reader: _Reader, options: StaticQuantization, is_large: bool) -> None:
    more: dict[str, Any] = {"MatMulConstBOnly": True, "WeightSymmetric": options.weight_type.startswith("int")}
    if options.calibration != "minmax":
        more["CalibStridedMinMax"] = 1  # its histograms would hold all activations of all batches, of one shape
    quantization.quantize_static(
        str(prepared),
        str(quantized),
        reader,
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=list(options.op_types) or None,
        per_channel=options.per_channel,
        reduce_range=options.reduce_range,
        activation_type=_TYPES[options.activation_type],
        weight_type=_TYPES[options.weight_type],
        calibrate_method=_CALIBRATIONS[options.calibration],
        use_external_data_format=is_large,
        extra_options=more,
    )


def _make_initializers(model: onnx.ModelProto) -> None:
    """Makes initializers of Constant nodes with tensors."""
    nodes = list(model.graph.node)
    kept = [node for node in nodes if not _has_tensor(node)]
    if len(kept) == len(nodes):
        return
    for node in nodes:
        if _has_tensor(node):
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
    copies = [_copy(node) for node in kept]
    model.graph.ClearField("node")
    model.graph.node.extend(copies)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _has_tensor(node: onnx.NodeProto) -> bool:
    return operator_of(node) == "Constant" and [each.name for each in node.attribute] == ["value"]


def _with_opset(model: onnx.ModelProto, values: Values, options: StaticQuantization) -> tuple[onnx.ModelProto, Values]:
    """In an opset that has what is wanted. Raises ValueError where it cannot be converted."""
    needed = _WIDE_OPSET if options.is_wide else _PER_CHANNEL_OPSET if options.per_channel else 0
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), needed)
    if opset >= needed:
        return model, values
    try:
        return onnx.version_converter.convert_version(whole_model(model, values), needed), Values()
    except Exception as error:  # of C++
        what, other = (
            ("16 bits", "8 bits") if options.is_wide else ("a scale per channel", "per_channel=False (--no-per-channel)")
        )
        raise ValueError(
            f"reference: {what} needs opset {needed}, it has {opset}, and cannot be converted: {error}; export it with opset "
            f"{needed}, or quantize with {other}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime says of its own work."""
    root, handler, disabled = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)  # without any, its first line would make one that stays
    logging.disable(max(disabled, logging.ERROR))
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)
        logging.disable(disabled)
        root.removeHandler(handler)
