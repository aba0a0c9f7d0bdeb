"""Corrections of a layer's bias, which cancel the shift of its quantized weights.

    shift[g,o] = sum over s,i of (W - Wq)[s,i,g,o] * E[x][g,i]          added to the bias, before the bias is quantized

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascorr import _kernels, reference
from biascorr.arguments import checked_groups
from biascorr.quantization import Quantization, check_channels, fake_quantize, weight_grids
from biascorr.statistics import clipped_normal_mean

_LAYOUT_OF_RANK = {2: "IO", 3: "WIO", 4: "HWIO", 5: "HWIGO", 6: "DHWIGO"}
_INTEGERS = "iub"
_BOUNDS = {None: (-np.inf, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0)}


class BiasCorrector(abc.ABC):
    """Computes the correction of one layer's bias. Subclasses take what they need in their constructor."""

    @abc.abstractmethod
    def calculate(self, weights: Any, fake_quantized_weights: Any) -> NDArray[Any] | None:
        """The value to add to the layer's bias before the bias is quantized; None leaves the bias alone.

        Parameters
        ----------
        weights : ndarray
            The layer's weights, in real units.
        fake_quantized_weights : ndarray
            The same weights quantized, then dequantized; the same shape.

        Returns
        -------
        ndarray, (output channels,), or None
        """


class NullBiasCorrector(BiasCorrector):
    """Leaves every bias alone."""

    def __repr__(self) -> str:
        return "NullBiasCorrector()"

    def calculate(self, weights: Any, fake_quantized_weights: Any) -> None:  # noqa: ARG002
        """None."""
        return


