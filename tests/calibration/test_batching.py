"""Along which axis samples are, as far as a model says so, and how data is cut along it."""

import numpy as np
import pytest

from biascorr.calibration.batching import assumed, candidate_axes, named_axes
from biascorr.calibration.data import batches_from_data
from biascorr.graph.network import ModelInput


def input_of(*axes, name="x"):
    """An input with axes of these sizes, names or neither."""
    sizes = tuple(axis if isinstance(axis, int) else None for axis in axes)
    return ModelInput(name, np.dtype(np.float32), sizes, tuple(axis if isinstance(axis, str) else "" for axis in axes))


STATE = (input_of("N", "T"), input_of(2, "N", 3, name="state"), input_of(name="rate"))


@pytest.mark.parametrize(
    ("inputs", "axes"),
    [
        ([input_of("N", 3, "H", "W")], {"x": 0}),
        ([input_of("batch_size", "sequence_length")], {"x": 0}),
        ([input_of("sequence", "Batch", 6)], {"x": 1}),
        ([input_of("T", "N", 6)], {"x": 1}),
        ([input_of(16, "N", 6)], {"x": 1}),
        ([input_of("B", "N", 3)], {"x": 0}),
        ([input_of("n", "b")], {"x": 1}),
        ([input_of(1, 3, "N")], None),
        ([input_of("unk__1", "unk__2", 6)], None),
        ([input_of(None, None, 6)], None),
        ([ModelInput("x", np.dtype(np.float32), None)], None),
        (STATE, {"x": 0, "state": 1, "rate": None}),
        ([input_of("N", 3), input_of("unk__1", 4, name="y"), input_of(1, 4, name="z")], {"x": 0, "y": 0, "z": None}),
    ],
)
def test_axes_of_samples_by_name(inputs, axes):
    assert named_axes(inputs) == axes


def test_other_open_axes_are_tried_where_no_name_says():
    assert list(candidate_axes([input_of("T", "N", 6)])) == [{"x": 1}]
    assert list(candidate_axes([input_of(None, None, 6)])) == [{"x": 0}, {"x": 1}]
    assert list(candidate_axes([input_of(None, 3, None), input_of(None, 4, name="y")])) == [{"x": 0, "y": 0}]


@pytest.mark.parametrize(
    ("inputs", "can_be_cut"),
    [([input_of("N", 3)], True), ([input_of(4, 3)], False), ([input_of("T", 4, 3)], True), (STATE, True)],
)
def test_batches_of_fixed_size_cannot_be_cut(inputs, can_be_cut):
    assert assumed(inputs).can_be_cut is can_be_cut


def test_samples_of_a_batch():
    batching = assumed(STATE)
    feeds = {"x": np.ones((5, 8)), "state": np.arange(30.0).reshape(2, 5, 3), "rate": np.array(16000.0)}
    assert batching.size(feeds) == 5
    rows = batching.rows(feeds, [1, 3])
    assert (rows["x"].shape, rows["rate"]) == ((2, 8), 16000)
    np.testing.assert_array_equal(rows["state"], feeds["state"][:, [1, 3]])
    assert batching.size({**feeds, "x": np.ones((4, 8))}) == 1


def test_arrays_are_cut_along_the_axis_of_samples():
    x = np.arange(8 * 5 * 6, dtype=np.float32).reshape(8, 5, 6)
    found = [feeds["x"] for feeds in batches_from_data(x, [input_of("T", "N", 6)], batch_size=2, max_samples=5)]
    assert [each.shape for each in found] == [(8, 2, 6), (8, 2, 6), (8, 1, 6)]
    assert all(each.flags.c_contiguous for each in found)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), x)


def test_rows_of_a_file_are_cut_along_the_axis_of_samples(tmp_path):
    x = np.arange(8 * 5 * 6, dtype=np.float32).reshape(8, 5, 6)
    np.save(tmp_path / "x.npy", x)
    found = [feeds["x"] for feeds in batches_from_data(tmp_path / "x.npy", [input_of("T", "N", 6)], max_samples=3)]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), x[:, :3])


def test_single_samples_are_stacked_along_the_axis_of_samples():
    class DataSet:
        def __len__(self):
            return 5

        def __getitem__(self, k):
            return np.full((8, 6), k, np.float32)

    found = [feeds["x"] for feeds in batches_from_data(DataSet(), [input_of("T", "N", 6)], batch_size=4)]
    assert [each.shape for each in found] == [(8, 4, 6), (8, 1, 6)]
    np.testing.assert_array_equal(found[0][0, :, 0], [0, 1, 2, 3])


def test_what_samples_share_is_given_with_each():
    data = {"x": np.ones((5, 8), np.float32), "state": np.ones((2, 5, 3), np.float32), "rate": np.array(16000, np.float32)}
    found = list(batches_from_data(data, STATE))
    assert [{key: array.shape for key, array in feeds.items()} for feeds in found] == [
        {"x": (1, 8), "state": (2, 1, 3), "rate": ()}
    ] * 5
