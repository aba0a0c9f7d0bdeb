"""What correction does to a network that a quantizer made: SQNR of the outputs on held-out samples, and seconds.

    python benches/quality.py NETWORK.onnx SAMPLES HELD_OUT [--quantizer nncf] [--weights tensor]

SAMPLES calibrate quantizer and correction, HELD_OUT judge: .npy files with samples along the first axis, of a model with one
input. Quantizers are NNCF (int8 QDQ, its own bias correction beside ours) and onnxruntime (`quantize_static`). SQNR is
10 log10(sum r^2 / sum (q - r)^2) in dB over all outputs and samples, the graphs run as they are, without any optimization. What
one pass over SAMPLES takes is measured with onnxruntime's defaults.
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
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from rich import box
from rich.console import Console
from rich.table import Table

import biascorr

Array = NDArray[Any]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--quantizer", choices=["nncf", "onnxruntime"], default="nncf")
    parser.add_argument(
        "--weights", choices=["channel", "tensor"], default="channel", help="a scale per output channel, or one"
    )
    parser.add_argument("--methods", nargs="+", default=["auto"], help="of biascorr.correct")
    return parser.parse_args()


def with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants as initializers: quantizers look for weights nowhere else."""
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
    """As NNCF quantizes a model, with its fast, its full or no bias correction."""
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
    """As onnxruntime quantizes convolutions and matrix products, ranges by minimum and maximum."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        layers = ["Conv", "ConvTranspose", "MatMul", "Gemm"]
        int8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
        quantize_static(model, path, Reader(batches), op_types_to_quantize=layers, per_channel=per_channel, **int8)
        return onnx.load(path)


def outputs(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> Iterator[Array]:
    """All outputs of each batch, flat."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for feeds in batches:
        yield np.concatenate([array.ravel() for array in session.run(None, feeds)]).astype(np.float64)


def sqnr(expected: list[Array], found: Iterator[Array]) -> float:
    signal = sum(float(np.square(r).sum()) for r in expected)
    noise = sum(float(np.square(q - r).sum()) for r, q in zip(expected, found, strict=True))
    return float(10 * np.log10(signal / noise)) if noise else float("inf")


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def one_pass(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> None:
    """As fast as onnxruntime is."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for feeds in batches:
        session.run(None, feeds)


def rows(options: argparse.Namespace) -> Iterator[tuple[str, onnx.ModelProto, float]]:
    """What was done to the network, the model that came of it, and the seconds that took behind plain quantization."""
    network = with_initializers(onnx.load(options.network))
    name, per_channel = network.graph.input[0].name, options.weights == "channel"
    batches = [{name: sample[None]} for sample in np.load(options.samples)]
    copy = onnx.ModelProto.FromString
    plain = network.SerializeToString()
    if options.quantizer == "nncf":
        quantized, base = timed(lambda: by_nncf(copy(plain), batches, per_channel, "none"))
    else:
        quantized, base = timed(lambda: by_onnxruntime(copy(plain), batches, per_channel))
    yield "float, one pass", network, timed(lambda: one_pass(network, batches))[1]
    yield "quantized, one pass", quantized, timed(lambda: one_pass(quantized, batches))[1]
    for correction in ("fast", "full") if options.quantizer == "nncf" else ():
        model, seconds = timed(lambda correction=correction: by_nncf(copy(plain), batches, per_channel, correction))
        yield f"NNCF's {correction} bias correction", model, seconds - base
    for method in options.methods:
        result, seconds = timed(lambda method=method: biascorr.correct(network, batches, quantized=quantized, method=method))
        yield f"biascorr {method}" + (f": {result.method}" if method == "auto" else ""), result.model, seconds


def main() -> None:
    options = parse_options()
    logging.disable(logging.WARNING)
    network = onnx.load(options.network)
    held_out = [{network.graph.input[0].name: sample[None]} for sample in np.load(options.held_out)]
    expected = list(outputs(network, held_out))
    table = Table(f"{options.network.name}, per {options.weights}", box=box.SIMPLE_HEAD)
    for heading in ("SQNR, dB", "seconds"):
        table.add_column(heading, justify="right")
    for name, model, seconds in rows(options):
        table.add_row(name, f"{sqnr(expected, outputs(model, held_out)):.2f}", f"{seconds:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
