"""Networks with channels along the last axis get what their twins with channels along axis 1 get: nothing in the engine assumes
where channels are.

A network of numpy operations (numpy_network.py), and the same network in ONNX: kernels and samples are transposed, and the
rows of a dense layer after a flatten are in another order. Biases, reports, factors and folds have to be the same, to rounding.
"""

import functools
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest

from biascorr import (
    BiasCorrection,
    BiasCorrectionParams,
    Correction,
    CrossLayerScaling,
    Equalization,
    HighBiasFold,
    QuantParams,
    correct,
    equalize,
    find_all_convs_bn_with_activation,
    fold_all_batch_norms,
)
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.axes import Order
from biascorr.graph.network import ModelInput
from biascorr.graph.operations import SpatialEffect
from biascorr.graph.reasons import LayerReport, Reason
from biascorr.sweep.measurements import Wanted
from biascorr.sweep.sweep import Sweep
from networks import (
    BITS,
    Array,
    batch_norm_constants,
    biases,
    fake_quantized,
    layers_of,
    model_from_text,
    run,
    samples,
    weights,
)
from numpy_network import BiasedNetwork, Node, NumpyNetwork, ReadableNetwork, node
from several_shards import SeveralShards

METHODS = ("mean", "iterative", "empirical", "activation", "analytical", "hybrid", "auto")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning"),  # both do, or neither does
    pytest.mark.filterwarnings("ignore:not folded:UserWarning"),  # batch normalizations are operations to be told apart
]


# The twin


