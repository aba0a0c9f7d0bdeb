"""Where channels lie in a tensor, and what happens to them on the way from one layer to the next.

An axis may be counted from either end. Where the rank of a tensor is not known, an axis counted from its start cannot be
compared with one counted from its end, and channels are taken to be somewhere else.

    channels first:  (N, C, H, W) -> flatten -> (N, C*H*W)    each channel becomes H*W neighbours   np.repeat
    channels last:   (N, H, W, C) -> flatten -> (N, H*W*C)    all channels are repeated H*W times   np.tile
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


def aligned(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """One value for each channel, (C,), as it broadcasts to a tensor with its channels along an axis counted from the end."""
    return values.reshape(-1, *[1] * (-1 - axis))


def is_same_axis(one: int, other: int, rank: int | None) -> bool:
    """Whether two axes of a tensor are the same, each counted from either end; False where that is not known."""
    return one == other or (rank is not None and rank > 0 and one % rank == other % rank)


class Order(enum.Enum):
    """How the channels of a layer are laid out along an axis that is longer than there are channels."""

    REPEATED = enum.auto()
    """c0 c0 c0 c1 c1 c1"""
    TILED = enum.auto()
    """c0 c1 c0 c1 c0 c1"""


@dataclass(frozen=True)
class Channels:
    """Where the output channels of a layer lie in a tensor after it.

    Parameters
    ----------
    axis : int
        Counted from either end.
    rank : int or None
        Of the tensor, where it is known.
    order : Order
        How they are laid out where the axis is longer than there are channels.
    """

    axis: int
    rank: int | None
    order: Order = Order.REPEATED

    def is_along(self, axis: int) -> bool:
        """Whether they lie along this axis of the tensor."""
        return is_same_axis(self.axis, axis, self.rank)

    def moved(self, axis: int, rank: int | None, order: Order | None) -> Channels:
        """After an operation that gives them out along another axis."""
        return replace(self, axis=axis, rank=rank, order=order or self.order)

    def spread(self, values: NDArray[Any], size: int) -> NDArray[Any]:
        """One value for each channel, (C,), as one for each of `size` elements along the axis."""
        times = size // len(values)
        return np.repeat(values, times) if self.order is Order.REPEATED else np.tile(values, times)

    def gathered(self, values: NDArray[Any], count: int) -> NDArray[Any]:
        """Values of elements along the axis, (size,), as one row for each of `count` channels."""
        return values.reshape(count, -1) if self.order is Order.REPEATED else values.reshape(-1, count).T
