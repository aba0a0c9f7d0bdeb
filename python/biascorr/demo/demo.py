"""`demo`: quantizes a network, corrects its biases, and scores float, quantized and corrected on samples of their own.

The samples that calibrate are not scored. SQNR is 10 log10(sum r^2 / sum (q - r)^2) in dB, summed over all outputs for all
held-out feeds, with r from the float network and q from the scored one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biascorr import __version__
from biascorr.adapters.loading import network_from_model
from biascorr.arguments import check_flags
from biascorr.calibration.progress import Progress
from biascorr.calibration.storage import TemporaryFolder
from biascorr.correction.correct import correct
from biascorr.graph.network import require_biases, versions_of
from biascorr.report.records import Record, plain
from biascorr.report.reported import Reported
from biascorr.whole_file import check_output, whole_file

Array = NDArray[Any]
Feed = dict[str, Array]
Answers = dict[str, list[Any]]
T = TypeVar("T")

MODELS = "float", "quantized", "corrected"

_OPERATORS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantized."""

_EXTRA = 'the demo needs {}: pip install "biascorr[demo]"'


@dataclass(frozen=True, eq=False, repr=False)
class Demonstration(Reported):
    """What the demo found.

    Parameters
    ----------
    columns : mapping from str to sequence
        By title, a value of each model: float, quantized, corrected.
    calibrated, scored : int
        The batches that calibrated, and the others that were scored.
    picture : Path or None
        Where the picture is.
    models : Path or None
        The folder with the three models.
    versions : mapping from str to str
        Of what ran.
    command : str or None
        The command that does the same again; None where it was none.
    """

    columns: Mapping[str, Sequence[float | str | None]]
    calibrated: int
    scored: int
    picture: Path | None = None
    models: Path | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None

    @property
    def cells(self) -> dict[str, list[str]]:
        """The columns as text, the models first."""
        return {"model": list(MODELS)} | {title: [_text(title, each) for each in row] for title, row in self.columns.items()}

    def to_dict(self) -> Record:
        rows = zip(MODELS, *self.columns.values())
        return {
            "kind": "demo",
            "biascorr": __version__,
            "calibrated": self.calibrated,
            "scored": self.scored,
            "table": self.cells,
            "models": [plain(dict(zip(("name", *self.columns), row))) for row in rows],
            "picture": None if self.picture is None else str(self.picture),
            "folder": None if self.models is None else str(self.models),
            "versions": dict(self.versions),
            "command": self.command,
        }


