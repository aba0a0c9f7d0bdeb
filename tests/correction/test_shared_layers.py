"""Layers that a network calls several times: they have one bias, whose shift is pooled over the calls.

Expected shifts are found by networks that run anew for each stage, each call with a bias of its own, in plain numpy.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from biascorr import (
    BiasCorrection,
    BiasCorrectionParams,
    ConvBnInfoType,
    QuantParams,
    correct,
    equalize,
    find_all_convs_bn_with_activation,
)
from biascorr.correction.simulation import input_quantizations, simulated
from biascorr.graph.matching import match_layers
from biascorr.graph.network import ModelInput
from biascorr.sweep.sweep import Sweep
from networks import BITS, Array, biases, fake_quantized, ranges_in, samples, weights
from numpy_network import BiasedNetwork, Node, NumpyNetwork, call, node

METHODS = ("mean", "iterative", "empirical", "activation")

PARAMS = QuantParams("tf", weight_bits=BITS)

CLASSIC = BiasCorrectionParams(6, 12, 12, ["x"], ["y"])

pytestmark = pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")  # networks are random

Given = Sequence[Mapping[str, Array]]
Shifts = dict[str, Array]


# Networks


def conv(name: str, x: str, y: str, *shape: int, seed: int = 0, bias: bool = True, **given) -> Node:
    """Weights that keep values about as large as they were."""
    kernel = weights(*shape, axis=-1, seed=seed) / np.float32(max(1.0, np.sqrt(np.prod(shape[:-1]))))
    given |= {"bias": biases(shape[-1], seed=seed)} if bias else {}
    return node(name, "conv2d" if len(shape) == 4 else "dense", x, y, weights=kernel, **given)


def relu(x: str, y: str) -> Node:
    return node(f"relu_{x}", "clip", x, y, low=0.0, high=np.inf)


def norm(name: str, x: str, y: str, *beta: float, gamma: float = 0.0) -> Node:
    """Gives out beta, whatever it reads, where gamma is 0."""
    ones = np.ones(len(beta), np.float32)
    return node(name, "batch_norm", x, y, beta=np.float32(beta), gamma=gamma * ones, mean=0 * ones, variance=ones, epsilon=0.0)


PADS = ((1, 0), (0, 1))

SHARED = conv("c", "x", "a", 3, 3, 3, 4, padding=PADS)
HEAD = conv("d", "m", "e", 4, 5)
ROWS = conv("c", "r", "b", 5, 5, seed=1)
IMAGES = conv("c", "r", "b", 3, 3, 3, 3, padding=PADS, seed=1)
LAST = conv("d", "e", "f", 3, 3, 3, 4, padding=((1, 1), (1, 1)), seed=2)

NODES: dict[str, list[Node]] = {
    "towers": [  # of images of two sizes
        SHARED,
        relu("a", "r"),
        node("mean", "average", "r", "m", keepdims=False),
        HEAD,
        call("c:2", SHARED, "z", "a2"),
        relu("a2", "r2"),
        node("mean2", "average", "r2", "m2", keepdims=False),
        call("d:2", HEAD, "m2", "e2"),
        node("sum", "add", "e e2", "s"),
        relu("s", "t"),
        conv("last", "t", "y", 5, 4, seed=3),
    ],
    "rows": [  # a layer after itself, three times
        conv("first", "x", "a", 4, 5),
        relu("a", "r"),
        ROWS,
        relu("b", "r1"),
        call("c:2", ROWS, "r1", "b2"),
        relu("b2", "r2"),
        call("c:3", ROWS, "r2", "b3"),
        relu("b3", "r3"),
        conv("last", "r3", "y", 5, 4, seed=3),
    ],
    "images": [  # that get smaller; two layers take turns, with a third one in between
        conv("first", "x", "a", 1, 1, 3, 3),
        relu("a", "r"),
        IMAGES,
        relu("b", "e"),
        LAST,
        relu("f", "g"),
        conv("between", "g", "h", 1, 1, 4, 3),
        call("c:2", IMAGES, "h", "b2"),
        relu("b2", "e2"),
        call("d:2", LAST, "e2", "f2"),
        relu("f2", "y"),
    ],
}

STAGES = {
    "towers": [["c", "c:2"], ["d", "d:2"], ["last"]],
    "rows": [["first"], ["c"], ["c:2"], ["c:3"], ["last"]],
    "images": [["first"], ["c"], ["d"], ["between"], ["c:2"], ["d:2"]],
}
"""The calls that do not depend on each other."""

SHAPES = {"towers": {"x": (7, 6, 3), "z": (4, 5, 3)}, "rows": {"x": (3, 4)}, "images": {"x": (7, 6, 3)}}


def network_of(name: str) -> NumpyNetwork:
    return network_from(NODES[name], **SHAPES[name])


def network_from(nodes: Sequence[Node], outputs: Sequence[str] = ("y",), **shapes: tuple[int, ...]) -> NumpyNetwork:
    inputs = [ModelInput(name, np.dtype("float32"), (None, *shape)) for name, shape in shapes.items()]
    return NumpyNetwork(inputs, nodes, outputs)


def batches_for(name: str) -> Given:
    """Of two sizes: 12 samples."""
    return [
        {each: samples(count, *shape, seed=count) * np.float32(1 + (each == "z")) for each, shape in SHAPES[name].items()}
        for count in (7, 5)
    ]


def rounded(network: NumpyNetwork) -> NumpyNetwork:
    """With weights on the grids of PARAMS."""
    nodes = [
        each.with_given(weights=fake_quantized(each.given["weights"], None)) if "weights" in each.given else each
        for each in network.nodes
    ]
    return replace(network, nodes=nodes)


def separate(network: NumpyNetwork) -> NumpyNetwork:
    """With a layer for each call."""
    return replace(network, nodes=[replace(each, call_of=None) for each in network.nodes])


def biases_of(network: BiasedNetwork) -> Shifts:
    """Of each call."""
    return {layer.name: np.zeros(layer.channels) if layer.bias is None else layer.bias for layer in network.layers}


def changes(network: BiasedNetwork, corrected: BiasedNetwork) -> Shifts:
    after = biases_of(corrected)
    return {name: after[name] - bias for name, bias in biases_of(network).items()}


# The twin in plain numpy


def shifted(network: NumpyNetwork, shifts: Mapping[str, Array]) -> NumpyNetwork:
    """With a shift for each call."""
    before = biases_of(network)
    nodes = [
        each.with_given(bias=(before[each.name] + shifts[each.name]).astype(np.float32)) if each.name in shifts else each
        for each in network.nodes
    ]
    return replace(network, nodes=nodes)


def tensor(network: NumpyNetwork, data: Given, name: str) -> Array:
    """Of all samples."""
    return np.concatenate([network.part(feeds, [name])(feeds)[name].astype(np.float64) for feeds in data])


def mean(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1]).mean(axis=0)


def response(layer: Node, error: Array, x: Array) -> Array:
    """The mean output for other weights, without a bias."""
    alone = network_from([node("alone", layer.op, "x", "y", **{**layer.given, "weights": error, "bias": 0.0})], x=x.shape[1:])
    return mean(alone.part({"x": x}, ["y"])({"x": x})["y"].astype(np.float64))


class Twin:
    """Finds the shifts of a network and of what it is quantized to."""

    def __init__(self, network: NumpyNetwork, quantized: NumpyNetwork, data: Given, stages: Sequence[Sequence[str]]) -> None:
        self.network, self.quantized, self.data, self.stages = network, quantized, data, stages
        self.calls = {each.name: each for each in network.nodes if "weights" in each.given}

    def shifts(self, find: Callable[[Node, NumpyNetwork], Array]) -> Shifts:
        """Stage by stage."""
        stages_of = Counter(name for stage in self.stages for name in {self.calls[each].first_call for each in stage})
        known = self.swept(find, {}) if max(stages_of.values()) > 1 else {}
        return self.swept(find, {name: shift for name, shift in known.items() if stages_of[name] > 1})

    def swept(self, find: Callable[[Node, NumpyNetwork], Array], known: Shifts) -> Shifts:
        added: Shifts = {}
        found: dict[str, list[tuple[Array, int]]] = {}
        for stage in self.stages:
            before = shifted(self.quantized, added)
            for name in stage:
                each = self.calls[name]
                found.setdefault(each.first_call, []).append((find(each, before), self.positions(each)))
            for name in stage:
                layer = self.calls[name].first_call
                added[name] = known[layer] if layer in known else weighted(found[layer])
        return {layer: known[layer] if layer in known else weighted(pairs) for layer, pairs in found.items()}

    def positions(self, each: Node) -> int:
        array = tensor(self.network, self.data, each.output)
        return array.size // array.shape[-1]

    def error(self, each: Node) -> Array:
        quantized = next(other for other in self.quantized.nodes if other.name == each.name)
        return each.given["weights"].astype(np.float64) - quantized.given["weights"]

    def mean(self, each: Node, before: NumpyNetwork) -> Array:  # noqa: ARG002
        return response(each, self.error(each), tensor(self.quantized, self.data, each.inputs[0]))

    def iterative(self, each: Node, before: NumpyNetwork) -> Array:
        return response(each, self.error(each), tensor(before, self.data, each.inputs[0]))

    def empirical(self, each: Node, before: NumpyNetwork) -> Array:
        return mean(tensor(self.network, self.data, each.output)) - mean(tensor(before, self.data, each.output))

    def shrunk(self, each: Node, before: NumpyNetwork) -> Array:
        own, expected = (tensor(of, self.data, each.output) for of in (before, self.network))
        differences = (expected - own).reshape(len(own), -1, own.shape[-1]).mean(axis=1)
        square = np.square(differences.mean(axis=0))
        return differences.mean(axis=0) * square / (square + differences.var(axis=0))

    def activation(self, each: Node, before: NumpyNetwork) -> Array:
        if not any(other.op == "clip" and other.inputs == (each.output,) for other in self.network.nodes):
            return self.empirical(each, before)
        own, goal = tensor(before, self.data, each.output), mean(tensor(self.network, self.data, each.output).clip(0))
        shift, start = self.empirical(each, before), mean(own.clip(0))
        for _ in range(2):
            slope = (mean((own + shift).clip(0)) - start) / shift
            shift = np.where(slope > 0, (goal - start) / np.maximum(slope, 0.02), self.empirical(each, before))
        return shift


def weighted(pairs: Sequence[tuple[Array, int]]) -> Array:
    return sum(shift * positions for shift, positions in pairs) / sum(positions for _, positions in pairs)


def twin_of(name: str) -> Twin:
    return Twin(network_of(name), rounded(network_of(name)), batches_for(name), STAGES[name])


def assert_changed(network: NumpyNetwork, corrected: BiasedNetwork, expected: Shifts, tolerance: float = 2e-6) -> None:
    """All calls of each layer have one bias, which has changed so."""
    first = {each.name: each.first_call for each in network.nodes}
    for name, change in changes(network, corrected).items():
        np.testing.assert_allclose(change, expected[first[name]], rtol=1e-4, atol=tolerance, err_msg=name)
    bias = biases_of(corrected)
    for name, array in bias.items():
        np.testing.assert_array_equal(array, bias[first[name]])


# Correction


@pytest.mark.parametrize("is_given", [False, True], ids=["simulated", "given"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NODES)
def test_all_calls_have_the_pooled_shift(name, method, is_given):
    twin = twin_of(name)
    options = {"quantized": twin.quantized} if is_given else {"quant_params": PARAMS}
    found = correct(twin.network, twin.data, method=method, **options)
    expected = twin.shifts(getattr(twin, method))
    assert max(np.abs(shift).max() for shift in expected.values()) > 0.01
    assert_changed(twin.network, found.network, expected, tolerance=1e-5)


@pytest.mark.parametrize("name", NODES)
def test_parts_of_shifts_are_pooled(name):
    twin = twin_of(name)
    for options, find in {
        "half": ({"strength": 0.5}, lambda *args: 0.5 * twin.empirical(*args)),
        "shrunk": ({"shrunk": True}, twin.shrunk),
    }.values():
        found = correct(twin.network, twin.data, method="empirical", quant_params=PARAMS, **options)
        assert_changed(twin.network, found.network, twin.shifts(find), tolerance=1e-5)


def test_the_mean_error_over_all_calls_becomes_0():
    twin = twin_of("towers")
    found = correct(twin.network, twin.data, method="empirical", quantized=twin.quantized).network
    for first, second in (("a", "a2"), ("e", "e2")):
        errors = [
            mean(tensor(twin.network, twin.data, each)) - mean(tensor(found, twin.data, each)) for each in (first, second)
        ]
        positions = [tensor(found, twin.data, each)[..., 0].size for each in (first, second)]
        assert np.abs(errors).max() > 5e-4
        np.testing.assert_allclose(weighted([*zip(errors, positions)]), 0, atol=1e-6)
    assert positions[0] == positions[1]


@pytest.mark.parametrize("options", [{"threads": 3}, {"memory_budget": 1}], ids=str)
@pytest.mark.parametrize("name", NODES)
def test_threads_and_memory_change_nothing(name, options):
    found, expected = (
        correct(network_of(name), batches_for(name), quant_params=PARAMS, **each) for each in (options, {"threads": 1})
    )
    assert found.report == expected.report
    assert found.scores == expected.scores


@pytest.mark.parametrize("method", [*METHODS, "hybrid", "auto"])
@pytest.mark.parametrize("name", NODES)
def test_a_report_has_one_row_for_each_layer(name, method):
    network = network_of(name)
    found = correct(network, batches_for(name), method=method, quant_params=PARAMS)
    names = [each.name for each in network.nodes if "weights" in each.given and each.call_of is None]
    assert [row.name for row in found.report] == names
    moved = changes(network, found.network)
    for row in found.report:
        assert row.shift_before == pytest.approx(np.abs(moved[row.name]).mean(), rel=1e-3) or method == "auto"


def test_shifts_are_as_they_are_rounded():
    """An adapter is asked for the first call only, and is given the same shift for all."""

    class Coarse(BiasedNetwork):
        def bias_change(self, layer, shift):
            assert layer.call_of is None
            return replace(super().bias_change(layer, shift), applied=np.round(shift * 8) / 8)

        def with_shifts(self, shifts):
            assert [*shifts] == network_calls(self)
            assert len({shifts[each].tobytes() for each in ("c", "c:2", "c:3")}) == 1
            return super().with_shifts(shifts)

    twin = twin_of("rows")
    quantized = Coarse(twin.quantized.inputs, twin.quantized.nodes, twin.quantized.outputs)
    found = correct(twin.network, twin.data, method="empirical", quantized=quantized)
    assert [row.name for row in found.report] == ["first", "c", "last"]
    for row in found.report:
        assert 0 < row.shift_after <= 1 / 16


def test_a_bias_that_cannot_change_stays_for_all_calls():
    class Fixed(BiasedNetwork):
        def bias_change(self, layer, shift):
            change = super().bias_change(layer, shift)
            return replace(change, applied=None) if layer.name == "c" else change

    twin = twin_of("rows")
    quantized = Fixed(twin.quantized.inputs, twin.quantized.nodes, twin.quantized.outputs)
    found = correct(twin.network, twin.data, method="empirical", quantized=quantized)
    assert [row.name for row in found.report if row.method is None] == ["c"]
    moved = changes(twin.network, found.network)
    assert not any(np.any(moved[each]) for each in ("c", "c:2", "c:3"))
    assert np.any(moved["last"])


@pytest.mark.parametrize("method", [*METHODS, "hybrid"])
def test_layers_without_a_bias_are_skipped_with_all_calls(method):
    network = network_of("rows")
    nodes = [
        replace(each, given={key: value for key, value in each.given.items() if key != "bias"})
        if each.first_call == "c"
        else each
        for each in network.nodes
    ]
    network = replace(network, nodes=nodes)
    for new_biases in ("add", "skip"):
        found = correct(network, batches_for("rows"), method=method, quant_params=PARAMS, new_biases=new_biases)
        (row,) = (row for row in found.report if row.name == "c")
        assert row.reason == (
            "it had no bias; one was added" if new_biases == "add" else "it has no bias, and none was to be added"
        )
        given = [each.given.get("bias") for each in found.network.nodes if each.first_call == "c"]
        assert [bias is None for bias in given] == [new_biases == "skip"] * 3
        assert new_biases == "skip" or len({bias.tobytes() for bias in given}) == 1


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinite_means_leave_all_calls_as_they_are():
    shared = conv("c", "x", "a", 4, 4)
    loud = conv("loud", "a", "b", 4, 4).with_given(weights=weights(4, 4) * np.float32(2e37))
    again = conv("again", "b", "b2", 4, 4).with_given(weights=weights(4, 4) * np.float32(64))
    network = network_from([shared, loud, again, call("c:2", shared, "b2", "y")], x=(3, 4))
    for method in METHODS:
        found = correct(network, batches_for("rows"), method=method, quant_params=PARAMS)
        assert [row.name for row in found.report] == ["c", "loud", "again"]
        assert found.report[0].reason == "its mean values are not finite"
        assert not any(np.any(changes(network, found.network)[each]) for each in ("c", "c:2"))


@pytest.mark.parametrize("empty", ["x", "z"])
@pytest.mark.parametrize("method", METHODS)
def test_calls_without_values_do_not_count(method, empty):
    shared = conv("c", "x", "a", 4, 5)
    network = network_from([shared, call("c:2", shared, "z", "a2")], ("a", "a2"), x=(None, 4), z=(None, 4))
    data = [{each: samples(6, 0 if each == empty else 3, 4, seed=seed) for each in ("x", "z")} for seed in range(2)]
    found, alone = (correct(each, data, method=method, quant_params=PARAMS) for each in (network, separate(network)))
    (row,) = found.report
    assert row.shift_before == max(each.shift_before or 0 for each in alone.report) > 0
    for change in changes(network, found.network).values():
        np.testing.assert_array_equal(change, sum(changes(network, alone.network).values()))


# The cost


def count_stages(monkeypatch, network: NumpyNetwork, data: Given, **options) -> int:
    """Stages that are measured to find shifts."""
    measured = []

    def measure(sweep, stage):
        measured.append(stage)
        return original(sweep, stage)

    original = Sweep.measure
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "measure", measure)
        correct(network, data, quant_params=PARAMS, **options)
    return len(measured)


@pytest.mark.parametrize("method", [*METHODS, "hybrid", "auto"])
@pytest.mark.parametrize("name", NODES)
def test_only_calls_in_several_stages_take_a_sweep_more(monkeypatch, name, method):
    network, data = network_of(name), batches_for(name)
    stages = count_stages(monkeypatch, network, data, method=method)
    sweeps = {"mean": 0, "auto": 4 + 1}.get(method, 1) if name != "towers" else 0
    assert stages - count_stages(monkeypatch, separate(network), data, method=method) == sweeps * len(STAGES[name])


def test_the_steps_of_both_sweeps_are_reported():
    steps = []
    correct(
        network_of("rows"),
        batches_for("rows"),
        method="iterative",
        quant_params=PARAMS,
        progress=lambda step, done, total: steps.append((step, done, total)),
    )
    labels = [label for label, _, _ in steps if label.startswith("iterative")]
    swept = [label for label, count in Counter(labels).items() if count > 5]
    assert swept == ["iterative", "iterative, layers called again"]
    shares = [done for _, done, total in steps if total is not None]
    assert shares == sorted(shares)


# Batch normalizations


def normed(*, gamma: float = 0.0, other: tuple[float, ...] = (1.0, -2.0, 0.5), outside: bool = False) -> NumpyNetwork:
    """Calls after batch normalizations, of images of two sizes; `outside`: with one more call of an input."""
    shared = conv("c", "r", "a", 3, 3, 3, 4, padding=PADS)
    nodes = [
        norm("n", "x", "b", 1.0, -2.0, 0.5, gamma=gamma),
        relu("b", "r"),
        shared,
        norm("n:2", "z", "b2", *other, gamma=gamma),
        relu("b2", "r2"),
        call("c:2", shared, "r2", "a2"),
        node("mean", "average", "a", "m", keepdims=False),
        node("mean2", "average", "a2", "m2", keepdims=False),
        node("sum", "add", "m m2", "s"),
        conv("last", "s", "y", 4, 4),
    ]
    nodes += [call("c:3", shared, "x", "a3")] if outside else []
    return network_from(nodes, ("y", "a3") if outside else ("y",), **SHAPES["towers"])


def analytical_shift(network: NumpyNetwork, *calls: str) -> Array:
    """Of constant inputs; each call weighs the same."""
    twin = Twin(network, rounded(network), batches_for("towers"), [])
    return np.mean([twin.mean(twin.calls[name], network) for name in calls], axis=0)


@pytest.mark.parametrize("outside", [False, True])
def test_analytical_shifts_are_pooled_over_the_calls_that_have_one(outside):
    network = normed(other=(0.25, 3.0, 1.0), outside=outside)
    expected = analytical_shift(network, "c", "c:2", *(["c:3"] if outside else []))
    found = correct(network, batches_for("towers"), method="analytical", quant_params=PARAMS)
    assert [(row.name, row.method) for row in found.report] == [("c", "analytical"), ("last", None)]
    assert_changed(network, found.network, {"c": expected, "last": np.zeros(4)})


@pytest.mark.parametrize("others", [["c", "c:2", "c:3"], ["c", "c:2"]])
def test_analytical_shifts_without_data_are_those_of_calls_after_batch_normalizations(others):
    network = normed(other=(0.25, 3.0, 1.0), outside=len(others) == 3)
    fixed = replace(network, inputs=[replace(each, shape=(1, *each.shape[1:])) for each in network.inputs])
    found = correct(fixed, method="analytical", quant_params=PARAMS)
    assert_changed(network, found.network, {"c": analytical_shift(network, "c", "c:2"), "last": np.zeros(4)})


def test_hybrid_is_analytical_where_all_calls_are():
    data = batches_for("towers")
    for outside in (False, True):
        network = normed(other=(0.25, 3.0, 1.0), outside=outside)
        found, empirical = (correct(network, data, method=each, quant_params=PARAMS) for each in ("hybrid", "empirical"))
        assert [(row.name, row.method) for row in found.report] == [
            ("c", "empirical" if outside else "analytical"),
            ("last", "empirical"),
        ]
        expected = changes(network, empirical.network)["c"] if outside else analytical_shift(network, "c", "c:2")
        np.testing.assert_allclose(changes(network, found.network)["c"], expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:not folded")  # the method is about what is not
def test_known_shifts_of_calls_in_several_stages_take_no_sweep_more(monkeypatch):
    shared = conv("c", "n", "a", 4, 4)
    beta = (1.0, -2.0, 0.5, 3.0)
    nodes = [norm("n", "x", "n", *beta), shared, norm("m", "a", "m", *beta), call("c:2", shared, "m", "y")]
    network, data = network_from(nodes, x=(3, 4)), batches_for("rows")
    counts = [count_stages(monkeypatch, each, data, method="hybrid") for each in (network, separate(network))]
    assert counts[0] == counts[1]
    assert count_stages(monkeypatch, network, data, method="empirical") == counts[0] + 2


def test_public_batch_normalizations_are_those_that_all_calls_have():
    same, others = find_all_convs_bn_with_activation(normed()), find_all_convs_bn_with_activation(normed(other=(1.0, 2.0, 3.0)))
    assert list(same) == ["c"]
    assert same["c"].input_bn.name == "n"
    assert same["c"].in_activation_type.name == "relu"
    assert others == {}
    assert find_all_convs_bn_with_activation(normed(outside=True)) == {}


# The classic interface


TOWERS = BiasCorrectionParams(6, 12, 12, ["x", "z"], ["y"])


@pytest.mark.parametrize("name", NODES)
def test_classic_correction(name):
    network, data = network_of(name), batches_for(name)
    params = replace(CLASSIC, input_op_names=list(SHAPES[name]), batch_size=6)
    found = BiasCorrection.correct_bias(network, params, PARAMS, data)
    assert_changed(network, found, changes(network, correct(network, data, method="empirical", quant_params=PARAMS).network))


@pytest.mark.parametrize(("other", "expected"), [((1.0, -2.0, 0.5), "hybrid"), ((1.0, 2.0, 3.0), "empirical")])
def test_classic_correction_by_batch_normalizations(other, expected):
    """Analytical where they are the same before all calls: what the public dictionary has, given or found."""
    network, data = normed(other=other), batches_for("towers")
    known = find_all_convs_bn_with_activation(network)
    for infos in (None, known):
        found = BiasCorrection.correct_bias(network, TOWERS, PARAMS, data, infos, perform_only_empirical_bias_corr=False)
        assert_changed(network, found, changes(network, correct(network, data, method=expected, quant_params=PARAMS).network))


def test_classic_correction_of_one_layer():
    for name, layer in (("towers", "c"), ("rows", "c"), ("images", "d"), ("rows", "last")):
        twin = twin_of(name)
        params = replace(CLASSIC, input_op_names=list(SHAPES[name]))
        found = BiasCorrection.bias_correction_per_layer(
            twin.network, twin.network, params, layer, twin.data, quant_params=PARAMS
        )
        twin.stages = [
            calls for stage in STAGES[name] if (calls := [each for each in stage if twin.calls[each].first_call == layer])
        ]
        expected = dict.fromkeys(STAGES[name][0] + ["first", "between", "c", "d", "last"], 0.0) | twin.shifts(twin.empirical)
        assert_changed(twin.network, found, expected, tolerance=1e-5)


def test_classic_analytical_correction_of_one_layer():
    network = normed()
    info = find_all_convs_bn_with_activation(network)["c"]
    fixed = replace(network, inputs=[replace(each, shape=(1, *each.shape[1:])) for each in network.inputs])
    found = BiasCorrection.analytical_bias_correction_per_layer(fixed, "c", info, PARAMS)
    assert_changed(network, found, {"c": analytical_shift(network, "c", "c:2"), "last": np.zeros(4)})
    ignored = replace(PARAMS, ops_to_ignore=["c"])
    assert BiasCorrection.analytical_bias_correction_per_layer(fixed, "c", info, ignored) is fixed


def test_later_calls_are_no_layers():
    network, data = network_of("rows"), batches_for("rows")
    known = "is no layer; the layers are first, c, last$"
    info = ConvBnInfoType()
    with pytest.raises(ValueError, match=f"^reference_model: 'c:2' {known}"):
        BiasCorrection.bias_correction_per_layer(network, network, CLASSIC, "c:2", data)
    with pytest.raises(ValueError, match=f"^corrected_model: 'c:3' {known}"):
        BiasCorrection.analytical_bias_correction_per_layer(network, "c:3", info, PARAMS)
    with pytest.raises(ValueError, match=f"^conv_bn_dict: 'c:2' {known}"):
        BiasCorrection.correct_bias(network, CLASSIC, PARAMS, data, {"c:2": info})
    with pytest.raises(ValueError, match=f"^ops_to_ignore: 'c:2' {known}"):
        correct(network, data, quant_params=replace(PARAMS, ops_to_ignore=["c:2"]))
    shorter = replace(network, nodes=[each for each in network.nodes if each.name != "c:3"][:6], outputs=["r2"])
    with pytest.raises(ValueError, match="^layer c: called more often in corrected_model than in reference_model$"):
        BiasCorrection.bias_correction_per_layer(
            shorter, network, replace(CLASSIC, output_op_names=["y"]), "c", data, quant_params=PARAMS
        )


# Simulation


def test_weights_are_quantized_once():
    for mode in ("nearest", "stochastic"):
        quantized = simulated(network_of("rows"), replace(PARAMS, round_mode=mode))
        arrays = [each.given["weights"] for each in quantized.nodes if each.first_call == "c"]
        assert not np.array_equal(arrays[0], ROWS.given["weights"])
        for array in arrays:
            np.testing.assert_array_equal(array, arrays[0])


def test_a_layer_to_ignore_is_with_all_calls():
    network = network_of("rows")
    params = replace(PARAMS, ops_to_ignore=["c"], activation_bits=8)
    quantized = simulated(network, params, ranges_in(network, batches_for("rows")))
    assert [each.name for each in quantized.nodes if each.op == "fake_quantize"] == [
        "first_input_quantizer",
        "last_input_quantizer",
    ]
    for each in quantized.nodes:
        assert each.first_call != "c" or each.given["weights"] is ROWS.given["weights"]
    found = correct(network, batches_for("rows"), method="empirical", quant_params=params)
    assert {row.name: row.reason for row in found.report if row.method is None} == {"c": "weights are not quantized"}


@pytest.mark.parametrize("method", ["mean", "iterative", "empirical"])
@pytest.mark.parametrize("name", NODES)
def test_each_call_reads_a_grid_of_its_own(name, method):
    network, data = network_of(name), batches_for(name)
    params = replace(PARAMS, activation_bits=8)
    grids = input_quantizations(network.layers, ranges_in(network, data), 8)
    calls = [each.name for each in network.layers if each.first_call == "c"]
    assert len({grids[each].scale for each in calls}) == len(calls)
    twin = Twin(network, rounded(network).with_quantizers(grids), data, STAGES[name])
    twin.calls = {each.name: each for each in twin.quantized.nodes if each.name in twin.calls}  # reading what is on grids
    for each in network.nodes:
        if each.name in twin.calls:
            twin.calls[each.name] = twin.calls[each.name].with_given(weights=each.given["weights"])
    found = correct(network, data, method=method, quant_params=params)
    assert_changed(network, found.network, twin.shifts(getattr(twin, method)), tolerance=1e-4)


# Equalization


def test_equalization_leaves_them_with_one_reason_each():
    shared = conv("c", "r", "b", 3, 3, 3, 3, padding=PADS)
    nodes = [
        conv("first", "x", "a", 1, 1, 3, 3),
        relu("a", "r"),
        shared,
        norm("n", "b", "e", 1.0, 2.0, 3.0, gamma=1.0),
        call("c:2", shared, "e", "b2"),
        conv("second", "b2", "f", 1, 1, 3, 3),
        call("c:3", shared, "f", "b3"),
        norm("m", "b3", "z", 1.0, 2.0, 3.0, gamma=1.0),
        conv("middle", "b3", "g", 1, 1, 3, 4),
        relu("g", "h"),
        conv("last", "h", "y", 1, 1, 4, 2),
    ]
    network = network_from(nodes, ("y", "z"), x=(7, 6, 3))
    found = equalize(network)
    used = "its weights are used elsewhere too"
    assert found.left == {
        "first": f"followed by c: {used}",
        "c": used,
        "n": f"c: {used}",
        "second": f"followed by c: {used}",
        "m": "something else reads the output of c too",
        "last": "its output is an output of the model",
    }
    assert [[layer.name for layer in each.chain.layers] for each in found.chains] == [["middle", "last"]]


# Matching


def test_later_calls_match_later_calls():
    network = network_of("rows")
    matches = match_layers(network.layers, rounded(network).layers[::-1])
    assert {name: match.reference.name for name, match in matches.items()} == {each: each for each in network_calls(network)}


def test_calls_of_other_names_match_in_their_order():
    network = network_of("rows")
    names = {"c": "q", "c:2": "q:2", "c:3": "q:3"}
    nodes = [
        replace(each, name=names.get(each.name, each.name), call_of=names.get(each.call_of, each.call_of))
        for each in rounded(network).nodes
    ]
    renamed = replace(network, nodes=nodes)
    matches = match_layers(network.layers, renamed.layers)
    assert {match.reference.name: name for name, match in matches.items() if name in names.values()} == names
    data = batches_for("rows")
    found, expected = (correct(network, data, method="empirical", quantized=each) for each in (renamed, rounded(network)))
    np.testing.assert_array_equal(biases_of(found.network)["q:2"], biases_of(expected.network)["c:2"])
    assert [row.name for row in found.report] == ["first", "q", "last"]


def test_calls_may_have_been_layers_of_their_own():
    """Of the same weights: the float network had a copy for each."""
    twin = twin_of("rows")
    found = correct(separate(twin.network), twin.data, method="empirical", quantized=twin.quantized)
    assert_changed(twin.network, found.network, twin.shifts(twin.empirical), tolerance=1e-5)


def network_calls(network: NumpyNetwork) -> list[str]:
    return [layer.name for layer in network.layers]
