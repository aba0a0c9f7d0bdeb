"""Measures the correction of language models: memory in proportion to their files, seconds to one pass over the samples.

    make bench BENCH="--only decoder"                                        all rows
    python benches/decoders.py --only 6x1024 --without-cache                 rows whose name has all these words

Decoders have random weights and no biases, and inputs and outputs as exporters write them: `past_key_values.*` are the keys and
values of earlier tokens, of which there are none while calibrating, and `present.*` are these with the new ones. Weights are
quantized to 4 bits in blocks of 32 (MatMulNBits), or to int8 per channel (QDQ). Models beyond 2 GB have their tensors in a file
beside them, and are written tensor by tensor. Files stay in the folder and are used again.

Each measurement is a process of its own. `peak` is the resident memory above the start of the process, `anonymous` the part of
it that is not mapped from files. One pass loads a session of onnxruntime with its defaults and runs the samples one by one,
float and quantized; the fastest of five counts. `activations` are the outputs of all layers for all samples.
"""

import argparse
import itertools
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from biascorr import correct
from processes import Cost, cost_of, least_cost

Array = NDArray[Any]

FOLDER = Path(tempfile.gettempdir()) / "biascorr-decoders"
SECTION = "whole decoders"

HEAD_SIZE, TOKENS_KNOWN, BLOCK = 64, 4096, 32
SAMPLES, TOKENS = 8, 64
OPSET = 20  # the first with Gelu
MASKED = -1e4
"""Added to the scores of later tokens to hide them: far below any score, and finite."""

EXTERNAL_BYTES = 2 << 30
"""Weights of so many bytes do not fit into one protobuf message."""
PAGE = 4096
"""Tensors in files start at multiples of this, so that they can be mapped."""
INLINE_BYTES = 1024
"""Tensors of up to so many bytes are in the model itself. Shapes are among them, and have to be."""

MEMORY_TARGET, SECONDS_TARGET = 2.5, 20.0
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Decoder:
    """A decoder: its sizes, how its weights are quantized, its method; `cached` if it takes keys and values."""

    layers: int
    width: int
    format: str
    method: str
    cached: bool = True

    @property
    def name(self) -> str:
        return f"decoder {self.layers}x{self.width} {self.format} {self.method}"

    @property
    def matmuls(self) -> int:
        return 6 * self.layers + 1

    @property
    def weight_bytes(self) -> int:
        return 4 * self.width * (12 * self.width * self.layers + TOKENS_KNOWN)

    @property
    def activation_bytes(self) -> int:
        return 4 * SAMPLES * TOKENS * (9 * self.width * self.layers + TOKENS_KNOWN)

    def path(self, folder: Path, format_name: str) -> Path:
        return folder / f"{self.layers}x{self.width}-{format_name}{'' if self.cached else '-without-cache'}" / "model.onnx"


ROWS = [
    Decoder(6, 1024, "MatMulNBits", "empirical"),
    Decoder(6, 1024, "MatMulNBits", "auto"),
    Decoder(6, 1024, "QDQ", "auto"),
    Decoder(24, 2048, "MatMulNBits", "empirical"),
]


