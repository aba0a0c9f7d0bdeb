"""Where calibration samples come from: arrays, files, folders, readers, any iterable of batches.

Whatever the source, batches come out one by one, checked against the inputs of the model.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.graph.network import ModelInput

_SUFFIXES = (".npy", ".npz")


Progress = Callable[[str, int, int | None], None]
"""Called with the step, how much of it is done, and how much there is (None if unknown)."""


def number_of_batches(data: Any) -> int | None:
    """How many batches the data gives, None where that is not known before reading it."""
    if isinstance(data, (str, PathLike)):
        path = Path(data)
        return len(_files(path)) if path.is_dir() else None
    one_batch_each = isinstance(data, Sized) and not isinstance(data, (np.ndarray, Mapping)) and not hasattr(data, "get_next")
    try:
        return len(data) if one_batch_each else None
    except TypeError:  # datasets whose class has a length although they have none themselves
        return None


def number_of_samples(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[ModelInput]) -> int:
    """How many a batch has along the first axis; 1 where the model does not say that samples are along it."""
    lengths = {len(feeds[each.name]) if each.shape and each.shape[0] is None else 1 for each in inputs}
    return lengths.pop() if len(lengths) == 1 else 1


def batches_from_data(
    data: Any, inputs: Sequence[ModelInput], *, name: str = "data", batch_size: int = 1
) -> Iterator[dict[str, NDArray[Any]]]:
    """Batches by input name, as the model takes them.

    Parameters
    ----------
    data : path, array, mapping, reader or iterable
        See :func:`biascorr.correct`.
    inputs : sequence of ModelInput
        The inputs of the model, in the order of arrays that come without names.
    name : str
        The name that errors give the data.
    batch_size : int
        Samples of an array or a file that make a batch, where the model does not fix that.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    TypeError
        The data is of no kind above, or an array has another dtype than the input.
    ValueError
        A file cannot be read; names or shapes are not those of the inputs; an array has nan or inf.
    """
    for label, batch in _named_batches(data, inputs, name, batch_size):
        for each in inputs:
            _check(batch[each.name], each, label)
        yield batch


Batches = Iterator[tuple[str, dict[str, NDArray[Any]]]]
"""The name that errors give a batch, and the batch."""


def _named_batches(data: Any, inputs: Sequence[ModelInput], name: str, batch_size: int) -> Batches:
    if isinstance(data, (str, PathLike)):
        yield from _from_path(Path(data), inputs, batch_size)
    elif isinstance(data, (np.ndarray, Mapping)):
        yield from _samples(_by_name(data, inputs, name), inputs, name, batch_size)
    elif isinstance(data, Iterable) and not isinstance(data, (bytes, bytearray)):
        yield from _each(data, inputs, name)
    elif hasattr(data, "get_next"):
        yield from _each(iter(data.get_next, None), inputs, name)
    else:
        raise TypeError(f"{name}: {type(data).__name__}, expected an array, a mapping, an iterable of batches or a path")


def _each(batches: Iterable[Any], inputs: Sequence[ModelInput], name: str) -> Batches:
    for k, batch in enumerate(batches):
        label = f"{name}[{k}]"
        yield label, _by_name(batch, inputs, label)


def _by_name(batch: Any, inputs: Sequence[ModelInput], name: str) -> dict[str, NDArray[Any]]:
    names = [each.name for each in inputs]
    if not isinstance(batch, Mapping):
        arrays = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if len(arrays) != len(inputs):
            hint = "; drop labels, e.g. (x for x, label in data)" if len(arrays) == len(inputs) + 1 else ""
            raise ValueError(f"{name}: {len(arrays)} arrays, the model has {len(inputs)} inputs ({', '.join(names)}){hint}")
        batch = dict(zip(names, arrays))
    if set(batch) != set(names):
        found = ", ".join(map(str, batch)) or "nothing"
        raise ValueError(f"{name}: has {found}, the model's inputs are {', '.join(names)}")
    return {key: _array(batch[key]) for key in names}


def _array(values: Any) -> NDArray[Any]:
    """Tensors of TensorFlow and torch among others; the latter may be on another device or part of a gradient."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values.numpy() if hasattr(values, "numpy") else values)


