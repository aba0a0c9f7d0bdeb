"""Pages about results, as they are written."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from biascorr import QuantParams, correct
from biascorr.inspection.compare import compare
from biascorr.report import charts
from biascorr.report.html import page, save_page
from networks import quantized, two_layers
from report_records import HOSTILE, correction, equalization, name_of

VOID = {"meta", "line", "circle", "rect", "path", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, which are nested as they have to be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


RECORDS = {
    "one layer": lambda: correction(1),
    "many layers": lambda: correction(60, equalization=equalization(60)),
    "no layers": lambda: correction(0),
    "nothing scored": lambda: correction(3, scores=[], scored_samples=0, method="none"),
    "equalization": lambda: equalization(9),
    "nothing equalized": lambda: equalization(9) | {"chains": [], "folds": [], "changes": [], "high_biases": [], "left": []},
    "of no kind that is known": lambda: {
        "kind": "other", "biascorr": "1", "models": [{"name": HOSTILE[0], "sqnr": None, "outputs": [{"name": "y"}]}], "n": 3
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_pages_are_well_formed_and_have_nothing_that_runs_or_loads(name):
    text = page(RECORDS[name]())
    found = Page(text)
    assert set(found.tags).isdisjoint(
        {"script", "img", "link", "iframe", "object", "base", "form", "foreignobject", "a", "use"}
    )
    assert found.tags.count("style") == 1
    assert not [key for key, _ in found.attributes if key.startswith("on") or key in ("href", "src", "style", "xlink:href")]
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)
    identifiers = [value for key, value in found.attributes if key == "id"]
    assert len(identifiers) == len(set(identifiers))
    for key, value in found.attributes:
        if key == "aria-labelledby":
            assert set(value.split()) <= set(identifiers)


def test_headings_and_charts_have_what_readers_of_screens_need():
    found = Page(page(correction(60, equalization=equalization(60))))
    assert found.tags.count("h1") == 1
    assert found.tags.count("svg") == found.tags.count("desc")
    assert ("lang", "en") in found.attributes


def test_numbers_and_names_are_there():
    record = correction(30)
    found = " ".join(Page(page(record)).text)
    for each in (
        f"{record['scores'][0]['sqnr']:.2f}",
        "activation 0.5",
        "--report out.html",
        "a" * 64,
        "backbone.0.conv",
        "+5.0 ± 0.7",
    ):
        assert each in found
    assert found.count("its bias is computed at run time") == 1 + sum(each["operator"] == "Gemm" for each in record["layers"])
    assert "{{ 7 * 7 }}" in found
    assert r"right\u202eto\u2066left\u200f" in found


def test_text_of_any_length_is_cut():
    assert len(page(correction(30, notes=["x" * 10**6] * 3))) < len(page(correction(30))) + 10_000


def test_numbers_that_are_missing_are_no_error():
    record = correction(4)
    for each in record["layers"]:
        each |= {"shift_before": None, "shift_after": None, "sqnr_before": None, "sqnr_after": None, "worst_channels": []}
    for each in record["scores"]:
        each |= {
            "sqnr": None,
            "sqnr_of_samples": [None] * 3,
            "gains": {"sqnr": {"mean": None, "error": None}} if each["gains"] else {},
        }
    assert "svg" not in Page(page(record)).tags


def test_a_correction_that_did_nothing_says_so():
    record = correction(3, method="none")
    for each in record["scores"]:
        each["is_taken"] = each["candidate"] == "none"
    text = " ".join(Page(page(record)).text)
    assert "The model is as it was." in text


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.html"
    save_page(correction(2), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        save_page(correction(3), path)
    assert path.read_bytes() == before
    save_page(correction(3), path, force=True)
    assert path.read_bytes() != before
    with pytest.raises(OSError, match="no such folder"):
        save_page(correction(2), tmp_path / "none" / "out.html")
    assert list(tmp_path.iterdir()) == [path]


def test_results_have_pages(tmp_path):
    x = np.random.default_rng(0).normal(size=(24, 3, 6, 6)).astype(np.float32)
    equalized = correct(two_layers(), x, quant_params=QuantParams(weight_bits=4), equalize=True)
    given = correct(two_layers(), x, quantized=quantized(two_layers(), [{"x": x[:1]}]))
    for number, result in enumerate((equalized, given, equalized.equalization)):
        result.save_report(tmp_path / f"{number}.html")
        found = Page((tmp_path / f"{number}.html").read_text(encoding="utf-8"))
        assert "svg" in found.tags
        assert "first" in {text.strip() for text in found.text}


def test_any_result_has_a_page(tmp_path):
    comparison = compare(two_layers(), {HOSTILE[0]: two_layers()}, np.ones((2, 3, 6, 6), np.float32))
    comparison.save_report(tmp_path / "out.html")
    found = " ".join(Page((tmp_path / "out.html").read_text(encoding="utf-8")).text)
    assert "Outputs of models" in found
    assert HOSTILE[0] in found


@pytest.mark.parametrize("low", [-1e9, -3.2, 0.0, 1e-9, 12.0])
@pytest.mark.parametrize("span", [0.0, 1e-9, 0.3, 7.0, 1e9])
def test_axes_hold_their_values_and_have_a_few_ticks(low, span):
    axis = charts.linear([low, low + span], 100.0, 0.0)
    assert 0.0 <= axis(low + span) <= axis(low) <= 100.0
    assert 2 <= len(axis.ticks()) <= 9
    room = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - room <= tick <= axis.high + room for tick in axis.ticks())


def test_logarithmic_axes_go_down_some_decades():
    axis = charts.logarithmic([0.0, 1e-30, 3e-3, 20.0], 100.0, 0.0)
    assert (axis.low, axis.high) == (-3, 2)
    assert axis(0.0) == axis(1e-30) == 100.0
    assert charts.logarithmic([], 0.0, 1.0).ticks()


def test_charts_of_thousands_of_layers_are_wider_but_not_endless():
    names = [name_of(k) for k in range(5000)]
    chart = charts.layers_chart(names, [(1.0, 2.0)] * 5000)
    assert int(re.search(r'width="(\d+)"', chart)[1]) <= 8000
    assert chart.count("<g ") == 5000
