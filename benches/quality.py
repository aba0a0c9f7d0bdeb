"""Measures what correction does to a quantized network: how near its outputs for held-out samples come, and seconds.

    python benches/quality.py NETWORK.onnx SAMPLES HELD_OUT [--quantizer nncf] [--weights tensor] [--equalize]

SAMPLES calibrate quantizer and correction, HELD_OUT are scored: .npy files with samples along the first axis, for a model with
one input. Quantizers are NNCF (int8 QDQ, its own bias correction beside ours), onnxruntime (`quantize_static`), and simulation:
8-bit weights over their whole range, float activations. SQNR is 10 log10(sum r^2 / sum (q - r)^2) in dB over all outputs and
samples; top-1 is the share of samples with the same greatest output, where there are more than ten. The graphs run as they are,
without any optimization. The seconds of one pass over SAMPLES are those of onnxruntime with its defaults.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from rich import box
from rich.console import Console
from rich.table import Table

import biascorr
from biascorr.adapters.loading import network_from_model
from biascorr.correction.simulation import simulated

Array = NDArray[Any]

MANY_CLASSES = 10
"""With no more classes, top-1 is nearly always the same."""

PER_CHANNEL = 13
"""The first opset with a scale per channel."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--quantizer", choices=["nncf", "onnxruntime", "simulated"], default="nncf")
    parser.add_argument(
        "--weights", choices=["channel", "tensor"], default="channel", help="a scale per output channel, or one"
    )
    parser.add_argument("--methods", nargs="+", default=["auto"], help="of biascorr.correct")
    parser.add_argument("--equalize", action="store_true", help="also quantize the network equalized by biascorr")
    return parser.parse_args()


def prepared(path: Path) -> onnx.ModelProto:
    """A network for quantizers: in an opset that has scales per channel, and with initializers in place of constants."""
    model = onnx.load(path)
    if model.opset_import[0].version < PER_CHANNEL:
        model = onnx.version_converter.convert_version(model, PER_CHANNEL)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            model.graph.node.append(node)
    return model


def by_nncf(model: onnx.ModelProto, batches: list[dict[str, Array]], per_channel: bool, correction: str) -> onnx.ModelProto:
    """Quantizes a model by NNCF, with its fast, its full or no bias correction."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    advanced = AdvancedQuantizationParameters(
        disable_bias_correction=correction == "none",
        weights_quantization_params=QuantizationParameters(per_channel=per_channel),
        overflow_fix=nncf.OverflowFix.DISABLE,
        disable_channel_alignment=True,
    )
    fast = correction != "full"
    return nncf.quantize(model, nncf.Dataset(batches), fast_bias_correction=fast, advanced_parameters=advanced)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[dict[str, Array]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches, None)


def by_onnxruntime(model: onnx.ModelProto, batches: list[dict[str, Array]], per_channel: bool) -> onnx.ModelProto:
    """Quantizes convolutions and matrix products by onnxruntime, ranges by minimum and maximum."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        layers = ["Conv", "ConvTranspose", "MatMul", "Gemm"]
        int8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
        quantize_static(model, path, Reader(batches), op_types_to_quantize=layers, per_channel=per_channel, **int8)
        return onnx.load(path)


