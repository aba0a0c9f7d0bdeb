"""The model and samples of the recipes, and what they print.

Without arguments, they are a small network of convolutions with batch normalizations and random images. With two arguments,
they are read: a float ONNX model with one input, and an .npy file with samples along the first axis.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

BATCH = 16


def model_and_batches() -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """A float model, and calibration samples for it in batches."""
    if len(sys.argv) > 2:
        model, samples = onnx.load(Path(sys.argv[1])), np.load(Path(sys.argv[2]))
    else:
        samples = np.random.default_rng(1).gamma(2.0, 0.5, (4 * BATCH, 3, 16, 16)).astype(np.float32)
        model = small_network(samples[:BATCH])
    return model, [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]


def names_of(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """The names of the inputs and outputs of a model."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in constants]
    return inputs, [value.name for value in model.graph.output]


def small_network(images: np.ndarray) -> onnx.ModelProto:
    """conv -> norm -> relu -> depthwise -> norm -> relu -> conv, with the statistics that these images give."""
    rng = np.random.default_rng(0)
    shapes = {"conv_w": (8, 3, 3, 3), "depthwise_w": (8, 1, 3, 3), "head_w": (4, 8, 1, 1), "conv_b": (8,), "head_b": (4,)}
    constants = {name: rng.normal(0.1, 0.5, shape) for name, shape in shapes.items()}
    for norm in ("norm1", "norm2"):
        constants |= {f"{norm}_gamma": rng.uniform(0.5, 1.5, 8), f"{norm}_beta": rng.normal(0.0, 0.5, 8)}
        constants |= {f"{norm}_mean": np.zeros(8), f"{norm}_var": np.ones(8)}
    parameters = {norm: [f"{norm}_{each}" for each in ("gamma", "beta", "mean", "var")] for norm in ("norm1", "norm2")}
    nodes = [
        helper.make_node("Conv", ["images", "conv_w", "conv_b"], ["conv1"], "conv"),
        helper.make_node("BatchNormalization", ["conv1", *parameters["norm1"]], ["normal1"], "norm1"),
        helper.make_node("Relu", ["normal1"], ["relu1"], "relu1"),
        helper.make_node("Conv", ["relu1", "depthwise_w"], ["conv2"], "depthwise", group=8),
        helper.make_node("BatchNormalization", ["conv2", *parameters["norm2"]], ["normal2"], "norm2"),
        helper.make_node("Relu", ["normal2"], ["relu2"], "relu2"),
        helper.make_node("Conv", ["relu2", "head_w", "head_b"], ["logits"], "head"),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
        for name, shape in {"images": (3, 16, 16), "logits": (4, 12, 12)}.items()
    ]
    for norm, tensor in {"norm1": "conv1", "norm2": "conv2"}.items():
        found = ReferenceEvaluator(model_of(nodes, values, constants)).run([tensor], {"images": images}, intermediate=True)
        made = found[tensor]
        constants |= {f"{norm}_mean": made.mean(axis=(0, 2, 3)), f"{norm}_var": made.var(axis=(0, 2, 3))}
    return model_of(nodes, values, constants)


def model_of(nodes, values, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def print_changes(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """The mean absolute change of each bias."""
    old = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    for tensor in after.graph.initializer:
        new = numpy_helper.to_array(tensor)
        change = np.abs(new - old.get(tensor.name, 0)).mean()
        if change:
            print(f"{tensor.name:20} {'changed' if tensor.name in old else 'added'} by {change:.4f} on average")
