"""Data sets of TensorFlow, Keras and torch, known by what they have: no framework is imported for them.

Also the structures that their elements are: tuples, lists and mappings of tensors, one inside the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.slices import is_sliceable
from biascorr.graph.network import ModelInput

_INFINITE = -1
"""The cardinality of a tf.data.Dataset that never ends; one that is not known is below."""


@dataclass(frozen=True)
class Remedies:
    """How to drop what is no input, as templates.

    Parameters
    ----------
    labels : str
        Of tuples: `taken` are the names of the inputs, `given` is what they become, `index` is where they are.
    others : str
        Of mappings, of which the `chosen` part is to stay.
    """

    labels: str = "({given} for {taken}, *labels in data)"
    others: str = "{chosen}"


ITERABLE = Remedies()
_TF_DATA = Remedies("data.map(lambda {taken}, *labels: {given})", "data.map(lambda batch: {chosen})")
_BATCHES_BY_INDEX = Remedies("(data[k][{index}] for k in range(len(data)))")
_SAMPLES_BY_INDEX = Remedies("({given} for {taken}, *labels in torch.utils.data.DataLoader(data, batch_size=32))")


@dataclass(frozen=True)
class DataSet:
    """A data set of batches, or of single samples.

    Parameters
    ----------
    elements : iterable
        Its elements, from the first.
    count : int or None
        How many there are; None where that is not known, or where there is no end.
    is_infinite : bool
        Whether there is no end.
    finite : str
        An expression for a part of it, for errors.
    of_batches, of_samples : Remedies
        What to do about labels.
    are_batches : bool
        Whether its elements are batches in any case.
    spec : structure of objects with a shape, optional
        What an element is like, as far as that is known before one is read.
    """

    elements: Iterable[Any]
    count: int | None
    is_infinite: bool
    finite: str
    of_batches: Remedies
    of_samples: Remedies
    are_batches: bool = False
    spec: Any = None


def data_set_from(data: Any) -> DataSet | None:
    """The data set that an object is: a tf.data.Dataset, a keras.utils.PyDataset, a torch Dataset; None for others."""
    if is_sliceable(data):
        return None
    if hasattr(data, "element_spec") and hasattr(data, "cardinality"):
        count = int(data.cardinality())
        known = count if count >= 0 else None
        spec = data.element_spec
        return DataSet(data, known, count == _INFINITE, "data.take(n)", _TF_DATA, _TF_DATA, spec=spec)
    is_py_dataset = hasattr(type(data), "num_batches")  # has no iterator, or one that may not end
    if hasattr(type(data), "__getitem__") and (is_py_dataset or (isinstance(data, Sized) and not isinstance(data, Iterable))):
        known = _length(data)
        elements = map(data.__getitem__, itertools.count() if known is None else range(known))
        part = "(data[k] for k in range(n))"
        return DataSet(elements, known, known is None, part, _BATCHES_BY_INDEX, _SAMPLES_BY_INDEX, are_batches=is_py_dataset)
    return None


def _length(data: Any) -> int | None:
    """None where there is no end."""
    try:
        count = data.num_batches if hasattr(type(data), "num_batches") else len(data)
    except (NotImplementedError, TypeError):
        return None
    return None if count is None or count == math.inf else int(count)


def is_tensor(data: Any) -> bool:
    """Whether an object is a tensor of another framework, dense or not."""
    return hasattr(data, "shape") and (hasattr(data, "numpy") or hasattr(data, "dense_shape"))


def has_single_samples(element: Any, inputs: Sequence[ModelInput]) -> bool | None:
    """Whether an element, or its spec, has one axis less than the inputs; None where that is not known."""
    first = element[0] if isinstance(element, (tuple, list)) and element else element
    members = [first[each.name] for each in inputs] if has_names(first, inputs, more=True) else leaves_of(element)
    known = [(_rank(member), len(each.shape)) for member, each in zip(members, inputs) if each.shape is not None]
    if not known or any(rank is None for rank, _ in known):
        return None
    return all(rank == expected - 1 for rank, expected in known)


def has_names(value: Any, inputs: Sequence[ModelInput], *, more: bool = False) -> bool:
    """Whether a value is a mapping with the names of the inputs, and with no more unless that is allowed."""
    names = {each.name for each in inputs}
    return isinstance(value, Mapping) and (names <= set(value) if more else names == set(value))


def _rank(value: Any) -> int | None:
    shape = getattr(value, "shape", () if isinstance(value, (int, float)) else None)
    if shape is None:
        return None
    return shape.rank if hasattr(shape, "rank") else len(shape)


def leaves_of(value: Any) -> list[Any]:
    """The tensors of a structure, those of mappings in the order of their keys, as TensorFlow and Keras flatten it."""
    return [leaf for member in members_of(value) for leaf in leaves_of(member)] if _is_structure(value) else [value]


def members_of(value: Any) -> list[Any]:
    """What a structure consists of; the value itself where it is none."""
    if isinstance(value, Mapping):
        return [value[key] for key in sorted(value, key=str)]
    return [*value] if isinstance(value, (tuple, list)) else [value]


def _is_structure(value: Any) -> bool:
    """Whether a value holds tensors; lists of numbers are tensors themselves."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (tuple, list)) and all(
        each is None or hasattr(each, "shape") or _is_structure(each) for each in value
    )


def without_nesting(batch: Any, inputs: Sequence[ModelInput]) -> Any:
    """A structure with as many tensors as inputs as a list of these; others, and mappings by input name, as they are."""
    members = members_of(batch)
    while not has_names(batch, inputs) and len(members) == 1 and isinstance(members[0], (tuple, Mapping)):
        batch = members[0]
        members = members_of(batch)
    if has_names(batch, inputs) or not _is_structure(batch) or not any(map(_is_structure, members)):
        return batch
    leaves = leaves_of(batch)
    is_nested = len(members) != len(inputs) or any(isinstance(each, (tuple, Mapping)) for each in members)
    return leaves if is_nested and len(leaves) == len(inputs) else batch


def stacked(samples: Sequence[Any], name: str, axis: int = 0) -> NDArray[Any]:
    """Single samples as a batch, along an axis of it."""
    shapes = list(dict.fromkeys(sample.shape for sample in samples))
    if len(shapes) > 1:
        raise ValueError(f"{name}: samples of shapes {shapes[0]} and {shapes[1]} make no batch; batch_size=1 takes each alone")
    return np.stack(samples, axis)
