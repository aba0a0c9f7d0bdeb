"""Shards on the workers of a Dask cluster: one each, with its part of the batches, which it keeps.

To a shard go its samples, each network once, and commands: a function of shards with the shifts so far. Back come the results
for each batch, sums of channels mostly. What is live never travels. A shard that is lost with its worker, or that finds no room
there, is opened on another one, which gets its samples again; as functions of shards need nothing from before, the command that
was lost is given again, and the results are the same.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import io
import logging
import pickle
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]
import distributed
from distributed.comm.core import CommClosedError
from distributed.threadpoolexecutor import thread_state

import biascorr
from biascorr.calibration.resources import available_cpus
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, TemporaryFolder, checked_budget
from biascorr.graph.network import Feeds, is_network
from biascorr.graph.travel import by_reference
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

_MORE = 0.005
"""Seconds in which one more result may come, so that several are fetched at once."""

_AWAY = 10.0
"""Seconds in which a worker may take no tasks before its shard leaves it."""

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
    if _has_place(client):
        raise ValueError(
            "client: used by a task that runs on the same cluster, which holds the place that a shard waits for; "
            "use the one of: with distributed.worker_client() as client"
        )


def _has_place(client: Any) -> bool:
    """Whether this is a task of the client's cluster, which holds the place of another one in its worker."""
    return getattr(thread_state, "proceed", False) and distributed.get_worker().scheduler.address == client.scheduler.address


