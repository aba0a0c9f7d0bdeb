"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biascorr.calibration.storage import bytes_from_text


def bytes_of(text: str) -> int:
    try:
        return bytes_from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("memory_budget: ")) from None


Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Where the model that is made goes: .onnx, .tflite or .keras.")
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", min=1, help="Samples of an array that make a batch, where the model does not fix that.")
]
MaxSamples = Annotated[int | None, typer.Option(metavar="N", min=1, help="Read no more samples.")]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        parser=bytes_of,
        metavar="BYTES",
        help="Activations held in memory, e.g. 2GB; the rest goes to a temporary folder. By default, half of what is free.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Threads to use. By default, one for each CPU that the container allows.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output file.")]
