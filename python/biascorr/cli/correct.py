"""`biascorr correct`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import BatchSize, Force, MaxSamples, MemoryBudget, Output, Threads
from biascorr.cli.printing import print_correction
from biascorr.cli.running import run
from biascorr.correction import correct as correction
from biascorr.correction.metrics import metric_from_name
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.result import Correction
from biascorr.typing import Method, NewBiases

_WEIGHT_BITS = 8


def correct(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model: .onnx, .tflite, .keras or .h5.")],
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
            reference,
            data,
            quantized=quantized,
            method=cast(Method, method),
            strength=strength,
            shrunk=shrunk,
            equalize=equalize,
            fold=fold,
            new_biases=cast(NewBiases, new_biases),
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

    models = {"reference": reference, "quantized": quantized}
    run(work, output, force, print_correction, models, data, validation)
