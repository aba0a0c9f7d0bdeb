"""Who runs shards: this process, or the workers of a cluster; and whether what they find is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from biascorr.calibration.resources import checked_threads
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import checked_budget
from biascorr.sweep.checkpoint import Checkpoint, RecordedShards
from biascorr.sweep.shard import OneShard, Shards

if TYPE_CHECKING:
    from distributed import Client


def check_cluster(client: Client | None) -> None:
    """Raises ImportError, TypeError or ValueError where a client is given and no cluster can be used by it."""
    if client is None:
        return
    try:
        from biascorr.sweep.cluster import check_client
    except ModuleNotFoundError as error:
        raise ImportError(f'a client needs {error.name}: pip install "biascorr[dask]"') from error
    check_client(client)


@contextlib.contextmanager
def running_shards(
    samples: Samples,
    *,
    threads: int | None,
    memory_budget: int | str | None,
    client: Client | None,
    checkpoint: Path | None,
    identity: Callable[[], Mapping[str, str]],
) -> Iterator[Shards]:
    """The shards of some samples; see :func:`biascorr.correct` for the parameters.

    `checkpoint` is a folder that was checked; `identity` is what it has to be of, see :class:`Checkpoint`, asked for only then.
    """
    with contextlib.ExitStack() as stack:
        shards: Shards
        if client is None:
            shards = OneShard(samples, checked_threads(threads))
        else:
            from biascorr.sweep.cluster import ClusterShards

            shards = ClusterShards(client, samples, threads, None if memory_budget is None else checked_budget(memory_budget))
        if checkpoint is not None:
            shards = RecordedShards(shards, stack.enter_context(Checkpoint(checkpoint, identity())))
        yield stack.enter_context(shards)
