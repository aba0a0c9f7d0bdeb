"""The recipes in examples/classic run and change the biases that they are about."""

import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from networks import samples, two_layers

FOLDER = Path(__file__).parent.parent.parent / "examples" / "classic"

CHANGED = {
    "empirical": ["conv2_bias", "conv_b", "head_b"],
    "empirical_and_analytical": ["conv2_bias", "conv_b", "head_b"],
    "after_equalization": ["conv2_bias", "conv_b", "head_b"],
    "one_layer_empirical": ["head_b"],
    "one_layer_analytical": ["conv2_bias"],
}


def test_every_recipe_is_run_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*CHANGED, "small_network"}


def changed_by(recipe, monkeypatch, capsys, *arguments):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
    runpy.run_path(str(FOLDER / f"{recipe}.py"), run_name="__main__")
    return sorted(line.split()[0] for line in capsys.readouterr().out.splitlines() if "on average" in line)


@pytest.mark.parametrize("recipe", CHANGED)
def test_a_recipe_runs_on_the_network_that_it_builds(recipe, monkeypatch, capsys):
    assert changed_by(recipe, monkeypatch, capsys) == CHANGED[recipe]


def test_a_recipe_runs_on_the_model_of_a_path(monkeypatch, capsys, tmp_path):
    onnx.save(two_layers(), tmp_path / "model.onnx")
    np.save(tmp_path / "samples.npy", samples(20, 3, 6, 6))
    arguments = tmp_path / "model.onnx", tmp_path / "samples.npy"
    assert changed_by("empirical", monkeypatch, capsys, *arguments) == ["b1", "b2", "b3"]
