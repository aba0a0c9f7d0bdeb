"""Models in files: external data, what is no model, and outputs that are written whole or not at all."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import EncodeError
from onnx import helper, numpy_helper

from biascorr import whole_file
from biascorr.adapters.onnx import files
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.adapters.onnx.tensors import array_of, whole_model
from biascorr.whole_file import mode_of
from networks import as_constant_nodes, biases, constants_of, mean_corrected, model_from_text, samples, two_layers, weights

X = samples(4, 3, 6, 6)


def outcome(model):
    """ "corrected", or what is wrong with the model."""
    try:
        mean_corrected(model, X)
    except ValueError as error:
        return str(error)
    return "corrected"


def names_in(folder):
    """Names of files; a star in place of what is drawn anew each time."""
    return sorted(re.sub(r"\.[0-9a-f]{8}\.data$", ".*.data", path.name) for path in folder.iterdir())


# External data


def external(folder, model=None, name="model.onnx", location="model.data", **options):
    """A model with every tensor in a file beside it."""
    path = folder / name
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model or two_layers(), path, save_as_external_data=True, location=location, size_threshold=0, **options)
    return path


def with_entry(path, key, value):
    """Changes an entry of the description of the first external tensor; None removes it."""
    model = onnx.load(path, load_external_data=False)
    entries = model.graph.initializer[0].external_data
    kept = {entry.key: entry.value for entry in entries} | {key: value}
    del entries[:]
    entries.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in kept.items() if v is not None)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["model.data", "data/weights.bin", "Gewichte für x.data"])
def test_external_data_is_read(location, tmp_path):
    path = external(tmp_path, location=location)
    correction = mean_corrected(path, X)
    assert constants_of(correction.model).keys() == constants_of(two_layers()).keys()
    for name, array in constants_of(mean_corrected(two_layers(), X).model).items():
        np.testing.assert_array_equal(constants_of(correction.model)[name], array)


def test_external_data_is_read_from_the_folder_of_a_relative_path(tmp_path, monkeypatch):
    external(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert mean_corrected("model.onnx", X).report[0].method == "mean"


def test_external_data_is_read_for_a_folder_that_is_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    external(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert mean_corrected(tmp_path / "link" / "model.onnx", X).report[0].method == "mean"


def test_external_data_of_constant_nodes_is_read(tmp_path):
    path = external(tmp_path, as_constant_nodes(two_layers()), convert_attribute=True)
    assert [layer.method for layer in mean_corrected(path, X).report] == ["mean"] * 3


def test_external_data_of_a_subgraph_is_read(tmp_path):
    text = """g (float[?,7] x, bool[] flag) => (float[?,5] y) {
        [layer] t = Gemm(x, w, b)
        y = If (flag) <then_branch = a () => (float[?,5] p) <float[1] s = {2.0}> { p = Mul(t, s) },
                       else_branch = c () => (float[?,5] q) { q = Neg(t) }>
    }"""
    model = model_from_text(text, w=weights(7, 5, axis=1), b=biases(5))
    inner = model.graph.node[1].attribute[0].g.initializer[0]
    inner.CopyFrom(onnx.TensorProto(name="s", dims=[1], data_type=onnx.TensorProto.FLOAT))
    inner.data_location = onnx.TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="model.data")
    (tmp_path / "model.data").write_bytes(np.float32(2).tobytes())
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    corrected = mean_corrected(tmp_path / "model.onnx", [{"x": samples(6, 7), "flag": np.array(True)}]).model
    assert numpy_helper.to_array(corrected.graph.node[1].attribute[0].g.initializer[0]) == 2


def test_corrected_model_of_external_data_is_one_file(tmp_path):
    path = external(tmp_path)
    mean_corrected(path, X).save(tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["model.data", "model.onnx", "out.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx", load_external_data=False), full_check=True)


def wide(folder):
    """A model with 64 KB of weights in a file beside it."""
    model = model_from_text("g (float[?,128] x) => (float[?,128] y) { [layer] y = MatMul(x, w) }", w=weights(128, 128, axis=1))
    return external(folder, model)


@pytest.mark.parametrize("change", ["truncated", "rewritten"])
def test_external_data_that_is_changed_after_loading(change, tmp_path):
    path, x = wide(tmp_path), samples(8, 128)
    correction = mean_corrected(path, x)
    with (tmp_path / "model.data").open("r+b") as file:
        file.truncate(100) if change == "truncated" else file.write(b"other")
    os.utime(tmp_path / "model.data", ns=(1, 1))
    with pytest.raises(ValueError, match=r"model\.data: changed since the model was loaded$"):
        correction.save(tmp_path / "out.onnx")
    with pytest.raises(ValueError, match=r"model\.data: changed since the model was loaded$"):
        _ = correction.model
    assert names_in(tmp_path) == ["model.data", "model.onnx"]


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_external_data_that_is_removed_or_replaced_after_loading(change, tmp_path):
    path, x = wide(tmp_path), samples(8, 128)
    correction = mean_corrected(path, x)
    expected = mean_corrected(path, x).model
    (tmp_path / "model.data").unlink()
    if change == "replaced":
        (tmp_path / "model.data").write_bytes(b"other")
    correction.save(tmp_path / "out.onnx", provenance=False)
    assert onnx.load(tmp_path / "out.onnx") == expected == correction.model


def test_saving_over_the_files_that_are_mapped(tmp_path, monkeypatch):
    path, x = wide(tmp_path), samples(8, 128)
    correction, expected = mean_corrected(path, x), mean_corrected(path, x).model
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1000)
    (tmp_path / "model.data").rename(tmp_path / "model.onnx.data")
    with_entry(path, "location", "model.onnx.data")
    mean_corrected(path, x).save(path, force=True)
    assert constants_of(onnx.load(path)).keys() == constants_of(expected).keys()
    for name, array in constants_of(onnx.load(path)).items():
        np.testing.assert_array_equal(array, constants_of(correction.model)[name])


def test_missing_external_data(tmp_path):
    path = external(tmp_path)
    (tmp_path / "model.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx: tensor w1: external data model\.data is missing"):
        mean_corrected(path, X)


def test_external_data_without_a_path():
    with TemporaryDirectory() as folder:
        path = external(Path(folder))
        given = (path.read_bytes(), onnx.load(path, load_external_data=False))
    for each in given:
        with pytest.raises(ValueError, match=r"^reference: tensor w1 is in an external file; give the path"):
            mean_corrected(each, X)


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_truncated_external_data(left, tmp_path):
    path = external(tmp_path)
    data = (tmp_path / "model.data").read_bytes()
    (tmp_path / "model.data").write_bytes(data[:left])
    with pytest.raises(ValueError, match=r"model\.onnx: tensor \w+: external data model\.data is truncated"):
        mean_corrected(path, X)


def link(path, target):
    path.symlink_to(target)
    return path.name


OUTSIDE = {
    "parent folder": lambda _: "../outside/model.data",
    "parent folder, in disguise": lambda _: "sub/../../outside/model.data",
    "absolute path": lambda folder: str(folder / "outside" / "model.data"),
    "symbolic link": lambda folder: link(folder / "inside" / "link.data", folder / "outside" / "model.data"),
    "folder that is a symbolic link": lambda folder: link(folder / "inside" / "sub", folder / "outside") + "/model.data",
}


@pytest.mark.parametrize("way", OUTSIDE, ids=lambda way: way.replace(" ", "_"))
def test_external_data_outside_the_folder_is_refused(way, tmp_path):
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    path = external(tmp_path / "inside")
    (tmp_path / "inside" / "model.data").rename(tmp_path / "outside" / "model.data")
    with_entry(path, "location", OUTSIDE[way](tmp_path))
    with pytest.raises(ValueError, match=r"model\.onnx: tensor w1: external data .* is outside the model's folder"):
        mean_corrected(path, X)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_external_data_that_is_a_link_inside_the_folder(kind, tmp_path):
    path = external(tmp_path)
    data = (tmp_path / "model.data").rename(tmp_path / "other.data")
    if kind == "symbolic":
        (tmp_path / "model.data").symlink_to(data.name)
    else:
        (tmp_path / "model.data").hardlink_to(data)
    assert re.search(r"^corrected$|tensor w1", outcome(path))  # onnx itself refuses links


ENTRIES = [
    ("location", None), ("location", ""), ("location", "."), ("location", "sub"), ("location", "a\0b"),
    ("offset", "-4"), ("offset", "many"), ("offset", str(2**62)),
    ("length", "-4"), ("length", "many"), ("length", str(2**62)), ("length", "8"), ("length", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ENTRIES)
def test_malformed_description_of_external_data_is_refused(key, value, tmp_path):
    path = with_entry(external(tmp_path), key, value)
    (tmp_path / "sub").mkdir()
    with pytest.raises((OSError, ValueError), match="w1"):
        mean_corrected(path, X)


# What is no model


NO_MODELS = {
    "empty file": b"",
    "text": b"import onnx\n" * 20,
    "zeros": bytes(100),
    "ones": b"\xff" * 100,
    "random bytes": np.random.default_rng(0).bytes(1000),
    "numpy file": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }",
    "zip": b"PK\x03\x04" + bytes(60),
    "tensor": numpy_helper.from_array(np.ones(9, np.float32), "w").SerializeToString(),
    "model without a graph": onnx.ModelProto(ir_version=8, producer_name="tests").SerializeToString(),
    "graph without a model": two_layers().graph.SerializeToString(),
}


@pytest.mark.parametrize("name", NO_MODELS, ids=lambda name: name.replace(" ", "_"))
def test_bytes_that_are_no_model(name, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(NO_MODELS[name])
    with pytest.raises(ValueError, match=r"^reference: .*model\.onnx: not an ONNX model"):
        mean_corrected(path, X)
    with pytest.raises(ValueError, match=r"^reference: not an ONNX model"):
        mean_corrected(NO_MODELS[name], X)


def test_model_cut_off_anywhere_is_refused():
    whole = two_layers().SerializeToString()
    outcomes = [outcome(whole[:size]) for size in range(0, len(whole), 3)]
    assert all(text == "corrected" or text.startswith("reference: ") for text in outcomes)
    assert outcomes.count("corrected") <= 1  # without its metadata a model is one still


def test_folder_as_model(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        mean_corrected(tmp_path, X)


def test_missing_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"reference: no such file: {tmp_path / 'none.onnx'}")):
        mean_corrected(tmp_path / "none.onnx", X)


CONV = "g (float[?,3,6,6] x) => (float[?,5,?,?] y) { [layer] y = Conv(x, w, b) }"


class Parts:
    """A model of one Conv and the parts of it that tests change."""

    def __init__(self):
        self.model = model_from_text(CONV, w=weights(5, 3, 3, 3), b=biases(5))
        self.graph = self.model.graph
        self.node = self.graph.node[0]
        self.w, self.b = self.graph.initializer

    def reads(self, *names):
        del self.node.input[:]
        self.node.input.extend(names)

    def has(self, name, value):
        self.node.attribute.append(helper.make_attribute(name, value))


def becomes(tensor, array):
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


INVALID = {
    "no opset": lambda parts: parts.model.ClearField("opset_import"),
    "an opset of the future": lambda parts: setattr(parts.model.opset_import[0], "version", 9999),
    "an unknown operator": lambda parts: setattr(parts.node, "op_type", "Convolution"),
    "an unknown domain": lambda parts: setattr(parts.node, "domain", "nowhere"),
    "an undefined input": lambda parts: parts.reads("z", "w", "b"),
    "undefined weights": lambda parts: parts.reads("x", "z", "b"),
    "undefined bias": lambda parts: parts.reads("x", "w", "z"),
    "an undefined output": lambda parts: setattr(parts.graph.output[0], "name", "z"),
    "a node that reads itself": lambda parts: parts.reads("y", "w", "b"),
    "a layer without weights": lambda parts: parts.reads("x"),
    "a layer without inputs": lambda parts: parts.reads(),
    "a layer without outputs": lambda parts: parts.node.ClearField("output"),
    "an input without a type": lambda parts: parts.graph.input[0].ClearField("type"),
    "an input of an unknown type": lambda parts: setattr(parts.graph.input[0].type.tensor_type, "elem_type", 77),
    "an input that is a sequence": lambda parts: parts.graph.input[0].CopyFrom(
        helper.make_tensor_sequence_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 6, 6])
    ),
    "weights of an unknown type": lambda parts: setattr(parts.w, "data_type", 77),
    "weights without a type": lambda parts: parts.w.ClearField("data_type"),
    "weights with too few values": lambda parts: setattr(parts.w, "raw_data", parts.w.raw_data[:-4]),
    "weights with half a value": lambda parts: setattr(parts.w, "raw_data", parts.w.raw_data[:-2]),
    "weights without values": lambda parts: parts.w.ClearField("raw_data"),
    "weights of text": lambda parts: becomes(parts.w, np.full((5, 3, 3, 3), "a", object)),
    "weights of two axes": lambda parts: becomes(parts.w, weights(5, 3)),
    "weights for other channels": lambda parts: becomes(parts.w, weights(5, 4, 3, 3)),
    "weights of no channels": lambda parts: becomes(parts.w, np.zeros((0, 3, 3, 3), np.float32)),
    "a kernel without taps": lambda parts: becomes(parts.w, np.zeros((5, 3, 0, 3), np.float32)),
    "a kernel wider than the image": lambda parts: becomes(parts.w, weights(5, 3, 9, 9)),
    "a bias of another length": lambda parts: becomes(parts.b, biases(4)),
    "groups that do not divide": lambda parts: parts.has("group", 2),
    "no groups": lambda parts: parts.has("group", 0),
    "strides of zero": lambda parts: parts.has("strides", [0, 0]),
    "strides of one axis": lambda parts: parts.has("strides", [1]),
    "dilations of zero": lambda parts: parts.has("dilations", [0, 1]),
    "pads of one axis": lambda parts: parts.has("pads", [1, 1]),
    "pads that are a number": lambda parts: parts.has("pads", 1),
    "pads that are text": lambda parts: parts.has("pads", "none"),
    "an unknown auto_pad": lambda parts: parts.has("auto_pad", "SAME"),
    "an auto_pad that is a number": lambda parts: parts.has("auto_pad", 1),
}


@pytest.mark.parametrize("name", INVALID, ids=lambda name: name.replace(" ", "_"))
def test_invalid_model_is_refused(name):
    parts = Parts()
    INVALID[name](parts)
    with pytest.raises(ValueError, match=r"reference|model|layer"):
        mean_corrected(parts.model, X)


# Writing


def test_saved_model_is_the_corrected_one(tmp_path):
    correction = mean_corrected(two_layers(), X)
    correction.save(str(tmp_path / "out.onnx"), provenance=False)
    assert onnx.load(tmp_path / "out.onnx") == correction.model
    assert names_in(tmp_path) == ["out.onnx"]


def test_existing_file_is_kept(tmp_path):
    path = tmp_path / "out.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        mean_corrected(two_layers(), X).save(path)
    assert path.read_bytes() == b"precious"
    assert names_in(tmp_path) == ["out.onnx"]


def test_existing_file_is_overwritten_when_forced(tmp_path):
    path = tmp_path / "out.onnx"
    path.write_bytes(b"precious" * 1000)
    correction = mean_corrected(two_layers(), X)
    correction.save(path, force=True, provenance=False)
    assert onnx.load(path) == correction.model
    assert names_in(tmp_path) == ["out.onnx"]


def test_model_may_be_overwritten_with_its_own_correction(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(two_layers(), path)
    correction = mean_corrected(path, X)
    correction.save(path, force=True, provenance=False)
    assert onnx.load(path) == correction.model


def test_file_that_appears_while_writing_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.onnx"
    flush = whole_file._flush
    monkeypatch.setattr(whole_file, "_flush", lambda temporary: (flush(temporary), path.write_bytes(b"precious")))
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        mean_corrected(two_layers(), X).save(path)
    assert path.read_bytes() == b"precious"
    assert names_in(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["none/out.onnx", "file/out.onnx"])
def test_folder_that_is_none_cannot_be_written_to(name, force, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name).rsplit("/", 1)[0])):
        mean_corrected(two_layers(), X).save(tmp_path / name, force=force)
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("force", [False, True])
def test_folder_is_not_overwritten(force, tmp_path):
    (tmp_path / "out.onnx").mkdir()
    with pytest.raises(OSError, match=r"out\.onnx"):
        mean_corrected(two_layers(), X).save(tmp_path / "out.onnx", force=force)
    assert names_in(tmp_path) == ["out.onnx"]
    assert names_in(tmp_path / "out.onnx") == []


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # like /dev/null, which root could replace
    with pytest.raises(OSError, match="pipe"):
        mean_corrected(two_layers(), X).save(tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()
    assert names_in(tmp_path) == ["pipe"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("force", [False, True])
def test_permissions_follow_the_umask(mask, force, tmp_path):
    before = os.umask(mask)
    try:
        mean_corrected(two_layers(), X).save(tmp_path / "out.onnx", force=force)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == 0o666 & ~mask


def in_process(script, *arguments):
    """Runs a script that may limit what its process can do."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])


