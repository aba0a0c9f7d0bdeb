"""Datasets of other frameworks, as far as their tensors and iterators differ from numpy's."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from biascorr.calibration.batching import assumed
from biascorr.calibration.data import batches_from_data, check_end, number_of_batches
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import ModelInput
from networks import Reader, samples

X, ROWS = samples(7, 3, 4, 4), samples(7, 5)
IMAGE = ModelInput("x", np.dtype(np.float32), (None, 3, 4, 4))
ROW = ModelInput("row", np.dtype(np.float32), (None, 5))


class EagerTensor:
    """Like TensorFlow's: no array itself."""

    def __init__(self, array):
        self._array = array

    @property
    def shape(self):
        return np.shape(self._array)

    def __iter__(self):
        return map(EagerTensor, self._array)

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
    assert assumed([IMAGE, ROW]).size({"x": X, "row": ROWS}) == 7
    assert assumed([IMAGE, ROW]).size({"x": X, "row": ROWS[:3]}) == 1
    assert assumed([ModelInput("x", X.dtype, None)]).size({"x": X}) == 7
    assert assumed([ModelInput("x", X.dtype, (1, 3, 4, 4))]).size({"x": X[:1]}) == 1


# tf.data and keras.utils.PyDataset, as far as they are told from others. Real ones: tests/adapters/keras.


class TfDataset:
    """Like a tf.data.Dataset: elements are tuples, mappings and eager tensors."""

    def __init__(self, elements, spec=None, cardinality=None):
        self.read = []
        self._elements = elements
        self._cardinality = len(elements) if cardinality is None else cardinality
        self.element_spec = spec_of(elements[0]) if spec is None else spec

    def __iter__(self):
        for k, element in enumerate(itertools.cycle(self._elements) if self._cardinality == -1 else self._elements):
            self.read.append(k)
            yield mapped(EagerTensor, element)

    def __len__(self):
        if self._cardinality < 0:
            raise TypeError("The dataset is infinite." if self._cardinality == -1 else "The dataset length is unknown.")
        return self._cardinality

    def cardinality(self):
        return np.int64(self._cardinality)


class Unknown:
    rank = None

    def __len__(self):
        raise ValueError("Cannot take the length of shape with unknown rank.")


UNKNOWN = SimpleNamespace(shape=Unknown())


def mapped(function, element):
    if isinstance(element, dict):
        return {key: mapped(function, value) for key, value in element.items()}
    return tuple(mapped(function, each) for each in element) if isinstance(element, (tuple, list)) else function(element)


def spec_of(element):
    return mapped(lambda array: SimpleNamespace(shape=np.shape(array)), element)


class PyDataset:
    """Like keras.utils.PyDataset: iterating over it does not end by itself."""

    def __init__(self, batch, count):
        self.read = []
        self._batch, self._count = batch, count

    @property
    def num_batches(self):
        return len(self)

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        self.read.append(index)
        return self._batch(index)


class NewPyDataset(PyDataset):
    """Like that of later versions of Keras, which have an iterator; its `num_batches` is None where there is no end."""

    @property
    def num_batches(self):
        return self._count

    def __iter__(self):
        return map(self.__getitem__, itertools.count())


class WithoutCount(PyDataset):
    @property
    def num_batches(self):
        raise NotImplementedError


class MapStyle:
    """Like a torch Dataset, which has single samples."""

    def __init__(self, *arrays):
        self._arrays = arrays

    def __len__(self):
        return len(self._arrays[0])

    def __getitem__(self, index):
        found = tuple(TorchTensor(array[index]) for array in self._arrays)
        return found if len(found) > 1 else found[0]


def sizes(data, inputs=(IMAGE,), **options):
    return [len(feeds[inputs[0].name]) for feeds in batches_from_data(data, inputs, **options)]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: ((x,),), lambda x: {"x": x}, lambda x: ({"x": x},)])
def test_a_data_set_of_single_samples_is_batched(form):
    data = TfDataset([form(x) for x in X])
    found = [feeds["x"] for feeds in batches_from_data(data, [IMAGE], batch_size=3)]
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert found[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(found), X)
    assert sizes(data) == [1] * 7
    assert [number_of_batches(data, [IMAGE], batch_size=size) for size in (1, 3, 7, 8)] == [7, 3, 1, 1]


@pytest.mark.parametrize("spec", [None, UNKNOWN])
def test_a_data_set_of_batches_is_taken_as_it_is(spec):
    data = TfDataset(BATCHES, spec=spec)
    assert sizes(data, batch_size=2) == [3, 3, 1]
    assert number_of_batches(data, [IMAGE], batch_size=2) == (3 if spec is None else None)


def test_what_the_spec_does_not_say_the_first_element_does():
    data = TfDataset([*X], spec=UNKNOWN)
    assert sizes(data, batch_size=3) == [3, 3, 1]
    assert data.read == [*range(7)]
    assert number_of_batches(data, [IMAGE], batch_size=3) is None


