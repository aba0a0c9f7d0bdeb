"""Random graphs: equalization keeps their function, makes ranges even, and its statistics follow the tensors."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biascorr import equalize, fold_all_batch_norms
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.equalization.result import Equalization
from networks import Array, assert_same_function, magnitudes, run
from random_graphs import OPSETS, PROFILE, Builder, Draw

pytestmark = pytest.mark.filterwarnings("ignore:the float outputs moved:UserWarning")


class Growth(Builder):
    """A graph of more that equalization passes, and less that ends it."""

    def activation(self, name: str, shape: tuple[int, ...]) -> None:
        op = self.one_of("Relu", "Relu", "LeakyRelu", "PRelu", "Clip", "ReLU6", "Min", "Max", "Identity", "Sigmoid", "Pad")
        if op == "ReLU6" and self.opset < 11:
            self.add("Clip", [name], shape, min=0.0, max=6.0)
        elif op == "ReLU6":
            self.add("Clip", [name, *(self.constant(np.float32(bound)) for bound in (0, 6))], shape)
        elif op in ("Min", "Max"):
            size = self.one_of((), (1,), (shape[0], *[1] * (len(shape) - 1)), (1, shape[0], *[1] * (len(shape) - 1)))
            bound = self.constant(self.rng.normal(1 if op == "Min" else -1, 1, size))
            self.add(op, self.one_of([name, bound], [bound, name]), shape)
        elif op == "Identity":
            self.add(op, [name], shape)
        elif op == "Pad" and self.opset >= 11 and len(shape) > 1:
            pads = [0, 0, *[1] * (len(shape) - 1), 0, 0, *[0] * (len(shape) - 1)]
            self.add(op, [name, self.constant(np.int64(pads))], (shape[0], *(size + 1 for size in shape[1:])))
        else:
            self.forced(op, name, shape)

    def forced(self, op: str, name: str, shape: tuple[int, ...]) -> None:
        if op == "PRelu":
            slopes = self.rng.uniform(0, 1, (shape[0], *[1] * (len(shape) - 1)))
            self.add(op, [name, self.constant(slopes)], shape)
        elif op == "Clip" and self.opset < 11:
            self.add(op, [name], shape, min=0.0, max=1.5)
        elif op == "Clip":
            self.add(op, [name, *(self.constant(np.float32(bound)) for bound in (-0.5, 1.5))], shape)
        else:
            self.add("Relu" if op == "Pad" else op, [name], shape)

    def normalization(self, name: str, shape: tuple[int, ...]) -> None:
        """Sometimes far above 0."""
        parameters = [self.rng.uniform(0.3, 1, shape[0]), self.rng.normal(self.one_of(0, 5), 2, shape[0])]
        parameters += [self.rng.normal(0, 1, shape[0]), self.rng.uniform(0.5, 2, shape[0])]
        self.add("BatchNormalization", [name, *map(self.constant, parameters)], shape)

    def block(self, name: str, shape: tuple[int, ...]) -> None:
        """A layer, mostly with a normalization, and an activation."""
        if len(shape) == 1:
            self.one_of(self.gemm, self.matmul)(name, shape)
        else:
            self.one_of(self.conv, self.conv, self.conv, self.conv_transpose)(name, shape)
        for step in (self.normalization, self.activation):
            if self.one_of(True, True, False):
                step(*list(self.shapes.items())[-1])

    def grow(self) -> None:
        name, shape = list(self.shapes.items())[-1]
        if self.one_of(True, True, False):
            self.block(name, shape)
        elif len(shape) > 1:
            self.one_of(self.flatten, self.flatten, self.pool, self.join, self.matmul)(name, shape)
        else:
            super().grow()


class Example:
    def __init__(self, model: onnx.ModelProto, batch: Array) -> None:
        self.model, self.batch = model, batch

    def __repr__(self) -> str:
        return f"opset {self.model.opset_import[0].version}: {onnx.printer.to_text(self.model.graph)}"


@st.composite
def examples(draw: Draw) -> Example:
    opset = draw(st.sampled_from(OPSETS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(6,), (4, 7), (3, 7, 6), (4, 6, 6), (2, 4, 3, 5)]))
    builder = Growth(draw, opset, rng, {"x": shape}, False)
    for _ in range(draw(st.integers(2, 6))):
        builder.block(*list(builder.shapes.items())[-1]) if builder.one_of(True, False) else builder.grow()
    names = list(builder.shapes)
    outputs = sorted({names[-1], *draw(st.lists(st.sampled_from(names[1:]), max_size=1))})
    model = builder.model(outputs)
    for tensor in model.graph.initializer:  # channels of other ranges
        array = onnx.numpy_helper.to_array(tensor)
        if array.ndim > 1 and array.dtype == np.float32 and draw(st.booleans()):
            factors = 4.0 ** rng.integers(-2, 3, array.shape[0]).reshape(-1, *[1] * (array.ndim - 1))
            tensor.CopyFrom(onnx.numpy_helper.from_array((array * factors).astype(np.float32), tensor.name))
    return Example(model, rng.normal(0.5, 1, (64, *shape)).astype(np.float32))


def scaled_only(result: Equalization) -> None:
    """Ranges in front of and behind each channel of each chain are the same."""
    layers = {layer.name: layer for layer in result.network.layers}
    for chain in result.chains:
        first, *others = (layers[layer.name] for layer in chain.chain.layers)
        ranges = [magnitudes(first)[0], *(magnitudes(layer)[1] for layer in others)]
        even = np.stack([each.reshape(first.channels, -1).max(axis=1) for each in ranges])
        even = even[:, (even > 0).all(axis=0)]
        np.testing.assert_allclose(even, np.broadcast_to(even[0], even.shape), rtol=1e-5)


def check(example: Example) -> None:
    model, x = example.model, {"x": example.batch}
    folded = fold_all_batch_norms(model)[0]
    assert_same_function(model, folded, x, tolerance=1e-4)
    result = equalize(model, x)
    onnx.checker.check_model(result.model, full_check=True)
    for before, after in zip(run(model, x), run(result.model, x), strict=True):
        assert np.abs(before - after).max() <= 1e-4 * np.abs(before).max()
    assert result.change is None or result.change.relative <= 1e-4
    scaled_only(result)
    check_account(example, result)
    check_statistics(folded, result, x)
    check_again(result)
    assert equalize(onnx.ModelProto.FromString(model.SerializeToString())).model == equalize(model).model


def check_again(result: Equalization) -> None:
    """A second time, nothing more is to be done, unless a clip is worth its bounds only now."""
    if not any("need a bound" in reason for reason in result.left.values()):
        for chain in equalize(result.model).chains:
            for factors in chain.factors:
                np.testing.assert_allclose(factors, 1, rtol=1e-4)


def check_account(example: Example, result: Equalization) -> None:
    """Each layer and normalization is scaled, folded, or left for a reason."""
    layers = {layer.name for layer in OnnxNetwork.load(example.model, "model").layers}
    norms = {node.name for node in example.model.graph.node if node.op_type == "BatchNormalization"}
    scaled = {link.first.name for chain in result.chains for link in chain.chain.links}
    assert layers == scaled | (result.left.keys() & layers)
    assert norms == {fold.batch_norm for fold in result.folds} | (result.left.keys() & norms)
    assert not norms & {fold.batch_norm for fold in result.folds} & result.left.keys()
    assert all(result.left.values())


def check_statistics(folded: onnx.ModelProto, result: Equalization, x: dict[str, Any]) -> None:
    """What is known of a tensor moved as its mean and standard deviation over samples did."""
    before = OnnxNetwork.load(folded, "model")
    known, now = before.facts().statistics, result.network.facts().statistics
    same = [name for name in known if name in now and name != "x" and result_has(result, name)]
    for name, first, second in zip(same, run(folded, x, same), run(result.model, x, same)) if same else ():
        mean, deviation, mean_now, deviation_now = (
            function(array.astype(np.float64), axis=axes(array)) for array in (first, second) for function in (np.mean, np.std)
        )
        scale = now[name].gamma / known[name].gamma
        np.testing.assert_allclose(deviation_now, scale * deviation, rtol=1e-3, atol=1e-4 * deviation_now.max(initial=1e-3))
        moved, expected = mean_now - scale * mean, now[name].beta - scale * known[name].beta
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-4 * np.abs(second).max(initial=1e-3))


def result_has(result: Equalization, name: str) -> bool:
    return any(name in node.output for node in result.model.graph.node)


def axes(array: Array) -> tuple[int, ...]:
    return (0, *range(2, array.ndim))


def random_graphs(count: int) -> Any:
    """A decorator that gives a test so many examples."""
    return lambda test: given(examples())(settings(PROFILE, max_examples=count)(test))


@random_graphs(15)
def test_random_graphs(example: Example) -> None:
    check(example)


@pytest.mark.slow
@random_graphs(120)
def test_many_random_graphs(example: Example) -> None:
    check(example)
