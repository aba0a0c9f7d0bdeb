"""Times corrections on workers of a cluster on this machine beside the same by threads of one process, and counts what travels.

    python benches/cluster.py [NETWORK.onnx SAMPLES.npy] [--methods auto squared mean] [--workers 1 2 4] [--samples 40]

Without a network: the classifier of text lines of rapidocr-onnxruntime, which `make demo` fetches, and random samples. It is
quantized by onnxruntime (int8 QDQ). Each worker has its share of the CPUs as threads. Samples, networks and commands are what
went to workers, results what came back, in kB; networks are read from a file, as workers here see the same one. Each result is
compared with that without a cluster: all bits are the same. What a command takes where there is nothing to do is the least of
some, in ms.
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from distributed import Client, LocalCluster
from rich import box
from rich.console import Console
from rich.table import Table

from biascorr import Correction, correct
from biascorr.adapters.loading import network_from_model
from biascorr.calibration.resources import available_cpus
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.sweep.cluster import ClusterShards
from biascorr.sweep.plan import plan_stages
from biascorr.sweep.shard import Shard
from quality import by_onnxruntime, prepared

CALIBRATED = 8
"""Samples that the quantizer gets."""

COMMANDS = 50
"""Commands that have nothing to do."""

SHAPE = 3, 48, 192
"""Of a sample of the classifier."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--methods", nargs="+", default=["auto", "squared", "mean"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--samples", type=int, default=40)
    return parser.parse_args()


def classifier() -> Path:
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no network: make demo")
    return Path(spec.submodule_search_locations[0]) / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"


class Counted(ClusterShards):
    """Keeps what was counted of the run that ended last."""

    last: Any = None

    def __exit__(self, *error: object) -> None:
        Counted.last = self
        super().__exit__(*error)


def nothing(_: Shard, batches: Sequence[int]) -> Iterator[None]:
    return iter([None] * len(batches))


def overhead(client: Client, count: int) -> float:
    """Seconds of a command to so many workers that has nothing to do."""
    samples = Samples(Storage(0))
    for _ in range(count):
        samples.add({"x": np.zeros(1)}, 1)
    with ClusterShards(client, samples, None, None) as shards:
        taken = []
        for _ in range(COMMANDS):
            started = time.perf_counter()
            list(shards.each(nothing, range(count)))
            taken.append(time.perf_counter() - started)
    return min(taken)


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    samples = (
        np.random.default_rng(0).normal(0, 0.5, (options.samples, *SHAPE)).astype(np.float32)
        if options.data is None
        else np.load(options.data)[: options.samples]
    )
    reference = prepared(options.network or classifier())
    (name,) = (each.name for each in network_from_model(reference, "reference").inputs)
    batches = [{name: each[None]} for each in samples]
    quantized = by_onnxruntime(reference, batches[:CALIBRATED], per_channel=False)
    network = network_from_model(quantized, "quantized")
    stages, channels = len(plan_stages(network, network.layers)), sum(layer.channels for layer in network.layers)
    size = len(quantized.SerializeToString())
    Console().print(
        f"{len(batches)} batches of {samples[0].nbytes / 1e3:.0f} kB, {stages} stages, {channels} channels, "
        f"{size / 1e6:.1f} MB, {available_cpus()} CPUs",
        highlight=False,
    )

    def timed(method: str, **how: Any) -> tuple[float, Correction[onnx.ModelProto]]:
        started = time.perf_counter()
        found = correct(reference, batches, quantized=quantized, method=method, **how)
        return time.perf_counter() - started, found

    expected = {}
    for method in options.methods:
        timed(method)
        seconds, expected[method] = timed(method)
        yield [method, "threads", f"{seconds:.1f}", *[""] * 6]
    for count in options.workers:
        threads = max(1, available_cpus() // count)
        with (
            LocalCluster(n_workers=count, threads_per_worker=threads, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            timed("mean", client=client)
            yield ["a command", str(count), "", "", "", "", "", "", f"{1e3 * overhead(client, count):.0f}"]
            for method in options.methods:
                seconds, found = timed(method, client=client)
                assert found.model == expected[method].model
                assert found.scores == expected[method].scores
                shards = Counted.last
                sent = [shards.sent[kind] for kind in ("samples", "networks", "commands")]
                counts = [f"{size / 1e3:,.0f}" for size in [*sent, shards.received]]
                yield [method, str(count), f"{seconds:.1f}", str(shards.commands), *counts, ""]


def main() -> None:
    from biascorr.sweep import cluster

    cluster.ClusterShards = Counted  # type: ignore[misc]
    warnings.simplefilter("ignore")
    table = Table(box=box.MARKDOWN)
    for title in ("method", "workers", "seconds", "number", "samples", "networks", "commands", "results", "ms"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows(parse_options()):
        table.add_row(*row)
        print(" ".join(row), flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
