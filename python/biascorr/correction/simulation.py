"""A float network as quantization would leave it: weights moved to their grids and, where asked for, the inputs of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from biascorr.correction.quant_params import QuantParams
from biascorr.graph.layer import Layer, without_later_calls
from biascorr.graph.network import EditableNetwork, Edits, Feeds, Network
from biascorr.quantization import Quantization


def simulated(
    network: EditableNetwork, params: QuantParams, batches: Iterable[Feeds] = (), threads: int = 0
) -> EditableNetwork:
    """A copy of a network that is quantized in simulation.

    Parameters
    ----------
    network : EditableNetwork
        Float.
    params : QuantParams
        How it is quantized.
    batches : iterable of mappings
        Calibration samples, which the ranges of activations are measured on; read only if these are quantized.
    threads : int
        Threads that run the network; 0: all there are.

    Returns
    -------
    EditableNetwork
        Layers and their names are those of `network`.

    Raises
    ------
    ValueError
        ops_to_ignore names what is no layer; weights or inputs of a layer, which is named, are not finite; activations are
        quantized and there are no batches.
    """
    layers = layers_to_quantize(network, params)
    copy = network.edited(Edits(weights={layer.name: params.fake_quantized(layer) for layer in without_later_calls(layers)}))
    if params.activation_bits is None:
        return copy
    return copy.with_quantizers(input_quantizations(network, layers, batches, params.activation_bits, threads))


def layers_to_quantize(network: Network, params: QuantParams) -> list[Layer]:
    """All layers but those to ignore, with all of their calls. Raises ValueError where a name to ignore is no layer's."""
    ignored = set(params.ops_to_ignore or ())
    known = [layer.name for layer in without_later_calls(network.layers)] + [report.name for report in network.unsupported]
    for name in sorted(ignored.difference(known)):
        raise ValueError(f"ops_to_ignore: {name!r} is no layer; the layers are {', '.join(known)}")
    return [layer for layer in network.layers if layer.first_call not in ignored]


def input_quantizations(
    network: Network, layers: Sequence[Layer], batches: Iterable[Feeds], bits: int, threads: int = 0
) -> dict[str, Quantization]:
    """The quantization of the input of each layer, by its name: the grid over the range that it has in all batches.

    Layers that read quantized values have none. Raises ValueError where a tensor is not finite or there are no batches.
    """
    reading = [layer for layer in layers if layer.input_quantization is None]
    ranges = _ranges(network, {layer.input: layer.name for layer in reading}, batches, threads)
    return {layer.name: Quantization.from_range(*ranges[layer.input], bits) for layer in reading}


def _ranges(
    network: Network, readers: dict[str, str], batches: Iterable[Feeds], threads: int
) -> dict[str, tuple[float, float]]:
    """The least and the greatest value of each tensor, at most and at least 0; `readers` are the layers that errors name."""
    ranges, compute = dict.fromkeys(readers, (0.0, 0.0)), None
    for feeds in batches:
        compute = compute or network.part(feeds, list(readers), threads=threads)
        for name, array in compute(feeds).items():
            least, greatest = float(array.min(initial=ranges[name][0])), float(array.max(initial=ranges[name][1]))
            if not np.isfinite([least, greatest]).all():
                raise ValueError(f"layer {readers[name]}: its input {name} contains nan or inf")
            ranges[name] = least, greatest
    if compute is None:
        raise ValueError("data: no samples, the ranges of activations need at least one")
    return ranges
