"""Measures what `auto` chooses: how near its outputs for held-out samples come, beside those of each method by name.

    python benches/choice.py NETWORK.onnx SAMPLES HELD_OUT [--schemes tensor channel 4bit] [--quantized QUANTIZED.onnx]

SAMPLES calibrate quantizer and correction, HELD_OUT are scored: .npy files with samples along the first axis, for a model with
one input. The network is quantized by onnxruntime (`quantize_static`: int8 QDQ), with a scale per tensor or per channel, or in
simulation, with 4-bit weights per channel; or QUANTIZED is taken as it is.

Pooled SQNR is 10 log10(sum r^2 / sum (q - r)^2) in dB over all samples. Per sample it is the mean of theirs, of which none
counts as more than equal (60 dB) or as quieter than a hundredth of the mean. Both are means over the outputs. The gain over the
uncorrected network is per sample; in brackets is where 95 % of the means of so many samples are, drawn with replacement. The
last column says by how much `auto` is worse than the uncorrected network, by the measure that says more, and what it gains over
the best other row, per sample.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

import biascorr
from biascorr.adapters.loading import network_from_model
from biascorr.correction.correct import METHODS
from biascorr.correction.simulation import simulated
from quality import by_onnxruntime, prepared, separate_outputs

Array = NDArray[Any]
Batches = list[dict[str, Array]]

SCHEMES = "tensor", "channel", "4bit"

SCALED = "empirical", "activation", "squared"
"""Methods that have a strength."""

CEILING = 60.0
"""dB above which outputs of a sample are equal, for any use of them."""

QUIET = 0.01
"""The least part of the mean energy that errors are compared with: the map of a page without text has next to none."""

WORSE = 0.1
"""dB that `auto` may lose unmarked."""

DRAWINGS = 2000


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--quantized", type=Path, help="the network already quantized, in place of the schemes")
    parser.add_argument("--methods", nargs="+", default=[*variants()], help="those beside auto: " + ", ".join(variants()))
    return parser.parse_args()


def variants() -> dict[str, dict[str, Any]]:
    """The options of `biascorr.correct` for each method by name, whole, half and shrunk, by label."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS[1:]:
        found[method] = {"method": method}
        if method in SCALED:
            found[f"{method} 0.5"] = {"method": method, "strength": 0.5}
            found[f"{method} shrunk"] = {"method": method, "shrunk": True}
    return found


def quantized_models(
    network: onnx.ModelProto, samples: Batches, schemes: Iterable[str]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The network quantized by each scheme."""
    for scheme in schemes:
        copy = onnx.ModelProto.FromString(network.SerializeToString())
        if scheme == "4bit":
            params = biascorr.QuantParams("tf", weight_bits=4, per_channel=True)
            yield "simulated, 4-bit weights per channel", simulated(network_from_model(copy, "network"), params).model
        else:
            yield f"int8, per {scheme}", by_onnxruntime(copy, samples, scheme == "channel")


class Judge:
    """Compares networks with the float one on held-out samples."""

    def __init__(self, network: onnx.ModelProto, held_out: Batches) -> None:
        self._held_out = held_out
        self._expected = [*separate_outputs(network, held_out)]

    def energies(self, model: onnx.ModelProto) -> tuple[Array, Array]:
        """Signal and noise of each sample and output."""
        pairs = zip(self._expected, separate_outputs(model, self._held_out), strict=True)
        sums = [[(r @ r, np.square(q - r).sum()) for r, q in zip(*pair, strict=True)] for pair in pairs]
        signal, noise = np.moveaxis(np.array(sums), -1, 0)
        return signal, noise


def pooled(signal: Array, noise: Array) -> float:
    """SQNR in dB of all samples together, the mean over outputs."""
    return float(decibels(signal.sum(axis=0), noise.sum(axis=0)).mean())


def of_samples(signal: Array, noise: Array) -> Array:
    """SQNR in dB of each sample, the mean over outputs."""
    return np.clip(decibels(np.maximum(signal, QUIET * signal.mean(axis=0)), noise), -CEILING, CEILING).mean(axis=1)


def decibels(signal: Array, noise: Array) -> Array:
    tiny = np.finfo(np.float64).tiny
    return 10 * (np.log10(np.maximum(signal, tiny)) - np.log10(np.maximum(noise, tiny)))


@dataclass(frozen=True)
class Row:
    """What became of a network: pooled SQNR, that of each sample, the seconds that it took."""

    label: str
    pooled: float
    sqnrs: Array
    seconds: float

    @classmethod
    def of(cls, label: str, judge: Judge, model: onnx.ModelProto, seconds: float = 0.0) -> "Row":
        energies = judge.energies(model)
        return cls(label, pooled(*energies), of_samples(*energies), seconds)

    def cells(self, before: "Row") -> list[str]:
        low, high = interval(self.sqnrs - before.sqnrs)
        gain = "" if self is before else f"{(self.sqnrs - before.sqnrs).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        return [self.label, f"{self.pooled:.2f}", f"{self.sqnrs.mean():.2f}", gain, f"{self.seconds:.1f}"]


def interval(gains: Array) -> Array:
    """The interval that the means of 95 % of drawings with replacement are in."""
    drawn = np.random.default_rng(0).integers(len(gains), size=(DRAWINGS, len(gains)))
    return np.asarray(np.percentile(gains[drawn].mean(axis=1), [2.5, 97.5]))


def remark(auto: Row, before: Row, fixed: list[Row]) -> str:
    """Whether `auto` is worse than uncorrected, and how far from the best method."""
    loss = max(before.pooled - auto.pooled, before.sqnrs.mean() - auto.sqnrs.mean())
    best = max([before, *fixed], key=lambda row: row.sqnrs.mean())
    gain = auto.sqnrs.mean() - best.sqnrs.mean()
    return (f"WORSE by {loss:.2f}; " if loss > WORSE else "") + f"{gain:+.2f} over {best.label}"


def rows(
    network: onnx.ModelProto, quantized: onnx.ModelProto, samples: Batches, judge: Judge, methods: Iterable[str]
) -> Iterator[Row]:
    """The uncorrected network, each method that has anything to correct, and `auto`."""
    yield Row.of("uncorrected", judge, quantized)
    for label, options in ({label: variants()[label] for label in methods} | {"auto": {"method": "auto"}}).items():
        start = time.perf_counter()
        result = biascorr.correct(network, samples, quantized=quantized, **options)
        seconds = time.perf_counter() - start
        if label not in ("analytical", "hybrid") or any(layer.method == "analytical" for layer in result.report):
            yield Row.of(f"auto: {result.method}" if label == "auto" else label, judge, result.model, seconds)


def table_of(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("", "pooled", "per sample", "gain", "seconds", ""):
        table.add_column(heading, justify="right" if heading else "left")
    before, *fixed, auto = rows
    for row in (before, *fixed, auto):
        table.add_row(*row.cells(before), remark(auto, before, fixed) if row is auto else "")
    return table


def main() -> None:
    options = parse_options()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # a method asked for by name may make outputs worse: that is what is shown
    network = prepared(options.network)
    name = network.graph.input[0].name
    samples, held_out = ([{name: each[None]} for each in np.load(path)] for path in (options.samples, options.held_out))
    judge, models = Judge(network, held_out), quantized_models(network, samples, options.schemes)
    if options.quantized:
        models = iter([(options.quantized.name, onnx.load(options.quantized))])
    for scheme, quantized in models:
        title = f"{options.network.name}, {scheme}: SQNR in dB"
        Console(width=120).print(table_of(title, rows(network, quantized, samples, judge, options.methods)))


if __name__ == "__main__":
    main()
