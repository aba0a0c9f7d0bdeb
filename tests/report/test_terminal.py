"""Tables for the terminal."""

from biascorr.graph.reasons import LayerReport, ReasonCode
from biascorr.report.terminal import table_from_left, table_from_report


def cells_of(table):
    return [[str(cell) for cell in column.cells] for column in table.columns]


def test_reasons_that_differ_by_a_name_or_number_share_a_row():
    left = {
        "conv 1": (ReasonCode.NEXT_LAYER(layer="conv[2]", reason=ReasonCode.WEIGHTS_SHARED()),),
        "conv 2": (ReasonCode.NEXT_LAYER(layer="/a:0", reason=ReasonCode.WEIGHTS_SHARED()),),
        "conv 3": (ReasonCode.OTHER_CHANNELS(layer="/a:0"),),
        "conv 4": (ReasonCode.LITTLE_GAIN(operations="act", bits=0.12),),
        "conv 5": (ReasonCode.LITTLE_GAIN(operations="act", bits=0.07),),
        "conv 6": (ReasonCode.WEIGHTS_INFINITE(),),
    }
    table = table_from_left(left)
    counts, reasons, names = cells_of(table)
    assert counts == ["2", "1", "2", "1"]
    assert reasons == [
        "followed by ...: its weights are used elsewhere too",
        "followed by /a:0, which reads other channels",
        "act would need a bound for each channel, to gain ... bits",
        "its weights are not finite",
    ]
    assert names == ["conv 1, conv 2", "conv 3", "conv 4, conv 5", "conv 6"]


def test_several_reasons_of_one_layer_are_one_row():
    high_bias = ReasonCode.HIGH_BIAS_STAYS(reason=ReasonCode.READS_PADDING(layer="b"))
    other = ReasonCode.HIGH_BIAS_STAYS(reason=ReasonCode.READS_PADDING(layer="c"))
    left = {"a": (ReasonCode.IS_OUTPUT(), high_bias), "d": (ReasonCode.IS_OUTPUT(), other), "e": (ReasonCode.IS_OUTPUT(),)}
    counts, reasons, names = cells_of(table_from_left(left))
    assert counts == ["2", "1"]
    assert reasons[0] == (
        "its output is an output of the model; its high bias stays: ... reads padding too, which would be shifted"
    )
    assert names == ["a, d", "e"]


def test_names_are_not_read_as_markup():
    report = [LayerReport("[red]conv[/red]", "Conv", "mean", 4, 0.25, 0.0, (), 12.34, None)]
    columns = cells_of(table_from_report(report))
    assert columns[0] == ["[red]conv[/red]"]
    assert columns[2:6] == [["mean"], ["4"], ["0.25"], ["12.3"]]


def test_a_reason_is_data():
    reason = ReasonCode.BIAS_SATURATES(dtype="int32", count=2, channels=8)
    assert (reason.code, dict(reason.arguments)) == (ReasonCode.BIAS_SATURATES, {"dtype": "int32", "count": 2, "channels": 8})
    assert str(reason) == "int32 bias saturates in 2 of 8 channels"
    assert (
        LayerReport("a", "Conv", reasons=(ReasonCode.BIAS_ADDED(), reason)).reason == f"it had no bias; one was added; {reason}"
    )