NO_SPACE = """
    import resource, sys
    from pathlib import Path
    from biascorr.adapters.onnx import files
    from biascorr.adapters.onnx.tensors import Values
    from networks import model_from_text, weights
    path, limit, protobuf_limit, force = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "force"
    model = model_from_text("g (float[?,8] x) => (float[?,64] y) { y = MatMul(x, w) }", w=weights(8, 64, axis=1))
    files.PROTOBUF_LIMIT = protobuf_limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        files.save(model, Values(), path, force=force)
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("force", ["force", "keep"])
@pytest.mark.parametrize("protobuf_limit", [files.PROTOBUF_LIMIT, 1000], ids=["one_file", "external_data"])
def test_write_that_fails_leaves_nothing_behind(protobuf_limit, force, tmp_path):
    path = tmp_path / "out.onnx"
    if force == "force":
        path.write_bytes(b"precious")
    done = in_process(NO_SPACE, path, 600, protobuf_limit, force)
    assert "File too large" in done.stdout, done.stderr
    assert names_in(tmp_path) == (["out.onnx"] if force == "force" else [])
    assert force == "keep" or path.read_bytes() == b"precious"


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from biascorr.adapters.onnx import files
    from biascorr.adapters.onnx.tensors import Values
    from networks import two_layers
    path = Path(sys.argv[1])
    model = two_layers()
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    try:
        files.save(model, Values(), path)
    except PermissionError as error:
        print("PermissionError", error)
"""


