"""Measures what correction does to a Keras model, in simulation and once converted to TFLite, and what it costs beside ONNX.

    python benches/keras_models.py NETWORK SAMPLES HELD_OUT [--weights tensor] [--methods empirical auto]
    python benches/keras_models.py NETWORK.onnx SAMPLES HELD_OUT --cost

NETWORK is a .keras or .h5 file, or an ONNX model of convolutions with square padding, batch normalizations, clips, sums, one
average and one product at its end, which is built in Keras. SAMPLES calibrate, HELD_OUT are scored: .npy files with samples
along the first axis, with channels last for Keras files and first for ONNX. SQNR is 10 log10(sum r^2 / sum (q - r)^2) in dB
over all outputs and samples, r those of the network as it is given; beside it, the share of samples with the same greatest
output.

"simulated" quantizes the weights that are there: 8 bits over their whole range, float activations. "LiteRT" is what
TFLiteConverter makes of the same model, in integers with float inputs and outputs, run by LiteRT with its defaults: the
converter folds batch normalizations before it quantizes. Rows are the model as given, folded and equalized (`--variants`).

`--cost` corrects NETWORK.onnx and the same network in Keras, each in a process of its own: seconds of `biascorr.correct` in the
fastest of up to five, the CPU time of all its threads, the peak of memory above the start of the process, TensorFlow or
onnxruntime included, and the largest difference of biases, as a part of the layer's largest bias.
"""

import argparse
import contextlib
import io
import itertools
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import biascorr
from biascorr.adapters.loading import network_from_model
from biascorr.correction.simulation import simulated
from processes import least_cost

Array = NDArray[Any]

