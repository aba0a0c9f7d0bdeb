"""Samples that are read part by part: each one once, nothing beyond those asked for, and with the same result as arrays."""

import itertools

import dask
import dask.array
import dask.bag
import h5py
import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.calibration.data import batches_from_data
from biascorr.calibration.slices import Slices, is_sliceable
from biascorr.graph.network import ModelInput
from networks import Reader, samples, two_layers

X = samples(20, 3, 6, 6)
IMAGE = ModelInput("x", np.dtype(np.float32), (None, 3, 6, 6))
LATER = ModelInput("x", np.dtype(np.float32), (3, None, 5), ("", "batch", ""))


class Counted:
    """An array that notes which of its elements are read, and is never read whole by numpy itself."""

    def __init__(self, array, chunks=None):
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, chunks
        self.reads = np.zeros(array.shape, int)
        self._array = array

    def __getitem__(self, key):
        self.reads[key] += 1
        return self._array[key]

    def __array__(self, *_, **__):
        pytest.fail("read whole")


def read(data, model_input=IMAGE, **options):
    return [feeds["x"] for feeds in batches_from_data(data, [model_input], **options)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20, 50])
@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 20, 64])
@pytest.mark.parametrize("form", [lambda array: array, lambda array: {"x": array}])
def test_each_element_is_read_once(form, chunk, batch_size):
    array = Counted(X, chunk and (chunk, 3, 6, 6))
    batches = read(form(array), batch_size=batch_size)
    assert list(map(len, batches)) == [len(X[k : k + batch_size]) for k in range(0, 20, batch_size)]
    np.testing.assert_array_equal(np.concatenate(batches), X)
    assert (array.reads == 1).all()


@pytest.mark.parametrize("chunk", [None, 2])
def test_nothing_is_read_after_the_last_chunk(chunk):
    array = Counted(X, chunk and (chunk, 3, 6, 6))
    assert len(read(array, max_samples=5)) == 5
    assert array.reads[: 6 if chunk else 5].min() == 1
    assert not array.reads[6 if chunk else 5 :].any()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("chunks", [None, (3, 3, 5), (1, 7, 2)])
def test_samples_along_another_axis(chunks, batch_size):
    values = samples(3, 11, 5)
    array = Counted(values, chunks)
    np.testing.assert_array_equal(np.concatenate(read(array, LATER, batch_size=batch_size), 1), values)
    assert (array.reads == 1).all()


def test_batches_of_an_axis_more_and_inputs_that_all_share():
    values = samples(5, 2, 3, 6, 6)
    np.testing.assert_array_equal(read(Counted(values)), values)
    number = ModelInput("n", np.dtype(np.float32), ())
    feeds = batches_from_data({"x": Counted(X), "n": Counted(np.float32(3).reshape(()))}, [IMAGE, number])
    assert [each["n"].tolist() for each in feeds] == [3.0] * 20


def test_batches_of_a_list_and_single_samples():
    arrays = [Counted(X[:4]), Counted(X[4:])]
    np.testing.assert_array_equal(np.concatenate(read(arrays)), X)
    assert all((array.reads == 1).all() for array in arrays)


def mapped(folder, mode="r"):
    np.save(folder / "x.npy", X)
    return np.load(folder / "x.npy", mmap_mode=mode)


def zarr_group():
    group = pytest.importorskip("zarr", "3").group({})
    group.create_array("x", data=X, chunks=(7, 3, 6, 6))
    return group


def hdf_dataset(folder, **options):
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=X, **options)
    return h5py.File(folder / "x.h5")["x"]


FORMS = {
    "memory-mapped": mapped,
    "memory-mapped, to write": lambda folder: mapped(folder, "r+"),
    "memory-mapped, written in memory": lambda folder: mapped(folder, "c"),
    "mapping of memory-mapped": lambda folder: {"x": mapped(folder)},
    "list of memory-mapped": lambda folder: [mapped(folder)[k : k + 1] for k in range(20)],
    "zarr": lambda _: zarr_group()["x"],
    "zarr group": lambda _: zarr_group(),
    "h5py": hdf_dataset,
    "h5py, chunked": lambda folder: hdf_dataset(folder, chunks=(3, 3, 3, 6), compression="gzip"),
    "h5py file": lambda folder: hdf_dataset(folder).parent,
    "dask": lambda _: dask.array.from_array(X, chunks=((1, 12, 7), 3, 2, 6)),
    "dask bag": lambda _: dask.bag.from_sequence([*X[:, None]], npartitions=3),
    "dask delayed": lambda _: dask.delayed(X),
    "dask delayed, batch by batch": lambda _: [dask.delayed(X[k : k + 1]) for k in range(20)],
    "dask delayed by name": lambda _: ({"x": dask.delayed(X[k : k + 1])} for k in range(20)),
    "dask delayed mappings": lambda _: [dask.delayed({"x": X[k : k + 1]}) for k in range(20)],
}