def _check_version(where: str, find: Callable[[], str]) -> None:
    """Raises RuntimeError where this package is not there, or another version of it."""
    ours = biascorr.__version__
    try:
        found = find()
    except ImportError as error:
        raise RuntimeError(f"client: {where} cannot import biascorr ({error}); install biascorr {ours} there too") from error
    if found != ours:
        raise RuntimeError(f"client: {where} has biascorr {found}, expected {ours} as here")


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
    finished: list[str] = field(default_factory=list)
    losses: int = 0
    sent: Counter[str] = field(default_factory=Counter)

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
    received : int
        Bytes of results that came back.
    commands : int
        Commands that were given, each to all shards that have batches for it.

    Raises
    ------
    ConnectionError
        The scheduler is lost.
    RuntimeError
        The scheduler or a worker has another version of this package, or none; or shards are lost again and again.
    TimeoutError
        There are no workers, and none comes within a minute.
    """

    def __init__(self, client: Any, samples: Samples, threads: int | None, budget: int | None) -> None:
        check_client(client)
        self.threads = available_cpus() if threads is None else threads
        self.received = self.commands = 0
        self._client = client
        self._samples = samples
        self._state = pickle.dumps(samples)
        self._options = threads, budget
        self._failed: dict[str, BaseException] = {}
        self._away: dict[str, float] = {}
        self._is_over = False
        self._keys: dict[int, str] = {}  # of networks, which are in what follows
        self._folder: TemporaryFolder | None = None
        self._files: dict[str, tuple[Any, str, int, str]] = {}
        self._prepared: dict[int, float] = {}
        workers = self._wait_for_workers()
        _check_version("the scheduler", lambda: client.run_on_scheduler(_version))
        order = list(dict.fromkeys([*samples.fitted_batches, *samples.scored_batches, *samples.data_batches]))
        count = max(1, min(len(workers), len(order)))
        self._remotes = [_Remote(number, order[number::count]) for number in range(count)]
        self._owners = {batch: remote for remote in self._remotes for batch in remote.batches}

    def __enter__(self) -> ClusterShards:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over = True
        self._empty()
        for remote in self._remotes:
            self._forget(remote)
        if self._folder is not None:
            self._folder.cleanup()
        sent = ", ".join(f"{size / 1e6:.1f} MB of {kind}" for kind, size in self.sent.items())
        _LOGGER.info("cluster: %d commands, %s; %.1f MB of results", self.commands, sent, self.received / 1e6)

    @property
    def sent(self) -> Counter[str]:
        """Bytes that went to workers: of samples, networks and commands."""
        return sum((remote.sent for remote in self._remotes), Counter())

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
        self.commands += 1
        for remote, reply in self._replies(command, networks, parts):
            results, self._prepared[remote.number] = reply
            found |= zip(parts[remote], results)
        return iter([found[batch] for batch in batches])

    def finish(self, plan: SweepPlan) -> None:
        """Drops what is live of a sweep, with the next command."""
        for remote in self._remotes:
            remote.finished.append(plan.name)

    def _replies(
        self, command: bytes, networks: Sequence[str], parts: Mapping[_Remote, Sequence[int]]
    ) -> Iterator[tuple[_Remote, tuple[list[Any], float]]]:
        """The reply of each shard; shards whose workers are lost are opened again, and asked again."""
        pending: dict[Any, _Remote] = {}
        settled: SimpleQueue[Any] = SimpleQueue()
        waiting = list(parts)
        try:
            while waiting or pending:
                self._get_ready([remote for remote in waiting if remote.needs(networks)], networks)
                for remote in [each for each in waiting if each.held is not None]:
                    remote.sent["commands"] += len(command)
                    arguments = command, parts[remote], list(remote.finished)
                    future = self._submitted(settled, remote, _answer, _replied, remote.held, *arguments)
                    pending[future] = remote
                    waiting.remove(remote)
                done = {future: pending[future] for future in self._settled(settled, pending)}
                replies = self._results(done)
                for future, remote in done.items():
                    del pending[future]
                    reply = self._kept(future, replies, remote)
                    if reply is None:
                        waiting.append(remote)
                    else:
                        yield remote, reply
        finally:
            for future in pending:
                future.release()

    def _kept(self, future: Any, replies: Mapping[Any, bytes], remote: _Remote) -> Any:
        """The reply to a command; None where the shard is lost."""
        try:
            reply = self._reply(future, replies, remote)
        except _LostError as error:
            self._lose(remote, error)
            return None
        finally:
            future.release()
        remote.losses = 0
        remote.finished.clear()
        self.received += len(replies[future])
        return reply

    def _get_ready(self, remotes: Sequence[_Remote], networks: Sequence[str]) -> None:
        """Opens shards that are not open, and has them have networks, at the same time; some may be lost on the way."""
        self._choose_workers([remote for remote in remotes if remote.worker is None])

        def get_ready(remote: _Remote) -> None:
            try:
                self._open(remote)
                for key in networks:
                    self._place(remote, key)
            except _LostError as error:
                self._lose(remote, error)

        if remotes:
            with ThreadPoolExecutor(min(len(remotes), _AT_ONCE)) as pool:
                try:
                    list(pool.map(get_ready, remotes))
                except BaseException:
                    self._is_over = True
                    raise

    def _choose_workers(self, remotes: Sequence[_Remote]) -> None:
        """Takes the workers with the fewest shards for those that have none."""
        if not remotes:
            return
        counts = dict.fromkeys(sorted(self._wait_for_workers()), 0)
        counts |= {
            worker: count for worker, count in Counter(each.worker for each in self._remotes).items() if worker in counts
        }
        for remote in remotes:
            remote.worker = min(counts, key=counts.__getitem__)
            counts[remote.worker] += 1
            remote.networks, remote.finished = set(), []
            _LOGGER.info("cluster: shard %d, %d batches, opened on %s", remote.number, len(remote.batches), remote.worker)

    def _open(self, remote: _Remote) -> None:
        """Opens a shard on its worker, and sends its samples."""
        if remote.held is not None:
            return
        version = self._client.run(_version, workers=[remote.worker], asynchronous=True)
        _check_version(f"worker {remote.worker}", lambda: next(iter(self._awaited(version, [remote]).values())))
        with self._scattered(remote, self._state, "samples") as state:
            remote.held = self._submitted(SimpleQueue(), remote, _Held, state, *self._options)
        chunk: list[tuple[int, Feeds]] = []
        for batch, feeds in zip(remote.batches, self._samples.feeds(remote.batches)):
            chunk.append((batch, feeds))
            if _bytes_of(chunk) >= _CHUNK:
                self._add(remote, chunk)
                chunk = []
        self._add(remote, chunk)

    def _add(self, remote: _Remote, chunk: list[tuple[int, Feeds]]) -> None:
        with self._scattered(remote, chunk, "samples") as data:
            self._result(remote, _add, data)

    def _place(self, remote: _Remote, key: str) -> None:
        """Has the worker of a shard have a network: from files, where it sees the same ones; else it is sent."""
        if key in remote.networks:
            return
        network, *file = self._files[key]
        if not self._result(remote, _load, key, *file):
            with self._scattered(remote, pickle.dumps(network, protocol=5), "networks") as content:
                self._result(remote, _load_bytes, key, content)
        remote.networks.add(key)

    @contextlib.contextmanager
    def _scattered(self, remote: _Remote, value: Any, kind: str) -> Iterator[Any]:
        """The future of a value that is sent to the worker of a shard."""
        remote.sent[kind] += _bytes_of(value)
        scatter = self._client.scatter([value], workers=[remote.worker], hash=False, asynchronous=True)
        (data,) = self._awaited(scatter, [remote])
        try:
            yield data
        finally:
            data.release()

    def _result(self, remote: _Remote, function: Any, *arguments: Any) -> Any:
        """The result of a function of a shard. Raises _LostError where that is lost."""
        settled: SimpleQueue[Any] = SimpleQueue()
        future = self._submitted(settled, remote, _answer, function, remote.held, *arguments)
        try:
            while not self._settled(settled, {future: remote}) and not self._is_over:
                pass
            return self._reply(future, self._results({future: remote}), remote)
        finally:
            future.release()

    def _submitted(self, settled: SimpleQueue[Any], remote: _Remote, function: Any, *arguments: Any) -> Any:
        """The future of a function on the worker of a shard; it is put into a queue when it is settled."""
        future = self._client.submit(function, *arguments, workers=[remote.worker], pure=False)
        future.add_done_callback(settled.put)
        return future

    def _settled(self, settled: SimpleQueue[Any], pending: Mapping[Any, _Remote]) -> list[Any]:
        """The futures that are settled, or whose workers are lost; waits a while for one."""
        found = []
        with contextlib.suppress(Empty):
            found.append(settled.get(timeout=_LOOK))
            while len(found) < len(pending):
                found.append(settled.get(timeout=_MORE))
        if found or not pending:
            return [future for future in found if future in pending]
        workers = self._workers()
        return [future for future, remote in pending.items() if remote.worker not in workers or future.status != "pending"]

    def _results(self, futures: Mapping[Any, _Remote]) -> dict[Any, bytes]:
        """The results of futures, of those that can be had."""
        futures = {future: remote for future, remote in futures.items() if future.status == "finished"}
        if not futures:
            return {}
        try:
            gather = self._client.gather(list(futures), asynchronous=True)
            return dict(zip(futures, self._awaited(gather, futures.values())))
        except _LostError:
            workers = self._workers()
        left = {future: remote for future, remote in futures.items() if remote.worker in workers}
        return {} if self._is_over or len(left) == len(futures) else self._results(left)

    def _reply(self, future: Any, replies: Mapping[Any, bytes], remote: _Remote) -> Any:
        """What a shard replied. Raises what it raised; _LostError where it is lost, or leaves a worker that has no room."""
        if future in replies:
            found = pickle.loads(replies[future])
        elif future.status == "error":
            found = future.exception()
        else:
            raise _LostError
        if not isinstance(found, Exception):
            return found
        if isinstance(found, (_LostError, distributed.KilledWorker, CommClosedError)):
            raise _LostError from found
        if isinstance(found, ImportError):
            raise RuntimeError(f"client: worker {remote.worker} lacks what a metric imports: {found}") from found
        if not isinstance(found, (OSError, MemoryError)):
            raise found
        assert remote.worker is not None
        self._failed[remote.worker] = found
        if not self._running() - self._failed.keys():
            raise found
        raise _LostError from found

    def _awaited(self, call: Coroutine[Any, Any, R], remotes: Iterable[_Remote]) -> R:
        """What a call of the client gives that needs workers of shards. Raises _LostError where one is lost."""
        running = asyncio.run_coroutine_threadsafe(call, self._client.loop.asyncio_loop)
        try:
            while not concurrent.futures.wait([running], _LOOK).done:
                if self._is_over or not self._workers().issuperset(remote.worker for remote in remotes):
                    raise _LostError
            return running.result()
        except ImportError:
            raise
        except Exception as error:
            raise _LostError from error
        finally:
            running.cancel()

    def _lose(self, remote: _Remote, error: _LostError) -> None:
        """Gives up a shard where it is. Raises RuntimeError where that happens again and again."""
        worker = remote.worker
        self._forget(remote)
        if self._is_over:
            return
        _LOGGER.warning("cluster: shard %d is lost with %s: %s", remote.number, worker, error.__cause__ or "it is gone")
        remote.losses += 1
        if remote.losses > _LOSSES:
            raise RuntimeError(
                f"client: shard {remote.number} of {len(self._remotes)} was lost {remote.losses} times with its worker, last "
                f"{worker}; see the logs of workers: against too little memory, more workers help, or a smaller "
                "memory_budget"
            )

    def _empty(self) -> None:
        """Has workers that are not busy drop all they hold: what Dask tried to spill, it may keep for a while."""
        held = [remote for remote in self._remotes if remote.held is not None]
        with contextlib.suppress(Exception), self._client.as_current():  # the scheduler may be gone
            futures = [self._client.submit(_emptied, each.held, workers=[each.worker], pure=False) for each in held]
            distributed.wait(futures, timeout=_LOOK)  # type: ignore[no-untyped-call]

    def _forget(self, remote: _Remote) -> None:
        if remote.held is not None:
            remote.held.release()
        remote.worker = remote.held = None

    def _running(self) -> set[str]:
        """The workers that take tasks; none where the scheduler is lost, or does not answer."""
        try:
            return set(self._client.sync(self._client.scheduler.ncores_running))
        except OSError:
            return set()

    def _workers(self) -> set[str]:
        """The workers that are there, but for those that have taken no tasks for a while: paused, or about to be retired."""
        running, now = self._running(), time.monotonic()
        try:
            others = set(self._client.nthreads()) - running
        except OSError:
            others = set()
        self._away = {worker: self._away.get(worker, now) for worker in others}
        return running | {worker for worker, since in self._away.items() if now - since < _AWAY}

    def _wait_for_workers(self) -> set[str]:
        """The workers that can have shards."""
        address = self._client.scheduler.address
        end = time.monotonic() + _PATIENCE
        while True:
            workers = self._running() - self._failed.keys()
            if workers:
                return workers
            if self._client.status == "closed":
                raise ConnectionError(f"client: the scheduler at {address} is lost, and did not come back")
            if time.monotonic() > end:
                raise TimeoutError(
                    f"client: no workers at {address} for {_PATIENCE:.0f} s, expected at least one: dask worker {address}; "
                    "those that are paused, as for lack of memory, do not count"
                )
            time.sleep(_LOOK)

    def _pickled(self, value: Any) -> tuple[bytes, list[str]]:
        """A command, in which networks are keys; and these."""
        file = io.BytesIO()
        pickler = _Pickler(file, self._key)
        pickler.dump(value)
        return file.getvalue(), list(dict.fromkeys(pickler.keys))

    def _key(self, network: Any) -> str:
        """The key of a network, which is written to a file when it is first needed, without values that are in others."""
        if id(network) not in self._keys:
            if self._folder is None:
                self._folder = TemporaryFolder()
            key = uuid.uuid4().hex
            path = self._folder.path / f"{key}.network"
            with path.open("wb") as file, by_reference():
                pickle.dump(network, file, protocol=5)
            self._files[key] = network, str(path), path.stat().st_size, _digest_of(path)
            self._keys[id(network)] = key
        return self._keys[id(network)]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles networks as their keys, and keeps these."""

    def __init__(self, file: io.BytesIO, key: Callable[[Any], str]) -> None:
        super().__init__(file)
        self.keys: list[str] = []
        self._key = key

    def persistent_id(self, value: Any) -> str | None:
        if not is_network(value):
            return None
        self.keys.append(self._key(value))
        return self.keys[-1]


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
        self.batches: set[int] = set()
        self.networks: dict[str, Any] = {}
        weakref.finalize(self, _close, self.shard, self.storage)

    def __reduce__(self) -> Any:
        raise TypeError("a shard stays where it is")

    def __sizeof__(self) -> int:
        return 0  # so that there is nothing to be won by spilling it