@pytest.mark.parametrize("elements", [[*X], BATCHES])
def test_an_infinite_data_set_needs_a_limit(elements):
    data = TfDataset(elements, cardinality=-1)
    with pytest.raises(ValueError, match=r"^data: an infinite data set, expected max_samples .*: data\.take\(n\)$"):
        check_end(data, None)
    check_end(data, 5)
    assert sum(sizes(data, batch_size=2, max_samples=5)) == 5
    assert data.read == [*range(5 if elements is not BATCHES else 2)]
    assert len([*itertools.islice(batches_from_data(data, [IMAGE]), 20)]) == 20


def test_how_many_batches_a_data_set_has():
    assert number_of_batches(TfDataset([*X], cardinality=-2), [IMAGE]) is None
    assert number_of_batches(TfDataset(BATCHES, cardinality=-2), [IMAGE]) is None
    assert number_of_batches(TfDataset([*X], cardinality=-1), [IMAGE], batch_size=2, max_samples=5) == 3
    assert number_of_batches(TfDataset([*X]), [IMAGE], batch_size=2, max_samples=5) == 3
    assert number_of_batches(TfDataset([*X]), [IMAGE], batch_size=2, max_samples=50) == 4
    assert number_of_batches(TfDataset(BATCHES), [IMAGE], max_samples=5) == min(5, len(BATCHES))
    assert number_of_batches(TfDataset(BATCHES), [IMAGE], max_samples=1) == 1
    fixed = ModelInput("x", np.dtype(np.float32), (2, 3, 4, 4))
    assert number_of_batches(TfDataset([*X]), [fixed], batch_size=5, max_samples=5) == 2
    assert number_of_batches(PyDataset(lambda _: X, 4), [IMAGE]) == 4
    assert number_of_batches(NewPyDataset(lambda _: X, None), [IMAGE]) is None
    assert number_of_batches(MapStyle(X), [IMAGE], batch_size=4) is None
    assert number_of_batches(TorchTensor(X), [IMAGE]) is None


def test_progress_of_single_samples_ends_at_the_number_of_batches():
    steps = []
    with Storage(10**6) as storage:
        held = Samples(storage)
        held.read(TfDataset([*X]), [IMAGE], lambda _, *counts: steps.append(counts), batch_size=3)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (held.count, held.batches_read) == (7, 3)


@pytest.mark.parametrize("kind", [PyDataset, NewPyDataset])
def test_a_data_set_by_index_is_read_once(kind):
    data = kind(lambda k: BATCHES[k], 3)
    assert sizes(data) == [3, 3, 1]
    assert data.read == [0, 1, 2]
    check_end(data, None)


@pytest.mark.parametrize(
    "data",
    [
        NewPyDataset(lambda _: X[:2], None),
        NewPyDataset(lambda _: X[:2], math.inf),
        PyDataset(lambda _: X[:2], math.inf),
        PyDataset(lambda _: X[:2], None),
        WithoutCount(lambda _: X[:2], 3),
    ],
)
def test_an_infinite_data_set_by_index(data):
    with pytest.raises(ValueError, match=r": \(data\[k\] for k in range\(n\)\)$"):
        check_end(data, None)
    assert sizes(data, max_samples=5) == [2, 2, 1]
    assert data.read == [0, 1, 2]


def test_single_samples_by_index():
    assert sizes(MapStyle(X), batch_size=4) == [4, 3]
    found = list(batches_from_data(MapStyle(X, ROWS), [IMAGE, ROW], batch_size=4))
    np.testing.assert_array_equal(np.concatenate([feeds["row"] for feeds in found]), ROWS)


def test_one_buffer_for_all_single_samples():
    class Refilling(MapStyle):
        buffer = np.empty_like(X[0])

        def __getitem__(self, index):
            self.buffer[:] = X[index]
            return self.buffer

    (found,) = batches_from_data(Refilling(X), [IMAGE], batch_size=7)
    np.testing.assert_array_equal(found["x"], X)


def test_single_samples_of_a_model_of_a_fixed_batch_size():
    fixed = ModelInput("x", np.dtype(np.float32), (2, 3, 4, 4))
    with pytest.raises(
        ValueError,
        match=r"^data: 7 samples, the model takes a multiple of 2; leave out 1, e.g. by max_samples=6 \(--max-samples\)$",
    ):
        list(batches_from_data(TfDataset([*X]), [fixed], batch_size=3))
    assert sizes(TfDataset([*X]), [fixed], max_samples=5) == [2, 2]
    assert sizes(TfDataset([*X]), [fixed], max_samples=1) == [2]


