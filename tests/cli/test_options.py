"""Options: the same as in Python, from the command line and from a file; what is wrong with them is said."""

import inspect
import json
import re

import pytest
import typer.main

import biascorr
from biascorr.cli.app import COMMANDS, app
from command_line import GIVEN, names_in, run

ONLY_IN_PYTHON = {
    "client": "an object that is connected; --scheduler here",
    "progress": "a function; the command line shows a bar",
    "quant_params": "one object there, --weight-bits and --per-channel here",
}
ONLY_HERE = {
    "scheduler": "client=distributed.Client(address)",
    "output": "Correction.save(path)",
    "force": "Correction.save(path, force=)",
    "provenance": "Correction.save(path, provenance=)",
    "json": "Correction.to_json()",
    "csv": "Correction.to_dataframe()",
    "report": "Correction.save_report(path)",
    "quiet": "nothing is printed there",
    "verbose": "logging.getLogger('biascorr')",
    "config": "keywords of a call",
    "help": "docstrings",
    "weight_bits": "QuantParams.weight_bits",
    "per_channel": "QuantParams.per_channel",
}
IMAGES = {"size", "crop", "mean", "std", "layout", "scale", "color", "preset"}

NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


def parameters_of(name):
    command = typer.main.get_command(app).commands[name]
    return {each.name: each for each in command.params}


@pytest.mark.parametrize("name", [name for name in NAMES if name in biascorr.__all__])
def test_every_option_is_a_parameter_of_the_same_name_and_the_other_way_round(name):
    ours, theirs = set(parameters_of(name)), set(inspect.signature(getattr(biascorr, name)).parameters)
    assert theirs - ours <= set(ONLY_IN_PYTHON)
    assert ours - theirs <= set(ONLY_HERE) | (IMAGES if "data" in theirs else set())
    assert "data" not in theirs or ours >= IMAGES


def test_options_of_images_are_the_parameters_of_images():
    assert set(inspect.signature(biascorr.images).parameters) == {"folder", *IMAGES}


