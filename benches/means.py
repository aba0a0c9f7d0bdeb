"""Rows of means: per channel, per kernel tap, of one small sample and of many."""

import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from biascorr import Quantization, prepare_input_mean
from biascorr.statistics import TapMean
from biascorr.windows import Window
from measure import Array, Expression, Row, Rows

try:
    import torch
except ImportError:
    torch = None

CACHE_BYTES = 512 << 10
"""Bytes that fit into the second level of cache of a core."""

QUANTIZATION = Quantization(scale=37.5, zero_point=-3)
DTYPES = ("int8", "uint8", "int16", "float16", "bfloat16", "float32")
SIDES = {1: 224, 3: 224, 16: 112, 64: 56, 256: 28, 2048: 7}
"""Height and width of activations with so many channels, as in image networks."""


def channel_means(large: int) -> Rows:
    """Samples in the cache, and of `large` bytes."""
    for dtype in DTYPES:
        for size, nbytes in (("cache", CACHE_BYTES), (f"{large >> 20}MB", large)):
            for channels in SIDES:
                for axis, layout in ((-1, "channels-last"), (1, "channels-first")):
                    row = functools.partial(sized_mean, dtype, channels, axis, nbytes, large)
                    yield f"mean {dtype} C={channels} {layout} {size}", row


def listed_means(large: int) -> Rows:
    """Lists of samples of one image each, as calibration has them."""
    for dtype in ("int8", "float32"):
        for channels, side in ((2048, 7), (512, 7), (512, 14), (64, 56)):
            row = functools.partial(listed_mean, dtype, (1, channels, side, side), large)
            yield f"mean {dtype} list of 1x{channels}x{side}x{side} channels-first {large >> 20}MB", row


def tap_means(large: int) -> Rows:
    nbytes = large // 4
    for dtype in ("int8", "float32"):
        yield f"tap mean {dtype} 3x3 64x56x56 {nbytes >> 20}MB", functools.partial(tap_mean, dtype, nbytes)


def small_means() -> Rows:
    for dtype in ("int8", "float32"):
        yield f"mean {dtype} 1x7x7x16", functools.partial(small_mean, dtype)
    yield "mean int8 1x7x7x16, per sample of 1000", mean_of_many