def channels_first(array: Array) -> Array:
    """An image with its channels along axis 1; anything else as it is."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim == 4 else array


def onnx_twin(network: ReadableNetwork) -> onnx.ModelProto:
    """The same network with channels first. Operations and tensors have the same names."""
    twin = _Twin(network)
    body = " ".join(twin.line(each) for each in network.nodes)
    inputs = ", ".join(twin.declared(each.name) for each in network.inputs)
    outputs = ", ".join(map(twin.declared, network.outputs))
    return model_from_text(f"g ({inputs}) => ({outputs}) {{ {body} }}", **twin.constants)


class _Twin:
    def __init__(self, network: ReadableNetwork) -> None:
        self.constants: dict[str, Array] = {}
        self._shapes = network.facts().shapes
        self._elements: dict[str, Array] = {}  # where the elements of a flattened tensor are in that of numpy

    def declared(self, tensor: str) -> str:
        shape = self._shapes[tensor]
        shape = (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape
        sizes = ["N", *("?" if size is None else str(size) for size in shape[1:])]
        return f"float[{','.join(sizes)}] {tensor}"

    def line(self, each: Node) -> str:
        """The operation, as text."""
        before = self._elements.get(each.inputs[0])
        if before is not None and each.op != "dense":
            self._elements[each.output] = before
        return f"[{each.name}] {getattr(self, f'_{each.op}')(each)}"

    def _constant(self, each: Node, key: str, value: Array) -> str:
        name = f"{each.name}_{key}"
        self.constants[name] = np.ascontiguousarray(value)
        return name

    def _call(self, each: Node, op: str, *constants: str, output: str = "") -> str:
        return f"{output or each.output} = {op}({', '.join([*each.inputs, *constants])})"

    def _layer(self, each: Node, op: str, kernel: Array) -> str:
        bias = each.given.get("bias")
        own = [] if bias is None else [self._constant(each, "bias", bias)]
        return self._call(each, op, self._constant(each, "weights", kernel), *own)

    def _conv(self, each: Node, kernel: Array, groups: int) -> str:
        strides, pads = each.given.get("strides", (1, 1)), each.given.get("padding", ((0, 0), (0, 0)))
        around = ", ".join(map(str, np.transpose(pads).ravel()))
        return self._layer(each, f"Conv<strides=[{strides[0]}, {strides[1]}], pads=[{around}], group={groups}>", kernel)

    def _conv2d(self, each: Node) -> str:
        return self._conv(each, each.given["weights"].transpose(3, 2, 0, 1), each.given.get("groups", 1))

    def _depthwise(self, each: Node) -> str:
        kernel = each.given["weights"].transpose(2, 3, 0, 1)
        return self._conv(each, kernel.reshape(-1, 1, *kernel.shape[2:]), len(kernel))

    def _dense(self, each: Node) -> str:
        rows, bias = each.given["weights"], each.given.get("bias")
        rows = rows[self._elements.get(each.inputs[0], slice(None))]
        if bias is None or len(self._shapes[each.inputs[0]]) == 2:
            return self._layer(each, "MatMul" if bias is None else "Gemm", rows)
        product = self._call(each, "MatMul", self._constant(each, "weights", rows), output=f"{each.name}_product")
        return f"{product} {each.output} = Add({each.name}_product, {self._constant(each, 'bias', bias)})"

    def _batch_norm(self, each: Node) -> str:
        elements = self._elements.get(each.inputs[0], slice(None))
        names = [self._constant(each, key, each.given[key][elements]) for key in ("gamma", "beta", "mean", "variance")]
        return self._call(each, f"BatchNormalization<epsilon={each.given['epsilon']}>", *names)

    def _clip(self, each: Node) -> str:
        low, high = (np.asarray(each.given[key], np.float32) for key in ("low", "high"))
        if high.ndim:  # along axis 1 of an image
            least, most = (self._constant(each, key, bound.reshape(-1, 1, 1)) for key, bound in (("low", low), ("high", high)))
            if not np.isfinite(low).any():
                return self._call(each, "Min", most)
            return f"{self._call(each, 'Max', least, output=f'{each.name}_max')} {each.output} = Min({each.name}_max, {most})"
        if (low, high) == (0, np.inf):
            return self._call(each, "Relu")
        return self._call(each, "Clip", self._constant(each, "low", low), self._constant(each, "high", high))

    def _pad(self, each: Node) -> str:
        pads = np.pad(np.transpose(each.given["pads"]), ((0, 0), (2, 0))).ravel()
        return self._call(each, "Pad", self._constant(each, "pads", pads.astype(np.int64)))

    def _average(self, each: Node) -> str:
        return self._call(each, "GlobalAveragePool" if each.given["keepdims"] else "ReduceMean<axes=[2, 3], keepdims=0>")

    def _flatten(self, each: Node) -> str:
        shape = self._shapes[each.inputs[0]][1:]
        self._elements[each.output] = np.arange(np.prod(shape)).reshape(shape).transpose(2, 0, 1).ravel()
        return self._call(each, "Flatten")

    def _quantize(self, each: Node) -> str:
        return self._call(each, "QuantizeLinear", *self._grid(each, each.given["dtype"]))

    def _dequantize(self, each: Node) -> str:
        return self._call(each, "DequantizeLinear", *self._grid(each, each.given["dtype"]))

    def _grid(self, each: Node, dtype: str) -> tuple[str, str]:
        step, zero_point = np.float32(each.given["step"]), np.asarray(each.given["zero_point"], dtype)
        return self._constant(each, "step", step), self._constant(each, "zero_point", zero_point)

    def _leaky(self, each: Node) -> str:
        return self._call(each, f"LeakyRelu<alpha={each.given['alpha']}>")

    def _hard_swish(self, each: Node) -> str:
        return self._call(each, "HardSwish")

    def _identity(self, each: Node) -> str:
        return self._call(each, "Identity")

    def _softmax(self, each: Node) -> str:
        return self._call(each, "Softmax<axis=1>")

    def _add(self, each: Node) -> str:
        return self._call(each, "Add")


# Networks


def conv(name: str, x: str, y: str, *shape: int, bias: bool = True, seed: int = 0, **given) -> Node:
    """Weights that keep values about as large as they were."""
    size = max(1.0, 2.0 ** (round(np.log2(np.prod(shape[:-1])) / 2) - 1))
    kernel = weights(*shape, axis=-2 if "depthwise" in given else -1, seed=seed) / np.float32(size)
    op = "depthwise" if given.pop("depthwise", False) else "conv2d" if len(shape) == 4 else "dense"
    channels = shape[-1] * (shape[-2] if op == "depthwise" else 1)
    return node(name, op, x, y, weights=kernel, **({"bias": biases(channels, seed=seed + 1)} if bias else {}), **given)


def uneven(each: Node) -> Node:
    """With channels so uneven that a bound for each of them is worth it."""
    kernel, bias = each.given["weights"], each.given["bias"]
    factors = np.resize(np.float32([1, 16, 4, 64]), bias.size)
    return each.with_given(weights=kernel * factors, bias=bias * factors / 16)


def norm(name: str, x: str, y: str, channels: int) -> Node:
    given = {key.removeprefix(f"{name}_"): each for key, each in batch_norm_constants(channels, name).items()}
    return node(name, "batch_norm", x, y, variance=given.pop("var"), epsilon=0.25, **given)


def relu(name: str, x: str, y: str, high: float = np.inf) -> Node:
    return node(name, "clip", x, y, low=0.0, high=high)


def cap(name: str, x: str, y: str, *high: float) -> Node:
    return node(name, "clip", x, y, low=-np.inf, high=np.float32(high))


SAME = ((1, 1), (1, 1))

IMAGE = (7, 6, 3)

NODES: dict[str, list[Node]] = {
    "chain": [
        conv("first", "x", "a", 3, 3, 3, 4, padding=((1, 0), (2, 1)), strides=(2, 1)),
        relu("relu", "a", "r"),
        conv("second", "r", "b", 2, 3, 4, 5),
        relu("again", "b", "s"),
        conv("third", "s", "y", 1, 1, 5, 4, bias=False),
    ],
    "separable": [
        uneven(conv("expand", "x", "a", 1, 1, 3, 6)),
        relu("six", "a", "r", 6.0),
        conv("middle", "r", "b", 3, 3, 6, 1, depthwise=True, padding=SAME, strides=(2, 2)),
        relu("sixth", "b", "s", 6.0),
        conv("project", "s", "c", 1, 1, 6, 5),
        node("swish", "hard_swish", "c", "h"),
        node("mean", "average", "h", "m", keepdims=False),
        conv("head", "m", "l", 5, 4),
        node("classes", "softmax", "l", "y"),
    ],
    "residual": [
        conv("first", "x", "a", 3, 3, 3, 4, padding=SAME),
        relu("relu", "a", "r"),
        conv("second", "r", "b", 3, 3, 4, 4, padding=SAME),
        node("sum", "add", "b r", "s"),
        relu("again", "s", "t"),
        conv("third", "t", "y", 3, 3, 4, 5, padding=((0, 1), (0, 0))),
    ],
    "norms": [
        norm("start", "x", "n", 3),
        conv("first", "n", "a", 3, 3, 3, 6),
        norm("one", "a", "b", 6),
        relu("relu", "b", "r"),
        conv("second", "r", "c", 2, 2, 6, 6, bias=False),
        norm("two", "c", "d", 6),
        relu("six", "d", "s", 6.0),
        conv("middle", "s", "e", 3, 3, 6, 1, depthwise=True, padding=SAME),
        norm("three", "e", "f", 6),
        node("same", "identity", "f", "g"),
        conv("last", "g", "h", 1, 1, 6, 5),
        norm("end", "h", "y", 5),
    ],
    "flatten": [
        conv("first", "x", "a", 3, 3, 3, 4),
        norm("one", "a", "n", 4),
        relu("relu", "n", "r"),
        node("flat", "flatten", "r", "f"),
        conv("dense", "f", "d", 80, 5),
        relu("again", "d", "s"),
        conv("last", "s", "y", 5, 4),
    ],
    "flat_norm": [
        conv("first", "x", "a", 3, 3, 3, 4),
        norm("inner", "a", "i", 4),
        node("flat", "flatten", "i", "f"),
        norm("one", "f", "n", 80),
        conv("dense", "n", "d", 80, 5),
        relu("again", "d", "s"),
        conv("last", "s", "y", 5, 4),
    ],
    "averages": [
        conv("first", "x", "a", 3, 3, 3, 4),
        norm("one", "a", "n", 4),
        relu("relu", "n", "r"),
        node("squeeze", "average", "r", "m", keepdims=True),
        conv("point", "m", "b", 1, 1, 4, 6),
        norm("two", "b", "o", 6),
        node("mean", "average", "o", "p", keepdims=False),
        conv("last", "p", "y", 6, 5),
    ],
    "pads": [
        conv("first", "x", "a", 3, 3, 3, 4),
        relu("relu", "a", "r"),
        node("around", "pad", "r", "p", pads=((1, 0), (2, 1))),
        conv("second", "p", "b", 3, 3, 4, 4),
        norm("one", "b", "n", 4),
        node("before", "pad", "n", "q", pads=((0, 1), (1, 1))),
        relu("again", "q", "s"),
        conv("third", "s", "y", 2, 2, 4, 5),
    ],
    "leaky": [
        conv("first", "x", "a", 3, 3, 3, 4),
        node("bent", "leaky", "a", "r", alpha=0.25),
        conv("second", "r", "b", 1, 1, 4, 6),
        node("more", "leaky", "b", "s", alpha=0.5),
        conv("third", "s", "y", 3, 3, 6, 5, bias=False),
    ],
    "groups": [
        conv("first", "x", "a", 1, 1, 3, 6),
        relu("relu", "a", "r"),
        conv("three", "r", "b", 3, 3, 2, 6, groups=3, padding=SAME),
        relu("again", "b", "s"),
        conv("two", "s", "c", 2, 2, 3, 4, groups=2),
        conv("double", "c", "y", 2, 1, 4, 2, depthwise=True),
    ],
    "bounds": [
        uneven(conv("first", "x", "a", 3, 3, 3, 6)),
        norm("one", "a", "n", 6),
        cap("cap", "n", "r", 2, 3, 1, 4, 7, 6),
        conv("second", "r", "b", 1, 1, 6, 4),
        cap("limit", "b", "s", 1, 0.5, 2, 0.25),
        conv("third", "s", "y", 2, 2, 4, 5),
    ],
    "rows": [
        conv("first", "x", "a", 6, 5),
        relu("relu", "a", "r"),
        conv("second", "r", "b", 5, 4, bias=False),
        node("limit", "clip", "b", "s", low=-1.0, high=3.0),
        conv("third", "s", "y", 4, 5),
    ],
}  # fmt: skip


FLAT = np.arange(80).reshape(5, 4, 4).transpose(2, 0, 1).ravel()
"""Where the elements of a flattened image of 5 x 4 positions and 4 channels are, in the order of channels first."""


def network_of(name: str, **options) -> NumpyNetwork:
    shape = (None, 5, 6) if name == "rows" else (None, *IMAGE)
    return NumpyNetwork([ModelInput("x", np.dtype("float32"), shape)], NODES[name], ["y"], **options)


@functools.cache
def twin_of(name: str) -> onnx.ModelProto:
    return onnx_twin(network_of(name))


def batches_for(name: str) -> list[Array]:
    """Of two sizes: 12 samples."""
    shape = network_of(name).inputs[0].shape[1:]
    return [samples(count, *shape, seed=count) for count in (7, 5)]


def correct_both(network: ReadableNetwork, data: Sequence[Array], **options) -> tuple[Correction, Correction]:
    """A network and its twin; `quantized`, if given, is of the former kind."""
    given = options.pop("quantized", None)
    both = {} if given is None else {"quantized": given}, {} if given is None else {"quantized": onnx_twin(given)}
    images = [channels_first(each) for each in data]
    options.setdefault("threads", 1)
    return correct(network, data, **options, **both[0]), correct(onnx_twin(network), images, **options, **both[1])


def outline(reason: Reason) -> tuple:
    """A reason but for the axes in it."""
    arguments = {key: outline(each) if isinstance(each, Reason) else each for key, each in reason.arguments if key != "axis"}
    return reason.code, arguments


def assert_same_layers(network: ReadableNetwork, expected: onnx.ModelProto, tolerance: float = 1e-5) -> None:
    """Weights and biases are the same, but for where channels are; to a part of the largest."""
    found, expected_layers = layers_of(onnx_twin(network)), layers_of(expected)
    assert list(found) == list(expected_layers)
    for name, layer in expected_layers.items():
        assert_near(np.asarray(found[name].weights), np.asarray(layer.weights), tolerance)
        assert (found[name].bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert_near(found[name].bias.ravel(), layer.bias.ravel(), tolerance)


def assert_near(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    """To a part of the largest."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0.0) <= tolerance * np.abs(expected).max(initial=0.0)


