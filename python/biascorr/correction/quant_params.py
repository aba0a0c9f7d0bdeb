"""`QuantParams`: how quantization is simulated."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from biascorr.arguments import checked_integer
from biascorr.graph.layer import Layer
from biascorr.quantization import QUANT_MODES, Quantization, fake_quantize
from biascorr.typing import QuantMode, RoundMode

ROUND_MODES: tuple[RoundMode, ...] = get_args(RoundMode)


@dataclass(frozen=True)
class QuantParams:
    """How the quantization of a float model is simulated.

    Parameters
    ----------
    quant_mode : "tf_enhanced" or "tf"
        How the range of weights is found; see :meth:`biascorr.Quantization.from_weights`.
    round_mode : "nearest" or "stochastic"
        How weights are rounded; see the `rng` of :func:`biascorr.fake_quantize`.
    use_cuda : bool
        Without effect: everything runs on the CPU.
    ops_to_ignore : iterable of str, optional
        Names of layers that stay float, weights and inputs.
    weight_bits : int
        Bits that the weights of layers are quantized to, 2 to 32.
    activation_bits : int, optional
        Bits that the inputs of layers are quantized to, 2 to 16, asymmetric, over the range that they have on calibration
        samples. None: they stay float.
    per_channel : bool
        A grid for each output channel of a layer's weights instead of one for all.
    symmetric : bool
        Whether 0 is in the middle of the weights' grids; else it may be anywhere on them.
    seed : int
        Of stochastic rounding, at least 0. A layer's rounding depends on the seed and on its name, not on other layers.

    Raises
    ------
    TypeError
        ops_to_ignore is a string, or has something else in it.
    ValueError
        Another parameter has a value that is not allowed.

    Examples
    --------
    >>> QuantParams("tf", ops_to_ignore=["head"], weight_bits=4, per_channel=True).ops_to_ignore
    ('head',)
    """

    quant_mode: QuantMode = "tf_enhanced"
    round_mode: RoundMode = "nearest"
    use_cuda: bool = True
    ops_to_ignore: Iterable[str] | None = None
    _: KW_ONLY
    weight_bits: int = 8
    activation_bits: int | None = None
    per_channel: bool = False
    symmetric: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_one_of("quant_mode", QUANT_MODES)
        self._check_one_of("round_mode", ROUND_MODES)
        for name in ("use_cuda", "per_channel", "symmetric"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected True or False")
        object.__setattr__(self, "ops_to_ignore", _names(self.ops_to_ignore))
        checked_integer("weight_bits", self.weight_bits, 2, 32)
        if self.activation_bits is not None:
            checked_integer("activation_bits", self.activation_bits, 2, 16)
        checked_integer("seed", self.seed, 0)

    def fake_quantized(self, layer: Layer) -> NDArray[Any]:
        """The weights of a layer as their quantized values stand for them, in their dtype and shape.

        Raises ValueError, naming the layer, where they are not finite.
        """
        try:
            weights = np.asarray(layer.weights)
            return (
                self._fake_quantized_per_channel(layer, weights) if self.per_channel else self._moved(weights, None, layer.name)
            )
        except ValueError as error:
            raise ValueError(f"layer {layer.name}: {error}") from None

    def _fake_quantized_per_channel(self, layer: Layer, weights: NDArray[Any]) -> NDArray[Any]:
        given, count = _channels_first(weights, layer)
        rows = given.reshape(count, given.size // max(count, 1))
        moved = np.empty(weights.shape, weights.dtype)
        view, _ = _channels_first(moved, layer)
        view[...] = self._moved(rows, 0, layer.name).reshape(given.shape)
        return moved

    def _moved(self, weights: NDArray[Any], axis: int | None, name: str) -> NDArray[Any]:
        quantization = Quantization.from_weights(
            weights, self.weight_bits, axis=axis, asymmetric=not self.symmetric, mode=self.quant_mode
        )
        stochastic = self.round_mode == "stochastic"
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())]) if stochastic else None
        return fake_quantize(weights, quantization, axis=-1 if axis is None else axis, rng=rng)

    def _check_one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name}: {value!r}, expected {' or '.join(map(repr, allowed))}")


def _names(names: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(names, (str, bytes)):
        raise TypeError(f"ops_to_ignore: {names!r}, expected a list of names")
    found = () if names is None else tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"ops_to_ignore: {name!r}, expected names")
    return found


def _channels_first(weights: NDArray[Any], layer: Layer) -> tuple[NDArray[Any], int]:
    """A view with the axes first that count output channels, and how many of these there are."""
    layout = layer.layout.translate(str.maketrans("CM", "GO"))
    if layout[0] == "I":  # I counts the input channels of all groups, O the output channels of one
        layout, weights = f"G{layout}", weights.reshape(layer.groups, -1, *weights.shape[1:])
    axes = [layout.index(letter) for letter in "GO" if letter in layout]
    return np.moveaxis(weights, axes, range(len(axes))), math.prod(weights.shape[axis] for axis in axes)
