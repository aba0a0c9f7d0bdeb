"""Networks that were pickled: that they are as they were, here and in another process."""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from biascorr.graph.layer import LazyArray, without_later_calls
from biascorr.graph.network import BiasNetwork, Feeds, Network

SCRIPT = """
import pathlib, pickle, sys
network, feeds = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
wanted = [name for each in network.operations if each.is_lasting for name in each.outputs]
found = network.digest, network.part(feeds, wanted, threads=1)(feeds)
pathlib.Path(sys.argv[2]).write_bytes(pickle.dumps(found))
"""


def plain(value: Any) -> Any:
    """A value as what can be compared: arrays by their bytes, objects by their fields."""
    if isinstance(value, (np.ndarray, LazyArray)):
        array = np.asarray(value)
        return array.dtype, array.shape, array.tobytes()
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, each.name)) for each in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def tensors_of(network: Network, feeds: Feeds) -> Any:
    """All that depends on the inputs."""
    wanted = [name for each in network.operations if each.is_lasting for name in each.outputs]
    return plain(network.part(feeds, wanted, threads=1)(feeds))


def described(network: BiasNetwork, feeds: Feeds) -> dict[str, Any]:
    """All that the engine asks of a network."""
    rng = np.random.default_rng(0)
    layers = without_later_calls(network.layers)
    shifts = {layer.name: rng.normal(0, 0.5, layer.channels) for layer in layers}
    return {
        "digest": network.digest,
        **{
            name: plain(getattr(network, name))
            for name in ("inputs", "outputs", "order", "operations", "unsupported", "layers")
        },
        "facts": plain(network.facts()),
        "tensors": tensors_of(network, feeds),
        "deployed": plain(network.deployed(threads=1)(feeds)),
        "changes": [plain(network.bias_change(layer, shifts[layer.name])) for layer in layers],
    }


def assert_same(network: BiasNetwork, other: BiasNetwork, feeds: Feeds) -> None:
    """That two networks are the same, and stay so with the same shifts."""
    rng = np.random.default_rng(1)
    expected, found = described(network, feeds), described(other, feeds)
    for name, value in expected.items():
        assert found[name] == value, name
    changed = {each.name: rng.normal(0, 0.5, each.channels) for each in without_later_calls(network.layers)}
    changed = {
        each.name: changed[each.name]
        for each in without_later_calls(network.layers)
        if network.bias_change(each, changed[each.name]).applied is not None
    }
    expected, found = (described(each.with_shifts(changed), feeds) for each in (network, other))
    for name, value in expected.items():
        assert found[name] == value, f"{name} with shifts"


def sent(network: Any) -> Any:
    return pickle.loads(pickle.dumps(network))


def assert_same_in_another_process(network: Network, feeds: Feeds, folder: Path) -> None:
    """That a process that imports nothing beforehand finds the same digest and computes the same bits."""
    (folder / "network.pkl").write_bytes(pickle.dumps((network, dict(feeds))))
    tests = Path(__file__).parent
    path = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH")]
    subprocess.run(
        [sys.executable, "-c", SCRIPT, folder / "network.pkl", folder / "found.pkl"],
        check=True,
        env=os.environ
        | {"PYTHONHASHSEED": "7", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    digest, tensors = pickle.loads((folder / "found.pkl").read_bytes())
    assert digest == network.digest
    assert plain(tensors) == tensors_of(network, feeds)
