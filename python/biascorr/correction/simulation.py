"""A float network as quantization would leave it: weights moved to their grids and, where asked for, the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from biascorr.correction.quant_params import QuantParams
from biascorr.graph.layer import Layer, without_later_calls
from biascorr.graph.network import EditableNetwork, Edits, Feeds, Network
from biascorr.quantization import Quantization
from biascorr.sweep.shard import Shard

Ranges: TypeAlias = Mapping[str, tuple[float, float]]
"""The least and the greatest value of tensors, by name."""


def simulated(
    network: EditableNetwork, params: QuantParams, ranges: Callable[[Sequence[str]], Iterable[Ranges]] = lambda _: ()
) -> EditableNetwork:
    """A copy of a network that is quantized in simulation.

    Parameters
    ----------
    network : EditableNetwork
        Float.
    params : QuantParams
        How it is quantized.
    ranges : callable
        Called with tensors; gives their ranges in each batch of calibration samples, as :func:`ranges_of`. Called only if
        activations are quantized.

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
    return copy.with_quantizers(input_quantizations(layers, ranges, params.activation_bits))


def layers_to_quantize(network: Network, params: QuantParams) -> list[Layer]:
    """All layers but those to ignore, with all of their calls. Raises ValueError where a name to ignore is no layer's."""
    ignored = set(params.ops_to_ignore or ())
    known = [layer.name for layer in without_later_calls(network.layers)] + [report.name for report in network.unsupported]
    for name in sorted(ignored.difference(known)):
        raise ValueError(f"ops_to_ignore: {name!r} is no layer; the layers are {', '.join(known)}")
    return [layer for layer in network.layers if layer.first_call not in ignored]


def input_quantizations(
    layers: Sequence[Layer], ranges: Callable[[Sequence[str]], Iterable[Ranges]], bits: int
) -> dict[str, Quantization]:
    """The quantization of the input of each layer, by its name: the grid over the range that it has in all batches.

    Layers that read quantized values have none. Raises ValueError where a tensor is not finite or there are no batches.
    """
    reading = [layer for layer in layers if layer.input_quantization is None]
    readers = {layer.input: layer.name for layer in reading}
    whole, has_samples = dict.fromkeys(readers, (0.0, 0.0)), False
    for found in ranges(list(readers)):
        has_samples = True
        for name, (least, greatest) in found.items():
            if not np.isfinite([least, greatest]).all():
                raise ValueError(f"layer {readers[name]}: its input {name} contains nan or inf")
            whole[name] = min(whole[name][0], least), max(whole[name][1], greatest)
    if not has_samples:
        raise ValueError("data: no samples, the ranges of activations need at least one")
    return {layer.name: Quantization.from_range(*whole[layer.input], bits) for layer in reading}


def ranges_of(network: Network, names: Sequence[str], batches: Iterable[Feeds], threads: int = 0) -> Iterator[Ranges]:
    """The least and the greatest value of tensors, at most and at least 0, batch by batch."""
    compute = None
    for feeds in batches:
        compute = compute or network.part(feeds, names, threads=threads)
        arrays = compute(feeds).items()
        yield {name: (float(array.min(initial=0.0)), float(array.max(initial=0.0))) for name, array in arrays}


def tensor_ranges(shard: Shard, batches: Sequence[int], network: Network, names: Sequence[str]) -> Iterator[Ranges]:
    """See :func:`ranges_of`; of some batches of a shard."""
    return ranges_of(network, names, shard.samples.feeds(batches), shard.threads)
