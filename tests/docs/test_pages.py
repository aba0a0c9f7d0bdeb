"""The examples of the README and of the pages run, links lead somewhere, and errors that are explained exist."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from biascorr.graph.reasons import ReasonCode
from pages import blocks_of

PROJECT = Path(__file__).parent.parent.parent
DOCS = PROJECT / "docs"
RUNNER = PROJECT / "tests" / "pages.py"
RUN = [
    "tutorial.md",
    "../README.md",
    "how-to/onnxruntime.md",
    "how-to/nncf.md",
    "how-to/quark.md",
    "how-to/cluster.md",
    "how-to/decoders.md",
    "migration/afe.md",
    "reference/command-line.md",
    "reference/data.md",
]
"""Pages with Python or commands besides doctests; the tutorial leaves its files for the others."""

WITH_KERAS = ["how-to/keras.md", "how-to/tflite.md", "migration/aimet.md"]
"""Pages that tests/adapters/keras/test_pages.py runs."""

MARKDOWN = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """What failed, by page. They run in one process: most of the time is spent importing."""
    command = [sys.executable, RUNNER, tmp_path_factory.mktemp("pages"), *RUN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("page", RUN)
def test_examples_run_as_they_stand(page, failed):
    if failed.get(page, "").startswith("skipped: "):
        pytest.skip(failed[page].removeprefix("skipped: "))
    assert page not in failed, failed[page]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_to_files_that_are_there(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def texts_of(path: Path) -> list[str]:
    """The string constants of a module; what is put into one is \\0."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def messages_of_troubleshooting() -> list[str]:
    rows = re.findall(r"^\| (`.*?`.*?) \|", (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


@pytest.fixture(scope="module")
def package():
    texts = [text for path in sorted((PROJECT / "python").rglob("*.py")) for text in texts_of(path)]
    return "\n".join(texts)


@pytest.mark.parametrize("message", messages_of_troubleshooting())
def test_each_error_that_is_explained_is_one_of_the_package(message, package):
    parts = [part.strip(" ()") for part in message.split("...")]
    assert any(parts)
    assert all(part in package for part in parts if part), message


def test_every_page_with_code_is_run():
    with_code = {page for page in MARKDOWN if any(block.is_run for block in blocks_of(page))}
    assert with_code == {(DOCS / page).resolve() for page in (*RUN, *WITH_KERAS)}


def test_links_of_the_readme_are_absolute_where_the_address_of_the_project_is_known():
    """The README is the package's page on an index, where relative links lead nowhere."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = project.get("urls", {}).get("Repository")
    targets = re.findall(r"\]\((?!#)([^)\s]+)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    is_relative = [not target.startswith("https://") for target in targets]
    assert any(is_relative) is (base is None)
    assert base is None or any(target.startswith(base) for target in targets)


def test_each_reason_is_explained():
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", (DOCS / "reference" / "layers.md").read_text(encoding="utf-8")))
    assert {code.name for code in ReasonCode} <= named


def test_pages_that_are_named_elsewhere_are_there():
    files = [
        PROJECT / "Makefile",
        PROJECT / "CHANGELOG.md",
        *(PROJECT / "python").rglob("*.py"),
        *(PROJECT / "benches").rglob("*.py"),
    ]
    named = {page for file in files for page in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))}
    moved = re.findall(r"The pages have moved: .*?\n\n", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), re.S)
    assert [page for page in sorted(named) if not (PROJECT / page).exists() and page not in moved[0]] == []
