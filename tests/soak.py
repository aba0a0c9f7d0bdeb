"""Calls of all kinds in one process, on and on: memory has to stay, and nothing may be left.

    python tests/soak.py --calls 10000 --corrections 200

Prints a row now and then. Fails where the memory that is this process's alone grows by more than LIMITS allow from a third of
the way on, or where open files, threads or temporary folders are more than they were then.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import biascorr
from arrays import FLOATS, INTEGERS, LAYOUTS, SMALL_FLOATS, random_array
from biascorr import channel_scale, reference
from biascorr.statistics import TapMean, clipped_normal_mean
from biascorr.windows import Window, positions_seen

LIMITS = {"calls": (1.0, 0.05), "corrections": (40.0, 5.0)}
"""Kilobytes, and blocks of Python's allocator, that memory may grow with each: an object that is forgotten takes some."""

LONG = {"calls": 2000, "corrections": 100}
"""Fewer say nothing of memory: runtimes and allocators still get what they need."""

WARM = 1 / 3
"""Part of the way after which nothing has to be got for the first time."""


@dataclass(frozen=True)
class Row:
    """What a process holds."""

    done: int
    resident: float
    own: float
    files: int
    threads: int
    folders: int
    blocks: int

    @classmethod
    def now(cls, done: int) -> "Row":
        """After the same work as ever, so that the threads are the same, and those that have ended are gone."""
        biascorr.set_num_threads(2)
        biascorr.prepare_input_mean([np.ones((1024, 1024), np.float32)], None)
        time.sleep(0.1)
        positions_seen.cache_clear()  # what it keeps has a limit
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free is no leak
        sizes = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        kilobytes = {name: int(size.split()[0]) for name, size in sizes.items()}
        own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
        folders = len(list(Path(tempfile.gettempdir()).glob("biascorr-*")))
        files, threads = (len(list(Path(f"/proc/self/{each}").iterdir())) for each in ("fd", "task"))
        return cls(done, kilobytes["Rss"] / 1024, own / 1024, files, threads, folders, sys.getallocatedblocks())


def array_calls(rng: np.random.Generator) -> Iterator[Callable[[], object]]:
    """Functions of arrays on arrays of any kind; a part of them are errors."""
    dtypes = [*INTEGERS, *FLOATS, *SMALL_FLOATS, "complex64"]
    accumulators = [biascorr.ChannelMean(), biascorr.ChannelMean(channel_axis=1)]
    while True:
        shape = tuple(int(size) for size in rng.integers(0 if rng.random() < 0.05 else 1, 12, rng.integers(1, 5)))
        if rng.random() < 0.05:
            shape = (64, 33, 17, 20)  # worth threads
        dtype = "float32" if rng.random() < 0.3 else str(rng.choice(dtypes))
        if dtype == "complex64":
            array = np.zeros(shape, dtype)
        else:
            layout = str(rng.choice(list(LAYOUTS))) if 0 not in shape else "contiguous"  # nothing can be mapped into memory
            array = LAYOUTS[layout](random_array(shape, dtype, int(rng.integers(1 << 30))))
        weights = random_array(
            (3, 3, int(rng.integers(1, 40)), int(rng.integers(1, 40))), str(rng.choice(["float32", "float64"]))
        )
        kernel = functools.partial(Kernels, array, weights, rng, accumulators)
        yield getattr(kernel(), str(rng.choice(Kernels.names())))


