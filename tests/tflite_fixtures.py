"""The files in fixtures/tflite, which TFLiteConverter made, and the images that they were calibrated with."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "tflite"
FORMATS = ["int8", "int8_in_out", "uint8_in_out", "int16x8", "dynamic", "float16", "int8_per_tensor"]
"""Of "classifier" and "decoder"."""
PAIRS = [
    *((f"{network}_float", f"{network}_{name}") for network in ("classifier", "decoder") for name in FORMATS),
    *((f"{network}_float", f"{network}_int8") for network in ("equal_biases", "any_batch")),
]
"""Names of float files and of what they were quantized to."""


def path_of(name):
    return FOLDER / f"{name}.tflite"


def images(count=32, seed=0):
    """For calibration with these defaults; with other seeds, to look at what became of a file."""
    return np.random.default_rng(seed).gamma(2.0, 0.5, (count, 16, 16, 3)).astype(np.float32)
