"""The user's own measure: of each sample, or of a network that runs in a loop of the user's."""

import sys

import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.correction.metrics import Metric, metric_from_name
from networks import BITS, model_from_text, samples, two_layers, weights

PARAMS = QuantParams("tf", weight_bits=BITS)


def no_difference(_outputs, _reference):
    return 0.0


def of_any_outputs(*outputs):
    return len(outputs)


def of_runs(_run, *, batch=3):
    return batch


def of_runs_of_batches(_run, batch=3):
    return batch


def classifier():
    text = "g (float[N,7] x) => (float[N,5] y) { [layer] t = MatMul(x, w) y = Softmax(t) }"
    return model_from_text(text, w=weights(7, 5, axis=1))


def test_a_metric_sees_each_scored_sample_beside_the_float_outputs():
    seen = []

    def metric(outputs, reference):
        seen.append((outputs["y"].shape, reference["y"].shape))
        return -float(np.abs(outputs["y"] - reference["y"]).max())

    correction = correct(two_layers(), [samples(10, 3, 6, 6, seed=k) for k in range(4)], quant_params=PARAMS, metric=metric)
    count = len(correction.scores["none"].sqnrs)
    assert count == 10
    assert {*seen} == {(seen[0][0],) * 2}
    assert seen[0][0][0] == 1
    assert len(seen) % count == 0
    before, after = (correction.scores[name] for name in ("none", correction.method))
    assert len(before.metrics) == count
    assert after.metric > before.metric
    assert correction.gains.keys() == {"metric"}
    assert correction.gains["metric"].is_sure


def test_a_metric_decides_against_the_other_measures():
    """What is worst by SQNR is best by this one."""
    x = samples(40, 7)
    by_ratio = correct(classifier(), x, quant_params=PARAMS)
    by_metric = correct(classifier(), x, quant_params=PARAMS, metric=no_difference)
    assert by_ratio.method != "none"
    assert by_metric.method == "none"


def test_evaluate_runs_networks_in_a_loop_of_its_own():
    inputs, calls = samples(60, 7, seed=9), []

    def evaluate(run):
        outputs = [run({"x": batch})["y"] for batch in (inputs[:30], inputs[30:])]
        calls.append(run(inputs[:30])["y"])
        np.testing.assert_array_equal(calls[-1], outputs[0])
        with pytest.raises(ValueError, match=r"^metric: it ran z, the model's inputs are x$"):
            run({"z": inputs})
        return float((np.concatenate(outputs).argmax(axis=1) == labels).mean())

    labels = np.zeros(60)
    correct(classifier(), samples(40, 7), quant_params=PARAMS, method="mean", metric=evaluate)
    labels = calls[0].argmax(axis=1).repeat(2)[:60]
    correction = correct(classifier(), samples(40, 7), quant_params=PARAMS, metric=evaluate)
    assert all(len(score.metrics) == 1 for score in correction.scores.values())
    assert correction.gains["metric"].error == 0
    assert correction.scores[correction.method].metric == max(score.metric for score in correction.scores.values())


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("top1", TypeError, r"^metric: 'top1', expected a function metric\(outputs, reference\) or evaluate\(run\)"),
        (lambda: 0.0, TypeError, r"takes neither \(outputs, reference\) nor \(run\)"),
        (lambda *_: float("nan"), ValueError, "^metric: it gave nan, expected a finite number"),
        (lambda *_: -np.inf, ValueError, "^metric: it gave -inf, expected a finite number"),
        (lambda _: None, TypeError, "^metric: it gave None, expected a number"),
    ],
    ids=["text", "no arguments", "nan", "infinite", "none"],
)
def test_metrics_that_are_none(metric, error, message):
    with pytest.raises(error, match=message):
        correct(classifier(), samples(16, 7), quant_params=PARAMS, metric=metric)


def test_which_kind_a_metric_is():
    assert not Metric(no_difference).evaluates_runs
    assert not Metric(of_any_outputs).evaluates_runs
    assert Metric(of_runs).evaluates_runs
    assert Metric(of_runs_of_batches).evaluates_runs
    assert not Metric(max).evaluates_runs  # it has no signature that can be read


