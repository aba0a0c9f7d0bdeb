"""Which checkpoints are gone on with, which are refused, and what a damaged record costs: its own time, and no more."""

import copy
import errno
import functools
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from biascorr import ChannelMean, QuantParams, correct
from biascorr.calibration.samples import SampleMeans
from biascorr.correction import identity
from biascorr.statistics import TapMean
from biascorr.sweep import checkpoint, running
from biascorr.sweep.checkpoint import Checkpoint
from biascorr.sweep.shard import OneShard
from biascorr.windows import TransposedWindow, Window
from networks import constants_of, quantized, samples, two_layers, with_constants

X = samples(12, 3, 6, 6)

FLOAT = two_layers()

QUANTIZED = quantized(FLOAT, [{"x": X[:4]}])

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="devices and folders of Linux")


def run(folder: Any, model: Any = FLOAT, data: Any = X, **options: Any) -> Any:
    """A short run."""
    given = {} if "quant_params" in options else {"quantized": QUANTIZED}
    return correct(model, data, checkpoint=folder, **{"method": "empirical", "batch_size": 4, **given, **options})


def record_of(correction: Any) -> dict[str, Any]:
    return {**correction.to_dict(), "seconds": None, "model": correction.model.SerializeToString(deterministic=True)}


@functools.cache
def expected() -> dict[str, Any]:
    return record_of(run(None))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of a run that is done; tests copy it."""
    folder = tmp_path_factory.mktemp("finished") / "checkpoint"
    assert record_of(run(folder)) == expected()
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "checkpoint"))


@pytest.fixture
def asked(monkeypatch):
    """The functions that the shard of a run is asked for, in order."""
    found = list[str]()

    class Asked(OneShard):
        def each(self, function, *others):
            found.append(function.__name__)
            return super().each(function, *others)

    monkeypatch.setattr(running, "OneShard", Asked)
    return found


def refused(folder: Path, *words: str, error: type[Exception] = ValueError, **changed: Any) -> None:
    """That such a run is refused, and the folder left as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    with pytest.raises(error) as raised:
        run(folder, **changed)
    text = str(raised.value)
    assert text.count("checkpoint: ") == 1
    for word in words:
        assert word in text, text
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {})


# of another run


def one_value_changed() -> Any:
    data = X.copy()
    data[7, 1, 2, 3] += 0.125
    return data


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (one_value_changed(), "data: "),
        (samples(13, 3, 6, 6), "data: "),
        (X[:11], "data: "),
        (X[::-1].copy(), "data: "),
        ([X[:4], X[4:10], X[10:]], "batches: 3 of 4, now 1 of 4, 1 of 6, 1 of 2"),
    ],
    ids=["one value", "a sample more", "a sample less", "order", "batches"],
)
def test_other_data_is_refused(folder, data, word):
    refused(folder, "is of another run (", word, "; give another folder, or remove this one to begin anew", data=data)


def test_other_validation_data_is_refused(tmp_path):
    run(tmp_path / "made", validation=X[:2])
    refused(tmp_path / "made", "data: ", validation=X[2:4])
    refused(tmp_path / "made", "data: ")


def with_attribute(model: Any, operator: str, **attributes: Any) -> Any:
    other = copy.deepcopy(model)
    node = next(node for node in other.graph.node if node.op_type == operator)
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    return other


def scaled(model: Any, ending: str) -> Any:
    name, array = next((name, array) for name, array in constants_of(model).items() if name.endswith(ending))
    return with_constants(model, **{name: array * np.float32(1.5)})


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("reference", with_constants(FLOAT, b1=constants_of(FLOAT)["b1"] + np.float32(0.125))),
        ("reference", with_attribute(FLOAT, "Flatten", axis=1)),
        ("quantized", scaled(QUANTIZED, "_scale")),
        ("quantized", with_attribute(QUANTIZED, "Gemm", alpha=1.0)),
    ],
    ids=["weight", "attribute", "scale", "attribute of the quantized one"],
)
def test_another_model_is_refused(folder, name, model):
    refused(folder, f"({name}: ", "..., now ", **{"model" if name == "reference" else name: model})


def of_run(_: Any) -> float:
    return 1.0


def of_sample(*_: Any) -> float:
    return 2.0


