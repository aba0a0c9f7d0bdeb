"""Shards on the workers of a Dask cluster: one each, with its part of the batches, which it keeps.

To a shard go its samples, each network once, and commands: a function of shards with the shifts so far. Back come the results
for each batch, sums of channels mostly. What is live never travels. A shard that is lost with its worker, or that finds no room
there, is opened on another one, which gets its samples again; as functions of shards need nothing from before, the command that
was lost is given again, and the results are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import pickle
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]
import distributed
from distributed.comm.core import CommClosedError

import biascorr
from biascorr.calibration.resources import available_cpus
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, TemporaryFolder, checked_budget
from biascorr.graph.network import Feeds, is_network
from biascorr.sweep.plan import SweepPlan
from biascorr.sweep.shard import Function, Shard, Shards

R = TypeVar("R")

_LOGGER = logging.getLogger("biascorr")

_AT_ONCE = 32
"""Shards that are opened at once."""

_CHUNK = 64 << 20
"""Bytes of samples that are sent at once."""

_LOOK = 0.5
"""Seconds after which it is looked whether workers are still there."""

_PATIENCE = 60.0
"""Seconds in which a worker may come, where none is left."""

_LOSSES = 5
"""Times that a shard may be lost before any of its commands is done: what kills that many workers kills all of them."""


def check_client(client: Any) -> None:
    """Raises TypeError or ValueError where no cluster can be used by it."""
    if not isinstance(client, distributed.Client):
        raise TypeError(f"client: {type(client).__name__}, expected a distributed.Client")
    if client.asynchronous:
        raise ValueError("client: an asynchronous one, expected one that waits: Client(address), without asynchronous=True")
    if client.status != "running":
        raise ValueError(f"client: {client.status}, expected one that is connected to a scheduler")


@dataclass(eq=False)
class _Remote:
    """A shard on a worker.

    Parameters
    ----------
    number : int
        Its number.
    batches : list of int
        The batches that it has.
    """

    number: int
    batches: list[int]
    worker: str | None = None
    held: Any = None
    networks: set[str] = field(default_factory=set)
    losses: int = 0

    def needs(self, networks: Sequence[str]) -> bool:
        """Whether it has to be opened, or to get one of these networks."""
        return self.held is None or not self.networks.issuperset(networks)


class ClusterShards(Shards):
    """A shard on each worker of a cluster. A context manager: at its end, workers are free of them.

    Parameters
    ----------
    client : distributed.Client
        Connected to the cluster.
    samples : Samples
        The samples, which are kept here too, in case that a worker is lost.
    threads : int or None
        Threads that a worker may use; None: its own.
    budget : int or None
        Bytes of activations that a worker holds in memory; None: half of what it has.

    Attributes
    ----------
    sent, received : int
        Bytes of commands, samples and networks that went to workers, and of results that came back.

    Raises
    ------
    RuntimeError
        A worker has another version of this package, or none.
    TimeoutError
        There are no workers, and none comes within a minute.
    """

    def __init__(self, client: Any, samples: Samples, threads: int | None, budget: int | None) -> None:
        check_client(client)
        self.threads = available_cpus() if threads is None else threads
        self.sent = self.received = 0
        self._client = client
        self._samples = samples
        self._options = threads, budget
        self._failed: dict[str, BaseException] = {}
        self._networks: dict[int, tuple[Any, str]] = {}
        self._folder: TemporaryFolder | None = None
        self._files: dict[str, tuple[Path, int, str]] = {}
        self._finished: list[str] = []
        self._prepared: dict[int, float] = {}
        workers = sorted(self._wait_for_workers())
        self._check_versions(workers)
        order = list(dict.fromkeys([*samples.fitted_batches, *samples.scored_batches, *samples.data_batches]))
        count = max(1, min(len(workers), len(order)))
        self._remotes = [_Remote(number, order[number::count]) for number in range(count)]
        self._owners = {batch: remote for remote in self._remotes for batch in remote.batches}

    def __enter__(self) -> ClusterShards:
        return self

    def __exit__(self, *error: object) -> None:
        for remote in self._remotes:
            self._forget(remote)
        if self._folder is not None:
            self._folder.cleanup()
        _LOGGER.info("cluster: %.1f MB went to workers, %.1f MB came back", self.sent / 1e6, self.received / 1e6)

    @property
    def prepared(self) -> float:
        """Seconds in which networks were made ready to run, so far, on the worker where that took longest."""
        return max(self._prepared.values(), default=0.0)

    def each(self, function: Function[R], batches: Sequence[int], *arguments: Any) -> Iterator[R]:
        """The results of a function for each of some batches, in their order."""
        command, networks = self._pickled((function, arguments))
        parts: dict[_Remote, list[int]] = {}
        for batch in batches:
            parts.setdefault(self._owners[batch], []).append(batch)
        found: dict[int, R] = {}
        for remote, reply in self._replies(command, networks, parts):
            results, self._prepared[remote.number] = pickle.loads(reply)
            self.received += len(reply)
            found |= zip(parts[remote], results)
        self._finished.clear()
        return iter([found[batch] for batch in batches])

    def finish(self, plan: SweepPlan) -> None:
        """Drops what is live of a sweep, with the next command."""
        self._finished.append(plan.name)

    def _replies(
        self, command: bytes, networks: Sequence[str], parts: Mapping[_Remote, Sequence[int]]
    ) -> Iterator[tuple[_Remote, bytes]]:
        """The reply of each shard; shards whose workers are lost are opened again, and asked again."""
        pending: dict[Any, _Remote] = {}
        waiting = list(parts)
        try:
            while waiting or pending:
                self._get_ready([remote for remote in waiting if remote.needs(networks)], networks)
                for remote in [each for each in waiting if each.worker is not None]:
                    pending[self._submitted(remote, command, parts[remote])] = remote
                    waiting.remove(remote)
                for future, remote in self._settled(pending):
                    del pending[future]
                    if self._is_done(future, remote):
                        remote.losses = 0
                        yield remote, future.result()
                    else:
                        waiting.append(remote)
        finally:
            for future in pending:
                future.cancel()

    def _get_ready(self, remotes: Sequence[_Remote], networks: Sequence[str]) -> None:
        """Opens shards that are not open, and has them have networks, at the same time; some may be lost on the way."""
        for remote in remotes:
            if remote.worker is None:
                self._choose_worker(remote)

        def get_ready(remote: _Remote) -> None:
            with contextlib.suppress(_LostError):
                self._open(remote)
                for key in networks:
                    self._place(remote, key)

        if remotes:
            with ThreadPoolExecutor(min(len(remotes), _AT_ONCE)) as pool:
                list(pool.map(get_ready, remotes))

    def _submitted(self, remote: _Remote, command: bytes, batches: Sequence[int]) -> Any:
        """The future of a command to a shard."""
        self.sent += len(command)
        return self._client.submit(
            _replied, remote.held, command, list(batches), list(self._finished), workers=[remote.worker], pure=False
        )

    def _choose_worker(self, remote: _Remote) -> None:
        """Takes the worker with the fewest shards for one that has none."""
        workers = self._wait_for_workers()
        counts = {worker: sum(each.worker == worker for each in self._remotes) for worker in sorted(workers)}
        remote.worker = min(counts, key=lambda worker: counts[worker])
        remote.networks = set()
        _LOGGER.info("cluster: shard %d, %d batches, opened on %s", remote.number, len(remote.batches), remote.worker)

    def _open(self, remote: _Remote) -> None:
        """Opens a shard on its worker, and sends its samples."""
        if remote.held is not None:
            return
        remote.held = self._client.submit(
            _Held, pickle.dumps(self._samples), *self._options, workers=[remote.worker], pure=False
        )
        self._wait(remote.held, remote)
        chunk: list[tuple[int, Feeds]] = []
        for batch, feeds in zip(remote.batches, self._samples.feeds(remote.batches)):
            chunk.append((batch, feeds))
            if _bytes_of(chunk) >= _CHUNK:
                self._send(remote, _add, chunk)
                chunk = []
        self._send(remote, _add, chunk)

    def _place(self, remote: _Remote, key: str) -> None:
        """Has the worker of a shard have a network: from a file, where it sees the same one; else it is sent."""
        if key in remote.networks:
            return
        path, size, digest = self._files[key]
        loaded = self._client.submit(_load, remote.held, key, str(path), size, digest, workers=[remote.worker], pure=False)
        self._wait(loaded, remote)
        if not loaded.result():
            self._send(remote, _load_bytes, (key, path.read_bytes()))
        remote.networks.add(key)

    def _send(self, remote: _Remote, function: Any, value: Any) -> None:
        self.sent += _bytes_of(value)
        (data,) = self._client.scatter([value], workers=[remote.worker], hash=False)
        self._wait(self._client.submit(function, remote.held, data, workers=[remote.worker], pure=False), remote)

    def _wait(self, future: Any, remote: _Remote) -> None:
        """Waits for a future on the worker of a shard. Raises _LostError where that is lost."""
        while not self._settled({future: remote}):
            pass
        if not self._is_done(future, remote):
            raise _LostError

    def _settled(self, pending: Mapping[Any, _Remote]) -> list[tuple[Any, _Remote]]:
        """The futures that are done, or whose workers are gone; waits a while for one."""
        with self._client.as_current(), contextlib.suppress(TimeoutError, distributed.TimeoutError):
            distributed.wait(list(pending), timeout=_LOOK, return_when="FIRST_COMPLETED")  # type: ignore[no-untyped-call]
        settled = [(future, remote) for future, remote in pending.items() if future.status != "pending"]
        if settled or not pending:
            return settled
        workers = self._workers()
        return [(future, remote) for future, remote in pending.items() if remote.worker not in workers]

    def _is_done(self, future: Any, remote: _Remote) -> bool:
        """Whether a future has a result. Where it has not, its shard is lost; what is no matter of its worker is raised."""
        if future.status == "finished":
            return True
        error = future.exception() if future.status == "error" else None
        worker = remote.worker
        self._forget(remote)
        future.cancel()
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, CommClosedError):
            assert worker is not None
            self._failed[worker] = error
            _LOGGER.warning("cluster: shard %d leaves %s: %s", remote.number, worker, error)
            if not self._workers() - self._failed.keys():
                raise error
        elif error is not None and not isinstance(error, (distributed.KilledWorker, OSError, distributed.CancelledError)):
            raise error
        else:
            _LOGGER.warning("cluster: shard %d is lost with %s", remote.number, worker)
        remote.losses += 1
        if remote.losses > _LOSSES:
            raise RuntimeError(
                f"client: shard {remote.number} of {len(self._remotes)} was lost {remote.losses} times with its worker, last "
                f"{worker}; see the logs of workers: against too little memory, more workers help, or a smaller "
                "memory_budget"
            )
        return False

    def _forget(self, remote: _Remote) -> None:
        if remote.held is not None:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                remote.held.cancel()
        remote.worker = remote.held = None

    def _workers(self) -> set[str]:
        return set(self._client.nthreads())

    def _wait_for_workers(self) -> set[str]:
        """The workers that can have shards."""
        end = time.monotonic() + _PATIENCE
        while True:
            workers = self._workers() - self._failed.keys()
            if workers:
                return workers
            if time.monotonic() > end:
                raise TimeoutError(
                    f"client: no workers at {self._client.scheduler.address} for {_PATIENCE:.0f} s, expected at least one: "
                    f"dask worker {self._client.scheduler.address}"
                )
            time.sleep(_LOOK)

    def _check_versions(self, workers: Sequence[str]) -> None:
        ours = biascorr.__version__
        try:
            found = self._client.run(_version, workers=list(workers))
        except ImportError as error:
            raise RuntimeError(
                f"client: workers cannot import biascorr ({error}); install biascorr {ours} where they run"
            ) from error
        for worker, version in found.items():
            if version != ours:
                raise RuntimeError(f"client: worker {worker} has biascorr {version}, expected {ours} as here")

    def _pickled(self, value: Any) -> tuple[bytes, list[str]]:
        """A command, in which networks are keys; and these."""
        file, keys = io.BytesIO(), list[str]()

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
            def persistent_id(pickler, each: Any) -> str | None:  # noqa: N805
                if not is_network(each):
                    return None
                keys.append(self._key(each))
                return keys[-1]

        Pickler(file).dump(value)
        return file.getvalue(), list(dict.fromkeys(keys))

    def _key(self, network: Any) -> str:
        """The key of a network, which is written to a file when it is first needed."""
        if id(network) not in self._networks:
            if self._folder is None:
                self._folder = TemporaryFolder()
            key = uuid.uuid4().hex
            path = self._folder.path / f"{key}.network"
            with path.open("wb") as file:
                pickle.dump(network, file, protocol=5)
            self._files[key] = path, path.stat().st_size, _digest_of(path)
            self._networks[id(network)] = network, key
        return self._networks[id(network)][1]


class _LostError(Exception):
    """A shard is lost with its worker."""


def _digest_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _bytes_of(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_of, value))
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))


# On workers

_NETWORKS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""By key; of all shards of a worker."""


