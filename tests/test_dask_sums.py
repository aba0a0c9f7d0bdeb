"""Means of dask collections have the bits that the same samples have in numpy, whatever computes them and however it fails."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arrays import random_array
from biascorr import ChannelMean, Quantization, prepare_input_mean
from biascorr.statistics import TapMean
from biascorr.windows import Window

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
db = pytest.importorskip("dask.bag")
distributed = pytest.importorskip("distributed")

SHAPE = (24, 30, 50, 16)
CHUNKS = [(24, 30, 50, 16), (5, 30, 50, 16), (24, 7, 50, 5), (1, 30, 50, 16), ((10, 0, 1, 13), 15, 25, 16)]
DTYPES = ["int8", "bool", "float16", "float32", "float64"]


def cancelling(dtype, seed=0):
    """Samples whose sums are nothing but rounding, so that every order of summing shows."""
    values, rng = random_array(SHAPE, dtype, seed), np.random.default_rng(seed)
    reach = {"float16": 5, "float32": 115, "float64": 300}.get(dtype)
    if reach is not None:
        half = rng.standard_normal((12, *SHAPE[1:])) * 2.0 ** rng.integers(-reach, reach, (12, *SHAPE[1:]))
        values[:12] = half
        values[12:] = -rng.permuted(values[:12], axis=0)
    return values


def test_sums_of_real_numbers_show_their_order():
    samples = cancelling("float64")
    assert prepare_input_mean(list(samples), None).tobytes() != prepare_input_mean(list(samples[::-1]), None).tobytes()
    samples = cancelling("float32")
    assert prepare_input_mean(list(samples), None).tobytes() != prepare_input_mean(samples, None).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_an_array_has_the_bits_of_numpy_however_it_is_cut(dtype, chunks):
    samples, quantization = cancelling(dtype), Quantization(37.5, -3)
    found = prepare_input_mean(da.from_array(samples, chunks=chunks), quantization)
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert found.tobytes() == prepare_input_mean(samples, quantization).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partitions", [1, 3, 24])
def test_a_bag_has_the_bits_of_its_list(dtype, partitions):
    samples = list(cancelling(dtype))
    bag = db.from_sequence(samples, npartitions=partitions)
    with dask.config.set(scheduler="synchronous"):
        assert prepare_input_mean(bag, None).tobytes() == prepare_input_mean(samples, None).tobytes()


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_every_scheduler_gives_the_same_bits(scheduler):
    samples = [*cancelling("float32")[:20], *cancelling("int8")[:3], *cancelling("float64")]
    expected = prepare_input_mean(samples, None).tobytes()
    with dask.config.set(scheduler=scheduler):
        assert prepare_input_mean([dask.delayed(sample) for sample in samples], None).tobytes() == expected
        assert prepare_input_mean(db.from_sequence(samples, npartitions=4), None).tobytes() == expected


def test_a_list_may_hold_arrays_of_both_kinds():
    samples = [cancelling("float32", seed) for seed in range(3)]
    mixed = [samples[0], da.from_array(samples[1], chunks=(7, 30, 50, 8)), dask.delayed(samples[2])]
    expected = prepare_input_mean(samples, None).tobytes()
    assert prepare_input_mean(mixed, None).tobytes() == expected
    assert prepare_input_mean(iter(mixed), None).tobytes() == expected


def test_one_delayed_value_is_what_it_would_be_in_numpy():
    samples = cancelling("float32")
    assert prepare_input_mean(dask.delayed(samples), None).tobytes() == prepare_input_mean(samples, None).tobytes()
    assert prepare_input_mean(dask.delayed(list(samples)), None).tobytes() == prepare_input_mean(list(samples), None).tobytes()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_an_accumulator_goes_on_from_what_it_has_seen(axis):
    first, second, third = (cancelling("float32", seed) for seed in range(3))
    found, expected = ChannelMean(channel_axis=axis), ChannelMean(channel_axis=axis)
    for one, other in ((found, da.from_array(second, chunks=(5, 10, 50, 4))), (expected, second)):
        for sample in (first, other, third):
            one.update(sample)
    assert found.mean().tobytes() == expected.mean().tobytes()
    assert repr(found) == repr(expected)
    others = ChannelMean(channel_axis=axis)
    for mean, samples in ((found, [db.from_sequence([second, third], npartitions=2)]), (others, [second, third])):
        for sample in samples:
            mean.update(sample)
    expected.merge(others)
    assert pickle.loads(pickle.dumps(found)).mean().tobytes() == expected.mean().tobytes()
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_taps_of_a_kernel_too(dtype):
    batches = [cancelling(dtype, seed) for seed in range(3)]
    window = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    found, expected = TapMean(window), TapMean(window)
    for batch in batches:
        expected.update(batch)
    found.update([dask.delayed(batch) for batch in batches])
    assert found.mean().tobytes() == expected.mean().tobytes()


def test_partitions_and_chunks_may_be_empty():
    samples = cancelling("float32")
    bag = db.from_sequence(range(24), npartitions=6).filter(lambda k: k >= 20).map(lambda k: samples[k])
    with dask.config.set(scheduler="synchronous"):
        assert prepare_input_mean(bag, None).tobytes() == prepare_input_mean(list(samples[20:]), None).tobytes()
    codes = cancelling("int8")
    array = da.from_array(codes, chunks=(5, 30, 50, 16))
    chosen = array[array[:, 0, 0, 0] > 100]  # of chunks whose sizes nobody knows
    np.testing.assert_array_equal(prepare_input_mean(chosen, None), prepare_input_mean(codes[codes[:, 0, 0, 0] > 100], None))


def test_a_scale_that_looks_like_a_step_is_warned_of():
    with pytest.warns(UserWarning, match=r"Quantization.from_step\(0.01, 0\)"):
        prepare_input_mean(da.full((4, 3), 100, dtype="int8"), Quantization(0.01))


def bag_of(*partitions):
    return db.from_delayed([dask.delayed(list)(part) for part in partitions])


ONES = np.ones((2, 3), np.float32)
UNKNOWN = da.from_array(ONES, chunks=(1, 3))[da.from_array(np.array([True, False]), chunks=1)]
LYING = da.from_array(ONES, chunks=(1, 3)).map_blocks(lambda block: block.astype(np.float64), dtype=np.float32)
GROWING = da.from_array(ONES, chunks=(1, 3)).map_blocks(
    lambda block: np.pad(block, ((0, 0), (0, 1))).astype(np.int8), dtype=np.int8
)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (bag_of([ONES], [ONES, np.array(["a"])]), TypeError, r"partition 1: samples\[1\]: dtype <U1, expected"),
        (bag_of([ONES], [np.ones((0, 3))]), ValueError, r"partition 1: samples\[0\]: shape \[0, 3\] has no elements"),
        (
            bag_of([ONES, ONES], [ONES, np.ones(4)]),
            ValueError,
            r"partition 1: samples\[1\]: 4 channels, expected 3 as in those",
        ),
        (bag_of([np.ones(3, int), np.ones(4, int)]), ValueError, r"partition 0: samples\[1\]: 4 channels, expected 3"),
        (bag_of([], []), ValueError, "samples: none given"),
        ([dask.delayed(ONES), dask.delayed(np.ones(4))], ValueError, r"samples\[1\]: 4 channels, expected 3"),
        ([dask.delayed(ONES), dask.delayed(np.float32)(1)], ValueError, r"samples\[1\]: 0-dimensional"),
        (da.ones((0, 3)), ValueError, "samples: none given"),
        (da.ones(()), ValueError, "samples: 0 axes, none of which is channel axis -1"),
        (da.from_array(np.array([["a"]])), TypeError, r"chunk \(0, 0\): dtype <U1, expected"),
        (UNKNOWN, ValueError, r"unknown sizes along axis 0, .*call its compute_chunk_sizes\(\) first"),
        (LYING, TypeError, r"chunk \([01], 0\): dtype float64, expected float32 as the dask array says"),
        (GROWING, ValueError, r"chunk \([01], 0\): shape \(1, 4\), expected \(1, 3\) as the dask array says"),
        (db.from_sequence([1, 2]).sum(), TypeError, r"samples: dask.bag.core.Item, expected a dask array, a bag or delayed"),
    ],
)
def test_what_is_wrong_is_named_with_its_partition(samples, error, message):
    mean = ChannelMean()
    with dask.config.set(scheduler="synchronous"), pytest.raises(error, match=message):
        prepare_input_mean(samples, None)
    if "none given" not in message:
        with dask.config.set(scheduler="synchronous"), pytest.raises(error, match=message):
            mean.update(samples)
        assert mean.count == 0


def test_dask_is_not_imported_without_need():
    code = "import sys, numpy, biascorr; biascorr.prepare_input_mean([numpy.ones(3)], None); print('dask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def loaded(seed, folder, last):
    """A sample, and a note of the process that made it; a certain one ends its process the first time."""
    note = Path(folder, f"{seed}-{os.getpid()}")
    if seed == last and not list(Path(folder).glob(f"{last}-*")):
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    note.touch()
    return cancelling("float64", seed)


@pytest.fixture(scope="module", params=[1, 2, 4])
def client(request):
    options = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(n_workers=request.param, processes=True, **options) as cluster,
        cluster.get_client() as client,
    ):
        client.run(lambda path: sys.path.insert(0, path) if path not in sys.path else None, str(Path(__file__).parent))
        yield client


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_processes_that_end_are_made_up_for(client, tmp_path):
    seeds, last = range(12), {1: 0, 2: 5, 4: 11}[len(client.scheduler_info(n_workers=-1)["workers"])]
    expected = prepare_input_mean([cancelling("float64", seed) for seed in seeds], None).tobytes()
    samples = [dask.delayed(loaded)(seed, str(tmp_path), last) for seed in seeds]
    assert prepare_input_mean(samples, None).tobytes() == expected
    assert len(list(tmp_path.glob(f"{last}-*"))) == 2  # of the process that ended, and of another


@pytest.mark.slow
def test_samples_stay_where_they_are(client):
    """What a client gets of 46 MB is some hundred bytes."""
    samples = da.random.default_rng(0).standard_normal((24, 200, 300, 4), chunks=(3, 200, 300, 4))
    before = pickle.dumps(ChannelMean())
    received = []
    gather = client._gather

    async def counted(*args, **kwargs):
        found = await gather(*args, **kwargs)
        received.append(len(pickle.dumps(found)))
        return found

    client._gather = counted
    try:
        found = prepare_input_mean(samples, None)
    finally:
        client._gather = gather
    assert sum(received) < len(before) + 4000
    assert found.tobytes() == prepare_input_mean(samples.compute(), None).tobytes()