@pytest.mark.parametrize(
    ("options", "changed", "words"),
    [
        ({}, {"method": "mean"}, "(method: empirical, now mean)"),
        ({}, {"method": "auto"}, "(method: empirical, now auto)"),
        ({}, {"strength": 0.5}, "(strength: 1.0, now 0.5)"),
        ({}, {"shrunk": True}, "(shrunk: False, now True)"),
        ({}, {"new_biases": "skip"}, "(new_biases: add, now skip)"),
        ({}, {"exclude": ["last"]}, "(layers left out: [], now ['last'])"),
        ({}, {"only": ["first", "second"]}, "(layers left out: [], now ['last'])"),
        ({}, {"seed": 1}, "(seed: 0, now 1)"),
        ({}, {"batch_size": 3}, "(batches: 3 of 4, now 4 of 3)"),
        ({}, {"max_samples": 8}, "data: "),
        ({}, {"metric": of_sample}, "(metric: None, now of_sample)"),
        ({"metric": of_sample}, {"metric": of_run}, "(metric: of_sample, now of_run)"),
        ({}, {"quant_params": QuantParams(), "quantized": None}, "(quantized: "),
        ({"quant_params": QuantParams()}, {"quant_params": QuantParams(weight_bits=4)}, "weight_bits=4"),
        ({"quant_params": QuantParams()}, {"quant_params": QuantParams(seed=1)}, "seed=1"),
        ({"quant_params": QuantParams()}, {"equalize": True}, "(equalize: False, now True)"),
        ({"quant_params": QuantParams()}, {"fold": True}, "(fold: False, now True)"),
    ],
)
def test_an_option_that_changes_the_result_is_refused(tmp_path, options, changed, words):
    run(tmp_path / "made", **options)
    refused(tmp_path / "made", words, **{**options, **changed})


@pytest.mark.parametrize(
    "same",
    [
        {"threads": 1},
        {"memory_budget": 0},
        {"progress": lambda *_: None},
        {"max_samples": None},
        {"strength": 1},
        {"shrunk": np.False_},
        {"seed": np.int64(0)},
        {"only": ["*"]},
        {"data": list(np.split(X, 3))},
        {"data": {"x": X}},
        {"model": FLOAT.SerializeToString()},
    ],
    ids=lambda each: next(iter(each)),
)
def test_what_does_not_change_the_result_is_not_refused(folder, asked, same):
    assert record_of(run(folder, **same)) == expected()
    assert asked == []


def test_layers_to_ignore_may_have_another_order(tmp_path, asked):
    run(tmp_path, quant_params=QuantParams(ops_to_ignore=["first", "last"]))
    asked.clear()
    run(tmp_path, quant_params=QuantParams(ops_to_ignore=["last", "first"], use_cuda=False))
    assert asked == []


@pytest.mark.parametrize(
    ("module", "name"), [(identity, "biascorr"), (np, "numpy"), (onnxruntime, "onnxruntime"), (onnx, "onnx")]
)
def test_another_version_is_refused(folder, monkeypatch, module, name):
    before = module.__version__
    monkeypatch.setattr(module, "__version__", "99.1")
    refused(folder, f"({name}: {before}, now 99.1)")


# the folder


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "photo.new").write_text("mine")
    refused(tmp_path, "has other files; give a folder that is new or empty")


def unread() -> Iterator[Any]:
    pytest.fail("it is read")
    yield


def test_a_file_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file, expected a folder", data=unread())


@pytest.mark.parametrize("target", ["nothing", "link"])
def test_a_link_to_nothing_or_to_itself_is_refused_before_anything_is_read(target, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / target)
    refused(tmp_path / "link", "is neither a file nor a folder, nor a link to one, expected a folder", data=unread())


def test_a_name_with_a_null_character_is_refused_before_anything_is_read():
    refused(Path("a\0b"), r"a\x00b'), expected a path without null characters", data=unread())


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(OSError, match="checkpoint: .*File name too long"):
        run(tmp_path / ("a" * 300))


def test_what_is_not_of_the_data_is_refused_before_anything_is_read(folder):
    refused(folder, "(method: empirical, now mean)", data=unread(), method="mean")


def test_a_place_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "not" / "there", f"no such folder: {tmp_path / 'not'}", error=FileNotFoundError)


@pytest.mark.parametrize(
    ("place", "error"), [(5, TypeError), (["a"], TypeError), ("", ValueError), ("~nobody-here/x", ValueError)]
)
def test_what_is_no_path_is_refused(place, error):
    with pytest.raises(error, match="checkpoint: "):
        run(place)


