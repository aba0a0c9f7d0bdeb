"""`biascorr equalize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import BatchSize, Force, MaxSamples, MemoryBudget, Output, Threads
from biascorr.cli.printing import print_equalization
from biascorr.cli.running import run
from biascorr.equalization import equalize as equalization
from biascorr.equalization.result import Equalization


def equalize(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model: .onnx, .tflite, .keras or .h5.")],
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
            reference,
            data,
            iterations=iterations,
            replace_relu6=replace_relu6,
            batch_size=batch_size,
            max_samples=max_samples,
            memory_budget=memory_budget,
            threads=threads,
            progress=progress,
        )

    run(work, output, force, print_equalization, {"reference": reference}, data)