def test_folder_that_is_read_only_cannot_be_written_to():
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        done = in_process(READ_ONLY, Path(folder) / "out.onnx")
        assert done.stdout.startswith("PermissionError"), done.stderr
        assert folder in done.stdout
        assert names_in(Path(folder)) == []
        Path(folder).chmod(0o755)


def test_changes_of_the_corrected_model_are_saved(tmp_path):
    correction = mean_corrected(two_layers(), X)
    correction.model.metadata_props.add(key="version", value="3")
    assert correction.model is correction.model
    correction.save(tmp_path / "out.onnx", provenance=False)
    assert onnx.load(tmp_path / "out.onnx") == correction.model
    assert {entry.key for entry in correction.model.metadata_props} == {"author", "version"}


# Models that one protobuf message cannot hold


def wide_model():
    return model_from_text(CONV, w=weights(5, 3, 5, 5), b=biases(5))


def limited(method):
    """Serialization as of a protobuf whose messages hold 1000 bytes: beyond, it fails, the mere count of bytes too."""

    def call(self, *arguments, **options):
        result = method(self, *arguments, **options)
        if (result if isinstance(result, int) else len(result)) > 1000:
            raise EncodeError("Failed to serialize proto")
        return result

    return call


@pytest.fixture
def small_limit(monkeypatch):
    """As if a message could hold 1000 bytes."""
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1000)
    for name in ("ByteSize", "SerializeToString"):
        monkeypatch.setattr(onnx.ModelProto, name, limited(getattr(onnx.ModelProto, name)))


