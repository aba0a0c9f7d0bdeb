"""`biascorr equalize`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import DataOptions, MaxSamples, ModelOptions, Reference, RunOptions, ShowOptions
from biascorr.cli.running import Files, run

EXAMPLE = """\
Example:
  biascorr equalize float.onnx --data samples.npz -o equalized.onnx"""


def equalize(
    reference: Reference,
    model: ModelOptions,
    samples: DataOptions,
    iterations: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sweeps over all layers. Default: until nothing changes.")
    ] = None,
    replace_relu6: Annotated[
        bool, typer.Option(help="Make every ReLU6 a ReLU, which changes what the model computes.", show_default=False)
    ] = False,
    max_samples: MaxSamples = None,
    running: RunOptions = None,  # type: ignore[assignment]
    show: ShowOptions = None,  # type: ignore[assignment]
) -> None:
    """Even out the ranges of a float model's weights.

    Channels between layers are scaled so that quantization loses less; the model computes the same as before. Samples are not
    needed: they limit what is folded of high biases, and show how far the float outputs move.
    """

    def work(progress: Progress) -> Any:
        from biascorr.equalization.equalize import equalize

        return equalize(
            reference,
            samples.samples(samples.data),
            iterations=iterations,
            replace_relu6=replace_relu6,
            batch_size=samples.batch_size,
            max_samples=max_samples,
            memory_budget=running.memory_budget,
            threads=running.threads,
            progress=progress,
        )

    run(work, Files({"reference": reference}, (samples.data,), model), show)
