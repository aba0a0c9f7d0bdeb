"""`inspect`: what is in a model: inputs, format, layers, which of them can be corrected, and where equalization would help.

Weights are read layer by layer. Of each layer, with the largest magnitude r of each output channel,

channel bits    log2(max r / median r), what one scale for all channels costs the typical one
weight SQNR     10 log10(sum W^2 / sum (W - Wq)^2), of a quantized layer beside the float one

and of each chain of float layers the bits that scaling its channels would gain, as :func:`biascorr.equalize` measures them.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from biascorr import __version__
from biascorr.adapters.loading import check_same_framework, network_from_model, sizes_by_file
from biascorr.arguments import paths_of
from biascorr.channel_scale import channel_ranges
from biascorr.correction.roles import Pair, check_roles, paired, with_inputs_of
from biascorr.equalization.chains import chains_of, find_links
from biascorr.equalization.folding import fold_batch_norms
from biascorr.equalization.scaling import Scaler
from biascorr.graph.layer import Layer, without_later_calls
from biascorr.graph.matching import Match
from biascorr.graph.network import (
    BiasNetwork,
    EditableNetwork,
    ModelInput,
    Network,
    input_ranges,
    is_editable,
    require_biases,
    versions_of,
)
from biascorr.graph.origin import Origin, origin_of
from biascorr.graph.reasons import LayerReport, Reason, ReasonCode, text_of
from biascorr.report.records import Record, plain, reason_record
from biascorr.report.reported import Reported

_LAYOUTS = {3: ("NCW", "NWC"), 4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}
"""By the number of axes: channels first, channels last."""

_PICTURE = 4
"""Axes of a batch of pictures."""

_COLOURS = (1, 3, 4)
"""Channels that pictures have."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model.

    Parameters
    ----------
    name, dtype : str
        Its name, and the dtype of its elements.
    shape : tuple of int, str or None, or None
        Its axes: a number, the name that the model gives an axis of any size, or None; None where the rank is unknown.
    layout : str or None
        "NCHW" or "NHWC", as the layers that read it, or its sizes, tell; None where they do not.
    range : (float, float) or None
        The least and the greatest value that it is quantized to; None where it is not, or that is not known.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    layout: str | None = None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class LayerInspection:
    """A layer, and what is known of its weights.

    Parameters
    ----------
    name, operator : str
        Its name and operator.
    channels, parameters : int or None
        Output channels and weights; None where the layer is unsupported.
    is_correctable : bool
        Whether its bias can be corrected: in simulation, where the model is float.
    reasons : tuple of Reason
        Why not.
    has_bias : bool
        Whether it has a bias; else it would get one.
    dtype : str or None
        Of its weights as they are stored.
    bits : int or None
        Bits of a quantized weight; None where weights are real numbers.
    scales : str or None
        What has a scale of its own: "tensor", "channel" or "block".
    block_size : int or None
        Weights of a block.
    weight_range : (float, float) or None
        The least and the greatest weight, in real units.
    channel_bits : float or None
        How many bits larger the range of the largest output channel is than that of the median one.
    weight_sqnr : float or None
        Of the quantized weights beside the float ones in dB, infinite where these are the same; None without a reference.
    matched : str or None
        The layer of the reference that it was.
    chain_bits : float or None
        The bits that equalization would gain in its chain, all layers of it together; None where it is in none.
    """

    name: str
    operator: str
    channels: int | None = None
    parameters: int | None = None
    is_correctable: bool = False
    reasons: tuple[Reason, ...] = ()
    has_bias: bool = False
    dtype: str | None = None
    bits: int | None = None
    scales: str | None = None
    block_size: int | None = None
    weight_range: tuple[float, float] | None = None
    channel_bits: float | None = None
    weight_sqnr: float | None = None
    matched: str | None = None
    chain_bits: float | None = None

    @property
    def reason(self) -> str:
        """The reasons as text; empty where there are none."""
        return text_of(self.reasons)

    def to_dict(self) -> Record:
        """As plain data."""
        low, high = self.weight_range or (None, None)
        return {
            **{key: value for key, value in plain(vars(self)).items() if key not in ("reasons", "weight_range")},
            "weight_min": plain(low),
            "weight_max": plain(high),
            "reasons": list(map(reason_record, self.reasons)),
        }


@dataclass(frozen=True)
class ChainInspection:
    """Layers whose channels equalization would scale together.

    Parameters
    ----------
    layers : tuple of str
        Their names.
    bits : float
        By how much their ranges would shrink, all together: a bit is half the range of one of them.
    """

    layers: tuple[str, ...]
    bits: float