@pytest.fixture(scope="module")
def expected():
    return correct(two_layers(), X, quant_params=QuantParams(weight_bits=4), method="empirical")


def assert_same(found, expected):
    assert found.model.SerializeToString() == expected.model.SerializeToString()
    assert found.report == expected.report
    assert (found.scores, found.notes, found.data_digest) == (expected.scores, expected.notes, expected.data_digest)


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_that_of_the_array(form, expected, tmp_path):
    data = FORMS[form](tmp_path)
    with dask.config.set(scheduler="synchronous"):
        assert_same(correct(two_layers(), data, quant_params=QuantParams(weight_bits=4), method="empirical"), expected)


class Loader:
    """Like torch's: an iterator over batches of a dataset that counts what is asked for."""

    def __init__(self, reads):
        self.reads = reads

    def __len__(self):
        return 5

    def __iter__(self):
        for first in range(0, 20, 4):
            self.reads.extend(range(first, first + 4))
            yield X[first : first + 4]


class Indexed:
    """Like a torch Dataset: single samples by index."""

    def __init__(self, reads):
        self.reads = reads

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.reads.append(index)
        return X[index]


def generated(reads):
    for k in range(20):
        reads.append(k)
        yield X[k : k + 1]


def blocks(reads):
    def noted(block, block_info=None):
        if block_info:
            reads.extend(range(*block_info[0]["array-location"][0]))
        return block

    return dask.array.from_array(X, chunks=(7, 3, 6, 6)).map_blocks(noted, dtype=X.dtype, meta=X[:0])


SOURCES = {
    "generator": generated,
    "reader": lambda reads: Reader({"x": x} for x in generated(reads)),
    "loader": Loader,
    "indexed": Indexed,
    "dask": blocks,
}


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("method", ["empirical", "auto"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_correction_reads_each_sample_once(source, method, budget):
    """Whatever is swept and scored, and where what was read has to be kept on disk."""
    reads = []
    with dask.config.set(scheduler="synchronous"):
        correct(
            two_layers(), SOURCES[source](reads), quant_params=QuantParams(weight_bits=4), method=method, memory_budget=budget
        )
    assert sorted(reads) == list(range(20))


def noting(reads):
    def noted(k):
        reads.append(k)
        return X[k : k + 1]

    return noted


def test_a_bag_is_computed_partition_by_partition_as_far_as_it_is_read():
    reads = []
    bag = dask.bag.from_sequence(range(20), partition_size=4).map(noting(reads))
    with dask.config.set(scheduler="synchronous"):
        batches = iter(batches_from_data(bag, [IMAGE], max_samples=6))
        next(batches)
        assert reads == [0, 1, 2, 3]
        assert len([*batches]) == 5
    assert reads == [*range(8)]


def test_delayed_batches_are_computed_as_far_as_they_are_read():
    reads = []
    delayed = [dask.delayed(noting(reads))(k) for k in range(20)]
    with dask.config.set(scheduler="synchronous"):
        assert len(read(delayed, max_samples=6)) == 6
    assert reads == [*range(6)]


def test_sizes_that_are_not_known():
    array = dask.array.from_array(X, chunks=5)
    chosen = array[array[:, 0, 0, 0] > 0]
    with pytest.raises(ValueError, match=r"data: input x: a dask array of shape .*call its compute_chunk_sizes\(\) first"):
        read(chosen)


@pytest.mark.parametrize("value", [X, np.float32(1), [X], "x", {"x": X}, range(3), X[0].tolist()])
def test_other_objects_are_no_arrays_to_slice(value):
    assert not is_sliceable(value)


def test_a_change_of_a_mapping_is_read(tmp_path):
    """Pages that are forgotten are read again, changed ones too."""
    array = mapped(tmp_path, "r+")
    array[3] = 7
    slices = Slices(array, "x")
    assert (slices.read(0, 3, 4) == 7).all()
    assert (slices.read(0, 3, 4) == 7).all()
    copied = mapped(tmp_path, "c")
    copied[3] = 8
    slices = Slices(copied, "x")
    assert all((slices.read(0, 3, 4) == 8).all() for _ in range(2))


def test_a_file_is_read_along_any_axis(tmp_path):
    values = samples(3, 11, 5)
    np.save(tmp_path / "x.npy", values)
    for size in (1, 4, 11):
        np.testing.assert_array_equal(np.concatenate(read(tmp_path / "x.npy", LATER, batch_size=size), 1), values)


def test_chunks_are_not_held_longer_than_needed():
    array = Counted(X, (4, 3, 6, 6))
    slices = Slices(array, "x")
    parts = [slices.read(0, k, k + 1) for k in range(20)]
    assert all(part.base is None for part in parts)
    assert (array.reads == 1).all()


def test_axes_are_read_in_any_order():
    slices = Slices(Counted(X, (4, 3, 6, 6)), "x")
    for axis, start in itertools.product(range(2), (2, 0, 1)):
        np.testing.assert_array_equal(slices.read(axis, start, start + 1), np.take(X, [start], axis))