def sized_mean(dtype: str, channels: int, axis: int, nbytes: int, buffer: int) -> Row:
    """The mean of as many images as fit, of a smaller one if not even one does."""
    values = random_values(dtype, buffer)
    elements = nbytes // values.itemsize
    side = min(SIDES[channels], math.isqrt(elements // channels))
    count = elements // (channels * side**2)
    shape = (count, side, side, channels) if axis == -1 else (count, channels, side, side)
    return mean(values[: math.prod(shape)].reshape(shape), axis)


def small_mean(dtype: str) -> Row:
    return mean(random_sample(dtype, (1, 7, 7, 16)), -1, calls=1)


@functools.lru_cache(maxsize=1)
def random_values(dtype: str, nbytes: int) -> Array:
    """The whole range of an integer dtype; standard normal values of a real one."""
    rng, target = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = nbytes // target.itemsize
    if target.kind in "iu":
        info = np.iinfo(target)
        return rng.integers(info.min, info.max, size, dtype=target, endpoint=True)
    return rng.standard_normal(size, dtype=np.float32).astype(target, copy=False)


def random_sample(dtype: str, shape: tuple[int, ...]) -> Array:
    return random_values(dtype, math.prod(shape) * np.dtype(dtype).itemsize).reshape(shape)


def mean(sample: Array, axis: int, calls: int = 0) -> Row:
    """The mean per channel: of integers in real units, of real numbers as they are."""
    integers = sample.dtype.kind in "iu"
    channels = sample.shape[axis]
    axes = tuple(k for k in range(4) if k != axis % 4)
    channels_last = sample if axis == -1 else sample.transpose(0, 2, 3, 1)
    scale, zero_point = QUANTIZATION.scale, QUANTIZATION.zero_point

    def mean_of(total: Expression) -> Array:
        columns = total()
        folded = columns.reshape(-1, channels).sum(axis=0) if axis == -1 else columns.reshape(channels, -1).sum(axis=1)
        average = folded / (sample.size // channels)
        return (average - zero_point) / scale if integers else average

    def twin() -> Array:
        real = (sample.astype(np.float32) - zero_point) / scale if integers else sample
        return real.mean(axis=axes, dtype=np.float64)

    sums = integer_sums(sample, axis) if integers else real_sums(sample, axis)
    return Row(
        lambda: prepare_input_mean([channels_last], QUANTIZATION if integers else None),
        twin,
        {name: functools.partial(mean_of, total) for name, total in sums.items()},
        sample.nbytes,
        functools.partial(mean_of, torch_sum(sample, axes)) if torch else None,
        atol=1e-4 if integers else 1e-3,
        calls=calls,
    )


def matrices(sample: Array, axis: int) -> dict[str, Array]:
    """Views whose columns add up to the channels' sums, once the sums of the same channel are added."""
    views = {"images": sample.reshape(len(sample), -1)}
    if axis == -1:
        views["lines"] = sample.reshape(-1, sample.shape[2] * sample.shape[3])
        if sample.shape[-1] >= 16:  # shorter rows are never fastest, and take seconds
            views["positions"] = sample.reshape(-1, sample.shape[-1])
    return views


def integer_sums(sample: Array, axis: int) -> dict[str, Expression]:
    """Sums of columns in the narrowest integers that hold them."""
    bits = 8 * sample.itemsize
    double = np.dtype(f"{sample.dtype.kind}{2 * sample.itemsize}")

    def exact(count: int) -> type[np.integer[Any]]:
        return np.int32 if count << bits < 1 << 31 else np.int64

    def in_blocks(rows: Array) -> Array:
        """Blocks of rows that integers of twice the width can hold the sum of."""
        size = min(len(rows), 1 << bits)
        whole = len(rows) // size * size
        blocks = rows[:whole].reshape(-1, size, rows.shape[1])
        total = np.einsum("bpc->bc", blocks, dtype=double).sum(axis=0, dtype=np.int64)
        return total + np.add.reduce(rows[whole:], axis=0, dtype=np.int64) if whole < len(rows) else total

    sums: dict[str, Expression] = {}
    for name, rows in matrices(sample, axis).items():
        dtype = exact(len(rows))
        sums[f"add.reduce of {name}"] = functools.partial(np.add.reduce, rows, axis=0, dtype=dtype)
        sums[f"einsum of {name}"] = functools.partial(np.einsum, "pc->c", rows, dtype=dtype)
        sums[f"{double} einsum of blocks of {name}"] = functools.partial(in_blocks, rows)
    if axis == 1:
        planes = sample.reshape(*sample.shape[:2], -1)
        dtype = exact(planes[:, 0].size)
        sums["einsum of planes"] = functools.partial(np.einsum, "ncs->c", planes, dtype=dtype)
        sums["sum over space, then batch"] = lambda: planes.sum(axis=-1, dtype=np.int32).sum(axis=0, dtype=np.int64)
    return sums


def real_sums(sample: Array, axis: int) -> dict[str, Expression]:
    """Sums of columns in float32, by BLAS where it takes the dtype; also in float64 where numpy converts slowly anyway."""
    single = sample.dtype == np.float32
    sums: dict[str, Expression] = {}
    for name, rows in matrices(sample, axis).items():
        sums[f"add.reduce of {name}"] = functools.partial(np.add.reduce, rows, axis=0, dtype=np.float32)
        if single:
            sums[f"ones @ {name}"] = functools.partial(np.matmul, np.ones(len(rows), np.float32), rows)
            sums[f"einsum of {name}"] = functools.partial(np.einsum, "pc->c", rows)
        else:
            sums[f"float64 add.reduce of {name}"] = functools.partial(np.add.reduce, rows, axis=0, dtype=np.float64)
    if axis == 1:
        planes = sample.reshape(*sample.shape[:2], -1)
        ones = np.ones(planes.shape[-1], np.float32)
        sums["sum over space, then batch"] = lambda: planes.sum(axis=-1, dtype=np.float32).sum(axis=0)
        if single:
            sums["planes @ ones"] = lambda: (planes.reshape(-1, ones.size) @ ones).reshape(len(planes), -1).sum(axis=0)
    return sums


def torch_sum(sample: Array, axes: tuple[int, ...]) -> Expression:
    """Sums of integers in int64, because int32 would overflow; of others in float32."""
    half = sample.dtype == ml_dtypes.bfloat16  # which torch does not take from numpy
    tensor = torch.from_numpy(sample.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(sample)
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return lambda: tensor.sum(axes, dtype=dtype).numpy()


def listed_mean(dtype: str, shape: tuple[int, ...], nbytes: int) -> Row:
    """The mean of a list of samples, channels first, that are arrays of their own."""
    count = nbytes // (math.prod(shape) * np.dtype(dtype).itemsize)
    samples = [sample.copy() for sample in random_sample(dtype, (count, *shape))]
    planes = [sample.reshape(shape[1], -1) for sample in samples]
    channels_last = [sample.transpose(0, 2, 3, 1) for sample in samples]
    positions = count * math.prod(shape[2:])
    narrow = np.int32 if dtype == "int8" else np.float32

    def sum_of_sums(total: Callable[[Array], Array]) -> Array:
        return np.add.reduce([total(plane) for plane in planes], axis=0, dtype=np.float64) / positions

    return Row(
        lambda: prepare_input_mean(channels_last, None),
        lambda: sum_of_sums(lambda plane: plane.sum(axis=1, dtype=np.float64)),
        {
            "sum of sums": lambda: sum_of_sums(lambda plane: np.add.reduce(plane, axis=1, dtype=narrow)),
            "sum of einsums": lambda: sum_of_sums(lambda plane: np.einsum("cs->c", plane, dtype=narrow)),
        },
        sum(sample.nbytes for sample in samples),
        atol=1e-3,
    )


def mean_of_many() -> Row:
    """The mean of a list of 1000 small quantized samples."""
    samples = list(random_sample("int8", (1000, 1, 7, 7, 16)))
    scale, zero_point = QUANTIZATION.scale, QUANTIZATION.zero_point

    def mean_of_sample(sample: Array) -> Array:
        return ((sample.astype(np.float32) - zero_point) / scale).mean(axis=(0, 1, 2), dtype=np.float64)

    def real(columns: Array) -> Array:
        return (columns.reshape(-1, 16).sum(axis=0) / (1000 * 7 * 7) - zero_point) / scale

    return Row(
        lambda: prepare_input_mean(samples, QUANTIZATION),
        lambda: np.mean([mean_of_sample(sample) for sample in samples], axis=0),
        {
            "concatenate, then add.reduce": lambda: real(np.concatenate(samples).reshape(1000, -1).sum(axis=0, dtype=np.int32)),
            "concatenate, then einsum": lambda: real(
                np.einsum("pc->c", np.concatenate(samples).reshape(1000, -1), dtype=np.int32)
            ),
            "sum of sums": lambda: real(sum(np.add.reduce(each, axis=(0, 1, 2), dtype=np.int32) for each in samples)),
        },
        sum(sample.nbytes for sample in samples),
        calls=len(samples),
    )


def tap_mean(dtype: str, nbytes: int) -> Row:
    """The mean that each tap of a 3x3 kernel sees of 64 channels of 56x56, a padding of 1 included."""
    image = (64, 56, 56)
    count = nbytes // (math.prod(image) * np.dtype(dtype).itemsize)
    sample = random_sample(dtype, (count, *image))
    quantization = QUANTIZATION if dtype == "int8" else None
    window = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))

    def ours() -> Array:
        taps = TapMean(window)
        taps.update(sample)
        return taps.mean(quantization)

    def real(array: Array) -> Array:
        return (array - np.float32(QUANTIZATION.zero_point)) / np.float32(QUANTIZATION.scale) if quantization else array

    def slices(array: Array) -> Array:
        padded = np.pad(array, ((0, 0), (0, 0), (1, 1), (1, 1)))
        taps = [padded[:, :, y : y + 56, x : x + 56] for y, x in np.ndindex(3, 3)]
        return np.stack([tap.mean(axis=(0, 2, 3), dtype=np.float64) for tap in taps]).reshape(3, 3, -1)

    def of_mean_image(total: Expression) -> Array:
        return slices(real(total().reshape(1, *image) / count))

    sums = integer_sums(sample, 1) if quantization else real_sums(sample, 1)
    images = {name: total for name, total in sums.items() if name.endswith("images")}
    return Row(
        ours,
        lambda: slices(real(sample)),
        {f"{name}, then slices": functools.partial(of_mean_image, total) for name, total in images.items()},
        sample.nbytes,
        atol=1e-3,
    )
