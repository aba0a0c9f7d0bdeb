"""`biascorr compare`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import DataOptions, MaxSamples, Reference, RunOptions, ShowOptions
from biascorr.cli.running import Files, run

EXAMPLE = """\
Example:
  biascorr compare float.onnx int8.onnx corrected.onnx --data samples.npz"""


def compare(
    reference: Reference,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="The models that are compared with it.", show_default=False)
    ],
    samples: DataOptions,
    max_samples: MaxSamples = 300,
    running: RunOptions = None,  # type: ignore[assignment]
    show: ShowOptions = None,  # type: ignore[assignment]
) -> None:
    """Compare the outputs of models with those of a float one.

    By SQNR, divergence, top-1 agreement, largest change and seconds. Each model runs as it is deployed, by its own runtime with
    its default options.
    """
    if samples.data is None:
        raise typer.BadParameter("missing, models are compared on samples", param_hint="--data")

    def work(progress: Progress) -> Any:
        from biascorr.inspection.compare import compare

        return compare(
            reference,
            models,
            samples.samples(samples.data),
            batch_size=samples.batch_size,
            max_samples=max_samples,
            memory_budget=running.memory_budget,
            threads=running.threads,
            progress=progress,
        )

    given = {"reference": reference} | {f"models[{k}]": each for k, each in enumerate(models)}
    run(work, Files(given, (samples.data,)), show)