def test_errors_of_single_samples():
    wrong = [*X]
    wrong[4] = np.full_like(X[4], np.nan)
    with pytest.raises(ValueError, match=r"^data\[3:6\]: input x: contains nan"):
        list(batches_from_data(TfDataset(wrong), [IMAGE], batch_size=3))
    anysize = ModelInput("x", np.dtype(np.float32), (None, 3, None, 4))
    wrong[4] = X[4, :, :2]
    with pytest.raises(ValueError, match=r"^data\[3:6\]: input x: samples of shapes \(3, 4, 4\) and \(3, 2, 4\) make no batch"):
        list(batches_from_data(TfDataset(wrong), [anysize], batch_size=3))
    assert sizes(TfDataset(wrong), [anysize]) == [1] * 7


A, B, C = samples(4, 6), samples(4, 3), samples(4, 2)
A_INPUT, B_INPUT, C_INPUT = (
    ModelInput(name, np.dtype(np.float32), (None, each.shape[1])) for name, each in zip("abc", (A, B, C))
)
THREE = [A_INPUT, B_INPUT, C_INPUT]

STRUCTURES = {
    "tuple": ((A, B, C), THREE),
    "mapping": ({"c": C, "b": B, "a": A}, THREE),
    "pair in a pair": (((A, B), C), THREE),
    "pair in a pair, at the end": ((A, (B, C)), THREE),
    "lists": ([[A, B], C], THREE),
    "pair in a mapping": ({"image": A, "meta": (B, C)}, THREE),
    "in the order of the keys": ({"y": (B, C), "x": A}, THREE),
    "mapping in a mapping": ({"x": {"n": B, "m": A}, "y": C}, THREE),
    "mapping in a tuple": (({"k": A, "l": B}, C), THREE),
    "mapping of names in a tuple": (({"c": C, "b": B, "a": A},), THREE),
    "mapping of names in a mapping": ({"inputs": {"b": B, "a": A}}, [B_INPUT, A_INPUT]),
    "tuples of one": (((A,), (B,)), THREE[:2]),
}