VARIANTS = ["given", "folded", "equalized"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument(
        "--weights", choices=["channel", "tensor"], default="channel", help="a scale per output channel, or one"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of the network, to measure")
    parser.add_argument("--methods", nargs="+", default=["empirical", "auto"], help="of biascorr.correct")
    parser.add_argument("--activation-bits", type=int, help="of the simulation that corrects; float by default")
    parser.add_argument("--cost", action="store_true", help="seconds and memory beside ONNX, and no scores")
    return parser.parse_args()


class Builder:
    """Builds a Keras model, channels last, of the nodes of an ONNX one."""

    def __init__(self, model: Any) -> None:
        import keras
        from onnx import numpy_helper

        self._layers = keras.layers
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        (given,) = (value for value in model.graph.input if value.name not in self._constants)
        channels, *space = (size.dim_value for size in given.type.tensor_type.shape.dim[1:])
        inputs = keras.Input((*space, channels), name=given.name)
        self._tensors = {given.name: inputs}
        for node in model.graph.node:
            if node.op_type != "Constant":
                self._tensors[node.output[0]] = getattr(self, f"_{node.op_type}")(node, self._attributes(node))
        self.model = keras.Model(inputs, self._tensors[model.graph.output[0].name])

    def _attributes(self, node: Any) -> dict[str, Any]:
        from onnx import helper

        return {each.name: helper.get_attribute_value(each) for each in node.attribute}

    def _constant(self, node: Any, k: int, default: Any = None) -> Any:
        return self._constants[node.input[k]] if len(node.input) > k and node.input[k] else default

    def _filled(self, layer: Any, x: Any, *values: Any) -> Any:
        y = layer(x)
        layer.set_weights([each for each in values if each is not None])
        return y

    def _Conv(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: N802
        x, kernel, bias = self._tensors[node.input[0]], self._constant(node, 1), self._constant(node, 2)
        taps, strides = kernel.shape[2:], attributes.get("strides", [1, 1])
        pads = np.reshape(attributes.get("pads", [0] * 4), (2, 2)).T.tolist()
        if pads == [same_pads(*each) for each in zip(x.shape[1:3], taps, strides)]:
            padding = "same"
        else:
            padding, x = "valid", self._layers.ZeroPadding2D(pads)(x)
        options = {"strides": strides, "padding": padding, "use_bias": bias is not None, "name": keras_name(node)}
        if attributes.get("group", 1) == 1:
            layer, kernel = self._layers.Conv2D(len(kernel), taps, **options), kernel.transpose(2, 3, 1, 0)
        else:
            layer, kernel = self._layers.DepthwiseConv2D(taps, **options), kernel.transpose(2, 3, 0, 1)
        return self._filled(layer, x, kernel, bias)

    def _BatchNormalization(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: N802
        layer = self._layers.BatchNormalization(epsilon=attributes.get("epsilon", 1e-5), name=keras_name(node))
        return self._filled(layer, self._tensors[node.input[0]], *(self._constant(node, k) for k in (1, 2, 3, 4)))

    def _Clip(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: ARG002, N802
        assert self._constant(node, 1) == 0, f"{node.name}: expected a clip from 0"
        limit = self._constant(node, 2)
        return self._layers.ReLU(None if limit is None else float(limit), name=keras_name(node))(self._tensors[node.input[0]])

    def _Add(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: ARG002, N802
        return self._layers.Add(name=keras_name(node))([self._tensors[name] for name in node.input])

    def _GlobalAveragePool(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: ARG002, N802
        return self._layers.GlobalAveragePooling2D(name=keras_name(node))(self._tensors[node.input[0]])

    def _Flatten(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: ARG002, N802
        return self._layers.Flatten(name=keras_name(node))(self._tensors[node.input[0]])

    def _Gemm(self, node: Any, attributes: dict[str, Any]) -> Any:  # noqa: N802
        kernel = self._constant(node, 1)
        kernel = kernel.T if attributes.get("transB", 0) else kernel
        layer = self._layers.Dense(kernel.shape[1], name=keras_name(node))
        return self._filled(layer, self._tensors[node.input[0]], kernel, self._constant(node, 2))


def same_pads(size: int, taps: int, stride: int) -> list[int]:
    total = max((-(-size // stride) - 1) * stride + taps - size, 0)
    return [total // 2, total - total // 2]


def keras_name(node: Any) -> str:
    """The name of a node as TensorFlow allows it."""
    return re.sub(r"[^0-9A-Za-z]+", "_", node.name).strip("_")


def network_and_samples(options: argparse.Namespace) -> tuple[Any, Array, Array]:
    """The network as a Keras model, and samples as it takes them."""
    import keras

    samples, held_out = np.load(options.samples), np.load(options.held_out)
    if options.network.suffix != ".onnx":
        return keras.saving.load_model(options.network, compile=False), samples, held_out
    import onnx

    model = Builder(onnx.load(options.network)).model
    samples, held_out = (np.ascontiguousarray(np.moveaxis(each, 1, -1)) for each in (samples, held_out))
    check_outputs(options.network, model, held_out)
    return model, samples, held_out


def check_outputs(path: Path, model: Any, samples: Array) -> None:
    """Raises AssertionError where a Keras model is not the ONNX one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: np.moveaxis(samples[:4], -1, 1)})
    np.testing.assert_allclose(model(samples[:4]), expected, atol=1e-4 * np.abs(expected).max())


def tflite(model: Any, samples: Array, per_channel: bool) -> bytes:
    """A model in integers, with float inputs and outputs."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter._experimental_disable_per_channel = not per_channel
    with contextlib.redirect_stdout(io.StringIO()):
        converted: bytes = converter.convert()
    return converted


def run_tflite(content: bytes, samples: Array) -> Array:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=2)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    outputs = []
    for sample in samples:
        interpreter.set_tensor(given["index"], sample[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(made["index"]).ravel())
    return np.array(outputs)


def run_keras(model: Any, samples: Array) -> Array:
    found: Array = model.predict(samples, batch_size=8, verbose=0)
    return found


def scores(expected: Array, found: Array) -> str:
    noise = np.square(found.astype(np.float64) - expected).sum()
    sqnr = 10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise)
    return f"{sqnr:.2f}, {(expected.argmax(1) == found.argmax(1)).mean():.1%}"


def variant_of(model: Any, name: str, samples: Array | None = None) -> Any:
    """A network as it is given, with its batch normalizations folded, or equalized."""
    if name == "folded":
        return biascorr.fold_all_batch_norms(model)[0]
    return biascorr.equalize(model, samples).model if name == "equalized" else model


def print_row(name: str, *cells: str) -> None:
    print(f"{name:<40}", *(f"{cell:>18}" for cell in cells), sep="  ", flush=True)


def print_scores(options: argparse.Namespace) -> None:
    model, samples, held_out = network_and_samples(options)
    per_channel = options.weights == "channel"
    weights_only = biascorr.QuantParams("tf", per_channel=per_channel)
    params = biascorr.QuantParams("tf", per_channel=per_channel, activation_bits=options.activation_bits)
    expected = run_keras(model, held_out)
    print_row(f"{options.network.name}, per {options.weights}", "simulated", "LiteRT", "seconds")

    def print_scored(name: str, variant: Any, seconds: str = "") -> None:
        quantized = simulated(network_from_model(variant, "model"), weights_only).model
        found = [run_keras(quantized, held_out), run_tflite(tflite(variant, samples, per_channel), held_out)]
        print_row(name, *(scores(expected, each) for each in found), seconds)

    for name in options.variants:
        variant = variant_of(model, name, samples)
        print_scored(f"{name}, uncorrected", variant)
        for method in options.methods:
            start = time.perf_counter()
            correction = biascorr.correct(variant, samples, quant_params=params, method=method)
            seconds = f"{time.perf_counter() - start:.1f}"
            label = f"{method}: {correction.method}" if method == "auto" else method
            print_scored(f"{name}, {label}", correction.model, seconds)


def corrected(path: Path, variant: str, samples: Path, method: str) -> tuple[str, str, dict[str, Array]]:
    """Corrects the model of a path: the times, what was chosen, and the biases by the names of layers in Keras."""
    network, data = network_from_model(variant_of(path, variant), "model"), np.load(samples)
    start, cpu_start = time.perf_counter(), time.process_time()
    correction = biascorr.correct(network, data, quant_params=biascorr.QuantParams("tf"), method=method)
    times = f"{time.perf_counter() - start:.1f} s, CPU {time.process_time() - cpu_start:.1f} s"
    layers = [layer for layer in correction.network.layers if layer.bias is not None]
    names = (re.sub(r"[^0-9A-Za-z]+", "_", layer.name).strip("_") for layer in layers)
    return times, correction.method, {name: layer.bias.ravel() for name, layer in zip(names, layers)}


def print_costs(options: argparse.Namespace) -> None:
    model, samples, _ = network_and_samples(options)
    print_row(f"{options.network.name}, {len(samples)} samples", "ONNX", "Keras", "biases differ by")
    with tempfile.TemporaryDirectory() as folder:
        keras_path, keras_samples = Path(folder) / "network.keras", Path(folder) / "samples.npy"
        model.save(keras_path)
        np.save(keras_samples, samples)
        paths = (options.network, options.samples), (keras_path, keras_samples)
        for variant, method in itertools.product(options.variants, options.methods):
            costs = [least_cost(corrected, path, variant, data, method) for path, data in paths]
            for cost in costs:
                if cost.failure:
                    raise RuntimeError(f"{variant}, {method}: {cost.failure}")
            (_, _, expected), (_, _, found) = (cost.result for cost in costs)
            difference = max(np.abs(found[name] - bias).max() / np.abs(bias).max() for name, bias in expected.items())
            chosen = " and ".join(dict.fromkeys(cost.result[1] for cost in costs))
            cells = [f"{cost.result[0]}, {cost.peak / 1e6:.0f} MB" for cost in costs]
            label = f"{method}: {chosen}" if method == "auto" else method
            print_row(f"{variant}, {label}", *cells, f"{difference:.1e}")


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)  # of methods that make outputs worse, which the table shows
    options = parse_options()
    (print_costs if options.cost else print_scores)(options)


if __name__ == "__main__":
    main()