HOLDER = """
import fcntl, sys
held = open(sys.argv[1], "ab")
fcntl.flock(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(folder):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        refused(folder, "is in use by another run; wait for it, or stop it", error=BlockingIOError)
        other.kill()
        other.wait()
    assert record_of(run(folder)) == expected()


def test_a_folder_in_use_by_a_thread_is_refused(tmp_path):
    inside, done = threading.Event(), threading.Event()

    def progress(step, *_):
        if step == "float outputs":
            inside.set()
            done.wait(60)

    first = threading.Thread(target=run, args=(tmp_path,), kwargs={"progress": progress})
    first.start()
    try:
        assert inside.wait(60)
        with pytest.raises(BlockingIOError, match="is in use by another run"):
            run(tmp_path)
    finally:
        done.set()
        first.join()
    assert record_of(run(tmp_path)) == expected()


def test_where_files_cannot_be_locked_nobody_is_kept_out(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    assert record_of(run(folder)) == expected()


def test_an_empty_folder_a_link_and_unicode_are_good_places(tmp_path, monkeypatch, asked):
    (tmp_path / "прогон ü").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "прогон ü", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert record_of(run("link")) == expected()
    asked.clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("прогон ü", tmp_path / "прогон ü", "~/прогон ü", os.fsencode("link").decode()):
        assert record_of(run(place)) == expected()
    assert asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "прогон ü"]


def test_a_process_may_go_to_another_folder_meanwhile(tmp_path, monkeypatch, asked):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run("made", progress=lambda *_: os.chdir(tmp_path / "elsewhere"))
    assert not [*(tmp_path / "elsewhere").iterdir()]
    asked.clear()
    found = record_of(run(tmp_path / "made"))
    assert asked == []
    assert found == expected()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"3", b"\xff\xfe", b"[" * 100000])
def test_a_damaged_description_is_refused(folder, content):
    (folder / "run.json").write_bytes(content)
    words = ("another run",) if content == b"[]" else ("run.json is damaged (", "remove the folder to begin anew")
    refused(folder, *words)


def test_the_description_of_something_else_is_refused(folder):
    (folder / "run.json").write_text(json.dumps({"name": "x", "method": ["a"]}))
    refused(folder, "is of another run (biascorr: None, now ", "method: ['a'], now empirical")


# records


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.record"))


def write(path: Path, payload: bytes) -> None:
    """A record that is whole."""
    path.write_bytes(checkpoint._MAGIC + hashlib.sha256(payload).digest() + payload)


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


DAMAGES = {
    "empty": lambda _: b"",
    "truncated": lambda content: content[:-1],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "only a line": lambda content: content[: len(checkpoint._MAGIC)],
    "longer": lambda content: content + b"\0",
    "first bit": lambda content: flipped(content, 0),
    "bit of the digest": lambda content: flipped(content, len(checkpoint._MAGIC) + 3),
    "bit of the value": lambda content: flipped(content, -9),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_damaged_record_is_found_again(folder, asked, damage, number):
    path = records(folder)[number]
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    assert record_of(run(folder)) == expected()
    assert asked == [pickle.loads(before[len(checkpoint._MAGIC) + 32 :])[0]]
    assert path.read_bytes() == before


def test_records_beyond_a_gap_count(folder, asked):
    paths = records(folder)
    for path in paths[1:3]:
        path.unlink()
    assert record_of(run(folder)) == expected()
    assert len(asked) == 2
    assert records(folder) == paths


@pytest.mark.parametrize("value", [("other_function", [0, 1, 2], []), ("kept_outputs", [0], [None]), None, 3, {}, ("a",), []])
def test_a_record_of_something_else_is_found_again(folder, asked, value):
    write(records(folder)[0], pickle.dumps(value))
    assert record_of(run(folder)) == expected()
    assert asked == ["kept_outputs"]


class Evil:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def named(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that calls what a module has by a name, as a text of protocol 0 to 4."""
    texts = b"".join(b"\x8c" + bytes([len(each)]) + each.encode() for each in (module, name))
    return b"\x80\x04" + texts + b"\x93(" + b"".join(arguments) + b"tR."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


