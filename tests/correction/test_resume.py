"""A run that is killed goes on where it was, and ends with the same bytes as one that never was."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from biascorr import correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.sweep import checkpoint
from biascorr.sweep.cut import Cut
from biascorr.sweep.shard import OneShard
from command_line import start
from killed import Runs, arguments, steps_recorded
from networks import quantized, samples, two_layers

MORE = 3
"""Kills of each kind besides one in each step, anywhere."""

GAP = 0.02
"""Seconds after a step in which some are killed."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


def outcome(output: Path) -> tuple[bytes, bytes]:
    return output.read_bytes(), output.with_suffix(".json").read_bytes()


def moments_of(steps: list[str], chance: random.Random) -> list[tuple[int, float]]:
    """When to kill: once in each step, some a moment later, and anywhere; as numbers of steps told of, and seconds after."""
    places = [chance.choice([k for k, step in enumerate(steps) if step == name]) for name in dict.fromkeys(steps)]
    after = [0.0 if k % 2 else chance.uniform(0, GAP) for k in range(len(places))]
    return sorted([*zip(places, after), *((chance.randrange(len(steps)), chance.uniform(0, GAP)) for _ in range(MORE))])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["given", "simulated", "deep", "spilled"])  # some 60 kills
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_never_was(runs, tmp_path, kind):
    whole = runs(kind, tmp_path / "whole.onnx")
    assert whole.status == 0
    expected, folder = outcome(tmp_path / "whole.onnx"), tmp_path / "checkpoint"
    moments = moments_of(whole.steps, random.Random(kind))
    recorded, killed = [], 0
    for place, after in moments:
        ended = runs(kind, tmp_path / "resumed.onnx", folder, (place, after))
        if ended.status:
            killed += 1
            assert ended.status == -9
            assert after or ended.steps[-1] == whole.steps[place]
        else:  # done before it could be killed
            assert outcome(tmp_path / "resumed.onnx") == expected
        recorded.append(steps_recorded(folder))
    assert killed >= len(moments) - MORE
    assert all(each.items() <= later.items() for each, later in itertools.pairwise(recorded))
    assert len(set(map(len, recorded))) >= 5  # it was killed at several places
    ended = runs(kind, tmp_path / "resumed.onnx", folder)
    assert ended.status == 0
    assert outcome(tmp_path / "resumed.onnx") == expected


def test_a_run_that_is_killed_in_the_middle_of_a_write_has_no_half_record(runs, tmp_path):
    assert runs("given", tmp_path / "whole.onnx").status == 0
    folder = tmp_path / "checkpoint"
    assert runs("given", tmp_path / "resumed.onnx", folder, write=True).status == -9
    assert [path.name for path in folder.glob("*.new")] == ["run.new"]
    for place in (70, 120):
        assert runs("given", tmp_path / "resumed.onnx", folder, (place, 0)).status == -9
        before = steps_recorded(folder)
        assert runs("given", tmp_path / "resumed.onnx", folder, write=True).status == -9
        assert [int(path.stem) for path in folder.glob("0*.new")] == [len(before)]
        assert steps_recorded(folder) == before
    assert runs("given", tmp_path / "resumed.onnx", folder).status == 0
    assert not [*folder.glob("*.new")]
    assert outcome(tmp_path / "resumed.onnx") == outcome(tmp_path / "whole.onnx")


def test_a_command_that_is_killed_goes_on_when_it_is_given_again(runs, tmp_path):
    model, x = two_layers(), samples(48, 3, 6, 6)
    onnx.save(model, tmp_path / "float.onnx")
    onnx.save(quantized(model, [{"x": x[:4]}]), tmp_path / "quantized.onnx")
    np.save(tmp_path / "data.npy", x)
    command = ["correct", "float.onnx", "--quantized", "quantized.onnx", "--data", "data.npy", "-o", "out.onnx", "--json"]
    (tmp_path / "whole").mkdir()
    paths = [str(tmp_path / each) if each.endswith((".onnx", ".npy")) and each != "out.onnx" else each for each in command]
    expected = start(*paths, cwd=tmp_path / "whole", PYTHONHASHSEED="1")
    assert expected.returncode == 0, expected.stderr
    chance = random.Random(0)
    statuses = []
    for _ in range(4):
        again = [*paths[:-2], str(tmp_path / "killed.onnx"), "--quiet", "--force", "--checkpoint", str(tmp_path / "checkpoint")]
        statuses.append(runs("command", json.dumps(again), kill=(0, chance.uniform(0.05, 0.4))).status)
    assert set(statuses) <= {-9, 0}
    assert -9 in statuses
    found = start(*paths, "--checkpoint", tmp_path / "checkpoint", cwd=tmp_path, PYTHONHASHSEED="2")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole" / "out.onnx").read_bytes()
    ours, theirs = (json.loads(each.stdout) for each in (found, expected))
    assert ours.pop("command") != theirs.pop("command")
    assert {**ours, "seconds": None} == {**theirs, "seconds": None}