def _text(title: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if math.isinf(value):
        return "exact" if value > 0 else "-inf"
    return f"{value:.2%}" if title == "character accuracy" else f"{value:.1%}" if "top-1" in title else f"{value:.1f}"


def demo(
    *,
    picture: str | PathLike[str] | None = "demo.png",
    network: str | PathLike[str] | None = None,
    data: str | PathLike[str] | None = None,
    models: str | PathLike[str] | None = None,
    force: bool = False,
    memory_budget: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Demonstration:
    """Quantizes a text recognizer, corrects it, has all three models read lines of text, and draws what they read.

    The network is that of the wheel rapidocr-onnxruntime, which has to be installed; nothing is downloaded.

    Parameters
    ----------
    picture : path, optional
        Where the picture goes. None: none is drawn. With a network of your own, there is none.
    network, data : path, optional
        A float ONNX model of your own, and samples: an .npz file with an array (N, ...) for each input. Every second batch
        calibrates, the others are scored.
    models : path, optional
        The folder that the three models are written to. None: they are not kept.
    force : bool
        Whether existing files are overwritten.
    memory_budget, threads : optional
        As in :func:`biascorr.correct`.
    progress : callable, optional
        As in :func:`biascorr.correct`, of the correction.

    Returns
    -------
    Demonstration
        The figures.

    Raises
    ------
    FileExistsError
        A file exists and `force` is not set.
    FileNotFoundError
        There is no text recognizer, or no such file.
    ImportError
        What draws or runs is not installed (``pip install "biascorr[demo]"``).
    OSError
        A file cannot be written.
    ValueError
        The network and the data do not go together, or a file would be written over one of them.
    """
    check_flags(force=force)
    if (network is None) != (data is None):
        raise ValueError("network and data go together")
    drawn = None if picture is None or network is not None else Path(picture)
    kept = None if models is None else Path(models)
    places = {name: kept / f"{name}.onnx" for name in MODELS} if kept is not None else {}
    for path in filter(None, (drawn, *places.values())):
        if path.parent.is_dir() or path is drawn:
            check_output(path, force=force)
        for name, source in {"network": network, "data": data}.items():
            if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
                raise ValueError(f"{path}: it is an input, {name}; give the output another folder")
    task = _needed(lambda: _task(network, data))
    folder = TemporaryFolder()
    try:
        options = {"memory_budget": memory_budget, "threads": threads, "progress": progress}
        found = _measured(task, folder.path, options)
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
        for name, path in places.items():
            with whole_file(path, force=force) as temporary:
                temporary.write_bytes((folder.path / f"{name}.onnx").read_bytes())
    finally:
        folder.cleanup()
    answers, columns, versions = found
    if drawn is not None:
        with whole_file(drawn, force=force) as temporary:
            task.draw(temporary, answers)
    return Demonstration(columns, len(task.calibration), len(task.held_out), drawn, kept, versions)


def _needed(work: Callable[[], T]) -> T:
    try:
        return work()
    except ImportError as error:
        raise ImportError(_EXTRA.format(error.name)) from error


class Task:
    """A network and samples, and how what it gives out is judged.

    Parameters
    ----------
    network : bytes
        The float model.
    calibration, held_out : list of dict
        Feeds by input name.
    """

    def __init__(self, network: Any, calibration: list[Feed], held_out: list[Feed]) -> None:
        self.network = network
        self.calibration = calibration
        self.held_out = held_out

    def answer(self, outputs: list[Array]) -> Any:
        """What the outputs of one run say."""
        return np.ravel(outputs[0].argmax(axis=-1))

    def columns(self, answers: Answers) -> dict[str, list[float | str | None]]:
        """By title, a value of each model."""
        top_1 = {name: np.concatenate(labels) for name, labels in answers.items()}
        return {"top-1 as float": [float(np.mean(labels == top_1["float"])) for labels in top_1.values()]}

    def draw(self, path: Path, answers: Answers) -> None:
        """Draws the answers."""


class ReadLines(Task):
    """PP-OCRv4's text recognizer on rendered lines: 64 calibrate, 150 are held out."""

    def __init__(self) -> None:
        import onnx

        from biascorr.demo import text_lines

        self._text = text_lines
        network = onnx.load(text_lines.network_path())
        self._characters = text_lines.characters_of(network)
        self._lines = text_lines.render_lines(150, seed=1)
        calibration = [{"x": pixels} for _, pixels in text_lines.render_lines(64, seed=0)]
        super().__init__(network, calibration, [{"x": pixels} for _, pixels in self._lines])

    def answer(self, outputs: list[Array]) -> str:
        return self._text.read_line(outputs[0], self._characters)

    def columns(self, answers: Answers) -> dict[str, list[float | str | None]]:
        texts = [text for text, _ in self._lines]
        right = [sum(map(self._text.read_right, texts, readings)) for readings in answers.values()]
        accuracy = [self._text.character_accuracy(texts, readings) for readings in answers.values()]
        return {"lines read right": [f"{count} of {len(texts)}" for count in right], "character accuracy": [*accuracy]}

    def draw(self, path: Path, answers: Answers) -> None:
        self._text.save_picture(path, self._lines, answers)


def _task(network: str | PathLike[str] | None, data: str | PathLike[str] | None) -> Task:
    if network is None or data is None:
        return ReadLines()
    import onnx

    if not Path(network).is_file():
        raise FileNotFoundError(f"network: no such file: {os.fspath(network)}")
    model = onnx.load(network)
    feeds = feeds_from_samples(model, Path(data))
    return Task(model, feeds[::2], feeds[1::2])


def feeds_from_samples(network: Any, data: Path) -> list[Feed]:
    """The arrays cut along axis 0 into batches of the network's fixed size, else into single samples."""
    import onnx

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


def _measured(
    task: Task, folder: Path, options: Mapping[str, Any]
) -> tuple[Answers, dict[str, Sequence[float | str | None]], dict[str, str]]:
    """The answers of each model, the columns, and the versions of what ran."""
    from biascorr.adapters.onnx.static_quantization import quantized_plainly

    float_path, quantized_path, corrected_path = (folder / f"{name}.onnx" for name in MODELS)
    quantize_seconds, _ = _timed(
        lambda: quantized_plainly(task.network, float_path, quantized_path, task.calibration, _OPERATORS)
    )
    given: dict[str, Any] = {"quantized": quantized_path, **options}
    correct_seconds, correction = _timed(lambda: correct(float_path, task.calibration, **given))
    correction.save(corrected_path)
    answers, sqnrs = _scored(task, folder, options["threads"] or 0)
    seconds: list[float | str | None] = [None, quantize_seconds, correct_seconds]
    columns: dict[str, Sequence[float | str | None]] = {**task.columns(answers), "SQNR, dB": sqnrs, "seconds": seconds}
    return answers, columns, dict(versions_of(correction.network))


def _scored(task: Task, folder: Path, threads: int) -> tuple[Answers, list[float]]:
    """Each model's answers to the held-out feeds, and its SQNR."""
    networks = {name: require_biases(network_from_model(folder / f"{name}.onnx", name), name) for name in MODELS}
    runs = {name: network.deployed(threads=threads) for name, network in networks.items()}
    answers: Answers = {name: [] for name in MODELS}
    signal, noise = 0.0, dict.fromkeys(MODELS, 0.0)
    for feed in task.held_out:
        outputs = {name: list(run(feed).values()) for name, run in runs.items()}
        signal += _energy(outputs["float"])
        for name in MODELS:
            noise[name] += _energy(map(partial(np.subtract, dtype=np.float64), outputs[name], outputs["float"]))
            answers[name].append(task.answer(outputs[name]))
    return answers, [_decibels(signal, noise[name]) for name in MODELS]


def _energy(arrays: Iterable[Array]) -> float:
    return sum(float(np.sum(np.square(array, dtype=np.float64))) for array in arrays)


def _decibels(signal: float, noise: float) -> float:
    """Infinite where there is no noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _timed(step: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = step()
    return time.perf_counter() - start, found