class _Held:
    """What a worker holds of a shard, as long as the client does.

    Parameters
    ----------
    samples : bytes
        The samples, pickled, without their inputs.
    threads, budget : int or None
        See :class:`ClusterShards`.
    """

    def __init__(self, samples: bytes, threads: int | None, budget: int | None) -> None:
        worker = distributed.get_worker()
        limit = getattr(worker.memory_manager, "memory_limit", None)
        own = min(checked_budget(None), int(limit * 0.5)) if limit else checked_budget(None)
        self.storage = Storage(own if budget is None else budget, worker.local_directory)
        held: Samples = pickle.loads(samples)
        held.storage = self.storage
        self.shard = Shard(held, threads or worker.state.nthreads)
        self.networks: dict[str, Any] = {}
        weakref.finalize(self, _close, self.shard, self.storage)

    def __reduce__(self) -> Any:
        raise TypeError("a shard stays where it is")

    def __sizeof__(self) -> int:
        return 0


def _close(shard: Shard, storage: Storage) -> None:
    shard.close()
    storage.close()


def _version() -> str:
    return biascorr.__version__


def _add(held: _Held, batches: Sequence[tuple[int, Feeds]]) -> None:
    for batch, feeds in batches:
        for name, array in feeds.items():
            held.storage[name, batch] = array


def _load(held: _Held, key: str, path: str, size: int, digest: str) -> bool:
    """Whether a network was found, here or in a file."""
    if key in _NETWORKS:
        held.networks[key] = _NETWORKS[key]
        return True
    try:
        content = Path(path).read_bytes() if Path(path).stat().st_size == size else b""
    except OSError:
        return False
    if hashlib.sha256(content).hexdigest() != digest:
        return False
    _load_bytes(held, (key, content))
    return True


def _load_bytes(held: _Held, network: tuple[str, bytes]) -> None:
    key, content = network
    held.networks[key] = _NETWORKS[key] = pickle.loads(content)


def _replied(held: _Held, command: bytes, batches: Sequence[int], finished: Sequence[str]) -> bytes:
    """The results of a command, and the seconds in which networks were made ready to run."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key: str) -> Any:
            return held.networks[key]

    for name in finished:
        held.shard.finish(name)
    function, arguments = Unpickler(io.BytesIO(command)).load()
    results = list(function(held.shard, batches, *arguments))
    return pickle.dumps((results, held.shard.prepared), protocol=5)
