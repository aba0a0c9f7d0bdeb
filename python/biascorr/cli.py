"""`biascorr`: bias correction from the command line. Needs typer and rich, which the extra `biascorr[onnx]` brings."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(f'error: the command line needs {error.name}: pip install "biascorr[onnx]"') from None

from biascorr import __version__
from biascorr.model import correction
from biascorr.model.correction import Correction
from biascorr.model.quant_params import QuantParams
from biascorr.report.table import table_from_report

_INTERRUPTED = 130
"""What a shell reports of a command that Ctrl-C ended."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
"""Exits with 0 when the output is written, 1 on bad input, 2 on bad usage, 130 on Ctrl-C."""


def _fail(message: object, status: int = 1) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


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
    """Takes the bias that quantization leaves in neural networks out again."""


@app.command()
def correct(
    model: Annotated[Path, typer.Argument(metavar="FLOAT.onnx", help="The float model.")],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR_OR_NPZ", help="Calibration samples: an .npz or .npy file, or a folder of them, one batch each."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Where the corrected model goes.")],
    quantized: Annotated[
        Path | None, typer.Option(metavar="Q.onnx", help="The model quantized (QDQ). Without it, quantization is simulated.")
    ] = None,
    method: Annotated[str, typer.Option(help="How shifts are found.")] = "auto",
    weight_bits: Annotated[int, typer.Option(help="Simulated quantization: bits of the weights.")] = 8,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="Simulated quantization: a scale per output channel.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing output file.")] = False,
) -> None:
    """Correct the biases of a quantized model, so that its layers' mean outputs are those of the float model."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names of layers may have letters that the terminal has not
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        if output.exists() and not force:
            raise FileExistsError(f"{output} exists; --force overwrites it")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"{output}: no such folder: {output.parent}")
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            result = correction.correct(
                model,
                data,
                quantized=quantized,
                method=method,
                quant_params=None if quantized else QuantParams(weight_bits=weight_bits, per_channel=per_channel),
                progress=lambda step, done, total: bar.update(task, description=step, completed=done, total=total),
            )
        result.save(output, force=force)
    except KeyboardInterrupt:
        _fail("interrupted, nothing was written", _INTERRUPTED)
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        _fail(error or type(error).__name__)
    try:
        _print_report(result, output)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more fails at exit
        if not isinstance(error, BrokenPipeError):  # who reads along may leave
            _fail(f"{output} is written, but the report cannot be printed: {error}")


def _print_report(result: Correction, output: Path) -> None:
    table = table_from_report(result.report)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table).maximum)
    console.print(table)
    corrected = sum(layer.method is not None for layer in result.report)
    print(f"{output}: {corrected} of {len(result.report)} layers corrected from {result.samples} samples", flush=True)
