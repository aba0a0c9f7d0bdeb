"""Python threads that work at once: the same bits as one alone."""

import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import biascorr
import workload
from arrays import random_array
from biascorr import ChannelMean
from biascorr.statistics import TapMean
from biascorr.windows import Window
from tflite_networks import content_of, float_of, samples_of

THREADS = 16

ACCUMULATORS = {"channels": ChannelMean, "taps": lambda: TapMean(Window((2, 2), (1, 1), (1, 1), ((0, 0), (1, 1))))}


@pytest.fixture(autouse=True)
def _often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work, count=THREADS):
    """What threads get that start the same work at the same time."""
    start = threading.Barrier(count)

    def run(k):
        start.wait()
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.fixture
def restless():
    """Meanwhile, another thread sets the number of threads again and again."""
    before, ended = biascorr.get_num_threads(), threading.Event()

    def set_again():
        for k in range(1 << 30):
            biascorr.set_num_threads(1 + k % 4)
            if ended.wait(0.002):
                return

    thread = threading.Thread(target=set_again)
    thread.start()
    yield
    ended.set()
    thread.join()
    biascorr.set_num_threads(before)


@pytest.mark.usefixtures("restless")
def test_functions_of_arrays():
    expected = [workload.arrays(seed) for seed in range(THREADS)]
    assert at_once(workload.arrays) == expected


@pytest.mark.usefixtures("restless")
def test_corrections():
    expected = workload.correction()
    assert set(at_once(lambda _: workload.correction(memory_budget="1GB"))) == {expected}


@pytest.mark.usefixtures("restless")
def test_corrections_of_tflite():
    whole, content, data = (find("convolutions-int8") for find in (float_of, content_of, samples_of))
    work = functools.partial(biascorr.correct, whole, data, quantized=content, method="iterative")
    expected = work().model
    assert {found.model for found in at_once(lambda _: work())} == {expected}


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_an_accumulator_that_threads_share_misses_nothing(kind):
    samples = [random_array((2, 4, 5, 6), "int16", seed) for seed in range(THREADS * 50)]
    alone, shared, merged = (ACCUMULATORS[kind]() for _ in range(3))
    for sample in samples:
        alone.update(sample)

    def update(k):
        own = ACCUMULATORS[kind]()
        for sample in samples[k::THREADS]:
            shared.update(sample)
            own.update(sample)
        merged.merge(own)

    at_once(update)
    for found in (shared, merged):
        assert repr(found) == repr(alone)
        np.testing.assert_array_equal(found.mean(), alone.mean())


def test_samples_of_several_widths_that_come_at_once_are_an_error():
    for _ in range(20):
        shared = ChannelMean()

        def update(k, shared=shared):
            try:
                shared.update(np.ones((3, 4 + k % 2)))
            except ValueError as error:
                return str(error)

        errors = [found for found in at_once(update) if found]
        assert len(errors) == THREADS // 2
        assert all("channels, expected" in each for each in errors)
        assert shared.count == 3 * THREADS // 2