@pytest.mark.usefixtures("small_limit")
def test_model_over_the_limit_is_written_with_external_data(tmp_path):
    correction = mean_corrected(wide_model(), X)
    correction.save(tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["out.onnx", "out.onnx.*.data"]
    assert (tmp_path / "out.onnx").stat().st_size < 1000
    assert onnx.load(tmp_path / "out.onnx").graph.node == correction.model.graph.node
    for name, array in constants_of(onnx.load(tmp_path / "out.onnx")).items():
        np.testing.assert_array_equal(array, constants_of(correction.model)[name])
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_model_over_the_limit_gives_the_same_result(request):
    expected = mean_corrected(wide_model(), X).model
    request.getfixturevalue("small_limit")
    assert mean_corrected(wide_model(), X).model == expected


@pytest.mark.usefixtures("small_limit")
def test_changes_of_a_model_over_the_limit_are_saved(tmp_path):
    correction = mean_corrected(wide_model(), X)
    correction.model.producer_name = "me"
    correction.save(tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["out.onnx", "out.onnx.*.data"]
    assert onnx.load(tmp_path / "out.onnx").producer_name == "me"
    for name, array in constants_of(onnx.load(tmp_path / "out.onnx")).items():
        np.testing.assert_array_equal(array, constants_of(correction.model)[name])


@pytest.mark.usefixtures("small_limit")
def test_model_over_the_limit_loads_again(tmp_path):
    mean_corrected(wide_model(), X).save(tmp_path / "once.onnx")
    mean_corrected(tmp_path / "once.onnx", X).save(tmp_path / "twice.onnx")
    assert names_in(tmp_path) == ["once.onnx", "once.onnx.*.data", "twice.onnx", "twice.onnx.*.data"]


@pytest.mark.usefixtures("small_limit")
def test_model_over_the_limit_may_have_its_weights_in_constant_nodes(tmp_path):
    mean_corrected(as_constant_nodes(wide_model()), X).save(tmp_path / "out.onnx")
    assert [layer.method for layer in mean_corrected(tmp_path / "out.onnx", X).report] == ["mean"]


@pytest.mark.usefixtures("small_limit")
def test_existing_files_are_kept_by_a_model_over_the_limit(tmp_path):
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "out.onnx"))):
        mean_corrected(wide_model(), X).save(tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["out.onnx", "out.onnx.data"]
    assert all((tmp_path / name).read_bytes() == b"precious" for name in names_in(tmp_path))


@pytest.mark.usefixtures("small_limit")
def test_existing_files_are_overwritten_by_a_model_over_the_limit_when_forced(tmp_path):
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_bytes(b"precious" * 1000)
    correction = mean_corrected(wide_model(), X)
    correction.save(tmp_path / "out.onnx", force=True)
    assert [*names_in(tmp_path)] == ["out.onnx", "out.onnx.*.data", "out.onnx.data"]  # that of somebody else stays
    np.testing.assert_array_equal(constants_of(onnx.load(tmp_path / "out.onnx"))["b"], constants_of(correction.model)["b"])


@pytest.mark.usefixtures("small_limit")
def test_permissions_of_external_data_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        mean_corrected(wide_model(), X).save(tmp_path / "out.onnx")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def numbered(k):
    """A model over the limit that is told apart by its weights and by its name."""
    model = wide_model()
    model.producer_name = f"model {k}"
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), k), tensor.name))
    return model


