"""Pages about results, as a browser shows them."""

import base64
import re

import pytest

from biascorr.report.html import save_page
from chromium import PATH, chromium
from report_records import HOSTILE, correction, equalization

pytestmark = pytest.mark.skipif(PATH is None, reason="Chromium is not installed")

LAYERS = {"one": 1, "some": 60, "many": 2000}

OVERFLOWING = """[...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll, .visually-hidden')
    && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"""

CONTRASTS = """(() => {
    const channels = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = color => channels(color).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
    const opaque = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (color !== 'rgba(0, 0, 0, 0)') return color;
        }
        return 'rgb(255, 255, 255)';
    };
    const found = {};
    for (const element of document.querySelectorAll('main :is(h1, h2, h3, p, dt, dd, th, td, span, figcaption, text)')) {
        const style = getComputedStyle(element);
        const pair = [light(element instanceof SVGElement ? style.fill : style.color), light(opaque(element))];
        const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        if (element.textContent.trim() && ratio < 4.5) found[element.outerHTML.slice(0, 80)] = ratio;
    }
    return found;
})()"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=[*LAYERS, "equalization"])
def name(request, browser, tmp_path_factory):
    """The name of a page, which is shown."""
    name = request.param
    record = equalization(60) if name not in LAYERS else correction(LAYERS[name], equalization=equalization(LAYERS[name]))
    path = tmp_path_factory.mktemp("pages") / f"{name}.html"
    save_page(record, path)
    browser.look()
    browser.open(path)
    return name


@pytest.mark.usefixtures("name")
def test_nothing_is_wrong_and_nothing_is_fetched(browser):
    said = [each for each in browser.events if each["method"].startswith(("Log.", "Runtime.console", "Runtime.exception"))]
    requests = [each["params"]["request"]["url"] for each in browser.events if each["method"] == "Network.requestWillBeSent"]
    assert said == []
    assert len(requests) == 1
    assert browser.evaluate("document.compatMode") == "CSS1Compat"
    assert browser.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") != "none"  # the style is in effect
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    assert browser.evaluate("[...document.querySelectorAll('.scroll')].every(each => each.tabIndex === 0)")


def test_all_layers_are_there(name, browser):
    layers = LAYERS.get(name, 0)
    assert browser.evaluate("document.querySelectorAll('table.layers tbody tr').length") == layers
    for chart in ("network", "shifts"):
        assert browser.evaluate(f"document.querySelectorAll('svg[aria-labelledby^={chart}] .mark').length") == layers


@pytest.mark.parametrize("name", ["some"], indirect=True)
@pytest.mark.usefixtures("name")
def test_names_are_text(browser):
    shown = browser.evaluate("[...document.querySelectorAll('table.layers th bdi')].map(each => each.textContent)")
    assert f"{HOSTILE[0]} 1" in shown
    assert f"{HOSTILE[8]} 25" in shown
    assert max(map(len, shown)) <= 100


def test_the_page_never_scrolls_sideways(name, browser):
    for width in [390] if name == "many" else [320, 390, 1280]:
        browser.look(width=width)
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate(OVERFLOWING) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["some", "equalization"], indirect=True)
@pytest.mark.usefixtures("name")
def test_text_stands_out_in_light_and_dark(scheme, browser):
    browser.look(scheme=scheme)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 64) == (scheme == "dark")
    assert browser.evaluate(CONTRASTS) == {}


@pytest.mark.parametrize("name", ["some", "equalization"], indirect=True)
@pytest.mark.usefixtures("name")
def test_it_is_printed_whole_and_light(browser):
    browser.look(scheme="dark", media="print", width=794)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollHeight > each.clientHeight + 1).length"
    assert browser.evaluate(hidden) == 0
    browser.look()
    content = base64.b64decode(browser.do("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 1
