"""What commands write besides the model: JSON, CSV, a page; never over what they read, nor over each other."""

import csv
import io
import json
import os

import numpy as np
import onnx
import pytest

import biascorr
from command_line import GIVEN, assert_one_error, names_in, run
from networks import model_from_text, samples, weights

CORRECT = ("correct", "models/float.onnx", "--data", "data/good.npz", "--method", "mean", "-o", "out.onnx")
COMMANDS = {
    "correct": CORRECT,
    "equalize": ("equalize", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx"),
    "fold": ("fold", "models/float.onnx", "-o", "out.onnx"),
    "compare": ("compare", "models/float.onnx", "models/quantized.onnx", "--data", "data/good.npz"),
    "inspect": ("inspect", "models/quantized.onnx", "--reference", "models/float.onnx"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_that_is_on_stdout(name, folder):
    done = run(*COMMANDS[name], "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["biascorr"] == biascorr.__version__
    assert record["command"] == " ".join(["biascorr", *COMMANDS[name], "--json"])
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_csv_has_the_rows_of_the_report(name, folder):
    done = run(*COMMANDS[name], "--csv", "rows.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "rows.csv" in names_in(folder)
    text = (folder / "rows.csv").read_text()
    printed = run(*COMMANDS[name], "--csv", "-", "--force", cwd=folder)
    found = list(csv.DictReader(io.StringIO(text)))
    assert list(csv.DictReader(io.StringIO(printed.stdout))) == found or name == "compare"  # seconds differ
    names = {"correct": ["first", "second", "last"], "compare": ["quantized.onnx"], "fold": []}
    assert [row["name"] for row in found] == names.get(name, [row["name"] for row in found])
    assert printed.stderr == ""


def test_report_is_a_page(folder):
    done = run(*CORRECT, "--report", "out.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "out.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "biascorr correct models/float.onnx" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_prints_nothing(name, folder):
    done = run(*COMMANDS[name], "--quiet", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verbose_logs_and_shows_all(folder):
    done = run(*CORRECT, "--verbose", cwd=folder)
    assert done.returncode == 0
    assert "mean: " in done.stderr
    assert "channels" in done.stdout


@pytest.mark.parametrize("columns", ["", "wide", "0"])
def test_a_width_that_is_none_is_80(columns, folder):
    done = run("inspect", "models/float.onnx", cwd=folder, COLUMNS=columns)
    assert done == run("inspect", "models/float.onnx", cwd=folder, COLUMNS="80")
    assert done.returncode == 0


def test_provenance_can_be_left_out(folder):
    for options, keys in (((), ["biascorr"]), (("--no-provenance", "--force"), [])):
        assert run(*CORRECT, *options, cwd=folder).returncode == 0
        assert [each.key for each in onnx.load(folder / "out.onnx").metadata_props if each.key == "biascorr"] == keys


OPTIONS = ["--csv", "--report", "-o"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("source", ["models/float.onnx", "models/quantized.onnx", "data/good.npz"])
def test_nothing_is_written_over_an_input(option, link, source, folder):
    before = (folder / source).read_bytes()
    output = source
    if link is not None:
        link((folder / source).resolve(), folder / (output := "link.onnx"))
    outputs = {"-o": "out.onnx", option: output}
    arguments = [each for pair in outputs.items() for each in pair]
    quantized = ["--quantized", "models/quantized.onnx"]
    data = ["--data", "data/good.npz"]
    done = run("correct", "models/float.onnx", *quantized, *data, *arguments, "--force", cwd=folder)
    assert_one_error(done)
    assert "it is an input" in done.stderr or ".npz: expected a name" in done.stderr
    assert (folder / source).read_bytes() == before
    assert names_in(folder) == sorted(GIVEN + ([] if link is None else ["link.onnx"]))


def test_nothing_is_written_over_what_compare_and_inspect_read(folder):
    for arguments in (COMMANDS["compare"], COMMANDS["inspect"]):
        before = (folder / "models/quantized.onnx").read_bytes()
        done = run(*arguments, "--csv", "models/../models/quantized.onnx", "--force", cwd=folder)
        assert_one_error(done)
        assert "it is an input" in done.stderr
        assert (folder / "models/quantized.onnx").read_bytes() == before


def test_nothing_is_written_over_the_file_of_options(folder):
    (folder / "options.toml").write_text("method = 'mean'\n")
    done = run(*CORRECT, "--config", "options.toml", "--report", "options.toml", "--force", cwd=folder)
    assert_one_error(done)
    assert "it is an input" in done.stderr


def test_one_file_is_not_written_twice(folder):
    done = run(*CORRECT, "--report", "./out.onnx", cwd=folder)
    assert_one_error(done)
    assert "are one file" in done.stderr
    assert names_in(folder) == GIVEN


@pytest.mark.parametrize("option", ["--csv", "--report"])
def test_existing_files_are_kept(option, folder):
    (folder / "there").write_text("precious")
    done = run(*CORRECT, option, "there", cwd=folder)
    assert_one_error(done)
    assert "there exists; --force overwrites it" in done.stderr
    assert names_in(folder) == sorted([*GIVEN, "there"])
    assert run(*CORRECT, option, "there", "--force", cwd=folder).returncode == 0
    assert (folder / "there").read_text() != "precious"


@pytest.fixture
def pictures(tmp_path):
    """A folder with a model of pictures, and pictures."""
    image = pytest.importorskip("PIL.Image")
    text = "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { [conv] y = Conv<pads=[1,1,1,1]>(x, w) }"
    onnx.save(model_from_text(text, w=weights(4, 3, 3, 3)), tmp_path / "float.onnx")
    (tmp_path / "pictures").mkdir()
    for number, pixels in enumerate(np.clip(samples(6, 12, 16, 3) * 80 + 128, 0, 255).astype(np.uint8)):
        image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def test_samples_from_a_folder_of_images(pictures):
    options = (
        "--size",
        "9x10",
        "--crop",
        "8",
        "--mean",
        "0.485,0.456,0.406",
        "--std",
        "0.25",
        "--scale",
        "1/255",
        "--color",
        "bgr",
    )
    arguments = "correct", "float.onnx", "--data", "pictures", "--method", "mean", "-o", "out.onnx", "--no-provenance"
    done = run(*arguments, *options, "--color", "bgr", cwd=pictures)
    assert done.returncode == 0, done.stderr
    given = biascorr.images(
        pictures / "pictures", size=(9, 10), crop=8, mean=(0.485, 0.456, 0.406), std=0.25, scale=1 / 255, color="bgr"
    )
    assert onnx.load(pictures / "out.onnx") == biascorr.correct(pictures / "float.onnx", given, method="mean").model
    done = run(*arguments, "--force", "--preset", "imagenet", cwd=pictures)
    assert done.returncode == 0, done.stderr


def test_images_without_a_word_on_how_they_are_read(pictures):
    done = run("correct", "float.onnx", "--data", "pictures", "--method", "mean", "-o", "out.onnx", cwd=pictures)
    assert_one_error(done)
    assert "--size" in done.stderr or "--preset" in done.stderr


def test_samples_from_a_function(folder):
    (folder / "ours.py").write_text("import numpy as np\n\ndef batches():\n    return np.load('data/good.npy')\n")
    arguments = "correct", "models/float.onnx", "--method", "mean", "--no-provenance"
    for data, output in (("ours:batches", "a.onnx"), ("data/good.npy", "b.onnx")):
        done = run(*arguments, "--data", data, "-o", output, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_what_a_function_prints_is_not_among_json(folder):
    (folder / "printing.py").write_text(
        "import numpy as np\ndef batches():\n    print('hello')\n    return np.ones((4, 3, 6, 6), np.float32)\n"
    )
    arguments = ("models/float.onnx", "models/quantized.onnx", "--data", "printing:batches", "--json")
    done = run("compare", *arguments, cwd=folder)
    assert json.loads(done.stdout)["kind"] == "comparison"
    assert done.stderr == "hello\n"