class ModelFile:
    """A model that is written while its graph is made: large tensors at once, where wanted to a file beside the model."""

    def __init__(self, path: Path, external: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._data = path.with_name("model.onnx.data").open("wb") if external else None
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node; returns the name of its output, which is the node's too unless another is given."""
        self._nodes.append(helper.make_node(op, inputs, [output], **{"name": output} | attributes))
        return output

    def tensor(self, name: str, values: Array) -> str:
        """Adds a constant; returns its name."""
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        if self._data is None or values.nbytes <= INLINE_BYTES:
            tensor.raw_data = values.tobytes()
        else:
            self._data.seek(-(-self._data.tell() // PAGE) * PAGE)
            place = {"location": "model.onnx.data", "offset": self._data.tell(), "length": values.nbytes}
            self._data.write(np.ascontiguousarray(values).data)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        self._tensors.append(tensor)
        return name

    def integers(self, *values: int) -> str:
        """Adds a list of integers, such as a shape; returns its name."""
        name = "integers" + "".join(f"_{value}" for value in values)
        if all(tensor.name != name for tensor in self._tensors):
            self.tensor(name, np.array(values, np.int64))
        return name

    def save(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
        """Writes the model itself, last: where it exists, all of it does."""
        if self._data is not None:
            self._data.close()
        graph = helper.make_graph(self._nodes, "decoder", inputs, outputs, self._tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(model.SerializeToString())
        temporary.replace(self._path)


MatMul = Callable[[ModelFile, str, str, Array], str]
"""Writes the product of a tensor and weights (K, N) under a name."""


def float_matmul(file: ModelFile, name: str, x: str, weights: Array) -> str:
    return file.node("MatMul", [x, file.tensor(f"{name}.weight", weights)], name)


def matmul_of_4_bits(file: ModelFile, name: str, x: str, weights: Array) -> str:
    """Quantizes as onnxruntime does without zero points: in each block, the value furthest from 0 becomes -8 steps."""
    inputs, outputs = weights.shape
    blocks = np.ascontiguousarray(weights.T).reshape(outputs, -1, BLOCK)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    steps = furthest / np.float32(-8)
    values = np.clip(np.rint(blocks / steps) + 8, 0, 15).astype(np.uint8)
    packed = file.tensor(f"{name}.weight_Q4", values[..., ::2] | values[..., 1::2] << 4)
    scales = file.tensor(f"{name}.weight_scales", steps.ravel())
    sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 0}
    return file.node("MatMulNBits", [x, packed, scales], name, **{"name": f"{name}_Q4", "domain": "com.microsoft"}, **sizes)


def matmul_of_int8(file: ModelFile, name: str, x: str, weights: Array) -> str:
    """Quantizes with a step per channel."""
    steps = np.abs(weights).max(axis=0) / np.float32(127)
    quantized = file.tensor(f"{name}.weight_quantized", np.rint(weights / steps).astype(np.int8))
    scales = file.tensor(f"{name}.weight_scales", steps)
    return file.node("MatMul", [x, file.node("DequantizeLinear", [quantized, scales], f"{name}.weight_real", axis=1)], name)


FORMATS: dict[str, MatMul] = {"float": float_matmul, "MatMulNBits": matmul_of_4_bits, "QDQ": matmul_of_int8}


def random(name: str, *shape: int) -> Array:
    """Standard normal values, the same for the same name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


class Writer:
    """Writes a decoder to a file with products of one format."""

    def __init__(self, decoder: Decoder, file: ModelFile, matmul: MatMul) -> None:
        self._decoder = decoder
        self._file = file
        self._matmul = matmul
        self._inputs = [real_tensor("inputs_embeds", "N", "T", decoder.width)]
        self._outputs = [real_tensor("logits", "N", "T", TOKENS_KNOWN)]

    def write(self) -> None:
        mask, x = "", "inputs_embeds"
        for k in range(self._decoder.layers):
            normalized = self._norm(f"layers.{k}.norm1", x)
            keys, values = (self._with_past(k, each, normalized) for each in ("key", "value"))
            mask = mask or self._mask(keys)
            attended = self._attention(f"layers.{k}.attention", normalized, keys, values, mask)
            x = self._file.node("Add", [x, attended], f"layers.{k}.attended")
            x = self._file.node("Add", [x, self._mlp(f"layers.{k}.mlp", x, k)], f"layers.{k}")
        self._product("logits", self._norm("norm", x), TOKENS_KNOWN)
        self._file.save(self._inputs, self._outputs)

    def _product(self, name: str, x: str, outputs: int, inputs: int = 0, gain: float = 1.0) -> str:
        inputs = inputs or self._decoder.width
        return self._matmul(self._file, name, x, random(name, inputs, outputs) * np.float32(gain / inputs**0.5))

    def _into_residual(self, name: str, x: str, inputs: int) -> str:
        """Scaled so that the sum over all layers has the variance of one."""
        return self._product(name, x, self._decoder.width, inputs, (2 * self._decoder.layers) ** -0.5)

    def _norm(self, name: str, x: str) -> str:
        scale = self._file.tensor(f"{name}.scale", 1 + random(f"{name}.scale", self._decoder.width) / 4)
        bias = self._file.tensor(f"{name}.bias", random(f"{name}.bias", self._decoder.width) / 4)
        return self._file.node("LayerNormalization", [x, scale, bias], name, axis=-1)

    def _mlp(self, name: str, x: str, k: int) -> str:
        up = self._product(f"{name}.up", self._norm(f"layers.{k}.norm2", x), 4 * self._decoder.width)
        return self._into_residual(f"{name}.down", self._file.node("Gelu", [up], f"{name}.gelu"), 4 * self._decoder.width)

    def _split(self, name: str, x: str) -> str:
        """(N, T, width) to (N, heads, T, head size)."""
        heads = self._file.node("Reshape", [x, self._file.integers(0, 0, -1, HEAD_SIZE)], f"{name}.heads")
        return self._file.node("Transpose", [heads], f"{name}.split", perm=[0, 2, 1, 3])

    def _with_past(self, k: int, kind: str, x: str) -> str:
        """Keys or values, old and new: (N, heads, past + T, head size)."""
        new = f"layers.{k}.attention.{kind}"
        new = self._split(new, self._product(new, x, self._decoder.width))
        if not self._decoder.cached:
            return new
        past, present = f"past_key_values.{k}.{kind}", f"present.{k}.{kind}"
        heads = self._decoder.width // HEAD_SIZE
        self._inputs.append(real_tensor(past, "N", heads, "past", HEAD_SIZE))
        self._outputs.append(real_tensor(present, "N", heads, "past + T", HEAD_SIZE))
        return self._file.node("Concat", [past, new], present, axis=2)

    def _mask(self, keys: str) -> str:
        """(T, past + T), added to scores: MASKED where a key comes later than the query."""
        node, number = self._file.node, self._file.tensor
        zero, one = number("zero", np.array(0, np.int64)), number("one", np.array(1, np.int64))
        axes = self._file.integers(0)
        queries = node("Squeeze", [node("Shape", ["inputs_embeds"], "shape_of_queries", start=1, end=2), axes], "queries")
        total = node("Squeeze", [node("Shape", [keys], "shape_of_keys", start=2, end=3), axes], "total")
        places = node("Range", [node("Sub", [total, queries], "before"), total, one], "places_of_queries")
        column = node("Unsqueeze", [places, self._file.integers(1)], "column")
        later = node("Greater", [node("Range", [zero, total, one], "places_of_keys"), column], "later")
        return node(
            "Where", [later, number("masked", np.array(MASKED, np.float32)), number("seen", np.zeros((), np.float32))], "mask"
        )

    def _attention(self, name: str, x: str, keys: str, values: str, mask: str) -> str:
        node = self._file.node
        queries = self._split(f"{name}.query", self._product(f"{name}.query", x, self._decoder.width))
        products = node("MatMul", [queries, node("Transpose", [keys], f"{name}.turned", perm=[0, 1, 3, 2])], f"{name}.products")
        gain = self._file.tensor(f"{name}.gain", np.array(HEAD_SIZE**-0.5, np.float32))
        scores = node("Add", [node("Mul", [products, gain], f"{name}.scores"), mask], f"{name}.masked")
        weighted = node("MatMul", [node("Softmax", [scores], f"{name}.softmax", axis=-1), values], f"{name}.weighted")
        joined = node("Transpose", [weighted], f"{name}.turned_back", perm=[0, 2, 1, 3])
        joined = node("Reshape", [joined, self._file.integers(0, 0, self._decoder.width)], f"{name}.joined")
        return self._into_residual(f"{name}.output", joined, self._decoder.width)


def real_tensor(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def written(decoder: Decoder, folder: Path, format_name: str) -> Path:
    """The file of a decoder in a format, made unless it exists."""
    path = decoder.path(folder, format_name)
    if not path.exists():
        external = format_name == "float" and decoder.weight_bytes > EXTERNAL_BYTES
        Writer(decoder, ModelFile(path, external), FORMATS[format_name]).write()
    return path


def samples(decoder: Decoder) -> dict[str, Array]:
    """Embeddings with a mean for each channel, and empty keys and values."""
    means = random("means", decoder.width) / 2
    arrays = {"inputs_embeds": random("samples", SAMPLES, TOKENS, decoder.width) + means}
    for k, kind in itertools.product(range(decoder.layers if decoder.cached else 0), ("key", "value")):
        empty = (SAMPLES, decoder.width // HEAD_SIZE, 0, HEAD_SIZE)
        arrays[f"past_key_values.{k}.{kind}"] = np.empty(empty, np.float32)
    return arrays


def one_pass(decoder: Decoder, path: Path) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    data = samples(decoder)
    for k in range(SAMPLES):
        session.run(None, {name: array[k : k + 1] for name, array in data.items()})


def corrected(decoder: Decoder, paths: list[Path], output: Path) -> str:
    """Corrects a decoder; returns the method and the scores. Raises RuntimeError where a layer was not corrected."""
    correction = correct(paths[0], samples(decoder), quantized=paths[1], method=decoder.method)
    correction.save(output, force=True)
    done = sum(bool(report.shift_before) for report in correction.report)
    if correction.method != "none" and done < decoder.matmuls:
        raise RuntimeError(f"{done} of {decoder.matmuls} layers corrected")
    before, *_, after = correction.scores["none"], correction.scores[correction.method]
    return f"{correction.method}, {before.sqnr:.1f} to {after.sqnr:.1f} dB"


def file_bytes(path: Path) -> int:
    """The bytes of a model and of its external data."""
    return sum(each.stat().st_size for each in path.parent.glob("model.onnx*"))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


COLUMNS = ("files", "activations", "peak", "anonymous", "to files", "target", "seconds", "passes", "to passes", "target")


def line(name: str, cells: Sequence[str], note: str = "") -> str:
    return f"{name:<40}" + "".join(f"{cell:>13}" for cell in cells) + f"  {note}"


def lines(decoder: Decoder, folder: Path, timeout: float) -> Iterator[str]:
    """The lines of one pass each, and of the correction. Raises RuntimeError where a pass fails."""
    paths = [written(decoder, folder, each) for each in ("float", decoder.format)]
    sizes, seconds = [file_bytes(path) for path in paths], []
    for path, size, kind in zip(paths, sizes, ("float", decoder.format)):
        cost = least_cost(one_pass, decoder, path)
        if cost.failure:
            raise RuntimeError(f"{path}: {cost.failure}")
        seconds.append(cost.seconds)
        memory = [gigabytes(cost.peak), gigabytes(cost.anonymous), f"{cost.peak / size:.2f}x"]
        yield line(f"  one pass, {kind}", [gigabytes(size), "", *memory, "", f"{cost.seconds:.1f} s"])
    with tempfile.TemporaryDirectory(dir=folder) as results:
        cost = cost_of(corrected, decoder, paths, Path(results) / "corrected.onnx", timeout=timeout)
    yield line(decoder.name, cells_of(decoder, cost, sum(sizes), sum(seconds)), cost.failure or cost.result)


def cells_of(decoder: Decoder, cost: Cost, size: int, seconds: float) -> list[str]:
    return [
        *map(gigabytes, (size, decoder.activation_bytes, cost.peak, cost.anonymous)),
        *against(cost.peak / size, MEMORY_TARGET, cost),
        f"{cost.seconds:.1f} s",
        f"{seconds:.1f} s",
        *against(cost.seconds / seconds, SECONDS_TARGET, cost),
    ]


def against(found: float, target: float, cost: Cost) -> list[str]:
    """A ratio, and whether its target is reached."""
    reached = "reached" if found <= target and not cost.failure else "missed"
    return [f"{'>' * bool(cost.failure)}{found:.2f}x", f"{target:g}x {reached}"]


def print_rows(decoders: Sequence[Decoder], folder: Path = FOLDER, timeout: float = TIMEOUT) -> None:
    title = "\n" + line(SECTION, COLUMNS, "outcome") + "\n"
    for decoder in decoders:
        for each in lines(decoder, folder, timeout):
            print(title, each, sep="", flush=True)
            title = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has all these words")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the models are")
    parser.add_argument("--without-cache", action="store_true", help="decoders that take and give no keys and values")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that a correction may take")
    options = parser.parse_args()
    picked = [each for each in ROWS if set(options.only) <= set(each.name.split())]
    print_rows([replace(each, cached=not options.without_cache) for each in picked], options.folder, options.timeout)


if __name__ == "__main__":
    main()
