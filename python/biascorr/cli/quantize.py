"""`biascorr quantize`."""

from __future__ import annotations

from typing import Annotated, Any, cast, get_args

import typer

from biascorr.adapters.frameworks import Framework, framework_of_name
from biascorr.calibration.progress import Progress
from biascorr.cli.correct import status_of
from biascorr.cli.options import (
    QUANTIZATION_PANEL,
    CorrectionOptions,
    DataOptions,
    MaxSamples,
    ModelOptions,
    RunOptions,
    ShowOptions,
    completed,
    one_of,
)
from biascorr.cli.running import Files, fail, run
from biascorr.typing import Calibration, QuantizedType

EXAMPLE = """\
Example:
  biascorr quantize float.onnx --data images/ --preset imagenet -o int8.onnx"""

TYPES: tuple[str, ...] = get_args(QuantizedType)
CALIBRATIONS: tuple[str, ...] = get_args(Calibration)


def _choice(text: str, *allowed: str) -> Any:
    return typer.Option(
        metavar="NAME",
        parser=one_of(*allowed),
        autocompletion=completed(*allowed),
        help=f"{text}: {', '.join(allowed)}.",
        rich_help_panel=QUANTIZATION_PANEL,
    )


def _flag(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=QUANTIZATION_PANEL, show_default=False)


def quantize(
    reference: Annotated[str, typer.Argument(metavar="FLOAT", help="The float model, .onnx.", show_default=False)],
    model: ModelOptions,
    samples: DataOptions,
    correction: CorrectionOptions,
    per_channel: Annotated[bool, _flag("One scale for all weights of a layer, not one for each output channel.")] = True,
    weight_type: Annotated[str, _choice("Type of quantized weights", *TYPES)] = "int8",
    activation_type: Annotated[str, _choice("Type of quantized activations", *TYPES)] = "int8",
    calibration: Annotated[str, _choice("How the range of a tensor is found", *CALIBRATIONS)] = "minmax",
    op_types: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERATOR",
            help="Quantize this operator, such as Conv; repeatable; all: every one that onnxruntime can. Default: those with "
            "weights, Relu and Clip.",
            rich_help_panel=QUANTIZATION_PANEL,
        ),
    ] = None,
    reduce_range: Annotated[
        bool | None, _flag("Weights of 7 bits, for x86 CPUs without VNNI. Default: where 8 bits saturate on this CPU.")
    ] = None,
    equalize: Annotated[bool, _flag("Do not try the model equalized.")] = True,
    max_samples: MaxSamples = 300,
    running: RunOptions = None,  # type: ignore[assignment]
    show: ShowOptions = None,  # type: ignore[assignment]
) -> None:
    """Quantize a float ONNX model and correct its biases.

    The best int8 model in one go: onnxruntime prepares and quantizes it, QDQ format; then biases are corrected, and the model
    is equalized before where that scores better.
    """
    if samples.data is None:
        raise typer.BadParameter("missing, ranges of activations need samples", param_hint="--data")
    if framework_of_name(reference) not in (None, Framework.ONNX):
        from biascorr.correction.quantize import check_framework

        try:
            check_framework(reference)
        except TypeError as error:
            fail(error)

    def work(progress: Progress) -> Any:
        from biascorr.correction.quantize import quantize

        return quantize(
            reference,
            samples.samples(samples.data),
            per_channel=per_channel,
            weight_type=cast(Any, weight_type),
            activation_type=cast(Any, activation_type),
            calibration=cast(Any, calibration),
            op_types=None if not op_types else () if op_types == ["all"] else op_types,
            reduce_range=reduce_range,
            equalize=equalize,
            batch_size=samples.batch_size,
            max_samples=max_samples,
            memory_budget=running.memory_budget,
            threads=running.threads,
            progress=progress,
            **correction.keywords(samples),
        )

    run(work, Files({"reference": reference}, (samples.data, correction.validation), model), show, status_of)
