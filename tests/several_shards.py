"""Shards in one process, each with some of the batches, for tests of what is merged."""

from collections.abc import Sequence
from typing import Any

from biascorr.calibration.samples import Samples
from biascorr.sweep.shard import OneShard, Shards


class SeveralShards(Shards):
    """Shards over parts of the batches, none of which knows the others."""

    def __init__(self, samples: Samples, parts: Sequence[Sequence[int]], threads: int) -> None:
        self.threads = threads
        self._parts = [(OneShard(samples, threads), set(part)) for part in parts]

    @property
    def prepared(self) -> float:
        return sum(shards.prepared for shards, _ in self._parts)

    def each(self, function: Any, batches: Sequence[int], *arguments: Any) -> Any:
        found = {}
        for shards, part in self._parts:
            own = [batch for batch in batches if batch in part]
            found |= dict(zip(own, shards.each(function, own, *arguments), strict=True)) if own else {}
        return iter([found[batch] for batch in batches])

    def finish(self, plan: Any) -> None:
        for shards, _ in self._parts:
            shards.finish(plan)

    def __exit__(self, *error: object) -> None:
        for shards, _ in self._parts:
            shards.__exit__(*error)
