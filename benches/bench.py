"""How fast the kernels are beside numpy, as ratios measured in one run.

    make bench                        all rows
    make bench BENCH="--only mean"    rows whose name has the word

Each row first checks that all expressions agree. `twin` is the plain numpy code that a user would write; `best` is the fastest
numpy expression known here that still meets the accuracy, named in the last column. A ratio above 1 means biascorr is faster.
Samples and weights are larger than the caches, except in the rows that time a single small call.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import MeanBiasCorrector, Quantization, fake_quantize, get_num_threads, prepare_input_mean, set_num_threads

Array = NDArray[Any]
Expression = Callable[[], Array]

SAMPLE_BYTES = 128 << 20
BURSTS, BURST_SECONDS, REST_SECONDS = 4, 0.1, 0.05

QUANTIZATION = Quantization(scale=37.5, zero_point=-3)


@dataclass(frozen=True)
class Row:
    """One thing to time: ours, the code a user would write, and better numpy, all with the same result."""

    name: str
    bytes_read: int
    ours: Expression
    twin: Expression
    numpy: dict[str, Expression]
    atol: float = 1e-5


def seconds(expressions: dict[str, Expression]) -> dict[str, float]:
    """Median time of a call of each expression, measured in bursts that take turns, so that noise meets them alike.

    Before each burst the threads of numpy's BLAS get time to stop spinning; its first call warms up and does not count; calls
    of microseconds are timed in batches.
    """
    times: dict[str, list[float]] = {name: [] for name in expressions}
    for _ in range(BURSTS):
        for name, expression in expressions.items():
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            expression()
            batch = max(1, int(1e-3 / max(time.perf_counter() - start, 1e-9)))
            end = time.perf_counter() + BURST_SECONDS
            while time.perf_counter() < end:
                start = time.perf_counter()
                for _ in range(batch):
                    expression()
                times[name].append((time.perf_counter() - start) / batch)
    return {name: statistics.median(each) for name, each in times.items()}


def quantized_mean(name: str, sample: Array) -> Row:
    """The mean of an int8 sample in real units."""
    channels = sample.shape[-1]
    flat = sample.reshape(-1, channels)
    scale, zero_point = QUANTIZATION.scale, QUANTIZATION.zero_point
    axes = tuple(range(sample.ndim - 1))

    def mean_of(total: Array) -> Array:
        return (total / len(flat) - zero_point) / scale

    return Row(
        name,
        sample.nbytes,
        lambda: prepare_input_mean([sample], QUANTIZATION),
        lambda: ((sample.astype(np.float32) - zero_point) / scale).mean(axis=axes, dtype=np.float64),
        {
            "add.reduce int32": lambda: mean_of(np.add.reduce(flat, axis=0, dtype=np.int32)),
            "sum of the transposed": lambda: mean_of(np.ascontiguousarray(flat.T).sum(axis=1, dtype=np.int32)),
            "einsum int32": lambda: mean_of(np.einsum("pc->c", flat, dtype=np.int32, casting="unsafe")),
            "mean": lambda: (sample.mean(axis=axes) - zero_point) / scale,
        },
    )


def real_mean(name: str, sample: Array) -> Row:
    """The mean of a float32 sample."""
    channels = sample.shape[-1]
    flat = sample.reshape(-1, channels)
    axes = tuple(range(sample.ndim - 1))
    ones = np.ones(len(flat), np.float32)
    return Row(
        name,
        sample.nbytes,
        lambda: prepare_input_mean([sample], None),
        lambda: sample.mean(axis=axes, dtype=np.float64),
        {
            "mean float32": lambda: sample.mean(axis=axes),
            "ones @ sample": lambda: ones @ flat / len(flat),
            "einsum": lambda: np.einsum("pc->c", flat) / len(flat),
        },
        atol=1e-3,
    )


def contraction(name: str, layout: str, shape: tuple[int, ...]) -> Row:
    """Weight error times mean input."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape, dtype=np.float32)
    quantized = fake_quantize(weights, Quantization(scale=31.0))
    axis = layout.index("I")
    mean = rng.standard_normal(shape[axis], dtype=np.float32)
    corrector = MeanBiasCorrector(mean, layout=layout)
    einsum = f"{layout},I->O"
    others = [k for k, letter in enumerate(layout) if letter != "O"]
    expanded = np.broadcast_to(mean.reshape([-1 if k == axis else 1 for k in others]), [shape[k] for k in others])
    column = np.ascontiguousarray(expanded).ravel()
    outputs_last = layout[-1] == "O"

    def multiply() -> Array:
        error = np.subtract(weights, quantized)
        return column @ error.reshape(-1, shape[-1]) if outputs_last else error.reshape(shape[0], -1) @ column

    return Row(
        name,
        2 * weights.nbytes,
        lambda: corrector.calculate(weights, quantized),
        lambda: np.einsum(einsum, weights.astype(np.float64) - quantized.astype(np.float64), mean.astype(np.float64)),
        {
            "einsum": lambda: np.einsum(einsum, weights - quantized, mean),
            "tensordot": lambda: np.tensordot(expanded, weights - quantized, (range(len(others)), others)),
            "subtract, then matmul": multiply,
        },
        atol=1e-4 * float(np.sqrt(column.size)),
    )


