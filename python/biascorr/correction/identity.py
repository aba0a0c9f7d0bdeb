"""What a run is of, so that a checkpoint goes on with the same one alone: all that results depend on, as errors call it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from biascorr import __version__
from biascorr.calibration.samples import Samples
from biascorr.correction.quant_params import QuantParams
from biascorr.graph.network import Network, versions_of


@dataclass(frozen=True, eq=False)
class RunIdentity:
    """What a run is of.

    Parameters
    ----------
    reference : Network
        The float network.
    quantized : Network or None
        The quantized one, where it is given.
    settings : mapping
        The options that results depend on, by name.
    """

    reference: Network
    quantized: Network | None
    settings: Mapping[str, Any]

    @functools.cached_property
    def known(self) -> dict[str, str]:
        """All but the samples."""
        return {
            "biascorr": __version__,
            **{name: version for name, version in versions_of(self.reference).items() if name != "python"},
            "reference": self.reference.digest,
            "quantized": "none" if self.quantized is None else self.quantized.digest,
            **{name: _text_of(value) for name, value in self.settings.items()},
        }

    def with_samples(self, samples: Samples, sizes: Iterable[int]) -> dict[str, str]:
        """All of it, with samples that were read in batches of these sizes."""
        batches = ", ".join(f"{len([*group])} of {size}" for size, group in itertools.groupby(sizes))
        return {**self.known, "data": f"{samples.digest or 'none'}, {samples.count} samples", "batches": batches}


def _text_of(value: Any) -> str:
    if isinstance(value, QuantParams):  # where it runs is no matter
        value = replace(value, use_cuda=False, ops_to_ignore=sorted(value.ops_to_ignore or ()))
    return str(value)
