"""Quantize a network, correct its biases with `biascorr correct`, and score float, quantized and corrected.

    python examples/demo.py                                          reads text lines, draws build/demo.png
    python examples/demo.py --network net.onnx --data samples.npz    any network; input name -> array (N, ...)

The samples that calibrate are not scored. SQNR is 10 log10(sum r^2 / sum (q - r)^2) in dB, summed over all outputs for
all held-out feeds, with r from the float network and q from the scored one.
"""

import argparse
import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import text_lines
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from rich import box
from rich.console import Console
from rich.table import Table

Array = NDArray[Any]
Feed = dict[str, Array]
Answers = dict[str, list[Any]]

MODELS = "float", "quantized", "corrected"
PICTURE = Path(__file__).resolve().parent.parent / "build" / "demo.png"


class ReadLines:
    """PP-OCRv4's text recognizer on rendered lines: 64 calibrate, 150 are held out."""

    def __init__(self) -> None:
        self.network = onnx.load(text_lines.network_path())
        self.characters = text_lines.characters_of(self.network)
        self.lines = text_lines.render_lines(150, seed=1)
        self.calibration = [{"x": pixels} for _, pixels in text_lines.render_lines(64, seed=0)]
        self.held_out = [{"x": pixels} for _, pixels in self.lines]

    def answer(self, outputs: list[Array]) -> str:
        return text_lines.read_line(outputs[0], self.characters)

    def columns(self, answers: Answers) -> dict[str, list[str]]:
        texts = [text for text, _ in self.lines]
        right = [sum(map(text_lines.read_right, texts, readings)) for readings in answers.values()]
        accuracy = [text_lines.character_accuracy(texts, readings) for readings in answers.values()]
        return {
            "lines read right": [f"{count} of {len(texts)}" for count in right],
            "character accuracy": [f"{share:.2%}" for share in accuracy],
        }


class MatchFloat:
    """Any network on any samples: every second batch calibrates, the others are held out."""

    def __init__(self, network: Path, data: Path) -> None:
        self.network = onnx.load(network)
        feeds = feeds_from_samples(self.network, data)
        self.calibration, self.held_out = feeds[::2], feeds[1::2]

    def answer(self, outputs: list[Array]) -> Array:
        return np.ravel(outputs[0].argmax(axis=-1))

    def columns(self, answers: Answers) -> dict[str, list[str]]:
        top_1 = {name: np.concatenate(labels) for name, labels in answers.items()}
        agreement = [np.mean(labels == top_1["float"]) for labels in top_1.values()]
        return {"top-1 as float": [f"{share:.1%}" for share in agreement]}


# `answer` reads the outputs of one run; `columns` maps a column of the table to one cell per model.
Task = ReadLines | MatchFloat


def feeds_from_samples(network: onnx.ModelProto, data: Path) -> list[Feed]:
    """The arrays cut along axis 0 into batches of the network's fixed size, else into single samples."""
    constants = {tensor.name for tensor in network.graph.initializer}
    inputs = {value.name: value.type.tensor_type for value in network.graph.input if value.name not in constants}
    samples = np.load(data)
    if not isinstance(samples, np.lib.npyio.NpzFile):
        raise ValueError(f"{data}: not an .npz file")
    for name in inputs:
        if name not in samples:
            raise ValueError(f"{data}: no array for the input {name!r}, only {', '.join(samples) or 'nothing'}")
    arrays = {
        name: np.atleast_1d(samples[name]).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        for name, tensor in inputs.items()
    }
    if len({len(array) for array in arrays.values()}) != 1:
        raise ValueError(f"{data}: the inputs differ in their number of samples (axis 0)")
    count = len(next(iter(arrays.values())))
    batch = max(1, *(tensor.shape.dim[0].dim_value for tensor in inputs.values()))
    if count < 2 * batch:
        raise ValueError(f"{data}: {count} samples, at least {2 * batch} needed")
    starts = range(0, count - batch + 1, batch)
    return [{name: array[start : start + batch] for name, array in arrays.items()} for start in starts]