def rows() -> Iterator[Row]:
    """Everything that is timed; each row's arrays live only while it is."""
    rng = np.random.default_rng(0)
    for channels in (3, 64, 256, 2048):
        shape = (SAMPLE_BYTES // (64 * channels), 8, 8, channels)
        yield quantized_mean(f"mean int8 C={channels}", rng.integers(-128, 128, shape, dtype=np.int8))
    for channels in (3, 64, 256, 2048):
        shape = (SAMPLE_BYTES // (256 * channels), 8, 8, channels)
        yield real_mean(f"mean float32 C={channels}", rng.standard_normal(shape, dtype=np.float32))
    yield contraction("contraction 3x3x512x512 HWIO", "HWIO", (3, 3, 512, 512))
    yield contraction("contraction 512x512x3x3 OIHW", "OIHW", (512, 512, 3, 3))
    yield contraction("contraction 4096x4096 IO", "IO", (4096, 4096))
    yield contraction("contraction 4096x4096 OI", "OI", (4096, 4096))
    yield quantized_mean("one call: mean int8 1x7x7x16", rng.integers(-128, 128, (1, 7, 7, 16), dtype=np.int8))
    yield real_mean("one call: mean float32 1x7x7x16", rng.standard_normal((1, 7, 7, 16), dtype=np.float32))
    yield contraction("one call: contraction 3x3x16x16", "HWIO", (3, 3, 16, 16))


def measured(row: Row) -> str:
    """The row's line of the table."""
    expected = row.twin()
    for name, expression in {"ours": row.ours, **row.numpy}.items():
        np.testing.assert_allclose(expression(), expected, rtol=0, atol=row.atol, err_msg=f"{row.name}: {name}")
    times = seconds({"ours": row.ours, "twin": row.twin, **row.numpy})
    ours, twin = times["ours"], times["twin"]
    best = min(row.numpy, key=times.__getitem__)
    rate = f"{row.bytes_read / ours / 1e9:6.1f} GB/s" if row.bytes_read > 1 << 20 else f"{ours * 1e6:8.2f} us"
    return f"{row.name:<34}{rate:>12}{twin / ours:>10.1f}x{times[best] / ours:>10.2f}x  {best}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has this word")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, get_num_threads()], help="numbers of threads")
    options = parser.parse_args()
    for threads in sorted(set(options.threads)):
        set_num_threads(threads)
        print(f"\n{f'threads: {threads}':<34}{'biascorr':>12}{'to twin':>11}{'to best':>11}  best numpy")
        for row in rows():
            if options.only in row.name:
                print(measured(row), flush=True)


if __name__ == "__main__":
    main()
