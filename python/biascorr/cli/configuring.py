"""`--config`: options from a .toml file, by their names; those of the command line override them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def nearest(text: str, allowed: Sequence[str]) -> str:
    """The hint that this was meant, after a comma; nothing where no allowed text is like it."""
    found = difflib.get_close_matches(text, allowed, n=1)
    return f"; did you mean {found[0]}?" if found else ""


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
        if name not in parameters:
            names = sorted(each.replace("_", "-") for each in parameters)
            hint = nearest(key.replace("_", "-"), names)
            raise typer.BadParameter(f"{path}: {key}: there is no such option of biascorr {context.info_name}{hint}")
        if isinstance(value, dict) or value is None:
            raise typer.BadParameter(f"{path}: {key}: a table, expected a value")
        parameter = parameters[name]
        is_flag = bool(getattr(parameter, "is_flag", False))
        if is_flag != isinstance(value, bool):
            raise typer.BadParameter(f"{path}: {key}: {value!r}, expected {'true or false' if is_flag else 'a value'}")
        is_list = getattr(parameter, "multiple", False) or parameter.nargs == -1
        if is_list:
            found[name] = list(map(str, value)) if isinstance(value, list) else [str(value)]
        else:
            found[name] = ",".join(map(str, value)) if isinstance(value, list) else value if is_flag else str(value)
    return found