def test_metrics_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text("def top1(outputs, reference): return 1.0\nlimit = 3\n")
    (tmp_path / "broken_metric.py").write_text("def top1(outputs, reference) return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert metric_from_name("my_metric:top1")({}, {}) == 1.0
    for name, message in {
        "my_metric": "expected module:function",
        "my_metric:top5": "cannot be found",
        "no_such_module:top1": "cannot be found",
        "broken_metric:top1": r"cannot be found: .*broken_metric.py, line 1\)",
        ".my_metric:top1": "cannot be found",
        "my_metric:limit": "is a int, expected a function",
    }.items():
        with pytest.raises(ValueError, match=message):
            metric_from_name(name)


def test_a_metric_may_write_into_what_it_gets():
    def distance(outputs, reference):
        return -float(np.abs(outputs["y"] - reference["y"]).max())

    def writing(outputs, reference):
        found = distance(outputs, reference)
        outputs["y"][...] = reference["y"][...] = 7.0
        return found

    one, other = (correct(two_layers(), samples(16, 3, 6, 6), quant_params=PARAMS, metric=each) for each in (distance, writing))
    assert one.scores == other.scores


def test_a_metric_gets_outputs_that_are_not_scored_too():
    text = "g (float[N,7] x) => (float[N,5] y, bool[N,7] mask) { [layer] y = MatMul(x, w) mask = Greater(x, one) }"
    model = model_from_text(text, w=weights(7, 5, axis=1), one=np.float32(1))
    x = samples(16, 7)

    def masked(outputs, reference):
        np.testing.assert_array_equal(outputs["mask"], reference["mask"])
        return -float(np.abs(outputs["y"] - reference["y"])[outputs["mask"].any(axis=1)].sum())

    def evaluate(run):
        outputs = run(x)
        return float(outputs["y"][outputs["mask"].any(axis=1)].sum())

    for metric in (masked, evaluate):
        assert "metric" in correct(model, x, quant_params=PARAMS, metric=metric).gains


def test_a_metric_judges_integers_in_place_of_real_numbers():
    text = "g (float[N,7] x) => ({type}[N,5] {y}) {{ [layer] t = MatMul(x, {w}) {body} }}"
    step = np.float32(1 / 8)
    model = model_from_text(text.format(type="float", y="t", w="w", body=""), w=weights(7, 5, axis=1))
    body = "q = QuantizeLinear(t, step, zero)"
    text = text.format(type="int8", y="q", w="W", body=body).replace("[layer]", "W = DequantizeLinear(v, step) [layer]")
    given = model_from_text(text, v=np.rint(weights(7, 5, axis=1) / step).astype(np.int8), step=step, zero=np.int8(0))

    def distance(outputs, reference):
        return -float(np.abs(outputs["t"] * step - reference["t"]).mean())

    correction = correct(model, samples(40, 7), quantized=given, metric=distance)
    assert correction.method != "none"
    assert str(correction.scores["none"]).startswith("metric -")
    with pytest.raises(ValueError, match="or give a metric$"):
        correct(model, samples(40, 7), quantized=given)


def failing(outputs, _reference):
    return outputs["logits"]


def failing_with_runs(run):
    return run(np.zeros((1, 9), np.float32))


def out_of_memory(*_):
    raise MemoryError


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (failing, RuntimeError, r"^metric: failing failed: KeyError: 'logits'$"),
        (lambda *_: 1 / 0, RuntimeError, r"^metric: .*<lambda> failed: ZeroDivisionError: division by zero$"),
        (failing_with_runs, RuntimeError, "^metric: failing_with_runs failed: .*9"),
        (lambda run: run({"z": np.zeros((1, 7))})["y"], ValueError, "^metric: it ran z, the model's inputs are x$"),
        (out_of_memory, MemoryError, "^$"),
    ],
    ids=["sample", "lambda", "run", "inputs of run", "memory"],
)
def test_metrics_that_fail_are_named(metric, error, message):
    with pytest.raises(error, match=message) as caught:
        correct(classifier(), samples(16, 7), quant_params=PARAMS, metric=metric)
    assert (caught.value.__cause__ is None) == (error is not RuntimeError)