def record_of(correction: Any) -> dict[str, Any]:
    return {**correction.to_dict(), "seconds": None, "model": correction.model.SerializeToString(deterministic=True)}


class Stopped(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str = "given", **options: Any) -> None:
    """A run that is stopped when so many results are recorded."""
    keep = checkpoint.Checkpoint.keep

    def stopping(self, number, value):
        keep(self, number, value)
        if number + 1 == count:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "keep", stopping)
        model, x, others = arguments(kind)
        with pytest.raises(Stopped):
            correct(model, x, checkpoint=folder, **others, **options)


@pytest.fixture
def asked(monkeypatch):
    """The functions that a shard is asked for, in order."""
    found, each = [], OneShard.each

    def recording(self, function, batches, *others):
        found.append(function.__name__)
        return each(self, function, batches, *others)

    monkeypatch.setattr(OneShard, "each", recording)
    return found


@pytest.mark.parametrize("kind", ["given", "simulated"])
def test_what_is_recorded_is_not_computed_again(monkeypatch, tmp_path, asked, kind):
    model, x, options = arguments(kind)
    correct(model, x, checkpoint=tmp_path / "whole", **options)
    expected = asked.copy()
    assert [*steps_recorded(tmp_path / "whole").values()] == expected
    for count in (1, len(expected) // 2, len(expected)):
        folder = tmp_path / str(count)
        stopped_after(count, monkeypatch, folder, kind)
        asked.clear()
        correct(model, x, checkpoint=folder, **options)
        assert asked == expected[count:]


def test_a_run_that_is_done_runs_no_model(monkeypatch, tmp_path):
    model, x, options = arguments("given")
    correct(model, x, checkpoint=tmp_path / "done", **options)
    for name in ("part", "deployed"):
        monkeypatch.setattr(OnnxNetwork, name, lambda *_, **__: pytest.fail("it runs"))
    monkeypatch.setattr(Cut, "run_to", lambda *_: pytest.fail("it is swept"))
    correct(model, x, checkpoint=tmp_path / "done", **options)


def test_a_run_catches_up_with_no_more_than_the_sweep_that_it_was_in(monkeypatch, tmp_path):
    stages, measured = [], Cut._measured

    def counting(self, stage, *others):
        stages.append(stage.number)
        return measured(self, stage, *others)

    monkeypatch.setattr(Cut, "_measured", counting)
    model, x, options = arguments("given")
    correct(model, x, checkpoint=tmp_path / "whole", **options)
    names, whole = [*steps_recorded(tmp_path / "whole").values()], len(stages)
    before_the_last_stage = len(names) - 1 - names[::-1].index("stage_measurements")
    stopped_after(before_the_last_stage, monkeypatch, tmp_path / "stopped")
    stages.clear()
    correct(model, x, checkpoint=tmp_path / "stopped", **options)
    assert stages[:2] == [0, 1]
    assert len(stages) < whole // 2


@pytest.mark.parametrize("count", [3, 12])  # in the float network; in the quantized one, beside the float one
def test_a_stage_that_is_run_again_has_the_same_bits_though_nothing_is_measured(monkeypatch, tmp_path, count):
    model, x, options = arguments("deep")
    expected = record_of(correct(model, x, **options))
    stopped_after(count, monkeypatch, tmp_path / "stopped", "deep")
    assert record_of(correct(model, x, checkpoint=tmp_path / "stopped", **options)) == expected


@pytest.mark.slow
def test_a_run_goes_on_on_a_cluster_and_back_on_this_machine(monkeypatch, tmp_path):
    distributed = pytest.importorskip("distributed")
    model, x, options = arguments("deep")
    expected = record_of(correct(model, x, **options))
    options_of_cluster: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(processes=True, local_directory=tmp_path, **options_of_cluster) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        stopped_after(3, monkeypatch, tmp_path / "begun here", "deep")
        stopped_after(3, monkeypatch, tmp_path / "begun there", "deep", client=client)
        stopped_after(12, monkeypatch, tmp_path / "begun there", "deep")
        stopped_after(30, monkeypatch, tmp_path / "begun there", "deep", client=client)
        assert record_of(correct(model, x, checkpoint=tmp_path / "begun here", client=client, **options)) == expected
    assert record_of(correct(model, x, checkpoint=tmp_path / "begun there", **options)) == expected
    recorded = [steps_recorded(tmp_path / name) for name in ("begun here", "begun there")]
    assert recorded[0] == recorded[1]