def _close(shard: Shard, storage: Storage) -> None:
    shard.close()
    storage.close()


def _emptied(held: _Held) -> None:
    _close(held.shard, held.storage)
    held.networks.clear()
    held.batches.clear()


def _version() -> str:
    return biascorr.__version__


def _answer(function: Callable[..., Any], *arguments: Any) -> bytes:
    """The result of a function, pickled, or the error that it raises: Dask would keep that, and the shard with its frames."""
    try:
        return pickle.dumps(function(*arguments), protocol=5)
    except Exception as error:
        found: bytes = cloudpickle.dumps(_sendable(error))
        return found


def _sendable(error: BaseException) -> BaseException:
    """An error, in which those that cannot be pickled, itself or its causes, are such that say the same."""
    with contextlib.suppress(Exception):
        pickle.loads(cloudpickle.dumps(error))
        return error
    cause, error.__cause__, error.__context__ = error.__cause__, None, None
    if cause is None:
        return RuntimeError(f"{type(error).__name__}: {error}")
    found = _sendable(error)
    found.__cause__ = _sendable(cause)
    return found


def _add(held: _Held, batches: Sequence[tuple[int, Feeds]]) -> None:
    for batch, feeds in batches:
        for name, array in feeds.items():
            held.storage[name, batch] = array
        held.batches.add(batch)


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
    try:
        _load_bytes(held, key, content)
    except (OSError, ValueError):  # the files of its values are not here
        return False
    return True


def _load_bytes(held: _Held, key: str, content: bytes) -> None:
    held.networks[key] = _NETWORKS[key] = pickle.loads(content)


class _Unpickler(pickle.Unpickler):
    """Unpickles networks from their keys. Raises _LostError where there is none."""

    def __init__(self, file: io.BytesIO, networks: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._networks = networks

    def persistent_load(self, key: str) -> Any:
        if key not in self._networks:
            raise _LostError
        return self._networks[key]


def _replied(held: _Held, command: bytes, batches: Sequence[int], finished: Sequence[str]) -> tuple[list[Any], float]:
    """The results of a command, and the seconds in which networks were made ready to run.

    Raises _LostError where the client has given it up, or where Dask has made the shard anew, in a worker that was restarted.
    """
    worker = distributed.get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    if not held.batches.issuperset(batches):
        raise _LostError
    for name in finished:
        held.shard.finish(name)
    function, arguments = _Unpickler(io.BytesIO(command), held.networks).load()
    results = []
    for result in function(held.shard, batches, *arguments):
        if task.state == "cancelled":
            raise _LostError
        results.append(result)
    return results, held.shard.prepared
