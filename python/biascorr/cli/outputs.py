"""What a command writes: checked before the work is done, so that no hour is lost, and written when it is."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from biascorr.adapters.loading import check_output_of, check_same_framework, sizes_by_file
from biascorr.report.records import rows
from biascorr.whole_file import check_output, whole_file

_PAGES = (".html", ".htm", "")
"""What the name of a page may end with."""


def check_outputs(
    models: Mapping[str, str | None],
    data: Iterable[str | None],
    others: Iterable[Path | None],
    outputs: Mapping[str, Path],
    force: bool,
) -> None:
    """Checks that all that is written can be, and is no other file that is read or written.

    Parameters
    ----------
    models : mapping from str to str or None
        The models that are read, by the names of their parameters.
    data : iterable of str or None
        The samples that are read: files, folders or functions.
    others : iterable of Path or None
        Other files that are read.
    outputs : mapping from str to Path
        The files that are written, by the names of their options.
    force : bool
        Whether existing ones are overwritten.
    """
    given = [(Path(path), name) for name, path in models.items() if path is not None]
    for path, name in given:
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such file: {path}")
    if [name for _, name in given] == ["reference", "quantized"]:
        check_same_framework(given[0][0], given[1][0])
    if "output" in outputs:
        check_output_of(given[-1][0], outputs["output"], given[-1][1])
    for option, path in outputs.items():
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; --force overwrites it")
        check_output(path, force=force)
        for other, place in outputs.items():
            if other != option and _are_same(path, place):
                raise ValueError(f"{path}: --{option} and --{other} are one file; give each a name")
    if not outputs:
        return
    sizes = list(itertools.starmap(sizes_by_file, given))
    read = itertools.chain(*sizes, *map(_files_of, data), (each for each in others if each is not None))
    for file, path in itertools.product(read, outputs.values()):
        if _are_same(file, path):
            raise ValueError(f"{path}: it is an input, {file}; give the output another name")
    if "report" in outputs and outputs["report"].suffix.lower() not in _PAGES:
        raise ValueError(f"{outputs['report']}: the report is a page, expected a name that ends with {_PAGES[0]}")
    if "output" in outputs:
        check_output(outputs["output"], force=force, size=sum(sizes[-1].values()))


def _files_of(data: str | None) -> Iterator[Path]:
    """The files of samples; those in folders too, as deep as they are read."""
    if data is None:
        return
    path = Path(data)
    try:
        entries = [*path.iterdir()] if path.is_dir() else []
        yield path
        yield from entries
        for folder in (each for each in entries if each.is_dir()):
            yield from folder.iterdir()
    except OSError:  # it is said where it is read
        return


def _are_same(one: Path, other: Path) -> bool:
    """Whether they are one file, by whatever links or names."""
    try:
        return one.samefile(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def csv_of(record: dict[str, Any]) -> str:
    """The rows of a record as CSV, with a heading."""
    found = rows(record)
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    return text.getvalue()


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Writes a file, whole or not at all."""
    with whole_file(path, force=force) as file:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
