"""Which input of a model takes what an input of another one takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from biascorr.graph.network import ModelInput


def paired_inputs(expected: Sequence[ModelInput], found: Sequence[ModelInput], label: str) -> dict[str, ModelInput]:
    """The input of a model for each one of the reference, by the name of the latter: of the same name, or else in order.

    Raises ValueError, which starts with the label, where the model cannot take what the reference takes.
    """
    by_name = {each.name: each for each in found}
    if len(found) != len(expected):
        listed = [", ".join(each.name for each in inputs) or "nothing" for inputs in (found, expected)]
        raise ValueError(f"{label}: takes {listed[0]}, expected the inputs of the reference: {listed[1]}")
    is_named = by_name.keys() == {each.name for each in expected}
    pairs = {each.name: by_name[each.name] if is_named else other for each, other in zip(expected, found)}
    for each in expected:
        _check(each, pairs[each.name], label)
    return pairs


def merged_inputs(expected: Sequence[ModelInput], others: Mapping[str, Mapping[str, ModelInput]]) -> list[ModelInput]:
    """The inputs of the reference with the sizes that other models, by their labels, insist on.

    Raises ValueError, which starts with the label, where one insists on other sizes than those before it.
    """
    merged = list(expected)
    for label, pairs in others.items():
        for each in merged:
            found = pairs[each.name]
            if not _fit(each.shape, found.shape):
                raise ValueError(
                    f"{label}: input {found.name} takes {text_of_shape(found.shape)}, other models "
                    f"{text_of_shape(each.shape)}; compare them one by one"
                )
        merged = [replace(each, shape=_merged(each.shape, pairs[each.name].shape)) for each in merged]
    return merged


def _merged(shape: tuple[int | None, ...] | None, other: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
    if shape is None or other is None:
        return shape if other is None else other
    return tuple(theirs if ours is None else ours for ours, theirs in zip(shape, other))


def _check(expected: ModelInput, found: ModelInput, label: str) -> None:
    if found.dtype != expected.dtype:
        raise ValueError(f"{label}: input {found.name} takes {found.dtype}, expected {expected.dtype} as of the reference")
    if not _fit(expected.shape, found.shape):
        raise ValueError(
            f"{label}: input {found.name} takes {text_of_shape(found.shape)}, expected {text_of_shape(expected.shape)} as of "
            f"the reference{_hint(expected.shape, found.shape)}"
        )


def _hint(expected: tuple[int | None, ...] | None, found: tuple[int | None, ...] | None) -> str:
    if expected is None or found is None or not are_transposed(expected, found):
        return ""
    order = ("first", "last") if _fit(_channels_last(expected), found) else ("last", "first")
    return (
        f": channels are {order[1]} there, {order[0]} in the reference; compare models of one layout, each quantized one with "
        "the float model of its own framework"
    )


def are_transposed(one: Sequence[int | None], other: Sequence[int | None]) -> bool:
    """Whether two shapes differ in where channels are: after the batch in one, last in the other."""
    first, second = tuple(one), tuple(other)
    is_alike = len(first) == len(second) >= 3 and not _fit(first, second)
    return is_alike and (_fit(_channels_last(first), second) or _fit(_channels_last(second), first))


def _channels_last(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return (shape[0], *shape[2:], shape[1])


def _fit(one: tuple[int | None, ...] | None, other: tuple[int | None, ...] | None) -> bool:
    """Whether an array can have both shapes."""
    if one is None or other is None:
        return True
    return len(one) == len(other) and all(None in (a, b) or a == b for a, b in zip(one, other))


def text_of_shape(shape: Sequence[int | str | None] | None) -> str:
    """A shape with ? for axes of any size."""
    if shape is None:
        return "any shape"
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"