TRICKS = {
    "os.system": lambda place: pickle.dumps(Evil(os.system, f"touch {place}")),
    "eval": lambda place: pickle.dumps(Evil(eval, f"open({str(place)!r}, 'w')")),
    "getattr": lambda place: pickle.dumps(Evil(getattr, place, "touch")),
    "protocol 0": lambda place: pickle.dumps(Evil(os.system, f"touch {place}"), protocol=0),
    "a checkpoint": lambda place: pickle.dumps(Evil(Checkpoint, place, {})),
    "state": lambda place: pickle.dumps(Evil(SampleMeans, 1, 2, state={"means": Evil(os.mkdir, str(place))})),
    "inside": lambda place: pickle.dumps(("kept_outputs", [0, 1, 2], [Evil(os.mkdir, str(place))])),
    "a module that runs": lambda _: named("biascorr.__main__", "main"),
    "a name with dots": lambda place: named("biascorr.statistics", "os.mkdir", text(str(place))),
    "a class with dots": lambda _: named("biascorr.windows", "Window.__init__.__globals__"),
    "what a module imports": lambda _: named("biascorr.calibration.samples", "resolved", text("os:getcwd")),
    "a function of the package": lambda _: named("biascorr.correction.correct", "correct", text("a")),
    "numpy": lambda place: named("numpy", "load", text(str(place))),
    "copyreg": lambda _: named("copyreg", "_reconstructor"),
    "a persistent object": lambda _: b"\x80\x04\x8c\x01aQ.",
    "no end": lambda _: b"\x80\x04]",
    "no pickle": lambda _: b"hello",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_record_that_does_more_than_hold_numbers_is_refused(folder, tmp_path, trick):
    place = tmp_path / "owned"
    write(records(folder)[0], TRICKS[trick](place))
    refused(folder, "000000.record is no record of a run (", "); remove the folder to begin anew")
    assert not place.exists()


def test_results_of_every_function_of_shards_can_be_read_again(tmp_path, asked):
    for number, (method, options) in enumerate(
        [
            ("auto", {}),
            ("auto", {"quant_params": QuantParams(weight_bits=4, activation_bits=8)}),
            ("mean", {}),
            ("iterative", {}),
        ]
    ):
        arguments = {"data": np.tile(X, (2, 1, 1, 1)), "method": method, "batch_size": 1, **options}
        found = record_of(run(tmp_path / str(number), **arguments))
        asked.clear()
        assert record_of(run(tmp_path / str(number), **arguments)) == found
        assert asked == []


def test_accumulators_can_be_read_again(tmp_path):
    taps = TapMean(Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))))
    transposed = TapMean(TransposedWindow((3, 3), (2, 2), (1, 1), ((0, 0), (0, 0)), (0, 0)))
    integers, reals = ChannelMean(), ChannelMean()
    for each in (taps, transposed):
        each.update(X)
    for _ in range(2):
        integers.update(np.full((2, 3), 2**62))
        reals.update(np.asfortranarray(X[0, 0].astype(np.float64)))
    with Checkpoint(tmp_path, {}) as kept:
        kept.keep(0, [taps, transposed, integers, reals])
        found = kept.record(0)
    for one, other in zip(found, [taps, transposed, integers, reals], strict=True):
        other.merge(one)
        one.merge(one)
        assert np.array_equal(one.mean(), other.mean())
        assert one.count == other.count


# the disk


@LINUX
def test_a_full_disk_is_an_error_and_what_was_recorded_counts(tmp_path, asked):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    run(folder)
    names = asked.copy()
    for path in records(folder)[3:]:
        path.unlink()
    (folder / "000003.new").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match="checkpoint: cannot be written: No space left on device; give another folder, or"
    ) as raised:
        run(folder)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(folder / "000003.record")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *(f"00000{k}.record" for k in range(3)), "run.json"]
    asked.clear()
    assert record_of(run(folder)) == expected()
    assert asked == names[3:]


@LINUX
def test_a_folder_that_cannot_be_made_is_an_error():
    with pytest.raises(OSError, match="checkpoint: cannot be written: .*; give another folder"):
        run("/sys/biascorr")


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / ".lock").mkdir()  # no user is kept from a folder who is root
    with pytest.raises(OSError, match="checkpoint: cannot be written: .*; give another folder"):
        run(tmp_path)


def test_a_folder_that_is_deleted_meanwhile_is_an_error(tmp_path):
    def progress(step, *_):
        if step == "float outputs":
            shutil.rmtree(tmp_path / "made", ignore_errors=True)

    with pytest.raises(FileNotFoundError, match="checkpoint: cannot be written: No such file or directory"):
        run(tmp_path / "made", progress=progress)
    assert record_of(run(tmp_path / "made")) == expected()


def test_a_record_that_cannot_be_read_is_an_error(folder):
    path = records(folder)[1]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="checkpoint: cannot be read: "):
        run(folder)


def test_a_metric_is_known_by_its_name_alone(tmp_path):
    run(tmp_path, metric=of_sample)
    other = functools.wraps(of_sample)(lambda *_: 3.0)
    other.__qualname__ = of_sample.__qualname__
    assert run(tmp_path, metric=other).scores["none"].metric == 2.0
