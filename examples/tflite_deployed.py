"""Correct the .tflite file that is deployed.

    python examples/tflite_deployed.py                                      a small network of this repository
    python examples/tflite_deployed.py FLOAT.tflite INT8.tflite SAMPLES     yours

SAMPLES is an .npy or .npz file, or a folder of them, as the float model takes them. The corrected file goes to
build/corrected.tflite, or to --output. What is printed is how near the outputs come to those of the float file before and
after, on the samples that were held out: in exact arithmetic, and as LiteRT runs the files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import biascorr

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "tests" / "fixtures" / "tflite"


def random_images(count: int, seed: int) -> NDArray[np.float32]:
    """What the small network was calibrated with."""
    return np.random.default_rng(seed).gamma(2.0, 0.5, (count, 16, 16, 3)).astype(np.float32)


def correct(network: Path, quantized: Path, samples: Any, output: Path) -> biascorr.Correction:
    """Corrects a quantized file with samples, and saves it."""
    correction = biascorr.correct(network, samples, quantized=quantized)
    output.parent.mkdir(parents=True, exist_ok=True)
    correction.save(output, force=True, provenance=False)  # so that biases are all that changes
    return correction


def print_scores(correction: biascorr.Correction, quantized: Path, output: Path) -> None:
    print(f"{'':20}{'exact arithmetic':>20}{'LiteRT':>20}")
    for label in dict.fromkeys(["none", correction.method]):
        name = "uncorrected" if label == "none" else label
        print(f"{name:20}{correction.scores[label]!s:>20}{correction.deployed[label]!s:>20}")
    for note in correction.notes:
        print(f"note: {note}")
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (quantized, output))
    is_patched = len(before) == len(after)
    print(f"{output}: {f'{np.count_nonzero(before != after)} of {len(before)} bytes differ' if is_patched else 'written anew'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FLOAT.tflite INT8.tflite SAMPLES")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "corrected.tflite")
    options = parser.parse_args(arguments)
    if len(options.files) not in (0, 3):
        parser.error("expected FLOAT.tflite INT8.tflite SAMPLES, or nothing")
    network, quantized, samples = options.files or (
        FILES / "classifier_float.tflite",
        FILES / "classifier_int8_per_tensor.tflite",
        random_images(128, seed=1),
    )
    print_scores(correct(network, quantized, samples, options.output), quantized, options.output)


if __name__ == "__main__":
    main()
