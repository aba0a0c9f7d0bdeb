"""What results say of themselves: text, JSON, rows."""

import io
import json
import re
import sys

import numpy as np
import onnx.parser
import pytest

import report_records
from biascorr import QuantParams, correct, equalize
from biascorr.report.notebook import excerpt
from biascorr.report.plots import figure

RELU_NETWORK = """
<ir_version: 8, opset_import: ["" : 17]> network (float[N,1] x) => (float[N,1] y)
<float[1,2] w1 = {8, 1}, float[2,1] w2 = {2, 4}> { [a] h = MatMul(x, w1)  r = Relu(h)  [b] y = MatMul(r, w2) }
"""


@pytest.fixture(scope="module")
def correction():
    samples = np.random.default_rng(0).normal(1.0, 1.0, (40, 1)).astype(np.float32)
    return correct(onnx.parser.parse_model(RELU_NETWORK), samples, quant_params=QuantParams(weight_bits=3), equalize=True)


@pytest.fixture(scope="module")
def equalization():
    return equalize(onnx.parser.parse_model(RELU_NETWORK), np.ones((4, 1), np.float32))


@pytest.fixture(params=["correction", "equalization"])
def result(request):
    return request.getfixturevalue(request.param)


def test_a_result_shows_itself_in_two_lines(result):
    assert len(repr(result).splitlines()) == 2
    assert repr(result).startswith(type(result).__name__)


def test_a_summary_is_plain_text_of_80_columns(result):
    lines = result.summary().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.summary()


def test_a_record_survives_json_unchanged(result):
    def forbidden(constant):
        raise AssertionError(constant)

    assert json.loads(result.to_json(), parse_constant=forbidden) == result.to_dict()
    assert len(result.to_json(indent=None).splitlines()) == 1


def test_a_correction_tells_what_it_was_made_of(correction):
    record = correction.to_dict()
    assert (record["samples"], record["scored_samples"], record["is_held_out"]) == (40, 10, True)
    assert record["seconds"] > 0
    assert len(record["data_digest"]) == 64
    assert {"python", "numpy", "onnx", "onnxruntime"} <= set(record["versions"])
    assert record["files"] is None
    assert record["command"] is None
    taken = [each["candidate"] for each in record["scores"] if each["is_taken"]]
    assert taken == [record["method"]] == [correction.method]
    assert all(len(each["sqnr_of_samples"]) == 10 for each in record["scores"])


def test_paths_that_were_given_are_named(tmp_path):
    onnx.save(onnx.parser.parse_model(RELU_NETWORK), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.ones((4, 1), np.float32))
    files = equalize(tmp_path / "net.onnx", tmp_path / "x.npy").files
    assert files["data"] == str(tmp_path / "x.npy")
    assert set(files.values()) == {str(tmp_path / "net.onnx"), str(tmp_path / "x.npy")}


