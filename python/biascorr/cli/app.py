"""`biascorr`: bias correction from the command line. Needs typer and rich, which each extra brings."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import numpy as np

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'error: the command line needs {error.name}: pip install "biascorr[onnx]"') from None

from biascorr import __version__
from biascorr.adapters.loading import check_output_of, check_same_framework, sizes_by_file
from biascorr.calibration.data import Progress
from biascorr.calibration.storage import TemporaryFolder, bytes_from_text
from biascorr.cli.signals import Signals, StoppedError, leave
from biascorr.correction import correct as correction
from biascorr.correction.metrics import metric_from_name
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.result import Correction
from biascorr.equalization import equalize as equalization
from biascorr.equalization.result import Equalization
from biascorr.graph.layer import without_later_calls
from biascorr.graph.reasons import ReasonCode
from biascorr.report.lines import printable
from biascorr.report.terminal import (
    table_from_chains,
    table_from_changes,
    table_from_left,
    table_from_report,
    table_from_scores,
)
from biascorr.whole_file import check_output

Result = TypeVar("Result", Correction, Equalization)

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
_WEIGHT_BITS = 8
_WIDEST = 10_000  # characters of a line in a file

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
"""Exits with 0 when the output is written, 1 on bad input, 2 on bad usage, 3 when it is written although no layer could be
corrected, 130 on Ctrl-C, 143 on SIGTERM, 129 on SIGHUP."""

_NOTHING_CORRECTED = 3


def _fail(error: object) -> NoReturn:
    print(f"error: {_line(error)}", file=sys.stderr)
    raise SystemExit(1)


def _line(message: object) -> str:
    """What is wrong, in one line without codes that a terminal would act on."""
    text = " ".join(str(message).split())
    if isinstance(message, MemoryError):
        text = f"out of memory{text and f' ({text})'}; a lower --memory-budget or fewer --threads need less"
    return printable(text or type(message).__name__)


def _bytes_from_text(text: str) -> int:
    try:
        return bytes_from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("memory_budget: ")) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"biascorr {__version__}")
        raise typer.Exit


@app.callback()
def biascorr(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Bias correction for quantized neural networks."""


Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Where the model that is made goes: .onnx, .tflite or .keras.")
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", min=1, help="Samples of an array that make a batch, where the model does not fix that.")
]
MaxSamples = Annotated[int | None, typer.Option(metavar="N", min=1, help="Read no more samples.")]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        parser=_bytes_from_text,
        metavar="BYTES",
        help="Activations held in memory, e.g. 2GB; the rest goes to a temporary folder. By default, half of what is free.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Threads to use. By default, one for each CPU that the container allows.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output file.")]


