"""Simulated quantization of ONNX models: every kind of layer, wherever its weights and its bias are kept."""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from biascorr import correct
from biascorr.adapters.onnx.network import OnnxNetwork
from networks import (
    BITS,
    as_constant_nodes,
    biases,
    channel_mean,
    constants_of,
    fake_quantized,
    mean_corrected,
    model_from_text,
    output_shift,
    run,
    samples,
    stripped,
    two_layers,
    weights,
    with_constants,
)


@dataclass(frozen=True)
class Case:
    """A network of one layer: reads `x`, has the constants `w` and, unless None, `b`, makes `y`.

    `w_axis` and `y_axis` hold the output channels; the first axis of `w` counts `groups` where it does not hold them. `bias`
    says what a correction does: changes `b`, reads a new constant in place of `b`, or adds a bias.
    """

    name: str
    body: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    b: tuple[int, ...] | None
    w_axis: int = 0
    y_axis: int = 1
    bias: str = "changed"
    groups: int = 1

    def model(self, **options):
        axes = ", ".join("?" * len(self.x))
        constants = {"w": weights(*self.w, axis=self.w_axis)} | ({} if self.b is None else {"b": biases(*self.b)})
        used = {name: array for name, array in constants.items() if name not in options}
        return model_from_text(f"g (float[{axes}] x) => (float[{axes}] y) {{ {self.body} }}", **used, **options)

    def samples(self):
        return samples(*self.x)

    def quantized(self, model, per_channel, bits=BITS):
        """The model with fake-quantized weights and its own biases."""
        array = weights(*self.w, axis=self.w_axis)
        if not per_channel:
            return with_constants(model, w=fake_quantized(array, None, bits))
        groups = [fake_quantized(group, self.w_axis, bits) for group in np.split(array, self.groups)]
        return with_constants(model, w=np.concatenate(groups))

    def mean_output(self, model):
        return channel_mean(run(model, {"x": self.samples()})[0], self.y_axis)


IMAGES, KERNEL = (6, 3, 9, 8), (5, 3, 3, 3)
ROWS = (12, 7)


def conv(name, attributes, x=IMAGES, w=KERNEL, b=True):
    body = f"[layer] y = Conv{attributes}(x, w{', b' if b else ''})"
    return Case(name, body, x, w, (w[0],) if b else None, bias="changed" if b else "added")


def transposed(name, attributes, x=(6, 3, 5, 4), w=(3, 5, 3, 3), groups=1, b=True):
    body = f"[layer] y = ConvTranspose{attributes}(x, w{', b' if b else ''})"
    return Case(name, body, x, w, (w[1] * groups,) if b else None, w_axis=1, bias="changed" if b else "added", groups=groups)


def biased_conv(name, body, b, bias="changed"):
    return Case(name, body, IMAGES, KERNEL, b, bias=bias)


def gemm(name, attributes, b, *, x=ROWS, w=(7, 5)):
    inputs = "x, w" if b is None else "x, w, b"
    kept = "added" if b is None else "changed"
    return Case(name, f"[layer] y = Gemm{attributes}({inputs})", x, w, b, w_axis=0 if "transB" in attributes else 1, bias=kept)


def matmul(name, body, b, *, x=ROWS, w=(7, 5), w_axis=1, y_axis=-1, bias="changed"):
    return Case(name, body, x, w, b, w_axis, y_axis, bias)


