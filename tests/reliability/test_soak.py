"""The soak, cut short; and that it fails where something is kept."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

import soak


def test_nothing_is_kept(capfd):
    soak.main(["--calls", "300", "--corrections", "30", "--rows", "6"])
    assert len(capfd.readouterr().out.splitlines()) >= 18


KEPT = {
    "memory": lambda _: np.ones(4096),
    "blocks": lambda _: object(),
    "files": lambda k: Path("/dev/null").open() if k % 100 == 0 else None,  # noqa: SIM115
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_found(name):
    kept = []
    calls = (functools.partial(lambda k: kept.append(KEPT[name](k)), k) for k in itertools.count())
    found = soak.soaked("calls", calls, 2000, 6)
    for each in kept:
        getattr(each, "close", int)()
    assert found
