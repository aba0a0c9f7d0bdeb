"""Records as a terminal shows them."""

import io
import re

import pytest
from rich.console import Console

from biascorr.graph.reasons import LayerReport, ReasonCode
from biascorr.report.records import layer_record, reason_record
from biascorr.report.terminal import render
from report_records import correction, equalization, reason


def shown(record, width=80, *, is_terminal=False, **options):
    text = io.StringIO()
    render(record, Console(file=text, width=width, color_system=None, force_terminal=is_terminal, _environ={}), **options)
    return text.getvalue().splitlines()


def below(title, lines):
    """The rows of a table, below its title and its headings."""
    start = next(number for number, line in enumerate(lines) if title in line)
    return lines[start + 2 :]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("record", [correction(60, equalization=equalization(60)), equalization(60)], ids=["both", "one"])
def test_no_line_is_wider_than_the_terminal(record, all_rows, width):
    lines = shown(record, width, is_terminal=True, all_rows=all_rows, output="out.onnx")
    assert max(map(len, lines)) <= width
    assert not re.search(r"[^\S ]|[\x00-\x1f\x7f-\x9f\u2028\u202e\u2066\u200f\ud800-\udfff]", "".join(lines))
    assert "-> out.onnx" in lines[-1]


def test_the_layers_that_matter_are_shown_and_all_where_that_is_asked_for():
    record = correction(60)
    few, every = shown(record), shown(record, all_rows=True)
    assert any("10 of 60 layers: those that changed most (--verbose: all)" in line for line in few)
    assert sum("Conv" in line for line in few) == 10
    assert sum("Conv" in line for line in every) == sum(each["operator"] == "Conv" for each in record["layers"])
    gains = {each["name"]: abs(each["sqnr_after"] - each["sqnr_before"]) for each in record["layers"] if each["sqnr_after"]}
    for name in sorted(gains, key=gains.get)[-3:]:
        assert any(line.startswith(name[:8]) for line in few) or not name.isprintable()


def test_last_line_is_the_result():
    record = correction(3) | {"equalization": None, "seconds": 12.7, "is_simulated": False, "is_held_out": True}
    record |= {"scored_samples": 16, "method": "activation 0.5"}
    taken = next(each for each in record["scores"] if each["is_taken"])
    taken["sqnr"], record["scores"][0]["sqnr"] = 48.48, 25.97
    result = "25.97 -> 48.48 dB on 16 held-out samples, activation 0.5, 3 of 3 layers, 12.7 s"
    assert shown(record, 120, is_terminal=True, output="corrected.onnx")[-1] == f"{result} -> corrected.onnx"
    assert shown(record, 60, output="corrected.onnx")[-1] == f"{result} -> corrected.onnx"
    long = f"{'folder/' * 20}corrected.onnx"
    assert shown(record, len(result), is_terminal=True, output=long)[-2:] == [result, f"-> {long}"]


def test_a_simulated_run_says_so_first_and_last():
    lines = shown(correction(3) | {"equalization": None, "is_simulated": True}, 150, output="out.onnx")
    assert lines[0].startswith("simulated quantization: ")
    assert lines[-1].startswith("simulated: ")
    assert lines[-1].endswith("-> out.onnx; a float model, quantize it now")


def layer(name, *reasons):
    return layer_record(LayerReport(name, "Conv", reasons=reasons))


def left(layers):
    return shown(correction(1) | {"equalization": None, "layers": layers, "scores": [], "notes": []}, 150)


def test_reasons_that_differ_by_a_name_or_number_share_a_row():
    rows = below(
        "left as they are",
        left(
            [
                layer("conv 1", ReasonCode.NEXT_LAYER(layer="conv[2]", reason=ReasonCode.WEIGHTS_SHARED())),
                layer("conv 2", ReasonCode.NEXT_LAYER(layer="/a:0", reason=ReasonCode.WEIGHTS_SHARED())),
                layer("conv 3", ReasonCode.OTHER_CHANNELS(layer="/a:0")),
            ]
        ),
    )
    assert re.split(r"  +", rows[0].strip()) == ["2", "followed by ...: its weights are used elsewhere too", "conv 1, conv 2"]
    assert re.split(r"  +", rows[1].strip()) == ["1", "followed by /a:0, which reads other channels", "conv 3"]


def test_names_are_not_read_as_markup():
    lines = left([layer("[red]conv[/red]", ReasonCode.WEIGHTS_NOT_FINITE())])
    assert any("[red]conv[/red]" in line for line in lines)


VERDICTS = {
    "worse": {"sqnr": {"mean": -1.0, "error": 0.1}},
    "gain not sure": {"sqnr": {"mean": 1.0, "error": 1.1}},
    "KL not better": {"sqnr": {"mean": 9.0, "error": 0.1}, "divergence": {"mean": -0.1, "error": 0.1}},
    "less": {"sqnr": {"mean": 2.0, "error": 0.1}},
    "not surely better": {"sqnr": {"mean": 9.0, "error": 0.1}},
    "not scored": {"sqnr": {"mean": None, "error": None}},
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_why_a_candidate_was_not_taken(verdict):
    score = {"sqnr": 30.0, "divergence": None, "metric": None, "sqnr_of_samples": [], "is_taken": False}
    scores = [
        score | {"candidate": "none", "gains": {}},
        score | {"candidate": "other", "gains": VERDICTS[verdict]},
        score | {"candidate": "mean", "gains": {"sqnr": {"mean": 3.0, "error": 0.1}}, "is_taken": True},
    ]
    lines = shown(correction(1) | {"equalization": None, "scores": scores, "deployed": [], "method": "mean"})
    assert next(line for line in lines if line.startswith("other")).rstrip().endswith(verdict)
    assert next(line for line in lines if line.startswith("mean")).rstrip().endswith("taken")


def test_a_model_of_which_nothing_could_be_corrected_says_why():
    why = reason("RECURRENT", "it is recurrent, which is not corrected")
    layers = [{**correction(1)["layers"][0], "method": None, "reasons": [why]}]
    lines = shown(correction(1) | {"equalization": None, "layers": layers, "scores": [], "notes": []}, output="out.onnx")
    assert "nothing could be corrected: it is recurrent, which is not corrected" in lines[-3:-1]


def test_a_reason_is_data():
    reason = ReasonCode.BIAS_SATURATES(dtype="int32", count=2, channels=8)
    assert (reason.code, dict(reason.arguments)) == (ReasonCode.BIAS_SATURATES, {"dtype": "int32", "count": 2, "channels": 8})
    assert reason_record(reason)["text"] == "int32 bias saturates in 2 of 8 channels"
    assert (
        LayerReport("a", "Conv", reasons=(ReasonCode.BIAS_ADDED(), reason)).reason == f"it had no bias; one was added; {reason}"
    )


def test_the_layers_of_a_model_whose_channels_spread_most_are_shown():
    known = {
        "operator": "Conv",
        "is_correctable": True,
        "reasons": [],
        "dtype": "float32",
        "weight_min": -1.0,
        "weight_max": 1.0,
    }
    unknown = dict.fromkeys(("bits", "scales", "weight_sqnr", "chain_bits"))
    layers = [{"name": f"layer{k:02}", "channel_bits": float(k), **known, **unknown} for k in range(12)]
    empty = dict.fromkeys(("inputs", "outputs", "chains", "notes"), ()) | dict.fromkeys(("quantizer", "producer", "size"))
    record = {"kind": "inspection", "format": "ONNX", "is_quantized": False, "layers": layers, **empty}
    assert re.findall(r"layer\d+", "\n".join(shown(record))) == [f"layer{k:02}" for k in range(2, 12)]
