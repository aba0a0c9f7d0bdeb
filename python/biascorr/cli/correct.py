"""`biascorr correct`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import (
    RUN_PANEL,
    SIMULATED_PANEL,
    CorrectionOptions,
    DataOptions,
    MaxSamples,
    ModelOptions,
    Reference,
    RunOptions,
    ShowOptions,
)
from biascorr.cli.running import NOTHING_CORRECTED, Files, run

EXAMPLE = """\
Example:
  biascorr correct float.onnx --quantized int8.onnx --data images/ \\
      --preset imagenet -o corrected.onnx"""

_WEIGHT_BITS = 8

_CONNECT = "30s"
"""How long a scheduler has to answer."""


def _simulated(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=SIMULATED_PANEL, show_default=False)


def _run(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=RUN_PANEL, show_default=False)


def correct(
    reference: Reference,
    model: ModelOptions,
    samples: DataOptions,
    correction: CorrectionOptions,
    quantized: Annotated[
        str | None,
        typer.Option(
            metavar="QUANTIZED",
            help="The model quantized: .onnx (QDQ, QOperator, MatMulNBits) or .tflite. Without it, quantization is simulated.",
        ),
    ] = None,
    max_samples: MaxSamples = 300,
    weight_bits: Annotated[
        int, typer.Option(metavar="N", min=2, max=32, help="Bits of the weights, 2 to 32.", rich_help_panel=SIMULATED_PANEL)
    ] = _WEIGHT_BITS,
    per_channel: Annotated[bool, _simulated("A scale per output channel.")] = False,
    equalize: Annotated[bool, _simulated("Also try the float model equalized.")] = False,
    fold: Annotated[bool, _simulated("Fold batch normalizations into layers first.")] = False,
    running: RunOptions = None,  # type: ignore[assignment]
    scheduler: Annotated[
        str | None,
        _run(
            "ADDRESS", "Run on the workers of this Dask scheduler: tcp://host:8786. --threads and --memory-budget: of a worker."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, _run("DIR", "Keep what is found here; started again with the same folder, a run that was killed goes on.")
    ] = None,
    show: ShowOptions = None,  # type: ignore[assignment]
) -> None:
    """Correct the biases of a quantized model.

    Its outputs come nearer to those of the float model, or it stays as it is. Without a model that is quantized, quantization
    of the weights is simulated, and the float model is written with biases that make up for it.
    """
    if samples.data is None and correction.method != "analytical":
        raise typer.BadParameter(f"missing, method {correction.method} needs samples", param_hint="--data")
    if quantized and (weight_bits != _WEIGHT_BITS or per_channel or equalize or fold):
        raise typer.BadParameter(
            "--weight-bits, --per-channel, --equalize and --fold are of simulated quantization: not with --quantized; "
            "equalize the float model (biascorr equalize), then quantize it",
            param_hint="--quantized",
        )

    def work(progress: Progress) -> Any:
        from biascorr.correction.correct import correct
        from biascorr.correction.quant_params import QuantParams

        with _connected(scheduler) as client:
            return correct(
                reference,
                samples.samples(samples.data),
                quantized=quantized,
                **correction.keywords(samples),
                equalize=equalize,
                fold=fold,
                quant_params=None if quantized else QuantParams(weight_bits=weight_bits, per_channel=per_channel),
                batch_size=samples.batch_size,
                max_samples=max_samples,
                memory_budget=running.memory_budget,
                threads=running.threads,
                client=client,
                checkpoint=checkpoint,
                progress=progress,
            )

    files = Files({"reference": reference, "quantized": quantized}, (samples.data, correction.validation), model)
    run(work, files, show, status_of)


@contextlib.contextmanager
def _connected(scheduler: str | None) -> Iterator[Any]:
    """A client of the Dask scheduler at an address; None without one. Raises ValueError where there is none."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise ImportError(f'--scheduler needs {error.name}: pip install "biascorr[dask]"') from error
    try:
        client: Any = Client(scheduler, timeout=_CONNECT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ValueError(f"--scheduler: nothing answers at {scheduler}: {error}; start it: dask scheduler") from error
    with client:
        yield client


def status_of(record: dict[str, Any]) -> int:
    """The exit status of a correction: of one of which nothing could be corrected, one of its own."""
    from biascorr.report.lines import left_because

    return 0 if left_because(record) is None else NOTHING_CORRECTED
