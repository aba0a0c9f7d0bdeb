"""The command line as a user runs it: what is written and printed, every mistake as one line, nothing left behind."""

import contextlib
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import biascorr
from biascorr import QuantParams
from biascorr.cli import options, running
from networks import (
    biases,
    gated_network,
    gated_samples,
    model_from_text,
    quantized,
    samples,
    two_layers,
    weights,
    with_constants,
)

COMMAND = Path(sys.executable).with_name("biascorr")
X = samples(4, 3, 6, 6)


def environment(**variables):
    return os.environ | {"COLUMNS": "200", "TERM": "xterm"} | variables


def run(*arguments, cwd, limit=None, **variables):
    """The command with its output; `limit` is the size in bytes that a file may have."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        preexec_fn=limit_files if limit else None,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with good and bad models and samples; tests do not change it."""
    folder = tmp_path_factory.mktemp("inputs")
    models = folder / "models"
    data = folder / "data"
    models.mkdir()
    data.mkdir()
    model = two_layers()
    whole = model.SerializeToString()
    (models / "float.onnx").write_bytes(whole)
    onnx.save(quantized(model, [{"x": X}]), models / "quantized.onnx")
    onnx.save(with_constants(model, w1=weights(4, 3, 5, 5)), models / "other.onnx")
    (models / "empty.onnx").write_bytes(b"")
    (models / "text.onnx").write_text("not a model\n" * 50)
    (models / "model.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(50))
    (models / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    external = {"save_as_external_data": True, "size_threshold": 0}
    onnx.save(two_layers(), models / "missing_data.onnx", location="gone.data", **external)
    (models / "gone.data").unlink()
    onnx.save(two_layers(), models / "outside_data.onnx", location="outside.data", **external)
    (models / "outside.data").rename(folder / "outside.data")
    (models / "outside.data").symlink_to(folder / "outside.data")
    del model.graph.node[0].input[1:]
    onnx.save(model, models / "no_weights.onnx")

    np.savez(data / "good.npz", x=X)
    np.save(data / "good.npy", X)
    np.savez(data / "name.npz", z=X)
    np.savez(data / "shape.npz", x=X[:, :2])
    np.savez(data / "dtype.npz", x=X.astype(np.float64))
    np.savez(data / "nan.npz", x=np.full_like(X, np.nan))
    np.savez(data / "none.npz", x=X[:0])
    np.savez(data / "objects.npz", x=np.array([X, None], object))
    (data / "table.csv").write_text("1, 2, 3")
    raw = (data / "good.npz").read_bytes()
    (data / "truncated.npz").write_bytes(raw[:-100])
    np.savez_compressed(data / "damaged.npz", x=X)
    raw = bytearray((data / "damaged.npz").read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 20] = b"\xff" * 20
    (data / "damaged.npz").write_bytes(raw)
    (data / "empty").mkdir()
    (data / "batches").mkdir()
    for k in range(4):
        np.save(data / "batches" / f"{k}.npy", X[k : k + 1])
    return folder


@pytest.fixture
def folder(inputs, tmp_path):
    """An empty folder with links to the inputs."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path


FLOAT = "; a float model: quantize it now"

GIVEN = ["data", "models"]
COMMANDS = ["correct", "equalize"]
both_commands = pytest.mark.parametrize("command", COMMANDS)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_one_error(done, status=1):
    """One line says what is wrong, the last one."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("error: ")
    assert len(lines[-1]) > len("error: ")


GOOD = {
    "npz": ("--data", "data/good.npz"),
    "npy": ("--data", "data/good.npy"),
    "folder": ("--data", "data/batches"),
    "options": ("--data", "data/good.npz", "--weight-bits", "4", "--per-channel", "--memory-budget", "1kB"),
    "method": ("--data", "data/good.npz", "--method", "empirical", "--strength", "0.5"),
    "quantized": ("--data", "data/good.npz", "--quantized", "models/quantized.onnx"),
}


@pytest.mark.parametrize("name", GOOD)
def test_corrected_model_is_written_and_the_report_printed(name, folder):
    done = run("correct", "models/float.onnx", *GOOD[name], "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert names_in(folder) == [*GIVEN, "out.onnx"]
    options = {
        "options": {"quant_params": QuantParams(weight_bits=4, per_channel=True)},
        "method": {"method": "empirical", "strength": 0.5},
        "quantized": {"quantized": folder / "models/quantized.onnx"},
    }.get(name, {})
    correction = biascorr.correct(two_layers(), folder / GOOD[name][1], **options)
    correction.save(folder / "expected.onnx")
    assert (folder / "out.onnx").read_bytes() == (folder / "expected.onnx").read_bytes()
    for layer in correction.report:
        row = next(line for line in done.stdout.splitlines() if layer.name in line)
        numbers = (f"{layer.shift_before:.3g}", f"{layer.sqnr_before:.1f}", f"{layer.sqnr_after:.1f}")
        for value in (layer.op, layer.method, layer.channels, *numbers):
            assert str(value) in row
    assert f"out.onnx: 3 of 3 layers corrected by {correction.method} from 4 samples" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["npz", "method"])
def test_scores_and_notes_are_printed(name, folder):
    done = run("correct", "models/float.onnx", *GOOD[name], "-o", "out.onnx", cwd=folder)
    correction = biascorr.correct(two_layers(), X, **({} if name == "npz" else {"method": "empirical", "strength": 0.5}))
    _, table = done.stdout.split("outputs against the float ones")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    scores = {"uncorrected" if name == "none" else name: score for name, score in correction.scores.items()}
    taken = {correction.method: "taken"}
    gains = {name: str(score.gains_over(scores["uncorrected"])["sqnr"]) for name, score in scores.items()} | {"uncorrected": ""}
    assert rows == [[name, f"{score.sqnr:.2f}", gains[name], taken.get(name, "")] for name, score in scores.items()]
    assert rows[0][0] == "uncorrected"
    assert [line for line in table.splitlines() if line.startswith("note: ")] == [f"note: {note}" for note in correction.notes]
    assert "too few" in table


def test_scores_of_a_classifier_have_a_divergence(folder):
    text = "g (float[?,7] x) => (float[?,5] y) { t = Gemm(x, w, b) y = Softmax(t) }"
    onnx.save(model_from_text(text, w=weights(7, 5, axis=1), b=biases(5)), folder / "classifier.onnx")
    np.save(folder / "rows.npy", samples(8, 7))
    done = run("correct", "classifier.onnx", "--data", "rows.npy", "-o", "out.onnx", cwd=folder)
    correction = biascorr.correct(folder / "classifier.onnx", folder / "rows.npy")
    assert "KL, nats" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "uncorrected" in line)
    assert f"{correction.scores['none'].divergence:.3g}" in row


@pytest.fixture
def gated(folder):
    """The options for a model whose outputs every correction makes worse."""
    onnx.save(gated_network(), folder / "gated.onnx")
    np.save(folder / "gated.npy", gated_samples(12))
    return "correct", "gated.onnx", "--data", "gated.npy", "-o", "out.onnx"


def test_model_that_no_correction_makes_better_is_written_as_it_came(gated, folder):
    done = run(*gated, cwd=folder)
    assert done.returncode == 0, done.stderr
    (taken,) = (line for line in done.stdout.splitlines() if "taken" in line)
    assert "uncorrected" in taken
    (row,) = (line for line in done.stdout.splitlines() if "layer" in line and "Gemm" in line)
    assert "left as it is" in row
    assert "out.onnx: 0 of 1 layers corrected from 12 samples" in done.stdout
    assert onnx.load(folder / "out.onnx") == gated_network()


def test_method_that_makes_the_outputs_worse_says_so_in_one_note(gated, folder):
    done = run(*gated, "--method", "empirical", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "made the outputs worse" not in done.stderr
    assert done.stdout.count("made the outputs worse") == 1


def test_report_says_why_a_layer_is_left_alone(folder):
    onnx.save(with_constants(two_layers(), w2=np.zeros((6, 4, 3, 3), np.float32)), folder / "zeros.onnx")
    done = run("correct", "zeros.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "second" in line)
    assert "left as it is" in row
    assert "weights are not quantized" in row
    assert "2 of 3 layers corrected" in done.stdout


def test_report_shows_names_of_layers_as_they_are(folder):
    names = ["block[0]/conv", "conv[/a]", "[red]conv[/red]", "[bold]", "conv\\[a]", ":smile:", "Schicht für x", "层"]
    layers = "".join(f" t{k + 1} = Gemm(t{k}, w, b)" for k in range(len(names)))
    text = f"g (float[?,7] x) => (float[?,7] t{len(names)}) {{ t0 = Relu(x) {layers} }}"
    model = model_from_text(text, w=weights(7, 7, axis=1), b=biases(7))
    for node, name in zip(model.graph.node[1:], names):
        node.name = name
    onnx.save(model, folder / "named.onnx")
    np.save(folder / "rows.npy", samples(6, 7))
    done = run("correct", "named.onnx", "--data", "rows.npy", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [name for name in names if name not in done.stdout] == []


@both_commands
def test_output_that_cannot_encode_a_name_is_no_failure(command, folder):
    model = two_layers()
    model.graph.node[0].name = "层"
    onnx.save(model, folder / "named.onnx")
    arguments = (command, "named.onnx", "--data", "data/good.npz", "-o", "out.onnx")
    done = run(*arguments, cwd=folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "second" in done.stdout


@both_commands
def test_names_reach_the_terminal_without_control_characters(command, folder):
    model = two_layers()
    model.graph.node[0].name = "first\x1b[31m\x07\n\u202e\x9b2J"
    onnx.save(model, folder / "named.onnx")
    done = run(command, "named.onnx", "--data", "data/good.npz", "-o", "out\x1b[1m.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert r"first\x1b[31m\x07\n\u202e\x9b2J" in done.stdout or command == "equalize"
    assert r"out\x1b[1m.onnx: " in done.stdout
    failed = run(command, "gone\x1b[1m\x9b.onnx", "--data", "data/good.npz", "-o", "other.onnx", cwd=folder)
    assert_one_error(failed)
    assert r"gone\x1b[1m\x9b.onnx" in failed.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr + failed.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes")
@both_commands
def test_names_of_files_that_are_no_text(command, folder):
    model, output = (os.fsdecode(name) for name in (b"model\xff.onnx", b"out\xfe.onnx"))
    onnx.save(two_layers(), str(folder / model))
    done = run(command, model, "--data", "data/good.npz", "-o", output, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert r"out\udcfe.onnx: " in done.stdout
    assert (folder / output).is_file()
    again = run(command, model, "--data", "data/good.npz", "-o", output, cwd=folder)
    assert_one_error(again)
    assert r"out\udcfe.onnx exists" in again.stderr


@both_commands
def test_a_reader_that_leaves_is_no_failure(command, folder):
    arguments = [COMMAND, command, "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment()
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
    process.stderr.close()
    assert (folder / "out.onnx").is_file()


@both_commands
def test_progress_is_shown_to_a_terminal_alone(command, folder):
    done = run(command, "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder)
    assert done.stderr == ""


def test_method_that_there_is_not_is_named_without_data(folder):
    done = run("correct", "models/float.onnx", "--method", "magic", "-o", "out.onnx", cwd=folder)
    assert_one_error(done)
    assert "method: 'magic', expected one of auto, mean, " in done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; a lower --memory-budget or fewer --threads need less"),
        (MemoryError("no memory for 7 bytes"), "out of memory (no memory for 7 bytes); a lower --memory-budget or"),
        (OSError(), "OSError"),
        (ValueError("two\nlines,\ta \x1b[31m"), r"two lines, a \x1b[31m"),
    ],
)
def test_errors_are_one_line_that_says_something(error, line, capsys):
    with pytest.raises(SystemExit, match="1"):
        running.fail(error)
    assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@both_commands
def test_report_that_cannot_be_written_is_one_line(command, folder):
    arguments = [COMMAND, command, "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            arguments, check=False, stdout=full, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment()
        )
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.returncode == 1


@both_commands
def test_existing_output_is_kept(command, folder):
    (folder / "out.onnx").write_bytes(b"precious")
    done = run(command, "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder)
    assert_one_error(done)
    assert "out.onnx exists" in done.stderr
    assert "--force" in done.stderr
    assert (folder / "out.onnx").read_bytes() == b"precious"


@both_commands
def test_existing_output_is_overwritten_when_forced(command, folder):
    (folder / "out.onnx").write_bytes(b"precious")
    done = run(command, "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--force", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(onnx.load(folder / "out.onnx").graph.node) == 6


@both_commands
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_no_output_and_no_temporary_file(existing, command, folder):
    if existing:
        (folder / "out.onnx").write_bytes(b"precious")
    arguments = (command, "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--force")
    done = run(*arguments, cwd=folder, limit=600, PYTHONDONTWRITEBYTECODE="1")
    assert_one_error(done)
    assert names_in(folder) == GIVEN + ["out.onnx"] * existing
    assert not existing or (folder / "out.onnx").read_bytes() == b"precious"


BAD_MODELS = {
    "none.onnx": "no such file",
    "": "models",
    "empty.onnx": "not an ONNX model",
    "text.onnx": "not an ONNX model",
    "truncated.onnx": "not an ONNX model, or a truncated one",
    "model.tflite": "out.onnx: expected a name that ends with .tflite, which is how TFLite models are saved",
    "missing_data.onnx": "gone.data is missing",
    "outside_data.onnx": "outside.data is outside",
    "no_weights.onnx": "reference",
}
BAD_DATA = {
    "gone.npz": "no such file",
    "gone": "no such file",
    "table.csv": "table.csv",
    "name.npz": "has z, the model's inputs are x",
    "shape.npz": "(1, 2, 6, 6)",
    "dtype.npz": "float64",
    "nan.npz": "nan.npz[0]: input x: contains nan",
    "none.npz": "no samples",
    "empty": "there is no .npy or .npz file",
    "objects.npz": "objects.npz",
    "truncated.npz": "truncated.npz",
    "damaged.npz": "damaged.npz",
}
BAD_QUANTIZED = {
    "none.onnx": "quantized: no such file",
    "text.onnx": "text.onnx: not an ONNX model",
    "model.tflite": "quantized: not of this float model, but of another framework: .tflite, expected .onnx",
    "other.onnx": "layer first has weights of shape",
}
BAD_INPUTS = [
    *[(f"models/{name}", "data/good.npz", (), message) for name, message in BAD_MODELS.items()],
    *[("models/float.onnx", f"data/{name}", (), message) for name, message in BAD_DATA.items()],
    *[
        ("models/float.onnx", "data/good.npz", ("--quantized", f"models/{name}"), message)
        for name, message in BAD_QUANTIZED.items()
    ],
    ("models/float.onnx", "data/good.npz", ("--method", "magic"), "method: 'magic', expected one of auto, "),
    ("models/float.onnx", "data/good.npz", ("--method", "empirical", "--strength", "1.5"), "strength: 1.5"),
    ("models/float.onnx", "data/good.npz", ("--strength", "0.5"), "strength: 0.5, expected 1 with method 'auto'"),
    *[
        ("models/float.onnx", "data/good.npz", ("--quantized", "models/quantized.onnx", *option), "not with --quantized")
        for option in (("--weight-bits", "4"), ("--per-channel",), ("--equalize",))
    ],
]
BAD_INPUTS = [("correct", *each) for each in BAD_INPUTS] + [
    ("equalize", "models/truncated.onnx", "data/good.npz", (), "not an ONNX model, or a truncated one"),
    ("equalize", "models/quantized.onnx", "data/good.npz", (), "layer first has quantized weights; equalize the float model"),
    ("equalize", "models/float.onnx", "data/shape.npz", (), "(1, 2, 6, 6)"),
    ("equalize", "models/float.onnx", "data/empty", (), "there is no .npy or .npz file"),
]


@pytest.mark.parametrize(
    ("command", "model", "data", "options", "message"), BAD_INPUTS, ids=[" ".join((*each[:3], *each[3])) for each in BAD_INPUTS]
)
def test_bad_input_is_one_line_and_nothing_is_written(command, model, data, options, message, folder):
    done = run(command, model, "--data", data, "-o", "out.onnx", *options, cwd=folder)
    assert_one_error(done)
    assert message in done.stderr.splitlines()[-1]
    assert names_in(folder) == GIVEN


BAD_OUTPUTS = {
    "gone/out.onnx": ["-o", "gone/out.onnx"],
    "file/out.onnx": ["-o", "file/out.onnx"],
    "folder": ["-o", "folder"],
    "folder, forced": ["-o", "folder", "--force"],
}


@both_commands
@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_output_that_cannot_be_written_is_one_line(name, command, folder):
    (folder / "file").write_bytes(b"precious")
    (folder / "folder").mkdir()
    done = run(command, "models/float.onnx", "--data", "data/good.npz", *BAD_OUTPUTS[name], cwd=folder)
    assert_one_error(done)
    assert BAD_OUTPUTS[name][1].split("/")[0] in done.stderr
    assert names_in(folder) == ["data", "file", "folder", "models"]
    assert names_in(folder / "folder") == []


BAD_USAGE = {
    "no model": ["correct", "--data", "data/good.npz", "-o", "out.onnx"],
    "no data": ["correct", "models/float.onnx", "-o", "out.onnx"],
    "no output": ["correct", "models/float.onnx", "--data", "data/good.npz"],
    "an unknown option": ["correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--fast"],
    "bits that are no number": [
        "correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--weight-bits", "x"
    ],
    "bits that no quantizer has": [
        "correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--weight-bits", "33"
    ],
    "no threads": ["correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--threads", "0"],
    "no sweeps": ["equalize", "models/float.onnx", "-o", "out.onnx", "--iterations", "0"],
    "an argument too many": ["correct", "models/float.onnx", "other", "--data", "data/good.npz", "-o", "out.onnx"],
    "equalize without output": ["equalize", "models/float.onnx"],
    "sweeps that are no number": ["equalize", "models/float.onnx", "-o", "out.onnx", "--iterations", "1.5"],
    "an unknown command": ["improve"],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_USAGE, ids=lambda name: name.replace(" ", "_"))
def test_bad_usage(name, folder):
    done = run(*BAD_USAGE[name], cwd=folder)
    assert done.returncode == 2
    assert "Usage: biascorr" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert "None" not in done.stderr
    assert names_in(folder) == GIVEN


@pytest.mark.parametrize("budget", ["x", "", "-1", "1.5.5", "2 G", "2gb", "nan", "1e9", "GB"])
def test_memory_budget_that_is_no_number_of_bytes(budget, folder):
    arguments = ("correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", f"--memory-budget={budget}")
    done = run(*arguments, cwd=folder)
    assert done.returncode == 2
    assert "expected bytes" in done.stderr
    assert names_in(folder) == GIVEN


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1000", 1000), ("2kB", 2000), ("500MB", 500_000_000), ("1.5GB", 1_500_000_000), ("3 TB", 3 * 10**12)],
)
def test_memory_budget_in_bytes(text, expected):
    assert options.bytes_of(text) == expected


@both_commands
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_output_that_is_external_data_of_the_model_is_refused(command, link, tmp_path):
    onnx.save(two_layers(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    np.save(tmp_path / "x.npy", X)
    before = (tmp_path / "m.data").read_bytes()
    output = "m.data"
    if link is not None:
        link(tmp_path / "m.data", tmp_path / (output := "out.onnx"))
    done = run(command, "m.onnx", "--data", "x.npy", "-o", output, "--force", cwd=tmp_path)
    assert_one_error(done)
    assert f"{output}: it is an input, " in done.stderr
    assert (tmp_path / "m.data").read_bytes() == before


def test_version(tmp_path):
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"biascorr {biascorr.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["correct", "--help"], ["equalize", "--help"]])
def test_help(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage: biascorr" in done.stdout
    assert done.stderr == ""


def read_until(terminal, pattern):
    """What a process shows on a terminal, until it shows a pattern or ends."""
    shown = b""
    with contextlib.suppress(OSError):  # the process has ended
        while not re.search(pattern, shown) and (part := os.read(terminal, 4096)):
            shown += part
    return shown


def spilled(folder):
    """The folders of activations beyond the budget."""
    return list(folder.glob("biascorr-*/biascorr-*"))


def left_in(folder):
    """What should be gone; onnxruntime keeps a file of its own beside it."""
    return list(folder.glob("biascorr-*"))


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -signal.SIGKILL)]
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "status", "existing", "command"),
    [
        *((*each, False, "correct") for each in SIGNALS),
        (signal.SIGINT, 130, True, "correct"),
        (signal.SIGINT, 130, True, "equalize"),
    ],
)
def test_signal_during_a_run_leaves_no_output_and_no_temporary_file(
    number, status, existing, command, folder, tmp_path_factory
):
    many = np.lib.format.open_memmap(folder / "many.npy", "w+", np.float32, (300_000, 3, 6, 6))
    del many  # a sparse file of zeros
    if existing:
        (folder / "out.onnx").write_bytes(b"precious")
    before = names_in(folder)
    ours, theirs = pty.openpty()
    arguments = [command, "models/float.onnx", "--data", "many.npy", "-o", "out.onnx", "--force", "--memory-budget", "1MB"]
    arguments += ["--max-samples", "300000"]
    temporary = tmp_path_factory.mktemp("temporary")
    process = subprocess.Popen(
        [COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(TMPDIR=str(temporary)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    try:
        shown = read_until(ours, rb"[1-9]\d*/")
        while not spilled(temporary):
            shown += os.read(ours, 4096)
        process.send_signal(number)
        shown += read_until(ours, rb"\0")
        printed, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == status, shown
    assert b"Traceback" not in shown
    assert printed == b""
    lines = [f"error: {ENDED[number]}, nothing was written".encode()] if number in ENDED else []
    assert re.findall(rb"error: [^\r\n]*", shown) == lines
    assert names_in(folder) == before
    assert number is signal.SIGKILL or left_in(temporary) == []
    assert not existing or (folder / "out.onnx").read_bytes() == b"precious"


SIGNALLING = """
import os, pkgutil, sys
from biascorr.__main__ import main

def signal_after(number, place):
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    plain = getattr(owner, name)

    def called(*arguments, **options):
        setattr(owner, name, plain)
        result = plain(*arguments, **options)
        os.kill(os.getpid(), number)
        return result

    setattr(owner, name, called)

signal_after(int(sys.argv.pop(1)), sys.argv.pop(1))
main()
"""
"""Runs the command; a signal comes right after the first call of a function."""

MOMENTS = {
    "the command starts": ("typer.Typer", "nothing was written"),
    "a folder is made": ("tempfile.mkdtemp", "nothing was written"),
    "the bar is shown": ("rich.progress.Progress.start", "nothing was written"),
    "the output is in its place": ("pathlib.Path.hardlink_to", "but out.onnx is written"),
    "the report is made": ("biascorr.report.terminal.table_from_report", "but out.onnx is written"),
}


def run_and_signal(number, place, folder, *, answer, command="correct", **variables):
    """The command with its output; `answer` is how the process that starts it answers the signal."""
    arguments = (command, "models/float.onnx", "--data", "data/good.npy", "-o", "out.onnx", "--memory-budget", "1kB")
    return subprocess.run(
        [sys.executable, "-c", SIGNALLING, str(int(number)), place, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**variables),
        preexec_fn=lambda: signal.signal(number, answer),
        timeout=60,
    )


@pytest.mark.parametrize("number", ENDED)
@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_at_a_bad_moment(moment, number, folder, tmp_path_factory):
    place, state = MOMENTS[moment]
    temporary = tmp_path_factory.mktemp("temporary")
    done = run_and_signal(number, place, folder, answer=signal.SIG_DFL, TMPDIR=str(temporary))
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines() == [f"error: {ENDED[number]}, {state}"]
    assert names_in(folder) == GIVEN + ["out.onnx"] * state.startswith("but")
    assert left_in(temporary) == []


@pytest.mark.parametrize("number", ENDED)
def test_signal_that_another_thread_takes_is_noticed_soon(number, folder):
    code = """
import signal, sys, threading, time
from biascorr.__main__ import main
from biascorr.correction import correct

def endless(*_):
    signal.pthread_kill(threading.get_ident(), number)
    time.sleep(60)

number = int(sys.argv.pop())
correct.check_options = endless
main()
"""
    arguments = ["correct", "models/float.onnx", "--data", "data/good.npy", "-o", "out.onnx", str(int(number))]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, cwd=folder, timeout=30
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"error: {ENDED[number]}, nothing was written\n"
    assert names_in(folder) == GIVEN


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "biascorr"]], ids=["script", "module"])
@pytest.mark.parametrize("number", ENDED)
def test_signal_while_packages_are_imported_is_one_line(number, command, folder):
    (folder / "numpy.py").write_text("import os, time\nos.kill(os.getpid(), int(os.environ['NUMBER']))\ntime.sleep(30)\n")
    variables = {"PYTHONPATH": str(folder), "NUMBER": str(int(number))}
    done = subprocess.run(
        [*command, "--version"], check=False, capture_output=True, text=True, env=environment(**variables), timeout=30
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"error: {ENDED[number]}, nothing was written\n"


EQUALIZING = {
    "the bar is shown": ("rich.progress.Progress.start", "nothing was written"),
    "the report is made": ("biascorr.report.terminal.table_from_chains", "but out.onnx is written"),
}


@pytest.mark.parametrize("moment", EQUALIZING)
def test_interrupt_of_equalization_at_a_bad_moment(moment, folder, tmp_path_factory):
    place, state = EQUALIZING[moment]
    temporary = tmp_path_factory.mktemp("temporary")
    done = run_and_signal(signal.SIGINT, place, folder, answer=signal.SIG_DFL, command="equalize", TMPDIR=str(temporary))
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: interrupted, {state}"
    assert names_in(folder) == GIVEN + ["out.onnx"] * state.startswith("but")
    assert left_in(temporary) == []


def test_interrupt_that_is_ignored_where_the_command_starts_stays_so(folder):
    done = run_and_signal(signal.SIGINT, "rich.progress.Progress.start", folder, answer=signal.SIG_IGN)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.onnx").is_file()


def test_command_needs_no_writable_home(folder):
    done = run("correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder, HOME="/nonexistent")
    assert done.returncode == 0, done.stderr


def test_analytical_correction_needs_no_data(folder):
    text = """g (float[N,3,6,6] x) => (float[N,4,6,6] y) {
        n = BatchNormalization(x, gamma, beta, mean, variance)
        [layer] y = Conv<pads=[1,1,1,1]>(n, w)
    }"""
    norm = {"gamma": np.ones(3), "beta": np.ones(3), "mean": np.zeros(3), "variance": np.ones(3)}
    constants = {name: array.astype(np.float32) for name, array in norm.items()}
    onnx.save(model_from_text(text, w=weights(4, 3, 3, 3), **constants), folder / "norm.onnx")
    done = run("correct", "norm.onnx", "--method", "analytical", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "nothing was scored" in done.stdout
    assert (folder / "out.onnx").is_file()


def layered_network(*, clipped=False):
    """first, second and third follow each other, the first with a batch normalization; side_1 and side_2 join them."""
    text = f"""g (float[N,3,6,6] x) => (float[N,5,6,6] y) {{
        [first] c = Conv(x, w1, b1)
        [norm] n = BatchNormalization(c, gamma, beta, mean, variance)
        [act] r = {"Clip(n, zero, six)" if clipped else "Relu(n)"}
        [second] s = Conv(r, w2, b2)
        [third] t = Conv(s, w3, b3)
        [side_1] u1 = Conv(x, w4, b3)
        [side_2] u2 = Conv(x, w5, b3)
        [add_1] v = Add(t, u1)
        [add_2] y = Add(v, u2)
    }}"""
    numbers = {"gamma": np.ones(4), "beta": np.full(4, 5.0), "mean": np.zeros(4), "variance": np.full(4, 1 / 64)}
    numbers |= {"zero": np.array(0.0), "six": np.array(6.0)} if clipped else {}
    shapes = {"w1": (4, 3), "w2": (4, 4), "w3": (5, 4), "w4": (5, 3), "w5": (5, 3)}
    constants = {name: weights(*shape, 1, 1) for name, shape in shapes.items()}
    constants["w1"][0] *= 8
    constants["w2"][:, 1] *= 8
    constants |= {name: array.astype(np.float32) for name, array in numbers.items()}
    return model_from_text(text, **constants, b1=biases(4), b2=biases(4), b3=biases(5))


def rows_below(title, text):
    """The cells of the table with this title, without its headings."""
    lines = text[text.index(title) :].splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("└"))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[:end] if line.startswith("│")]


def printed_chain(chain, absorptions=()):
    """The row of a chain of two layers."""
    (factors,) = chain.factors
    absorbed = "".join(f"{each.folded.max():.3g}" for each in absorptions)
    names = " -> ".join(layer.name for layer in chain.chain.layers)
    return [names, f"{factors.min():.3g}..{factors.max():.3g}", f"{chain.bits:.2f}", str(len(chain.limits) or ""), absorbed]


def test_equalized_model_is_written_and_what_was_done_printed(folder):
    onnx.save(layered_network(), folder / "layered.onnx")
    done = run("equalize", "layered.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert names_in(folder) == sorted([*GIVEN, "layered.onnx", "out.onnx"])
    equalization = biascorr.equalize(folder / "layered.onnx", X)
    assert onnx.load(folder / "out.onnx") == equalization.model
    first, second = equalization.chains
    assert rows_below("layers scaled together", done.stdout) == [
        printed_chain(first, equalization.high_biases),
        printed_chain(second),
    ]
    assert equalization.high_biases[0].first == "first"
    assert rows_below("left as it is", done.stdout) == [
        ["3", "... reads its output, after which a scaled channel is not the same", "third, side_1, ..."]
    ]
    assert rows_below("change of the float outputs", done.stdout) == [
        [step, f"{change.absolute:.3g}", f"{change.relative:.1e}"] for step, change in equalization.changes.items()
    ]
    assert done.stdout.splitlines()[-1] == "out.onnx: 1 batch normalizations folded, 3 of 5 layers scaled"
    assert "moved" not in done.stderr


def test_what_is_not_folded_is_said_in_one_note(folder):
    onnx.save(layered_network(), folder / "layered.onnx")
    command = "correct", "layered.onnx", "--data", "data/good.npz", "--method", "mean", "-o", "out.onnx", "--force"
    done = run(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "folded" not in done.stderr
    assert done.stdout.count("note: not folded: 1 batch normalization, ") == 1
    done = run(*command, "--fold", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "not folded" not in done.stdout
    assert "note: 1 batch normalization folded into layers" in done.stdout.splitlines()
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(folder / "out.onnx").graph.node}


@pytest.mark.parametrize("command", ["correct", "equalize"])
def test_no_more_samples_are_read_than_asked_for(command, folder):
    with_nan = samples(8, 3, 6, 6)
    with_nan[7] = np.nan
    np.save(folder / "x.npy", with_nan)
    arguments = command, "models/float.onnx", "--data", "x.npy", "--batch-size", "3", "-o", "out.onnx"
    done = run(*arguments, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "error: x.npy[6:8]: input x: contains nan\n")
    done = run(*arguments, "--max-samples", "7", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert command == "equalize" or "from 7 samples" in done.stdout
    assert run(*arguments, "--max-samples", "0", cwd=folder).returncode == 2


def test_validation_data_and_seed(folder):
    np.save(folder / "x.npy", samples(20, 3, 6, 6))
    np.save(folder / "other.npy", samples(5, 3, 6, 6, seed=3))
    arguments = "correct", "models/float.onnx", "--data", "x.npy", "-o", "out.onnx", "--force", "--max-samples", "18"
    done, seeded, other = (
        run(*arguments, *more, cwd=folder) for more in ((), ("--seed", "1"), ("--validation", "other.npy", "--seed", "1"))
    )
    for each in (done, seeded, other):
        assert each.returncode == 0, each.stderr
        assert "from 18 samples" in each.stdout
        assert "note: data: not all samples were read, 18 at most (max_samples)" in each.stdout
    assert "scored on 5 held-out samples" in other.stdout
    assert done.stdout != seeded.stdout
    assert run(*arguments, "--seed", "-1", cwd=folder).returncode == 2
    done = run(*arguments, "--validation", "none.npy", cwd=folder)
    assert (done.returncode, done.stderr) == (1, "error: validation: no such file: none.npy\n")


def test_channels_that_were_silenced_are_counted(folder):
    faint = weights(4, 3, 1, 1)
    faint[2] *= np.float32(1e-20)
    onnx.save(with_constants(layered_network(), w1=faint), folder / "layered.onnx")
    done = run("equalize", "layered.onnx", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "note: 1 channels pass on nothing, their weights became 0" in done.stdout.splitlines()


@pytest.mark.filterwarnings("ignore:the float outputs moved")
def test_float_outputs_that_moved_are_a_warning_in_one_line(folder):
    onnx.save(layered_network(clipped=True), folder / "layered.onnx")
    done = run("equalize", "layered.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--replace-relu6", cwd=folder)
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "moved" in line)
    change = biascorr.equalize(folder / "layered.onnx", X, replace_relu6=True).change
    assert warning == f"warning: the float outputs moved by up to {change}"


EQUALIZED = {
    "bounds per channel": ([], {}),
    "one sweep": (["--iterations", "1"], {"iterations": 1}),
    "ReLU in place of ReLU6": (["--replace-relu6"], {"replace_relu6": True}),
}


@pytest.mark.parametrize("name", EQUALIZED)
def test_equalization_as_asked_for_without_data(name, folder):
    options, meant = EQUALIZED[name]
    onnx.save(layered_network(clipped=True), folder / "layered.onnx")
    done = run("equalize", "layered.onnx", "-o", "out.onnx", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    equalization = biascorr.equalize(folder / "layered.onnx", **meant)
    assert onnx.load(folder / "out.onnx") == equalization.model
    assert rows_below("layers scaled together", done.stdout)[0] == printed_chain(
        equalization.chains[0], equalization.high_biases
    )
    assert equalization.chains[0].limits == ([] if "replace_relu6" in meant else ["act"])
    assert ("note: 1 ReLU6 became ReLU" in done.stdout.splitlines()) == ("replace_relu6" in meant)
    assert "change of the float outputs: not measured, no --data" in done.stdout.splitlines()


def test_model_with_nothing_to_equalize_is_written_as_it_came(folder):
    onnx.save(gated_network(), folder / "gated.onnx")
    np.save(folder / "gated.npy", gated_samples(4))
    done = run("equalize", "gated.onnx", "--data", "gated.npy", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "not measured" not in done.stdout
    assert done.stdout.splitlines()[-1] == "out.onnx: 0 batch normalizations folded, 0 of 1 layers scaled"
    assert onnx.load(folder / "out.onnx") == gated_network()


def test_model_without_layers_may_have_a_relu6_to_replace(folder):
    text = "g (float[N,3,6,6] x) => (float[N,3,6,6] y) { [act] y = Clip(x, zero, six) }"
    onnx.save(model_from_text(text, zero=np.float32(0), six=np.float32(6)), folder / "clip.onnx")
    done = run("equalize", "clip.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--replace-relu6", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in rows_below("change of the float outputs", done.stdout)] == ["ReLU6 to ReLU"]
    assert done.stdout.splitlines()[-1] == "out.onnx: 0 batch normalizations folded, 0 of 0 layers scaled"


def test_correction_of_an_equalized_model(folder):
    onnx.save(layered_network(), folder / "layered.onnx")
    arguments = ["correct", "layered.onnx", "--data", "data/good.npz", "--weight-bits", "4", "-o", "out.onnx"]
    done = run(*arguments, "--equalize", cwd=folder)
    assert done.returncode == 0, done.stderr
    params = QuantParams(weight_bits=4)
    correction = biascorr.correct(folder / "layered.onnx", X, quant_params=params, equalize=True)
    correction.save(folder / "expected.onnx")
    assert (folder / "out.onnx").read_bytes() == (folder / "expected.onnx").read_bytes()
    assert [row[0] for row in rows_below("layers scaled together", done.stdout)] == ["first -> second", "second -> third"]
    tried = [row[0] for row in rows_below("outputs against", done.stdout)]
    assert tried == ["uncorrected" if name == "none" else name for name in correction.scores]
    method = correction.choice.label
    assert method != "none"
    assert correction.choice.is_equalized
    corrected = sum(layer.method is not None for layer in correction.report)
    line = f"out.onnx: {corrected} of 5 layers corrected by {method} from 4 samples, equalized"
    assert done.stdout.splitlines()[-1] == line + FLOAT


def test_model_that_equalization_makes_no_better_is_written_as_it_came(gated, folder):
    done = run(*gated, "--equalize", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "out.onnx: 0 of 1 layers corrected from 12 samples, not equalized" + FLOAT
    assert onnx.load(folder / "out.onnx") == gated_network()


@pytest.mark.parametrize("method", ["auto", "mean"])
@pytest.mark.parametrize("kind", ["no layers", "recurrent"])
def test_a_model_of_which_nothing_could_be_corrected_has_a_status_of_its_own(kind, method, folder):
    """It is written all the same, as it was."""
    body, constants = "y = Relu(x)", {}
    if kind == "recurrent":
        body, constants = "y, h = RNN<hidden_size=2>(x, w, r)", {"w": weights(1, 2, 3), "r": weights(1, 2, 2)}
    model = model_from_text(f"g (float[N,4,3] x) => (float[?,?,?,?] y) {{ {body} }}", **constants)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, folder / "float.onnx")
    np.savez(folder / "x.npz", x=samples(8, 4, 3))
    done = run("correct", "float.onnx", "--data", "x.npz", "--method", method, "-o", "out.onnx", cwd=folder)
    assert done.returncode == 3, done.stderr
    reason = {"no layers": "the model has no layers", "recurrent": "it is recurrent, which is not corrected"}[kind]
    assert done.stdout.splitlines()[-1] == f"nothing could be corrected: {reason}"
    assert onnx.load(folder / "out.onnx") == model
