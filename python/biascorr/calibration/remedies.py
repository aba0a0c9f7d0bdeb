"""What to do about data that is none, or not as a model takes it: the last part of an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from biascorr.calibration.images import SUFFIXES, has_images
from biascorr.graph.network import ModelInput

ARRAYS = (".npy", ".npz")

_IMAGES = "for images use biascorr.images(folder, ...); on the command line, the folder with --size or --preset"

_SAVE = 'np.save("data.npy", {})'

_READERS = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), 'np.loadtxt("{name}", np.float32, delimiter=",")'),
    **dict.fromkeys((".pt", ".pth"), 'torch.load("{name}").numpy()'),
    **dict.fromkeys((".pkl", ".pickle"), 'pickle.load(open("{name}", "rb"))'),
    **dict.fromkeys((".parquet", ".feather"), 'pandas.read_parquet("{name}").to_numpy("float32")'),
    ".mat": 'scipy.io.loadmat("{name}")["x"]',
    ".safetensors": 'safetensors.numpy.load_file("{name}")["x"]',
}
"""What reads files that hold arrays, by their suffix."""

_LAZY = {**dict.fromkeys((".h5", ".hdf5"), 'h5py.File("{name}")["x"]'), ".zarr": 'zarr.open("{name}", mode="r")'}
"""What opens arrays that are read part by part, by their suffix."""

_OF_ZARR = ("zarr.json", ".zarray", ".zgroup")
"""Files that a folder of zarr has one of."""

_MODELS = (".onnx", ".tflite", ".keras")


def of_file(path: Path) -> str:
    """What to do about a file that is no .npy or .npz file."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return f"; it is an image: {_IMAGES}"
    if suffix in _READERS:
        return "; " + _SAVE.format(_READERS[suffix].format(name=path.name)) + " makes one of it"
    if suffix in _LAZY:
        return _of_lazy(suffix, path)
    if suffix == ".py":
        return f'; "{path.stem}:function" takes what a function in it returns'
    return "; it is a model, give samples for it" if suffix in _MODELS else ""


def _of_lazy(suffix: str, path: Path) -> str:
    return f'; give {_LAZY[suffix].format(name=path.name)}, or "module:function" of a function that returns it'


def of_folder(folder: Path) -> str:
    """What to do about a folder in which there is no .npy or .npz file."""
    files = [each for each in folder.rglob("*") if each.is_file()]
    if not files:
        return ": it is empty"
    if any((folder / name).exists() for name in _OF_ZARR):
        return _of_lazy(".zarr", folder)
    if any(file.suffix in ARRAYS for file in files):
        return f"; there are {sum(file.suffix in ARRAYS for file in files)} in folders inside it: give one of these"
    said = f": {len(files)} file{'s'[: len(files) > 1]}, none .npy or .npz"
    suffix = Counter(file.suffix.lower() for file in files).most_common(1)[0][0]
    if has_images(folder) or suffix in SUFFIXES:
        return f"{said}; {_IMAGES}"
    return said + of_file(next(file for file in sorted(files) if file.suffix.lower() == suffix))


def of_dtype(array: NDArray[Any], expected: ModelInput) -> str:
    """How an array gets the dtype of an input."""
    if array.dtype.kind in "OSU":
        return "give arrays of numbers"
    if array.dtype.kind in "iu" and expected.dtype.kind == "f":
        return f"convert it as for training, e.g. (x / 255).astype(np.{expected.dtype})"
    module = "np" if expected.dtype.isbuiltin == 1 else "ml_dtypes"
    return f"convert it, e.g. x.astype({module}.{expected.dtype})"


def of_shape(found: tuple[int, ...], expected: tuple[int | None, ...]) -> str:
    """How an array gets the shape of an input: an axis for samples added or removed, its channels moved, its images resized."""
    if fits((1, *found), expected):
        return "; x[None] adds the axis of samples"
    if found[:1] == (1,) and len(expected) > 3 and fits(found[1:], expected[2:]):
        return "; if it is of one sample, x[None] adds the axis of samples"
    if found[:1] == (1,) and fits(found[1:], expected):
        return "; x[0] removes the first axis"
    for shape, more in ((found, ""), ((1, *found), "[None]")):
        rank, first = len(shape), len(more) > 0
        for order in ((0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)) if rank > 2 else ():
            if fits(tuple(shape[axis] for axis in order), expected):
                axes = ", ".join(str(axis - first) for axis in order[first:])
                added = " and adds the axis of samples" if more else ""
                return f"; x.transpose({axes}){more} moves the channels there{added}"
    if len(found) == len(expected) == 4 and sum(a == b for a, b in zip(found[1:], expected[1:])) == 1:
        return "; resize or crop the images" if _has_sides(found, expected) else ""
    return ""


def _has_sides(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether arrays of images have the channels of an input where it has them, and only other sides."""
    return any(found[axis] == expected[axis] in (1, 3) for axis in (1, 3))


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether an array of this shape is one that an input takes."""
    return len(shape) == len(expected) and all(b is None or a == b for a, b in zip(shape, expected))
