"""Runs what pages show: files, Python blocks and commands, in the order in which they stand.

    python tests/pages.py FOLDER PAGE... [--write]

Each page has a new folder of its own in FOLDER, with what the first one left, which is tutorial.md. Prints {page: what failed}
as JSON. With --write, what commands print is not compared with what is shown, but written there.

Commands run in this process too, and leave handlers of signals and the like behind: so this is a process of its own.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import textwrap
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_METHODS = re.compile(r"\b(equalized, )?(squared|activation|iterative|empirical|mean|hybrid|analytical)( 0\.5)?( shrunk)?\b")
_NUMBERS = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """What is between two fences; a title is the name of the file that it is."""

    language: str
    title: str | None
    text: str

    @property
    def is_run(self) -> bool:
        is_doctest = self.text.lstrip().startswith(">>>")  # which pytest runs
        return self.language in ("console", "python") and not is_doctest


def blocks_of(page: Path) -> Iterator[Block]:
    return map(_block, _FENCE.finditer(page.read_text(encoding="utf-8")))


def run_page(page: Path, names: dict[str, Any], *, is_written: bool = False) -> None:
    """Runs all blocks of a page in the current folder, its Python with these names.

    What commands print is compared with what is shown below them, or is written there.
    """

    def run(found: re.Match[str]) -> str:
        block = _block(found)
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.is_run and block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.is_run:
            parts = [(command, shown, _printed(command)) for command, shown in _commands(block.text)]
            if is_written:
                return "\n".join(["```console", *(f"$ {command}\n{printed}".rstrip() for command, _, printed in parts), "```"])
            for command, shown, printed in parts:
                _check_printed(command, shown, printed)
        return found[0]

    text = _FENCE.sub(run, page.read_text(encoding="utf-8"))
    if is_written:
        page.write_text(text, encoding="utf-8")


def _block(found: re.Match[str]) -> Block:
    return Block(found["language"], found["title"], textwrap.dedent(found["text"]))


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands after a $, and what is shown below them."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command = re.match(r"(?:.*\\\n)*.*", part)
        assert command is not None
        yield command[0], part[command.end() + 1 :]


def _check_printed(command: str, shown: str, printed: str) -> None:
    """Every line that the page shows is there, but for numbers, and for methods that may be of equal worth."""
    found = set(_essence(printed))
    missing = [line for line in _essence(shown) if line not in found]
    assert not missing, "\n".join([f"$ {command}", printed, "has not:", *missing])


def _essence(text: str) -> list[str]:
    lines = (_NUMBERS.sub("#", _METHODS.sub("METHOD", line)) for line in text.splitlines())
    return [re.sub(r"[\s─━┄-]+", " ", line).strip() for line in lines if line.strip() not in ("", "...")]


def _printed(command: str) -> str:
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    output = io.StringIO()
    before = sys.argv, warnings.formatwarning
    code: object = 0
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if program == "python":
                sys.argv = arguments
                runpy.run_path(arguments[0], run_name="__main__")
            else:
                assert program == "biascorr", command
                from biascorr.cli.app import app

                app(arguments, prog_name="biascorr")
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv, warnings.formatwarning = before
            tempfile.tempdir = None
    assert not code, f"$ {command}\n{output.getvalue()}\nends with {code}"
    return output.getvalue()


def names_for(page: str) -> dict[str, Any]:
    """What a page takes for granted: arrays, and files in the current folder, most of them left there by the tutorial."""
    import numpy as np
    import onnx
    from PIL import Image

    if page == "tutorial.md":
        return {}
    paths = sorted(Path("images").iterdir())
    samples = np.stack([np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / 255 for path in paths])
    if page == "../README.md":
        import biascorr

        np.savez("samples.npz", image=samples)
        weights = np.random.default_rng(0).normal(size=(1, 1, 4, 2))
        step = biascorr.Quantization(scale=4.0)
        fakes = {"fake_quantized_weights": biascorr.fake_quantize(weights, step), "bias": np.zeros(2)}
        return {"samples": samples, "weights": weights, "quantization": step, "codes": np.ones((1, 2, 2, 4), np.int8), **fakes}
    if page == "migration/afe.md":
        weights = np.random.default_rng(0).normal(size=(1, 1, 4, 1, 2))
        codes = [np.ones((1, 2, 2, 4), np.int8)]
        fakes = {"weights": weights, "fake_quantized_weights": weights.round(1)}
        return {"calibration_input": codes, "quantization": types.SimpleNamespace(scale=2.0, zero_point=1), **fakes}
    if page == "reference/data.md":
        shutil.copytree("images", "photos")
        return {}
    if page == "how-to/decoders.md":
        tables = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
        text = """<ir_version: 8, opset_import: ["" : 17]>
            network (int64[B,T] input_ids, int64[B,T] attention_mask, float[B,2,P,8] past_key) => (float[B,T,64] logits)
            { e = Gather(t0, input_ids) [first] h = MatMul(e, t1) r = Relu(h) [head] logits = MatMul(r, t2) }"""
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(table, f"t{k}") for k, table in enumerate(tables))
        onnx.save(model, "decoder.onnx")
        return {"np": np, "tokens": np.random.default_rng(1).integers(0, 64, (16, 20))}
    return {"samples": samples}


NEEDS = {
    "how-to/nncf.md": "nncf",
    "how-to/quark.md": "quark",
    "how-to/decoders.md": "onnx_ir",  # which the quantizer of onnxruntime imports
}
"""Packages that are not installed for the tests: with `make quality`, or by hand."""


def main(folder: str, *pages: str, is_written: bool = False) -> None:
    failed = {}
    for number, page in enumerate(pages):
        place = Path(folder, str(number))
        if number:
            shutil.copytree(
                Path(folder, "0"), place, ignore=shutil.ignore_patterns("corrected*", "best*", "report*", "training")
            )
        else:
            place.mkdir(exist_ok=True)
        os.chdir(place)
        if page in NEEDS and importlib.util.find_spec(NEEDS[page]) is None:
            failed[page] = f"skipped: {NEEDS[page]} is not installed"
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
                run_page((DOCS / page).resolve(), names_for(page), is_written=is_written)
        except BaseException:
            failed[page] = traceback.format_exc() + errors.getvalue()[-2000:]
    print(json.dumps(failed))


if __name__ == "__main__":
    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    main(*arguments, is_written=arguments != sys.argv[1:])
