"""DequantizeLinear nodes: r = (q - zero_point) * step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from biascorr.onnx.graph import Graph, attributes


@dataclass(frozen=True, eq=False)
class Dequantizer:
    """A DequantizeLinear node with constant parameters.

    Parameters
    ----------
    node : onnx.NodeProto
        The node.
    step : ndarray, () or (C,)
        Real units between neighbouring values (ONNX calls it scale).
    zero_point : ndarray
        The quantized value of 0.
    axis : int
        The axis that several steps belong to.
    """

    node: onnx.NodeProto
    step: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int

    @property
    def quantized(self) -> str:
        """The tensor of quantized values."""
        return str(self.node.input[0])

    def steps_of(self, rank: int) -> NDArray[np.float64]:
        """The steps in the shape in which they broadcast against values of this rank."""
        shape = [1] * rank
        if self.step.size > 1:
            shape[self.axis] = -1
        return self.step.astype(np.float64).reshape(shape)


def dequantizer_of(graph: Graph, name: str) -> Dequantizer | None:
    """The dequantizer that makes a tensor; None where there is none, or one with a step per block or none above 0."""
    node = graph.producer.get(name)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    parameters = [parameter for parameter in node.input[1:] if parameter]
    if not all(map(graph.is_constant, parameters)):
        return None
    step, *rest = (graph.value(parameter) for parameter in parameters)
    if (step.size > 1 and step.ndim != 1) or not (np.isfinite(step) & (step > 0)).all():
        return None
    zero_point = rest[0] if rest else np.zeros((), dtype=np.int32)
    return Dequantizer(node, step, zero_point, attributes(node).get("axis", 1) if step.size > 1 else 0)