def assert_same_reports(found: Sequence[LayerReport], expected: Sequence[LayerReport], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.name, one.method, one.channels) == (other.name, other.method, other.channels)
        assert [*map(outline, one.reasons)] == [*map(outline, other.reasons)]
        assert one.shift_before == (other.shift_before and pytest.approx(other.shift_before, rel=tolerance))
        assert one.shift_after == (other.shift_after and pytest.approx(other.shift_after, abs=1e-6))


def assert_same_corrections(found: Correction, expected: Correction, tolerance: float = 1e-5) -> None:
    assert found.method == expected.method
    assert_same_reports(found.report, expected.report, tolerance)
    assert_same_layers(found.network, expected.model, tolerance)
    assert list(found.scores) == list(expected.scores)
    assert [each.sqnr for each in found.scores.values()] == pytest.approx(
        [each.sqnr for each in expected.scores.values()], abs=1000 * tolerance
    )


@pytest.mark.parametrize("name", NODES)
def test_twins_compute_the_same(name):
    network = network_of(name)
    tensors = [each.output for each in network.nodes]
    for x in batches_for(name):
        found = network.part({"x": x}, tensors)({"x": x})
        expected = run(onnx_twin(network), {"x": channels_first(x)}, tensors)
        for tensor, array in zip(tensors, expected):
            computed = channels_first(found[tensor])
            assert_near(computed[:, FLAT] if computed.shape[1:] == FLAT.shape else computed, array, 1e-6)


