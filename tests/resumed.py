"""Runs that go on from each of some results, as after a kill."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def assert_goes_on(folder: Path, run: Callable[[Path | None], Any], described: Callable[[Any], Any], parts: int = 4) -> None:
    """That a run that has found a part of its results, each of so many, ends as one without a checkpoint."""
    expected = _outcome(run(None), described)
    assert _outcome(run(folder / "whole"), described) == expected
    count = len([*(folder / "whole").glob("*.record")])
    assert count >= parts
    for part in range(1, parts + 1):
        copy = folder / str(part)
        shutil.copytree(folder / "whole", copy)
        for path in copy.glob("*.record"):
            if int(path.stem) >= count * part // parts:
                path.unlink()
        assert _outcome(run(copy), described) == expected, part


def _outcome(correction: Any, described: Callable[[Any], Any]) -> Any:
    return {**correction.to_dict(), "seconds": None}, described(correction.model)
