"""Threads, CPU tiers and processes: the same bits everywhere, and nothing that hangs."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import biascorr
from arrays import random_array

DIGEST = """
import hashlib
import numpy as np
from biascorr import MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean, set_num_threads
from biascorr.statistics import TapMean, Window

rng = np.random.default_rng(0)
real = rng.standard_normal((2, 300, 70, 33))
weights = rng.standard_normal((3, 3, 300, 200))
window = Window((3, 3), (2, 1), (1, 2), ((1, 1), (2, 2)))
for threads in (1, 2, 3, 4):
    set_num_threads(threads)
    digest = hashlib.sha256()
    for dtype in ("float16", "float32", "float64", "int8", "int64"):
        sample = (100 * real).astype(dtype)
        for view in (sample, np.moveaxis(sample, 1, -1), sample[:, ::2, 1:], sample[0, :3]):
            digest.update(prepare_input_mean([view, view[:1]], None))
        taps = TapMean(window)
        taps.update(sample)
        digest.update(taps.mean())
    for dtype in ("float32", "float64"):
        w = weights.astype(dtype)
        wq = fake_quantize(w, Quantization(scale=20.0))
        digest.update(wq)
        digest.update(fake_quantize(w, Quantization(scale=np.linspace(1.0, 30.0, 200))))
        for layout in ("HWIO", "HWOI"):
            mean = rng.standard_normal(300 if layout == "HWIO" else 200)
            rng = np.random.default_rng(1)
            digest.update(MeanBiasCorrector(np.ones(len(mean)) / 3, layout=layout).calculate(w, wq))
    print(threads, digest.hexdigest())
"""


def run(code, **environment):
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def test_every_tier_and_thread_count_gives_the_same_bits():
    outputs = {tier: run(DIGEST, BIASCORR_MAX_ISA=tier) for tier in ("baseline", "avx2", "avx512")}
    digests = {line.split()[1] for output in outputs.values() for line in output.splitlines()}
    assert len(digests) == 1, outputs


def test_a_lower_tier_can_be_forced():
    show = "import biascorr; biascorr.show_config()"
    assert "cpu tier: baseline" in run(show, BIASCORR_MAX_ISA="baseline")
    config = run(show, RAYON_NUM_THREADS="3")
    assert f"biascorr {biascorr.__version__}" in config
    assert "threads: 3" in config
    assert "build profile: release" in config


def test_number_of_threads():
    before = biascorr.get_num_threads()
    try:
        biascorr.set_num_threads(3)
        assert biascorr.get_num_threads() == 3
        for wrong in (0, -1, 1025, 10**9):
            with pytest.raises(ValueError, match=f"num_threads: {wrong}, expected 1 to 1024"):
                biascorr.set_num_threads(wrong)
    finally:
        biascorr.set_num_threads(before)


def test_a_forked_child_computes():
    code = """
import os, warnings
import numpy as np
from biascorr import prepare_input_mean
warnings.simplefilter("ignore")  # forking with threads is the point
sample = np.ones((4096, 1024), np.float32)
assert prepare_input_mean([sample], None)[0] == 1
child = os.fork()
if child == 0:
    os._exit(0 if prepare_input_mean([sample], None)[0] == 1 else 1)
print(os.waitpid(child, 0)[1])
assert prepare_input_mean([sample], None)[0] == 1
"""
    assert run(code) == "0\n"


def test_python_threads_share_the_pool():
    samples = [random_array((700, 1000), "int8", seed) for seed in range(8)]
    expected = [sample.mean(axis=0, dtype=np.float64).astype(np.float32) for sample in samples]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(lambda sample: biascorr.prepare_input_mean([sample], None), samples))
            np.testing.assert_array_equal(found, expected)


def test_the_gil_is_released_during_long_work():
    sample = np.ones((64, 250_003))
    gaps, running = [0.0], threading.Event()

    def tick():
        last = time.perf_counter()
        while not running.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            gaps[-1] = max(gaps[-1], now - last)
            last = now

    ticker = threading.Thread(target=tick)
    threads = biascorr.get_num_threads()
    biascorr.set_num_threads(1)  # so that the ticker has a core to run on
    try:
        ticker.start()
        start = time.perf_counter()
        for _ in range(5):
            biascorr.prepare_input_mean([sample], None)
        each = (time.perf_counter() - start) / 5
    finally:
        running.set()
        ticker.join()
        biascorr.set_num_threads(threads)
    assert gaps[-1] < each * 0.9, "no other thread ran while the kernel did"


def test_summing_takes_no_memory_that_grows_with_the_sample():
    code = """
import resource
import numpy as np
from biascorr import prepare_input_mean
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare_input_mean([np.ones((4096, 512), np.int8)], None)
sample = np.zeros((512, 1 << 19), np.int8)
sample[...] = 1
for view in (sample, sample.T, sample[::-1, ::2], sample.reshape(64, -1, 1 << 19)):
    before = peak()
    assert (prepare_input_mean([view[..., :4096]], None) == 1).all()
    assert (prepare_input_mean([view.T[..., :1024]], None) == 1).all()
    print(peak() - before)
"""
    assert all(int(line) < 16_384 for line in run(code).splitlines())  # kilobytes, for samples of 256 MB
