"""`biascorr demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from biascorr.calibration.progress import Progress
from biascorr.cli.options import OUTPUT_PANEL, RunOptions, ShowOptions
from biascorr.cli.running import Files, run

EXAMPLE = """\
Example:
  biascorr demo --models demo"""


def demo(
    network: Annotated[
        str | None,
        typer.Option(metavar="ONNX", help="A float model of your own; without it, lines of text are read.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NPZ", help="Samples of your own: an array (N, ...) for each input.", show_default=False),
    ] = None,
    picture: Annotated[Path, typer.Option(metavar="PNG", help="Where the picture goes.", rich_help_panel=OUTPUT_PANEL)] = Path(
        "demo.png"
    ),
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the three models go; else none is kept.",
            rich_help_panel=OUTPUT_PANEL,
            show_default=False,
        ),
    ] = None,
    running: RunOptions = None,  # type: ignore[assignment]
    show: ShowOptions = None,  # type: ignore[assignment]
) -> None:
    """Show what correction does to what a text recognizer reads.

    It is quantized and corrected, and what it reads before and after is drawn. The network is that of a wheel, which has to be
    installed: pip install --no-deps rapidocr-onnxruntime==1.4.4
    """

    def work(progress: Progress) -> Any:
        from biascorr.demo.demo import demo

        return demo(
            picture=picture,
            network=network,
            data=data,
            models=models,
            force=show.force,
            memory_budget=running.memory_budget,
            threads=running.threads,
            progress=progress,
        )

    run(work, Files({"network": network}, (data,)), show)