CASES = [
    conv("conv of signals", "", (6, 3, 12), (5, 3, 4)),
    conv("conv of images", ""),
    conv("conv of volumes", "<pads=[1,0,1,0,1,2]>", (4, 2, 5, 6, 4), (3, 2, 2, 3, 2)),
    conv("1x1 conv", "", w=(5, 3, 1, 1)),
    conv("pads", "<pads=[1,1,1,1]>"),
    conv("asymmetric pads", "<pads=[0,2,1,3]>"),
    conv("pads wider than the kernel", "<pads=[4,5,4,3]>"),
    conv("strides", "<strides=[2,3]>"),
    conv("strides that leave the end of the input unread", "<strides=[4,5], pads=[1,1,0,0]>"),
    conv("dilations", "<dilations=[2,3]>"),
    conv("pads, strides, dilations", "<pads=[2,1,0,3], strides=[2,1], dilations=[1,2]>"),
    conv("signals with pads, strides, dilations", "<pads=[3,1], strides=[2], dilations=[2]>", (6, 3, 12), (5, 3, 4)),
    conv("auto_pad SAME_UPPER", '<auto_pad="SAME_UPPER", strides=[2,2]>'),
    conv("auto_pad SAME_LOWER", '<auto_pad="SAME_LOWER", strides=[2,2]>'),
    conv("auto_pad SAME_UPPER, even kernel", '<auto_pad="SAME_UPPER">', w=(5, 3, 2, 4)),
    conv("auto_pad SAME_LOWER, even kernel", '<auto_pad="SAME_LOWER">', w=(5, 3, 2, 4)),
    conv("auto_pad SAME_LOWER of volumes", '<auto_pad="SAME_LOWER", strides=[2,1,3]>', (3, 2, 5, 6, 4), (3, 2, 2, 3, 2)),
    conv("auto_pad VALID", '<auto_pad="VALID", strides=[2,1]>'),
    conv("groups", "<group=3, pads=[1,1,1,1]>", (6, 6, 9, 8), (9, 2, 3, 3)),
    conv("depthwise", "<group=4, pads=[1,1,1,1]>", (6, 4, 9, 8), (4, 1, 3, 3)),
    conv("depthwise with a multiplier", "<group=3, pads=[1,1,1,1]>", w=(6, 1, 3, 3)),
    conv("depthwise of signals", "<group=3, pads=[2,0]>", (6, 3, 12), (6, 1, 3)),
    conv("one input channel", "<pads=[1,1,1,1]>", (6, 1, 9, 8), (5, 1, 3, 3)),
    conv("one output channel", "<pads=[1,1,1,1]>", w=(1, 3, 3, 3)),
    conv("conv without a bias", "<pads=[1,1,1,1]>", b=False),
    conv("grouped conv without a bias", "<group=3>", w=(6, 1, 3, 3), b=False),
    transposed("transposed conv", ""),
    transposed("transposed conv of signals", "<strides=[2], pads=[1,0]>", (6, 3, 7), (3, 5, 4)),
    transposed("transposed conv of volumes", "<strides=[2,1,3], pads=[1,0,1,0,1,2]>", (4, 2, 3, 4, 3), (2, 3, 2, 3, 4)),
    transposed("transposed conv, stride of the kernel", "<strides=[2,2]>", w=(3, 5, 2, 2)),
    transposed("transposed conv, stride beyond the kernel", "<strides=[4,3], pads=[0,1,2,0]>", w=(3, 5, 2, 1)),
    transposed("transposed conv, pads", "<pads=[2,1,0,3], strides=[2,1], dilations=[1,2]>"),
    transposed("transposed conv, dilations", "<dilations=[2,3], strides=[3,2], pads=[1,2,3,4]>"),
    transposed("transposed conv, all but one output cut off", "<pads=[3,2,3,3]>"),
    transposed("transposed conv, output_padding", "<strides=[2,3], pads=[1,1,1,1], output_padding=[1,2]>"),
    transposed("transposed conv, output_shape", "<strides=[2,2], output_shape=[10,8]>", w=(3, 5, 3, 4)),
    transposed("transposed conv, odd cut", "<strides=[2,2], output_shape=[8,6]>"),
    transposed("transposed conv, odd cut after", '<strides=[2,2], output_shape=[8,6], auto_pad="SAME_UPPER">'),
    transposed("transposed conv, odd cut before", '<strides=[2,2], output_shape=[8,6], auto_pad="SAME_LOWER">'),
    transposed("transposed conv, auto_pad SAME_UPPER", '<strides=[2,2], auto_pad="SAME_UPPER">'),
    transposed("transposed conv, auto_pad SAME_LOWER", '<strides=[2,2], auto_pad="SAME_LOWER">'),
    transposed("transposed conv, SAME with gaps", '<strides=[3,2], auto_pad="SAME_UPPER">', w=(3, 5, 1, 4)),
    transposed("transposed conv, auto_pad VALID", '<strides=[2,1], auto_pad="VALID", output_padding=[1,0]>'),
    transposed("transposed conv, groups", "<group=3, strides=[2,2], pads=[1,1,1,1]>", (6, 6, 5, 4), (6, 2, 3, 3), 3),
    transposed("transposed depthwise conv", "<group=4, strides=[2,2]>", (6, 4, 5, 4), (4, 1, 3, 3), 4),
    transposed("transposed depthwise conv, multiplier", "<group=3, pads=[1,0,0,1]>", w=(3, 2, 3, 3), groups=3),
    transposed("transposed conv without a bias", "<strides=[2,2]>", b=False),
    Case("transposed conv, bias in an Add", "[layer] t = ConvTranspose<strides=[2,2]>(x, w) y = Add(t, b)",
         (6, 3, 5, 4), (3, 5, 3, 3), (5, 1, 1), 1),
    biased_conv("bias in an Add", "[layer] t = Conv(x, w) y = Add(t, b)", (1, 5, 1, 1)),
    biased_conv("bias in an Add, without the batch axis", "[layer] t = Conv<pads=[1,1,1,1]>(x, w) y = Add(t, b)", (5, 1, 1)),
    biased_conv("bias first in an Add", "[layer] t = Conv(x, w) y = Add(b, t)", (1, 5, 1, 1)),
    biased_conv("scalar in an Add", "[layer] t = Conv(x, w) y = Add(t, b)", ()),
    biased_conv("bias per position in an Add", "[layer] t = Conv(x, w) y = Add(t, b)", (5, 7, 6)),
    biased_conv("bias per column in an Add", "[layer] t = Conv(x, w) y = Add(t, b)", (6,)),
    biased_conv("bias and an Add", "[layer] t = Conv(x, w, b) y = Add(t, t)", (5,)),
    biased_conv("bias behind Identity", "i = Identity(b) [layer] y = Conv(x, w, i)", (5,)),
    biased_conv("bias behind Reshape", "s = Constant<value_ints=[-1]>() i = Reshape(b, s) [layer] y = Conv(x, w, i)", (1, 5)),
    biased_conv("bias behind Cast", "i = Cast<to=1>(b) [layer] y = Conv(x, w, i)", (5,)),
    biased_conv(
        "bias behind Identity that others read",
        "i = Identity(b) [layer] t = Conv(x, w, i) s = Sub(i, i) z = ReduceSum<keepdims=0>(s) y = Add(t, z)",
        (5,),
        "replaced",
    ),
    biased_conv(
        "bias behind Reshape in an Add",
        "s = Constant<value_ints=[1,5,1,1]>() i = Reshape(b, s) [layer] t = Conv(x, w) y = Add(t, i)",
        (5,),
    ),
    biased_conv(
        "bias unsqueezed for an Add",
        "a = Constant<value_ints=[1,2]>() i = Unsqueeze(b, a) [layer] t = Conv(x, w) y = Add(i, t)",
        (5,),
    ),
    biased_conv(
        "scalar behind Reshape in an Add",
        "s = Constant<value_ints=[1,1,1]>() i = Reshape(b, s) [layer] t = Conv(x, w) y = Add(t, i)",
        (),
        "replaced",
    ),
    biased_conv("output read twice", "[layer] t = Conv(x, w) p = Add(t, b) y = Add(p, t)", (1, 5, 1, 1), "added"),
    biased_conv("weights behind Identity", "i = Identity(w) [layer] y = Conv(x, i, b)", (5,)),
    Case("weights behind Transpose", "i = Transpose<perm=[3,2,0,1]>(w) [layer] y = Conv(x, i, b)",
         IMAGES, (3, 3, 3, 5), (5,), 3),
    gemm("gemm", "", (5,)),
    gemm("gemm, transB", "<transB=1>", (5,), w=(5, 7)),
    gemm("gemm, transA", "<transA=1>", (5,), x=(7, 12)),
    gemm("gemm, transA, transB, alpha, beta", "<transA=1, transB=1, alpha=0.5, beta=0.25>", (5,), x=(7, 12), w=(5, 7)),
    gemm("gemm, negative alpha and beta", "<alpha=-2.0, beta=-0.5>", (5,)),
    gemm("gemm without C", "<alpha=0.5>", None),
    gemm("gemm without C, with beta", "<beta=4.0>", None),
    gemm("gemm, C of ()", "<beta=0.5>", ()),
    gemm("gemm, C of (1,)", "", (1,)),
    gemm("gemm, C of (1, 1)", "", (1, 1)),
    gemm("gemm, C of (1, N)", "<beta=2.0>", (1, 5)),
    gemm("gemm, C of (M, 1)", "", (12, 1)),
    gemm("gemm, C of (M, N)", "", (12, 5)),
    gemm("gemm, one output", "", (1,), w=(7, 1)),
    matmul("matmul", "[layer] t = MatMul(x, w) y = Add(t, b)", (5,)),
    matmul("matmul, bias first", "[layer] t = MatMul(x, w) y = Add(b, t)", (5,)),
    matmul("matmul, bias of (1, N)", "[layer] t = MatMul(x, w) y = Add(t, b)", (1, 5)),
    matmul("matmul, scalar bias", "[layer] t = MatMul(x, w) y = Add(t, b)", ()),
    matmul("matmul without a bias", "[layer] y = MatMul(x, w)", None, bias="added"),
    matmul("matmul of sequences", "[layer] t = MatMul(x, w) y = Add(t, b)", (5,), x=(6, 4, 7)),
    matmul("matmul of sequences, bias per position", "[layer] t = MatMul(x, w) y = Add(t, b)", (4, 1), x=(6, 4, 7)),
    matmul("matmul of images", "[layer] y = MatMul(x, w)", None, x=(3, 2, 4, 7), bias="added"),
    matmul("matmul by (1, K, N)", "[layer] y = MatMul(x, w)", None, x=(6, 4, 7), w=(1, 7, 5), w_axis=2, bias="added"),
    Case("constant on the left", "[layer] t = MatMul(w, x) y = Add(t, b)", (6, 7, 4), (5, 7), (5, 1)),
    Case("constant on the left, no bias", "[layer] y = MatMul(w, x)", (6, 7, 4), (5, 7), None, bias="added"),
    matmul("weights behind a transposition", "i = Transpose(w) [layer] t = MatMul(x, i) y = Add(t, b)", (5,), w=(5, 7),
           w_axis=0),
]  # fmt: skip
IDS = [case.name.replace(" ", "_") for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


@functools.cache
def correction_of(case, per_channel=False):
    return mean_corrected(case.model(), [case.samples()], per_channel=per_channel)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@every_case
def test_mean_output_is_that_of_the_float_layer(case, per_channel):
    model = case.model()
    correction = correction_of(case, per_channel)
    expected = case.mean_output(model)
    assert np.abs(case.mean_output(case.quantized(model, per_channel)) - expected).max() > 0.001
    np.testing.assert_allclose(case.mean_output(case.quantized(correction.model, per_channel)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("case", [CASES[4], CASES[IDS.index("gemm")]], ids=["conv", "gemm"])
def test_any_number_of_bits(case, bits):
    model = case.model()
    correction = mean_corrected(model, [case.samples()], weight_bits=bits)
    found = case.mean_output(case.quantized(correction.model, False, bits))
    np.testing.assert_allclose(found, case.mean_output(model), rtol=1e-6, atol=1e-6)


@every_case
def test_result_is_valid_and_its_outputs_keep_names_and_shapes(case):
    model = case.model()
    corrected = copy.deepcopy(correction_of(case).model)
    onnx.checker.check_model(corrected, full_check=True)
    assert corrected.graph.output == model.graph.output
    assert corrected.graph.input == model.graph.input
    before, after = (run(each, {"x": case.samples()})[0] for each in (model, corrected))
    assert after.shape == before.shape
    assert after.dtype == before.dtype


@every_case
def test_shifts_move_the_output_of_the_layer_along_its_axis(case):
    network, feeds = OnnxNetwork.load(case.model(), "model"), {"x": case.samples()}
    (layer,) = network.layers
    before = network.part(feeds, [layer.output])(feeds)[layer.output]
    shift = np.arange(1, layer.channels + 1) / 4
    changes = []
    for part in (0.25 * shift, 0.75 * shift):
        changes.append(network.bias_change(layer, part))
        network = network.with_shifts({layer.name: part})
        (layer,) = network.layers
    after = network.part(feeds, [layer.output])(feeds)[layer.output]
    assert layer.output_axis < 0
    aligned = shift.reshape(-1, *[1] * (-layer.output_axis - 1))
    np.testing.assert_allclose(after - before, np.broadcast_to(aligned, before.shape), rtol=0, atol=1e-5)
    np.testing.assert_allclose(sum(change.applied for change in changes), shift, rtol=1e-6)


@every_case
def test_report_of_one_layer(case):
    correction = correction_of(case)
    (layer,) = correction.report
    assert (layer.name, layer.op, layer.method) == ("layer", layer.op, "mean")
    assert layer.op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    assert layer.channels == run(case.model(), {"x": case.samples()})[0].shape[case.y_axis]
    assert 0 <= layer.shift_after < 1e-5 * layer.shift_before
    assert layer.reason == ("it had no bias; one was added" if case.bias == "added" else "")
    count = case.samples().shape["transA" in case.name]  # a transposed input has its samples along the second axis
    apart = "C of (M" not in case.name  # where rows depend on each other, a batch is one sample
    assert (correction.samples, correction.batches) == (count if apart else 1, 1)


@pytest.mark.parametrize("case", [case for case in CASES if case.bias == "changed"], ids=lambda case: case.name)
def test_nothing_but_the_bias_changes(case):
    model = case.model()
    corrected = copy.deepcopy(correction_of(case).model)
    assert stripped(corrected, ["b"]) == stripped(model, ["b"])
    assert not np.array_equal(constants_of(corrected)["b"], constants_of(model)["b"])


@pytest.mark.parametrize("case", [case for case in CASES if case.bias != "changed"], ids=lambda case: case.name)
def test_nothing_but_one_new_bias_is_in_the_graph(case):
    model = case.model()
    corrected = copy.deepcopy(correction_of(case).model)
    before, after = constants_of(model), constants_of(corrected)
    read = {name for node in corrected.graph.node for name in node.input}
    assert len(after.keys() - before.keys()) == 1
    assert all(np.array_equal(after[name], array) for name, array in before.items() if name in after)
    assert set(after) <= read  # what nothing reads any more is gone
    makers = {output: node.op_type for node in corrected.graph.node for output in node.output}
    kept = [node.op_type for node in model.graph.node if node.output[0] in makers]
    new = [node.op_type for node in corrected.graph.node if node.name.endswith("_add_bias")]
    assert new == ["Add"] * (case.bias == "added" and "MatMul" in case.body)
    gone = {node.op_type for node in model.graph.node if node.output[0] not in makers}
    assert gone <= {"Constant", "Reshape"}
    assert sorted(node.op_type for node in corrected.graph.node) == sorted([*kept, *new])
    for each in (model, corrected):
        each.graph.ClearField("node")
        each.graph.ClearField("initializer")
    assert corrected == model


def test_given_model_stays_as_it_was():
    model = two_layers()
    before = model.SerializeToString(deterministic=True)
    mean_corrected(model, samples(4, 3, 6, 6))
    assert model.SerializeToString(deterministic=True) == before


def test_given_file_stays_as_it_was(tmp_path):
    onnx.save(two_layers(), tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    mean_corrected(tmp_path / "model.onnx", samples(4, 3, 6, 6))
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_given_samples_stay_as_they_were():
    x = samples(4, 3, 6, 6)
    mean_corrected(two_layers(), x)
    np.testing.assert_array_equal(x, samples(4, 3, 6, 6))


def test_result_is_the_same_each_time():
    first, second = (mean_corrected(two_layers(), samples(4, 3, 6, 6)) for _ in range(2))
    assert first.model == second.model
    assert list(first.report) == list(second.report)


def test_path_string_bytes_and_proto_give_the_same_model(tmp_path):
    model, path = two_layers(), tmp_path / "model.onnx"
    onnx.save(model, path)
    given = (model, path, str(path), path.read_bytes(), bytearray(path.read_bytes()))
    first, *others = (mean_corrected(each, samples(4, 3, 6, 6)).model for each in given)
    assert isinstance(first, onnx.ModelProto)
    assert all(other == first for other in others)


def test_layers_of_a_network_are_corrected_for_what_they_read_in_the_quantized_network():
    model, x = two_layers(), samples(4, 3, 6, 6)
    corrected = mean_corrected(model, x).model
    before, after = constants_of(model), constants_of(corrected)
    simulated = with_constants(model, **{name: fake_quantized(before[name], None) for name in ("w1", "w2", "w3")})
    reads = dict(zip(("first", "second", "last"), run(simulated, {"x": x}, ["x", "r", "f"])))
    for name, w, b in [("first", "w1", "b1"), ("second", "w2", "b2"), ("last", "w3", "b3")]:
        shift = output_shift(model, name, reads[name], before[w] - fake_quantized(before[w], None), 1)
        assert np.abs(shift).max() > 0.01
        np.testing.assert_allclose(after[b] - before[b], shift, rtol=1e-5, atol=1e-6)


def test_report_is_in_topological_order_and_leaves_out_nothing():
    report = mean_corrected(two_layers(), samples(4, 3, 6, 6)).report
    assert [(layer.name, layer.op, layer.channels) for layer in report] == [
        ("first", "Conv", 4), ("second", "Conv", 6), ("last", "Gemm", 5)
    ]  # fmt: skip
    assert all(layer.shift_before > 0.01 > 1e-5 > layer.shift_after for layer in report)


def test_shift_before_is_the_mean_over_channels_of_the_absolute_shift():
    case = CASES[4]
    model = case.model()
    shift = case.mean_output(model) - case.mean_output(case.quantized(model, False))
    (layer,) = mean_corrected(model, [case.samples()]).report
    np.testing.assert_allclose(layer.shift_before, np.abs(shift).mean(), rtol=1e-5)


# Biases and samples of any kind


def trip(name, b, x=IMAGES, body="[layer] y = Conv<pads=[1,1,1,1]>(x, w, b)"):
    return name, np.asarray(b, np.float32), x, body


TRIPS = [
    trip("a bias of exact zeros", np.zeros(5)),
    trip("a bias with one zero", [0.5, 0.0, -0.25, 1.0, 2.0]),
    trip("tiny biases", np.full(5, 1e-30)),
    trip("large biases", [1000.0, -1000.0, 500.0, 0.0, 1.0]),
    trip("negative zeros", np.full(5, -0.0)),
    trip("a batch of one", biases(5), (1, 3, 9, 8)),
    trip("zeros in an Add", np.zeros((1, 5, 1, 1)), body="[layer] t = Conv(x, w) y = Add(t, b)"),
]


@pytest.mark.parametrize(("name", "b", "x", "body"), TRIPS, ids=[each[0] for each in TRIPS])
def test_any_bias_is_corrected(name, b, x, body):
    case = Case(name, body, x, KERNEL, b.shape)
    model = case.model(b=b)
    correction = mean_corrected(model, [case.samples()])
    found, expected = (case.mean_output(each) for each in (case.quantized(correction.model, False), model))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert [layer.method for layer in correction.report] == ["mean"]
    assert stripped(correction.model, ["b"]) == stripped(model, ["b"])


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (3, 9, 8)])
def test_model_without_a_batch_axis_of_its_own(shape):
    axes = ",".join(map(str, shape))
    batch = "u = Constant<value_ints=[0]>() i = Unsqueeze(x, u)" if len(shape) == 3 else "i = Identity(x)"
    text = f"g (float[{axes}] x) => (float[?,?,?,?] y) {{ {batch} [layer] y = Conv<pads=[1,1,1,1]>(i, w, b) }}"
    model = model_from_text(text, w=weights(*KERNEL), b=biases(5))
    batches = [samples(*shape, seed=seed) for seed in range(4)]
    corrected = mean_corrected(model, batches).model
    simulated = with_constants(corrected, w=fake_quantized(weights(*KERNEL), None))
    found, expected = (np.mean([channel_mean(run(each, {"x": x})[0], 1) for x in batches], 0) for each in (simulated, model))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("opset", range(9, min(onnx.defs.onnx_opset_version(), 26) + 1))
def test_every_opset(opset):
    model = two_layers()
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    correction = mean_corrected(model, samples(4, 3, 6, 6))
    assert [layer.method for layer in correction.report] == ["mean"] * 3
    assert correction.model.opset_import == model.opset_import
    np.testing.assert_array_equal(
        constants_of(correction.model)["b1"], constants_of(mean_corrected(two_layers(), samples(4, 3, 6, 6)).model)["b1"]
    )


# Where constants are kept


@pytest.mark.parametrize("body", ["[layer] y = Conv(x, w, b)", "[layer] t = MatMul(x, w) y = Add(t, b)"])
def test_constants_of_constant_nodes(body):
    case = Case("", body, IMAGES, KERNEL, (5,)) if "Conv" in body else matmul("", body, (5,))
    model = as_constant_nodes(case.model())
    expected = case.mean_output(model)
    corrected = mean_corrected(model, [case.samples()]).model
    np.testing.assert_allclose(case.mean_output(case.quantized(corrected, False)), expected, rtol=1e-6, atol=1e-6)
    assert stripped(corrected, ["b"]) == stripped(model, ["b"])


def test_bias_of_floats_of_a_constant_node():
    case = Case("", "b = Constant<value_floats=[1.0,-2.0,0.5,0.25,3.0]>() [layer] y = Conv(x, w, b)", IMAGES, KERNEL, None)
    model = case.model()
    corrected = mean_corrected(model, [case.samples()]).model
    found = case.mean_output(with_constants(corrected, w=fake_quantized(weights(*KERNEL), None)))
    np.testing.assert_allclose(found, case.mean_output(model), rtol=1e-6, atol=1e-6)


def test_weights_behind_cast():
    case = Case("", "i = Cast<to=1>(w) [layer] y = Conv(x, i, b)", IMAGES, KERNEL, (5,))
    model = case.model(w=weights(*KERNEL, dtype="float16"))
    corrected = mean_corrected(model, [case.samples()]).model
    found = case.mean_output(with_constants(corrected, w=fake_quantized(weights(*KERNEL, dtype="float16"), None)))
    np.testing.assert_allclose(found, case.mean_output(model), rtol=1e-6, atol=1e-6)


def test_an_empty_name_as_bias_is_no_bias():
    case = conv("", "", b=False)
    model = case.model()
    model.graph.node[0].input.append("")
    corrected = mean_corrected(model, [case.samples()]).model
    found = case.mean_output(case.quantized(corrected, False))
    np.testing.assert_allclose(found, case.mean_output(model), rtol=1e-6, atol=1e-6)


def test_name_of_a_new_bias_is_not_one_that_is_taken():
    case = Case("", "[layer] t = Conv(x, w) y_bias = Neg(t) y = Neg(y_bias)", IMAGES, KERNEL, None)
    model = case.model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "t_bias"))
    corrected = mean_corrected(model, [case.samples()]).model
    onnx.checker.check_model(corrected, full_check=True)
    found = case.mean_output(case.quantized(corrected, False))
    np.testing.assert_allclose(found, case.mean_output(model), rtol=1e-6, atol=1e-6)