def _samples(arrays: dict[str, NDArray[Any]], inputs: Sequence[ModelInput], name: str, batch_size: int) -> Batches:
    """Arrays that hold samples along their first axis, in batches of the size that the model takes, or else of this one."""
    counts = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{name}: inputs have different numbers of samples: {counts}")
    shapes = [each.shape for each in inputs if each.shape and _has_batch_axis(arrays[each.name], each)]
    fixed = max((shape[0] or 0 for shape in shapes), default=0)
    size = fixed or (batch_size if len(shapes) == len(inputs) else 1)
    count = next(iter(counts.values()), 0)
    if fixed and count % size:
        raise ValueError(f"{name}: {count} samples, the model takes a multiple of {size}")
    for start in range(0, count, size):
        label = f"{name}[{start}]" if size == 1 else f"{name}[{start}:{min(start + size, count)}]"
        yield label, {each.name: _part(arrays[each.name], each, start, size) for each in inputs}


def _has_batch_axis(array: NDArray[Any], model_input: ModelInput) -> bool:
    return model_input.shape is None or array.ndim <= len(model_input.shape)


def _part(array: NDArray[Any], model_input: ModelInput, start: int, size: int) -> NDArray[Any]:
    return array[start : start + size] if _has_batch_axis(array, model_input) else np.asarray(array[start])


def _from_path(path: Path, inputs: Sequence[ModelInput], batch_size: int) -> Batches:
    if not path.is_dir():
        yield from _from_file(path, inputs, batch_size)
        return
    for file in _files(path):
        for name, arrays in _without_names(file, _read(file), inputs):
            yield name, _by_name(arrays, inputs, name)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)


def _from_file(path: Path, inputs: Sequence[ModelInput], batch_size: int) -> Batches:
    for name, arrays in _without_names(path, _read(path), inputs):
        yield from _samples(_by_name(arrays, inputs, name), inputs, name, batch_size)


def _without_names(path: Path, arrays: Any, inputs: Sequence[ModelInput]) -> list[tuple[str, Any]]:
    """The contents of a file one by one: arrays of an .npz file that numpy has numbered (np.savez(path, *batches)), or all."""
    numbered = isinstance(arrays, dict) and bool(arrays) and all(key.startswith("arr_") for key in arrays)
    if numbered and len(inputs) == 1 and inputs[0].name not in arrays:
        return [(f"{path}: {key}", array) for key, array in arrays.items()]
    return [(str(path), arrays)]


def _read(path: Path) -> Any:
    """An array of an .npy file, a dict of those of an .npz file."""
    if not path.exists():
        raise FileNotFoundError(f"data: no such file: {path}")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"data: {path}: expected an .npy or .npz file, or a folder of them")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file, zipfile.ZipFile(file):
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return dict(archive)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds at files that are damaged
        raise ValueError(f"data: {path} cannot be read: {error}") from None


def _check(array: NDArray[Any], expected: ModelInput, name: str) -> None:
    if array.dtype != expected.dtype:
        raise TypeError(f"{name}: input {expected.name}: dtype {array.dtype}, the model takes {expected.dtype}")
    if expected.shape is not None:
        fits = len(array.shape) == len(expected.shape)
        fits = fits and all(b is None or a == b for a, b in zip(array.shape, expected.shape))
        if not fits or array.shape[:1] == (0,):
            axes = ", ".join("any" if size is None else str(size) for size in expected.shape)
            raise ValueError(f"{name}: input {expected.name}: shape {array.shape}, the model takes ({axes})")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "nan" if np.isnan(array).any() else "inf"
        raise ValueError(f"{name}: input {expected.name}: contains {kind}")