# Correction


@pytest.mark.parametrize(
    ("method", "per_channel"), [*((method, False) for method in METHODS), ("mean", True), ("empirical", True)]
)
@pytest.mark.parametrize("name", NODES)
def test_simulated_quantization(name, method, per_channel):
    params = QuantParams("tf", weight_bits=BITS, per_channel=per_channel)
    found, expected = correct_both(network_of(name), batches_for(name), method=method, quant_params=params)
    assert_same_corrections(found, expected)
    assert any(each.shift_before > 1e-3 for each in found.report if each.method is not None)


@pytest.mark.parametrize("method", ["empirical", "analytical"])
@pytest.mark.parametrize("name", ["norms", "flat_norm"])
def test_folded_before_quantization_is_simulated(name, method):
    params = QuantParams("tf", weight_bits=BITS)
    found, expected = correct_both(network_of(name), batches_for(name), method=method, quant_params=params, fold=True)
    assert_same_corrections(found, expected)
    assert found.notes[0] == expected.notes[0]
    assert "folded into layers" in found.notes[0]


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_grids_of_every_kind(symmetric):
    for per_channel in (False, True):
        params = QuantParams("tf_enhanced", weight_bits=3, per_channel=per_channel, symmetric=symmetric)
        for name in ("separable", "groups", "flatten"):
            assert_same_corrections(*correct_both(network_of(name), batches_for(name), method="iterative", quant_params=params))


def rounded(network: NumpyNetwork, axis: int | None = None) -> NumpyNetwork:
    """With weights on grids."""
    nodes = [
        each.with_given(weights=fake_quantized(each.given["weights"], axis)) if "weights" in each.given else each
        for each in network.nodes
    ]
    return replace(network, nodes=nodes)


