"""Correct on a cluster of machines that Dask starts for this run.

    python examples/cluster.py                                            two workers on this machine
    python examples/cluster.py --ssh first,second,third                   on machines that ssh reaches without a password
    python examples/cluster.py --kubernetes IMAGE --workers 20            as pods, by Dask's operator
    python examples/cluster.py --scheduler tcp://host:8786                on a cluster that is there already

    ... FLOAT.onnx QUANTIZED.onnx SAMPLES                                 your files; else a small network

SAMPLES is an .npy or .npz file, a folder of them, or module:function, which returns an array. The result goes to
build/corrected-on-cluster.onnx, or to --output.

`--ssh` needs asyncssh here (pip install asyncssh); the scheduler runs on the first machine, a worker on each. `--kubernetes`
needs dask-kubernetes here and its operator in the cluster; the image has biascorr[dask,onnx] in it. Wherever workers and the
scheduler run, they need the same version of biascorr as here.
"""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
from distributed import Client, LocalCluster

import biascorr

ROOT = Path(__file__).resolve().parent.parent

NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
    network (float[N,3,8,8] x) => (float[N,5] y) {
        [first] a = Conv<pads=[1,1,1,1]>(x, w1)
        r = Relu(a)
        [second] b = Conv(r, w2)
        s = Relu(b)
        m = GlobalAveragePool(s)
        f = Flatten(m)
        [last] y = MatMul(f, w3)
    }"""

SHAPES = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 5)}


def small_network() -> onnx.ModelProto:
    model, rng = onnx.parser.parse_model(NETWORK), np.random.default_rng(0)
    arrays = {name: rng.normal(0.1, 0.3, shape).astype(np.float32) for name, shape in SHAPES.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="the float file, the quantized one, samples")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ssh", metavar="HOST,HOST", help="machines, the first one for the scheduler too")
    where.add_argument("--kubernetes", metavar="IMAGE", help="the image of scheduler and workers")
    where.add_argument("--scheduler", metavar="ADDRESS", help="a scheduler that runs already")
    parser.add_argument("--workers", type=int, default=2, help="workers on this machine, or pods")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "corrected-on-cluster.onnx")
    options = parser.parse_args()
    if len(options.files) not in (0, 3):
        parser.error("expected the float file, the quantized one, and samples; or none of them")
    return options


def started(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """The cluster; at its end, its processes are gone."""
    if options.ssh:
        from distributed import SSHCluster

        hosts = options.ssh.split(",")
        return SSHCluster([hosts[0], *hosts], scheduler_options={"port": 0})
    if options.kubernetes:
        from dask_kubernetes.operator import KubeCluster

        return KubeCluster(name="biascorr", image=options.kubernetes, n_workers=options.workers)
    return LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=":0")


def corrected(options: argparse.Namespace, client: Client) -> biascorr.Correction:
    print(f"{len(client.nthreads())} workers at {client.scheduler.address}")
    if options.files:
        reference, quantized, samples = options.files
        return biascorr.correct(reference, samples, quantized=quantized, method=options.method, client=client)
    samples = np.random.default_rng(1).normal(0.5, 1, (64, 3, 8, 8)).astype(np.float32)
    params = biascorr.QuantParams(weight_bits=4)
    return biascorr.correct(small_network(), samples, quant_params=params, method=options.method, client=client)


def main() -> None:
    options = parse_options()
    if options.scheduler:
        with Client(options.scheduler) as client:
            correction = corrected(options, client)
    else:
        with started(options) as cluster, Client(cluster) as client:
            client.wait_for_workers(1)
            correction = corrected(options, client)
    print(correction)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    correction.save(options.output, force=True)
    print(options.output)


if __name__ == "__main__":  # workers on this machine import this file
    main()