def assert_whole(path):
    """Whatever happened, a model has its own weights."""
    model = onnx.load(path)
    k = float(model.producer_name.removeprefix("model "))
    assert all((array == k).all() for array in constants_of(model).values())
    return k


STEPS = ["open", "fsync", "replace", "link", "chmod", "unlink"]


class Killed(BaseException):
    """In place of a signal that ends the process."""


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_is_cut_off_leaves_a_model_with_its_own_weights(step, existing, after, tmp_path, monkeypatch):
    path, left = tmp_path / "out.onnx", after
    if existing:
        files.save(*files.load(numbered(1), "model"), path)
    loaded = files.load(numbered(2), "model")

    def cut_off(call):
        def cut(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **options)

        return cut

    monkeypatch.setattr(os, step, cut_off(getattr(os, step)))
    with contextlib.suppress(Killed):
        files.save(*loaded, path, force=existing)
    monkeypatch.undo()
    if path.exists():
        assert assert_whole(path) in ((1, 2) if existing else (2,))
    else:
        assert not existing


@pytest.mark.usefixtures("small_limit")
def test_saves_at_the_same_time_never_mix(tmp_path):
    path, loaded = tmp_path / "out.onnx", {k: files.load(numbered(k), "model") for k in (1, 2, 3)}
    files.save(*loaded[1], path)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            for done in [pool.submit(files.save, *each, path, force=True) for each in loaded.values()]:
                done.result()
            assert_whole(path)