def with_codes(network: NumpyNetwork, step: float = 1 / 16) -> NumpyNetwork:
    """Layers read what is dequantized from int8."""
    nodes = []
    for each in rounded(network).nodes:
        if "weights" in each.given:
            (tensor,), grid = each.inputs, {"step": step, "zero_point": -5, "dtype": "int8"}
            nodes += [
                node(f"{each.name}_quantize", "quantize", tensor, f"{each.name}_codes", **grid),
                node(f"{each.name}_dequantize", "dequantize", f"{each.name}_codes", f"{each.name}_values", **grid),
            ]
            each = replace(each, inputs=(f"{each.name}_values",))
        nodes.append(each)
    return replace(network, nodes=nodes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["separable", "norms", "flatten", "rows"])
def test_given_quantized_networks(name, method):
    network = network_of(name)
    quantized = rounded(network, axis=-1 if method in ("mean", "hybrid") and name != "separable" else None)
    assert_same_corrections(*correct_both(network, batches_for(name), quantized=quantized, method=method))


@pytest.mark.parametrize("method", ["mean", "iterative", "empirical", "activation", "hybrid"])
@pytest.mark.parametrize("name", ["norms", "flatten", "rows"])
def test_layers_that_read_codes(name, method):
    network = network_of(name)
    quantized = with_codes(network)
    assert all(layer.input_quantization is not None for layer in quantized.layers)
    assert_same_corrections(*correct_both(network, batches_for(name), quantized=quantized, method=method), tolerance=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["separable", "norms", "flatten"])
def test_quantized_activations(name, method):
    params = QuantParams("tf", weight_bits=BITS, activation_bits=8)
    found, expected = correct_both(network_of(name), batches_for(name), method=method, quant_params=params)
    assert_same_corrections(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("name", NODES)
def test_axes_may_be_counted_from_the_start(name):
    data, options = batches_for(name), {"quant_params": QuantParams("tf", weight_bits=BITS)}
    for method in ("hybrid", "activation"):
        one, other = (
            correct(network_of(name, counts_from_start=start), data, method=method, **options) for start in (False, True)
        )
        assert one.report == other.report
    one, other = (equalize(network_of(name, counts_from_start=start), data) for start in (False, True))
    assert one.folds == other.folds
    assert [each.limits for each in one.chains] == [each.limits for each in other.chains]
    assert list(one.reasons) == list(other.reasons)
    for before, after in zip(one.network.nodes, other.network.nodes, strict=True):
        assert before.name == after.name
        for key in {"weights", "bias"}.intersection(before.given):
            np.testing.assert_array_equal(before.given[key], after.given[key])


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3}, {"memory_budget": 1}], ids=str)
def test_threads_and_memory_change_nothing(options):
    quant_params = QuantParams("tf", weight_bits=BITS)
    expected = correct(network_of("norms"), batches_for("norms"), quant_params=quant_params)
    assert correct(network_of("norms"), batches_for("norms"), quant_params=quant_params, **options).report == expected.report


def test_rows_of_any_rank_have_channels_along_the_last_axis():
    """A batch normalization of (N, T, C) is one of (N*T, C), which ONNX has too."""
    nodes = [
        norm("start", "x", "n", 6),
        conv("first", "n", "a", 6, 5),
        norm("one", "a", "b", 5),
        relu("relu", "b", "r"),
        conv("second", "r", "c", 5, 4, bias=False),
        norm("two", "c", "d", 4),
        relu("six", "d", "s", 6.0),
        conv("third", "s", "y", 4, 5),
    ]
    rows, single = (NumpyNetwork([ModelInput("x", np.dtype("float32"), (None, *each, 6))], nodes, ["y"]) for each in ((5,), ()))
    data = batches_for("rows")
    flat = [each.reshape(-1, 6) for each in data]
    params = QuantParams("tf", weight_bits=BITS)
    for method in ("mean", "iterative", "empirical", "activation", "analytical", "hybrid"):
        found, expected = (
            correct(rows, data, method=method, quant_params=params),
            correct(onnx_twin(single), flat, method=method, quant_params=params),
        )
        assert_same_reports(found.report, expected.report)
        assert_same_layers(replace(found.network, inputs=single.inputs), expected.model)
    found, expected = equalize(rows, data), equalize(onnx_twin(single), flat)
    assert len(found.folds) == 3
    assert_same_equalizations(replace_network(found, inputs=single.inputs), expected)


# Equalization


def replace_network(found: Equalization, **changes) -> Equalization:
    return replace(found, network=replace(found.network, **changes))


