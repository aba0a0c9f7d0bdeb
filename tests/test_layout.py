"""The layout of the package: folders import what is below them, adapters import graph/ alone, the core needs numpy alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "biascorr"

ARRAYS = "array interface"
BELOW = {
    ARRAYS: set(),
    "graph": {ARRAYS},
    "report": {"graph", ARRAYS},
    "adapters": {"graph", ARRAYS},
    "calibration": {"graph", ARRAYS},
    "sweep": {"calibration", "graph", ARRAYS},
    "equalization": {"adapters", "calibration", "graph", "report", ARRAYS},
    "correction": {"adapters", "calibration", "equalization", "graph", "report", "sweep", ARRAYS},
    "inspection": {"adapters", "calibration", "correction", "equalization", "graph", "report", "sweep", ARRAYS},
    "demo": {"adapters", "calibration", "correction", "graph", "report", ARRAYS},
    "cli": {"adapters", "calibration", "correction", "demo", "equalization", "graph", "inspection", "report", ARRAYS},
}
"""What each folder may import besides itself, lowest first."""

EXTRAS = {
    ".": {"dask", "typing_extensions"},  # the latter, which type checkers bring, is not imported
    "calibration": {"PIL"},
    "correction": {"distributed"},  # for its type alone
    "sweep": {"cloudpickle", "distributed"},
    "adapters/onnx": {"onnx", "onnxruntime", "google", "ml_dtypes"},
    "adapters/keras": {"keras", "tensorflow"},
    "adapters/tflite": {"ai_edge_litert", "flatbuffers"},
    "report": {"rich", "jinja2", "markupsafe", "matplotlib", "pandas"},
    "demo": {"onnx", "matplotlib", "PIL"},
    "cli": {"distributed", "typer", "rich", "tomli"},
}
"""What each folder may import of what an extra brings."""

FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py") or path.parent != PACKAGE
)


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ARRAYS


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a file imports, those inside functions among them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" if node.module == "biascorr" else node.module for alias in node.names)


def folder_imported(module: str) -> str | None:
    """The folder of this package that a module is in; None for modules of others."""
    name, *rest = module.split(".")
    if name != "biascorr":
        return None
    return rest[0] if rest and (PACKAGE / rest[0]).is_dir() else ARRAYS


def test_every_folder_has_its_place():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(BELOW) - {ARRAYS}


def test_what_is_below_is_below_only():
    order = list(BELOW)
    assert all(order.index(lower) < order.index(folder) for folder, below in BELOW.items() for lower in below)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    folder = folder_of(path)
    imported = {folder_imported(module) for module in imports_of(path)} - {None, folder}
    assert imported <= BELOW[folder]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_folder_of_an_extra_imports_it(path):
    others = {module.split(".")[0] for module in imports_of(path)} - {"biascorr"} - sys.stdlib_module_names
    folder = path.parent.relative_to(PACKAGE).as_posix()
    assert others - {"numpy"} <= EXTRAS.get(folder, set())


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "adapters").glob("*/*.py")), ids=lambda path: path.parent.name + "/" + path.name
)
def test_an_adapter_imports_no_other(path):
    shared = "biascorr.adapters.frameworks"  # what tells them apart
    modules = [module for module in imports_of(path) if module.startswith("biascorr.adapters") and module != shared]
    assert all(module.startswith(f"biascorr.adapters.{path.parent.name}") for module in modules)
