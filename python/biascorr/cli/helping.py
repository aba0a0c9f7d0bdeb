"""How the help of a command looks: options in groups, an example, all within 80 columns."""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from biascorr.cli.options import PANELS

_COLUMN = 28
"""Columns of the names of options at most; what is longer has a line of its own."""

_MORE = {
    "correct": "give the quantized model as --quantized",
    "quantize": "give samples as --data",
    "inspect": "give the float model as --reference",
}
"""What may be meant by one argument too many."""

_ORDER = ("Arguments", "Options", *PANELS)


class Command(typer.core.TyperCommand):
    """A command whose options are shown in groups, and whose epilog, an example, is kept as it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses empty values, as of variables of a shell that are not set: the empty path is the current folder."""
        for before, each in zip(["", *args], args):
            name, equals, value = each.partition("=")
            if not each or (each.startswith("--") and equals and not value):
                hint = name or (before if before.startswith("-") else None)
                raise typer.BadParameter("an empty value", ctx, param_hint=hint)
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:
            if self.name in _MORE and "unexpected extra argument" in str(getattr(error, "message", "")):
                error.message += f"; {_MORE[self.name]}"  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return ["[OPTIONS]", *(str(each.metavar) for each in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                names, text = record[0], record[1].replace("\\[", "[")  # older versions of typer escape it for rich
                shown = str(parameter.metavar) if is_argument else _shown(names, parameter.default is True)
                groups.setdefault(panel, []).append((shown, text.removesuffix("  [required]") if is_argument else text))
        for panel in sorted(groups, key=_ORDER.index):
            with formatter.section(panel):
                formatter.write_dl(groups[panel], col_max=_COLUMN)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        if self.epilog:
            formatter.write(f"\n{self.epilog}\n")


class Commands(typer.core.TyperGroup):
    """The commands, whose epilog is kept as it is."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        if self.epilog:
            formatter.write(f"\n{self.epilog}\n")


def _shown(names: str, is_on: bool) -> str:
    """The names of an option, of a flag the one that changes something."""
    plain, _, opposite = names.partition(" / ")
    return opposite if opposite and is_on else plain
