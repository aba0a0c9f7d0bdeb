"""The samples that a network is corrected with, and what is worth knowing about them."""

from __future__ import annotations

import numpy as np

from biascorr.calibration.progress import Work
from biascorr.calibration.samples import Samples
from biascorr.correction.image_notes import image_notes
from biascorr.graph.network import Network, input_ranges
from biascorr.sweep.independence import BatchingFinder
from biascorr.typing import Data

_OUTSIDE = 0.05
"""Share of the values of an input that a quantizer may well have cut off."""


def read_samples(
    samples: Samples,
    network: Network,
    quantized: Network,
    data: Data | None,
    validation: Data | None,
    *,
    batch_size: int,
    max_samples: int | None,
    threads: int,
    work: Work,
) -> list[int]:
    """Reads data and validation data, as far as there are any, for the inputs of the quantized network.

    Returns the sizes of the batches as they were read; they are taken apart then, so that those are scored that are to be. See
    :func:`biascorr.correct` for the other parameters and the errors.
    """
    batchings = BatchingFinder(network, quantized.inputs, samples.storage, threads)
    for given, is_validation in ((data, False), (validation, True)):
        if given is not None:
            samples.read(
                given,
                quantized.inputs,
                work,
                batch_size=batch_size,
                max_samples=max_samples,
                validation=is_validation,
                batchings=batchings,
            )
    sizes = samples.sizes
    samples.choose_scored()
    return sizes


def notes_on_left_out(samples: Samples, max_samples: int | None) -> list[str]:
    """Remarks on samples that were not read."""
    return [f"{name}: not all samples were read, {max_samples} at most (max_samples)" for name in samples.left_out]


def notes_on_samples(network: Network, quantized: Network, samples: Samples) -> list[str]:
    """Remarks on samples that were read."""
    return [*image_notes(network, samples), *_out_of_range(quantized, samples)]


def _out_of_range(network: Network, samples: Samples) -> list[str]:
    """Remarks on inputs whose samples are not what the quantized network was made for."""
    notes, ranges = [], input_ranges(network)
    counts = dict.fromkeys(ranges, (0, 0))
    for feeds in samples.feeds() if ranges else ():
        for name, (low, high) in ranges.items():
            outside, count = counts[name]
            array = feeds[name]
            counts[name] = outside + int(np.count_nonzero((array < low) | (array > high))), count + array.size
    for name, (outside, count) in counts.items():
        if outside > _OUTSIDE * count:
            low, high = ranges[name]
            notes.append(
                f"{outside / count:.0%} of the values of input {name} are outside of {low:.4g} to {high:.4g}, which is all "
                "that the quantized model takes: are the samples scaled as for the float model?"
            )
    return notes