@pytest.mark.usefixtures("small_limit")
def test_data_of_a_model_that_is_overwritten_is_removed_and_no_other(tmp_path):
    for k, name in ((1, "out.onnx"), (1, "out.onnx.other"), (1, "other.onnx")):
        files.save(*files.load(numbered(k), "model"), tmp_path / name)
    (tmp_path / "out.onnx.00000000.data").write_bytes(b"of nobody we know")
    before = set(tmp_path.iterdir())
    files.save(*files.load(numbered(2), "model"), tmp_path / "out.onnx", force=True)
    gone = before - set(tmp_path.iterdir())
    assert len(gone) == 1
    assert names_in(tmp_path) == sorted(
        [f"{name}{end}" for name in ("out.onnx", "out.onnx.other", "other.onnx") for end in ("", ".*.data")]
        + ["out.onnx.*.data"]
    )
    assert [assert_whole(tmp_path / name) for name in ("out.onnx", "out.onnx.other", "other.onnx")] == [2, 1, 1]


@pytest.mark.usefixtures("small_limit")
def test_both_files_are_written_beside_what_a_link_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/out.onnx").symlink_to("../real/out.onnx")
    files.save(*files.load(numbered(3), "model"), tmp_path / "linked/out.onnx")
    assert names_in(tmp_path / "linked") == ["out.onnx"]
    assert names_in(tmp_path / "real") == ["out.onnx", "out.onnx.*.data"]
    assert (tmp_path / "linked/out.onnx").is_symlink()
    assert assert_whole(tmp_path / "real/out.onnx") == 3
    assert files.load(tmp_path / "linked/out.onnx", "model")[0].producer_name == "model 3"


def test_forced_output_keeps_its_mode(tmp_path):
    path = tmp_path / "out.onnx"
    path.write_bytes(b"before")
    path.chmod(0o604)
    mean_corrected(two_layers(), X).save(path, force=True)
    assert path.stat().st_mode & 0o777 == 0o604


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("it is that of all threads"))
    mean_corrected(two_layers(), X).save(tmp_path / "out.onnx")