@pytest.mark.parametrize("name", [name for name in NAMES if name in biascorr.__all__])
def test_defaults_are_those_of_python(name):
    ours, theirs = parameters_of(name), inspect.signature(getattr(biascorr, name)).parameters
    for key in ours.keys() & theirs.keys():
        default = theirs[key].default
        if default is not inspect.Parameter.empty and default not in (None, ()):
            assert ours[key].default == default, key


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_fits_into_80_columns_and_has_an_example(name, option, tmp_path):
    done = run(*([] if name is None else [name]), option, cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(rf"Examples?:\n  biascorr {name or 'COMMAND'} ", done.stdout)
    assert "Usage: biascorr" in done.stdout
    assert "None" not in done.stdout


def test_exit_status_is_in_the_help(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    assert [line.split()[0] for line in text.partition("Exit status:\n")[2].splitlines()] == ["0", "1", "2", "3", "129"]


CORRECT = ("correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx")

MISTAKES = {
    "method": ([*CORRECT, "--method", "emprical"], "expected one of auto, mean, ", "did you mean empirical?"),
    "new biases": ([*CORRECT, "--new-biases", "ad"], "--new-biases", "did you mean add?"),
    "preset": ([*CORRECT, "--preset", "imagnet"], "--preset", "did you mean imagenet?"),
    "layout": ([*CORRECT, "--layout", "NCWH"], "--layout", "did you mean NCHW?"),
    "size": ([*CORRECT, "--size", "224,224"], "--size", "224 or 224x320"),
    "mean": ([*CORRECT, "--mean", "a"], "--mean", "0.485,0.456,0.406"),
    "scale": ([*CORRECT, "--scale", "1/0"], "--scale", "1/255"),
    "option": ([*CORRECT, "--metod", "mean"], "--metod", "--method"),
    "command": (["corect"], "corect", "correct"),
    "both": ([*CORRECT, "--quiet", "--verbose"], "--verbose", "not with --quiet"),
    "stdout": ([*CORRECT, "--json", "--csv", "-"], "--csv", "stdout is taken by --json"),
    "no images": (["equalize", "models/float.onnx", "-o", "out.onnx", "--size", "8"], "--data", "--size is for images"),
    "an empty path": ([*CORRECT, "--data", ""], "--data", "an empty value"),
    "an empty path after =": ([*CORRECT, "--report="], "--report", "an empty value"),
    "no samples": (["compare", "models/float.onnx", "models/quantized.onnx"], "--data", "missing"),
    "no models": (["compare", "models/float.onnx", "--data", "data/good.npz"], "MODEL...", "Missing argument"),
    "quantized": ([*CORRECT, "--quantized", "models/quantized.onnx", "--fold"], "--quantized", "not with --quantized"),
    "bits": ([*CORRECT, "--quantized", "models/quantized.onnx", "--weight-bits", "4"], "not with --quantized"),
    "no method": (["correct", "models/float.onnx", "-o", "out.onnx", "--method", "magic"], "--method", "'magic', expected one"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_is_said_with_what_was_meant(name, folder):
    arguments, *texts = MISTAKES[name]
    done = run(*arguments, cwd=folder)
    assert done.returncode == 2
    assert [text for text in texts if text not in done.stderr] == []
    assert done.stdout == ""
    assert names_in(folder) == GIVEN


def recorded(done):
    """The report that was printed as JSON; nothing else was."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CONFIG = """
data = "data/good.npz"
method = "empirical"
strength = 0.5
max-samples = 3
only = ["first", "second"]
per_channel = true
json = true
output = "from_config.onnx"
"""


def test_options_from_a_file(folder):
    (folder / "options.toml").write_text(CONFIG)
    record = recorded(run("correct", "models/float.onnx", "--config", "options.toml", cwd=folder))
    assert (record["method"], record["samples"]) == ("empirical 0.5", 3)
    assert [each["name"] for each in record["layers"] if each["method"] is None] == ["last"]
    assert names_in(folder) == sorted([*GIVEN, "from_config.onnx", "options.toml"])
    assert record["command"] == "biascorr correct models/float.onnx --config options.toml"


def test_command_line_overrides_the_file(folder):
    (folder / "options.toml").write_text(CONFIG)
    arguments = ["--method", "mean", "--strength", "1", "--max-samples", "2", "--no-per-channel", "-o", "out.onnx"]
    record = recorded(run("correct", "models/float.onnx", "--config", "options.toml", *arguments, cwd=folder))
    assert (record["method"], record["samples"]) == ("mean", 2)
    assert names_in(folder) == [*GIVEN, "options.toml", "out.onnx"]


def test_arguments_may_be_in_the_file_too(folder):
    (folder / "options.toml").write_text('reference = "models/float.onnx"\njson = true\n')
    record = recorded(run("fold", "--config", "options.toml", "-o", "out.onnx", cwd=folder))
    assert record["files"] == {"reference": "models/float.onnx"}
    (folder / "options.toml").write_text('models = ["models/quantized.onnx"]\n')
    done = run("compare", "models/float.onnx", "--config", "options.toml", "--data", "data/good.npz", cwd=folder)
    assert done.returncode == 2
    assert "models: only on the command line" in done.stderr


CONFIGS = {
    "an unknown key": ("metod = 'mean'", "metod: there is no such option of biascorr correct; did you mean method?"),
    "a key of another command": ("iterations = 3", "iterations: there is no such option of biascorr correct"),
    "a table": ("[correct]\nmethod = 'mean'", "correct: a table, expected options by their names alone"),
    "a key by two names": ("max-samples = 1\nmax_samples = 2", "max_samples: given twice"),
    "an empty value": ("data = ''", "data: empty, expected a value"),
    "a flag that is none": ("shrunk = 'yes'", "shrunk: 'yes', expected true or false"),
    "a value that is a flag": ("method = true", "method: True, expected a value"),
    "a wrong choice": ("method = 'emprical'", "did you mean empirical?"),
    "a number that is none": ("max-samples = 'x'", "--max-samples"),
    "no TOML": ("method = ", "not a TOML file: "),
    "no text": (b"\xff\xfe", "not a TOML file: "),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_wrong_with_a_file_of_options(name, folder):
    content, text = CONFIGS[name]
    (folder / "options.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run(*CORRECT, "--config", "options.toml", cwd=folder)
    assert done.returncode == 2
    assert text in done.stderr
    assert names_in(folder) == [*GIVEN, "options.toml"]


def test_file_of_options_that_is_missing(folder):
    done = run(*CORRECT, "--config", "none.toml", cwd=folder)
    assert done.returncode == 2
    assert "none.toml: No such file or directory" in done.stderr


def test_choices_are_completed(tmp_path):
    done = run(cwd=tmp_path, _BIASCORR_COMPLETE="complete_bash", COMP_WORDS="biascorr correct --method emp", COMP_CWORD="3")
    assert done.stdout.split() == ["empirical"]
