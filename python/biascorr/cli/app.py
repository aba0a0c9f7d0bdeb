"""`biascorr`: bias correction from the command line. Needs typer and rich, which the extra `cli` brings."""

from __future__ import annotations

from types import ModuleType
from typing import Annotated

try:
    import rich  # noqa: F401 (so that what is missing is said before anything else)
    import typer
except ImportError as error:
    raise SystemExit(f'error: the command line needs {error.name}: pip install "biascorr[onnx]" (or tflite, keras)') from None

from biascorr import __version__
from biascorr.cli import compare, correct, demo, equalize, fold, inspect, quantize
from biascorr.cli.helping import Command, Commands
from biascorr.cli.options import with_groups

STATUS = """\
Exit status:
  0    done
  1    an input or output is wrong; nothing is written but what the error names
  2    the command line is not as it should be
  3    the model is written, but no layer of it could be corrected
  129  hung up; 130 interrupted (Ctrl-C); 143 terminated"""

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_HELP,
    epilog=f"Examples:\n  biascorr COMMAND --help\n  {correct.EXAMPLE.partition(chr(10))[2].strip()}\n\n{STATUS}",
)


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
    """Bias correction for quantized neural networks: measure, correct, compare."""


COMMANDS: tuple[ModuleType, ...] = (quantize, correct, compare, inspect, equalize, fold, demo)

for module in COMMANDS:
    name = module.__name__.rpartition(".")[2]
    app.command(name, cls=Command, epilog=module.EXAMPLE, context_settings=_HELP)(with_groups(getattr(module, name)))
