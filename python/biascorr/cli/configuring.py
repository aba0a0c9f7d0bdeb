"""`--config`: options from a .toml file, by their names; those of the command line override them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from biascorr.arguments import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Has a command take what a file says where the command line says nothing."""
    if path is None or context.resilient_parsing:
        return path
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: not a TOML file: {error}") from None
    context.default_map = {**(context.default_map or {}), **_checked(context, path, given)}
    return path


def _checked(context: typer.Context, path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The values by the names of parameters. Raises BadParameter where there is no such option, or a value is of no kind."""
    parameters = {str(each.name): each for each in context.command.params if each.name not in ("config", "help")}
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            raise typer.BadParameter(f"{path}: {key}: a table, expected options by their names alone: max-samples = 100")
        if name not in parameters:
            names = sorted(each.replace("_", "-") for each in parameters)
            hint = nearest(key.replace("_", "-"), names)
            raise typer.BadParameter(f"{path}: {key}: there is no such option of biascorr {context.info_name}{hint}")
        if name in found:
            raise typer.BadParameter(f"{path}: {key}: given twice, with - and with _")
        if value == "":
            raise typer.BadParameter(f"{path}: {key}: empty, expected a value")
        parameter = parameters[name]
        if parameter.nargs == -1:
            raise typer.BadParameter(f"{path}: {key}: only on the command line")
        is_flag = bool(getattr(parameter, "is_flag", False))
        if is_flag != isinstance(value, bool):
            raise typer.BadParameter(f"{path}: {key}: {value!r}, expected {'true or false' if is_flag else 'a value'}")
        if getattr(parameter, "multiple", False):
            found[name] = list(map(str, value)) if isinstance(value, list) else [str(value)]
        else:
            found[name] = ",".join(map(str, value)) if isinstance(value, list) else value if is_flag else str(value)
    return found
