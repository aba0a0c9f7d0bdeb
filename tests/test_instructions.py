"""No kernel takes more instructions per element than it did: what a timing on a shared machine cannot tell."""

import json
import shutil

import pytest

import instructions

TABLE = json.loads(instructions.TABLE.read_text())
ALLOWED_RISE = 1.1


@pytest.fixture(scope="module")
def program():
    """Built, and able to run here."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    instructions.build()
    if instructions.tier() != instructions.TIER:
        pytest.skip(f"this CPU has no {instructions.TIER}")


@pytest.mark.slow
@pytest.mark.usefixtures("program")
def test_valgrind_runs_the_tier_that_the_table_is_for():
    assert instructions.tier("valgrind", "--tool=none") == instructions.TIER


@pytest.mark.slow
@pytest.mark.usefixtures("program")
def test_no_kernel_takes_more_instructions_per_element():
    counted = instructions.count_all()
    assert counted.keys() == TABLE.keys(), "make instructions"
    risen = [f"{case}: {TABLE[case]} -> {now}" for case, now in counted.items() if now > TABLE[case] * ALLOWED_RISE]
    assert not risen, "\n".join(["if that has to be: make instructions", *risen])
