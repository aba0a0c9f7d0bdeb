"""Corrections on the workers of a cluster: the same bits as here, whatever becomes of the workers."""

import asyncio
import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import distributed
import numpy as np
import onnx
import pytest
from distributed import Client, LocalCluster

import cluster_faults as faults
import command_line
from biascorr import QuantParams, correct, images
from biascorr.sweep import cluster as on_cluster
from networks import batch_norm, batch_norm_constants, biases, model_from_text, quantized, samples, two_layers, weights

METHODS = ["auto", "squared", "iterative", "mean", "empirical", "activation", "hybrid", "analytical"]

MEASURE = "biascorr.sweep.sweep:stage_measurements"
SCORE = "biascorr.correction.scoring:errors_of_outputs"

PARAMS = QuantParams("tf", weight_bits=4)


class Workers:
    """Workers in processes of their own, as many as are asked for, whole again whatever became of them."""

    def __init__(self):
        self.cluster = LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0", memory_limit="8GB")
        self.client = Client(self.cluster, set_as_default=False)

    def client_of(self, count):
        self.cluster.scale(count)
        self._wait(lambda: len(self.addresses) == count)
        self.client.run(faults.mend)
        return self.client

    def arm(self, worker, fault, *arguments, **options):
        """Has a function of tests/cluster_faults.py run on a worker, by its number."""
        return self.client.run(fault, *arguments, workers=[self.addresses[worker]], **options)

    def pid(self, worker):
        (pid,) = self.client.run(os.getpid, workers=[self.addresses[worker]]).values()
        return pid

    def begin_anew(self):
        self.cluster.scale(0)
        self._wait(lambda: not self.addresses)

    @property
    def addresses(self):
        return sorted(self.client.nthreads())

    def assert_free(self):
        self._wait(lambda: not any(self.client.run(faults.left).values()))

    def _wait(self, condition):
        end = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < end, self.client.run(faults.left)
            time.sleep(0.05)

    def close(self):
        self.client.close()
        self.cluster.close()


@pytest.fixture(scope="module")
def running():
    workers = Workers()
    yield workers
    workers.close()


@pytest.fixture
def workers(running, caplog):
    """The same; at the end of each test nothing is left on them."""
    caplog.set_level("CRITICAL", "distributed")
    caplog.set_level("INFO", "biascorr")
    yield running
    running.assert_free()


@pytest.fixture
def two(workers):
    return workers.client_of(2)


def norms():
    """Layers around batch normalizations, a layer without any, another one that is called twice."""
    text = f"""g (float[N,3,6,6] x) => (float[N,4] y) {{
        [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        {batch_norm("a", "n")}
        r = Relu(n)
        [second] c = Conv(r, w2)
        s = Relu(c)
        [third] d = Conv<pads=[1,1,1,1]>(s, w3, b3)
        [again] e = Conv<pads=[1,1,1,1]>(d, w3, b3)
        m = GlobalAveragePool(e)
        y = Flatten(m)
    }}"""
    constants = {"w1": weights(4, 3, 3, 3), "w2": weights(4, 4, 3, 3), "w3": weights(4, 4, 3, 3)}
    return model_from_text(text, **constants, b1=biases(4), b3=biases(4), **batch_norm_constants(4))


def probabilities():
    model = two_layers()
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["z"], ["y"], "probabilities"))
    return model


@functools.cache
def int8():
    return quantized(two_layers(), [{"x": each} for each in samples(8, 1, 3, 6, 6)])


def difference(outputs, reference):
    return -float(np.abs(outputs["y"] - reference["y"]).mean())


def evaluate(run):
    return -float(np.square(run(samples(3, 3, 6, 6))["y"]).mean())


def said(correction):
    """All that a correction says, but for what takes time."""
    model = correction.model.SerializeToString() if isinstance(correction.model, onnx.ModelProto) else correction.model
    record = {name: value for name, value in correction.to_dict().items() if name not in ("seconds", "files")}
    return model, repr(record), [repr(vars(score)) for score in correction.scores.values()]


