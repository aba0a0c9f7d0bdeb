"""Datasets of other frameworks, as far as their tensors and iterators differ from numpy's."""

import numpy as np
import pytest

from biascorr.calibration.data import batches_from_data, number_of_batches, number_of_samples
from biascorr.graph.network import ModelInput
from networks import Reader, samples

X, ROWS = samples(7, 3, 4, 4), samples(7, 5)
IMAGE = ModelInput("x", np.dtype(np.float32), (None, 3, 4, 4))
ROW = ModelInput("row", np.dtype(np.float32), (None, 5))


class EagerTensor:
    """Like TensorFlow's: no array itself, nothing to iterate over."""

    def __init__(self, array):
        self._array = array

    def numpy(self):
        return self._array


class TorchTensor(EagerTensor):
    """Like torch's, on another device and part of a gradient: `numpy` fails until both are undone."""

    def __init__(self, array, needs=("detach", "cpu")):
        super().__init__(array)
        self._needs = needs

    def detach(self):
        return TorchTensor(self._array, [each for each in self._needs if each != "detach"])

    def cpu(self):
        return TorchTensor(self._array, [each for each in self._needs if each != "cpu"])

    def numpy(self):
        if self._needs:
            raise RuntimeError(f"call {self._needs} first")
        return self._array


class Dataset:
    """Iterable more than once; its class has a length, which it does not know itself."""

    def __init__(self, batches):
        self._batches = batches

    def __iter__(self):
        return iter(self._batches)

    def __len__(self):
        raise TypeError("the dataset's length is unknown")


class DatasetIterator:
    """Like that of a tf.data.Dataset, whose `get_next` raises at the end."""

    def __init__(self, batches):
        self._batches = iter(batches)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)

    get_next = __next__


class BareReader:
    """Has nothing but what onnxruntime calls."""

    def __init__(self, batches):
        self._batches = iter(batches)

    def get_next(self):
        return next(self._batches, None)


BATCHES = [X[:3], X[3:6], X[6:]]

FORMS = {
    "TensorFlow": lambda: Dataset([EagerTensor(batch) for batch in BATCHES]),
    "TensorFlow, tuples": lambda: Dataset([(EagerTensor(batch),) for batch in BATCHES]),
    "TensorFlow, mappings": lambda: Dataset([{"x": EagerTensor(batch)} for batch in BATCHES]),
    "TensorFlow, iterator": lambda: DatasetIterator([EagerTensor(batch) for batch in BATCHES]),
    "torch": lambda: Dataset([TorchTensor(batch) for batch in BATCHES]),
    "torch, lists": lambda: [[TorchTensor(batch)] for batch in BATCHES],
    "onnxruntime": lambda: Reader({"x": batch} for batch in BATCHES),
    "like onnxruntime": lambda: BareReader({"x": batch} for batch in BATCHES),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_those_of_the_dataset(form):
    found = list(batches_from_data(FORMS[form](), [IMAGE]))
    assert len(found) == 3
    for feeds, batch in zip(found, BATCHES):
        assert list(feeds) == ["x"]
        np.testing.assert_array_equal(feeds["x"], batch)


def test_a_length_that_is_not_known():
    assert number_of_batches(Dataset(BATCHES)) is None
    assert number_of_batches(BATCHES) == 3


def test_labels_are_an_error_that_says_how_to_drop_them():
    data = Dataset([(EagerTensor(batch), EagerTensor(np.zeros(len(batch)))) for batch in BATCHES])
    with pytest.raises(
        ValueError, match=r"data_set\[0\]: 2 arrays, the model has 1 inputs \(x\); drop labels, e.g. \(x for x, "
    ):
        list(batches_from_data(data, [IMAGE], name="data_set"))


@pytest.mark.parametrize("form", ["array", "mapping", "file"])
def test_arrays_of_samples_are_cut_into_batches(form, tmp_path):
    np.save(tmp_path / "x.npy", X)
    data = {"array": X, "mapping": {"x": X}, "file": tmp_path / "x.npy"}[form]
    found = [feeds["x"] for feeds in batches_from_data(data, [IMAGE], batch_size=3)]
    assert [len(batch) for batch in found] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(found), X)


def test_a_batch_size_does_not_outrule_the_models():
    fixed = ModelInput("x", np.dtype(np.float32), (1, 3, 4, 4))
    assert [len(feeds["x"]) for feeds in batches_from_data(X, [fixed], batch_size=3)] == [1] * 7
    without = ModelInput("x", np.dtype(np.float32), (3, 4, 4))
    assert [feeds["x"].shape for feeds in batches_from_data(X, [without], batch_size=3)] == [(3, 4, 4)] * 7
    rows = {"x": X, "row": ROWS}
    assert [len(feeds["row"]) for feeds in batches_from_data(rows, [IMAGE, ROW], batch_size=4)] == [4, 3]


def test_errors_name_the_samples_of_a_batch():
    wrong = X.copy()
    wrong[6, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"^data_set\[6:7\]: input x: contains nan"):
        list(batches_from_data(wrong, [IMAGE], name="data_set", batch_size=3))
    with pytest.raises(TypeError, match=r"^data_set: int, expected an array"):
        list(batches_from_data(3, [IMAGE], name="data_set"))


def test_how_many_samples_a_batch_has():
    assert number_of_samples({"x": X, "row": ROWS}, [IMAGE, ROW]) == 7
    assert number_of_samples({"x": X, "row": ROWS[:3]}, [IMAGE, ROW]) == 1
    assert number_of_samples({"x": X}, [ModelInput("x", X.dtype, None)]) == 1
    assert number_of_samples({"x": X[:1]}, [ModelInput("x", X.dtype, (1, 3, 4, 4))]) == 1
