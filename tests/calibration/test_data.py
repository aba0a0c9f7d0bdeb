"""Where samples come from: every form of the same samples gives the same result, every mistake a message that names it."""

import contextlib
import os
import pickle
import re
import zipfile

import numpy as np
import pytest

from biascorr.calibration.data import batches_from_data
from biascorr.calibration.progress import WHOLE
from biascorr.graph.network import ModelInput
from networks import Reader, biases, constants_of, mean_corrected, model_from_text, samples, two_layers, weights

X = samples(6, 3, 6, 6)
INPUTS = [ModelInput("x", np.dtype(np.float32), (None, 3, 6, 6))]


def assert_same_biases(found, expected):
    after = constants_of(found.model)
    for name, array in constants_of(expected.model).items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-7)


class OnlyArrayProtocol:
    """Like a tensor of another framework."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype, copy=copy)


# Forms of samples


def npy(folder, array=X):
    np.save(folder / "samples.npy", array)
    return folder / "samples.npy"


def npz(folder, *arrays, save=np.savez, **named):
    save(folder / "samples.npz", *arrays, **named)
    return folder / "samples.npz"


def folder_of(folder, save, batches):
    for k, batch in enumerate(batches):
        save(folder / f"batch_{k:02}", batch)
    (folder / "readme.txt").write_text("not a batch")
    return folder


FORMS = {
    "array": lambda _: X,
    "array in Fortran order": lambda _: np.asfortranarray(X),
    "array with strides": lambda _: np.repeat(X, 2, axis=3)[..., ::2],
    "read-only array": lambda _: np.frombuffer(X.tobytes(), X.dtype).reshape(X.shape),
    "mapping of arrays": lambda _: {"x": X},
    "list of batches": lambda _: np.split(X, 3),
    "list of single samples": lambda _: np.split(X, 6),
    "list of one batch": lambda _: [X],
    "batches of different sizes": lambda _: [X[:1], X[1:3], X[3:]],
    "tuple of batches": lambda _: tuple(np.split(X, 2)),
    "list of tuples": lambda _: [(batch,) for batch in np.split(X, 2)],
    "list of lists": lambda _: [[batch] for batch in np.split(X, 2)],
    "list of mappings": lambda _: [{"x": batch} for batch in np.split(X, 3)],
    "list of what numpy takes for arrays": lambda _: [OnlyArrayProtocol(batch) for batch in np.split(X, 3)],
    "generator": lambda _: (batch for batch in np.split(X, 3)),
    "iterator of mappings": lambda _: iter([{"x": batch} for batch in np.split(X, 3)]),
    "calibration reader": lambda _: Reader({"x": batch} for batch in np.split(X, 3)),
    "npy": npy,
    "npy, path as text": lambda folder: str(npy(folder)),
    "npy in Fortran order": lambda folder: npy(folder, np.asfortranarray(X)),
    "npz": lambda folder: npz(folder, x=X),
    "compressed npz": lambda folder: npz(folder, save=np.savez_compressed, x=X),
    "npz without names": lambda folder: npz(folder, X),
    "npz of batches without names": lambda folder: npz(folder, *np.split(X, 3)),
    "memory-mapped file": lambda folder: np.load(npy(folder), mmap_mode="r"),
    "folder of npy": lambda folder: folder_of(folder, np.save, np.split(X, 3)),
    "folder of npz": lambda folder: folder_of(folder, lambda path, batch: np.savez(path, x=batch), np.split(X, 2)),
    "folder of npz without names": lambda folder: folder_of(folder, np.savez, np.split(X, 2)),
    "folder, path as text": lambda folder: str(folder_of(folder, np.save, np.split(X, 3))),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace(" ", "_"))
def test_result_is_the_same_for_every_form_of_the_same_samples(form, tmp_path):
    expected = mean_corrected(two_layers(), [X[k : k + 1] for k in range(6)])
    assert_same_biases(mean_corrected(two_layers(), FORMS[form](tmp_path)), expected)


def test_order_of_the_samples_does_not_matter():
    assert_same_biases(mean_corrected(two_layers(), X[::-1]), mean_corrected(two_layers(), X))


TWO_INPUTS = """g (float[?,3,?,?] image, float[?,7] row) => (float[?,5,?,?] y, float[?,4] z) {
    [conv] y = Conv(image, w1, b1)
    [gemm] z = Gemm(row, w2, b2)
}"""
IMAGE, ROW = samples(6, 3, 8, 8), samples(6, 7)
PAIRS = {
    "mapping": lambda _: {"image": IMAGE, "row": ROW},
    "mapping in another order": lambda _: {"row": ROW, "image": IMAGE},
    "list of tuples": lambda _: list(zip(np.split(IMAGE, 3), np.split(ROW, 3))),
    "list of lists": lambda _: [list(pair) for pair in zip(np.split(IMAGE, 3), np.split(ROW, 3))],
    "generator of mappings": lambda _: ({"row": r, "image": i} for i, r in zip(np.split(IMAGE, 2), np.split(ROW, 2))),
    "calibration reader": lambda _: Reader([{"image": IMAGE, "row": ROW}]),
    "npz": lambda folder: npz(folder, image=IMAGE, row=ROW),
    "folder of npz": lambda folder: folder_of(
        folder, lambda path, pair: np.savez(path, image=pair[0], row=pair[1]), zip(np.split(IMAGE, 2), np.split(ROW, 2))
    ),
}


@pytest.mark.parametrize("form", PAIRS, ids=lambda form: form.replace(" ", "_"))
def test_result_is_the_same_for_every_form_of_the_same_pairs(form, tmp_path):
    constants = {"w1": weights(5, 3, 3, 3), "w2": weights(7, 4, axis=1), "b1": biases(5), "b2": biases(4)}
    model = model_from_text(TWO_INPUTS, **constants)
    expected = mean_corrected(model, [(IMAGE, ROW)])
    assert_same_biases(mean_corrected(model, PAIRS[form](tmp_path)), expected)


def one_conv(x, prepare="", read="x"):
    return model_from_text(
        f"g ({x}) => (float[?,5,?,?] y) {{ {prepare} y = Conv({read}, w, b) }}", w=weights(5, 3, 3, 3), b=biases(5)
    )


ANY_BATCH = one_conv("float[?,3,6,6] x")


@pytest.mark.parametrize("data", [X, {"x": X}, np.split(X, 3), Reader([{"x": X[:2]}, {"x": X[2:4]}, {"x": X[4:]}])])
def test_model_of_a_fixed_batch_size_gets_batches_of_that_size(data):
    correction = mean_corrected(one_conv("float[2,3,6,6] x"), data)
    assert correction.batches == 3
    assert_same_biases(correction, mean_corrected(ANY_BATCH, X))


@pytest.mark.parametrize("form", ["stacked", "mapping", "list", "npy", "npz", "npz without names", "folder"])
def test_model_without_a_batch_axis_gets_samples_one_by_one(form, tmp_path):
    model = one_conv("float[3,6,6] x", "axes = Constant<value_ints=[0]>() t = Unsqueeze(x, axes)", "t")
    data = {
        "stacked": lambda: X,
        "mapping": lambda: {"x": X},
        "list": lambda: list(X),
        "npy": lambda: npy(tmp_path),
        "npz": lambda: npz(tmp_path, x=X),
        "npz without names": lambda: npz(tmp_path, *X),
        "folder": lambda: folder_of(tmp_path, np.save, X),
    }[form]()
    correction = mean_corrected(model, data)
    assert (correction.samples, correction.batches) == (6, 6)
    assert_same_biases(correction, mean_corrected(ANY_BATCH, X))


def test_one_sample_of_a_model_without_a_batch_axis():
    model = one_conv("float[3,6,6] x", "axes = Constant<value_ints=[0]>() t = Unsqueeze(x, axes)", "t")
    assert_same_biases(mean_corrected(model, X[0]), mean_corrected(ANY_BATCH, X[:1]))


@pytest.mark.parametrize("data", [{"x": X, "factor": np.ones(6, np.float32)}, [(X, np.array(1, np.float32))]])
def test_an_input_that_is_a_number(data):
    model = one_conv("float[?,3,6,6] x, float factor", "t = Mul(x, factor)", "t")
    assert_same_biases(mean_corrected(model, data), mean_corrected(ANY_BATCH, X))


def test_an_input_of_unknown_rank():
    assert_same_biases(mean_corrected(one_conv("float[] x"), X), mean_corrected(ANY_BATCH, X))


def test_inputs_that_are_not_of_floats_may_hold_anything():
    text = "g (int64[?,4] ids, bool[?,4] flags) => (float[?,4,5] y) { e = Gather(t, ids) y = MatMul(e, w) f = Not(flags) }"
    model = model_from_text(text, t=weights(9, 7), w=weights(7, 5, axis=1))
    data = {"ids": np.arange(24).reshape(6, 4) % 9, "flags": np.ones((6, 4), bool)}
    assert mean_corrected(model, data).report[0].method == "mean"


@pytest.mark.parametrize("dtype", ["int64", "float16", "float64"])
def test_samples_from_another_process_keep_their_type(dtype):
    x = pickle.loads(pickle.dumps(np.ones((6, 4), dtype)))  # a copy of its dtype, which numpy does not call built in
    (batch,) = batches_from_data(x, [ModelInput("x", np.dtype(dtype), (None, 4))], batch_size=6)
    assert batch["x"].dtype == dtype


# How samples are read


def test_samples_are_read_one_by_one():
    read = []

    def batches():
        for k in range(6):
            read.append(k)
            yield X[k : k + 1]

    def progress(step, done, total):
        if step == "reading samples":
            assert total is None
            assert len(read) == done

    assert mean_corrected(two_layers(), batches(), progress=progress).samples == 6


@pytest.mark.parametrize(
    ("form", "batches"), [("list of batches", 3), ("folder of npy", 3), ("array", None), ("generator", None)]
)
def test_progress_of_reading(form, batches, tmp_path):
    """The first part of all of the work; batches are counted where nobody knows how many there will be."""
    found = []
    mean_corrected(
        two_layers(),
        FORMS[form](tmp_path),
        progress=lambda step, *counts: found.append(counts) if step == "reading samples" else None,
    )
    if batches is None:
        assert found == [(k, None) for k in range(1, 4 if form == "generator" else 7)]
    else:
        assert found == [(WHOLE * k // batches // 20, WHOLE) for k in range(1, batches + 1)]


def test_errors_of_a_generator_are_passed_on():
    def batches():
        yield X
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        mean_corrected(two_layers(), batches())


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "c", "a"):
        np.save(tmp_path / f"{name}.npy", np.full((1, 3, 6, 6), ord(name), np.float32))
    found = [batch["x"].flat[0] for batch in batches_from_data(tmp_path, INPUTS)]
    assert found == [ord("a"), ord("b"), ord("c")]


# Mistakes


def with_value(value, index):
    array = X.copy()
    array[index, 1, 2, 3] = value
    return array


MISTAKES = {
    "another name": ({"y": X}, ["data", "has y", "inputs are x"]),
    "a name too many": ({"x": X, "z": X}, ["data", "has x, z", "inputs are x"]),
    "no names": ({}, ["data", "has nothing", "inputs are x"]),
    "another name in the second batch": ([{"x": X}, {"y": X}], [r"data\[1\]", "has y", "inputs are x"]),
    "another number of channels": (X[:, :2], [r"data\[0\]", "input x", r"\(1, 2, 6, 6\)", r"\(any, 3, 6, 6\)"]),
    "an axis too few": ([X[0]], [r"data\[0\]", "input x", r"\(3, 6, 6\)", r"\(any, 3, 6, 6\)"]),
    "an axis too many": ([X[None]], [r"data\[0\]", "input x", r"\(1, 6, 3, 6, 6\)", r"\(any, 3, 6, 6\)"]),
    "another shape in the second batch": ([X, X[:, :, :5]], [r"data\[1\]", "input x", r"\(6, 3, 5, 6\)"]),
    "nan in the fifth sample": (with_value(np.nan, 4), [r"data\[4\]", "input x", "nan"]),
    "nan in a mapping": ({"x": with_value(np.nan, 4)}, [r"data\[4\]", "input x", "nan"]),
    "nan in the second batch": ([X, with_value(np.nan, 0)], [r"data\[1\]", "input x", "nan"]),
    "inf in the third sample": (with_value(np.inf, 2), [r"data\[2\]", "input x", "inf"]),
    "-inf in the third batch": ([X, X, with_value(-np.inf, 2)], [r"data\[2\]", "input x", "inf"]),
    "empty list": ([], ["data", "no samples"]),
    "empty array": (X[:0], ["data", "no samples"]),
    "empty mapping": ({"x": X[:0]}, ["data", "no samples"]),
    "0-dimensional array": (np.array(1, np.float32), ["data"]),
    "used-up generator": (iter([]), ["data", "no samples"]),
    "used-up reader": (Reader([]), ["data", "no samples"]),
    "empty batch": ([X, X[:0]], [r"data\[1\]", "input x", r"\(0, 3, 6, 6\)"]),
    "labels": ([(X, np.zeros(6))], [r"data\[0\]", "2 arrays", "1 inputs", "labels"]),
    "labels in a list": ([[X, np.zeros(6)]], [r"data\[0\]", "2 arrays", "1 inputs", "labels"]),
    "arrays for three inputs": ([(X, X, X)], [r"data\[0\]", "3 arrays", "1 inputs"]),
    "no arrays in a batch": ([()], [r"data\[0\]", "0 arrays", "1 inputs"]),
}


def parts_in_order(parts):
    return "(?s)" + ".*".join(parts)


@pytest.mark.parametrize("name", MISTAKES, ids=lambda name: name.replace(" ", "_"))
def test_mistake_in_the_samples(name):
    data, parts = MISTAKES[name]
    with pytest.raises(ValueError, match=parts_in_order(parts)):
        mean_corrected(two_layers(), data)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "bool", "complex64", "object", "U4"])
def test_samples_of_another_dtype(dtype):
    given = X.astype(dtype)
    with pytest.raises(TypeError, match=parts_in_order([r"data\[0\]", "input x", str(given.dtype), "float32"])):
        mean_corrected(two_layers(), given)


@pytest.mark.parametrize("data", [3, 2.5, object(), b"samples", bytearray(3), len])
def test_data_of_a_kind_that_is_not_understood(data):
    with pytest.raises(TypeError, match=parts_in_order(["^data: ", re.escape(type(data).__name__), "expected"])):
        mean_corrected(two_layers(), data)


PAIR_MISTAKES = {
    "unequal counts": ({"image": IMAGE, "row": ROW[:5]}, ["data", "different numbers of samples", "6", "5"]),
    "a missing input": ({"image": IMAGE}, ["data", "has image", "inputs are image, row"]),
    "one array for two inputs": (IMAGE, ["data", "1 arrays", "2 inputs", r"image, row"]),
    "one array for two inputs in a batch": ([IMAGE], [r"data\[0\]", "1 arrays", "2 inputs", r"image, row"]),
    "inputs in another order": ([(ROW, IMAGE)], [r"data\[0\]", "input image"]),
    "labels beside two inputs": ([(IMAGE, ROW, ROW)], [r"data\[0\]", "3 arrays", "2 inputs", "labels"]),
    "nan in the second input": ({"image": IMAGE, "row": np.full_like(ROW, np.nan)}, [r"data\[0\]", "input row", "nan"]),
}


@pytest.mark.parametrize("name", PAIR_MISTAKES, ids=lambda name: name.replace(" ", "_"))
def test_mistake_in_the_samples_of_two_inputs(name):
    data, parts = PAIR_MISTAKES[name]
    constants = {"w1": weights(5, 3, 3, 3), "w2": weights(7, 4, axis=1), "b1": biases(5), "b2": biases(4)}
    with pytest.raises(ValueError, match=parts_in_order(parts)):
        mean_corrected(model_from_text(TWO_INPUTS, **constants), data)


def test_number_of_samples_that_is_no_multiple_of_the_batch_size():
    with pytest.raises(ValueError, match=parts_in_order(["data", "5 samples", "2"])):
        mean_corrected(one_conv("float[2,3,6,6] x"), X[:5])


def test_batches_of_another_size_than_the_model_takes():
    with pytest.raises(ValueError, match=parts_in_order([r"data\[0\]", "input x", r"\(3, 3, 6, 6\)", r"\(2, 3, 6, 6\)"])):
        mean_corrected(one_conv("float[2,3,6,6] x"), np.split(X, 2))


# Files that cannot be read


@pytest.mark.parametrize("name", ["none.npy", "none.npz", "none", "none/none.npy"])
def test_missing_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        mean_corrected(two_layers(), tmp_path / name)


def encrypted(path):
    """Sets the flag of an encrypted member in the directory and at the member itself."""
    raw = bytearray(npz(path.parent, x=X).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    path.write_bytes(raw)


def damaged(path, save):
    """Changes bytes in the middle of the values."""
    raw = bytearray(npz(path.parent, save=save, x=X).read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 20] = b"\xff" * 20
    path.write_bytes(raw)


BAD_FILES = {
    "empty.npy": lambda path: path.write_bytes(b""),
    "empty.npz": lambda path: path.write_bytes(b""),
    "text.npy": lambda path: path.write_text("1, 2, 3"),
    "text.npz": lambda path: path.write_text("1, 2, 3"),
    "table.csv": lambda path: path.write_text("1, 2, 3"),
    "no_suffix": lambda path: path.write_bytes(npy(path.parent).read_bytes()),
    "array.npz": lambda path: path.write_bytes(npy(path.parent).read_bytes()),
    "objects.npy": lambda path: np.save(path, np.array([X, None], object), allow_pickle=True),
    "objects.npz": lambda path: np.savez(path, x=np.array([X, None], object)),
    "pickle.npy": lambda path: np.array([X, None], object).dump(path),
    "pickle.npz": lambda path: np.array([X, None], object).dump(path),
    "no_arrays.npz": lambda path: np.savez(path),
    "not_an_array.npz": lambda path: zip_of(path, "x.txt"),
    "other_name.npz": lambda path: np.savez(path, y=X),
    "counts.npz": lambda path: np.savez(path, x=X, y=X[:2]),
    "header.npy": lambda path: path.write_bytes(npy(path.parent).read_bytes().replace(b"}", b"{")),
    "damaged.npz": lambda path: damaged(path, np.savez),
    "damaged_compressed.npz": lambda path: damaged(path, np.savez_compressed),
    "encrypted.npz": encrypted,
}


def zip_of(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "1, 2, 3")


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_cannot_be_read_is_named(name, tmp_path):
    BAD_FILES[name](tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        mean_corrected(two_layers(), tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_file_cut_off_anywhere_cannot_be_read(suffix, tmp_path):
    array = X[:2, :, :2, :2]
    whole = (npy(tmp_path, array) if suffix == ".npy" else npz(tmp_path, x=array)).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            list(batches_from_data(path, INPUTS))


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_file_with_any_byte_changed_gives_samples_or_a_clear_error(save, tmp_path):
    array = samples(1, 3, 2, 2)
    save(tmp_path / "whole", array) if save is np.save else save(tmp_path / "whole", x=array)
    (whole,) = tmp_path.iterdir()
    path = tmp_path / f"changed{whole.suffix}"
    raw = whole.read_bytes()
    inputs = [ModelInput("x", np.dtype(np.float32), (None, 3, 2, 2))]
    for k, byte in enumerate(raw):
        path.write_bytes(raw[:k] + bytes([byte ^ 0x20]) + raw[k + 1 :])
        with contextlib.suppress(TypeError, ValueError):
            list(batches_from_data(path, inputs))


@pytest.mark.parametrize("others", [[], ["readme.txt", "image.png"]])
def test_folder_without_samples(others, tmp_path):
    for name in others:
        (tmp_path / name).write_text("there is no .npy or .npz file in this folder")
    with pytest.raises(ValueError, match=r"data: .*there is no .npy or .npz file in this folder"):
        mean_corrected(two_layers(), tmp_path)


@pytest.mark.parametrize(
    ("save", "parts"),
    [
        (lambda path: np.save(path, X[:, :2]), ["input x", r"\(6, 2, 6, 6\)"]),
        (lambda path: np.save(path, with_value(np.nan, 1)), ["input x", "nan"]),
        (lambda path: path.write_bytes(b"\x93NUMPY"), ["cannot be read"]),
    ],
    ids=["shape", "nan", "cut off"],
)
def test_bad_file_in_a_folder_is_named(save, parts, tmp_path):
    np.save(tmp_path / "a.npy", X)
    save(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=parts_in_order([r"b\.npy", *parts])):
        mean_corrected(two_layers(), tmp_path)


def test_nan_in_a_file_is_named_by_file_and_sample(tmp_path):
    with pytest.raises(ValueError, match=parts_in_order([r"samples\.npz", r"\[4\]", "input x", "nan"])):
        mean_corrected(two_layers(), npz(tmp_path, x=with_value(np.nan, 4)))


def test_folder_that_is_named_like_a_file(tmp_path):
    (tmp_path / "batches.npz").mkdir()
    np.save(tmp_path / "batches.npz" / "a.npy", X)
    assert mean_corrected(two_layers(), tmp_path / "batches.npz").batches == 1


PAIR = [ModelInput("a", np.dtype(np.float32), (None, 6)), ModelInput("b", np.dtype(np.float32), (None, 3))]
A, B, LABELS = np.zeros((4, 6), np.float32), np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
WITH_LABELS = {
    "one input": ([(A, LABELS)], PAIR[:1]),
    "one input, a list": ([[A, LABELS]], PAIR[:1]),
    "one input, two labels": ([(A, LABELS, LABELS)], PAIR[:1]),
    "one input, by name": ([({"a": A}, LABELS)], PAIR[:1]),
    "one input, label by name": ([{"a": A, "label": LABELS}], PAIR[:1]),
    "one input, label in a mapping of all": ({"a": A, "label": LABELS}, PAIR[:1]),
    "two inputs": ([(A, B, LABELS)], PAIR),
    "two inputs together": ([((A, B), LABELS)], PAIR),
    "two inputs in a list": ([([A, B], LABELS)], PAIR),
    "two inputs by name": ([({"a": A, "b": B}, LABELS)], PAIR),
    "two inputs, label by name": ([{"a": A, "b": B, "label": LABELS}], PAIR),
    "a generator": (((A, LABELS) for _ in range(2)), PAIR[:1]),
    "a reader": (Reader([{"a": A, "label": LABELS}]), PAIR[:1]),
}


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_beside_inputs(name):
    data, inputs = WITH_LABELS[name]
    with pytest.raises(ValueError, match=r"^data.*; drop labels.*, e\.g\. "):
        list(batches_from_data(data, inputs))


def test_labels_in_a_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"samples\.npz: has a, label, .*; drop labels and all else, e\.g\. \{'a': batch\['a'\]\}$"
    ):
        list(batches_from_data(npz(tmp_path, a=A, label=LABELS), PAIR[:1]))


IMAGES = [ModelInput("x", np.dtype(np.float32), (None, 3, 8, 6))]
REMEDIES = {
    "channels last": (np.zeros((2, 8, 6, 3), np.float32), r"; x\.transpose\(0, 3, 1, 2\) moves the channels there$"),
    "no axis of samples": ([np.zeros((3, 8, 6), np.float32)], r"; x\[None\] adds the axis of samples$"),
    "bytes": (np.zeros((2, 3, 8, 6), np.uint8), r"; convert it as for training, e\.g\. \(x / 255\)\.astype\(np\.float32\)$"),
    "float64": (np.zeros((2, 3, 8, 6)), r"; convert it, e\.g\. x\.astype\(np\.float32\)$"),
    "objects": (np.zeros((2, 3, 8, 6), object), r"dtype object, the model takes float32; give arrays of numbers$"),
    "ragged": ([([[1.0], [1.0, 2.0]],)], r"input x: no array: "),
    "masked": (
        np.ma.masked_array(np.zeros((2, 3, 8, 6), np.float32), False),
        r"a masked array, expected one whose elements all count",
    ),
    "masked batch": (
        [np.ma.masked_array(np.zeros((2, 3, 8, 6), np.float32), True)],
        r"data\[0\]: input x: a masked array, expected",
    ),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_mistakes_come_with_the_remedy(name):
    data, message = REMEDIES[name]
    with pytest.raises((TypeError, ValueError), match=message):
        list(batches_from_data(data, IMAGES))


class Refilled(list):
    """Gives out one array again and again, with other values."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self._buffer = np.empty_like(arrays[0])

    def __iter__(self):
        for array in super().__iter__():
            self._buffer[:] = array
            yield self._buffer