@app.command()
def correct(
    model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model: .onnx, .tflite, .keras or .h5.")],
    output: Output,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR_OR_NPZ",
            help="Calibration samples: an .npz or .npy file, or a folder of them, one batch each. Analytical needs none.",
        ),
    ] = None,
    quantized: Annotated[
        Path | None,
        typer.Option(
            metavar="QUANTIZED",
            help="The model quantized: .onnx (QDQ, QOperator, MatMulNBits) or .tflite. Without it, quantization is simulated.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"How shifts are found: {', '.join(correction.METHODS)}.")] = "auto",
    strength: Annotated[
        float, typer.Option(help="The part of each shift that is corrected, with a method that has one.")
    ] = 1.0,
    shrunk: Annotated[
        bool, typer.Option("--shrunk", help="Correct less where samples disagree, with a method that has a strength.")
    ] = False,
    weight_bits: Annotated[
        int, typer.Option(metavar="N", min=2, max=32, help="Simulated quantization: bits of the weights, 2 to 32.")
    ] = _WEIGHT_BITS,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="Simulated quantization: a scale per output channel.")
    ] = False,
    equalize: Annotated[
        bool, typer.Option("--equalize", help="Simulated quantization: also of the float model equalized.")
    ] = False,
    fold: Annotated[
        bool, typer.Option("--fold", help="Simulated quantization: fold batch normalizations into layers first.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER", help="Correct only these layers: a name, a pattern with * and ?, an operator. Repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="Leave these layers as they are, named the same way. Repeatable.")
    ] = None,
    new_biases: Annotated[str, typer.Option(help="Layers without a bias: add one, or skip them.", metavar="add|skip")] = "add",
    batch_size: BatchSize = 1,
    max_samples: MaxSamples = 300,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR_OR_NPZ", help="Other samples to score on: then none of the calibration samples are held out."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Chooses the samples that are held out.")] = 0,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="What is best, greater is better: metric(outputs, reference) of a sample, or evaluate(run) of a model.",
        ),
    ] = None,
    memory_budget: MemoryBudget = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Correct the biases of a quantized model, so that its outputs come nearer to those of the float model."""
    if data is None and method in correction.METHODS and method != "analytical":
        raise typer.BadParameter(f"missing, method {method} needs samples", param_hint="--data")

    def work(progress: Progress) -> Correction:
        if quantized and (weight_bits != _WEIGHT_BITS or per_channel or equalize or fold):
            raise ValueError(
                "--weight-bits, --per-channel, --equalize and --fold are of simulated quantization: not with --quantized; "
                "equalize the float model (biascorr equalize), then quantize it"
            )
        return correction.correct(
            model,
            data,
            quantized=quantized,
            method=method,
            strength=strength,
            shrunk=shrunk,
            equalize=equalize,
            fold=fold,
            new_biases=new_biases,
            only=only or None,
            exclude=exclude or (),
            quant_params=None if quantized else QuantParams(weight_bits=weight_bits, per_channel=per_channel),
            batch_size=batch_size,
            max_samples=max_samples,
            validation=validation,
            seed=seed,
            metric=None if metric is None else metric_from_name(metric),
            memory_budget=memory_budget,
            threads=threads,
            progress=progress,
        )

    models = {"model": model, "quantized": quantized}
    _run(work, output, force, _print_correction, models, data, validation)


@app.command()
def equalize(
    model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model: .onnx, .tflite, .keras or .h5.")],
    output: Output,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR_OR_NPZ",
            help="Samples as `biascorr correct` takes them: they limit what is folded of high biases, and show how far the "
            "float outputs move.",
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sweeps over all layers. By default, until nothing changes.")
    ] = None,
    replace_relu6: Annotated[
        bool, typer.Option("--replace-relu6", help="Make every ReLU6 a ReLU, which changes what the model computes.")
    ] = False,
    batch_size: BatchSize = 1,
    max_samples: MaxSamples = None,
    memory_budget: MemoryBudget = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Scale channels between the layers of a float model, so that quantization loses less of their weights."""

    def work(progress: Progress) -> Equalization:
        return equalization.equalize(
            model,
            data,
            iterations=iterations,
            replace_relu6=replace_relu6,
            batch_size=batch_size,
            max_samples=max_samples,
            memory_budget=memory_budget,
            threads=threads,
            progress=progress,
        )

    _run(work, output, force, _print_equalization, {"model": model}, data)


