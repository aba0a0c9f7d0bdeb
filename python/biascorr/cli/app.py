"""`biascorr`: bias correction from the command line. Needs typer and rich, which each extra brings."""

from __future__ import annotations

from typing import Annotated

try:
    import rich  # noqa: F401 (so that what is missing is said before anything else)
    import typer
except ImportError as error:
    raise SystemExit(f'error: the command line needs {error.name}: pip install "biascorr[onnx]"') from None

from biascorr import __version__
from biascorr.cli.correct import correct
from biascorr.cli.equalize import equalize

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
"""Exits with 0 when the output is written, 1 on bad input, 2 on bad usage, 3 when it is written although no layer could be
corrected, 130 on Ctrl-C, 143 on SIGTERM, 129 on SIGHUP."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"biascorr {__version__}")
        raise typer.Exit


@app.callback()
def biascorr(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Bias correction for quantized neural networks."""


for command in (correct, equalize):
    app.command()(command)