# Layers that share


SHARED = """g (float[?,?,?,?] x, float[?,?,?,?] z) => (float[?,?,?,?] u, float[?,?,?,?] v) {
    [one] u = Conv<pads=[1,1,1,1]>(x, w, b)
    [two] v = Conv<strides=[2,2]>(z, w, b)
}"""


def shared_means(model, x, z):
    return [channel_mean(output, 1) for output in run(model, {"x": x, "z": z})]


def test_layers_that_share_weights_and_bias_are_each_corrected_for_their_own_input():
    model = model_from_text(SHARED, w=weights(*KERNEL), b=biases(5))
    x, z = samples(*IMAGES), samples(4, 3, 11, 7, seed=5)
    correction = mean_corrected(model, [(x, z)])
    assert [(layer.name, layer.method) for layer in correction.report] == [("one", "mean"), ("two", "mean")]
    simulated = with_constants(correction.model, w=fake_quantized(weights(*KERNEL), None))
    for found, expected in zip(shared_means(simulated, x, z), shared_means(model, x, z)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    one, two = (node.input[2] for node in correction.model.graph.node)
    assert one != two


def test_a_bias_keeps_its_value_for_others_that_read_it():
    text = "g (float[?,?,?,?] x) => (float[?,?,?,?] y, float[?] c) { [layer] y = Conv(x, w, b) c = Neg(b) }"
    model = model_from_text(text, w=weights(*KERNEL), b=biases(5))
    corrected = mean_corrected(model, [samples(*IMAGES)]).model
    y, c = run(with_constants(corrected, w=fake_quantized(weights(*KERNEL), None)), {"x": samples(*IMAGES)})
    np.testing.assert_array_equal(c, -biases(5))
    np.testing.assert_allclose(channel_mean(y, 1), channel_mean(run(model, {"x": samples(*IMAGES)})[0], 1), rtol=1e-6)


def test_a_bias_keeps_its_value_for_a_subgraph_that_reads_it():
    text = """g (float[?,?,?,?] x, bool[] flag) => (float[?,?,?,?] y, float[?] c) {
        [layer] y = Conv(x, w, b)
        c = If (flag) <then_branch = t () => (float[?] p) { p = Neg(b) },
                       else_branch = e () => (float[?] q) { q = Identity(b) }>
    }"""
    model = model_from_text(text, w=weights(*KERNEL), b=biases(5))
    corrected = mean_corrected(model, [{"x": samples(*IMAGES), "flag": np.array(True)}]).model
    _, c = run(corrected, {"x": samples(*IMAGES), "flag": np.array(True)})
    np.testing.assert_array_equal(c, -biases(5))


@pytest.mark.parametrize("read", ["b", "c"])
def test_a_bias_that_is_an_output_of_the_model_keeps_its_value(read):
    body = f"c = Identity(b) [layer] y = Conv(x, w, {read})"
    text = f"g (float[?,?,?,?] x) => (float[?,?,?,?] y, float[5] {read}) {{ {body} }}"
    model = model_from_text(text, w=weights(*KERNEL), b=biases(5))
    corrected = mean_corrected(model, [samples(*IMAGES)]).model
    np.testing.assert_array_equal(run(corrected, {"x": samples(*IMAGES)})[1], biases(5))


def test_a_layer_whose_output_the_model_gives_out_gets_its_own_bias():
    text = "g (float[?,?,?,?] x) => (float[?,?,?,?] y, float[?,?,?,?] t) { [layer] t = Conv(x, w) y = Add(t, b) }"
    model, x = model_from_text(text, w=weights(*KERNEL), b=biases(1, 5, 1, 1)), samples(*IMAGES)
    corrected = mean_corrected(model, [x]).model
    simulated = with_constants(corrected, w=fake_quantized(weights(*KERNEL), None))
    for found, expected in zip(run(simulated, {"x": x}), run(model, {"x": x}), strict=True):
        np.testing.assert_allclose(channel_mean(found, 1), channel_mean(expected, 1), rtol=1e-6, atol=1e-6)


def test_a_layer_used_twice_is_corrected_for_each_use():
    text = "g (float[?,?] x) => (float[?,?] y) { [one] t = Gemm(x, w, b) r = Relu(t) [two] y = Gemm(r, w, b) }"
    w, b, x = weights(7, 7, axis=1), biases(7), samples(12, 7)
    model = model_from_text(text, w=w, b=b)
    corrected = mean_corrected(model, [x]).model
    _, r = run(with_constants(model, w=fake_quantized(w, None)), {"x": x}, ["y", "r"])
    after = constants_of(corrected)
    for node, read in zip((corrected.graph.node[0], corrected.graph.node[2]), (x, r)):
        shift = channel_mean(read, 1) @ (w - fake_quantized(w, None)).astype(np.float64)
        np.testing.assert_allclose(after[node.input[2]] - b, shift, rtol=1e-5, atol=1e-6)


def test_weights_that_an_embedding_shares_stay_as_they_are():
    text = """g (int64[?,?] ids) => (float[?,?,?] y, float[?,?,?] e) {
        e = Gather(w, ids) i = Transpose(w) [layer] y = MatMul(e, i)
    }"""
    w, ids = weights(9, 6), np.random.default_rng(0).integers(0, 9, (5, 4))
    model = model_from_text(text, w=w)
    correction = mean_corrected(model, [ids])
    np.testing.assert_array_equal(constants_of(correction.model)["w"], w)
    shift = channel_mean(w[ids], 2) @ (w - fake_quantized(w, None)).T.astype(np.float64)
    (added,) = (array for name, array in constants_of(correction.model).items() if name != "w")
    np.testing.assert_allclose(added, shift, rtol=1e-5, atol=1e-6)


# Inputs and outputs


def test_several_inputs_and_outputs():
    text = """g (float[?,?,?,?] image, float[?,?] row) => (float[?,?] y, float[?,?,?,?] u, float[?,?] v) {
        [conv] u = Conv(image, w1, b1)
        [gemm] v = Gemm(row, w2, b2)
        m = GlobalAveragePool(u)
        f = Flatten(m)
        y = Add(f, v)
    }"""
    model = model_from_text(text, w1=weights(*KERNEL), w2=weights(7, 5, axis=1), b1=biases(5), b2=biases(5, seed=9))
    feeds = {"image": samples(*IMAGES), "row": samples(6, 7)}
    corrected = mean_corrected(model, feeds).model
    simulated = with_constants(
        corrected, w1=fake_quantized(weights(*KERNEL), None), w2=fake_quantized(weights(7, 5, axis=1), None)
    )
    for found, expected in zip(run(simulated, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(channel_mean(found, 1), channel_mean(expected, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attributes", ["<pads=[1,2,0,1], strides=[2,1]>", '<auto_pad="SAME_LOWER", strides=[2,2]>'])
def test_samples_of_different_sizes_are_pooled_over_all_their_positions(attributes):
    case = conv("", attributes)
    model = case.model()
    batches = [samples(1, 3, 9, 8), samples(3, 3, 4, 15, seed=3), samples(2, 3, 12, 5, seed=4)]
    simulated = case.quantized(mean_corrected(model, batches).model, False)
    means = []
    for each in (simulated, model):
        positions = [np.moveaxis(run(each, {"x": x})[0], 1, -1).reshape(-1, 5) for x in batches]
        means.append(np.concatenate(positions).mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(*means, rtol=1e-6, atol=1e-6)


def test_layer_that_reads_an_input_with_a_default():
    text = "g (float[?,?] x, float[6,7] c) => (float[?,?] y) { s = Add(x, c) [layer] y = Gemm(s, w, b) }"
    model = model_from_text(text, w=weights(7, 5, axis=1), b=biases(5), c=samples(6, 7, seed=8))
    corrected = mean_corrected(model, {"x": samples(6, 7)}).model
    simulated = with_constants(corrected, w=fake_quantized(weights(7, 5, axis=1), None))
    found, expected = (channel_mean(run(each, {"x": samples(6, 7)})[0], 1) for each in (simulated, model))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


# Types and versions


@pytest.mark.parametrize("body", ["[layer] y = Conv<pads=[1,1,1,1]>(x, w, b)", "[layer] t = Conv(x, w) y = Add(t, b)"])
def test_model_of_float16(body):
    shape = (5,) if "b)" in body.split("y =")[1] and "Add" not in body else (1, 5, 1, 1)
    text = f"g (float16[?,?,?,?] x) => (float16[?,?,?,?] y) {{ {body} }}"
    w, b, x = weights(*KERNEL, dtype="float16"), biases(*shape, dtype="float16"), samples(*IMAGES, dtype="float16")
    model = model_from_text(text, w=w, b=b)
    correction = mean_corrected(model, [x])
    corrected = constants_of(correction.model)["b"]
    assert corrected.dtype == np.float16
    shift = correction.report[0].shift_before
    assert 0 < correction.report[0].shift_after < 0.02 * shift
    single = model_from_text(text.replace("float16", "float"), w=w.astype("float32"), b=b.astype("float32"))
    simulated = with_constants(single, w=fake_quantized(w.astype("float32"), None), b=corrected.astype("float32"))
    feeds = {"x": x.astype("float32")}
    found, expected = (channel_mean(run(each, feeds)[0], 1) for each in (simulated, single))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-10)  # half a step of float16 between 1 and 2


def test_model_of_float64():
    text = "g (double[?,?] x) => (double[?,?] y) { [layer] y = Gemm(x, w, b) }"
    w, b, x = weights(7, 5, axis=1, dtype="float64") / 3, biases(5, dtype="float64"), samples(12, 7, dtype="float64")
    model = model_from_text(text, w=w, b=b)
    corrected = mean_corrected(model, [x]).model
    simulated = with_constants(corrected, w=fake_quantized(w, None))
    found, expected = (channel_mean(run(each, {"x": x})[0], 1) for each in (simulated, model))
    np.testing.assert_allclose(found, expected, rtol=1e-13)


LISTED = [case for case in CASES if case.b in (None, (), (1,)) or "behind" in case.name or case.name in ("pads", "matmul")]


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name)
def test_model_of_a_version_that_lists_initializers_as_inputs(case):
    model = case.model(ir_version=3, opset=12)
    corrected = mean_corrected(model, [case.samples()]).model
    onnx.checker.check_model(corrected, full_check=True)
    listed = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in corrected.graph.input}
    for tensor in corrected.graph.initializer:
        assert listed[tensor.name] == list(tensor.dims)
    found = case.mean_output(case.quantized(corrected, False))
    np.testing.assert_allclose(found, case.mean_output(model), rtol=1e-6, atol=1e-6)


# Names of nodes


def test_nodes_without_names_are_told_apart():
    text = "g (float[?,?] x) => (float[?,?] y) { t = Gemm(x, w, b) y = Gemm(t, v, c) }"
    constants = {"w": weights(7, 5, axis=1), "v": weights(5, 4, axis=1), "b": biases(5), "c": biases(4)}
    report = mean_corrected(model_from_text(text, **constants), [samples(12, 7)]).report
    assert [(layer.channels, layer.method) for layer in report] == [(5, "mean"), (4, "mean")]
    assert len({layer.name for layer in report} - {""}) == 2


# What is left alone


LEFT_ALONE = {
    "weights that are computed": ("[odd] y = Conv(x, x)", {}, "run time"),
    "gemm by what is computed": ("f = Flatten(x) i = Transpose(f) [odd] y = Gemm(f, i)", {}, "run time"),
    "gemm with beta 0": (
        "f = Flatten(x) [odd] y = Gemm<beta=0.0>(f, w, b)", {"w": weights(216, 4, axis=1), "b": biases(4)}, "beta is 0"
    ),
    "a matrix per sample": ("[odd] y = MatMul(x, w)", {"w": weights(3, 8, 4, axis=2)}, "not one matrix"),
    "weights on the grid": (
        "[odd] y = Conv(x, w, b)", {"w": fake_quantized(weights(*KERNEL), None), "b": biases(5)}, "not quantized"
    ),
    "weights of zeros": ("[odd] y = Conv(x, w, b)", {"w": np.zeros(KERNEL, np.float32), "b": biases(5)}, "not quantized"),
    "input that overflows": (
        "e = Mul(x, huge) s = Mul(e, huge) [odd] y = Conv(s, w, b)",
        {"w": weights(*KERNEL), "b": biases(5), "huge": np.float32(1e30)}, "not finite",
    ),
    "gemm with a C that is computed": (
        "f = Flatten(x) c = Neg(f) [odd] y = Gemm(f, w, c)", {"w": weights(216, 216, axis=1)}, ""
    ),
    "conv with a bias that is computed": (
        "m = ReduceMean<axes=[0,2,3], keepdims=0>(x) [odd] y = Conv(x, w, m)", {"w": weights(3, 3, 3, 3)}, ""
    ),
    "recurrent layer": (
        "m = ReduceMean<axes=[1], keepdims=0>(x) [odd] y, h = RNN<hidden_size=4>(m, w, r)",
        {"w": weights(1, 4, 8, axis=1), "r": weights(1, 4, 4, axis=1)}, "recurrent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE, ids=lambda name: name.replace(" ", "_"))
def test_layer_is_left_alone_with_a_reason(name):
    body, constants, reason = LEFT_ALONE[name]
    text = f"g (float[?,3,9,8] x) => (float[] y, float[?,?,?,?] other) {{ {body} [even] other = Conv(x, w0, b0) }}"
    model = model_from_text(text, **constants, w0=weights(*KERNEL), b0=biases(5))
    correction = mean_corrected(model, [samples(*IMAGES)])
    odd, even = correction.report
    assert (odd.name, odd.method, even.name, even.method) == ("odd", None, "even", "mean")
    assert odd.reason
    assert reason in odd.reason
    assert stripped(correction.model, ["b0"]) == stripped(model, ["b0"])


BRANCHES = """<then_branch = t () => (float[?,?,?,?] p) { p = Conv(x, w, b) },
               else_branch = e () => (float[?,?,?,?] q) { q = Identity(c) }>"""


def test_layers_in_a_subgraph_are_left_alone_with_a_reason():
    text = f"""g (float[?,3,9,8] x, bool[] flag) => (float[?,?,?,?] y) {{
        [layer] c = Conv(x, w, b)
        [choice] y = If (flag) {BRANCHES}
    }}"""
    model = model_from_text(text, w=weights(*KERNEL), b=biases(5))
    feeds = {"x": samples(*IMAGES), "flag": np.array(True)}
    correction = mean_corrected(model, [feeds])
    layer, choice = correction.report
    assert (layer.method, choice.method, choice.name) == ("mean", None, "choice")
    assert "subgraph" in choice.reason
    np.testing.assert_array_equal(run(correction.model, feeds)[0], run(model, feeds)[0])
    assert not np.array_equal(*(run(each, feeds | {"flag": np.array(False)})[0] for each in (correction.model, model)))


def test_layers_in_a_function_are_left_alone_with_a_reason():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[?,3,9,8] x) => (float[?,?,?,?] y) { [call] t = local.block(x, w) [layer] y = Conv(t, v) }
        <domain: "local", opset_import: ["" : 17]> block (x, w) => (y) { y = Conv(x, w) }""")
    tensors = {"w": weights(3, 3, 3, 3), "v": weights(4, 3, 3, 3)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    call, layer = mean_corrected(model, [samples(*IMAGES)]).report
    assert (call.name, call.method, layer.name, layer.method) == ("call", None, "layer", "mean")
    assert call.reason


def test_constants_that_a_function_computes():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[?,?] x) => (float[?,?] y) { i = local.twice(w) [layer] y = Gemm(x, i, b) }
        <domain: "local", opset_import: ["" : 17]> twice (w) => (y) { y = Add(w, w) }""")
    w, b, x = weights(7, 5, axis=1), biases(5), samples(12, 7)
    model.graph.initializer.extend([numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")])
    corrected = mean_corrected(model, [x]).model
    simulated = with_constants(corrected, w=fake_quantized(w, None))
    found, expected = (channel_mean(run(each, {"x": x})[0], 1) for each in (simulated, model))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_weights_that_are_a_product_of_constants_stay_as_they_are():
    text = "g (float[?,?] x) => (float[?,?] y) { [product] i = MatMul(u, v) [layer] y = Gemm(x, i, b) }"
    model, x = model_from_text(text, u=weights(7, 3, axis=1), v=weights(3, 5, axis=1), b=biases(5)), samples(12, 7)
    correction = mean_corrected(model, [x])
    np.testing.assert_array_equal(run(correction.model, {"x": x}, ["i"])[0], run(model, {"x": x}, ["i"])[0])
    assert [(layer.name, layer.method) for layer in correction.report if layer.method] == [("layer", "mean")]


def test_a_channel_of_zeros_keeps_its_bias():
    w = weights(*KERNEL)
    w[2] = 0
    model = with_constants(CASES[4].model(), w=w)
    for per_channel in (False, True):
        after = constants_of(mean_corrected(model, [samples(*IMAGES)], per_channel=per_channel).model)["b"]
        assert (after == biases(5)).tolist() == [False, False, True, False, False]


def test_product_of_two_computed_tensors_is_no_layer():
    text = "g (float[?,?] x) => (float[?,?] y) { t = Transpose(x) y = MatMul(x, t) }"
    assert mean_corrected(model_from_text(text), [samples(12, 7)]).report == []


def test_model_without_layers_stays_as_it_is():
    model = model_from_text("g (float[?,?] x) => (float[?,?] y) { y = Relu(x) }")
    correction = mean_corrected(model, [samples(12, 7)])
    assert correction.model == model
    assert list(correction.report) == []


# Bad arguments


def test_unknown_method():
    with pytest.raises(ValueError, match="method: 'magic'"):
        correct(two_layers(), samples(4, 3, 6, 6), method="magic")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_their_layer(value):
    model = two_layers()
    broken = weights(6, 4, 3, 3)
    broken[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="second"):
        mean_corrected(with_constants(model, w2=broken), samples(4, 3, 6, 6))


@pytest.mark.parametrize("model", [None, 3, object(), ["model.onnx"]])
def test_model_of_a_kind_that_is_not_understood(model):
    with pytest.raises(TypeError, match=r"^reference: .*expected a path, bytes or an onnx\.ModelProto"):
        mean_corrected(model, samples(4, 3, 6, 6))
