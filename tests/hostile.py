"""Files that nobody meant to be read: how they are made of valid ones, and what a reader may do with them.

A reader either takes a file or says what is wrong, with an error that it documents and that names the argument. Everything else
is a finding.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import traceback
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat

import biascorr
from networks import batch_norm, batch_norm_constants, biases, model_from_text, quantized, samples, two_layers, weights

DOCUMENTED = {ValueError, TypeError, OSError, FileNotFoundError}
"""No class that is derived from these: a UnicodeDecodeError is what somebody forgot."""

NAMED = re.compile(r"(model|reference|quantized|data|method|layer|--\w+)\b")
"""What an error begins with, if it does not name the file: an argument, or what else a user knows."""

SECONDS, ELEMENTS = 20, 1 << 16
"""A file is read and used in less time than this; data is made for inputs up to this size."""

_MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory."""

_METHODS = ("mean", "iterative", "empirical", "activation", "squared", "analytical", "auto")


@dataclass(frozen=True)
class Reader:
    """What reads a file, and how such files are made.

    Parameters
    ----------
    seeds : callable
        Makes valid files.
    read : callable
        Reads one, from its path.
    mutated : callable
        Changes one, as what is in it.
    suffix : str
        Of the file's name.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    mutated: Callable[[bytes, random.Random], bytes]
    suffix: str

    def finding(self, content: bytes) -> BaseException | None:
        """What is raised or takes too long and may not."""
        start = time.monotonic()
        with TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
            path = Path(folder) / f"file{self.suffix}"
            path.write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.read(path)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                if type(error) not in DOCUMENTED or not (NAMED.match(str(error)) or str(path) in str(error)):
                    return error
        taken = time.monotonic() - start
        return TimeoutError(f"{taken:.0f} seconds") if taken > SECONDS else None

    def variants(self, count: int, seed: int) -> Iterator[bytes]:
        """Changed files, the same ones for the same seed."""
        rng, seeds = random.Random(seed), self.seeds()
        for content in itertools.islice(itertools.cycle(seeds), count):
            for _ in range(rng.choice((1, 1, 2, 4))):
                content = self.changed(content, rng)
            yield content

    def changed(self, content: bytes, rng: random.Random) -> bytes:
        """Changed once: as what is in the file, or as bytes."""
        if rng.random() < 0.8:
            try:
                return self.mutated(content, rng)
            except Exception:  # it is too broken to be written again
                pass
        return changed_bytes(content, rng)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with some bytes others, gone, or there twice."""
    changed = bytearray(content or b"\0")
    at, length = rng.randrange(len(changed)), rng.choice((1, 2, 4, 8, 64))
    match rng.randrange(6):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at : at + length] = rng.randbytes(length)
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at:at] = changed[at : at + length]
        case 4:
            changed[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) & 0xFFFFFFFF)
        case _:
            del changed[at:]
    return bytes(changed)


INTEGERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**63 - 1, -(2**63), -1, -2)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, -1e38, math.inf, -math.inf, math.nan)
TEXTS = ("", "x", "w", "é", "\0", "a" * 300, "../x", "/dev/zero", "ai.onnx", "com.microsoft", "float32", "None", "{", "1e999")


def changed_integer(value: int, rng: random.Random) -> int:
    return rng.choice((*INTEGERS, value + 1, value - 1, value * 2, -value, value ^ 1 << rng.randrange(16)))


# ONNX


def _onnx_seeds() -> list[bytes]:
    models = [
        two_layers(),
        *_quantized_models(),
        _normalized(),
        _transposed(),
        _with_branches(),
        _with_function(),
        _matmuls(),
        _with_sparse_weights(),
        _large(),
    ]
    return [model.SerializeToString() for model in models]


def _quantized_models() -> Iterator[onnx.ModelProto]:
    feeds = [{"x": samples(4, 3, 6, 6)}]
    yield quantized(two_layers(), feeds, per_channel=True)
    yield quantized(two_layers(), feeds, quant_format=QuantFormat.QOperator)


def _normalized() -> onnx.ModelProto:
    text = f"""g (float[N,3,6,6] x) => (float[N,2,M,M] y) {{
        [conv] a = Conv(x, w1, b1)
        {batch_norm("a", "n")}
        [clip] r = Clip(n, low, high)
        [depthwise] d = Conv<group=4>(r, w2)
        [last] y = Conv(d, w3, b3)
    }}"""
    limits = {"low": np.float32(0), "high": np.float32(6)}
    kernels = {"w1": weights(4, 3, 3, 3), "w2": weights(4, 1, 2, 2), "w3": weights(2, 4, 1, 1)}
    return model_from_text(text, **kernels, b1=biases(4), b3=biases(2), **batch_norm_constants(4), **limits)


