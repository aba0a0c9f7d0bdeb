"""`biascorr inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import ShowOptions
from biascorr.cli.running import Files, run

EXAMPLE = """\
Example:
  biascorr inspect int8.onnx --reference float.onnx"""


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model, float or quantized: .onnx, .tflite, .keras or .h5.", show_default=False),
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="FLOAT", help="The float model that it was quantized from: shows what its weights lost."),
    ] = None,
    show: ShowOptions = None,  # type: ignore[assignment]
) -> None:
    """Show what is in a model, and what can be corrected.

    Its inputs and outputs, format and quantizer; of each layer, whether it can be corrected and why not, the bits and ranges of
    its weights, and what equalization would gain.
    """

    def work(_: Progress) -> Any:
        from biascorr.inspection.inspect import inspect

        return inspect(model, reference=reference)

    run(work, Files({"model": model, "reference": reference}), show)
