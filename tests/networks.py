"""Small ONNX models with seeded weights, and what tests ask of them.

Weights and samples are multiples of small powers of two, so that every sum of products of a layer is exact in float32: what is
left of a shift after a correction is the rounding of the bias, not that of the convolution.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper, parser
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from biascorr import Correction, Quantization, QuantParams, correct, fake_quantize
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.correction.simulation import ranges_of
from biascorr.graph.layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]

BITS = 4
"""Bits that weights are quantized to: few, so that shifts are large."""


def model_from_text(text: str, *, opset: int = 17, ir_version: int = 8, **constants: Array) -> onnx.ModelProto:
    """A graph in ONNX's textual form with initializers; below ir_version 4 they are listed as inputs too."""
    header = (
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}], producer_name: "tests", metadata_props: ["author": "me"]>'
    )
    model = parser.parse_model(f"{header} {text}")
    for name, array in constants.items():
        tensor = numpy_helper.from_array(array, name)
        model.graph.initializer.append(tensor)
        if ir_version < 4:
            model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return model


def weights(*shape: int, axis: int = 0, dtype: str = "float32", seed: int = 0) -> Array:
    """Weights between the values of grids of BITS bits, of another range in neighbouring output channels (`axis`)."""
    limit = 2 ** (BITS - 1) - 1
    steps = np.random.default_rng([seed, *shape]).integers(-32 * limit, 32 * limit, shape, endpoint=True) / 32
    channels = np.moveaxis(steps, axis, 0).reshape(shape[axis], -1)
    channels[:, 0] = np.where(channels[:, 0] < 0, -limit, limit)  # an end of the grid
    channels /= 2 ** (BITS + np.arange(shape[axis]) % 3)[:, None]
    return np.moveaxis(channels.reshape(np.moveaxis(steps, axis, 0).shape), 0, axis).astype(dtype)


def biases(*shape: int, dtype: str = "float32", seed: int = 1) -> Array:
    return (np.random.default_rng([seed, *shape]).integers(-64, 64, shape) / 32).astype(dtype)


def samples(*shape: int, dtype: str = "float32", seed: int = 2) -> Array:
    """Values from -0.5 to 2.5: means far from zero, other ones in each channel and position."""
    rng = np.random.default_rng([seed, *shape])
    return ((rng.integers(-4, 12, shape) + rng.integers(0, 8, shape[1:])) / 8).astype(dtype)


def fake_quantized(array: Array, axis: int | None, bits: int = BITS) -> Array:
    """Weights on a symmetric grid: one per index along `axis`, or one in all."""
    others = None if axis is None else tuple(k for k in range(array.ndim) if k != axis % array.ndim)
    quantization = Quantization.from_range(array.min(axis=others), array.max(axis=others), bits, asymmetric=False)
    return fake_quantize(array, quantization, axis=-1 if axis is None else axis)