@pytest.mark.parametrize("form", ["list", "generator", "TensorFlow", "by index"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_of_inputs(structure, form):
    batch, inputs = STRUCTURES[structure]
    data = {
        "list": lambda: [batch] * 2,
        "generator": lambda: (batch for _ in range(2)),
        "TensorFlow": lambda: TfDataset([batch] * 2),
        "by index": lambda: PyDataset(lambda _: batch, 2),
    }[form]()
    found = list(batches_from_data(data, inputs))
    assert len(found) == 2
    for name, array in {"a": A, "b": B, "c": C}.items():
        if name in found[1]:
            np.testing.assert_array_equal(found[1][name], array)
    assert list(found[0]) == [each.name for each in inputs]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_of_single_samples(structure):
    batch, inputs = STRUCTURES[structure]
    data = TfDataset([mapped(lambda array: array[k], batch) for k in range(4)])  # noqa: B023
    (found,) = batches_from_data(data, inputs, batch_size=4)
    for name, array in {"a": A, "b": B, "c": C}.items():
        if name in found:
            np.testing.assert_array_equal(found[name], array)
    assert number_of_batches(data, inputs, batch_size=3) == 2


def test_a_structure_in_place_of_the_whole_data():
    found = list(batches_from_data({"image": A, "meta": (B, C)}, THREE, batch_size=3))
    assert [len(feeds["c"]) for feeds in found] == [3, 1]


def test_lists_of_single_samples_are_arrays_as_before():
    (found,) = batches_from_data([([*A], [*B])], THREE[:2])
    np.testing.assert_array_equal(found["a"], A)
    (found,) = batches_from_data([([*A],)], THREE[:1])
    np.testing.assert_array_equal(found["a"], A)


LABELS = np.zeros(4, np.int64)
DROPPED = {
    "one input": ((A, LABELS), 1, "data.map(lambda x, *labels: x)", "(data[k][0] for k in range(len(data)))"),
    "weights too": ((A, LABELS, LABELS), 1, "data.map(lambda x, *labels: x)", "(data[k][0] for k in range(len(data)))"),
    "by name": (({"a": A}, LABELS), 1, "data.map(lambda x, *labels: x)", "(data[k][0] for k in range(len(data)))"),
    "two by name": (
        ({"a": A, "b": B}, LABELS, LABELS),
        2,
        "data.map(lambda x, *labels: x)",
        "(data[k][0] for k in range(len(data)))",
    ),
    "two inputs": (((A, B), LABELS), 2, "data.map(lambda x, *labels: x)", "(data[k][0] for k in range(len(data)))"),
    "nested inputs": (((A, (B, C)), LABELS), 3, "data.map(lambda x, *labels: x)", "(data[k][0] for k in range(len(data)))"),
    "three members": (
        (A, B, LABELS),
        2,
        "data.map(lambda x0, x1, *labels: (x0, x1))",
        "(data[k][:2] for k in range(len(data)))",
    ),
    "labels first": ((LABELS, A), 1, "data.map(lambda label, x, *labels: x)", "(data[k][1] for k in range(len(data)))"),
    "labels before two": (
        (LABELS, A, B),
        2,
        "data.map(lambda label, x0, x1, *labels: (x0, x1))",
        "(data[k][1:3] for k in range(len(data)))",
    ),
    "a label by name": ({"a": A, "label": LABELS}, 1, "data.map(lambda batch: {'a': batch['a']})", "{'a': batch['a']}"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_labels_of_data_sets(name):
    batch, count, mapping, by_index = DROPPED[name]
    single = mapped(lambda array: array[0], batch)
    for data, remedy in (
        (TfDataset([batch]), mapping),
        (TfDataset([single]), mapping),
        (PyDataset(lambda _: batch, 1), by_index),
    ):
        with pytest.raises(ValueError, match=rf"^data\[0\]: .*; drop labels.*, e\.g\. {re.escape(remedy)}$"):
            list(batches_from_data(data, THREE[:count]))


def test_labels_of_single_samples_by_index():
    with pytest.raises(
        ValueError, match=r"; drop labels, e\.g\. \(x for x, \*labels in torch\.utils\.data\.DataLoader\(data, "
    ):
        list(batches_from_data(MapStyle(A, LABELS), THREE[:1]))


class RaggedTensor(EagerTensor):
    row_splits = None


class SparseTensor:
    shape, dense_shape = A.shape, A.shape


def test_a_tensor_is_as_the_array():
    assert sizes(EagerTensor(X), batch_size=3) == [3, 3, 1]
    assert sizes(EagerTensor(X), batch_size=3, max_samples=5) == [3, 2]
    assert number_of_batches(EagerTensor(X), [IMAGE]) is None


@pytest.mark.parametrize("place", ["data", "batch", "mapping"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (RaggedTensor(A), r"a ragged tensor, .*, e\.g\. x\.to_tensor\(\)$"),
        (SparseTensor(), r"a sparse tensor, .*, e\.g\. tf\.sparse\.to_dense\(x\)$"),
        (EagerTensor(np.array([b"text"], object)), r"dtype object, the model takes float32; give arrays of numbers$"),
    ],
)
def test_tensors_that_are_no_arrays_of_numbers(tensor, message, place):
    data = {"data": tensor, "batch": [tensor], "mapping": {"a": tensor}}[place]
    with pytest.raises(TypeError, match=rf"^data(\[0\])?: input a: {message}"):
        list(batches_from_data(data, THREE[:1]))


# No more samples than wanted


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 7, 100])
@pytest.mark.parametrize("form", ["array", "mapping", "npy", "npz", "numbered npz", "folder", "list", "generator", "reader"])
def test_no_more_samples_than_wanted(form, most, tmp_path):
    read = []

    def generator():
        for k, batch in enumerate(BATCHES):
            read.append(k)
            yield batch

    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", x=X)
    np.savez(tmp_path / "numbered.npz", *BATCHES)
    (tmp_path / "folder").mkdir()
    for k, batch in enumerate(BATCHES):
        np.save(tmp_path / "folder" / f"{k}.npy", batch)
    data = {
        "array": X,
        "mapping": {"x": X},
        "npy": tmp_path / "x.npy",
        "npz": tmp_path / "x.npz",
        "numbered npz": tmp_path / "numbered.npz",
        "folder": tmp_path / "folder",
        "list": BATCHES,
        "generator": generator(),
        "reader": Reader({"x": batch} for batch in generator()),
    }[form]
    found = [feeds["x"] for feeds in batches_from_data(data, [IMAGE], batch_size=2, max_samples=most)]
    np.testing.assert_array_equal(np.concatenate(found), X[:most])
    if form in ("generator", "reader"):
        assert len(read) == len(found) == min(3, math.ceil(most / 3))
    if form == "array":
        assert {len(batch) for batch in found[:-1]} <= {2}


@pytest.mark.parametrize(("most", "batches"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
@pytest.mark.parametrize("form", ["array", "list", "generator"])
def test_whole_batches_where_the_model_fixes_their_size(form, most, batches):
    read = []
    data = {"array": X[:6], "list": np.split(X[:6], 3), "generator": (read.append(k) or X[k : k + 2] for k in range(0, 6, 2))}[
        form
    ]
    fixed = ModelInput("x", np.dtype(np.float32), (2, 3, 4, 4))
    assert sizes(data, [fixed], max_samples=most) == [2] * batches
    assert len(read) == (batches if form == "generator" else 0)


def test_samples_of_a_model_without_a_batch_axis_count_one_by_one():
    without = ModelInput("x", np.dtype(np.float32), (3, 4, 4))
    assert len(list(batches_from_data(X, [without], max_samples=5))) == 5
