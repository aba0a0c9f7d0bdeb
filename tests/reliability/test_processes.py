"""Processes of every start method, beside and in the middle of work: they compute the same bits, and nobody hangs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

METHODS = ["fork", "forkserver", "spawn"]


def run(program, folder, *arguments):
    """What a program prints."""
    path = folder / "program.py"
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "TMPDIR": str(folder)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", path, *arguments]  # forking beside threads is the point
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("biascorr-*")) == []
    return done.stdout.splitlines()


CHILDREN = """
import multiprocessing, sys, threading
import workload

def children(context, count):
    with context.Pool(count) as pool:
        found = [pool.apply_async(workload.both) for _ in range(count)]
        return [each.get(60) for each in found]

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    expected = workload.both()
    print(children(context, 2) == [expected] * 2)
    running, found = True, []

    def keep_working():
        while running:
            found.append((workload.arrays(), workload.correction(memory_budget="1GB")) == expected)

    threads = [threading.Thread(target=keep_working) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        print(children(context, 2) == [expected] * 2)
    running = False
    for thread in threads:
        thread.join()
    print(all(found), workload.both() == expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_children_compute_beside_their_parent(method, tmp_path):
    assert run(CHILDREN, tmp_path, method) == ["True"] * 3 + ["True True"]


FORKED_INSIDE = """
import os, signal
import workload

expected = workload.both()
children, calls = [], iter(range(1000))

def fork_now_and_then(*_):
    if next(calls) % 9 == 5:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # what waits for ever is killed
            os._exit(0 if workload.both() == expected else 1)
        children.append(child)

print(workload.correction(progress=fork_now_and_then) == expected[1])
print(len(children) > 3, {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children})
"""


@pytest.mark.slow
def test_children_forked_in_the_middle_of_a_correction(tmp_path):
    assert run(FORKED_INSIDE, tmp_path) == ["True", "True {0}"]


LOADER = """
import multiprocessing, os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import numpy as np
import workload
from biascorr import Quantization, fake_quantize, prepare_input_mean
from networks import samples

KINDS = {"good": None, "raising": lambda: int("no number"), "dying": lambda: os.kill(os.getpid(), signal.SIGKILL)}

def batch(kind, k):
    if k == 7 and KINDS[kind] is not None:
        KINDS[kind]()
    raw = samples(1, 3, 6, 6, seed=k)
    grid = Quantization(8.0, 0, 8)
    whole = grid.dequantize(grid.quantize(raw))
    mean = prepare_input_mean([np.moveaxis(whole, 1, -1)] * 500, None)
    return fake_quantize(whole - mean[:, None, None], grid)

class Loader:
    "Batches that workers make, as torch's DataLoader has them."

    def __init__(self, context, kind):
        self.context, self.kind = context, kind

    def __len__(self):
        return 12

    def __iter__(self):
        with ProcessPoolExecutor(2, self.context) as pool:
            yield from pool.map(batch, [self.kind] * len(self), range(len(self)))

class PoolLoader(Loader):
    def __iter__(self):
        with self.context.Pool(2) as pool:
            yield from (each.get(60) for each in [pool.apply_async(batch, (self.kind, k)) for k in range(len(self))])

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    expected = workload.correction([batch("good", k) for k in range(12)])
    for loader in (Loader, PoolLoader):
        print(workload.correction(loader(context, "good")) == expected)
        try:
            workload.correction(loader(context, "raising"))
        except ValueError as error:
            print(error)
    try:
        workload.correction(Loader(context, "dying"))
    except BrokenProcessPool:
        print("died")
    print(workload.correction(Loader(context, "good"), threads=1) == expected, multiprocessing.active_children())
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_loader(method, tmp_path):
    raised = "invalid literal for int() with base 10: 'no number'"
    assert run(LOADER, tmp_path, method) == ["True", raised, "True", raised, "died", "True []"]


MEANS = """
import multiprocessing, sys
import workload
from arrays import random_array
from biascorr import ChannelMean

def part(k):
    mean = ChannelMean()
    for seed in range(k, 40, 4):
        mean.update(random_array((3, 5, 6), "int16", seed))
    return mean

if __name__ == "__main__":
    alone, merged = ChannelMean(), ChannelMean()
    for k in range(4):
        alone.merge(part(k))
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        for each in pool.imap_unordered(part, range(4)):
            merged.merge(each)
    print(merged.mean().tobytes() == alone.mean().tobytes(), merged.count == alone.count)
"""


@pytest.mark.parametrize("method", METHODS)
def test_accumulators_travel(method, tmp_path):
    assert run(MEANS, tmp_path, method) == ["True True"]


SUBINTERPRETERS = """
import sys

if sys.version_info >= (3, 13):
    import _interpreters

    def run(code):
        interpreter = _interpreters.create("legacy")
        failure = _interpreters.exec(interpreter, code)
        _interpreters.destroy(interpreter)
        return str(failure and failure.formatted)
else:
    import _xxsubinterpreters

    def run(code):
        interpreter = _xxsubinterpreters.create(isolated=False)
        try:
            _xxsubinterpreters.run_string(interpreter, code)
        except _xxsubinterpreters.RunFailedError as error:
            return str(error)
        finally:
            _xxsubinterpreters.destroy(interpreter)

code = f"import sys; sys.path[:] = {sys.path!r}; import biascorr"
for _ in range(2):
    print(run(code))
import numpy as np
import biascorr
print(biascorr.prepare_input_mean([np.ones((2, 3))], None))
print(run(code))
print(biascorr.prepare_input_mean([np.ones((2, 3))], None))
"""


def test_a_subinterpreter_is_refused(tmp_path):
    refused = "biascorr cannot be imported in a subinterpreter, as numpy cannot; use threads or processes"
    lines = run(SUBINTERPRETERS, tmp_path)
    assert [line.endswith(refused) for line in lines] == [True, True, False, True, False], lines
    assert lines[2] == lines[4] == "[1. 1. 1.]"