@dataclass(frozen=True, eq=False, repr=False)
class Inspection(Reported):
    """What is in a model.

    Parameters
    ----------
    origin : Origin
        Its format, how it is quantized, and by what.
    inputs, outputs : sequence of Tensor
        Its inputs and outputs.
    layers : sequence of LayerInspection
        Its layers, in topological order, those that cannot be corrected among them.
    chains : sequence of ChainInspection
        What equalization would scale, the largest gain first; empty where the model cannot be equalized.
    batch_norms : int
        Batch normalizations that can be folded into layers.
    size : int or None
        Bytes of its files; None of a model that is no file.
    notes : sequence of str
        Remarks.
    versions : mapping from str to str
        Of what read the model.
    """

    origin: Origin
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    layers: Sequence[LayerInspection]
    chains: Sequence[ChainInspection] = ()
    batch_norms: int = 0
    size: int | None = None
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] | None = None
    command: str | None = None

    @property
    def format(self) -> str:
        """The format with its versions, and how quantization is written in it: "ONNX, opset 17, IR 8, QDQ"."""
        return ", ".join(each for each in (self.origin.format, self.origin.quantization) if each)

    @property
    def is_quantized(self) -> bool:
        """Whether weights or activations are quantized."""
        return self.origin.quantization is not None or any(layer.bits is not None for layer in self.layers)

    def __getitem__(self, name: str) -> LayerInspection:
        """A layer by its name."""
        found = next((each for each in self.layers if each.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def to_dict(self) -> Record:
        return {
            "kind": "inspection",
            "biascorr": __version__,
            "format": self.format,
            "quantization": self.origin.quantization,
            "quantizer": self.origin.quantizer,
            "producer": self.origin.producer,
            "is_quantized": self.is_quantized,
            "size": self.size,
            "inputs": [plain(vars(each)) for each in self.inputs],
            "outputs": [plain(vars(each)) for each in self.outputs],
            "layers": [each.to_dict() for each in self.layers],
            "chains": [plain(vars(each)) for each in self.chains],
            "batch_norms": self.batch_norms,
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "files": None if self.files is None else dict(self.files),
            "command": self.command,
        }


def inspect(model: Any, *, reference: Any = None) -> Inspection:
    """Looks into a model: inputs, format, layers, which of them can be corrected, and where equalization would help.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto or keras.Model
        The model, float or quantized: ONNX, TFLite or Keras.
    reference : path, bytes, onnx.ModelProto or keras.Model, optional
        The float model that it was quantized from: tells which of its layers each one was, and how far its weights are from
        those.

    Returns
    -------
    Inspection
        What is in the model.

    Raises
    ------
    FileNotFoundError, ImportError, OSError, TypeError
        As :func:`biascorr.correct`.
    ValueError
        A model is invalid; the model is not the reference quantized.

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]> network (float[N,1] x) => (float[N,1] y)
    ...     <float[1,2] w1 = {8, 1}, float[2,1] w2 = {2, 4}> { [a] h = MatMul(x, w1)  r = Relu(h)  [b] y = MatMul(r, w2) }''')
    >>> inspection = inspect(model)
    >>> inspection.format
    'ONNX, opset 17, IR 8'
    >>> inspection.chains
    [ChainInspection(layers=('a', 'b'), bits=1.0)]
    """
    if reference is not None:
        check_same_framework(reference, model)
    network = require_biases(network_from_model(model, "model"), "model")
    matches, notes = {}, list[str]()
    if reference is not None:
        with _labelled():
            network, pair = _beside(network_from_model(reference, "reference"), network)
        matches, notes = dict(pair.matches), [*pair.notes]
        del pair
    origin = origin_of(network)
    is_quantized = origin.quantization is not None or any(layer.weight_step is not None for layer in network.layers)
    chains, batch_norms = ([], 0) if is_quantized else _chains(network)
    if batch_norms:
        notes.append(f"batch normalizations that can be folded into layers: {batch_norms}; weights are shown before that")
    return Inspection(
        origin,
        [_input(each, network) for each in network.inputs],
        [_tensor(each) for each in origin.outputs] or [Tensor(name, "unknown", None) for name in network.outputs],
        _layers(network, is_quantized, None if reference is None else matches, chains),
        chains,
        batch_norms,
        sum(sizes_by_file(Path(model), "model").values()) if isinstance(model, (str, PathLike)) else None,
        notes,
        versions_of(network),
        paths_of({"model": model, "reference": reference}),
    )


def _beside(reference: Network, network: BiasNetwork) -> tuple[BiasNetwork, Pair]:
    """The network with inputs that are called as those of the reference, and how their layers match."""
    network = with_inputs_of(reference, network)
    check_roles(reference, network)
    return network, paired(reference, network)


@contextlib.contextmanager
def _labelled() -> Iterator[None]:
    """Has errors call the quantized model as it is called here."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(_QUANTIZED):
            raise
        raise ValueError(f"model: {str(error).removeprefix(_QUANTIZED)}") from None


_QUANTIZED = "quantized: "


def _tensor(given: ModelInput) -> Tensor:
    symbols = given.symbols or ("",) * len(given.shape or ())
    axes = None if given.shape is None else tuple(map(_axis, given.shape, symbols))
    return Tensor(given.name, str(given.dtype), axes)


def _axis(size: int | None, symbol: str) -> int | str | None:
    return symbol or None if size is None else size


def _input(given: ModelInput, network: Network) -> Tensor:
    return replace(_tensor(given), layout=_layout(given, network), range=input_ranges(network).get(given.name))


def _layout(given: ModelInput, network: Network) -> str | None:
    """By the layers that read it, else by all layers with a window and as many axes, else by sizes that pictures have."""
    rank = len(given.shape or ())
    if rank not in _LAYOUTS:
        return None
    shape, (first, last) = given.shape or (), _LAYOUTS[rank]
    layers = [layer for layer in network.layers if layer.window is not None and layer.rank == rank]
    reading = [layer for layer in layers if layer.input == given.name] or layers
    if reading:
        return first if reading[0].channel_axis % rank == 1 else last
    is_first, is_last = shape[1] in _COLOURS, shape[-1] in _COLOURS
    return None if rank != _PICTURE or is_first == is_last else first if is_first else last


def _chains(network: Network) -> tuple[list[ChainInspection], int]:
    """What equalization would scale, and how many batch normalizations would be folded first."""
    if not is_editable(network):
        return [], 0
    folded, folds, _ = fold_batch_norms(cast(EditableNetwork, network))
    chains = []
    for chain in chains_of(find_links(folded)[0]):
        scaler = Scaler([chain], folded.facts())
        scaler.sweep()
        chains.append(ChainInspection(tuple(layer.name for layer in chain.layers), scaler.bits[0]))
    return sorted(chains, key=lambda each: -each.bits), len(folds)


def _layers(
    network: BiasNetwork, is_quantized: bool, matches: Mapping[str, Match] | None, chains: Sequence[ChainInspection]
) -> list[LayerInspection]:
    """One entry per layer, in topological order."""
    bits: dict[str, float] = {}
    for chain in chains:
        for name in chain.layers:
            bits[name] = max(chain.bits, bits.get(name, -math.inf))
    found = {report.name: _unsupported(report) for report in network.unsupported}
    for layer in without_later_calls(network.layers):
        each = _layer(network, layer, is_quantized, matches)
        found[layer.name] = replace(each, chain_bits=bits.get(layer.name))
    return [found[name] for name in network.order if name in found]


def _unsupported(report: LayerReport) -> LayerInspection:
    return LayerInspection(report.name, report.op, reasons=report.reasons)


def _layer(network: BiasNetwork, layer: Layer, is_quantized: bool, matches: Mapping[str, Match] | None) -> LayerInspection:
    match = None if matches is None else matches.get(layer.name)
    is_correctable, reasons = _correctable(network, layer, is_quantized, matches)
    known = layer.weight_format
    low, high, channel_bits = _ranges_of(layer)
    return LayerInspection(
        layer.name,
        layer.op,
        layer.channels,
        math.prod(layer.weights.shape),
        is_correctable,
        reasons,
        layer.bias is not None,
        str(layer.weights.dtype) if known is None else known.dtype,
        None if known is None else known.bits,
        None if known is None else known.scales,
        None if known is None else known.block_size or None,
        (low, high),
        channel_bits,
        None if match is None else (-20 * math.log10(match.error) if match.error > 0 else math.inf),
        None if match is None else match.reference.name,
    )


def _correctable(
    network: BiasNetwork, layer: Layer, is_quantized: bool, matches: Mapping[str, Match] | None
) -> tuple[bool, tuple[Reason, ...]]:
    """Whether the bias of a layer can be corrected, and why not."""
    match = None if matches is None else matches.get(layer.name)
    if matches is not None and match is None:
        return False, (ReasonCode.UNMATCHED(),)
    if match is not None and not match.is_finite:
        return False, (ReasonCode.WEIGHTS_NOT_FINITE(),)
    if not match.is_quantized if match is not None else is_quantized and layer.weight_step is None:
        return False, (ReasonCode.NOT_QUANTIZED(),)
    change = network.bias_change(layer, np.zeros(layer.channels))
    return change.applied is not None, change.reasons if change.applied is None else ()


def _ranges_of(layer: Layer) -> tuple[float, float, float | None]:
    """The least and the greatest weight, and how many bits the largest channel is larger than the median one."""
    weights = np.asarray(layer.weights)
    if not weights.size:
        return 0.0, 0.0, None
    ranges = channel_ranges(weights, layer.layout, axis="O", groups=layer.groups)
    known = [each for each in ranges.tolist() if each > 0 and math.isfinite(each)]
    bits = math.log2(max(known) / statistics.median(known)) if known else None
    gain = layer.gain
    low, high = sorted((gain * float(weights.min()), gain * float(weights.max())))
    return low, high, bits
