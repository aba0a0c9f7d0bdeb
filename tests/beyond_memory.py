"""A correction from samples that are four times as large as the memory of the control group that it runs in.

    python tests/beyond_memory.py FOLDER KIND BATCH_SIZE [METHOD]

Prints the digests of the corrected model and of the samples.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from biascorr import QuantParams, correct
from networks import biases, model_from_text, weights

LIMIT = 192 << 20
"""Bytes of the group: twice what imports take."""

SIDE = 512
SHAPE = (4 * LIMIT // (3 * SIDE * SIDE * 4), 3, SIDE, SIDE)

ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_group(limit: int = LIMIT) -> Iterator[Path | None]:
    """A control group of this much memory, version 1 or 2; None where none can be made."""
    name = f"biascorr-test-{os.getpid()}"
    if (ROOT / "memory/memory.limit_in_bytes").exists():
        group, limit_file = ROOT / "memory" / name, "memory.limit_in_bytes"
    else:
        group, limit_file = ROOT / name, "memory.max"
    try:
        group.mkdir()
        (group / limit_file).write_text(str(limit))
    except OSError:  # or no controller of memory below the root
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def run_in(group: Path, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command in a group, without swapping."""
    script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    return subprocess.run(["sh", "-c", script, str(group), *command], capture_output=True, text=True, check=False, **options)


def model() -> onnx.ModelProto:
    """Whose activations are small beside its inputs."""
    text = f"""g (float[N,3,{SIDE},{SIDE}] x) => (float[N,5] y) {{
        [first] a = Conv<strides=[8,8]>(x, w1, b1)
        [relu] r = Relu(a)
        [second] c = Conv<strides=[2,2]>(r, w2, b2)
        [mean] m = GlobalAveragePool(c)
        [flatten] f = Flatten(m)
        [last] y = Gemm<transB=1>(f, w3, b3)
    }}"""
    constants = {"w1": weights(4, 3, 8, 8), "w2": weights(6, 4, 3, 3), "w3": weights(5, 6)}
    return model_from_text(text, **constants, b1=biases(4), b2=biases(6), b3=biases(5))


def made(number: int) -> Any:
    """A sample."""
    first = np.random.default_rng(0).integers(-4, 12, SHAPE[1:]).astype(np.float32) / 8
    return np.roll(first, number, 2)


def write(path: Path) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=SHAPE)
    for number in range(SHAPE[0]):
        array[number] = made(number)


def data_of(kind: str, folder: Path) -> Any:
    if kind == "path":
        return folder / "x.npy"
    if kind == "memory-mapped":
        return np.load(folder / "x.npy", mmap_mode="r")
    if kind == "generator":
        return (made(number)[None] for number in range(SHAPE[0]))
    if kind == "zarr":
        import zarr

        return zarr.open(str(folder / "x.zarr"), mode="r")
    if kind == "dask":
        import dask.array

        return dask.array.from_array(np.load(folder / "x.npy", mmap_mode="r"), chunks=(5, 3, SIDE, SIDE))
    assert kind == "array"
    return np.load(folder / "x.npy")


def main(folder: str, kind: str, batch_size: str, method: str = "mean") -> None:
    data = data_of(kind, Path(folder))
    found = correct(model(), data, quant_params=QuantParams(), method=method, batch_size=int(batch_size))
    print(hashlib.sha256(found.model.SerializeToString()).hexdigest(), found.data_digest)


if __name__ == "__main__":
    main(*sys.argv[1:])
