"""`compare`: the figures of each model and output, how inputs and outputs are paired, and what is refused."""

import json
import weakref

import numpy as np
import onnx
import pytest

from biascorr import compare, correct
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.inspection.inputs import are_transposed
from networks import model_from_text, quantized, samples, two_layers, weights, with_constants
from tflite_fixtures import images, path_of


def classifier(*, output="y", given="x"):
    text = f"g (float[N,6] {given}) => (float[N,4] {output}) {{ t = Gemm({given}, w, b)  {output} = Softmax(t) }}"
    rng = np.random.default_rng(0)
    return model_from_text(text, w=rng.normal(0, 0.5, (6, 4)).astype(np.float32), b=np.zeros(4, np.float32))


def shifted(network, name, by):
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    return with_constants(network, **{name: arrays[name] + np.float32(by)})


@pytest.fixture(scope="module")
def float_model():
    return two_layers()


@pytest.fixture(scope="module")
def data():
    return samples(12, 3, 6, 6)


def test_figures_are_those_of_the_outputs_that_the_runtime_gives():
    data = samples(40, 6)
    exact, other = classifier(), shifted(classifier(), "b", [0.5, 0, 0, -0.25])
    found = compare(exact, [other], data, batch_size=7).models[0]
    run = [OnnxNetwork.load(each, "model").deployed()({"x": data})["y"].astype(np.float64) for each in (exact, other)]
    r, q = run
    assert found.sqnr == pytest.approx(np.mean(10 * np.log10((r**2).sum(1) / ((q - r) ** 2).sum(1))))
    assert found.divergence == pytest.approx(np.mean((r * np.log(r / q)).sum(1)), rel=1e-5)
    assert found.top1 == np.mean(r.argmax(1) == q.argmax(1)) < 1
    assert found.largest_change == pytest.approx(np.abs(q - r).max())
    assert found.seconds > 0
    assert len(found.score.sqnrs) == 40


def test_record_can_be_written_as_json(float_model, data):
    lost = with_constants(float_model, b3=np.full(5, np.nan, np.float32))
    comparison = compare(float_model, {"same": float_model, "lost": lost}, data)
    record = json.loads(comparison.to_json())
    assert record == comparison.to_dict()
    same, lost = record["models"]
    assert (same["sqnr"], same["largest_change"], same["top1"], same["divergence"]) == (100.0, 0.0, 1.0, None)
    assert (lost["sqnr"], lost["largest_change"]) == (-300.0, None)
    assert [each["name"] for each in lost["outputs"]] == ["y"]
    assert record["reference"]["seconds"] > 0
    assert record["samples"] == 12
    assert any("nan" in note for note in record["notes"])
    assert "nearest: same" in repr(comparison)


