"""Sessions as a user has them, in an empty folder at 80x24: what is printed, but for the numbers, and the bar."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
from pathlib import Path

import numpy as np
import onnx
import pytest

from command_line import COMMAND, environment, run
from networks import biases, model_from_text, quantized, samples, weights

SESSIONS = Path(__file__).with_name("transcripts")


@pytest.fixture
def session(tmp_path):
    """A folder with a float and a quantized classifier, and samples."""
    text = """g (float[N,3,8,8] x) => (float[N,5] scores) {
        [stem_conv] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [stem_norm] n = BatchNormalization(a, gamma, beta, mean, variance)
        [stem_act] r = Relu(n)
        [blocks_0_conv] c = Conv(r, w2, b2)
        [blocks_0_act] s = Relu(c)
        [head_pool] p = GlobalAveragePool(s)
        [head_flatten] f = Flatten(p)
        [head_fc] y = Gemm(f, w3, b3)
        [head_softmax] scores = Softmax(y)
    }"""
    norm = {"gamma": np.linspace(0.5, 2, 6), "beta": np.ones(6), "mean": np.zeros(6), "variance": np.ones(6)}
    constants = {name: array.astype(np.float32) for name, array in norm.items()}
    constants |= {"w1": weights(6, 3, 3, 3), "w2": weights(7, 6, 3, 3), "w3": weights(7, 5, axis=1)}
    for name in ("w1", "w2"):
        constants[name][0] *= 8  # one channel takes the range of all, so that no rounding of a CPU counts beside that
    constants["w3"] *= 0.1
    model = model_from_text(text, **constants, b1=biases(6), b2=biases(7), b3=biases(5))
    for node in model.graph.node:
        node.name = node.name.replace("_", "/")
    onnx.save(model, tmp_path / "float.onnx")
    options = {"reduce_range": True, "op_types_to_quantize": ["Conv", "Gemm"]}
    onnx.save(quantized(model, [{"x": samples(4, 3, 8, 8)}], **options), tmp_path / "int8.onnx")
    np.save(tmp_path / "samples.npy", samples(24, 3, 8, 8))
    return tmp_path


def masked(text):
    """Without numbers that depend on the machine, and the spaces that depend on these."""
    text = re.sub(r"[+-]?\d+(\.\d+)?(e[+-]\d+)?", "#", text)
    return [re.sub(r" +", " ", line).strip() for line in text.splitlines()]


@pytest.mark.parametrize("path", sorted(SESSIONS.glob("*.txt")), ids=lambda path: path.stem)
def test_session(path, session):
    text = path.read_text(encoding="utf-8")
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        name, *arguments = shlex.split(command)
        assert name == "biascorr"
        done = run(*arguments, cwd=session, COLUMNS="80", LINES="24")
        shown = done.stdout + done.stderr + (f"[status {done.returncode}]\n" if done.returncode else "")
        assert masked(shown) == masked(expected), f"$ {command}\n{shown}"


def on_terminal(*arguments, cwd, rows=24, columns=80, **variables):
    """What a command shows on a terminal of its own, and its status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {name: value for name, value in environment(**variables).items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([COMMAND, *arguments], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the process has ended
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown.decode()


def test_bar_grows_says_what_is_done_and_is_gone_in_the_end(session):
    arguments = "correct", "float.onnx", "--data", "samples.npy", "--quantized", "int8.onnx", "-o", "out.onnx"
    status, shown = on_terminal(*arguments, cwd=session)
    assert status == 0, shown
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    *frames, _ = (frame for frame in re.split(r"\r(?!\n)", plain) if "%" in frame)
    shares = [int(re.search(r"(\d+)%", frame)[1]) for frame in frames]
    assert shares == sorted(shares)
    assert all(len(frame.strip("\n")) <= 80 for frame in frames)
    assert any(re.match(r"candidate \d of 6: ", frame) for frame in frames)
    assert any(re.search(r"\d:\d\d:\d\d +\d:\d\d:\d\d left", frame) for frame in frames)
    result = shown[shown.rindex("\x1b[2K") :]  # the bar is wiped out before anything is printed
    assert "%" not in result.partition("->")[0]
    assert plain.rstrip().endswith("-> out.onnx")


@pytest.mark.parametrize("option", ["an error", "quiet"])
def test_there_is_no_bar_after_an_error_nor_where_none_is_wanted(option, session):
    np.save(session / "bad.npy", np.full((8, 3, 8, 8), np.nan, np.float32))
    more = ["--data", "samples.npy", "--fold", "--quiet"] if option == "quiet" else ["--data", "bad.npy"]
    status, shown = on_terminal("correct", "float.onnx", "-o", "out.onnx", "--method", "mean", *more, cwd=session)
    assert (status, "━" in shown) == ((0, False) if option == "quiet" else (1, False)), shown
    assert shown.endswith("\r\n") if option == "an error" else shown == "", shown


def test_no_color_where_none_is_wanted(session):
    arguments = "inspect", "float.onnx"
    colored, plain = (on_terminal(*arguments, cwd=session, **variables)[1] for variables in ({}, {"NO_COLOR": "1"}))
    assert re.search(r"\x1b\[\d*[1-9]m", colored)
    assert not re.search(r"\x1b\[[\d;]*3\d", plain)
