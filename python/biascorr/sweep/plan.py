"""The plan of a sweep: which operations run together.

    stage of an operation = the most corrected layers on any path from the inputs to it

The layers of a stage do not depend on each other, and all before them are corrected.
"""

from __future__ import annotations

import collections
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from biascorr.graph.layer import Layer
from biascorr.graph.network import Network
from biascorr.graph.operations import Kind
from biascorr.sweep.measurements import Wanted


@dataclass(frozen=True)
class Stage:
    """Operations that run together.

    Parameters
    ----------
    number : int
        Its place among the stages of a network.
    layers : list of Layer
        The layers whose shifts are found at its end.
    given, kept, dropped : list of str
        The live tensors that it reads; those that it makes; those that nothing reads after it.
    """

    number: int
    layers: list[Layer] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """All that a shard has to know of a sweep; small but for the network, which it has.

    Parameters
    ----------
    network : Network
        The network that runs.
    layers : tuple of str
        The layers that end stages.
    wanted : Wanted
        The measurements to make of them.
    depth : int
        Layers on one path that are measured in one stage; 1 where they are corrected.
    is_beside : bool
        Whether another sweep of tensors with the same names goes on at the same time.
    name : str
        A name that no other sweep has.
    """

    network: Network
    layers: tuple[str, ...]
    wanted: Wanted
    depth: int = 1
    is_beside: bool = False
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def stages(self) -> list[Stage]:
        """The stages; the last has no layers."""
        known = {layer.name: layer for layer in self.network.layers}
        return plan_stages(self.network, [known[name] for name in self.layers], self.depth)


def plan_stages(network: Network, layers: Sequence[Layer], depth: int = 1) -> list[Stage]:
    """The stages of a network in order. The last has no layers; it is there for the outputs of the model.

    Parameters
    ----------
    network : Network
        The network that runs.
    layers : sequence of Layer
        Its layers that are measured.
    depth : int
        Layers on one path that may be measured in one stage; 1 where they are corrected.
    """
    inputs = {each.name for each in network.inputs}
    measured = {layer.output for layer in layers}
    level = dict.fromkeys(inputs, 0)  # of a tensor: layers on the path to it
    made = dict.fromkeys(inputs, -1)  # the stage that makes it
    sources = {name: {name} for name in inputs}  # the tensors that are held so that it can be had
    read: dict[str, set[int]] = {}  # the stages that read a held tensor
    for operation in network.operations:
        before = max((level[name] for name in operation.inputs), default=0)
        needed = set().union(*(sources[name] for name in operation.inputs))
        is_shifted = not measured.isdisjoint(operation.outputs)
        is_held = is_shifted or (operation.is_lasting and operation.kind is not Kind.DEQUANTIZE)
        for name in operation.outputs:
            level[name], made[name] = before + (name in measured), before // depth
            sources[name] = {name} if is_held else needed
        for source in needed if is_held else ():
            read.setdefault(source, set()).add(before // depth)
    last = max([0, *made.values(), *(made[name] + 1 for name in measured)])
    for source in set().union(*(sources[name] for name in network.outputs if name in sources)):
        read.setdefault(source, set()).add(last)
    stages = [Stage(number) for number in range(last + 1)]
    for layer in layers:
        stages[made[layer.output]].layers.append(layer)
    for name, readers in read.items():
        for stage in readers:
            if made[name] < stage:
                stages[stage].given.append(name)
        if 0 <= made[name] < max(readers):
            stages[made[name]].kept.append(name)
            stages[max(readers)].dropped.append(name)
    return stages


def layers_across_stages(stages: Sequence[Stage]) -> set[str]:
    """The layers, by name, that are called in several stages."""
    counts = collections.Counter(name for stage in stages for name in {layer.first_call for layer in stage.layers})
    return {name for name, count in counts.items() if count > 1}
