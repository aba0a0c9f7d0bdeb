"""The same network in Keras and in ONNX: the same biases by every method, before and after equalization."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import helper, numpy_helper

from biascorr import QuantParams, correct, equalize
from biascorr.graph.network import Network
from keras_networks import Array, assert_close, of_keras
from keras_networks import run as run_keras
from networks import batch_norm_constants, biases, samples, weights
from networks import run as run_onnx

pytestmark = [of_keras, pytest.mark.filterwarnings("ignore:the float outputs moved:UserWarning")]

TOLERANCE = 1e-4
"""Of the largest bias of a layer."""


class Twins:
    """One network, built for both: channels last in Keras, first in ONNX."""

    def __init__(self, *shape: int, count: int = 24) -> None:
        self.samples = samples(count, *shape) - 0.5
        self._inputs = self.keras = keras.Input(shape, name="x")
        self._values: dict[str, list[Array]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self.onnx = "x"

    @property
    def space(self) -> int:
        return len(self.keras.shape) - 2

    def _add(self, op: str, name: str, given: Mapping[str, Array], **attributes: Any) -> None:
        self._constants += [numpy_helper.from_array(np.ascontiguousarray(a), f"{name}_{key}") for key, a in given.items()]
        inputs = [self.onnx, *(f"{name}_{key}" for key in given)]
        self.onnx = f"{name}_out"
        self._nodes.append(helper.make_node(op, inputs, [self.onnx], name, **attributes))

    def _layer(self, layer: Any, op: str, kernel: Array, turned: Array, **attributes: Any) -> None:
        """With a bias where the layer uses one."""
        self.keras = layer(self.keras)
        bias = [biases(*layer.bias.shape, seed=len(self._nodes))] if layer.use_bias else []
        self._values[layer.name] = [kernel, *bias]
        self._add(op, layer.name, {"w": turned} | ({"b": bias[0]} if bias else {}), **attributes)

    def conv(self, name: str, filters: int, taps: int, *, groups: int = 1, stride: int = 1, **options: Any) -> None:
        kind = [layers.Conv1D, layers.Conv2D, layers.Conv3D][self.space - 1]
        own = {"padding": "same", "use_bias": True} | options
        layer = kind(filters, taps, strides=stride, groups=groups, name=name, **own)
        kernel = weights(*[taps] * self.space, self.keras.shape[-1] // groups, filters, axis=-1, seed=len(self._nodes))
        self._layer(layer, "Conv", kernel, first(kernel), group=groups, **self._moves(stride, own["padding"]))

    def depthwise(self, name: str, taps: int, *, multiplier: int = 1, stride: int = 1, **options: Any) -> None:
        kind = [layers.DepthwiseConv1D, layers.DepthwiseConv2D][self.space - 1]
        own = {"padding": "same", "use_bias": True} | options
        layer = kind(taps, depth_multiplier=multiplier, strides=stride, name=name, **own)
        channels = self.keras.shape[-1]
        kernel = weights(*[taps] * self.space, channels * multiplier, axis=-1, seed=len(self._nodes))
        turned = np.moveaxis(kernel, -1, 0)[:, None]
        kernel = kernel.reshape(*kernel.shape[:-1], channels, multiplier)
        self._layer(layer, "Conv", kernel, turned, group=channels, **self._moves(stride, own["padding"]))

    def transposed(self, name: str, filters: int, taps: int, *, stride: int = 1, **options: Any) -> None:
        kind = [layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose][self.space - 1]
        own = {"padding": "same", "use_bias": True} | options
        layer = kind(filters, taps, strides=stride, name=name, **own)
        kernel = weights(*[taps] * self.space, filters, self.keras.shape[-1], axis=-2, seed=len(self._nodes))
        self._layer(layer, "ConvTranspose", kernel, first(kernel), **self._moves(stride, own["padding"]))

    def _moves(self, stride: int, padding: str) -> dict[str, Any]:
        return {"strides": [stride] * self.space, "auto_pad": "SAME_UPPER" if padding == "same" else "VALID"}

    def dense(self, name: str, units: int, *, after: tuple[int, ...] = (), **options: Any) -> None:
        """A product with a row; `after` is the shape of the flattened image that it was."""
        layer = layers.Dense(units, name=name, **options)
        kernel = weights(self.keras.shape[-1], units, axis=-1, seed=len(self._nodes))
        turned = np.moveaxis(kernel.reshape(*after, units), -2, 0).reshape(kernel.shape) if after else kernel
        self._layer(layer, "Gemm", kernel, turned)

    def norm(self, name: str) -> None:
        constants = batch_norm_constants(self.keras.shape[-1], name, seed=len(self._nodes))
        self.keras = layers.BatchNormalization(epsilon=0.25, name=name)(self.keras)
        self._values[name] = [constants[f"{name}_{key}"] for key in ("gamma", "beta", "mean", "var")]
        given = dict(zip(("gamma", "beta", "mean", "var"), self._values[name]))
        self._add("BatchNormalization", name, given, epsilon=0.25)

    def relu(self, name: str, most: float | None = None) -> None:
        self.keras = layers.ReLU(max_value=most, name=name)(self.keras)
        if most is None:
            self._add("Relu", name, {})
        else:
            self._add("Clip", name, {"low": np.float32(0), "high": np.float32(most)})

    def add(self, name: str, other: tuple[Any, str]) -> None:
        self.keras = layers.Add(name=name)([self.keras, other[0]])
        self._nodes.append(helper.make_node("Add", [self.onnx, other[1]], [f"{name}_out"], name))
        self.onnx = f"{name}_out"

    def pool(self) -> None:
        kind = [layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D][self.space - 1]
        self._add("GlobalAveragePool", "pool", {})
        self._add("Flatten", "row", {})
        self.keras = kind(name="pool")(self.keras)

    def flatten(self) -> tuple[int, ...]:
        shape = tuple(self.keras.shape[1:])
        self._add("Flatten", "row", {})
        self.keras = layers.Flatten(name="row")(self.keras)
        return shape

    def models(self) -> tuple[keras.Model, onnx.ModelProto]:
        model = keras.Model(self._inputs, self.keras)
        for name, values in self._values.items():
            model.get_layer(name).set_weights(values)
        given, made = (
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *sizes])
            for name, sizes in (("x", moved(self.samples).shape[1:]), (self.onnx, [None] * (len(self.keras.shape) - 1)))
        )
        graph = helper.make_graph(self._nodes, "g", [given], [made], self._constants)
        both = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(both, full_check=True)
        return model, both


def first(kernel: Array) -> Array:
    """(*K, I, O) as (O, I, *K)."""
    return kernel.transpose(-1, -2, *range(kernel.ndim - 2))


def moved(batch: Array) -> Array:
    """(N, *S, C) as (N, C, *S)."""
    return np.ascontiguousarray(np.moveaxis(batch, -1, 1))


def mobile() -> Twins:
    twins = Twins(9, 8, 3)
    twins.conv("stem", 6, 3, stride=2, use_bias=False)
    twins.norm("stem_norm")
    twins.relu("stem_relu", 6.0)
    skipped = twins.keras, twins.onnx
    twins.depthwise("depth", 3, use_bias=False)
    twins.norm("depth_norm")
    twins.relu("depth_relu", 6.0)
    twins.conv("project", 6, 1)
    twins.norm("project_norm")
    twins.add("add", skipped)
    twins.conv("wide", 8, 2, padding="valid")
    twins.relu("wide_relu")
    twins.depthwise("many", 3, multiplier=2)
    twins.pool()
    twins.dense("head", 5)
    return twins


def flattened() -> Twins:
    twins = Twins(7, 6, 4)
    twins.conv("a", 6, 3, groups=2)
    twins.norm("a_norm")
    twins.relu("a_relu")
    twins.transposed("b", 4, 3, stride=2)
    twins.relu("b_relu")
    twins.conv("c", 3, 3, stride=3, padding="valid")
    twins.relu("c_relu")
    shape = twins.flatten()
    twins.dense("d", 6, after=shape, use_bias=False)
    twins.relu("d_relu")
    twins.dense("e", 4)
    return twins


def signals() -> Twins:
    twins = Twins(14, 3)
    twins.conv("a", 5, 4, use_bias=False)
    twins.norm("a_norm")
    twins.relu("a_relu")
    twins.depthwise("b", 3, stride=2)
    twins.relu("b_relu", 2.0)
    twins.transposed("c", 4, 4, stride=2)
    twins.relu("c_relu")
    twins.conv("d", 4, 2, padding="valid")
    twins.pool()
    twins.dense("e", 3)
    return twins


NETWORKS: dict[str, Callable[[], Twins]] = {make.__name__: make for make in (mobile, flattened, signals)}
every_network = pytest.mark.parametrize("name", NETWORKS)

METHODS: list[dict[str, Any]] = [
    {"method": "mean"},
    {"method": "iterative"},
    {"method": "empirical"},
    {"method": "activation"},
    {"method": "analytical"},
    {"method": "hybrid"},
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *itertools.product(NETWORKS, METHODS),
    ("mobile", {"method": "empirical", "fold": True}),
    ("mobile", {"method": "activation", "strength": 0.5, "shrunk": True}),
    ("flattened", {"method": "empirical", "shrunk": True}),
    ("signals", {"method": "empirical", "strength": 0.5}),
]


def corrected(model: Any, data: Array, params: QuantParams, options: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* made the outputs worse|not folded: ", UserWarning)
        return correct(model, data, quant_params=params, **options)


def biases_of(network: Network) -> dict[str, Array]:
    return {layer.name: np.ravel(layer.bias) for layer in network.layers if layer.bias is not None}


def assert_same_biases(one: Network, other: Network) -> None:
    found, expected = biases_of(one), biases_of(other)
    assert found.keys() == expected.keys()
    for name, bias in expected.items():
        np.testing.assert_allclose(found[name], bias, rtol=0, atol=TOLERANCE * np.abs(bias).max(), err_msg=name)


@pytest.fixture(scope="module")
def twins() -> dict[str, tuple[keras.Model, onnx.ModelProto, Array]]:
    made = {name: make() for name, make in NETWORKS.items()}
    return {name: (*each.models(), each.samples) for name, each in made.items()}


@every_network
def test_outputs_are_the_same(twins: Any, name: str) -> None:
    model, other, x = twins[name]
    assert_close(run_keras(model, x), run_onnx(other, {"x": moved(x)})[0])


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_biases_are_the_same(twins: Any, name: str, options: dict[str, Any]) -> None:
    model, other, x = twins[name]
    case = CASES.index((name, options)) + list(NETWORKS).index(name)
    params = QuantParams("tf", weight_bits=4, per_channel=bool(case % 2), activation_bits=8 if case % 3 == 1 else None)
    found, expected = (corrected(each, data, params, options) for each, data in ((model, x), (other, moved(x))))
    assert_same_biases(found.network, expected.network)
    assert [(each.name, each.method, each.channels) for each in found.report] == [
        (each.name, each.method, each.channels) for each in expected.report
    ]


@pytest.mark.parametrize("options", [METHODS[0], METHODS[2], METHODS[5]], ids=lambda o: o["method"])
@every_network
def test_biases_are_the_same_after_equalization(twins: Any, name: str, options: dict[str, Any]) -> None:
    model, other, x = twins[name]
    case = METHODS.index(options) + list(NETWORKS).index(name)
    params = QuantParams("tf", weight_bits=4, per_channel=bool(case % 2), activation_bits=8 if case % 3 == 0 else None)
    given = {**options, "equalize": True}
    found, expected = (corrected(each, data, params, given) for each, data in ((model, x), (other, moved(x))))
    assert_same_biases(found.network, expected.network)
    assert [(each.name, each.method) for each in found.report] == [(each.name, each.method) for each in expected.report]


@pytest.mark.parametrize("has_data", [False, True], ids=["without_data", "with_data"])
@every_network
def test_equalization_is_the_same(twins: Any, name: str, has_data: bool) -> None:
    model, other, x = twins[name]
    found, expected = (equalize(each, data if has_data else None) for each, data in ((model, x), (other, moved(x))))
    assert_same_biases(found.network, expected.network)
    assert [(fold.layer, fold.batch_norm) for fold in found.folds] == [(f.layer, f.batch_norm) for f in expected.folds]
    names = [[[layer.name for layer in each.chain.layers] for each in result.chains] for result in (found, expected)]
    assert names[0] == names[1]
    assert names[0] or found.folds
    assert len(found.high_biases) == len(expected.high_biases)
    for one, another in zip(found.chains, expected.chains):
        for factors, wanted in zip(one.factors, another.factors):
            np.testing.assert_allclose(factors, wanted, rtol=1e-5)
    both = [
        corrected(each.model, data, QuantParams("tf", weight_bits=4), METHODS[0])
        for each, data in ((found, x), (expected, moved(x)))
    ]
    assert_same_biases(both[0].network, both[1].network)