def corrected(model, data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return said(correct(model, data, **options))


def arguments_of(**options):
    return {"quant_params": PARAMS, **options} if "quantized" not in options else options


@functools.cache
def at_home(method="squared"):
    return corrected(two_layers(), samples(24, 3, 6, 6), method=method, quant_params=PARAMS)


def on(client, method="squared", **options):
    return corrected(two_layers(), samples(24, 3, 6, 6), method=method, quant_params=PARAMS, client=client, **options)


CASES = {
    **{f"given {method}": (two_layers, {"method": method, "quantized": int8}) for method in METHODS},
    **{f"simulated {method}": (norms, {"method": method}) for method in METHODS},
    "activations": (two_layers, {"quant_params": lambda: QuantParams("tf", weight_bits=4, activation_bits=6)}),
    "equalized": (norms, {"equalize": True}),
    "folded": (norms, {"fold": True, "method": "analytical"}),
    "probabilities": (probabilities, {}),
    "metric": (two_layers, {"metric": lambda: difference}),
    "lambda": (two_layers, {"metric": lambda: lambda outputs, reference: -float(np.ptp(outputs["y"] - reference["y"]))}),
    "runs": (two_layers, {"metric": lambda: evaluate}),
    "validation": (two_layers, {"method": "squared", "validation": lambda: samples(7, 3, 6, 6, seed=5)}),
    "batches": (two_layers, {"batch_size": 5}),
    "no budget": (two_layers, {"memory_budget": 0}),
    "few samples": (two_layers, {"method": "empirical", "max_samples": 3}),
}


@functools.cache
def case(name):
    """The model, the options, and what is said without a cluster."""
    model, options = CASES[name]
    options = arguments_of(**{key: value() if callable(value) else value for key, value in options.items()})
    return model(), options, corrected(model(), samples(24, 3, 6, 6), **options)


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count in (1, 2, 4) for name in CASES if count == 2 or name.startswith("given")]
)
def test_workers_give_the_same_bits_as_this_process(count, name, workers):
    model, options, expected = case(name)
    assert corrected(model, samples(24, 3, 6, 6), client=workers.client_of(count), **options) == expected


def test_images(tmp_path, two):
    from PIL import Image

    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = [corrected(two_layers(), images(tmp_path), quant_params=PARAMS, **options) for options in ({}, {"client": two})]
    assert found[0] == found[1]


def test_tflite_file(two):
    pytest.importorskip("ai_edge_litert")
    from tflite_networks import content_of, samples_of

    found = [
        corrected(
            content_of("convolutions"), samples_of("convolutions", 8), quantized=content_of("convolutions-int8"), **options
        )
        for options in ({}, {"client": two})
    ]
    assert found[0] == found[1]


def metric_of_a_script():
    """A worker cannot import what it is in."""
    module = types.ModuleType("__main__")
    exec("import numpy\ndef metric(outputs, reference): return -float(numpy.abs(outputs['y']).max())", module.__dict__)
    return module.metric


def test_metric_of_a_script(two):
    metric = metric_of_a_script()
    assert on(two, "auto", metric=metric) == corrected(two_layers(), samples(24, 3, 6, 6), quant_params=PARAMS, metric=metric)


KILLED = {
    "as it is opened": ("biascorr.sweep.cluster:_add", 1, False),
    "as it gets a network": ("biascorr.sweep.cluster:_load", 2, True),
    "before a stage": (MEASURE, 5, False),
    "between a stage and its shifts": (MEASURE, 6, True),
    "beside the float network": ("biascorr.sweep.paired:gauss_newton_sums", 3, False),
    "as it scores": (SCORE, 2, False),
}


@pytest.mark.parametrize("moment", KILLED)
def test_worker_that_is_killed(moment, two, workers):
    workers.arm(1, faults.arm, KILLED[moment][0], KILLED[moment][1], faults.kill, after=KILLED[moment][2])
    assert on(two) == at_home()


@pytest.mark.parametrize("count", [1, 2])
def test_worker_that_is_killed_at_random(count, workers):
    client = workers.client_of(count)
    killer = threading.Timer(random.random(), os.kill, (workers.pid(count - 1), signal.SIGKILL))
    killer.start()
    found = on(client, "auto")
    killer.join()
    assert found == at_home("auto")