def _transposed() -> onnx.ModelProto:
    text = """g (float[N,4,5] x) => (float[N,K,M] y) {
        [up] a = ConvTranspose<strides=[2], group=2, output_padding=[1]>(x, w1, b1)
        [leaky] r = LeakyRelu<alpha=0.1>(a)
        [pad] p = Pad(r, pads)
        [down] y = Conv<dilations=[2], auto_pad="SAME_UPPER">(p, w2)
    }"""
    constants = {"w1": weights(4, 3, 3, axis=1), "b1": biases(6), "w2": weights(5, 6, 3)}
    return model_from_text(text, **constants, pads=np.array([0, 0, 1, 0, 0, 1]))


def _with_branches() -> onnx.ModelProto:
    text = """g (float[N,7] x, bool[] flag) => (float[N,5] y) {
        [layer] t = Gemm(x, w, b)
        y = If (flag) <then_branch = a () => (float[N,5] p) <float[1] s = {2.0}> { p = Mul(t, s) },
                       else_branch = c () => (float[N,5] q) { q = Neg(t) }>
    }"""
    return model_from_text(text, w=weights(7, 5, axis=1), b=biases(5))


def _with_function() -> onnx.ModelProto:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,6] x) => (float[N,4] y) { [layer] t = MatMul(x, w) [call] y = own.twice<alpha=2.0>(t) }
    <domain: "own", opset_import: ["" : 17]> twice<alpha>(a) => (b) { c = LeakyRelu<alpha: float = @alpha>(a) b = Add(c, a) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weights(6, 4, axis=1), "w"))
    return model


def _matmuls() -> onnx.ModelProto:
    text = """g (float[N,3,6] x) => (float[N,3,2] y, float[N,3,3] z) {
        [left] a = MatMul(x, w1)
        [add] b = Add(a, b1)
        [softmax] s = Softmax(b)
        [transposed] t = Transpose<perm=[0,2,1]>(x)
        [product] z = MatMul(x, t)
        [shape] n = Shape(b)
        [reshaped] r = Reshape(s, n)
        [einsum] y = Einsum<equation="nij,jk->nik">(r, w2)
    }"""
    return model_from_text(text, w1=weights(6, 4, axis=1), b1=biases(4), w2=weights(4, 2, axis=1))


def _with_sparse_weights() -> onnx.ModelProto:
    model = model_from_text("g (float[N,6] x) => (float[N,4] y) { [layer] y = MatMul(x, w) }")
    indices = np.array([1, 5, 6, 11, 17, 23])
    values = numpy_helper.from_array(np.float32([1, -2, 0.5, 3, -1, 2]), "w")
    sparse = onnx.helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), [6, 4])
    model.graph.sparse_initializer.append(sparse)
    return model


def _large() -> onnx.ModelProto:
    """Weights that are kept apart from the model."""
    text = "g (float[N,16,4,4] x) => (float[N,16,M,M] y) { [a] a = Conv(x, w1) [r] r = Relu(a) [b] y = Conv(r, w2, b2) }"
    return model_from_text(text, w1=weights(16, 16, 3, 3), w2=weights(16, 16, 1, 1), b2=biases(16))


def _mutated_onnx(content: bytes, rng: random.Random) -> bytes:
    model = onnx.ModelProto.FromString(content)
    messages = list(_messages(model))
    for _ in range(20):
        message = rng.choice(messages)
        fields = [each for each, _ in message.ListFields()]
        field = rng.choice(fields if fields and rng.random() < 0.9 else message.DESCRIPTOR.fields)
        try:
            _change_field(message, field, messages, rng)
            break
        except (AttributeError, TypeError, ValueError):  # a value that such a field cannot have
            continue
    return model.SerializeToString()


