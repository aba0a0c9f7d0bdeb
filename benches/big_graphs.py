"""Measures how the cost of correction grows with the number of nodes: a node should cost the same however many there are.

    make bench BENCH="--only graph"                              all rows
    python benches/big_graphs.py --only matmul mean              rows whose name has all these words
    python benches/big_graphs.py --timeout 60                    rows end after a minute per size

Graphs are chains of residual blocks with next to nothing to compute and weights quantized to int8 (QDQ). A `matmul` block is an
8x8 MatMul, Add, Relu, the residual Add and an Identity; a `conv` block is a Conv 1x1, Relu, Conv 1x1, the residual Add and an
Identity. `renamed` graphs have lost the names of nodes and weights, so that layers are matched by their weights alone. Seconds
are the least of up to five calls. `growth` is the cost per node of the largest graph over that of the smallest: 1 or less where
the total is in proportion to the nodes, 20 where it is in proportion to their pairs.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from biascorr import correct, equalize
from processes import Cost, least_cost

Array = NDArray[Any]

SECTION = "big graphs"
NODES = (1_000, 5_000, 20_000)
PER_BLOCK = 5

CHANNELS, SAMPLES = 8, 8
OPSET = 17
TIMEOUT = 180.0


class Blocks:
    """Makes a float or quantized model of blocks."""

    def __init__(self, kind: str, blocks: int, quantized: bool, renamed: bool) -> None:
        self._random = np.random.default_rng(0)
        self._gain = np.float32((CHANNELS * blocks) ** -0.5)  # the sum over all blocks has the variance of one
        self._quantized = quantized
        self._renamed = renamed
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        x = "x"
        for k in range(blocks):
            x = (self._matmul_block if kind == "matmul" else self._conv_block)(f"block{k}", x)
        sizes: list[int | str] = ["N", 4, CHANNELS] if kind == "matmul" else ["N", CHANNELS, 2, 2]
        ends = [helper.make_tensor_value_info(each, TensorProto.FLOAT, sizes) for each in ("x", x)]
        graph = helper.make_graph(self._nodes, "graph", ends[:1], ends[1:], self._tensors)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    def _matmul_block(self, name: str, x: str) -> str:
        product = self._node("MatMul", [x, self._weights(f"{name}.weight", CHANNELS, CHANNELS)], f"{name}.product")
        biased = self._node("Add", [product, self._bias(f"{name}.bias")], f"{name}.biased")
        return self._residual(name, x, self._node("Relu", [biased], f"{name}.relu"))

    def _conv_block(self, name: str, x: str) -> str:
        convolved = self._node("Relu", [self._conv(f"{name}.first", x)], f"{name}.relu")
        return self._residual(name, x, self._conv(f"{name}.second", convolved))

    def _conv(self, name: str, x: str) -> str:
        weights = self._weights(f"{name}.weight", CHANNELS, CHANNELS, 1, 1)
        return self._node("Conv", [x, weights, self._bias(f"{name}.bias")], name)

    def _residual(self, name: str, x: str, y: str) -> str:
        return self._node("Identity", [self._node("Add", [x, y], f"{name}.sum")], name)

    def _node(self, op: str, inputs: list[str], output: str) -> str:
        name = f"node_{len(self._nodes)}" if self._renamed else output
        self._nodes.append(helper.make_node(op, inputs, [output], name))
        return output

    def _weights(self, name: str, *shape: int) -> str:
        values = self._random.standard_normal(shape, dtype=np.float32) * self._gain
        if self._renamed:
            name = f"tensor_{len(self._tensors)}"
        if not self._quantized:
            return self._tensor(name, values)
        step = np.abs(values).max() / np.float32(127)
        parts = {"quantized": np.rint(values / step).astype(np.int8), "step": step, "zero": np.int8(0)}
        return self._node(
            "DequantizeLinear", [self._tensor(f"{name}_{key}", part) for key, part in parts.items()], f"{name}_real"
        )

    def _bias(self, name: str) -> str:
        return self._tensor(name, self._random.standard_normal(CHANNELS, dtype=np.float32) * self._gain)

    def _tensor(self, name: str, values: Any) -> str:
        self._tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name


def samples(kind: str) -> Array:
    shape = (SAMPLES, 4, CHANNELS) if kind == "matmul" else (SAMPLES, CHANNELS, 2, 2)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32) + np.float32(0.5)


def corrected(reference: Path, quantized: Path, data: Array, method: str) -> int:
    """Corrects a model; returns how many layers were corrected."""
    correction = correct(reference, data, quantized=quantized, method=method)
    return sum(bool(report.shift_before) for report in correction.report)


def equalized(reference: Path, data: Array) -> int:
    """Equalizes a model; returns how many layers were scaled."""
    return sum(len(chain.factors) + 1 for chain in equalize(reference, data).chains)


@dataclass(frozen=True)
class GraphRow:
    """A kind of graph and what is done to it, by a method of `correct` or "equalize"."""

    kind: str
    action: str
    renamed: bool = False

    @property
    def name(self) -> str:
        return f"graph {self.kind} {'renamed ' * self.renamed}{self.action}"

    def cost(self, nodes: int, timeout: float) -> Cost:
        """The cost for a graph of so many nodes. Raises RuntimeError where a layer was left out."""
        blocks = nodes // PER_BLOCK
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"]
            for path, quantized in zip(paths, (False, True)):
                onnx.save(Blocks(self.kind, blocks, quantized, self.renamed and quantized).model, path)
            cost = least_cost(*self._call(paths), timeout=timeout)
        if not cost.failure and cost.result != self._layers(blocks):
            raise RuntimeError(f"{self.name}: {cost.result} layers, expected {self._layers(blocks)}")
        return cost

    def _layers(self, blocks: int) -> int:
        """How many layers change. Those of `matmul` blocks cannot be scaled, for several operations read each residual sum."""
        if self.kind == "matmul":
            return 0 if self.action == "equalize" else blocks
        return 2 * blocks

    def _call(self, paths: list[Path]) -> tuple[Any, ...]:
        if self.action == "equalize":
            return equalized, paths[0], samples(self.kind)
        return corrected, *paths, samples(self.kind), self.action


ROWS = [
    *(GraphRow(kind, method) for kind in ("matmul", "conv") for method in ("mean", "empirical")),
    *(GraphRow("matmul", method, renamed=True) for method in ("mean", "empirical")),
    *(GraphRow(kind, "equalize") for kind in ("matmul", "conv")),
]


def line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<40}" + "".join(f"{cell:>26}" for cell in cells)


def cells(row: GraphRow, timeout: float) -> Iterator[str]:
    """The seconds for each size up to the first failure, then the growth if all succeeded."""
    per_node: list[float] = []
    for nodes in NODES:
        cost = row.cost(nodes, timeout)
        if cost.failure:
            yield cost.failure
            return
        per_node.append(cost.seconds / nodes)
        yield f"{cost.seconds:.2f} s, {1e3 * per_node[-1]:.2f} ms/node"
    yield f"{per_node[-1] / per_node[0]:.1f}x"


def print_rows(rows: Sequence[GraphRow], timeout: float = TIMEOUT) -> None:
    title = "\n" + line(SECTION, [*(f"{nodes:,} nodes" for nodes in NODES), "growth"]) + "\n"
    for row in rows:
        print(title, line(row.name, list(cells(row, timeout))), sep="", flush=True)
        title = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has all these words")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that a call may take")
    options = parser.parse_args()
    print_rows([row for row in ROWS if set(options.only) <= set(row.name.split())], options.timeout)


if __name__ == "__main__":
    main()
