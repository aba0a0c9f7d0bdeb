"""The command line as a user runs it: what is written and printed, every mistake as one line, nothing left behind."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import biascorr
from biascorr import QuantParams
from biascorr.cli import options, running
from command_line import COMMAND, GIVEN, assert_one_error, environment, names_in, run, start
from networks import biases, gated_network, gated_samples, model_from_text, samples, two_layers, weights, with_constants

X = samples(4, 3, 6, 6)


COMMANDS = ["correct", "equalize"]
both_commands = pytest.mark.parametrize("command", COMMANDS)


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
    done = run("correct", "models/float.onnx", *GOOD[name], "-o", "out.onnx", "--verbose", cwd=folder)
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
        shift = "" if layer.shift_before is None else f"{layer.shift_before:.3g}"
        for value in (layer.op, layer.method or "", layer.channels, shift, f"{layer.sqnr_after:.1f}"):
            assert str(value) in row
    corrected = sum(layer.method is not None for layer in correction.report)
    method = "uncorrected" if correction.method == "none" else correction.method
    assert re.search(rf" samples?, {method}, {corrected} of 3 layers, [\d.]+ s -> out.onnx", done.stdout.splitlines()[-1])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["npz", "method"])
def test_scores_and_notes_are_printed(name, folder):
    done = run("correct", "models/float.onnx", *GOOD[name], "-o", "out.onnx", cwd=folder)
    correction = biascorr.correct(two_layers(), X, **({} if name == "npz" else {"method": "empirical", "strength": 0.5}))
    _, table = done.stdout.split("outputs beside those of the float model")
    scores = {"uncorrected" if name == "none" else name: score for name, score in correction.scores.items()}
    rows = [re.split("  +", line.strip()) for line in table.splitlines()[2 : 2 + len(scores)]]
    gains = {name: str(score.gains_over(scores["uncorrected"])["sqnr"]) for name, score in scores.items()} | {"uncorrected": ""}
    found = [[cell for cell in (name, f"{score.sqnr:.2f}", gains[name]) if cell] for name, score in scores.items()]
    assert [row[: len(cells)] for row, cells in zip(rows, found)] == found
    assert [row[0] for row in rows if row[-1] == "taken"] == [correction.method]
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
    assert "1  no correction made the outputs better  layer" in done.stdout
    assert "uncorrected, 0 of 1 layer, " in done.stdout.splitlines()[-1]
    assert onnx.load(folder / "out.onnx") == gated_network()


def test_method_that_makes_the_outputs_worse_says_so_in_one_note(gated, folder):
    done = run(*gated, "--method", "empirical", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "made the outputs worse" not in done.stderr
    assert done.stdout.count("made the outputs worse") == 1
    quiet = run(*gated, "--method", "empirical", "--quiet", "--force", cwd=folder)
    assert re.fullmatch(r"warning: empirical made the outputs worse: .*\n", quiet.stderr)


def test_report_says_why_a_layer_is_left_alone(folder):
    onnx.save(with_constants(two_layers(), w2=np.zeros((6, 4, 3, 3), np.float32)), folder / "zeros.onnx")
    done = run("correct", "zeros.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "weights are not quantized" in line)
    assert row.split() == ["1", "weights", "are", "not", "quantized", "second"]
    assert "2 of 3 layers" in done.stdout


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
    done = start(*arguments, cwd=folder, PYTHONIOENCODING="ascii")
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
    assert r" -> out\x1b[1m.onnx" in done.stdout
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
    assert r" -> out\udcfe.onnx" in done.stdout
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
    done = start(*arguments, cwd=folder, limit=600, PYTHONDONTWRITEBYTECODE="1")
    assert_one_error(done)
    assert names_in(folder) == GIVEN + ["out.onnx"] * existing
    assert not existing or (folder / "out.onnx").read_bytes() == b"precious"


CORRECT = ("correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx")


def test_what_is_written_before_the_disk_is_full_is_said(folder):
    done = start(*CORRECT, "--report", "report.html", cwd=folder, limit=6000, PYTHONDONTWRITEBYTECODE="1")
    assert_one_error(done)
    assert done.stderr.splitlines()[-1].endswith("'report.html', but out.onnx is written")
    assert names_in(folder) == sorted([*GIVEN, "out.onnx"])


def test_closed_streams_are_no_failure(folder):
    closed = subprocess.run(["/bin/sh", "-c", f"{shlex.join([str(COMMAND), *CORRECT])} <&- >&- 2>&-"], check=False, cwd=folder)
    assert closed.returncode == 0
    onnx.checker.check_model(onnx.load(folder / "out.onnx"))


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
    ("models/float.onnx", "data/good.npz", ("--method", "empirical", "--strength", "1.5"), "strength: 1.5"),
    ("models/float.onnx", "data/good.npz", ("--strength", "0.5"), "strength: 0.5, expected 1 with method 'auto'"),
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


@pytest.mark.parametrize("budget", ["x", "-1", "1.5.5", "nan", "1e9", "GB"])
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


def test_command_needs_no_writable_home(folder):
    done = start("correct", "models/float.onnx", "--data", "data/good.npz", "-o", "out.onnx", cwd=folder, HOME="/nonexistent")
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
    lines = text[text.index(title) :].splitlines()[2:]
    return [re.split("  +", line.strip()) for line in itertools.takewhile(lambda line: "  " in line, lines)]


def printed_chain(chain):
    """The row of a chain of two layers."""
    (factors,) = chain.factors
    names = " -> ".join(layer.name for layer in chain.chain.layers)
    bounds = [str(len(chain.limits))] if chain.limits else []
    return [names, f"{factors.min():.3g}..{factors.max():.3g}", f"{chain.bits:.2f}", *bounds]


def test_equalized_model_is_written_and_what_was_done_printed(folder):
    onnx.save(layered_network(), folder / "layered.onnx")
    done = run("equalize", "layered.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--no-provenance", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert names_in(folder) == sorted([*GIVEN, "layered.onnx", "out.onnx"])
    equalization = biascorr.equalize(folder / "layered.onnx", X)
    assert onnx.load(folder / "out.onnx") == equalization.model
    first, second = equalization.chains
    assert rows_below("layers scaled together", done.stdout) == [printed_chain(first), printed_chain(second)]
    assert (
        f"high biases of 1 layer folded into the next ones, up to {equalization.high_biases[0].folded.max():.3g}" in done.stdout
    )
    assert equalization.high_biases[0].first == "first"
    assert rows_below("left as they are", done.stdout) == [
        ["3", "... reads its output, after which a scaled channel is not the same", "third, side_1, ..."]
    ]
    assert rows_below("change of the float outputs", done.stdout) == [
        [step, f"{change.absolute:.3g}", f"{change.relative:.1e}"] for step, change in equalization.changes.items()
    ]
    assert re.fullmatch(
        r"3 of 5 layers scaled, 1 batch normalization folded, [\d.]+ s -> out.onnx", done.stdout.splitlines()[-1]
    )
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
    assert command == "equalize" or "of 7 samples" in done.stdout
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
        assert "of 18 samples" in each.stdout
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
    assert "note: 1 channel passes on nothing, whose weights became 0" in done.stdout.splitlines()


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
    done = run("equalize", "layered.onnx", "-o", "out.onnx", "--no-provenance", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    equalization = biascorr.equalize(folder / "layered.onnx", **meant)
    assert onnx.load(folder / "out.onnx") == equalization.model
    assert rows_below("layers scaled together", done.stdout)[0] == printed_chain(equalization.chains[0])
    assert equalization.chains[0].limits == ([] if "replace_relu6" in meant else ["act"])
    assert ("note: 1 ReLU6 became ReLU" in done.stdout.splitlines()) == ("replace_relu6" in meant)
    assert "change of the float outputs: not measured, no --data" in done.stdout.splitlines()


def test_model_with_nothing_to_equalize_is_written_as_it_came(folder):
    onnx.save(gated_network(), folder / "gated.onnx")
    np.save(folder / "gated.npy", gated_samples(4))
    done = run("equalize", "gated.onnx", "--data", "gated.npy", "-o", "out.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "not measured" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 of 1 layer scaled, 0 batch normalizations folded, ")
    assert onnx.load(folder / "out.onnx") == gated_network()


def test_model_without_layers_may_have_a_relu6_to_replace(folder):
    text = "g (float[N,3,6,6] x) => (float[N,3,6,6] y) { [act] y = Clip(x, zero, six) }"
    onnx.save(model_from_text(text, zero=np.float32(0), six=np.float32(6)), folder / "clip.onnx")
    done = run("equalize", "clip.onnx", "--data", "data/good.npz", "-o", "out.onnx", "--replace-relu6", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in rows_below("change of the float outputs", done.stdout)] == ["ReLU6 to ReLU"]
    assert done.stdout.splitlines()[-1].startswith("0 of 0 layers scaled, 0 batch normalizations folded, ")


def test_correction_of_an_equalized_model(folder):
    onnx.save(layered_network(), folder / "layered.onnx")
    arguments = ["correct", "layered.onnx", "--data", "data/good.npz", "--weight-bits", "4", "-o", "out.onnx", "--verbose"]
    done = run(*arguments, "--equalize", cwd=folder)
    assert done.returncode == 0, done.stderr
    params = QuantParams(weight_bits=4)
    correction = biascorr.correct(folder / "layered.onnx", X, quant_params=params, equalize=True)
    correction.save(folder / "expected.onnx")
    assert (folder / "out.onnx").read_bytes() == (folder / "expected.onnx").read_bytes()
    assert [row[0] for row in rows_below("layers scaled together", done.stdout)] == ["first -> second", "second -> third"]
    tried = [row[0] for row in rows_below("outputs beside", done.stdout)]
    assert tried == ["uncorrected" if name == "none" else name for name in correction.scores]
    method = correction.choice.label
    assert method != "none"
    assert correction.choice.is_equalized
    corrected = sum(layer.method is not None for layer in correction.report)
    last = done.stdout.splitlines()[-1]
    assert f", equalized, {method}, {corrected} of 5 layers, " in last
    assert last.endswith("-> out.onnx; a float model, quantize it now")


def test_model_that_equalization_makes_no_better_is_written_as_it_came(gated, folder):
    done = run(*gated, "--equalize", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "uncorrected, 0 of 1 layer, " in done.stdout.splitlines()[-1]
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
    assert f"nothing could be corrected: {reason}" in done.stdout.splitlines()
    assert onnx.load(folder / "out.onnx") == model


def test_what_a_function_of_the_user_raises_is_one_line(folder):
    (folder / "mine.py").write_text("def batches():\n    yield {}['x']\n")
    done = run("correct", "models/float.onnx", "--data", "mine:batches", "-o", "out.onnx", cwd=folder)
    assert_one_error(done)
    assert re.search(r"^error: KeyError: 'x' \(.*mine\.py, line 2; --verbose shows more\)$", done.stderr, re.MULTILINE)
