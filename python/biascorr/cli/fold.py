"""`biascorr fold`."""

from __future__ import annotations

from typing import Any

from biascorr.calibration.progress import Progress
from biascorr.cli.options import ModelOptions, Reference, ShowOptions
from biascorr.cli.running import Files, run

EXAMPLE = """\
Example:
  biascorr fold float.onnx -o folded.onnx"""


def fold(reference: Reference, model: ModelOptions, show: ShowOptions) -> None:
    """Fold batch normalizations of a float model into its layers.

    Quantizers do this before they round weights. The model computes the same as before.
    """

    def work(_: Progress) -> Any:
        from biascorr.equalization.fold import fold

        return fold(reference)

    run(work, Files({"reference": reference}, model=model), show)
