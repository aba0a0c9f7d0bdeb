"""Threads, CPU tiers and processes: the same bits everywhere, and nothing that hangs."""

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import biascorr
from arrays import random_array

X86 = platform.machine().lower() in ("x86_64", "amd64")
TIERS = ("baseline", "avx2", "avx512") if X86 else ("baseline", "neon")

DIGEST = """
import hashlib
import ml_dtypes
import numpy as np
from biascorr import MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean, set_num_threads
from biascorr.channel_scale import channel_ranges, scaled_channels
from biascorr.statistics import TapMean
from biascorr.windows import Window

rng = np.random.default_rng(0)
real = rng.standard_normal((2, 300, 70, 33))
weights = rng.standard_normal((3, 3, 300, 200))
window = Window((3, 3), (2, 1), (1, 2), ((1, 1), (2, 2)))
for threads in (1, 2, 3, 4):
    set_num_threads(threads)
    digest = hashlib.sha256()
    for dtype in ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "int4"):
        whole = (100 * real).astype("int8") if dtype in ("uint8", "int4") else 100 * real
        sample = whole.astype(getattr(ml_dtypes, dtype, dtype))
        flat = sample.ravel()
        wide, long = flat[: 600 * 2048].reshape(600, 2048), flat[: 12 * 99_999].reshape(4, 3, 99_999)
        views = sample, np.moveaxis(sample, 1, -1), sample[:, ::2, 1:], sample[0, :3], wide, wide.T, np.moveaxis(long, 1, -1)
        for view in views:
            digest.update(prepare_input_mean([view, view[:1]], None))
        if dtype != "int4":
            for channel_axis in (1, 3):
                taps = TapMean(window, channel_axis=channel_axis)
                taps.update(sample)
                digest.update(taps.mean())
    for dtype in ("float32", "float64"):
        w = weights.astype(dtype)
        wq = fake_quantize(w, Quantization(scale=20.0))
        digest.update(wq)
        digest.update(fake_quantize(w, Quantization(scale=np.linspace(1.0, 30.0, 200))))
        for axis in (None, -1):
            searched = [Quantization.from_weights(w, 4, axis=axis, asymmetric=asymmetric) for asymmetric in (False, True)]
            digest.update(repr(searched).encode())
        for layout in ("HWIO", "HWOI", "HWCM", "OIHW", "IOHW"):
            corrector = MeanBiasCorrector(np.arange(w.shape[max(layout.find("I"), layout.find("C"))]) / 3, layout=layout)
            given = corrector.calculate(w, wq)
            digest.update(given)
            computed = corrector.calculate_from_quantization(w, Quantization(scale=20.0))
            assert given.tobytes() == computed.tobytes(), layout
            digest.update(corrector.calculate_from_quantization(w, Quantization(np.linspace(1.0, 30.0, len(given)))))
            inputs = np.linspace(0.1, 3.0, len(channel_ranges(w, layout, axis="I")))
            outputs = np.linspace(0.1, 3.0, len(given))
            for factors in ({}, {"factors": inputs}):
                digest.update(channel_ranges(w, layout, axis="O", **factors))
            for factors in ({}, {"factors": outputs}):
                digest.update(channel_ranges(w, layout, axis="I", **factors))
            digest.update(scaled_channels(w, layout, output_factors=outputs, input_factors=inputs))
    print(threads, digest.hexdigest())
"""


def run(code, **environment):
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def test_every_tier_and_thread_count_gives_the_same_bits():
    outputs = {tier: run(DIGEST, BIASCORR_MAX_ISA=tier) for tier in TIERS}
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


FORKS = """
import os, random, signal, threading, time, warnings
import numpy as np
import biascorr
warnings.simplefilter("ignore")  # forking with threads is the point
random.seed(0)
sample = np.ones((1024, 1024), np.int8)  # worth threads

def computes():
    return biascorr.get_num_threads() > 0 and biascorr.prepare_input_mean([sample], None)[0] == 1

def forked(task):
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # what waits for ever is killed
        os._exit(0 if task() else 1)
    return os.waitpid(child, 0)[1]
"""


def test_a_child_forked_during_the_first_call_computes():
    code = """
def first_call_and_fork():
    first = threading.Thread(target=computes)
    first.start()
    end = time.perf_counter() + random.uniform(0, 1e-3)
    while time.perf_counter() < end:
        pass
    status = forked(computes)
    first.join()
    return status == 0

for _ in range(200):
    random.seed(random.random())
    status = forked(first_call_and_fork)
    if status:
        break
print(status)
"""
    assert run(FORKS + code) == "0\n"


@pytest.mark.parametrize("work", ["computes()", "biascorr.set_num_threads(2 + random.randrange(2)), computes()"])
def test_a_child_forked_while_another_thread_computes_does_too(work):
    code = f"""
running = True

def keep_working():
    while running:
        {work}

thread = threading.Thread(target=keep_working)
thread.start()
for _ in range(250):
    status = forked(computes)
    if status:
        break
running = False
thread.join()
print(status)
"""
    assert run(FORKS + code) == "0\n"


@pytest.mark.parametrize("work", ["biascorr.get_num_threads() > 0", "biascorr.set_num_threads(2) is None and computes()"])
def test_a_child_forked_during_the_first_call_knows_its_threads(work):
    code = f"""
def first_call_and_fork():
    first = threading.Thread(target=computes)
    first.start()
    time.sleep(random.uniform(0, 4e-4))
    status = forked(lambda: {work})
    first.join()
    return status == 0

print(any(forked(first_call_and_fork) for _ in range(100)))
"""
    assert run(FORKS + code) == "False\n"


