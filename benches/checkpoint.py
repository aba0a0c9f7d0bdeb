"""What a checkpoint costs: seconds, files and bytes, and how soon a run that was killed has its first new result.

python benches/checkpoint.py float.onnx quantized.onnx samples.npy
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from biascorr import correct
from biascorr.sweep.checkpoint import Checkpoint

PARTS = (0.25, 0.5, 0.75)
"""Parts of the results that are there when a run goes on."""


class Stopped(BaseException):
    """Ends a run at its first new result."""


def seconds_of(run: Callable[[], Any]) -> tuple[float, float]:
    """Of the CPU and of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - clock


def shown(label: str, seconds: tuple[float, float]) -> None:
    print(f"{label:32} {seconds[0]:7.1f} s of the CPU {seconds[1]:7.1f} s")


def until_new(run: Callable[[], Any]) -> None:
    """Runs until something new is to be kept."""

    def stop(*_: Any) -> None:
        raise Stopped

    keep, Checkpoint.keep = Checkpoint.keep, stop  # type: ignore[method-assign]
    try:
        run()
    except Stopped:
        pass
    finally:
        Checkpoint.keep = keep  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("reference", "quantized", "samples"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--method", default="auto")
    given = parser.parse_args()
    data = np.load(given.samples)

    def run(folder: Path | None) -> None:
        correct(given.reference, data, quantized=given.quantized, method=given.method, checkpoint=folder)

    shown("without a checkpoint", seconds_of(lambda: run(None)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoint"
        shown("with one", seconds_of(lambda: run(place)))
        records = sorted(place.glob("*.record"))
        print(f"{len(records)} files, {sum(path.stat().st_size for path in records) / 1e6:.1f} MB")
        shown("again, all of it there", seconds_of(lambda: run(place)))
        for part in reversed(PARTS):
            for path in place.glob("*.record"):
                if int(path.stem) >= part * len(records):
                    path.unlink()
            shown(f"first new result, {part:.0%} there", seconds_of(lambda: until_new(lambda: run(place))))


if __name__ == "__main__":
    main()
