"""Data that does not fit: the error says what to do, and that does it."""

import re

import numpy as np
import pytest

from biascorr import correct
from biascorr.calibration.data import batches_from_data, resolved
from biascorr.graph.network import ModelInput
from networks import samples, two_layers

INPUT = ModelInput("x", np.dtype(np.float32), (None, 3, 8, 6))


def error_of(data, model_input=INPUT, kind=ValueError):
    with pytest.raises(kind) as caught:
        list(batches_from_data(data, [model_input]))
    return str(caught.value)


SHAPES = {
    "x[None] adds the axis of samples": (3, 8, 6),
    "x[0] removes the first axis": (1, 1, 3, 8, 6),
    "x.transpose(0, 3, 1, 2) moves the channels there": (2, 8, 6, 3),
    "x.transpose(2, 0, 1)[None] moves the channels there and adds the axis of samples": (8, 6, 3),
    "resize or crop the images": (2, 3, 9, 9),
}


@pytest.mark.parametrize("remedy", SHAPES)
def test_remedies_for_shapes(remedy):
    x = np.zeros(SHAPES[remedy], np.float32)
    assert error_of([x]).endswith(f"; {remedy}")
    if remedy.startswith("x"):
        done = eval(remedy.partition(" ")[0] if "transpose" not in remedy else remedy.partition(" moves")[0], {"x": x})
        assert len(list(batches_from_data([done], [INPUT]))) == 1


def test_shapes_that_nothing_helps():
    assert error_of([np.zeros((2, 5, 9, 9), np.float32)]).endswith("the model takes (any, 3, 8, 6)")
    assert error_of([np.zeros((2, 4), np.float32)], ModelInput("x", np.dtype(np.float32), (None, 3))).endswith("(any, 3)")


def test_remedies_for_types():
    assert error_of(np.zeros((2, 3, 8, 6)), kind=TypeError).endswith("convert it, e.g. x.astype(np.float32)")
    assert error_of(np.zeros((2, 3, 8, 6), np.uint8), kind=TypeError).endswith("e.g. (x / 255).astype(np.float32)")


IMAGES = "for images use biascorr.images(folder, ...); on the command line, the folder with --size or --preset"
FILES = {
    "cat.JPG": "it is an image: " + IMAGES,
    "table.csv": 'np.save("data.npy", np.loadtxt("table.csv", np.float32, delimiter=",")) makes one of it',
    "x.pt": 'np.save("data.npy", torch.load("x.pt").numpy()) makes one of it',
    "x.pkl": 'np.save("data.npy", pickle.load(open("x.pkl", "rb"))) makes one of it',
    "x.h5": 'give h5py.File("x.h5")["x"], or "module:function" of a function that returns it',
    "loader.py": '"loader:function" takes what a function in it returns',
    "model.onnx": "it is a model, give samples for it",
    "notes.doc": "",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_remedies_for_files(name, tmp_path):
    (tmp_path / name).write_text("1,2,3")
    expected = "expected an .npy or .npz file, or a folder of them" + (f"; {FILES[name]}" if FILES[name] else "")
    assert error_of(tmp_path / name) == f"data: {tmp_path / name}: {expected}"


def test_the_remedy_for_tables_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savetxt("table.csv", np.ones((4, 3)), delimiter=",")
    table = ModelInput("x", np.dtype(np.float32), (None, 3))
    exec(re.search(r"; (np\.save\(.*\)) makes", error_of("table.csv", table))[1], {"np": np})
    assert len(list(batches_from_data("data.npy", [table]))) == 4


FOLDERS = {
    "64 files, none .npy or .npz; for images use biascorr.images(folder, ...); ": [f"{k}.jpg" for k in range(64)],
    "2 files, none .npy or .npz; for images use": ["cats/1.png", "dogs/2.png"],
    "2 files, none .npy or .npz; np.save(": ["1.csv", "2.csv"],
    "1 file, none .npy or .npz": ["a.doc"],
    '; give zarr.open("x.zarr", mode="r"), or "module:function" of a function that returns it': ["zarr.json", "c/0"],
    ": it is empty": [],
    "; there are 2 in folders inside it: give one of these": ["a/1.npy", "b/2.npy", "c.txt"],
}


@pytest.mark.parametrize("remedy", FOLDERS)
def test_remedies_for_folders(remedy, tmp_path):
    folder = tmp_path / "x.zarr"
    folder.mkdir()
    for name in FOLDERS[remedy]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert remedy in error_of(folder)
    assert "there is no .npy or .npz file in this folder" in error_of(folder)


# Functions


MODULE = """
import numpy as np
from biascorr import images

def array():
    return np.load("samples.npy")

def batches():
    for row in array():
        yield row[None]

def path():
    return "samples.npy"

def broken():
    raise KeyError("missing")

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    x = samples(4, 3, 6, 6)
    np.save(tmp_path / "samples.npy", x)
    (tmp_path / "my_calibration.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return x


def test_functions_that_are_named(folder):
    expected = correct(two_layers(), folder, method="mean").model
    for name in ("array", "batches", "path"):
        found = correct(two_layers(), f"my_calibration:{name}", validation=f"my_calibration:{name}", method="mean")
        assert found.model == expected
        assert found.samples == 4


def test_functions_that_are_none(folder):
    messages = {
        "my_calibration:gone": "cannot be found: module 'my_calibration' has no attribute 'gone'",
        "no_such_module:f": "cannot be found: No module named 'no_such_module'",
        "my_calibration:number": "is a int, expected a function",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"^data: {name!r} {message}"):
            correct(two_layers(), name)
    with pytest.raises(KeyError, match="missing"):
        correct(two_layers(), "my_calibration:broken")
    with pytest.raises(ValueError, match="^validation: "):
        correct(two_layers(), folder, validation="my_calibration:gone")
    with pytest.raises(FileNotFoundError, match="no such file: gone:1"):
        correct(two_layers(), "gone:1")


@pytest.mark.usefixtures("folder")
def test_a_file_comes_before_a_function(tmp_path):
    (tmp_path / "my_calibration:array").write_text("no function")
    with pytest.raises(ValueError, match="my_calibration:array: expected an .npy or .npz file"):
        correct(two_layers(), "my_calibration:array")


def test_a_function_gives_data(folder):
    assert resolved("my_calibration:array").shape == folder.shape
