"""The package logs its steps as "biascorr", and prints nothing by itself."""

import logging
import re

from biascorr import correct, equalize
from networks import samples, two_layers

X = samples(16, 3, 6, 6)


def test_steps_are_logged_with_their_seconds(caplog):
    with caplog.at_level(logging.INFO, logger="biascorr"):
        correction = correct(two_layers(), X, method="empirical")
    lines = [record.getMessage() for record in caplog.records]
    assert {record.name for record in caplog.records} == {"biascorr"}
    assert re.fullmatch(r"data: read 16 batches of 16 samples: \d+\.\d\d s", lines[0])
    timed = [line.rpartition(": ")[0] for line in lines if re.search(r": \d+\.\d\d s$", line)]
    assert "uncorrected model" in timed
    assert any("empirical" in step for step in timed)
    assert f"candidate empirical: {correction.scores['empirical']}" in lines
    assert [line for line in lines if line.startswith("note: ")] == [f"note: {note}" for note in correction.notes]


def test_parts_of_steps_are_logged_for_debugging(caplog):
    with caplog.at_level(logging.DEBUG, logger="biascorr"):
        equalize(two_layers(), X)
    assert any(record.levelno == logging.DEBUG and record.getMessage().startswith("scaling: ") for record in caplog.records)


def test_nothing_is_printed(capfd):
    correct(two_layers(), X, method="mean")
    assert capfd.readouterr() == ("", "")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("biascorr").handlers)
