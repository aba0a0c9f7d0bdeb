"""Rows of scaled channels: how far weights reach per channel, and weights times the factors of their channels."""

import functools

import numpy as np

from biascorr.channel_scale import channel_ranges, scaled_channels
from contractions import named, random_reals
from measure import Array, Row, Rows

SHAPES = [
    ("HWIO", (3, 3, 512, 512)),
    ("OIHW", (512, 512, 3, 3)),
    ("OIHW", (2048, 2048, 3, 3)),
    ("IO", (4096, 4096)),
    ("OI", (4096, 4096)),
]
SIDES = {"O": "output", "I": "input"}


def ranges() -> Rows:
    for layout, shape in SHAPES:
        for axis, side in SIDES.items():
            yield f"ranges {named(shape)} {layout} per {side}", functools.partial(range_row, layout, shape, axis)
            row = functools.partial(range_row, layout, shape, axis, with_factors=True)
            yield f"ranges {named(shape)} {layout} per {side}, factors", row


def scaled() -> Rows:
    for layout, shape in SHAPES:
        yield f"scaled {named(shape)} {layout}", functools.partial(scaled_row, layout, shape)


def small_scales() -> Rows:
    for layout, shape in (("HWIO", (3, 3, 16, 16)), ("OIHW", (16, 16, 3, 3))):
        for axis, side in SIDES.items():
            yield f"ranges {named(shape)} {layout} per {side}", functools.partial(range_row, layout, shape, axis, calls=1)
        yield f"scaled {named(shape)} {layout}", functools.partial(scaled_row, layout, shape, calls=1)


def along(layout: str, axis: str, factors: Array) -> Array:
    return factors.reshape([-1 if letter == axis else 1 for letter in layout])


def factors_of(count: int) -> Array:
    return np.linspace(0.5, 2.0, count)


def range_row(layout: str, shape: tuple[int, ...], axis: str, *, with_factors: bool = False, calls: int = 0) -> Row:
    weights = random_reals(shape)
    others = tuple(k for k, letter in enumerate(layout) if letter != axis)
    other = "I" if axis == "O" else "O"
    if not with_factors:
        return Row(
            lambda: channel_ranges(weights, layout, axis=axis),
            lambda: np.abs(weights).max(axis=others),
            {
                "abs, then max": lambda: np.abs(weights).max(axis=others),
                "max and min": lambda: np.maximum(weights.max(axis=others), -weights.min(axis=others)),
            },
            weights.nbytes,
            calls=calls,
        )
    factors = factors_of(shape[layout.index(other)])
    single = along(layout, other, factors).astype(np.float32)
    space = tuple(k for k, letter in enumerate(layout) if letter not in "OI")
    pair = "".join(letter for letter in layout if letter in "OI")
    reduced = along(pair, other, factors)

    def over_space_first() -> Array:
        reach = np.maximum(weights.max(axis=space), -weights.min(axis=space)) if space else np.abs(weights)
        return (reach * reduced.astype(np.float32)).max(axis=pair.index(other))

    return Row(
        lambda: channel_ranges(weights, layout, axis=axis, factors=factors),
        lambda: np.abs(weights * single).max(axis=others),
        {"scale, then abs, then max": lambda: np.abs(weights * single).max(axis=others), "over space first": over_space_first},
        weights.nbytes,
    )


def scaled_row(layout: str, shape: tuple[int, ...], calls: int = 0) -> Row:
    weights = random_reals(shape)
    outputs, inputs = (factors_of(shape[layout.index(axis)]) for axis in "OI")
    single = [along(layout, axis, factors).astype(np.float32) for axis, factors in (("O", outputs), ("I", inputs))]

    def in_place() -> Array:
        product = weights * single[0]
        return np.multiply(product, single[1], out=product)

    return Row(
        lambda: scaled_channels(weights, layout, output_factors=outputs, input_factors=inputs),
        lambda: weights * single[0] * single[1],
        {"in place": in_place, "product of factors": lambda: weights * (single[0] * single[1])},
        weights.nbytes,
        calls=calls,
    )
