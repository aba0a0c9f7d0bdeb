"""Compares the kernels with the machine's memory and with numpy, as ratios measured in one run.

    make bench                                            all rows
    make bench BENCH="--only mean int8 C=64"              rows whose name has all these words
    make bench BENCH="--quick --only contraction OIHW"    fewer bursts, smaller samples
    make bench BENCH="--only decoder"                     whole networks: see decoders.py and big_graphs.py

Each row first checks that all expressions agree. `of read` is the part of the memory bandwidth reached: the time of reading the
same bytes and doing nothing else, with as many threads, measured in turns with the row. `twin` is the plain numpy code that a
user would write. `best` is the fastest numpy expression known here that is accurate enough, named in the last column. `torch`
is timed where it is installed (group `bench` of pyproject.toml). The ratios are for the last number of threads; above 1,
biascorr is faster.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from itertools import chain

import big_graphs
import decoders
from biascorr import get_num_threads
from contractions import contractions, fused_contractions, small_contractions
from means import channel_means, listed_means, small_means, tap_means
from measure import Row, Rows, Times, duration, measured

LARGE_BYTES, BURSTS = 512 << 20, 3
QUICK_BYTES, QUICK_BURSTS = 64 << 20, 2
IMPORTS = 15


def sections(large: int) -> dict[str, Rows]:
    """All rows; samples outside the caches have `large` bytes, those of taps a quarter."""
    return {
        "means per channel": chain(channel_means(large), listed_means(large)),
        "means per kernel tap": tap_means(large),
        "weight error times mean": contractions(),
        "weight error times mean, quantized on the way": fused_contractions(),
        "one call": chain(small_means(), small_contractions()),
    }


def line(name: str, cells: list[str], note: str) -> str:
    return f"{name:<46}" + "".join(f"{cell:>12}" for cell in cells) + f"  {note}"


def header(section: str, threads: list[int], torch: bool) -> str:
    cells = [cell for count in threads for cell in (f"{count} thread{'s' * (count > 1)}", "of read")]
    ratios = ["scaling"] * (len(threads) > 1) + ["to twin"] + ["to torch"] * torch + ["to best"]
    return "\n" + line(section, cells + ratios, "best numpy")


def cells(row: Row, times: Times, torch: bool) -> list[str]:
    """Rate and part of the bandwidth for each number of threads, then the ratios."""
    ours = list(times.ours.values())
    texts = []
    for count, seconds in times.ours.items():
        if row.calls:
            texts += [f"{seconds / row.calls * 1e6:.2f} us", ""]
        else:
            texts += [f"{row.bytes_read / seconds / 1e9:.1f} GB/s", f"{100 * times.probe[count] / seconds:.0f} %"]
    scaling = [ratio(ours[0], ours[-1])] if len(ours) > 1 else []
    to_torch = [ratio(times.torch, ours[-1]) if times.torch else ""] if torch else []
    return [*texts, *scaling, ratio(times.twin, ours[-1]), *to_torch, ratio(times.best, ours[-1])]


def ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.{0 if theirs > 20 * ours else 1 if theirs > 2 * ours else 2}f}x"


def import_cost() -> str:
    """The milliseconds that importing biascorr adds to importing numpy, in processes that take turns."""
    names = ("numpy", "biascorr")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # from bytecode, as an installation does
    runs: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(IMPORTS):
        for name in names:
            command = [sys.executable, "-c", f"import {name}"]
            runs[name].append(duration(lambda command=command: subprocess.run(command, check=True, env=environment), 1))
    numpy, ours = (1e3 * statistics.median(runs[name][1:]) for name in names)
    return f"{'import biascorr over import numpy':<46}{f'{ours - numpy:.1f} ms':>12}  ({numpy:.0f} ms with numpy alone)"


def print_networks(words: set[str]) -> None:
    """Rows of whole networks, which print themselves: they have other columns."""
    for module in (decoders, big_graphs):
        module.print_rows([row for row in module.ROWS if words <= set(f"{module.SECTION} {row.name}".split())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has all these words")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, get_num_threads()], help="numbers of threads")
    parser.add_argument("--quick", action="store_true", help="fewer bursts, smaller samples, no networks")
    options = parser.parse_args()
    large, bursts = (QUICK_BYTES, QUICK_BURSTS) if options.quick else (LARGE_BYTES, BURSTS)
    threads, torch, words = sorted(set(options.threads)), importlib.util.find_spec("torch") is not None, set(options.only)
    for section, rows in sections(large).items():
        title = header(section, threads, torch)
        for name, make in rows:
            if words <= set(f"{section} {name}".replace(",", "").split()):
                row = make()
                times = measured(row, threads, bursts, large)
                print(title + "\n" if title else "", line(name, cells(row, times, torch), times.best_name), sep="", flush=True)
                title = ""
    if words <= {"import", "biascorr", "numpy"}:
        print("\n" + import_cost())
    if not options.quick:
        print_networks(words)


if __name__ == "__main__":
    main()
