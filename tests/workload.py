"""Work whose digest tells whether it came out as ever: of arrays, of a small model; what it leaves behind."""

import contextlib
import gc
import hashlib
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np

import biascorr
from arrays import random_array
from biascorr import ChannelMean, MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean
from biascorr.channel_scale import channel_ranges, scaled_channels
from biascorr.statistics import TapMean
from biascorr.windows import Window

LARGE = (40, 21, 23, 36)
"""A shape whose arrays are worth threads."""


def arrays(seed=0):
    """The digest of what functions of arrays give."""
    digest = hashlib.sha256()
    for dtype in ("int8", "uint16", "float16", "float32", "float64"):
        sample = random_array(LARGE, dtype, seed)
        for view in (sample, np.moveaxis(sample, 1, -1), sample[:, ::2]):
            digest.update(prepare_input_mean([view, view[:1]], None))
        whole, taps = ChannelMean(), TapMean(Window((3, 3), (2, 1), (1, 1), ((1, 1), (1, 1))), channel_axis=3)
        whole.update(sample)
        taps.update(sample)
        digest.update(whole.mean())
        digest.update(taps.mean())
    weights = random_array((3, 3, 200, 72), "float32", seed)
    quantization = Quantization.from_weights(weights, 4, axis=-1)
    quantized = fake_quantize(weights, quantization)
    corrector = MeanBiasCorrector(np.linspace(-1, 1, 200), layout="HWIO")
    digest.update(corrector.calculate(weights, quantized))
    digest.update(corrector.calculate_from_quantization(weights, quantization))
    digest.update(quantization.dequantize(quantization.quantize(weights)))
    digest.update(channel_ranges(weights, "HWIO", axis="I"))
    digest.update(scaled_channels(weights, "HWIO", output_factors=np.linspace(1, 2, 72)))
    return digest.hexdigest()


def correction(data=None, **options):
    """The digest of a small model that is corrected, its activations beyond the memory budget."""
    from networks import samples, two_layers

    data = samples(12, 3, 6, 6) if data is None else data
    options = {"method": "iterative", "memory_budget": "1kB", "threads": 2} | options
    params = biascorr.QuantParams("tf", weight_bits=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = biascorr.correct(two_layers(), data, quant_params=params, **options)
    return hashlib.sha256(found.model.SerializeToString()).hexdigest()


def both(seed=0):
    return arrays(seed), correction()


def left(threads=frozenset()):
    """What is left of work that has ended: open files, threads of Python but these, temporary folders of ours."""
    gc.collect()
    files = sorted(_targets())
    running = [thread.name for thread in threading.enumerate() if thread not in threads]
    return files, running, sorted(path.name for path in Path(tempfile.gettempdir()).glob("biascorr-*"))


def _targets():
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself
            yield str(link.readlink())
