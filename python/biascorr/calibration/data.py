"""Where calibration samples come from: arrays, files, folders, data sets, readers, any iterable of batches.

Whatever the source, batches come out one by one, checked against the inputs of the model.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from biascorr.arguments import checked_integer, function_from_name, is_function
from biascorr.calibration import remedies
from biascorr.calibration.batching import Batchings, assumed, assumed_axes, fixed_size
from biascorr.calibration.datasets import (
    ITERABLE,
    DataSet,
    Remedies,
    data_set_from,
    has_single_samples,
    is_tensor,
    leaves_of,
    stacked,
    without_nesting,
)
from biascorr.calibration.images import ImageRows, Images
from biascorr.calibration.remedies import ARRAYS, fits
from biascorr.calibration.slices import Slices, arrays_of_group, computed, is_sliceable
from biascorr.graph.network import Feeds, ModelInput
from biascorr.whole_file import kind_of


def resolved(data: Any, name: str = "data") -> Any:
    """What data is: where it is the text "module:function", and no path, what this function returns.

    Modules in the current folder are found too. Raises ValueError where there is no such function, or it returns
    None. What it raises is raised.

    Examples
    --------
    >>> resolved("math:flor")
    Traceback (most recent call last):
    ...
    ValueError: data: 'math:flor' cannot be found: module 'math' has no attribute 'flor'
    """
    if not isinstance(data, (str, PathLike)):
        return arrays_of_group(computed(data))
    text = os.fspath(data)
    if not isinstance(text, str) or not is_function(text) or Path(text).exists():
        return data
    found = function_from_name(text, name)()
    if found is None:
        raise ValueError(f"{name}: {text!r} returned None, expected samples")
    return arrays_of_group(computed(found))


def number_of_batches(
    data: Any, inputs: Sequence[ModelInput] = (), *, batch_size: int = 1, max_samples: int | None = None
) -> int | None:
    """How many batches the data gives, at most where their sizes are not known; None where nothing is before reading it."""
    data_set = data_set_from(data)
    if data_set is not None:
        return _number_in(data_set, inputs, batch_size, max_samples)
    if isinstance(data, Images):
        fixed = fixed_size(inputs, assumed_axes(inputs))
        return math.ceil(min(len(data), _whole(max_samples, fixed) or len(data)) / (fixed or batch_size))
    count = _number_of_elements(data)
    return count if count is None or max_samples is None else min(count, max_samples)


def _number_of_elements(data: Any) -> int | None:
    if isinstance(data, (str, PathLike)):
        path = Path(data)
        return len(_files(path)) if path.is_dir() else None
    try:
        return len(data) if isinstance(data, Sized) and not _has_samples(data) and not hasattr(data, "get_next") else None
    except TypeError:  # datasets whose class has a length although they have none themselves
        return None


def _has_samples(data: Any) -> bool:
    """Whether samples are along an axis of the data itself."""
    return isinstance(data, (np.ndarray, Mapping)) or is_tensor(data) or is_sliceable(data)


def _number_in(data: DataSet, inputs: Sequence[ModelInput], batch_size: int, most: int | None) -> int | None:
    are_single = False if data.are_batches else has_single_samples(data.spec, inputs)
    if are_single is False:
        return data.count if data.count is None or most is None else min(data.count, most)
    fixed = fixed_size(inputs, assumed_axes(inputs))
    limit = _whole(most, fixed)
    count = limit if data.is_infinite else data.count
    return None if are_single is None or count is None else math.ceil(min(count, limit or count) / (fixed or batch_size))


def check_amounts(batch_size: Any, max_samples: Any) -> None:
    """Raises ValueError where they are no integers of at least 1, or None for the latter."""
    checked_integer("batch_size", batch_size, 1)
    if max_samples is not None:
        checked_integer("max_samples", max_samples, 1, otherwise="None")


def check_end(data: Any, max_samples: int | None, name: str = "data") -> None:
    """Raises ValueError where the data never ends, and nothing else limits it."""
    data_set = data_set_from(data)
    if max_samples is None and data_set is not None and data_set.is_infinite:
        raise ValueError(f"{name}: an infinite data set, expected max_samples with it, or a part of it: {data_set.finite}")


def batches_from_data(
    data: Any,
    inputs: Sequence[ModelInput],
    *,
    name: str = "data",
    batch_size: int = 1,
    max_samples: int | None = None,
    batchings: Batchings | None = None,
) -> Limited:
    """Batches by input name, as the model takes them; in float32 what numpy has no type for, which holds all such values.

    Parameters
    ----------
    data : path, array, mapping, data set, reader or iterable
        See :func:`biascorr.correct`.
    inputs : sequence of ModelInput
        The inputs of the model, in the order of arrays that come without names.
    name : str
        The name that errors give the data.
    batch_size : int
        Samples of an array, of a file, or of a data set of single samples that make a batch, where the model does not fix that.
    max_samples : int, optional
        No more are read: the last batch is cut where it can be; where not, batches are read that hold so many at most, and one
        at least.
    batchings : callable, optional
        Tells how many samples a batch has and whether it can be cut; None: what is known without running the model.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    TypeError
        The data is of no kind above, or an array has another dtype than the input.
    ValueError
        A file cannot be read; names or shapes are not those of the inputs; an array has nan or inf.
    """
    data, known = resolved(data, name), assumed(inputs)
    return Limited(
        _named_batches(data, inputs, name, batch_size, max_samples),
        inputs,
        max_samples,
        batchings or (lambda _: known),
        number_of_batches(data, inputs, batch_size=batch_size),
        isinstance(data, (str, PathLike)) or _has_samples(data),
    )


Batches = Iterator[tuple[str, dict[str, Any], int | None]]
"""The name that errors give a batch, the batch, and how many samples it has, where the data says so.

