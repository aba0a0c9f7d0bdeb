"""Rows of contractions: the weight error times the mean input, of weights quantized before and on the way."""

import functools
import math
from dataclasses import replace

import numpy as np

from biascorr import MeanBiasCorrector, Quantization, fake_quantize
from measure import Array, Expression, Row, Rows

try:
    import torch
except ImportError:
    torch = None

BLOCK_BYTES = 256 << 10
"""Bytes that numpy works on at a time, so that its temporaries stay in the cache."""

MATRICES = [(layout, shape) for shape in ((4096, 4096), (4096, 11008)) for layout in ("IO", "OI")]


def contractions() -> Rows:
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for c in (16, 128, 512):
        shapes += [("HWIO", (3, 3, c, c)), ("OIHW", (c, c, 3, 3)), ("HWIGO", (3, 3, c // 4, 4, c))]
    shapes += [("HWCM", (3, 3, 512, 1)), ("HWCM", (3, 3, 65536, 4)), ("IO", (1024, 1024)), ("OI", (1024, 1024))]
    for layout, shape in [*shapes, *MATRICES]:
        yield f"contraction {named(shape)} {layout}", functools.partial(contraction, layout, shape)
    for layout in ("IO", "OI"):
        yield f"two products 4096x4096 {layout}", functools.partial(two_products, layout, (4096, 4096))
    yield "contraction 4096x4096 IO w[::2]", functools.partial(contraction, "IO", (8192, 4096), step=2)


def fused_contractions() -> Rows:
    for layout, shape in [*MATRICES, ("HWIO", (3, 3, 512, 512)), ("OIHW", (512, 512, 3, 3))]:
        for grain in ("tensor", "channel"):
            row = functools.partial(fused_contraction, layout, shape, grain == "channel")
            yield f"fused {named(shape)} {layout} per {grain}", row


def small_contractions() -> Rows:
    yield "contraction 3x3x16x16 HWIO", functools.partial(contraction, "HWIO", (3, 3, 16, 16), calls=1)


def named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def random_reals(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def input_mean(layout: str, shape: tuple[int, ...]) -> tuple[str, Array]:
    """The einsum of the layout, and a mean for it with an axis of groups where the layout has one."""
    inputs, outputs = ("".join(letter for letter in letters if letter in layout) for letters in ("GCI", "GCOM"))
    return f"{layout},{inputs}->{outputs}", random_reals(tuple(shape[layout.index(letter)] for letter in inputs))


def contraction(layout: str, shape: tuple[int, ...], step: int = 1, calls: int = 0) -> Row:
    """The row of float32 weights, every `step`-th of the first axis."""
    weights = random_reals(shape)
    quantized = fake_quantize(weights, Quantization(scale=31.0))[::step]
    weights = weights[::step]
    einsum, mean = input_mean(layout, weights.shape)
    outputs = math.prod(weights.shape[layout.index(letter)] for letter in einsum.split("->")[1])
    corrector = MeanBiasCorrector(mean.ravel(), layout=layout)
    if "G" in layout or "C" in layout:
        products = grouped_products(einsum, weights, quantized, mean)
    else:
        products = matrix_products(layout, weights, quantized, mean)

    def twin() -> Array:
        return np.einsum(einsum, weights.astype(np.float64) - quantized.astype(np.float64), mean.astype(np.float64)).ravel()

    return Row(
        lambda: corrector.calculate(weights, quantized),
        twin,
        {"einsum": lambda: np.einsum(einsum, weights - quantized, mean).ravel(), **products},
        2 * weights.nbytes,
        torch_contraction(einsum, weights, quantized, mean) if torch else None,
        # A 30,000th of the shift, about: that excludes the difference of two products in float32, which loses three digits.
        atol=3e-7 * (weights.size / outputs) ** 0.5,
        calls=calls,
    )


def two_products(layout: str, shape: tuple[int, ...]) -> Row:
    """The row beside m @ W - m @ Wq, which reads as fast as BLAS does and loses the digits that both products share."""
    row, weights = contraction(layout, shape), random_reals(shape)
    quantized = fake_quantize(weights, Quantization(scale=31.0))
    _, mean = input_mean(layout, shape)
    products = {"m @ W - m @ Wq": lambda: product(layout, weights, mean) - product(layout, quantized, mean)}
    return replace(row, numpy=products, atol=1e3 * row.atol)


def matrix(layout: str, weights: Array, mean: Array) -> tuple[Array, Array]:
    """Weights as a matrix with the outputs along one axis, and the mean of each element of the other axis."""
    if layout[-1] == "O":
        rows = weights.reshape(-1, weights.shape[-1])
        return rows, np.tile(mean, len(rows) // mean.size)
    rows = weights.reshape(len(weights), -1)
    return rows, np.repeat(mean, rows.shape[1] // mean.size)


def product(layout: str, error: Array, column: Array) -> Array:
    return column @ error if layout[-1] == "O" else error @ column


def matrix_products(layout: str, weights: Array, quantized: Array, mean: Array) -> dict[str, Expression]:
    rows, column = matrix(layout, weights, mean)
    quantized_rows, _ = matrix(layout, quantized, mean)
    others = [k for k, letter in enumerate(layout) if letter != "O"]
    expanded = column.reshape([weights.shape[k] for k in others])
    return {
        "tensordot": lambda: np.tensordot(expanded, weights - quantized, (range(len(others)), others)),
        "subtract, then matmul": lambda: product(layout, rows - quantized_rows, column),
    }


def grouped_products(einsum: str, weights: Array, quantized: Array, mean: Array) -> dict[str, Expression]:
    """With groups, the whole is no one matrix product, but the sum over space is."""
    taps = weights.shape[0] * weights.shape[1]
    ones = np.ones(taps, np.float32)

    def contracted(error: Array) -> Array:
        return np.einsum(einsum.replace("HW", ""), error.reshape(weights.shape[2:]), mean).ravel()

    def over_space(array: Array) -> Array:
        return ones @ array.reshape(taps, -1)

    return {
        "sum over space, then einsum": lambda: contracted((weights - quantized).sum(axis=(0, 1))),
        "ones @ error, then einsum": lambda: contracted(over_space(weights - quantized)),
    }


def torch_contraction(einsum: str, weights: Array, quantized: Array, mean: Array) -> Expression:
    w, q, m = map(torch.from_numpy, (weights, quantized, mean))
    return lambda: torch.einsum(einsum, w - q, m).numpy().ravel()


def fused_contraction(layout: str, shape: tuple[int, ...], per_channel: bool) -> Row:
    """The row of float32 weights quantized on the way; scales are powers of two, so that float32 and float64 round alike."""
    weights = random_reals(shape)
    mean = random_reals((shape[layout.index("I")],))
    outputs = shape[layout.index("O")]
    scale = 2.0 ** np.random.default_rng(0).integers(4, 7, outputs) if per_channel else 32.0
    corrector, quantization = MeanBiasCorrector(mean, layout=layout), Quantization(scale)
    rows, column = matrix(layout, weights, mean)
    outputs_last = layout[-1] == "O"
    single = np.float32(scale).reshape(-1 if outputs_last else (-1, 1))
    steps, units = (np.broadcast_to(each, rows.shape) for each in (single, 1 / single))
    scratch = np.empty_like(rows)
    height = max(1, BLOCK_BYTES // rows[0].nbytes)
    blocks = [slice(start, min(start + height, len(rows))) for start in range(0, len(rows), height)]

    def twin() -> Array:
        quantized = np.clip(np.rint(rows * steps), -128, 127).astype(np.int8)
        error = rows - quantized / steps
        return product(layout, error.astype(np.float64), column.astype(np.float64))

    def error_of(part: slice) -> Array:
        error = scratch[: part.stop - part.start]
        np.multiply(rows[part], steps[part], out=error)
        np.rint(error, out=error)
        np.clip(error, -128, 127, out=error)
        np.multiply(error, units[part], out=error)
        return np.subtract(rows[part], error, out=error)

    def in_blocks() -> Array:
        if outputs_last:
            return np.add.reduce([column[part] @ error_of(part) for part in blocks])
        return np.concatenate([error_of(part) @ column for part in blocks])

    return Row(
        lambda: corrector.calculate_from_quantization(weights, quantization),
        twin,
        {"in place": lambda: product(layout, error_of(slice(0, len(rows))), column), "in place, in blocks": in_blocks},
        weights.nbytes,
        atol=1e-4 * column.size**0.5,
    )