class MeanBiasCorrector(BiasCorrector):
    """Corrects by the mean of the layer's input: correction[g*O+o] = sum over s,i of (W - Wq)[s,i,g,o] * mean[g*I+i].

    Parameters
    ----------
    input_mean : array_like, (I*G,) or (*K, I*G)
        Mean of the layer's input in real units: per channel (:func:`~biascorr.prepare_input_mean`), or per kernel tap and
        channel, which is exact under padding. It is copied.
    groups : int
        How many groups the O axis counts, as TensorFlow, ONNX and torch store grouped convolutions. In a layout that starts
        with I (transposed convolution, e.g. "IOHW") the I axis counts them. In a layout with an axis C they may be left out, or
        be its length.
    layout : str, optional
        Names the axes of the weights, each letter once: O or M output channels, I input channels, G or C groups, D, H, W
        space. "OIHW" is ONNX and torch, "IOHW" transposed, "OI" a torch linear layer, "HWCM" Keras depthwise. By default it
        follows the rank of the weights: 2 IO, 3 WIO, 4 HWIO, 5 HWIGO, 6 DHWIGO.

    Raises
    ------
    TypeError
        The mean is not of real numbers.
    ValueError
        The mean has no axis; groups < 1.

    Examples
    --------
    >>> weights = np.array([[0.1, 0.2], [0.3, 0.4]])
    >>> quantized = np.array([[0.0, 0.25], [0.25, 0.5]])
    >>> MeanBiasCorrector([1.0, 2.0]).calculate(weights, quantized)
    array([ 0.2 , -0.25])
    """

    def __init__(self, input_mean: ArrayLike, *, groups: int = 1, layout: str | None = None) -> None:
        mean = reference.native(input_mean, "input_mean")
        if mean.ndim == 0:
            raise ValueError("input_mean: 0-dimensional, expected (input channels,) or (*taps, input channels)")
        groups = checked_groups(groups)
        if layout is not None and not isinstance(layout, str):
            raise TypeError(f"layout: {type(layout).__name__}, expected a string of axes")
        self._mean = np.array(mean, dtype=np.float64, order="C")
        self._groups = groups
        self._layout = layout

    def __repr__(self) -> str:
        options = f", groups={self._groups}" * (self._groups != 1) + f", layout={self._layout!r}" * (self._layout is not None)
        return f"{type(self).__name__}(<input_mean of shape {self._mean.shape}>{options})"

    def calculate(self, weights: Any, fake_quantized_weights: Any) -> NDArray[Any]:
        """The correction, accumulated in float64; differences of float32 weights, exact near equality, are float32.

        Parameters
        ----------
        weights : ndarray
            The layer's weights, axes as in `layout`, any strides. Not modified.
        fake_quantized_weights : ndarray
            The same weights quantized, then dequantized; the same shape.

        Returns
        -------
        ndarray, (G*O,)
            float64 if `weights` is float64, else float32. Zeros, not None, where nothing is to be corrected.

        Raises
        ------
        TypeError
            The weights are not of real numbers, or those that are quantized are integers and the others are not.
        ValueError
            The shapes of the weights differ; the layout has unknown letters or another rank; the groups do not divide the
            channels; the mean has another shape than the weights call for.
        """
        if not isinstance(weights, np.ndarray):
            weights = reference.native(weights, "weights")
        layout = self._layout_of(weights) if self._layout is None else self._layout
        wide = weights.dtype.char in "dg"  # float64, longdouble
        if type(fake_quantized_weights) is np.ndarray and fake_quantized_weights.dtype.kind in _INTEGERS:
            _check_dequantized(fake_quantized_weights, weights)
        groups = self._groups if self._groups == 1 else self._counted_groups(weights, layout)
        return _kernels.weight_error(weights, fake_quantized_weights, self._mean, groups, layout, wide)

    def calculate_from_quantization(
        self, weights: Any, quantization: Quantization, *, axis: int | None = None, block_size: int | None = None
    ) -> NDArray[Any]:
        """The correction for weights that a quantizer moves to its grid, which are never built.

        Parameters
        ----------
        weights : ndarray
            As for :meth:`calculate`.
        quantization : Quantization
            The grid: one for all weights, or one per channel, or one per block.
        axis : int, optional
            The axis that a per-channel scale or zero point belongs to; by default they have one value for each output channel,
            (G*O,). Where there are blocks, the axis that is divided into them: by default the input channels.
        block_size : int, optional
            Weights of a block along `axis` that share a grid. Scale, and zero point unless it is one for all, then have the
            shape of the weights with ceil(length / block_size) along `axis`, as ONNX stores weight-only quantization.

        Returns
        -------
        ndarray, (G*O,)
            As :meth:`calculate` returns, with the same bits as of weights that were moved to the same grids first.

        Raises
        ------
        TypeError, ValueError
            As :meth:`calculate`; or scale or zero point have another shape than the axis or the blocks call for.

        Examples
        --------
        >>> weights = np.array([[0.1, 0.2], [0.3, 0.4]])
        >>> MeanBiasCorrector([1.0, 2.0]).calculate_from_quantization(weights, Quantization(scale=4))
        array([ 0.2 , -0.25])
        """
        weights = reference.native(weights, "weights")
        layout = self._layout_of(weights) if self._layout is None else self._layout
        groups = self._counted_groups(weights, layout)
        if block_size is not None and axis is None:
            if "I" not in layout:
                raise ValueError(f"block_size: {block_size}, but layout {layout!r} has no axis I; name the axis")
            axis = layout.index("I")
        scale, zero_point, strides, blocks = weight_grids(quantization, weights.shape, axis, block_size)
        divides = blocks is None or (weights.shape[blocks[0]] % blocks[1] == 0 and groups == 1)
        if weights.dtype in (np.float32, np.float64) and divides:
            grids = scale, zero_point, quantization.bits, strides, blocks
            return _kernels.weight_error_from_grids(weights, grids, self._mean, groups, layout)
        if strides is None:  # a grid for each weight
            zeros = self.calculate(weights, weights)  # refuses what does not fit before channels are counted
            check_channels(scale, zero_point, len(zeros))
            if weights.size == 0:
                return zeros
            channels = reference.output_channels(weights.shape, groups, layout)
            scale, zero_point = (np.broadcast_to(x[channels] if x.size > 1 else x, weights.shape) for x in (scale, zero_point))
            quantization, axis, block_size = Quantization(scale, zero_point, quantization.bits), 0, 1
        return self.calculate(weights, fake_quantize(weights, quantization, axis=axis or 0, block_size=block_size))

    def _counted_groups(self, weights: NDArray[Any], layout: str) -> int:
        """The groups that the O or I axis counts; 1 where they have an axis C of their own, of that length."""
        axis = layout.find("C")
        has_them = axis >= 0 and weights.ndim == len(layout) and weights.shape[axis] == self._groups
        return 1 if has_them else self._groups

    @staticmethod
    def _layout_of(weights: NDArray[Any]) -> str:
        if weights.ndim not in _LAYOUT_OF_RANK:
            raise ValueError(f"weights: {weights.ndim} axes, expected 2 to 6, or a layout")
        return _LAYOUT_OF_RANK[weights.ndim]


