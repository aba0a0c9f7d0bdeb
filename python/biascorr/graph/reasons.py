"""Why something was done to a layer, or was not: codes with arguments, turned into text only where somebody reads them."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ReasonCode(enum.Enum):
    """Everything that a report can say of a layer or a batch normalization; the values are the texts."""

    # the layer is unsupported
    OPERATOR_UNSUPPORTED = "operator is not supported"
    DYNAMIC = "it is quantized when it runs, which is not corrected: quantize it statically"
    RECURRENT = "it is recurrent, which is not corrected"
    NO_MATRIX_PRODUCT = "{equation} is no product with one matrix"
    LAYERS_INSIDE = "it has layers inside, which are not corrected"
    LAYERS_IN_SUBGRAPH = "its subgraphs have layers, which are not corrected"
    AFTER_CUSTOM = "it is after a custom operator, which the runtime does not have"
    OTHER_SUBGRAPH = "it is in subgraph {subgraph}: only the first one is corrected"
    LAYERS_IN_FUNCTION = "its function has layers, which are not corrected"
    WEIGHTS_COMPUTED = "weights are computed at run time"
    BIAS_COMPUTED = "its bias is computed at run time"
    BIAS_WITHOUT_EFFECT = "its bias has no effect (beta is 0)"
    BIAS_AXES = "its bias is along axes {axes}, expected one for each channel along {channels}"
    SPATIAL_AXES = "{count} spatial axes, expected 1 to 3"
    NOT_ONE_MATRIX = "weights of shape {shape} are not one matrix"
    WEIGHTS_FORMAT = "its weights are {format}, which is not read"

    # its bias is left as it is
    UNMATCHED = "no layer of this name in the float model, nor one of its weights"
    WEIGHTS_NOT_FINITE = "weights are not finite"
    NOT_QUANTIZED = "weights are not quantized"
    MEANS_NOT_FINITE = "its mean values are not finite"
    NO_VALUES = "no sample has values there"
    NOT_BETTER = "no correction made the outputs better"
    NO_STATISTICS = "no BatchNormalization before it gives the mean of its input"
    BELOW_STEP = "its shift is below half a step of its quantized output in all channels"
    EXCLUDED = "left out by only or exclude"
    BIAS_SKIPPED = "it has no bias, and none was to be added"
    STEP_TOO_SMALL = "it has no bias, and {dtype} has no number near the step of its products"
    CLAMPED = "it has no bias, and its quantized output is clamped at 0"
    NO_PLACE_FOR_BIAS = "it has no bias, nor a place for one: no ADD of one number for each channel follows it alone"

    # its bias was corrected
    BIAS_ADDED = "it had no bias; one was added"
    BIAS_IN_NEXT = "its bias is part of that of the pointwise product after it"
    BIAS_SEPARATED = "its bias shared its bytes in the file with others; it has its own now"
    BIAS_REWRITTEN = "its bias was computed from constants; it is a real one now"
    BIAS_BETWEEN_STEPS = "its bias is real: it would be lost between the steps of its quantized output"
    BIAS_STEP_TOO_SMALL = "its bias is real: {dtype} has no number near the step of its products"
    BIAS_CANNOT_MOVE = "{dtype} bias has a step of 0 in {count} of {channels} channels, which stay"
    BIAS_SATURATES = "{dtype} bias saturates in {count} of {channels} channels"

    # its weights cannot be others
    WEIGHTS_QUANTIZED = "its weights are quantized"
    WEIGHTS_SHARED = "its weights are used elsewhere too"
    NO_WEIGHTS = "it has no weights"
    WEIGHTS_INFINITE = "its weights are not finite"

    # its channels are not scaled
    SEVERAL_READERS = "several operations read its output"
    NO_READERS = "nothing reads its output"
    IS_OUTPUT = "its output is an output of the model"
    NEXT_LAYER = "followed by {layer}: {reason}"
    OTHER_CHANNELS = "followed by {layer}, which reads other channels"
    OPERATION_MIXES = "{operation} reads its output, after which a scaled channel is not the same"
    OPERATION_AXIS = "{operation} reads its output, whose channels are not along axis {axis}"
    BOUND_IN_OTHER_SHAPE = "{operation} limits its output in another shape"
    BOUND_AXIS = "{operation} limits its output along another axis"
    BOUND_SHARED = "{operation} limits another tensor too"
    BOUND_PER_CHANNEL = "{operation} cannot limit each channel to a bound of its own in this model"
    LITTLE_GAIN = "{operations} would need a bound for each channel, to gain {bits:.2f} bits"
    FOLLOWED_BY = "followed by {layer}"

    # its high bias is not folded
    HIGH_BIAS_STAYS = "its high bias stays: {reason}"
    BOUNDS_WOULD_MOVE = "{operation} limits it to bounds that would move"
    BIAS_BEYOND_DTYPE = "biases would be beyond {dtype}"
    READS_PADDING = "{layer} reads padding too, which would be shifted"

    # a batch normalization is not folded
    NORM_UNREAD = "nothing reads what it makes"
    NORM_SHARED = "it normalizes another tensor too"
    NORM_NOT_AFTER_LAYER = "no layer makes what it reads, or not only layers read what it makes"
    NORM_OUTPUT_SHARED = "something else reads the output of {layer} too"
    NORM_BEFORE_PADDING = "{layer} after it reads padding too, which would be shifted"
    NORM_LAYER_UNFIT = "{layer}: {reason}"
    NORM_OTHER_AXIS = "the channels of {layer} are not along axis {axis}"
    NORM_NOT_FINITE = "its parameters are not finite"
    NORM_BEYOND_DTYPE = "{layer} would have weights or biases that {dtype} cannot hold"
    NORM_NOT_WANTED = "not among the given pairs"

    def __call__(self, **arguments: object) -> Reason:
        """The reason with its arguments."""
        return Reason(self, tuple(arguments.items()))


@dataclass(frozen=True)
class Reason:
    """A reason: a code and what fills its text in.

    Parameters
    ----------
    code : ReasonCode
        The kind of reason.
    arguments : tuple of (str, object)
        Names of layers and operations, numbers, other reasons, by the names that they have in the text.
    """

    code: ReasonCode
    arguments: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return self.code.value.format(**dict(self.arguments))


def text_of(reasons: tuple[Reason, ...]) -> str:
    """Several reasons as one text."""
    return "; ".join(map(str, reasons))


@dataclass(frozen=True)
class LayerReport:
    """The correction of one layer.

    Parameters
    ----------
    name, op : str
        The layer and its operator.
    method : str or None
        The method that its bias was corrected by, with its strength; with "hybrid", which of its two. None where the bias is
        as it was.
    channels : int or None
        Output channels; None where the layer is unsupported.
    shift_before, shift_after : float or None
        Mean over channels of the absolute shift that the method found, in real units: before it was added to the bias, and what
        is left of it after rounding to the bias's own format. 0 where the weights are not quantized; None where the bias is as
        it was for another reason.
    reasons : tuple of Reason
        Why the bias is as it was, or what is worth knowing about the new one.
    sqnr_before, sqnr_after : float or None
        Signal to quantization noise ratio in dB of its output against that of the float layer, before and after the correction
        of all layers; None where that was not measured.
    worst_channels : tuple of (int, float)
        The channels with the largest shifts in magnitude, a few of them, and these shifts in real units.
    """

    name: str
    op: str
    method: str | None = None
    channels: int | None = None
    shift_before: float | None = None
    shift_after: float | None = None
    reasons: tuple[Reason, ...] = ()
    sqnr_before: float | None = None
    sqnr_after: float | None = None
    worst_channels: tuple[tuple[int, float], ...] = ()

    @property
    def reason(self) -> str:
        """The reasons as text; empty where there are none."""
        return text_of(self.reasons)