def _messages(message: Any) -> Iterator[Any]:
    """It and all inside of it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                yield from _messages(each)


def _change_field(message: Any, field: Any, messages: Sequence[Any], rng: random.Random) -> None:
    value, others = getattr(message, field.name), [each for each in messages if each.DESCRIPTOR is field.message_type]
    if field.is_repeated:
        at = rng.randrange(len(value)) if value else 0
        match rng.randrange(4) if value else 3:
            case 0:
                del value[at]
            case 1:
                kept = list(value)
                kept[at], kept[0] = kept[0], kept[at]
                _set(message, field.name, kept)
            case 2 if field.message_type is None:
                value[at] = _changed_scalar(value[at], messages, rng)
            case 2:
                value[at].ParseFromString(rng.choice(others).SerializeToString())
            case _ if field.message_type is None:
                value.append(value[at] if value else _changed_scalar(_default(field), messages, rng))
            case _:
                value.add().MergeFromString(rng.choice(others).SerializeToString() if others else b"")
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is None:
        setattr(message, field.name, _changed_scalar(value, messages, rng))
    else:
        value.ParseFromString(rng.choice(others or [value]).SerializeToString())


def _set(message: Any, name: str, values: Sequence[Any]) -> None:
    copies = [copy.deepcopy(each) for each in values]
    message.ClearField(name)
    getattr(message, name).extend(copies)


def _default(field: Any) -> Any:
    return field.default_value if field.label != field.LABEL_REPEATED else {1: 0, 2: 0, 6: 0.0, 9: ""}.get(field.cpp_type, 0)


def _changed_scalar(value: Any, messages: Sequence[Any], rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return changed_integer(value, rng)
    if isinstance(value, float):
        return rng.choice(REALS)
    if isinstance(value, str):
        return rng.choice((*_strings(messages), *TEXTS))
    return rng.choice((b"", value[:-1], value + value[:5], changed_bytes(value, rng)))


def _strings(messages: Sequence[Any]) -> list[str]:
    return [value for message in messages for _, value in message.ListFields() if isinstance(value, str)] + [
        each
        for message in messages
        if message.DESCRIPTOR.name == "NodeProto"
        for each in (*message.input, *message.output, message.op_type)
    ]


# TFLite

_TFLITE = (
    "convolutions-int8", "grouped", "depthwise-int8", "transpose_conv-int8", "attention", "shared_biases-int8", "control_flow",
    "float16_weights", "sparse_weights", "int8_weights", "fixture:decoder_dynamic", "fixture:classifier_int8_in_out",
)  # fmt: skip


def _tflite_seeds() -> list[bytes]:
    from tflite_models import UNSUPPORTED
    from tflite_networks import content_of

    return [UNSUPPORTED[name]() if name in UNSUPPORTED else content_of(name) for name in _TFLITE]


def _mutated_tflite(content: bytes, rng: random.Random) -> bytes:
    from tflite_models import packed, unpacked

    model = unpacked(content)
    tables = list(_tables(model))
    table = rng.choice(tables)
    name = rng.choice([each for each in vars(table) if not each.startswith("_")])
    setattr(table, name, _changed_value(getattr(table, name), tables, rng))
    return packed(model, behind=rng.random() < 0.1)


def _tables(table: Any) -> Iterator[Any]:
    """It and all inside of it."""
    yield table
    for value in vars(table).values():
        for each in value if isinstance(value, list) else [value]:
            if type(each).__name__.endswith("T") or type(each).__name__ == "_AlignedBuffer":
                yield from _tables(each)


def _changed_value(value: Any, tables: Sequence[Any], rng: random.Random) -> Any:
    others = [each for each in tables if type(each) is type(value)]
    if isinstance(value, (bool, np.bool_)):
        return not value
    if isinstance(value, int):
        return rng.choice((changed_integer(value, rng), rng.randrange(-1, 30)))
    if isinstance(value, float):
        return rng.choice(REALS)
    if isinstance(value, (bytes, str)):
        return rng.choice(TEXTS).encode()
    if isinstance(value, np.ndarray) and value.size:
        return _changed_array(value, rng)
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return rng.choice((value[:at] + value[at + 1 :], [*value, value[at]], [value[at], *value], value[::-1], None))
    return rng.choice((None, *others))


def _changed_array(array: np.ndarray, rng: random.Random) -> Any:
    changed, at = array.copy().reshape(-1), rng.randrange(array.size)
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice((None, changed[:at], np.append(changed, changed[at]).astype(array.dtype)))
    if array.dtype.kind == "f":
        changed[at] = rng.choice(REALS)
    else:
        limits = np.iinfo(array.dtype)
        changed[at] = min(max(changed_integer(int(changed[at]), rng), limits.min), limits.max)
    return changed


# Arrays


def _array_seeds() -> list[bytes]:
    x = samples(4, 3, 6, 6)
    return [_saved(np.save, x), _saved(np.save, np.asfortranarray(x)), _saved(np.save, x.astype(">f4"))]


def _archive_seeds() -> list[bytes]:
    x = samples(4, 3, 6, 6)
    return [_saved(np.savez, x=x), _saved(np.savez_compressed, x=x), _saved(np.savez, x, x), _saved(np.savez, x=x[:2])]


def _saved(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


_HEADER_TEXTS = (
    "-1", "0", "4", "99999999999", "2**62", "()", "(4,)", "(4, 3, 6, 6)", "True", "False", "None", "'<f4'", "'<f8'", "'|O'",
    "'<U9'", "'<M8[ns]'", "'>f4'", "'|V0'", "'|S0'", "[('a', '<f4')]", "('<f4', (2,))", "'descr'", "'shape'", "{",
    "1e9", "\x00", "é",
)  # fmt: skip


def _mutated_npy(content: bytes, rng: random.Random) -> bytes:
    """With another word in the header, or bytes that are gone or more."""
    if rng.random() < 0.2:
        return content[: rng.randrange(len(content))] if rng.random() < 0.5 else content + bytes(rng.choice((1, 100)))
    version = rng.choice((1, 1, 1, 2, 3, 0, 255))
    size = struct.unpack("<H", content[8:10])[0]
    header, values = content[10 : 10 + size].decode("latin-1"), content[10 + size :]
    words = list(re.finditer(r"\([^()]*\)|'[^']*'|-?\d+|True|False", header))
    word = rng.choice(words)
    header = header[: word.start()] + rng.choice(_HEADER_TEXTS) + header[word.end() :]
    raw = header.encode()
    length = len(raw) if rng.random() < 0.9 else changed_integer(len(raw), rng) & 0xFFFF
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version < 2 else "<I", length) + raw + values


def _mutated_archive(content: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = rng.randrange(len(members))
    name, member = members[at]
    match rng.randrange(5):
        case 0:
            members[at] = rng.choice(TEXTS[1:]) + rng.choice(("", ".npy")), member
        case 1:
            members.append(members[at])
        case 2:
            members[at] = name, changed_bytes(member, rng)
        case _:
            members[at] = name, _mutated_npy(member, rng)
    made = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(made, "w", rng.choice((0, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))) as archive,
    ):
        warnings.simplefilter("ignore")
        for name, member in members:
            archive.writestr(name, member)
    return made.getvalue()


@functools.cache
def _float_model() -> bytes:
    return two_layers().SerializeToString()


def _read_data(path: Path) -> None:
    biascorr.correct(_float_model(), path, method="mean", threads=1)


# Models


def _read_model(path: Path) -> None:
    """Inspects a model and, where it is taken, corrects and equalizes it; what comes back is taken too."""
    found = biascorr.inspect(path)
    sizes = [[size if isinstance(size, int) else 2 for size in each.shape or (2,)] for each in found.inputs]
    if not found.inputs or any(math.prod(shape) > ELEMENTS for shape in sizes):
        return
    choice = zlib.crc32(path.read_bytes())
    rng = np.random.default_rng(choice)
    data = [{each.name: _values(rng, shape, each.dtype) for each, shape in zip(found.inputs, sizes)} for _ in range(4)]
    models = {"reference": _float_of(found, path.suffix), "quantized": path} if found.is_quantized else {"reference": path}
    corrected = path.with_name(f"corrected{path.suffix}")
    method = _METHODS[choice % len(_METHODS)]
    biascorr.correct(**models, data=data, method=method, equalize=not found.is_quantized and choice % 3 == 0, threads=1).save(
        corrected
    )
    biascorr.inspect(corrected)


def _float_of(quantized: biascorr.Inspection, suffix: str) -> bytes:
    """The float model whose layers have the names of those of a quantized one."""
    names = {layer.name.removesuffix("_quant") for layer in quantized.layers}
    return max(_float_models(suffix).items(), key=lambda each: len(each[0] & names))[1]


@functools.cache
def _float_models(suffix: str) -> dict[frozenset[str], bytes]:
    """By the names of their layers."""
    if suffix == ".onnx":
        models = [_float_model()]
    else:
        from tflite_networks import float_of

        models = [float_of(name) for name in _TFLITE if "-" in name or ":" in name]
    return {frozenset(layer.name for layer in biascorr.inspect(each).layers): each for each in models}


def _values(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    return rng.normal(0.5, 1, shape).astype(kind) if kind.kind == "f" else rng.integers(0, 2, shape).astype(kind)


# Keras


def _keras_seeds() -> list[bytes]:
    from keras_models import plain, sequential, with_norms

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        return [(make().save(path), path.read_bytes())[1] for make in (plain, sequential, with_norms)]


def _mutated_keras(content: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = rng.choice(list(members))
    if name.endswith(".json"):
        config = json.loads(members[name])
        *outer, last = rng.choice(list(_keys(config)))
        place = functools.reduce(operator.getitem, outer, config)
        changes = (None, True, 0, -1, 2**31, 2**63, 1e30, "", "x", "relu", [], [-1], {}, [place[last]] * 2)
        place[last] = rng.choice(changes)
        members[name] = json.dumps(config).encode()
    elif rng.random() < 0.1:
        del members[name]
    else:
        members[name] = changed_bytes(members[name], rng)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return made.getvalue()


def _keys(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all that is in a configuration."""
    if before:
        yield before
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _keys(value[key], (*before, key))