@pytest.mark.parametrize("name", ["folder", "pipe", "n" * 300, "none/out.onnx", "file/out.onnx", "loop"])
@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_written_is_known_before(name, force, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    with pytest.raises(OSError, match=re.escape(str(path))):
        whole_file.check_output(path, force=force)
    with pytest.raises(OSError, match=re.escape(str(path))):
        mean_corrected(two_layers(), X).save(path, force=force)
    assert names_in(tmp_path) == ["file", "folder", "loop", "pipe"]


def with_external(folder, place):
    """A model with a tensor in a file: an initializer, one in a function, in a branch, or of a Constant node."""
    array = np.arange(1.0, 1001.0, dtype=np.float32)
    array.tofile(folder / "weights.bin")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1000])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 1000]) for name in "xy"]
    functions, nodes, initializers, opsets = [], [add], [], [helper.make_opsetid("", 17)]
    if place == "function":
        functions = [helper.make_function("f", "Shift", ["x"], ["y"], [constant, add], opsets)]
        nodes, opsets = [helper.make_node("Shift", ["x"], ["y"], domain="f")], [*opsets, helper.make_opsetid("f", 1)]
    elif place == "branch":
        then = helper.make_graph(
            [constant, helper.make_node("Add", ["x", "w"], ["o"])], "b", [], [onnx.ValueInfoProto(name="o")]
        )
        condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.bool_(True)))
        nodes = [condition, helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then)]
    elif place == "initializer":
        initializers = [tensor]
    else:
        nodes = [constant, add]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8), array