def mean_corrected(model: Any, data: Any, *, weight_bits: int = BITS, per_channel: bool = False, **options: Any) -> Correction:
    """A model corrected by the mean method; where it is quantized in simulation, on the grids of `fake_quantized`.

    Layers are small and read what these tests are about, not what a network reads: its outputs may get worse.
    """
    params = None if "quantized" in options else QuantParams("tf", weight_bits=weight_bits, per_channel=per_channel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mean made the outputs worse", UserWarning)
        return correct(model, data, method="mean", quant_params=params, **options)


def two_layers(*, image: int = 6) -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, mean over space, Gemm: what a first model looks like."""
    text = f"""g (float[N,3,{image},{image}] x) => (float[N,5] y) {{
        [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [relu] r = Relu(a)
        [second] c = Conv(r, w2, b2)
        [mean] m = GlobalAveragePool(c)
        [flatten] f = Flatten(m)
        [last] y = Gemm<transB=1>(f, w3, b3)
    }}"""
    constants = {"w1": weights(4, 3, 3, 3), "w2": weights(6, 4, 3, 3), "w3": weights(5, 6)}
    return model_from_text(text, **constants, b1=biases(4), b2=biases(6), b3=biases(5))


def batch_norm(x: str, y: str, name: str = "norm", *, epsilon: float = 0.25) -> str:
    """A node that reads the constants of `batch_norm_constants`."""
    parameters = ", ".join(f"{name}_{each}" for each in ("gamma", "beta", "mean", "var"))
    return f"[{name}] {y} = BatchNormalization<epsilon={epsilon}>({x}, {parameters})"


def batch_norm_constants(channels: int, name: str = "norm", *, dtype: str = "float32", seed: int = 0) -> dict[str, Array]:
    """Of uneven channels, some of them with a negative gamma, some far above 0."""
    rng = np.random.default_rng([seed, channels])
    gamma = rng.uniform(0.5, 1.5, channels) * np.where(np.arange(channels) % 3 == 1, -1, 1)
    beta = rng.normal(0, 1, channels) + np.where(np.arange(channels) % 3 == 2, 6, 0)
    found = {"gamma": gamma, "beta": beta, "mean": rng.normal(0, 1, channels), "var": rng.uniform(0.5, 4, channels)}
    return {f"{name}_{key}": array.astype(dtype) for key, array in found.items()}


def layers_of(model: onnx.ModelProto) -> dict[str, Layer]:
    """By name."""
    return {layer.name: layer for layer in OnnxNetwork.load(model, "model").layers}


def magnitudes(layer: Layer) -> tuple[Array, Array]:
    """The largest absolute weight of each output channel and of each input channel, of all groups."""
    flat = np.abs(np.asarray(layer.weights, np.float64)).reshape(*layer.weights.shape[:2], -1).max(axis=2)
    own = flat.max(axis=1)
    other = flat.reshape(layer.groups, -1, flat.shape[1]).max(axis=1).ravel()
    return (own, other) if layer.layout.startswith("O") else (other, own)


def kernel_sums(layer: Layer) -> Array:
    """What each output channel (rows) multiplies a constant input channel by, groups as blocks."""
    blocks = np.asarray(layer.weights, np.float64).reshape(*layer.weights.shape[:2], -1).sum(axis=2)
    parts = [part if layer.layout.startswith("O") else part.T for part in np.split(blocks, layer.groups)]
    outputs, inputs = parts[0].shape
    dense = np.zeros((layer.channels, layer.input_channels))
    for k, part in enumerate(parts):
        dense[k * outputs : (k + 1) * outputs, k * inputs : (k + 1) * inputs] = part
    return layer.gain * dense


def assert_same_function(
    before: onnx.ModelProto, after: onnx.ModelProto, *feeds: Mapping[str, Array], tolerance: float
) -> None:
    """That no output moves by more than this part of the largest magnitude in it."""
    onnx.checker.check_model(after, full_check=True)
    for each in feeds:
        for expected, computed in zip(run(before, each), run(after, each), strict=True):
            assert computed.dtype == expected.dtype
            assert computed.shape == expected.shape
            assert np.abs(computed - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=0)


def gated_network() -> onnx.ModelProto:
    """A layer and a gate that is shut where its inputs are far from zero: its mean output is not that of what gets through."""
    text = """g (float[N,6] x) => (float[N,4] y) {
        [layer] t = Gemm(x, w, b)
        least = ReduceMin<axes=[1]>(x)
        gate = Relu(least)
        y = Mul(t, gate)
    }"""
    return model_from_text(text, w=weights(6, 4, axis=1), b=biases(4))


def gated_samples(count: int) -> Array:
    """Two of three shut the gate: every correction of the mean makes what gets through worse."""
    passing = np.arange(count) % 3 == 0
    return np.where(passing[:, None], 0.5, -8.0).astype(np.float32) + samples(count, 6).clip(0) / 4


def constants_of(model: onnx.ModelProto) -> dict[str, Array]:
    """Initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def with_constants(model: onnx.ModelProto, **arrays: Array) -> onnx.ModelProto:
    """A copy in which initializers, or the outputs of Constant nodes, have other values."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in copy.graph.node if node.op_type == "Constant"}
    for name, array in arrays.items():
        tensors[name].CopyFrom(numpy_helper.from_array(array, tensors[name].name))
    return copy


def as_constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with Constant nodes in place of initializers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    copy.graph.ClearField("initializer")
    copy.graph.ClearField("node")
    copy.graph.node.extend([*nodes, *model.graph.node])
    return copy


def run(model: onnx.ModelProto, feeds: Mapping[str, Array], names: Sequence[str] = ()) -> list[Array]:
    """The named tensors, or the outputs, as the graph says: without any optimization."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # threads take longer to start than these networks
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(names) or None, dict(feeds))


def channel_mean(array: Array, axis: int) -> Array:
    """The mean over every other axis, in float64."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).mean(axis=0, dtype=np.float64)


def output_shift(model: onnx.ModelProto, name: str, x: Array, error: Array, axis: int) -> Array:
    """Per channel (`axis` of the output), how a weight error shifts the mean output of the named layer that reads `x`."""
    node = onnx.NodeProto()
    node.CopyFrom(next(each for each in model.graph.node if each.name == name))
    del node.input[:], node.output[:]
    node.input.extend(["x", "w"])
    node.output.append("y")
    tensor = numpy_helper.from_array(error.astype(np.float32), "w")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)
    graph = helper.make_graph([node], "layer", [value], [onnx.ValueInfoProto(name="y")], [tensor])
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return channel_mean(run(alone, {"x": x})[0], axis)


def stripped(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy without the values of the named initializers and Constant nodes: what must not change when they do."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {node.output[0]: node.attribute[0].t for node in copy.graph.node if node.op_type == "Constant"}
    constants |= {tensor.name: tensor for tensor in copy.graph.initializer}
    for name in names:
        constants[name].CopyFrom(onnx.TensorProto(name=name))
    return copy


class Reader(CalibrationDataReader):
    """Batches, as onnxruntime's quantizer and calibration take them."""

    def __init__(self, batches: Iterable[Mapping[str, Array]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches, None)


def quantized(model: onnx.ModelProto, batches: Iterable[Mapping[str, Array]], **options: Any) -> onnx.ModelProto:
    """The model as onnxruntime quantizes it, in QDQ format unless `quant_format` says otherwise."""
    options = {"quant_format": QuantFormat.QDQ, **options}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    logging.disable(logging.WARNING)  # it advises to preprocess the model
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            quantize_static(copy, str(path), Reader(batches), **options)
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


def ranges_in(network: Any, batches: Any) -> Any:
    """The ranges of tensors in some batches, as simulated quantization asks for them."""
    return lambda names: ranges_of(network, names, batches)