# The command line


def _config_seeds() -> list[bytes]:
    lines = [
        'method = "mean"',
        "max-samples = 2",
        "exclude = ['first', 'last']",
        "equalize = true",
        "strength = 0.5",
        "seed = 3",
    ]
    return ["\n".join(lines).encode(), b'quantized = "model.onnx"\nbatch-size = 2\nno-color = true\n']


def _mutated_config(content: bytes, rng: random.Random) -> bytes:
    words = (
        "{",
        "}",
        "[a]",
        "[[a]]",
        "=",
        "'",
        '"""',
        "true",
        "1e400",
        "nan",
        "-1",
        "1979-05-27",
        "\r",
        "é",
        "\0",
        "help",
        "config",
    )
    words = (*words, "data", "output", "force", "9" * 400, "progress", "report", "threads", "0", "memory-budget", "metric")
    parts = re.split(r"(\s+|=)", content.decode())
    parts[rng.randrange(len(parts))] = rng.choice(words)
    return "".join(parts).encode()


def _read_config(path: Path) -> None:
    from typer.testing import CliRunner

    from biascorr.cli.app import app

    files = {"model.onnx": _float_model(), "data.npy": _array_seeds()[0]}
    for name, content in files.items():
        (path.parent / name).write_bytes(content)
    command = ["correct", "model.onnx", "data.npy", "--output", "out.onnx", "--config", path.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        found = CliRunner().invoke(app, command)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    if found.exit_code and (path.parent / "out.onnx").exists():
        raise AssertionError("a result was written although the options were wrong")


READERS = {
    "onnx": Reader(_onnx_seeds, _read_model, _mutated_onnx, ".onnx"),
    "tflite": Reader(_tflite_seeds, _read_model, _mutated_tflite, ".tflite"),
    "keras": Reader(_keras_seeds, _read_model, _mutated_keras, ".keras"),
    "npy": Reader(_array_seeds, _read_data, _mutated_npy, ".npy"),
    "npz": Reader(_archive_seeds, _read_data, _mutated_archive, ".npz"),
    "config": Reader(_config_seeds, _read_config, _mutated_config, ".toml"),
}


def try_in_forks() -> None:
    """Has TFLite files tried in a fork of this process, which takes milliseconds where a new one takes most of a second."""
    from biascorr.adapters.tflite import running

    def run(command: list[str], *, input: bytes, **_: Any) -> Any:  # noqa: A002
        process = os.fork()
        if not process:
            for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL):
                signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(BaseException):
                given = io.TextIOWrapper(io.BytesIO(input))
                sys.argv, sys.stdin = command[2:], given
                exec(command[2], {})
            os._exit(0)
        _, status = os.waitpid(process, 0)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status))

    running.subprocess = types.SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment]


def main(name: str, count: str, seed: str) -> int:
    """Reads changed files; prints what is found, and returns how often."""
    if name == "tflite":
        try_in_forks()
    found = [error for content in READERS[name].variants(int(count), int(seed)) if (error := READERS[name].finding(content))]
    for error in found:
        traceback.print_exception(error)
    return len(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