def test_models_are_called_by_their_files(tmp_path, float_model, data):
    for name in ("a/q.onnx", "b/q.onnx", "b/other.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        onnx.save(float_model, tmp_path / name)
    paths = [tmp_path / name for name in ("a/q.onnx", "b/other.onnx")]
    found = compare(str(paths[0]), paths, data)
    assert [each.name for each in found.models] == ["q.onnx", "other.onnx"]
    assert found.reference == "q.onnx"
    assert [each.size for each in found.models] == [path.stat().st_size for path in paths]
    paths = [tmp_path / name for name in ("a/q.onnx", "b/q.onnx")]
    assert [each.name for each in compare(float_model, paths, data).models] == list(map(str, paths))
    assert [each.name for each in compare(float_model, float_model, data).models] == ["model 1"]


def test_no_model_is_lost_where_names_are_the_same(tmp_path, float_model, data):
    onnx.save(float_model, path := tmp_path / "q.onnx")
    found = compare(float_model, [path, path], data[:2])
    assert [each.name for each in found.models] == [str(path), f"{path} (2)"]
    found = compare(float_model, {1: float_model, "1": float_model, "1 (2)": float_model}, data[:2])
    assert [each.name for each in found.models] == ["1", "1 (3)", "1 (2)"]


def test_corrected_model_is_taken_as_it_is_returned(float_model, data):
    given = quantized(float_model, [{"x": each[None]} for each in data])
    correction = correct(float_model, data, quantized=given, method="mean")
    found = compare(float_model, {"before": given, "after": correction}, data)
    assert found["after"].sqnr == pytest.approx(correction.deployed["mean"].sqnr, abs=3)
    with pytest.raises(KeyError, match="before 2"):
        found["before 2"]


def test_inputs_of_other_names_are_paired_in_order():
    data = samples(4, 6)
    found = compare(classifier(), classifier(given="image", output="scores"), {"x": data})
    assert found.models[0].sqnr == 100
    assert [each.name for each in found.models[0].outputs] == ["y"]


def test_batches_have_the_size_that_any_model_insists_on():
    fixed = onnx.ModelProto()
    fixed.CopyFrom(classifier())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    found = compare(classifier(), fixed, samples(8, 6), batch_size=4)
    assert found.batches == 4
    assert found.models[0].sqnr == 100


def test_sizes_that_cannot_both_be_taken_are_said():
    two, four = onnx.ModelProto(), onnx.ModelProto()
    for size, fixed in ((2, two), (4, four)):
        fixed.CopyFrom(classifier())
        fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    with pytest.raises(ValueError, match=r"^four: input x takes \(4, 6\), other models \(2, 6\); compare them one by one$"):
        compare(classifier(), {"two": two, "four": four}, samples(8, 6))


def test_outputs_that_one_model_lacks_are_named():
    both = model_from_text("g (float[N,2] x) => (float[N,2] y, float[N,2] z) { y = Relu(x) z = Neg(x) }")
    one = model_from_text("g (float[N,2] x) => (float[N,2] z) { z = Neg(x) }")
    found = compare(both, {"one": one}, samples(4, 2))
    assert [each.name for each in found.models[0].outputs] == ["z"]
    assert found.notes == ["one: not compared, as it does not give them out, or as codes: y"]
    two = model_from_text("g (float[N,2] x) => (float[N,2] a, float[N,2] b, float[N,2] c) { a = Abs(x) b = Neg(x) c = Exp(x) }")
    with pytest.raises(ValueError, match="model 1: gives out a, b, c, expected the outputs of the reference: y, z"):
        compare(both, two, samples(4, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            "g (float[N,6,6,3] x) => (float[N,6,6,3] y) { y = Relu(x) }",
            "takes (?, 6, 6, 3), expected (?, 3, 6, 6) as of the ref",
        ),
        ("g (float[N,6,6,3] x) => (float[N,6,6,3] y) { y = Relu(x) }", "channels are last there, first in the reference"),
        ("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }", "takes (?, 3, 8, 8), expected (?, 3, 6, 6)"),
        ("g (double[N,3,6,6] x) => (double[N,3,6,6] y) { y = Relu(x) }", "takes float64, expected float32 as of the ref"),
        ("g (float[N] x, float[N] z) => (float[N] y) { y = Add(x, z) }", "takes x, z, expected the inputs of the reference: x"),
        ("g (float[N,3,6,6] x) => (float[N,6,6,3] y) { y = Transpose<perm=[0,2,3,1]>(x) }", "channels are elsewhere"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(other, message):
    reference = model_from_text("g (float[N,3,6,6] x) => (float[N,3,6,6] y) { y = Relu(x) }")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is long)
        compare(reference, {"other": model_from_text(other)}, samples(2, 3, 6, 6))
    assert str(error.value).startswith("other: ")
    assert message in str(error.value)


def test_no_models_are_refused(float_model, data):
    with pytest.raises(ValueError, match="models: none"):
        compare(float_model, [], data)
    with pytest.raises(FileNotFoundError, match="no such file"):
        compare(float_model, "missing.onnx", data)


def test_random_reference_is_noted():
    random = model_from_text("g (float[N,2] x) => (float[N,2] y) { r = RandomUniformLike(x) y = Add(x, r) }")
    assert "chance" in compare(random, random, samples(4, 2)).notes[0]


def test_top1_of_a_map_is_along_its_channels():
    text = "g (float[N,3,6,6] x) => (float[N,4,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w) }"
    reference = model_from_text(text, w=weights(4, 3, 3, 3))
    other = with_constants(reference, w=weights(4, 3, 3, 3, seed=1))
    data = samples(3, 3, 6, 6)
    r, q = (OnnxNetwork.load(each, "model").deployed()({"x": data})["y"] for each in (reference, other))
    assert compare(reference, other, data).models[0].top1 == np.mean(r.argmax(1) == q.argmax(1))


def test_models_are_released_one_after_the_other(monkeypatch, float_model, data):
    alive: list[weakref.ref[OnnxNetwork]] = []
    most = 0
    load = OnnxNetwork.load.__func__

    def watched(cls, model, name):
        nonlocal most
        network = load(cls, model, name)
        alive.append(weakref.ref(network))
        most = max(most, sum(each() is not None for each in alive))
        return network

    monkeypatch.setattr(OnnxNetwork, "load", classmethod(watched))
    compare(float_model, [float_model] * 4, data)
    assert most <= 3  # the reference, the one before and this one


def test_samples_that_are_left_out_are_noted(float_model, data):
    found = compare(float_model, float_model, data, max_samples=5)
    assert found.samples == 5
    assert found.notes == ["not all samples were read, 5 at most (max_samples)"]


def test_shapes_with_channels_elsewhere():
    assert are_transposed((1, 3, 8, 8), (1, 8, 8, 3))
    assert are_transposed((None, 8, 8, 3), (4, 3, 8, 8))
    assert not are_transposed((1, 8, 8, 8), (1, 8, 8, 8))
    assert not are_transposed((1, 3, 8), (1, 3, 9))


def test_tflite_models_take_real_numbers_whatever_their_inputs_are():
    names = ["classifier_int8", "classifier_int8_in_out", "classifier_dynamic"]
    found = compare(path_of("classifier_float"), [path_of(name) for name in names], images(6))
    assert [each.name for each in found.models] == [f"{name}.tflite" for name in names]
    assert all(each.sqnr > 30 and each.top1 == 1 for each in found.models)