def assert_same_equalizations(found: Equalization, expected: Equalization) -> None:
    assert found.folds == expected.folds
    assert found.replaced == expected.replaced
    for one, other in zip(found.chains, expected.chains, strict=True):
        assert [each.name for each in one.chain.layers] == [each.name for each in other.chain.layers]
        assert one.limits == other.limits
        assert one.bits == pytest.approx(other.bits, rel=1e-6)
        np.testing.assert_array_equal(one.silent, other.silent)
        for factors, expected_factors in zip(one.factors, other.factors, strict=True):
            np.testing.assert_allclose(factors, expected_factors, rtol=1e-6)
    for one, other in zip(found.high_biases, expected.high_biases, strict=True):
        assert (one.first, one.second) == (other.first, other.second)
        assert_near(one.folded, other.folded)
    assert {name: [*map(outline, each)] for name, each in found.reasons.items()} == {
        name: [*map(outline, each)] for name, each in expected.reasons.items()
    }
    assert list(found.changes) == list(expected.changes)
    assert_same_layers(found.network, expected.model)


EXPECTED = {  # how many of each
    "chain": (0, [["first", "second"], ["second", "third"]], 0),
    "separable": (0, [["expand", "middle", "project"]], 0),
    "residual": (0, [], 0),
    "norms": (5, [["first", "second"], ["middle", "last"]], 2),
    "flatten": (1, [["first", "dense"], ["dense", "last"]], 1),
    "flat_norm": (2, [["first", "dense"], ["dense", "last"]], 1),
    "averages": (2, [["first", "point"], ["point", "last"]], 2),
    "pads": (1, [["first", "second"], ["second", "third"]], 0),
    "leaky": (0, [["first", "second"], ["second", "third"]], 0),
    "groups": (0, [["first", "three"], ["three", "two"], ["two", "double"]], 0),
    "bounds": (1, [["first", "second"], ["second", "third"]], 0),
    "rows": (0, [["first", "second"]], 0),
}
"""Batch normalizations that are folded, chains, high biases."""