@dataclass
class Kernels:
    """Each call of the array interface that there is, of an array and of weights (kh, kw, I, O)."""

    array: Any
    weights: Any
    rng: np.random.Generator
    accumulators: list[Any]

    @classmethod
    def names(cls) -> list[str]:
        return [name for name, value in vars(cls).items() if callable(value) and name.startswith("call_")]

    def call_input_mean(self) -> object:
        return biascorr.prepare_input_mean([self.array] * int(self.rng.integers(0, 4)), None)

    def call_quantized_input_mean(self) -> object:
        return biascorr.prepare_input_mean(iter([self.array]), biascorr.Quantization(self.rng.uniform(1, 9, 3), 1))

    def call_accumulate(self) -> object:
        self.accumulators[0].update(self.array[..., :2])
        return self.accumulators[0].mean()

    def call_merge(self) -> object:
        own = biascorr.ChannelMean(channel_axis=1)
        own.update(self.array[:, :2])
        self.accumulators[1].merge(own)
        return own.mean()

    def call_taps(self) -> object:
        taps = TapMean(Window((3, 3), (1, 2), (1, 1), ((1, 1), (0, 2))))
        taps.update(self.array)
        return taps.mean()

    def call_quantize(self) -> object:
        quantization = biascorr.Quantization(2.5, 1, int(self.rng.integers(2, 33)))
        return quantization.dequantize(quantization.quantize(self.array))

    def call_fake_quantize(self) -> object:
        return biascorr.fake_quantize(self.array, biascorr.Quantization(self.rng.uniform(1, 9, self.array.shape[-1]), 0, 4))

    def call_fake_quantize_at_random(self) -> object:
        return biascorr.fake_quantize(self.weights, biascorr.Quantization(3.0), rng=np.random.default_rng(0))

    def call_fake_quantize_blocks(self) -> object:
        size = int(self.rng.integers(3, 6))
        blocks = np.full((*self.weights.shape[:2], -(-self.weights.shape[2] // 4), self.weights.shape[3]), 3.0)
        return biascorr.fake_quantize(self.weights, biascorr.Quantization(blocks), axis=2, block_size=size)

    def call_from_weights(self) -> object:
        axis = [None, -1, 7][int(self.rng.integers(0, 3))]
        return biascorr.Quantization.from_weights(self.weights, 4, axis=axis, asymmetric=bool(self.rng.integers(0, 2)))

    def call_ranges(self) -> object:
        return biascorr.Quantization.from_range(-self.rng.random(5), self.rng.random(5), 8), biascorr.Quantization.from_step(
            0.1
        )

    def call_shift(self) -> object:
        layout = str(self.rng.choice(["HWIO", "HWOI", "OIHW", "HWCM", "XYZ"]))
        corrector = biascorr.MeanBiasCorrector(np.ones(self.weights.shape[-2]), layout=layout)
        quantization = biascorr.Quantization.from_weights(self.weights, 4)
        shift = corrector.calculate(self.weights, biascorr.fake_quantize(self.weights, quantization))
        return shift, corrector.calculate_from_quantization(self.weights, quantization)

    def call_other_correctors(self) -> object:
        size = self.weights.shape[-2]
        correctors = [
            biascorr.AnalyticalBiasCorrector(np.zeros(size), np.ones(size), "relu"),
            biascorr.EmpiricalBiasCorrector(np.ones(size), np.zeros(size)),
            biascorr.NullBiasCorrector(),
        ]
        return [corrector.calculate(self.weights, self.weights * 0.9) for corrector in correctors]

    def call_channels(self) -> object:
        ranges = channel_scale.channel_ranges(self.weights, "HWIO", axis="I")
        return channel_scale.scaled_channels(self.weights, "HWIO", input_factors=ranges + 1)

    def call_normal(self) -> object:
        return clipped_normal_mean(np.zeros(9), np.ones(9), 0.0, 6.0)

    def call_reference(self) -> object:
        return reference.channel_sums(self.array)

    def call_threads(self) -> object:
        biascorr.set_num_threads(int(self.rng.integers(0, 4)))
        return biascorr.get_num_threads()


def corrections(rng: np.random.Generator) -> Iterator[Callable[[], object]]:
    """Whole corrections of small networks: each method and format, errors, some that are given up, some beyond the budget."""
    import onnx
    from onnxruntime.quantization import QuantFormat

    from networks import batch_norm, batch_norm_constants, model_from_text, quantized, samples, two_layers, weights

    data, model = samples(8, 3, 6, 6), two_layers()
    qdq = quantized(model, [{"x": data}])
    operators = quantized(model, [{"x": data}], quant_format=QuantFormat.QOperator)
    text = f"""g (float[N,3,6,6] x) => (float[N,4,6,6] y) {{
        a = Conv<pads=[1,1,1,1]>(x, w) {batch_norm("a", "b")} r = Relu(b) y = Conv(r, v)
    }}"""
    norms = model_from_text(text, w=weights(4, 3, 3, 3), v=weights(4, 4, 1, 1), **batch_norm_constants(4))
    params = biascorr.QuantParams("tf", weight_bits=4)

    def simulated(method: str, **options: Any) -> Callable[[], object]:
        return lambda: biascorr.correct(
            norms if method in ("analytical", "hybrid") else model, data, method=method, quant_params=params, **options
        )

    def given(quantized_model: onnx.ModelProto, method: str, **options: Any) -> Callable[[], object]:
        return lambda: biascorr.correct(model, data, quantized=quantized_model, method=method, **options)

    def broken() -> Iterator[Any]:
        yield data[:1]
        raise OSError("the disk is gone")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    methods = ["auto", "mean", "iterative", "empirical", "activation", "squared", "analytical", "hybrid"]
    kinds = [simulated(method) for method in methods]
    kinds += [simulated(method, memory_budget="1kB", threads=2) for method in ("auto", "squared", "iterative")]
    kinds += [given(each, method) for each in (qdq, operators) for method in ("auto", "activation", "mean")]
    kinds += [given(qdq, "iterative", memory_budget="1kB", threads=1)]
    kinds += [simulated(method, checkpoint=Path(tempfile.gettempdir()) / method) for method in ("auto", "mean")]
    kinds += [
        lambda: biascorr.correct(model, broken(), method="mean", quant_params=params, memory_budget=0),
        lambda: biascorr.correct(model, data[:, :2], quant_params=params),
        lambda: biascorr.correct(model, np.full_like(data, np.nan), quant_params=params),
        lambda: biascorr.correct(b"no model", data),
        lambda: biascorr.correct(model, data, quantized=norms),
        lambda: biascorr.correct(model, data, quant_params=params, metric=lambda *_: 1 / 0),
        lambda: biascorr.correct(model, data, quant_params=params, memory_budget=0, progress=interrupt),
        lambda: biascorr.equalize(norms, data),
        lambda: biascorr.fold(norms),
        lambda: biascorr.compare(model, qdq, data=data),
        lambda: biascorr.inspect(qdq),
    ]
    kinds += tflite_corrections()
    while True:
        yield from (kinds[k] for k in rng.permutation(len(kinds)))


def tflite_corrections() -> list[Callable[[], object]]:
    """None where LiteRT is not installed."""
    try:
        from tflite_networks import content_of, float_of, samples_of
    except ImportError:
        return []
    name = "convolutions-int8"
    whole, content, data = float_of(name), content_of(name), samples_of(name)
    return [
        functools.partial(biascorr.correct, whole, data, quantized=content, method="auto"),
        functools.partial(biascorr.correct, whole, data, quantized=content, method="iterative", memory_budget="1kB"),
        functools.partial(biascorr.correct, whole, data, quantized=content[:-99]),
    ]


EXPECTED = (TypeError, ValueError, MemoryError, OSError, IndexError, RuntimeError, KeyboardInterrupt)
"""What may come out of the calls that are errors."""


def soaked(kind: str, calls: Iterator[Callable[[], object]], count: int, rows: int) -> list[str]:
    """Makes so many calls; what is wrong afterwards."""
    every, found, errors, start = max(1, count // rows), [], 0, time.perf_counter()
    print(f"\n{kind:>12} RSS [MB] own [MB]   files threads folders   blocks  errors")
    for done, call in enumerate(itertools.islice(calls, count), 1):
        try:
            call()
        except EXPECTED:
            errors += 1
        del call
        if done % every == 0:
            row = Row.now(done)
            found.append(row)
            print(
                f"{done:>12,} {row.resident:>8.1f} {row.own:>8.1f} {row.files:>7} {row.threads:>7} {row.folders:>7}"
                f" {row.blocks:>8} {errors:>7}",
                flush=True,
            )
    warm = found[int(WARM * len(found)) :]
    kilobytes, blocks = (
        np.polyfit([row.done for row in warm], [getattr(row, name) for row in warm], 1)[0] for name in ("own", "blocks")
    )
    kilobytes *= 1024
    grows = f"memory grows by {kilobytes:.3f} kB and {blocks:.3f} blocks with each of {kind}"
    print(f"{grows}, at most {LIMITS[kind]}; {time.perf_counter() - start:.0f} s")
    is_too_much = kilobytes > LIMITS[kind][0] or blocks > LIMITS[kind][1]
    wrong = [grows] if is_too_much and count >= LONG[kind] else []
    for name in ("files", "threads", "folders"):
        first, last = getattr(warm[0], name), getattr(warm[-1], name)
        wrong += [f"{kind}: {last} {name}, {first} before"] if last > first else []
    return wrong


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000, help="of functions of arrays")
    parser.add_argument("--corrections", type=int, default=200, help="of whole models")
    parser.add_argument("--rows", type=int, default=20, help="of each table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    wrong = []
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        tempfile.tempdir = folder
        for kind, source in {"calls": array_calls, "corrections": corrections}.items():
            if count := getattr(options, kind):
                wrong += soaked(kind, source(np.random.default_rng(options.seed)), count, options.rows)
        tempfile.tempdir = None
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