def outputs(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> Iterator[Array]:
    """All outputs of each batch, flat."""
    for arrays in separate_outputs(model, batches):
        yield np.concatenate(arrays)


def separate_outputs(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> Iterator[list[Array]]:
    """The outputs of each batch, each flat."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for feeds in batches:
        yield [array.ravel().astype(np.float64) for array in session.run(None, feeds)]


def scores(expected: list[Array], found: Iterator[Array], classifies: bool) -> list[str]:
    """SQNR, and top-1 agreement where the network classifies."""
    signal = noise = 0.0
    equal = []
    for r, q in zip(expected, found, strict=True):
        signal += float(np.square(r).sum())
        noise += float(np.square(q - r).sum())
        equal.append(r.argmax() == q.argmax())
    sqnr = 10 * np.log10(signal / noise) if noise else np.inf
    return [f"{sqnr:.2f}", *([f"{np.mean(equal):.1%}"] if classifies else [])]


def has_classes(model: onnx.ModelProto) -> bool:
    """Whether a model gives out scores of many classes for each sample, and nothing else."""
    sizes = [[size.dim_value for size in output.type.tensor_type.shape.dim] for output in model.graph.output]
    return len(sizes) == 1 and len(sizes[0]) == 2 and sizes[0][1] > MANY_CLASSES


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def one_pass(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> None:
    """Runs all batches as fast as onnxruntime can."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for feeds in batches:
        session.run(None, feeds)


class Quantizer:
    """Quantizes networks as the options say, and corrects them."""

    def __init__(self, options: argparse.Namespace, batches: list[dict[str, Array]]) -> None:
        self._kind = options.quantizer
        self._per_channel = options.weights == "channel"
        self._params = biascorr.QuantParams("tf", per_channel=self._per_channel)
        self._batches = batches

    def quantized(self, model: onnx.ModelProto, correction: str = "none") -> onnx.ModelProto:
        """The quantized model, with one of NNCF's corrections where that is asked for."""
        if self._kind == "simulated":
            return simulated(network_from_model(model, "model"), self._params).model
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        if self._kind == "nncf":
            return by_nncf(copy, self._batches, self._per_channel, correction)
        return by_onnxruntime(copy, self._batches, self._per_channel)

    def corrected(self, model: onnx.ModelProto, quantized: onnx.ModelProto, method: str) -> tuple[str, onnx.ModelProto]:
        """The method that corrected a model, and the result."""
        if self._kind == "simulated":
            result = biascorr.correct(model, self._batches, quant_params=self._params, method=method)
            return result.method, self.quantized(result.model)
        result = biascorr.correct(model, self._batches, quantized=quantized, method=method)
        return result.method, result.model


Row = tuple[str, onnx.ModelProto, float]
"""What was done to a network, the resulting model, and the seconds it took."""


def variants(options: argparse.Namespace, batches: list[dict[str, Array]]) -> Iterator[Row]:
    """The network; where equalization is asked for, also with its batch normalizations folded, and equalized."""
    network = prepared(options.network)
    yield "", network, 0.0
    if options.equalize:
        (folded, pairs), seconds = timed(biascorr.fold_all_batch_norms, network)
        if pairs:
            yield "folded, ", folded, seconds
        result, seconds = timed(biascorr.equalize, network, batches)
        yield "equalized, ", result.model, seconds


def rows(options: argparse.Namespace, batches: list[dict[str, Array]]) -> Iterator[Row]:
    quantizer = Quantizer(options, batches)
    for name, network, seconds in variants(options, batches):
        yield f"{name}float", network, seconds
        quantized, base = timed(quantizer.quantized, network)
        yield f"{name}quantized", quantized, base
        for correction in ("fast", "full") if options.quantizer == "nncf" else ():
            model, seconds = timed(quantizer.quantized, network, correction)
            yield f"{name}NNCF's {correction} bias correction", model, seconds - base
        for method in options.methods:
            (chosen, model), seconds = timed(quantizer.corrected, network, quantized, method)
            yield f"{name}biascorr {method}" + (f": {chosen}" if method == "auto" else ""), model, seconds
        if not name:
            yield "one pass, float", network, timed(one_pass, network, batches)[1]
            yield "one pass, quantized", quantized, timed(one_pass, quantized, batches)[1]


def main() -> None:
    options = parse_options()
    logging.disable(logging.WARNING)
    network = onnx.load(options.network)
    name = network.graph.input[0].name
    samples, held_out = ([{name: each[None]} for each in np.load(path)] for path in (options.samples, options.held_out))
    expected, classifies = list(outputs(network, held_out)), has_classes(network)
    table = Table(f"{options.network.name}, per {options.weights}", box=box.SIMPLE_HEAD)
    for heading in ("SQNR, dB", *(["top-1"] if classifies else []), "seconds"):
        table.add_column(heading, justify="right")
    for row, model, seconds in rows(options, samples):
        table.add_row(row, *scores(expected, outputs(model, held_out), classifies), f"{seconds:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