def _run(
    work: Callable[[Progress], Result],
    output: Path,
    force: bool,
    print_result: Callable[[Result, Path], None],
    models: Mapping[str, Path | None],
    *data: Path | None,
) -> None:
    """Writes what the work gives and prints it; ends with one line if anything is in the way."""
    signals = Signals()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # lines of TensorFlow would stand among ours
    for message in (".* made the outputs worse", "not folded: "):
        warnings.filterwarnings("ignore", message, UserWarning)  # the notes say it
    warnings.formatwarning = lambda message, *_: f"warning: {_line(message)}\n"
    _replace_what_cannot_be_encoded()
    try:
        _check_output(output, force, models, *data)
        console = Console(stderr=True)
        with _temporary_folder():  # saving may need one too
            with Bar(*_COLUMNS, console=console, disable=not console.is_terminal) as bar:
                task = bar.add_task("", total=None)

                def progress(step: str, done: int, total: int | None) -> None:
                    bar.update(task, description=step, completed=done, total=total)

                result = signals.wait_for(lambda: work(progress))
            result.save(output, force=force)
    except StoppedError as stopped:
        leave(stopped.number, "nothing was written")
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        _fail(error)
    signals.leave_from_now_on(f"but {printable(output)} is written")
    try:
        print_result(result, output)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more fails at exit
        if not isinstance(error, BrokenPipeError):  # who reads along may leave
            _fail(f"{output} is written, but the report cannot be printed: {error}")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Lets the caller know, where rich would end with an error."""
        raise


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """Has all temporary folders made inside one, which can be removed while a thread still writes there.

    It stays where they are made, or that thread would go on elsewhere.
    """
    try:
        folder = TemporaryFolder()
    except OSError:  # a run within its memory budget needs none
        yield
        return
    tempfile.tempdir = str(folder.path)
    try:
        yield
    finally:
        folder.cleanup()


def _replace_what_cannot_be_encoded() -> None:
    """Names of layers may have letters that the terminal has not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _check_output(output: Path, force: bool, models: Mapping[str, Path | None], *data: Path | None) -> None:
    """The output is another file than all that is read, and has the name and the room for a model like the last one."""
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists; --force overwrites it")
    check_output(output, force=force)
    given = [(path, name) for name, path in models.items() if path is not None]
    if len(given) > 1:
        check_same_framework(given[0][0], given[1][0])
    check_output_of(given[-1][0], output, given[-1][1])
    sizes = list(itertools.starmap(sizes_by_file, given))
    samples = [each.iterdir() if each.is_dir() else [each] for each in data if each is not None]
    for file in itertools.chain(*sizes, *samples):
        if output.exists() and file.exists() and file.samefile(output):
            raise ValueError(f"{output}: it is an input, {file}; give the output another name")
    check_output(output, force=force, size=sum(sizes[-1].values()))


def _print_correction(result: Correction, output: Path) -> None:
    if result.equalization is not None:
        _print_steps(result.equalization)
    scores = table_from_scores(result.scores, result.method, result.deployed)
    _print_tables(table_from_report(result.report), scores)
    for note in result.notes:
        print(f"note: {printable(note)}")
    corrected = sum(layer.method is not None for layer in result.report)
    how = f"by {result.choice.label} " if corrected else ""
    is_equalized = ", equalized" if result.choice.is_equalized else ", not equalized"
    equalized = "" if result.equalization is None else is_equalized
    layers = f"{corrected} of {len(result.report)} layers corrected"
    kind = "; a float model: quantize it now" if result.is_simulated else ""
    if result.choice.method == "none" and len(result.scores) > 1 and len(result.deployed) < 2:
        print("no candidate is surely better than the uncorrected model, in SQNR, noise and divergence, or by the metric")
    if result.is_refitted:
        print(f"{result.choice.label} was chosen on held-out samples, then fitted to all samples")
    print(f"{printable(output)}: {layers} {how}from {result.samples} samples{equalized}{kind}", flush=True)
    if not corrected and result.left != ReasonCode.NOT_BETTER():
        print(f"nothing could be corrected: {result.left or 'the model has no layers'}", flush=True)
        raise SystemExit(_NOTHING_CORRECTED)


def _print_equalization(result: Equalization, output: Path) -> None:
    _print_steps(result)
    scaled = len({layer.name for each in result.chains for layer in each.chain.layers})
    layers = f"{scaled} of {len(without_later_calls(result.network.layers))} layers scaled"
    print(f"{printable(output)}: {len(result.folds)} batch normalizations folded, {layers}", flush=True)


def _print_steps(result: Equalization) -> None:
    _print_tables(table_from_chains(result.chains, result.high_biases), table_from_left(result.reasons))
    if result.changes:
        _print_tables(table_from_changes(result.changes))
    elif result.is_anything_done:
        print("change of the float outputs: not measured, no --data")
    if silent := sum(np.count_nonzero(each.silent) for each in result.chains):
        print(f"note: {silent} channels pass on nothing, their weights became 0")
    if result.replaced:
        print(f"note: {len(result.replaced)} ReLU6 became ReLU")


def _print_tables(*tables: Table) -> None:
    console = _Console()
    anywhere = console.options.update(width=_WIDEST)
    for table in (each for each in tables if each.row_count):
        if not console.is_terminal:
            console.width = max(console.width, console.measure(table, options=anywhere).maximum)
        console.print(table)