ENDLESS = {
    "mean": "prepare_input_mean([np.ones((64, 64, 64, 32), np.int8)], None)",
    "copied samples": "prepare_input_mean([half.astype('>f2')], None)",
    "shift": "MeanBiasCorrector(np.ones(2000)).calculate(half, weights)",
    "fake quantized": "fake_quantize(weights, Quantization())",
    "quantized": "Quantization().quantize(weights)",
    "list": "prepare_input_mean(Slow([half] * 50), None)",
}


@pytest.mark.parametrize("work", ENDLESS)
def test_a_process_ends_while_daemon_threads_compute(work):
    code = f"""
import threading, time
import numpy as np
from biascorr import MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean
half, weights = np.ones((2000, 500), np.float16), np.ones((2000, 500), np.float32)

class Slow(list):
    def __getitem__(self, k):
        time.sleep(0)
        return super().__getitem__(k)

def endless():
    while True:
        {ENDLESS[work]}

for _ in range(3):
    threading.Thread(target=endless, daemon=True).start()
time.sleep(0.05)
"""
    for _ in range(5):
        assert run(code) == ""


def test_grandchildren_compute_and_keep_the_number_of_threads():
    code = """
biascorr.set_num_threads(3)
assert computes()

def child():
    grandchild = forked(lambda: biascorr.get_num_threads() == 5 and computes())
    return grandchild == 0 and biascorr.get_num_threads() == 5 and computes()

def set_then_fork():
    kept = biascorr.get_num_threads() == 3
    biascorr.set_num_threads(5)
    return kept and child()

print(forked(set_then_fork), biascorr.get_num_threads(), computes())
"""
    assert run(FORKS + code) == "0 3 True\n"


def test_a_tier_that_there_is_not_is_an_error_at_once():
    for name in ("sse9", "", "AVX2", "neon" if X86 else "avx2"):
        code = "import biascorr"
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "BIASCORR_MAX_ISA": name},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 1
        assert f'ValueError: BIASCORR_MAX_ISA: "{name}", expected one of "baseline", ' in result.stderr


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


PEAK = """
from pathlib import Path
# Not ru_maxrss: it starts at the peak of the process that started this one.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_summing_takes_no_memory_that_grows_with_the_sample():
    code = """
import numpy as np
from biascorr import prepare_input_mean
prepare_input_mean([np.ones((4096, 512), np.int8)], None)
sample = np.zeros((512, 1 << 19), np.int8)
sample[...] = 1
for view in (sample, sample.T, sample[::-1, ::2], sample.reshape(64, -1, 1 << 19)):
    before = peak()
    assert (prepare_input_mean([view[..., :4096]], None) == 1).all()
    assert (prepare_input_mean([view.T[..., :1024]], None) == 1).all()
    print(peak() - before)
"""
    assert all(int(line) < 16_384 for line in run(PEAK + code).splitlines())  # kilobytes, for samples of 256 MB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_kernel_takes_memory_that_grows_with_what_it_reads():
    code = """
import ml_dtypes
import numpy as np
from biascorr import MeanBiasCorrector, Quantization, prepare_input_mean
from biascorr.channel_scale import channel_ranges
from biascorr.statistics import TapMean
from biascorr.windows import Window
bytes = np.ones(128 << 20, np.uint8)
taps = TapMean(Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))))
weights, quantized = np.ones((4096, 4096), np.float32), np.zeros((4096, 4096), np.float32)
wide = weights[:2048].astype(np.float64)
per_block = np.full((16, 4096), 2.0)
kernels = {
    "int4": lambda size: prepare_input_mean([bytes[: size << 20].view(ml_dtypes.int4).reshape(-1, 64)], None),
    "taps": lambda size: taps.update(bytes[: size << 20].reshape(-1, 64, 32, 32)),
    "IO": lambda size: MeanBiasCorrector(np.ones(32 * size)).calculate(weights[: 32 * size], quantized[: 32 * size]),
    "OI": lambda size: MeanBiasCorrector(np.ones(4096), layout="OI").calculate(weights[: 32 * size], quantized[: 32 * size]),
    "grid": lambda size: MeanBiasCorrector(np.ones(4096), layout="OI").calculate_from_quantization(
        weights[: 32 * size], Quantization(2.0)
    ),
    "float64": lambda size: MeanBiasCorrector(np.ones(16 * size)).calculate(wide[: 16 * size], wide[: 16 * size]),
    "blocks": lambda size: MeanBiasCorrector(np.ones(32 * size)).calculate_from_quantization(
        weights[: 32 * size], Quantization(per_block[: size // 8], 0, 4), block_size=256
    ),
    "rows": lambda size: channel_ranges(weights[: 32 * size], "OI", axis="O", factors=np.ones(4096)),
    "columns": lambda size: channel_ranges(weights[: 32 * size], "OI", axis="I", factors=np.ones(32 * size)),
    "strides": lambda size: channel_ranges(weights[: 32 * size, ::2].T, "OI", axis="I"),
}
for name, kernel in kernels.items():
    kernel(8)
    before = peak()
    kernel(128)
    print(name, peak() - before)
"""
    growth = {name: int(kilobytes) for name, kilobytes in map(str.split, run(PEAK + code).splitlines())}
    assert all(kilobytes < 8192 for kilobytes in growth.values()), growth  # for 128 MB each


def test_a_sample_takes_as_long_among_many_views_of_one_array():
    def seconds_each(count):
        samples = list(np.ones((count, 1, 7, 7, 16), np.int8))
        start = time.perf_counter()
        biascorr.prepare_input_mean(samples, None)
        return (time.perf_counter() - start) / count

    few = min(seconds_each(1000) for _ in range(5))
    assert min(seconds_each(20_000) for _ in range(3)) < 4 * few