def _check_dequantized(quantized: NDArray[Any], weights: NDArray[Any]) -> None:
    """Raises TypeError where integers stand beside real weights: most likely they are steps of the grid."""
    if weights.dtype.kind not in _INTEGERS:
        raise TypeError(
            f"fake_quantized_weights: {quantized.dtype}, expected real units as the weights ({weights.dtype}): "
            "dequantize them first, e.g. quantization.dequantize(fake_quantized_weights)"
        )


class AnalyticalBiasCorrector(MeanBiasCorrector):
    """Corrects without data: the input is a normal distribution from a BatchNorm, clipped by an activation.

    Parameters
    ----------
    beta, gamma : array_like, (I*G,)
        Shift and scale of the BatchNorm before the layer: its output is N(beta, gamma^2).
    activation : None, "relu", "relu6" or (low, high)
        The function between the BatchNorm and the layer; a pair of bounds is a Clip.
    groups, layout
        As in :class:`MeanBiasCorrector`.

    Raises
    ------
    ValueError
        An unknown activation; shapes of beta and gamma that differ.

    Notes
    -----
    arXiv 1906.04721, section 4.2.1 and appendix C. The sign of gamma does not matter.
    """

    def __init__(
        self,
        beta: ArrayLike,
        gamma: ArrayLike,
        activation: str | tuple[float, float] | None = None,
        *,
        groups: int = 1,
        layout: str | None = None,
    ) -> None:
        bounds = _BOUNDS.get(activation) if activation is None or isinstance(activation, str) else activation
        if bounds is None or np.shape(bounds) != (2,):
            raise ValueError(f"activation: {activation!r}, expected None, 'relu', 'relu6' or (low, high)")
        super().__init__(clipped_normal_mean(beta, gamma, *bounds), groups=groups, layout=layout)


class EmpiricalBiasCorrector(BiasCorrector):
    """Corrects by what was measured: mean output of the reference layer minus that of the quantized layer.

    Parameters
    ----------
    reference_mean, quantized_mean : array_like, (output channels,)
        Mean outputs before the activation, bias included, in real units.

    Raises
    ------
    ValueError
        Their shapes differ, or are not 1-dimensional.

    Examples
    --------
    >>> EmpiricalBiasCorrector([1.0, 2.0], [1.25, 1.5]).calculate(None, None)
    array([-0.25,  0.5 ])
    """

    def __init__(self, reference_mean: ArrayLike, quantized_mean: ArrayLike) -> None:
        means = reference.native(reference_mean, "reference_mean"), reference.native(quantized_mean, "quantized_mean")
        shapes = [mean.shape for mean in means]
        if shapes[0] != shapes[1] or len(shapes[0]) != 1:
            raise ValueError(f"reference_mean, quantized_mean: shapes {shapes[0]} and {shapes[1]}, expected one equal axis")
        wide = any(mean.dtype == np.float64 for mean in means)
        self._correction = np.subtract(*means, dtype=np.float64).astype(np.float64 if wide else np.float32)

    def __repr__(self) -> str:
        return f"EmpiricalBiasCorrector(<means of {len(self._correction)} channels>)"

    def calculate(self, weights: Any, fake_quantized_weights: Any) -> NDArray[Any]:  # noqa: ARG002
        """reference_mean - quantized_mean, whatever the weights: float64 if either mean is, else float32."""
        return np.array(self._correction)
