"""A process that has imported everything, and forks a run of `correct` for each line that it reads.

A run can be killed at a random moment: so many seconds after it has told of its progress so many times.
"""

import functools
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biascorr import QuantParams, correct
from biascorr.__main__ import main
from biascorr.sweep import checkpoint
from networks import batch_norm, batch_norm_constants, biases, model_from_text, quantized, samples, two_layers, weights

LAYERS = 10
"""More than are measured in one stage of the float network."""


def deep_network() -> Any:
    """Convolutions with batch normalizations, which a runtime merges where nothing between them is asked for."""
    text, constants, before = "g (float[N,3,5,5] x) => (float[N,4] y) {\n", dict[str, Any](), "x"
    for k in range(LAYERS):
        text += f"""[conv{k}] c{k} = Conv<pads=[1,1,1,1]>({before}, w{k}, b{k})
            {batch_norm(f"c{k}", f"n{k}", f"norm{k}")}
            [relu{k}] r{k} = Relu(n{k})
        """
        constants |= {f"w{k}": weights(4, 4 if k else 3, 3, 3, seed=k) / 3, f"b{k}": biases(4, seed=k)}
        constants |= batch_norm_constants(4, f"norm{k}", seed=k)
        before = f"r{k}"
    return model_from_text(text + f"[mean] m = GlobalAveragePool({before})\n [flatten] y = Flatten(m) }}", **constants)


@functools.cache
def arguments(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """The float model, the samples and the options of a kind of run."""
    if kind == "deep":
        model, x = deep_network(), samples(16, 3, 5, 5) / 3
        return model, x, {"quantized": quantized(model, [{"x": x}]), "method": "squared", "strength": 0.5}
    model, x = two_layers(), samples(48, 3, 6, 6)
    if kind == "given":
        return model, x, {"quantized": quantized(model, [{"x": x[:4]}])}
    if kind == "simulated":
        return model, x, {"quant_params": QuantParams(weight_bits=4, activation_bits=8), "equalize": True}
    assert kind == "spilled"
    return model, x, {"quant_params": QuantParams(weight_bits=4), "method": "activation", "batch_size": 6, "memory_budget": 0}


def corrected(kind: str, output: Path, **options: Any) -> None:
    """Writes the corrected model, and beside it the record."""
    model, x, kept = arguments(kind)
    correction = correct(model, list(np.split(x, len(x))) if kind == "given" else x, **{**kept, **options})
    correction.save(output, force=True)
    record = {name: value for name, value in correction.to_dict().items() if name != "seconds"}
    output.with_suffix(".json").write_text(json.dumps(record))


def run(kind: str, output: str, folder: str | None, kill: tuple[int, float] | None, log: str, write: bool) -> None:
    """One run, which is killed; each step that it tells of is a line of the log."""
    told, lines = 0, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def progress(step: str, *_: Any) -> None:
        nonlocal told
        os.write(lines, f"{step}\n".encode())
        if kill is not None and told == kill[0]:
            killing = threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL))
            killing.daemon = True
            killing.start()
        told += 1

    if write:
        checkpoint.Checkpoint._write = half_written  # type: ignore[method-assign]
    if kind == "command":
        progress("the command")
        sys.argv[1:] = json.loads(output)
        main()
    else:
        corrected(kind, Path(output), checkpoint=folder, progress=progress)


def half_written(_: Any, path: Path, content: bytes) -> None:
    """What a write does that is killed in the middle."""
    path.with_suffix(".new").write_bytes(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """How a run ended: by a signal (negative) or by itself (0); the steps that it told of."""

    status: int
    steps: list[str]


class Runs:
    """The process, for tests: each call is a run."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, kind: str, output: Any, folder: Path | None = None, kill: Any = None, write: bool = False) -> Ended:
        self._log.unlink(missing_ok=True)
        line = json.dumps([kind, str(output), None if folder is None else str(folder), kill, str(self._log), write])
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return Ended(status, self._log.read_text().splitlines())

    def close(self) -> None:
        self._process.communicate()


def steps_recorded(folder: Path) -> dict[int, str]:
    """The functions whose results are recorded whole, by their numbers."""
    found = {}
    for path in sorted(folder.glob("*.record")):
        content = path.read_bytes()[len(checkpoint._MAGIC) :]
        assert hashlib.sha256(content[32:]).digest() == content[:32], path
        found[int(path.stem)] = pickle.loads(content[32:])[0]
    return found


def serve() -> None:
    """Forks a run for each line, and says how it ended."""
    warnings.simplefilter("ignore")
    for kind in ("deep", "given", "simulated", "spilled"):
        arguments(kind)
    for line in sys.stdin:
        kind, *others = json.loads(line)
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                run(kind, *others)
                status = 0
            except SystemExit as end:  # of a command that was done before it was killed
                status = int(end.code or 0)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
