"""Random graphs, grown operator by operator, for tests by hypothesis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper, numpy_helper

from networks import Array

OPSETS = [opset for opset in (9, 10, 11, 12, 13, 15, 17, 19, 21, 22, 23, 25) if opset <= onnx.defs.onnx_opset_version()]
PROFILE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

Draw = Any


@dataclass
class Builder:
    """A graph that grows operator by operator; shapes are those of one sample."""

    draw: Draw
    opset: int
    rng: np.random.Generator
    shapes: dict[str, tuple[int, ...]]
    only_initializers: bool
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    shareable: dict[int, str] = field(default_factory=dict)
    """Biases by their length, which a normalization may read too."""

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def between(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))

    def constant(self, array: Array) -> str:
        """An initializer or a Constant node."""
        name = f"c{len(self.nodes)}_{len(self.constants)}"
        tensor = numpy_helper.from_array(np.asarray(array, np.float32 if array.dtype.kind == "f" else array.dtype), name)
        if self.only_initializers or self.draw(st.booleans()):
            self.constants.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], f"constant {name}", value=tensor))
        return name

    def add(self, op: str, inputs: Sequence[str], shape: tuple[int, ...], **attributes: Any) -> None:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"{op} {name}", **attributes))
        self.shapes[name] = shape

    def weights(self, *shape: int, fan_in: int) -> str:
        """Not around zero, so that there is something to correct."""
        return self.constant(self.rng.normal(0.1, 1.0, shape) / math.sqrt(fan_in))

    def biases(self, channels: int) -> list[str]:
        kind = self.one_of("none", "zeros", "values", "values")
        if kind == "none":
            return []
        self.shareable[channels] = self.constant(self.rng.normal(0, kind == "values", channels))
        return [self.shareable[channels]]

    def bias_behind(self, channels: int, axes_behind: int) -> None:
        """Sometimes an Add of a constant behind a layer."""
        if self.draw(st.booleans()):
            name, shape = list(self.shapes.items())[-1]
            bias = self.constant(self.rng.normal(0, 1, (channels, *[1] * axes_behind)))
            self.add("Add", self.one_of([name, bias], [bias, name]), shape)

    def conv(self, name: str, shape: tuple[int, ...]) -> None:
        channels, *space = shape
        group = self.one_of(*(k for k in range(1, channels + 1) if channels % k == 0))
        outputs = group * self.between(1, max(1, 6 // group))
        taps, moves, pads = self.window(space, transposed=False)
        sizes = [
            (size + pads[k] + pads[k + len(space)] - moves["dilations"][k] * (taps[k] - 1) - 1) // moves["strides"][k] + 1
            for k, size in enumerate(space)
        ]
        w = self.weights(outputs, channels // group, *taps, fan_in=channels // group * math.prod(taps))
        self.add("Conv", [name, w, *self.biases(outputs)], (outputs, *sizes), group=group, pads=pads, **moves)
        if len(self.nodes[-1].input) == 2:
            self.bias_behind(outputs, len(space))

    def conv_transpose(self, name: str, shape: tuple[int, ...]) -> None:
        channels, *space = shape
        group = self.one_of(*(k for k in range(1, channels + 1) if channels % k == 0))
        each = self.between(1, max(1, 4 // group))
        taps, moves, pads = self.window(space, transposed=True)
        sizes = [
            (size - 1) * moves["strides"][k] + moves["dilations"][k] * (taps[k] - 1) + 1 - pads[k] - pads[k + len(space)]
            for k, size in enumerate(space)
        ]
        w = self.weights(channels, each, *taps, fan_in=channels // group * math.prod(taps))
        inputs = [name, w, *self.biases(group * each)]
        self.add("ConvTranspose", inputs, (group * each, *sizes), group=group, pads=pads, **moves)

    def window(self, space: Sequence[int], *, transposed: bool) -> tuple[list[int], dict[str, list[int]], list[int]]:
        """Taps, strides and dilations, and pads such that each axis keeps an output."""
        taps = [self.between(1, min(3, size)) for size in space]
        strides = [self.between(1, 2) for _ in space]
        dilations = [self.between(1, 2) if (count - 1) * 2 + 1 <= size else 1 for count, size in zip(taps, space)]
        limits = [0 if transposed and (size - 1) * stride + count < 4 else min(1, count - 1)
                  for size, stride, count in zip(space, strides, taps)]  # fmt: skip
        pads = [self.between(0, limit) for limit in (*limits, *limits)]
        return taps, {"strides": strides, "dilations": dilations}, pads

    def gemm(self, name: str, shape: tuple[int, ...]) -> None:
        size, outputs, transposed = shape[0], self.between(1, 5), self.between(0, 1)
        w = self.weights(*((outputs, size) if transposed else (size, outputs)), fan_in=size)
        bias = self.biases(outputs) if self.opset >= 11 else [self.constant(self.rng.normal(0, 1, outputs))]
        factors = {"alpha": self.one_of(1.0, 0.5), "beta": self.one_of(1.0, 2.0)}
        self.add("Gemm", [name, w, *bias], (outputs,), transB=transposed, **factors)

    def matmul(self, name: str, shape: tuple[int, ...]) -> None:
        outputs = self.between(1, 5)
        if len(shape) == 2 and self.draw(st.booleans()):
            w = self.weights(outputs, shape[-2], fan_in=shape[-2])
            self.add("MatMul", [w, name], (outputs, shape[-1]))
            self.bias_behind(outputs, 1)
        else:
            w = self.weights(shape[-1], outputs, fan_in=shape[-1])
            self.add("MatMul", [name, w], (*shape[:-1], outputs))
            self.bias_behind(outputs, 0)

    def activation(self, name: str, shape: tuple[int, ...]) -> None:
        op = self.one_of("Relu", "Relu", "Clip", "Sigmoid", "LeakyRelu", "PRelu", *(["HardSwish"] if self.opset >= 14 else []))
        if op == "Clip" and self.opset < 11:
            self.add(op, [name], shape, min=0.0, max=1.5)
        elif op == "Clip":
            self.add(op, [name, *(self.constant(np.float32(bound)) for bound in (-0.5, 1.5))], shape)
        elif op == "PRelu":
            slopes = self.rng.uniform(0, 1, (shape[0], *[1] * (len(shape) - 1)))
            self.add(op, [name, self.constant(slopes)], shape)
        else:
            self.add(op, [name], shape)

    def normalization(self, name: str, shape: tuple[int, ...]) -> None:
        parts = (
            self.rng.uniform(0.5, 1.5, shape[0]),
            *self.rng.normal(0, 1, (2, shape[0])),
            self.rng.uniform(0.5, 2, shape[0]),
        )
        gamma, beta, mean, variance = map(self.constant, parts)
        beta = self.one_of(beta, self.shareable.get(shape[0], beta))
        self.add("BatchNormalization", [name, gamma, beta, mean, variance], shape)

    def pool(self, name: str, shape: tuple[int, ...]) -> None:
        op = self.one_of("MaxPool", "AveragePool", "GlobalAveragePool")
        if op == "GlobalAveragePool":
            self.add(op, [name], (shape[0], *[1] * (len(shape) - 1)))
        else:
            taps = [self.between(1, min(2, size)) for size in shape[1:]]
            sizes = [(size - count) // count + 1 for size, count in zip(shape[1:], taps)]
            self.add(op, [name], (shape[0], *sizes), kernel_shape=taps, strides=taps)

    def join(self, name: str, shape: tuple[int, ...]) -> None:
        """With a tensor of the same shape, itself where there is no other."""
        alike = [other for other, found in self.shapes.items() if found == shape]
        other = self.one_of(*alike)
        op = self.one_of("Add", "Mul", "Concat")
        if op == "Concat":
            self.add(op, [other, name], (2 * shape[0], *shape[1:]), axis=1)
        else:
            self.add(op, [other, name], shape)

    def grow(self) -> None:
        """Reads the newest tensor, or any other one."""
        names = list(self.shapes)
        name = self.one_of(names[-1], names[-1], *names)
        shape = self.shapes[name]
        vector = [self.gemm, self.gemm, self.matmul]
        image = [self.conv, self.conv, self.conv_transpose, self.pool, self.flatten, self.matmul]
        common = [self.activation, self.activation, self.join, self.normalization]
        self.one_of(*(vector if len(shape) == 1 else image), *common)(name, shape)

    def flatten(self, name: str, shape: tuple[int, ...]) -> None:
        self.add("Flatten", [name], (math.prod(shape),))

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, 1, ["N", *self.shapes[name]]) for name in ("x", *outputs)]
        graph = helper.make_graph(self.nodes, "random", values[:1], values[1:], self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=4 if self.opset < 11 else 8
        )
        model.producer_name, model.doc_string = "tests", "a random network"
        helper.set_model_props(model, {"author": "me"})
        return model