def test_worker_that_is_stopped_for_a_while(two, workers):
    workers.arm(1, faults.arm, MEASURE, 4, functools.partial(faults.stop, 2))
    assert on(two) == at_home()


@pytest.mark.parametrize("kind", [MemoryError, OSError])
def test_worker_without_room(kind, two, workers, caplog):
    workers.arm(1, faults.arm, MEASURE, 3, functools.partial(faults.fail, kind, "no room"))
    assert on(two) == at_home()
    assert re.search("shard 1 is lost with tcp.*: no room", caplog.text)


def test_worker_without_space_on_its_disk(two, workers, caplog):
    workers.arm(0, faults.fill_disk)
    assert on(two, memory_budget=0) == at_home()
    assert "No space left on device" in caplog.text


def test_no_worker_has_space_on_its_disk(two, workers):
    for worker in (0, 1):
        workers.arm(worker, faults.fill_disk)
    with pytest.raises(OSError, match="activations cannot be kept: No space left on device; give a greater memory_budget"):
        on(two, memory_budget=0)


def test_workers_that_are_killed_whatever_they_do(workers, monkeypatch):
    client = workers.client_of(1)
    monkeypatch.setattr(on_cluster, "_LOSSES", 1)

    with pytest.raises(RuntimeError, match=r"client: shard 0 of 1 was lost 2 times with its worker, last tcp.*memory_budget"):
        on(client, "auto", metric=lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def test_workers_that_are_gone_for_good(workers, monkeypatch):
    client = workers.client_of(1)
    monkeypatch.setattr(on_cluster, "_PATIENCE", 1.0)
    threading.Timer(0.3, workers.cluster.scale, (0,)).start()
    for _ in range(2):  # in the middle, and from the beginning
        with pytest.raises(TimeoutError, match=r"client: no workers at tcp.* for 1 s, expected at least one: dask worker tcp"):
            on(client, "auto", metric=lambda *_: time.sleep(0.1) or 0.0)


def test_worker_that_comes_too_late_for_a_part_takes_over_one(workers, tmp_path):
    client = workers.client_of(1)
    first, marker = workers.pid(0), tmp_path / "marker"

    def metric(outputs, reference):
        if os.getpid() == first:
            marker.touch()
            time.sleep(60)
        return difference(outputs, reference)

    def replace():
        faults.wait_for(marker)
        workers.cluster.scale(2)
        client.wait_for_workers(2)
        os.kill(first, signal.SIGKILL)

    replacing = threading.Thread(target=replace)
    replacing.start()
    found = on(client, "auto", metric=metric)
    replacing.join()
    assert found == corrected(two_layers(), samples(24, 3, 6, 6), quant_params=PARAMS, metric=difference)


def test_worker_that_is_retired(two, workers, monkeypatch, tmp_path):
    monkeypatch.setattr(on_cluster, "_AWAY", 0.5)
    marker, pid = tmp_path / "marker", workers.pid(1)

    def metric(outputs, reference):
        if os.getpid() == pid:
            marker.touch()
            time.sleep(0.2)
        return difference(outputs, reference)

    def retire():
        faults.wait_for(marker)
        workers.client.retire_workers([workers.addresses[1]])

    retiring = threading.Thread(target=retire)
    retiring.start()
    found = on(two, "auto", metric=metric)
    retiring.join()
    workers.begin_anew()
    assert found == corrected(two_layers(), samples(24, 3, 6, 6), quant_params=PARAMS, metric=difference)


def test_worker_that_takes_no_tasks(two, workers, monkeypatch):
    monkeypatch.setattr(on_cluster, "_AWAY", 0.5)
    workers.arm(1, faults.arm, MEASURE, 3, faults.pause, after=True)
    assert on(two) == at_home()
    workers.begin_anew()


def test_what_a_worker_holds_stays_in_memory_where_dask_would_move_it_to_disk(two, workers):
    for worker in (0, 1):
        workers.arm(worker, faults.arm, MEASURE, 3, faults.evict)
    assert on(two) == at_home()


def test_shard_that_dask_makes_anew_is_taken_for_lost(two, workers, caplog):
    """As where a worker is restarted at the same address: it is there again, and empty."""
    workers.arm(1, faults.arm, "biascorr.sweep.cluster:_replied", 3, faults.forget_shards)
    assert on(two) == at_home()
    assert "shard 1 is lost" in caplog.text


def test_networks_travel_where_workers_see_no_file_of_the_client(two, workers, caplog):
    for worker in (0, 1):
        workers.arm(worker, faults.has_no_files)
    assert on(two) == at_home()
    assert "MB of networks" in caplog.text


def test_weights_in_files_of_their_own_stay_there_where_workers_see_them(two, workers, caplog, monkeypatch, tmp_path):
    model = model_from_text("g (float[N,256] x) => (float[N,256] y) { [layer] y = MatMul(x, w) }", w=weights(256, 256))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights")
    sizes, digest_of = [], on_cluster._digest_of
    monkeypatch.setattr(on_cluster, "_digest_of", lambda path: sizes.append(path.stat().st_size) or digest_of(path))
    for faulty in ((), (0, 1)):
        for worker in faulty:
            workers.arm(worker, faults.has_no_weights)
        correct(tmp_path / "model.onnx", samples(16, 256), method="squared", quant_params=PARAMS, client=two)
        assert ("of networks" in caplog.text) == bool(faulty)
    assert min(sizes) < (tmp_path / "weights").stat().st_size / 10


def test_files_are_read_where_workers_see_them(two, caplog):
    assert on(two) == at_home()
    assert "of networks" not in caplog.text


def test_threads_of_a_worker():
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster, Client(cluster) as client:
        assert on(client, "auto") == at_home("auto")
        assert on(client, "auto", threads=1) == at_home("auto")


def test_errors_are_raised_as_here(two):
    with pytest.raises(RuntimeError, match="metric: .*lambda.* failed: KeyError: 'labels'") as caught:
        on(two, "auto", metric=lambda outputs, _: outputs["labels"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="metric: it gave nan, expected a finite number: greater is better"):
        on(two, "auto", metric=lambda *_: float("nan"))


class UnpicklableError(Exception):
    def __init__(self, label, place):
        super().__init__(f"{label} at {place}")


def fail_unpicklably(*_):
    raise UnpicklableError("seven", 3)


def test_error_whose_cause_cannot_travel(two):
    with pytest.raises(RuntimeError, match="^metric: fail_unpicklably failed: UnpicklableError: seven at 3$") as caught:
        on(two, "auto", metric=fail_unpicklably)
    assert repr(caught.value.__cause__) == "RuntimeError('UnpicklableError: seven at 3')"


def test_worker_with_another_version(two, workers):
    workers.arm(1, faults.has_version, "0.0.1")
    with pytest.raises(RuntimeError, match=r"client: worker tcp.* has biascorr 0.0.1, expected .* as here"):
        on(two)


def test_worker_without_this_package(two, workers):
    workers.arm(1, faults.arm, "biascorr.sweep.cluster:_version", 1, functools.partial(faults.lack, "biascorr"))
    with pytest.raises(RuntimeError, match=r"client: worker tcp.* cannot import biascorr .*; install biascorr .* there too"):
        on(two)


def test_metric_that_needs_a_module_that_workers_lack(two, workers):
    workers.arm(1, faults.arm, SCORE, 1, functools.partial(faults.lack, "torchmetrics"))
    with pytest.raises(RuntimeError, match=r"client: worker tcp.* lacks what a metric imports: No module named 'torchmetrics'"):
        on(two)


def test_client_that_is_none():
    with pytest.raises(TypeError, match=r"client: str, expected a distributed.Client"):
        on("tcp://localhost:8786")


def test_client_that_is_closed(workers):
    client = Client(workers.cluster.scheduler_address, set_as_default=False)
    client.close()
    with pytest.raises(ValueError, match="client: closed, expected one that is connected to a scheduler"):
        on(client)


def test_client_that_does_not_wait(workers):
    async def check():
        async with Client(workers.cluster.scheduler_address, asynchronous=True, set_as_default=False) as client:
            on_cluster.check_client(client)

    with pytest.raises(ValueError, match="client: an asynchronous one"):
        asyncio.run(check())


def in_task(join):
    with distributed.worker_client() if join else contextlib.nullcontext(distributed.get_client()) as client:
        return on(client)


def test_task_of_the_same_cluster(two):
    """Which takes a thread that shards need, unless it leaves that to them."""
    with pytest.raises(ValueError, match=r"client: used by a task .*with distributed.worker_client\(\) as client"):
        two.submit(in_task, False, pure=False).result(timeout=30)
    assert two.submit(in_task, True, pure=False).result(timeout=60) == at_home()


def test_interrupt(two, tmp_path):
    marker = tmp_path / "marker"

    def metric(*_):
        marker.touch()
        time.sleep(0.5)
        return 0.0

    def interrupt():
        faults.wait_for(marker)
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    times = []
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        on(two, "auto", metric=metric)
    assert time.monotonic() - times[0] < 2  # on a busy machine


CLIENT = """
import sys, time, pathlib, numpy, distributed, networks
from biascorr import correct, QuantParams
def metric(outputs, reference):
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(0.5)
    return 0.0
if __name__ == "__main__":
    client, marker = distributed.Client(sys.argv[1]), sys.argv[2]
    metric = eval("lambda outputs, reference: [pathlib.Path(marker).touch(), time.sleep(0.5), 0.0][2]", globals())
    correct(networks.two_layers(), networks.samples(24, 3, 6, 6), quant_params=QuantParams("tf", weight_bits=4),
            metric=metric, client=client)
"""


def test_client_that_is_killed(workers, tmp_path):
    workers.client_of(2)
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    script.write_text(CLIENT)
    path = os.pathsep.join(sys.path)
    command = [sys.executable, script, workers.cluster.scheduler_address, marker]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as client:
        faults.wait_for(marker)
        client.kill()


def test_scheduler_that_dies(monkeypatch, tmp_path):
    monkeypatch.setattr(on_cluster, "_PATIENCE", 1.0)
    file = tmp_path / "scheduler.json"
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", file, "--port", "0", "--no-dashboard"]
    with subprocess.Popen(start, stderr=subprocess.DEVNULL) as scheduler:
        faults.wait_for(file)
        follow = [
            sys.executable,
            "-m",
            "distributed.cli.dask_worker",
            "--scheduler-file",
            file,
            "--no-nanny",
            "--nthreads",
            "1",
        ]
        with (
            subprocess.Popen([*follow, "--local-directory", tmp_path], stderr=subprocess.DEVNULL) as worker,
            Client(scheduler_file=str(file), timeout=2, set_as_default=False) as client,
        ):
            client.wait_for_workers(1)

            pid = scheduler.pid
            with pytest.raises((ConnectionError, TimeoutError), match="client: "):
                on(client, "auto", metric=lambda *_: os.kill(pid, signal.SIGKILL) or 0.0)
            worker.kill()


def test_command_line(workers, tmp_path):
    workers.client_of(2)
    onnx.save(two_layers(), tmp_path / "float.onnx")
    np.save(tmp_path / "data.npy", samples(24, 3, 6, 6))
    arguments = ["correct", "float.onnx", "--data", "data.npy", "--weight-bits", "4", "--method", "squared"]
    here = command_line.run(*arguments, "-o", "here.onnx", cwd=tmp_path)
    there = command_line.run(*arguments, "-o", "there.onnx", "--scheduler", workers.cluster.scheduler_address, cwd=tmp_path)
    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "there.onnx").read_bytes()


def test_command_line_where_nothing_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("biascorr.cli.correct._CONNECT", "1s")
    onnx.save(two_layers(), tmp_path / "float.onnx")
    np.save(tmp_path / "data.npy", samples(4, 3, 6, 6))
    arguments = ["correct", "float.onnx", "--data", "data.npy", "-o", "out.onnx", "--scheduler", "tcp://127.0.0.1:9"]
    done = command_line.run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "--scheduler: nothing answers at tcp://127.0.0.1:9" in done.stderr


def test_example(tmp_path):
    program = Path(__file__).parents[2] / "examples" / "cluster.py"
    command = [sys.executable, program, "--workers", "1", "--method", "mean", "--output", tmp_path / "corrected.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 workers at tcp://127.0.0.1:" in done.stdout
    assert "3 of 3 layers corrected" in done.stdout
    onnx.checker.check_model(onnx.load(tmp_path / "corrected.onnx"))