@pytest.mark.parametrize("options", [{}, {"replace_relu6": True, "iterations": 1}], ids=str)
@pytest.mark.parametrize("name", NODES)
def test_equalization(name, options):
    network, data = network_of(name), batches_for(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the float outputs moved", UserWarning)  # a ReLU is no ReLU6
        found = equalize(network, data, **options)
        expected = equalize(onnx_twin(network), [channels_first(each) for each in data], **options)
    assert_same_equalizations(found, expected)
    if not options:
        chains = [[layer.name for layer in each.chain.layers] for each in found.chains]
        assert (len(found.folds), chains, len(found.high_biases)) == EXPECTED[name]
        assert_same_function(network, found.network, data)


def assert_same_function(network: NumpyNetwork, after: NumpyNetwork, data: Sequence[Array], tolerance: float = 2e-6) -> None:
    for x in data:
        before, now = (list(each.part({"x": x}, each.outputs)({"x": x}).values()) for each in (network, after))
        for expected, computed in zip(before, now, strict=True):
            assert_near(computed, expected, tolerance)


@pytest.mark.parametrize("name", NODES)
def test_equalization_without_data(name):
    network = network_of(name)
    found, expected = equalize(network), equalize(onnx_twin(network))
    assert_same_equalizations(found, expected)
    norms, expected_norms = (find_all_convs_bn_with_activation(each) for each in (found.network, expected.network))
    assert_same_norms(norms, expected_norms)


def test_a_relu6_gets_a_bound_for_each_channel():
    found = equalize(network_of("separable"), batches_for("separable"))
    assert [each.limits for each in found.chains] == [["six", "sixth"]]
    bounds = {each.name: each.given["high"] for each in found.network.nodes if each.op == "clip"}
    for name, factors in zip(("six", "sixth"), found.chains[0].factors):
        np.testing.assert_allclose(bounds[name], 6 / factors, rtol=1e-6)
    twin = onnx_twin(found.network)
    for x in batches_for("separable"):
        assert_near(run(twin, {"x": channels_first(x)})[0], run(twin_of("separable"), {"x": channels_first(x)})[0], 2e-6)


@pytest.mark.parametrize(
    "between",
    [
        [node("mean", "average", "a", "m", keepdims=True), relu("six", "m", "s", 6.0)],
        [relu("relu", "a", "r"), node("around", "pad", "r", "m", pads=SAME), relu("six", "m", "s", 6.0)],
    ],
    ids=lambda nodes: nodes[-2].op,
)
def test_bounds_do_not_depend_on_the_end_that_axes_are_counted_from(between):
    nodes = [uneven(conv("first", "x", "a", 1, 1, 3, 6)), *between, conv("second", "s", "y", 1, 1, 6, 5)]
    network = replace(network_of("chain"), nodes=nodes)
    found = equalize(network, batches_for("chain"))
    assert_same_function(network, found.network, batches_for("chain"))
    for other in (replace(network, counts_from_start=True), onnx_twin(network)):
        expected = equalize(other)
        assert [each.limits for each in found.chains] == [each.limits for each in expected.chains]
        assert found.reasons == expected.reasons


def test_a_flatten_tiles_channels():
    """Row k of the dense layer reads channel k % C with channels last, k // (H*W) with channels first."""
    network, data = network_of("flatten"), batches_for("flatten")
    found, expected = equalize(network, data), equalize(onnx_twin(network), [channels_first(each) for each in data])
    factors = found.chains[0].factors[0]
    assert factors.max() > 2 * factors.min()
    before, after = (
        next(each.given["weights"] for each in of.nodes if each.name == "dense") for of in (network, found.network)
    )
    dense = found.chains[1].factors[0]
    np.testing.assert_allclose(after * dense, before * np.tile(factors, 20)[:, None], rtol=1e-5)
    before, after = (np.asarray(layers_of(of)["dense"].weights) for of in (twin_of("flatten"), expected.model))
    np.testing.assert_allclose(after * dense, before * np.repeat(factors, 20)[:, None], rtol=1e-5)
    passage = network.facts().preserving("flat", *SpatialEffect)
    assert passage.order is Order.TILED


@pytest.mark.parametrize("method", ["empirical", "hybrid", "auto"])
@pytest.mark.parametrize("name", ["separable", "norms", "flatten", "flat_norm"])
def test_correction_of_an_equalized_network(name, method):
    options = {"quant_params": QuantParams("tf", weight_bits=BITS), "method": method, "equalize": True}
    found, expected = correct_both(network_of(name), batches_for(name), **options)
    assert_same_equalizations(found.equalization, expected.equalization)
    assert_same_corrections(found, expected, tolerance=1e-4)


# The classic interface


def assert_same_norms(found, expected):
    assert list(found) == list(expected)
    for name, info in expected.items():
        assert found[name].in_activation_type == info.in_activation_type
        assert found[name].out_activation_type == info.out_activation_type
        for one, other in ((found[name].input_bn, info.input_bn), (found[name].output_bn, info.output_bn)):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.name == other.name
                elements = FLAT if one.beta.size == FLAT.size else slice(None)
                assert_near(one.beta[elements], other.beta)
                assert_near(np.abs(one.gamma[elements]), np.abs(other.gamma))


@pytest.mark.parametrize("name", ["norms", "averages", "flatten", "flat_norm", "pads", "bounds"])
def test_the_classic_steps(name):
    network, data = network_of(name), batches_for(name)
    norms = find_all_convs_bn_with_activation(network)
    assert_same_norms(norms, find_all_convs_bn_with_activation(twin_of(name)))
    steps = [fold_all_batch_norms(each) for each in (network, twin_of(name))]
    (found, pairs), (expected, expected_pairs) = steps
    assert pairs == expected_pairs != []
    assert_same_layers(found, expected)
    assert_same_function(network, found, data)
    (found, infos), (expected, expected_infos) = (CrossLayerScaling.scale_model(each) for each in (found, expected))
    scaled = [(pair.layer1, pair.layer2, pair.relu_activation_between_layers) for info in infos for pair in info.cls_pairs]
    assert scaled == [
        (pair.layer1, pair.layer2, pair.relu_activation_between_layers) for info in expected_infos for pair in info.cls_pairs
    ]
    assert_same_layers(found, expected)
    assert_same_function(network, found, data)
    found, expected = (HighBiasFold.bias_fold(each, pairs, infos) for each in (found, expected))
    assert_same_layers(found, expected)
    images = [channels_first(each) for each in data]
    params = BiasCorrectionParams(7, 12, 12, input_op_names=["x"], output_op_names=["y"])
    quant_params = QuantParams("tf", weight_bits=BITS, ops_to_ignore=[network.layers[-1].name], activation_bits=8)
    for perform_only_empirical in (True, False):
        found_model, expected_model = (
            BiasCorrection.correct_bias(model, params, quant_params, of, norms, perform_only_empirical)
            for model, of in ((found, data), (expected, images))
        )
        assert_same_layers(found_model, expected_model, 1e-4)


def test_the_classic_steps_of_one_layer():
    network, data = network_of("norms"), batches_for("norms")
    images = [channels_first(each) for each in data]
    params = BiasCorrectionParams(7, 12, 12, input_op_names=["x"], output_op_names=["y"])
    quant_params = QuantParams("tf", weight_bits=BITS)
    found, expected = (
        BiasCorrection.bias_correction_per_layer(model, model, params, "middle", of, quant_params=quant_params)
        for model, of in ((network, data), (twin_of("norms"), images))
    )
    assert_same_layers(found, expected)
    for name in ("second", "middle", "last"):
        found, expected = (
            BiasCorrection.analytical_bias_correction_per_layer(
                model, name, find_all_convs_bn_with_activation(model)[name], quant_params
            )
            for model in (network, twin_of("norms"))
        )
        assert_same_layers(found, expected)
        assert not np.array_equal(bias_in(found, name), bias_in(network, name))


def bias_in(network: ReadableNetwork, name: str) -> Array | None:
    return next(layer.bias for layer in network.layers if layer.name == name)


# Networks of fewer abilities


def as_kind(kind: type[ReadableNetwork], network: NumpyNetwork) -> ReadableNetwork:
    return kind(network.inputs, network.nodes, network.outputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reference", [ReadableNetwork, BiasedNetwork])
def test_reading_and_changing_biases_is_enough(reference, method):
    assert not hasattr(BiasedNetwork, "edited")
    network, data = network_of("norms"), batches_for("norms")
    found = correct(as_kind(reference, network), data, quantized=as_kind(BiasedNetwork, rounded(network)), method=method)
    expected = correct(network, data, quantized=rounded(network), method=method)
    assert type(found.model) is BiasedNetwork
    assert found.report == expected.report
    for layer in expected.network.layers:
        np.testing.assert_array_equal(bias_in(found.model, layer.name), layer.bias)


def test_what_needs_more_says_what_is_missing():
    network, data = network_of("norms"), batches_for("norms")
    biased, readable = as_kind(BiasedNetwork, network), as_kind(ReadableNetwork, network)
    needs = "needs a model whose weights can be changed; BiasedNetwork has no"
    params = BiasCorrectionParams(7, 12, 12, input_op_names=["x"], output_op_names=["y"])
    for options in ({}, {"equalize": True}, {"method": "analytical"}, {"quant_params": QuantParams(activation_bits=8)}):
        with pytest.raises(TypeError, match=f"reference: simulated quantization {needs}"):
            correct(biased, data, **options)
    with pytest.raises(TypeError, match=f"reference: equalization {needs}"):
        equalize(biased)
    for step in (fold_all_batch_norms, CrossLayerScaling.scale_model):
        with pytest.raises(TypeError, match=f"model: equalization {needs}"):
            step(biased)
    with pytest.raises(TypeError, match=f"reference_model: simulated quantization {needs}"):
        BiasCorrection.correct_bias(biased, params, QuantParams(), data)
    with pytest.raises(TypeError, match="quantized: the biases of such a model cannot be changed; ReadableNetwork has no"):
        correct(network, data, quantized=readable)


def test_results_are_saved(tmp_path):
    network, data = network_of("norms"), batches_for("norms")
    correction = correct(network, data, quantized=as_kind(BiasedNetwork, rounded(network)), method="mean")
    correction.save(tmp_path / "corrected")
    equalize(network, data).save(tmp_path / "equalized")
    with pytest.raises(FileExistsError):
        correction.save(tmp_path / "equalized")
    correction.save(tmp_path / "equalized", force=True)
    for name in ("corrected", "equalized"):
        saved = pickle.loads((tmp_path / name).read_bytes())
        for layer in correction.network.layers:
            np.testing.assert_array_equal(bias_in(saved, layer.name), layer.bias)


# Shards


@pytest.mark.parametrize("is_integer", [False, True], ids=["reals", "integers"])
@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("name", ["separable", "residual", "norms", "flatten"])
def test_two_shards_measure_what_one_does(name, depth, is_integer):
    network = with_codes(network_of(name)) if is_integer else network_of(name)
    layers = network.layers
    after = [each for each in network.nodes if each.op in ("clip", "batch_norm", "hard_swish")]
    made = {layer.output: layer.name for layer in layers}
    wanted = Wanted(inputs=True, activated={made[each.inputs[0]]: each.output for each in after if each.inputs[0] in made})
    data = [samples(count, *IMAGE, seed=seed) for seed, count in enumerate((3, 1, 4, 2))]
    one, two = (swept(network, data, wanted, parts, depth) for parts in ([range(4)], [range(2), range(2, 4)]))
    whole = swept(network, [np.concatenate(data)], wanted, [range(1)], depth)
    assert [*one] == [*two]
    for key in [key for key in whole if " of " not in key]:
        np.testing.assert_allclose(one[key], whole[key], rtol=1e-6, atol=1e-6)
    for key, array in one.items():
        assert array.dtype == two[key].dtype
        np.testing.assert_array_equal(two[key], array)


def swept(network, data, wanted, parts, depth):
    """All that a sweep measures, with shifts on the way where there are stages for them."""
    found = {}
    with Storage(1 << 30) as storage:
        held = Samples(storage)
        for x in data:
            held.add({"x": x}, len(x))
        sweep = Sweep(network, network.layers, SeveralShards(held, parts, 2), range(held.batches), wanted, depth=depth)
        for stage in sweep.stages:
            measured = sweep.measure(stage)
            shifts = {layer.name: (np.arange(layer.channels) - 1) / 8 for layer in stage.layers}
            for name, each in measured.items():
                found |= {f"{name} output": each.output.means, f"{name} input": each.input}
            if depth == 1:
                found |= {f"{name} after": each.means for name, each in sweep.measure_activated(stage, shifts).items()}
                for layer in stage.layers:
                    sweep.shift(layer, shifts[layer.name])
        for batch, outputs in sweep.outputs():
            found |= {f"{name} of {batch}": array for name, array in outputs.items()}
    return found
