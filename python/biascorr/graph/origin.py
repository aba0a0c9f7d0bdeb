"""Where a model comes from: its format, and who made and quantized it, as far as the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from biascorr.graph.network import ModelInput, Network


@dataclass(frozen=True)
class Origin:
    """The format of a model, and who made it.

    Parameters
    ----------
    format : str
        The format, with its versions.
    quantization : str or None
        How quantization is written in it; None where nothing in it is quantized.
    quantizer : str or None
        What quantized it, as far as that can be told.
    producer : str or None
        What wrote it, by its own name.
    outputs : sequence of ModelInput
        Names, types and shapes of its outputs; types that numpy has not are those that it is given out in.
    """

    format: str
    quantization: str | None = None
    quantizer: str | None = None
    producer: str | None = None
    outputs: Sequence[ModelInput] = ()


def origin_of(network: Network) -> Origin:
    """The origin of a network, by its adapter."""
    found = getattr(network, "origin", None)
    return found if isinstance(found, Origin) else Origin(type(network).__name__)