def test_the_worst_channels_are_those_with_the_largest_shifts():
    weights = np.array([[0.1, 3.1, 0.3, 2.2, 0.24, 0.44, 1.9]], np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> network (float[N,1] x) => (float[N,7] y) { [a] y = MatMul(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    result = correct(model, np.full((8, 1), 2, np.float32), quant_params=QuantParams("tf", weight_bits=3), method="mean")
    layer = result.report[0]
    found = dict(layer.worst_channels)
    assert len(found) == 5
    assert list(map(abs, found.values())) == sorted(map(abs, found.values()), reverse=True)
    applied = np.sort(np.abs(result.network.layers[0].bias))[::-1]
    np.testing.assert_allclose(np.abs(list(found.values())), applied[:5], rtol=1e-6)


def test_ranges_of_equalized_layers_are_those_before_and_after(equalization):
    (chain,) = equalization.to_dict()["chains"]
    first, second = chain["ranges"]
    assert first == {"layer": "a", "channels": 2, "before": [8.0, 1.0], "after": pytest.approx([4.0, 2.0])}
    assert second == {"layer": "b", "channels": 1, "before": [4.0], "after": pytest.approx([4.0])}


def test_ranges_of_many_channels_are_some_of_them():
    size = 200
    factors = np.random.default_rng(0).uniform(0.1, 10.0, size).astype(np.float32)
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> network (float[N,1] x) => (float[N,1] y)
        { [a] h = MatMul(x, w1)  r = Relu(h)  [b] y = MatMul(r, w2) }""")
    for name, array in {"w1": factors[None], "w2": 1 / factors[:, None]}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (chain,) = equalize(model).to_dict()["chains"]
    first = chain["ranges"][0]
    assert first["channels"] == size
    assert len(first["before"]) == len(first["after"]) == 64
    assert first["before"] == sorted(first["before"], reverse=True)
    assert (first["before"][0], first["before"][-1]) == (factors.max(), factors.min())


def test_a_data_frame_has_a_row_for_each_layer(correction):
    pandas = pytest.importorskip("pandas")
    frame = correction.to_dataframe()
    assert list(frame["name"]) == [layer.name for layer in correction.report]
    kinds = {"channels": "Int64", "shift_before": "float64", "sqnr_after": "float64"}
    assert {column: str(frame[column].dtype) for column in kinds} == kinds
    assert "worst_channels" not in frame
    assert pandas.api.types.is_string_dtype(frame["reasons"]) or isinstance(frame["reasons"].dtype, pandas.CategoricalDtype)


def test_a_data_frame_of_an_equalization_says_what_was_done_to_each_layer(equalization):
    pytest.importorskip("pandas")
    frame = equalization.to_dataframe()
    assert list(frame["step"][frame["name"] == "a"]) == ["scaled"]
    assert list(frame.columns) == ["name", "step", "chain", "note"]


def test_a_data_frame_needs_pandas(correction, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="a data frame needs pandas: pip install pandas"):
        correction.to_dataframe()


def test_a_notebook_shows_a_small_table(result):
    found = result._repr_html_()
    assert found.startswith("<div>")
    assert found.endswith("</div>")
    assert "<table>" in found
    assert len(found) < 10_000


def test_names_in_a_notebook_are_text():
    record = report_records.equalization(60)
    found = excerpt(record)
    assert "<script" not in found
    assert "<img" not in found
    assert "<p>and 62 more</p>" in found
    assert "<script" not in excerpt(
        report_records.correction(3, scores=[report_records.score("<script>", np.ones(3), None, True)])
    )


def test_a_plot_has_all_layers_and_candidates(correction):
    pytest.importorskip("matplotlib")
    layers, scores = correction.plot().axes
    assert [len(line.get_xdata()) for line in layers.lines] == [len(correction.report)] * 2
    assert [label.get_text() for label in scores.get_yticklabels()] == ["uncorrected", *list(correction.scores)[1:]]


@pytest.mark.parametrize(
    "record", [report_records.correction(60), report_records.correction(0, scores=[]), report_records.equalization(60)]
)
def test_plots_of_any_record_can_be_drawn(record):
    pytest.importorskip("matplotlib")
    made = io.BytesIO()
    figure(record | {"method": "$\\nothing"}).savefig(made, format="svg")
    assert made.getvalue()


def test_plots_and_pages_name_what_they_need(correction, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "biascorr.report.html", raising=False)
    with pytest.raises(ImportError, match=re.escape('a plot needs matplotlib.figure: pip install "biascorr[report]"')):
        correction.plot()
    with pytest.raises(ImportError, match=re.escape('needs jinja2: pip install "biascorr[report]"')):
        correction.save_report(tmp_path / "out.html")


def test_arguments_of_saving_are_checked(correction, equalization, tmp_path):
    path = tmp_path / "saved.onnx"
    for save in (correction.save, equalization.save):
        with pytest.raises(TypeError, match="provenance: 'no', expected True or False"):
            save(path, provenance="no")
    for save in (correction.save, correction.save_report):
        with pytest.raises(TypeError, match="force: 1, expected True or False"):
            save(path, force=1)
        with pytest.raises(TypeError, match="path: NoneType, expected a path"):
            save(None)
    assert not path.exists()