def prepare(task: Task, folder: Path) -> None:
    """Write the float network and the calibration feeds.

    Weights in Constant nodes become initializers, as onnxruntime's quantizer quantizes no other weights.
    """
    graph = task.network.graph
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            graph.node.append(node)
    onnx.save(task.network, folder / "float.onnx")
    (folder / "calibration").mkdir()
    for index, feed in enumerate(task.calibration):
        np.savez(folder / "calibration" / f"{index:06}.npz", **feed)  # type: ignore[arg-type]


class FeedReader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[Feed]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def quantize(task: Task, folder: Path) -> None:
    """Static int8 quantization, per tensor, ranges by minimum and maximum (onnxruntime's defaults)."""
    logging.disable(logging.WARNING)
    quantize_static(
        folder / "float.onnx",
        folder / "quantized.onnx",
        FeedReader(task.calibration),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    logging.disable(logging.NOTSET)


def correct(folder: Path) -> None:
    command = shutil.which("biascorr", path=Path(sys.executable).parent)
    if command is None:
        sys.exit(f"error: no biascorr command beside {sys.executable}")
    files = ["float.onnx", "--quantized", "quantized.onnx", "--data", "calibration", "-o", "corrected.onnx"]
    code = subprocess.run([command, "correct", *files], cwd=folder, check=False).returncode
    if code:
        sys.exit(code)


def score(task: Task, folder: Path) -> tuple[Answers, list[str]]:
    """Each model's answers to the held-out feeds, and its SQNR."""
    sessions = {name: ort.InferenceSession(folder / f"{name}.onnx") for name in MODELS}
    answers: Answers = {name: [] for name in MODELS}
    signal, noise = 0.0, dict.fromkeys(MODELS, 0.0)
    for feed in task.held_out:
        outputs = {name: session.run(None, feed) for name, session in sessions.items()}
        signal += energy(outputs["float"])
        for name in MODELS:
            noise[name] += energy(map(partial(np.subtract, dtype=np.float64), outputs[name], outputs["float"]))
            answers[name].append(task.answer(outputs[name]))
    return answers, [decibels(signal, noise[name]) for name in MODELS]


def energy(arrays: Iterable[Array]) -> float:
    return sum(float(np.sum(np.square(array, dtype=np.float64))) for array in arrays)


def decibels(signal: float, noise: float) -> str:
    if not noise:
        return "exact"
    return f"{10 * math.log10(signal / noise):.1f}" if signal else "-inf"


def timed(step: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - start


def table_from_columns(columns: dict[str, list[str]]) -> Table:
    table = Table("model", box=box.SIMPLE_HEAD)
    for title in columns:
        table.add_column(title, justify="right")
    for row in zip(MODELS, *columns.values(), strict=True):
        table.add_row(*row)
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a float network, quantized, and with corrected biases.")
    parser.add_argument("--network", type=Path, help="a float ONNX network; without it, lines of text are read")
    parser.add_argument("--data", type=Path, help="the network's samples: .npz of input name -> array (N, ...)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the text lines go (default: %(default)s)")
    options = parser.parse_args()
    if (options.network is None) != (options.data is None):
        parser.error("--network and --data go together")
    return options


def main() -> None:
    options, console = parse_options(), Console()
    ort.set_default_logger_severity(3)  # errors only
    try:
        task = MatchFloat(options.network, options.data) if options.network else ReadLines()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(task, folder)
        console.print(f"[bold]quantize[/] with {len(task.calibration)} batches")
        quantize_seconds = timed(quantize, task, folder)
        console.print("[bold]correct[/]")
        correct_seconds = timed(correct, folder)
        console.print(f"[bold]score[/] with {len(task.held_out)} other batches")
        answers, sqnr = score(task, folder)
    seconds = ["", f"{quantize_seconds:.1f}", f"{correct_seconds:.1f}"]
    console.print(table_from_columns({**task.columns(answers), "SQNR, dB": sqnr, "seconds": seconds}))
    if isinstance(task, ReadLines):
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        text_lines.save_picture(options.picture, task.lines, answers)
        console.print(f"picture: {options.picture}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