Its arrays may be functions that read them: who only looks whether there is another batch reads nothing.
"""


class Limited:
    """Checked batches of so many samples at most.

    Parameters
    ----------
    batches : iterator
        All of them.
    inputs : sequence of ModelInput
        The inputs of the model.
    most : int or None
        See :func:`batches_from_data`.
    batchings : callable
        See :func:`batches_from_data`.
    count : int or None
        How many batches there are, as far as is known.
    is_lasting : bool
        Whether it costs nothing to see if there is another one.

    Attributes
    ----------
    size : int
        Samples of the last batch.
    left_any : bool
        Whether there was more, as far as is known, when the limit was reached.
    """

    def __init__(
        self,
        batches: Batches,
        inputs: Sequence[ModelInput],
        most: int | None,
        batchings: Batchings,
        count: int | None,
        is_lasting: bool,
    ) -> None:
        self._batches = batches
        self._inputs = inputs
        self._most = most
        self._batchings = batchings
        self._count = count
        self._is_lasting = is_lasting
        self.size = 0
        self.left_any = False

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        left = math.inf if self._most is None else self._most
        for done, (label, batch, known) in enumerate(self._batches, start=1):
            feeds = {each.name: _fitting(_read_now(batch[each.name]), each, label) for each in self._inputs}
            batching = self._batchings(feeds)
            size = known or batching.size(feeds)
            if size == 0:
                first = self._inputs[0].name
                raise ValueError(f"{label}: input {first}: shape {feeds[first].shape} has no samples")
            is_cut = size > left and batching.can_be_cut
            self.size = int(left) if is_cut else size
            feeds = dict(batching.rows(feeds, np.s_[: self.size])) if is_cut else feeds
            _check_finite(feeds, label)
            yield feeds
            del batch, feeds  # before the next ones are read
            left -= size
            if left < (1 if batching.can_be_cut else size):
                self.left_any = is_cut or self._has_more(done)
                return

    def _has_more(self, done: int) -> bool:
        """Whether there may be another batch; it is not read where that may take long."""
        if self._is_lasting:
            return next(self._batches, None) is not None
        return self._count is None or done < self._count


def _read_now(array: Any) -> NDArray[Any]:
    return array() if isinstance(array, functools.partial) else array  # type: ignore[no-any-return]


def _named_batches(data: Any, inputs: Sequence[ModelInput], name: str, batch_size: int, most: int | None) -> Batches:
    data_set = data_set_from(data)
    if isinstance(data, (str, PathLike)):
        yield from _from_path(Path(data), inputs, name, batch_size)
    elif isinstance(data, Images):
        rows = data.read(_only_input(inputs, name), most=_whole(most, fixed_size(inputs, assumed_axes(inputs))), name=name)
        yield from _samples({inputs[0].name: rows}, inputs, name, batch_size)
    elif _has_samples(data):
        yield from _samples(_by_name(data, inputs, name), inputs, name, batch_size)
    elif isinstance(data, tuple) and len(data) == len(inputs) + 1 and _ends_with_labels(data):
        kept = "data[0]" if len(inputs) == 1 else "[data[:-1]]"
        raise ValueError(f"{name}: inputs and what looks like labels; drop labels, e.g. {kept}")
    elif data_set is not None:
        yield from _from_data_set(data_set, inputs, name, batch_size, most)
    elif isinstance(data, Iterable) and not isinstance(data, (bytes, bytearray)):
        yield from _each(data, inputs, name)
    elif hasattr(data, "get_next"):
        yield from _each(iter(data.get_next, None), inputs, name)
    else:
        call = ": call it, and give what it returns" if callable(data) else ""
        raise TypeError(f"{name}: {type(data).__name__}, expected an array, a mapping, an iterable of batches or a path{call}")


def _only_input(inputs: Sequence[ModelInput], name: str) -> ModelInput:
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs)
        raise ValueError(
            f"{name}: images, the model has {len(inputs)} inputs ({names}); give batches, mappings with all of them"
        )
    return inputs[0]


def _whole(most: int | None, size: int) -> int | None:
    """Samples that are read, at most so many: in whole batches of this size, and in one at least; 0: of any size."""
    return most if most is None or not size else max(size, most // size * size)


def _ends_with_labels(arrays: tuple[Any, ...]) -> bool:
    """Whether the last one has a number for each sample, where the first has more."""
    return all(isinstance(each, np.ndarray) for each in arrays) and arrays[-1].ndim <= 1 < arrays[0].ndim


def _each(batches: Iterable[Any], inputs: Sequence[ModelInput], name: str, remedies: Remedies = ITERABLE) -> Batches:
    for k, batch in enumerate(batches):
        label = f"{name}[{k}]"
        yield label, _whole_arrays(_by_name(batch, inputs, label, remedies)), None


def _from_data_set(data: DataSet, inputs: Sequence[ModelInput], name: str, batch_size: int, most: int | None) -> Batches:
    elements = iter(data.elements)
    first = list(itertools.islice(elements, 1))
    elements = itertools.chain(first, elements)
    if first and not data.are_batches and has_single_samples(first[0], inputs):
        yield from _grouped(elements, inputs, name, batch_size, most, data.of_samples)
    else:
        yield from _each(elements, inputs, name, data.of_batches)


def _grouped(
    elements: Iterable[Any], inputs: Sequence[ModelInput], name: str, batch_size: int, most: int | None, remedies: Remedies
) -> Batches:
    """Single samples in batches of the size that the model takes, or else of this one."""
    axes = {name: axis or 0 for name, axis in assumed_axes(inputs).items()}
    fixed = fixed_size(inputs, axes)
    size = fixed or batch_size
    alone = [replace(each, shape=each.shape and _without(each.shape, axes[each.name])) for each in inputs]
    elements = itertools.islice(elements, _whole(most, fixed))
    named = (_whole_arrays(_by_name(element, alone, f"{name}[{k}]", remedies)) for k, element in enumerate(elements))
    copies = ({key: array.copy() for key, array in sample.items()} for sample in named)  # a loader may fill them again
    for start in itertools.count(0, size):
        samples = list(itertools.islice(copies, size))
        if not samples:
            return
        if fixed and len(samples) < size:
            raise _no_multiple(name, start + len(samples), size)
        label = _label(name, start, start + len(samples))
        parts = {key: [sample[key] for sample in samples] for key in axes}
        yield label, {key: stacked(parts[key], f"{label}: input {key}", axis) for key, axis in axes.items()}, None


def _without(shape: tuple[int | None, ...], axis: int) -> tuple[int | None, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _label(name: str, start: int, stop: int) -> str:
    return f"{name}[{start}]" if stop == start + 1 else f"{name}[{start}:{stop}]"


def _by_name(batch: Any, inputs: Sequence[ModelInput], name: str, remedies: Remedies = ITERABLE) -> dict[str, Any]:
    names = [each.name for each in inputs]
    batch = without_nesting(computed(batch), inputs)
    if not isinstance(batch, Mapping):
        arrays = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if len(arrays) > 1 and (isinstance(arrays[0], Mapping) or _are_inputs(arrays[0], inputs)):
            raise ValueError(f"{name}: inputs and {len(arrays) - 1} more; drop labels, e.g. {_without_labels(1, remedies)}")
        if len(arrays) != len(inputs):
            before = _number_before(arrays, inputs)
            hint = f"; drop labels, e.g. {_without_labels(len(inputs), remedies, before)}" if len(arrays) > len(inputs) else ""
            raise ValueError(f"{name}: {len(arrays)} arrays, the model has {len(inputs)} inputs ({', '.join(names)}){hint}")
        batch = dict(zip(names, arrays))
    if set(batch) != set(names):
        found = ", ".join(map(str, batch)) or "nothing"
        more = set(names) < set(batch)
        chosen = "{" + ", ".join(f"{key!r}: batch[{key!r}]" for key in names) + "}"
        hint = f"; drop labels and all else, e.g. {remedies.others.format(chosen=chosen)}" if more else ""
        raise ValueError(f"{name}: has {found}, the model's inputs are {', '.join(names)}{hint}")
    return {key: _array(batch[key], f"{name}: input {key}") for key in names}


def _whole_arrays(batch: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return {key: array.whole() if isinstance(array, (Slices, _Rows)) else array for key, array in batch.items()}


def _without_labels(count: int, remedies: Remedies, before: int = 0) -> str:
    """How so many members of each batch are had without the others, of which so many come before them."""
    labels = [f"label{k or ''}" for k in range(before)]
    taken = [f"x{k}" for k in range(count)] if count > 1 else ["x"]
    given = ", ".join(taken)
    index = before if count == 1 else f"{before or ''}:{before + count}"
    return remedies.labels.format(given=given if count == 1 else f"({given})", taken=", ".join([*labels, *taken]), index=index)


def _number_before(arrays: Sequence[Any], inputs: Sequence[ModelInput]) -> int:
    """How many arrays come before the first ones of the shapes of the inputs; 0 where none have these."""
    starts = range(len(arrays) - len(inputs) + 1)
    return next((start for start in starts if all(map(_has_shape, arrays[start:], inputs))), 0)


def _has_shape(array: Any, model_input: ModelInput) -> bool:
    """Whether a tensor has the shape of an input, or one without or with an axis of samples."""
    if model_input.shape is None:
        return True
    found = tuple(getattr(array, "shape", ()))
    return any(
        len(found) == len(expected) and all(size in (None, length) for size, length in zip(expected, found))
        for expected in (model_input.shape, model_input.shape[1:], (None, *model_input.shape))
    )


def _are_inputs(value: Any, inputs: Sequence[ModelInput]) -> bool:
    """Whether a value is a tuple or list with one array for each input, where an input takes no such thing."""
    if not isinstance(value, (tuple, list)):
        return False
    arrays = value if len(value) == len(inputs) else leaves_of(value)
    return len(arrays) == len(inputs) and all(hasattr(each, "shape") or np.ndim(each) > 0 for each in arrays)


def _array(values: Any, name: str) -> Any:
    """Tensors of TensorFlow and torch among others; the latter may be on another device or part of a gradient."""
    values = computed(values)
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array, expected one whose elements all count (its .data or .filled())")
    if hasattr(values, "row_splits"):
        raise TypeError(f"{name}: a ragged tensor, expected one whose rows have one length, e.g. x.to_tensor()")
    if hasattr(values, "dense_shape"):
        raise TypeError(f"{name}: a sparse tensor, expected a dense one, e.g. tf.sparse.to_dense(x)")
    if is_sliceable(values):
        return Slices(values, name)
    if isinstance(values, (np.ndarray, _Rows, ImageRows)):
        return values
    if isinstance(values, Images):
        raise TypeError(f"{name}: images in a mapping, which are only read on their own, for a model with one input")
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    if hasattr(values, "numpy"):
        return np.asarray(values.numpy())
    try:
        return np.asarray(values).copy()  # what is no array may fill the same memory again
    except ValueError as error:
        raise ValueError(f"{name}: no array: {error}") from None


def _no_multiple(name: str, count: int, size: int) -> ValueError:
    whole = count // size * size
    remedy = f"leave out {count - whole}, e.g. by max_samples={whole} (--max-samples)" if whole else f"give {size} at least"
    return ValueError(f"{name}: {count} samples, the model takes a multiple of {size}; {remedy}")


def _samples(arrays: dict[str, Any], inputs: Sequence[ModelInput], name: str, batch_size: int) -> Batches:
    """Arrays that hold samples, in batches of the size that the model takes, or else of this one; whole what these share.

    Samples are along the axis that the model has for them, or along the first one where arrays have an axis more.
    """
    assumed = assumed_axes(inputs)
    axes = {each.name: _axis_of_samples(arrays[each.name], each, assumed[each.name]) for each in inputs}
    counts = {key: _length(arrays[key], axis) for key, axis in axes.items() if axis is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{name}: inputs have different numbers of samples: {counts}")
    batched = [each for each in inputs if each.name in counts and _has_rank(arrays[each.name], each)]
    fixed = fixed_size(batched, axes)
    size = fixed or (batch_size if len(batched) == len(counts) else 1)
    count = next(iter(counts.values()), 1)
    for start in range(0, count, size):
        stop = min(start + size, count)
        if fixed and stop < start + size:
            raise _no_multiple(name, count, size)
        label = f"{name}[{start}]" if size == 1 else f"{name}[{start}:{stop}]"
        parts = {each.name: _part(arrays[each.name], each, axes[each.name], start, stop) for each in inputs}
        yield label, parts, None if len(batched) == len(counts) else 1


def _axis_of_samples(array: Any, model_input: ModelInput, axis: int | None) -> int | None:
    """The axis along which an array is cut; None: not at all."""
    if not _has_rank(array, model_input):
        return 0
    is_shared = axis is None and model_input.shape is not None and fits(array.shape, model_input.shape)
    return None if is_shared else axis or 0


def _length(array: Any, axis: int) -> int:
    return array.shape[axis] if axis < array.ndim else 0


def _has_rank(array: Any, model_input: ModelInput) -> bool:
    return model_input.shape is None or array.ndim <= len(model_input.shape)


def _part(array: Any, model_input: ModelInput, axis: int | None, start: int, stop: int) -> Any:
    """A batch of an array, or what reads it; one sample without its axis where the input has none for it."""
    if isinstance(array, (Slices, _Rows)):
        is_one = axis is not None and not _has_rank(array, model_input)
        return functools.partial(_read_part, array, axis, start, stop, is_one)
    if axis is None:
        return np.asarray(array[:] if array.ndim else array)
    if axis:
        return np.ascontiguousarray(np.asarray(array[:])[(np.s_[:],) * axis + (np.s_[start:stop],)])
    return np.asarray(array[start:stop] if _has_rank(array, model_input) else array[start])


def _read_part(array: Slices | _Rows, axis: int | None, start: int, stop: int, is_one: bool) -> NDArray[Any]:
    if axis is None:
        return array.whole()
    part = array.read(axis, start, stop)
    return part[0] if is_one else part


def _from_path(path: Path, inputs: Sequence[ModelInput], name: str, batch_size: int) -> Batches:
    if not path.is_dir():
        yield from _from_file(path, inputs, name, batch_size)
        return
    for file in _files(path, name):
        for label, arrays in _without_names(file, _read(file, name), inputs):
            found = _by_name(arrays, inputs, label)
            later = {key: functools.partial(array.whole) for key, array in found.items() if isinstance(array, _Rows)}
            yield label, {**found, **later}, None


def _files(folder: Path, name: str = "data") -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in ARRAYS)
    if not files:
        raise ValueError(f"{name}: {folder}: there is no .npy or .npz file in this folder{remedies.of_folder(folder)}")
    return files


def _from_file(path: Path, inputs: Sequence[ModelInput], name: str, batch_size: int) -> Batches:
    for label, arrays in _without_names(path, _read(path, name), inputs):
        yield from _samples(_by_name(arrays, inputs, label), inputs, label, batch_size)


def _without_names(path: Path, arrays: Any, inputs: Sequence[ModelInput]) -> list[tuple[str, Any]]:
    """The contents of a file one by one: arrays of an .npz file that numpy has numbered (np.savez(path, *batches)), or all."""
    numbered = isinstance(arrays, dict) and bool(arrays) and all(key.startswith("arr_") for key in arrays)
    if numbered and len(inputs) == 1 and inputs[0].name not in arrays:
        return [(f"{path}: {key}", array) for key, array in arrays.items()]
    return [(str(path), arrays)]


def _read(path: Path, name: str) -> Any:
    """The rows of an .npy file, a dict of the arrays of an .npz file."""
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    if path.suffix not in ARRAYS:
        raise ValueError(f"{name}: {path}: expected an .npy or .npz file, or a folder of them{remedies.of_file(path)}")
    if not path.is_file():
        raise OSError(f"{name}: {path}: {kind_of(path)}")
    try:
        if path.suffix == ".npy":
            return _Rows.of(path)
        with path.open("rb") as file, zipfile.ZipFile(file) as members:
            for entry in members.infolist():
                with members.open(entry) as member:
                    is_array = member.read(len(_MAGIC)) == _MAGIC
                    member.seek(0)
                    if is_array:
                        _header(member, entry.file_size)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return dict(archive)
    except PermissionError:
        raise
    except MemoryError as error:
        raise MemoryError(f"{name}: {path}: {error}") from None
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds at files that are damaged
        raise ValueError(f"{name}: {path} cannot be read: {error}") from None


_MAGIC = np.lib.format.MAGIC_PREFIX


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape of the array in an .npy file of so many bytes, whether it is in Fortran order, and its dtype.

    Raises ValueError where it has other sizes: memory for it would be taken before it is read.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if any(length < 0 for length in shape):
        raise ValueError(f"an array of shape {shape}")
    missing = file.tell() + math.prod(shape) * dtype.itemsize - size
    if missing > 0 and not dtype.hasobject:
        raise ValueError(f"{missing} bytes are missing")
    return shape, is_fortran, dtype


class _Rows:
    """An array in an .npy file, read row by row: mapped into memory, it would end the process if the file were cut meanwhile.

    Parameters
    ----------
    path : Path
        The file.
    shape, dtype
        Of the array, in C order.
    offset : int
        Where its values start in the file.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self._path, self._offset = path, offset

    @classmethod
    def of(cls, path: Path) -> _Rows | NDArray[Any]:
        """The rows of a file; all of it at once where they do not follow each other."""
        with path.open("rb") as file:
            shape, is_fortran, dtype = _header(file, path.stat().st_size)
            if is_fortran or not shape or dtype.hasobject or not dtype.itemsize:
                file.seek(0)
                whole: NDArray[Any] = np.load(file, allow_pickle=False)
                return whole
            return cls(path, shape, dtype, file.tell())

    def whole(self) -> NDArray[Any]:
        """All of them."""
        return self.read(0, 0, self.shape[0])

    def read(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """A part along an axis: as many stretches of the file as there are steps of the axes before that."""
        array = np.empty((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), self.dtype)
        row = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        if not array.size:
            return array
        stretches = array.reshape(math.prod(self.shape[:axis]), -1).view(np.uint8)
        with self._path.open("rb") as file:
            for k, stretch in enumerate(stretches):
                file.seek(self._offset + (k * self.shape[axis] + start) * row)
                if file.readinto(stretch.data) < stretch.nbytes:
                    raise ValueError(f"data: {self._path}: changed while it was read")
        return array


def _fitting(array: NDArray[Any], expected: ModelInput, name: str) -> NDArray[Any]:
    label = f"{name}: input {expected.name}"
    if array.dtype != expected.dtype:
        raise TypeError(f"{label}: dtype {array.dtype}, the model takes {expected.dtype}; {remedies.of_dtype(array, expected)}")
    if expected.shape is not None and not fits(array.shape, expected.shape):
        axes = ", ".join("any" if size is None else str(size) for size in expected.shape)
        raise ValueError(
            f"{label}: shape {array.shape}, the model takes ({axes}){remedies.of_shape(array.shape, expected.shape)}"
        )
    return array.astype(np.float32) if array.dtype.isbuiltin == 2 else array


def _check_finite(feeds: Feeds, name: str) -> None:
    for key, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: input {key}: contains {'nan' if np.isnan(array).any() else 'inf'}")