class Refilling:
    """Becomes an array in the same memory as all others."""

    buffer = np.empty((1, 3, 6, 6), np.float32)

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        self.buffer[:] = self._array
        return self.buffer


@pytest.mark.parametrize("form", [Refilled, lambda arrays: [Refilling(array) for array in arrays]])
def test_one_buffer_for_all_batches(form):
    batches = np.split(X, 6)
    assert_same_biases(mean_corrected(two_layers(), form(batches)), mean_corrected(two_layers(), batches))


@pytest.mark.parametrize("name", ["x.npy", "z.npz"])
@pytest.mark.parametrize("is_in_folder", [False, True])
def test_files_that_never_end(name, is_in_folder, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=rf"{re.escape(name)}: a named pipe, expected a file$"):
        list(batches_from_data(tmp_path if is_in_folder else tmp_path / name, INPUTS))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(OSError, match=rf"{re.escape(name)}: a device, expected a file$"):
        list(batches_from_data(tmp_path if is_in_folder else tmp_path / name, INPUTS))


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = npy(tmp_path)
    reading = iter(batches_from_data(path, INPUTS))
    np.testing.assert_array_equal(next(reading)["x"], X[:1])
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: changed while it was read$"):
        list(reading)


def test_a_tuple_of_arrays_and_labels_or_of_batches():
    for data, inputs, kept in (((A, LABELS), PAIR[:1], "data[0]"), ((A, B, LABELS), PAIR, "[data[:-1]]")):
        with pytest.raises(ValueError, match=rf"; drop labels, e\.g\. {re.escape(kept)}$"):
            list(batches_from_data(data, inputs))
    assert len(list(batches_from_data(((A, B), (A, B), (A, B)), PAIR))) == 3
    assert len(list(batches_from_data((A, A), PAIR[:1]))) == 2