@pytest.mark.parametrize("place", ["function", "branch", "initializer", "node"])
def test_external_data_is_read_wherever_a_tensor_is(place, tmp_path, monkeypatch):
    """Never by onnxruntime, which would take a file of this name in the current folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    np.zeros(1000, np.float32).tofile(tmp_path / "elsewhere/weights.bin")
    model, array = with_external(tmp_path / "model", place)
    (tmp_path / "model/m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path / "elsewhere")
    x = np.ones((1, 1000), np.float32)
    (found,) = OnnxNetwork.load(tmp_path / "model/m.onnx", "model").part({"x": x}, ["y"])({"x": x}).values()
    np.testing.assert_array_equal(found[0], array + 1)
    with pytest.raises(ValueError, match="tensor w is in an external file; give the path of the model"):
        files.load(model, "model")


def test_models_and_data_as_caches_link_them(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    model, array = with_external(tmp_path, "initializer")
    (tmp_path / "blobs/1f2e").write_bytes(model.SerializeToString())
    (tmp_path / "weights.bin").rename(tmp_path / "blobs/9a8b")
    (tmp_path / "snapshots/abc/m.onnx").symlink_to("../../blobs/1f2e")
    (tmp_path / "snapshots/abc/weights.bin").symlink_to("../../blobs/9a8b")
    loaded, values = files.load(tmp_path / "snapshots/abc/m.onnx", "model")
    np.testing.assert_array_equal(array_of(loaded.graph.initializer[0], values), array)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "inside/../../secret", "linked"])
def test_external_data_out_of_the_folders_of_the_model_is_refused(location, tmp_path):
    (tmp_path / "model").mkdir()
    model, _ = with_external(tmp_path / "model", "initializer")
    (tmp_path / "secret").write_bytes(b"0" * 4000)
    (tmp_path / "model/linked").symlink_to("../secret")
    model.graph.initializer[0].external_data[0].value = location
    (tmp_path / "model/m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="is outside the model's folder"):
        files.load(tmp_path / "model/m.onnx", "model")


def test_an_unknown_type_is_one_line(tmp_path):
    model, _ = with_external(tmp_path, "initializer")
    model.graph.initializer[0].data_type = 777
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="^model: .*tensor w: unknown data type 777$"):
        files.load(tmp_path / "m.onnx", "model")


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a named pipe"), (os.mkdir, "a folder")])
def test_a_model_that_is_no_file(make, kind, tmp_path):
    make(tmp_path / "m.onnx")
    with pytest.raises(OSError, match=rf"^model: {re.escape(str(tmp_path / 'm.onnx'))}: {kind}, expected a file$"):
        files.load(tmp_path / "m.onnx", "model")


@pytest.mark.usefixtures("small_limit")
def test_external_data_is_never_more_open_than_the_model_that_is_replaced(tmp_path, monkeypatch):
    path, modes = tmp_path / "out.onnx", []
    path.write_bytes(b"before")
    path.chmod(0o600)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (modes.extend(map(mode_of, tmp_path.iterdir())), fsync(descriptor)))
    files.save(*files.load(numbered(1), "model"), path, force=True)
    assert set(modes) == {0o600} == set(map(mode_of, tmp_path.iterdir()))


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("copy", [shutil.copy, os.link])
def test_data_that_a_copy_of_the_model_needs_stays(copy, tmp_path):
    files.save(*files.load(numbered(1), "model"), tmp_path / "out.onnx")
    copy(tmp_path / "out.onnx", tmp_path / "before.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    files.save(*files.load(numbered(2), "model"), tmp_path / "out.onnx", force=True)
    assert [assert_whole(tmp_path / name) for name in ("out.onnx", "before.onnx")] == [2, 1]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("value", [None, "abc", "-4"])
def test_a_model_that_is_replaced_may_be_anything(value, tmp_path):
    path = tmp_path / "out.onnx"
    path.write_bytes(b"no model")
    if value is not None:
        with_entry(external(tmp_path, name="out.onnx"), "offset", value)
    (tmp_path / "out.onnx.00000000.data").write_bytes(b"of nobody we know")
    files.save(*files.load(numbered(2), "model"), path, force=True)
    assert assert_whole(path) == 2
    assert (tmp_path / "out.onnx.00000000.data").exists()


def test_files_of_a_model_and_their_sizes(tmp_path):
    path = external(tmp_path)
    tensors = sum(array.nbytes for array in constants_of(two_layers()).values())
    assert files.sizes_by_file(path, "model") == {path: path.stat().st_size, tmp_path / "model.data": tensors}


def test_a_full_disk_is_known_before(tmp_path):
    with pytest.raises(OSError, match=rf"out\.onnx: folder {re.escape(str(tmp_path))} has \d+ bytes left, about {10**18} are"):
        whole_file.check_output(tmp_path / "out.onnx", size=10**18)


NO_DATA = {
    "a named pipe": lambda file: os.mkfifo(file),
    "a folder": lambda file: file.mkdir(),
    "Symlink loop|Too many levels": lambda file: file.symlink_to(file.name),
    "is missing": lambda file: file.symlink_to("none"),
}


@pytest.mark.parametrize("message", NO_DATA)
def test_external_data_that_is_no_file(message, tmp_path):
    model, _ = with_external(tmp_path, "initializer")
    (tmp_path / "weights.bin").unlink()
    NO_DATA[message](tmp_path / "weights.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OSError, match=f"^model: .*m.onnx: tensor w: .*({message})"):
        files.load(tmp_path / "m.onnx", "model")


@pytest.mark.parametrize(("data_type", "size"), [(onnx.TensorProto.STRING, 500), (onnx.TensorProto.FLOAT, -1000)])
def test_external_data_that_is_no_array(data_type, size, tmp_path):
    model, _ = with_external(tmp_path, "initializer")
    model.graph.initializer[0].data_type = data_type
    model.graph.initializer[0].dims[:] = [size]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="^model: .*m.onnx: tensor w: .*, expected an array of numbers$"):
        files.load(tmp_path / "m.onnx", "model")


def a_model() -> onnx.ModelProto:
    text = "g (float[N,40] x) => (float[N,30] y) { t = MatMul(x, w) u = MatMul(t, v) y = Add(u, b) }"
    return model_from_text(text, w=weights(40, 30), v=weights(30, 30), b=weights(30, 1).ravel())


def as_protobuf_reads_it(path: Path) -> Any:
    try:
        return files._from_file(path, "model")
    except ValueError as error:
        return str(error)


def as_it_is_loaded(path: Path) -> Any:
    try:
        return whole_model(*files.load(path, "model"))
    except ValueError as error:
        return str(error)


def test_files_are_loaded_as_protobuf_reads_them(tmp_path):
    model, path = a_model(), tmp_path / "model.onnx"
    data = model.SerializeToString()
    short = onnx.ModelProto()
    short.CopyFrom(model)
    short.graph.initializer[0].raw_data = short.graph.initializer[0].raw_data[:2000]  # less than the dimensions say
    more = onnx.ModelProto(graph=onnx.GraphProto(initializer=[numpy_helper.from_array(weights(40, 30), "more")]))
    whole = [data, short.SerializeToString(), data + more.SerializeToString(), more.SerializeToString() + data]
    unknown = [data + bytes([0b11111_010, 3, 1, 2, 3]), data + bytes([0b11111_000, 255, 1])]
    broken = [data[:cut] for cut in range(0, len(data), 97)] + [data + b"\x07", data + b"\x0a\xff", b"", b"\xff" * 40]
    for each in (*whole, *unknown, *broken):
        path.write_bytes(each)
        assert as_it_is_loaded(path) == as_protobuf_reads_it(path)


def test_large_initializers_are_copied_past_protobuf(tmp_path, monkeypatch):
    path, parsed = tmp_path / "model.onnx", []
    path.write_bytes(a_model().SerializeToString())
    monkeypatch.setattr(files, "_parse", lambda data, name, parse=files._parse: parsed.append(len(data)) or parse(data, name))
    _, values = files.load(path, "model")
    assert sorted(array.nbytes for array in values.values()) == [30 * 30 * 4, 40 * 30 * 4]
    assert sum(parsed) < 1000
