"""The shift of a layer from the statistics that a batch normalization gives its input: no data, no forward pass.

    E[x][c]        of clip(x, low, high),  x ~ N(beta[c], gamma[c]^2)
    E[x][k, c]     = E[x][c] * (output positions at which tap k sees real input) / (output positions)

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2.1;
zero padding is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from biascorr.correction.methods import mean_shift
from biascorr.graph.batch_norms import ConvBnInfoType
from biascorr.graph.layer import Constant, Layer
from biascorr.statistics import TapMean, clipped_normal_mean


def analytical_shift(
    layer: Layer, weights: Constant, info: ConvBnInfoType, shape: Sequence[int | None] | None = None
) -> NDArray[np.float64]:
    """The shift of a quantized layer against the same layer with its float `weights`, (channels,) in real units.

    Parameters
    ----------
    layer : Layer
        Quantized.
    weights : ndarray or LazyArray
        Its float weights.
    info : ConvBnInfoType
        The batch normalization and activation before the layer in the float network.
    shape : sequence of int or None, optional
        Of the tensor that the layer reads, as far as it is known: the zeros that pad it are only counted where all its
        positions are.

    Raises
    ------
    ValueError
        There is no batch normalization before the layer, or an activation after it that is no Clip; it has another number of
        channels than the layer.
    """
    return mean_shift(layer, weights, expected_input(layer, info, shape))


def expected_input(layer: Layer, info: ConvBnInfoType, shape: Sequence[int | None] | None = None) -> NDArray[np.float64]:
    """The expected mean input of a layer, (C,), or (*K, C) where the padding counts; see :func:`analytical_shift`."""
    if info.input_bn is None:
        raise ValueError(f"layer {layer.name}: no batch normalization before it, expected one")
    bounds = info.in_activation_type.bounds
    if bounds is None:
        raise ValueError(f"layer {layer.name}: activation before it: {info.in_activation_type.name}, expected a Clip or none")
    mean = clipped_normal_mean(info.input_bn.beta, info.input_bn.gamma, *bounds)
    space = _space(layer, shape)
    if layer.window is None or space is None:
        return mean
    seen = TapMean(layer.window)
    seen.update(np.ones((1, 1, *space)))
    return np.asarray(seen.mean() * mean)


def _space(layer: Layer, shape: Sequence[int | None] | None) -> list[int] | None:
    """Sizes of all axes but batch and channels, where they are known."""
    if shape is None:
        return None
    sizes = [size for axis, size in enumerate(shape) if axis not in (0, layer.channel_axis % len(shape))]
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None
