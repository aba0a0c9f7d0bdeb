"""Measures what correction does to a quantized .tflite file: how near its outputs for held-out samples come, and seconds.

    python benches/tflite_models.py FLOAT.tflite QUANTIZED.tflite SAMPLES HELD_OUT [--methods auto empirical] [--rival 1e-3]

SAMPLES correct, HELD_OUT are scored: .npy files with samples along the first axis, for files with one input and one sample at
once. They are real numbers, which integer inputs take in their own quantization; integer outputs are made real again. Rows are
QUANTIZED as it is given, and what each of `--methods` of `biascorr.correct` makes of it: bytes, which LiteRT runs with its
defaults (XNNPACK), one sample after the other.

SQNR is 10 log10(sum r^2 / sum (q - r)^2) in dB over all outputs and samples, r those of FLOAT by LiteRT; top-1 is the share of
rows along the last axis of outputs with the same greatest value. Seconds are those of the correction, imports left out; beside
them, what `auto` chose.

`--rival` has litert-tunner train the biases by the same samples, with FLOAT as the teacher, at each of these learning rates of
Adam: ten epochs, batches of eight, its other options as they are. It needs TensorFlow: pip install litert-tunner==0.3.0.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

import biascorr

Array = NDArray[Any]

EPOCHS, BATCH_SIZE = 10, 8
"""Of litert-tunner: more epochs take longer in proportion."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--methods", nargs="*", default=["auto"], help="of biascorr.correct")
    parser.add_argument("--rival", nargs="+", type=float, default=[], help="learning rates of litert-tunner")
    return parser.parse_args()


def run(content: bytes, samples: Array) -> list[list[Array]]:
    """The real outputs of a file for each sample."""
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    made = output_details(interpreter)
    outputs = []
    for sample in samples:
        interpreter.set_tensor(given["index"], codes(sample[None], given))
        interpreter.invoke()
        outputs.append([real(interpreter.get_tensor(each["index"]), each) for each in made])
    return outputs


def output_details(interpreter: Interpreter) -> list[dict[str, Any]]:
    """Outputs in the order of their names in the signature, where there is one: converters permute those of the file."""
    if not interpreter.get_signature_list():
        return interpreter.get_output_details()
    details = interpreter.get_signature_runner().get_output_details()
    return [details[name] for name in sorted(details)]


def codes(x: Array, tensor: dict[str, Any]) -> Array:
    """Real values as a tensor of the file holds them."""
    dtype, (scale, zero_point) = tensor["dtype"], tensor["quantization"]
    if not scale:
        return x.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max).astype(dtype)


def real(x: Array, tensor: dict[str, Any]) -> Array:
    scale, zero_point = tensor["quantization"]
    return (x.astype(np.float64) - zero_point) * scale if scale else x.astype(np.float64)


def scores(expected: list[list[Array]], found: list[list[Array]]) -> tuple[str, str]:
    """SQNR, and top-1 agreement."""
    signal = noise = 0.0
    equal = []
    for references, outputs in zip(expected, found, strict=True):
        for r, q in zip(references, outputs, strict=True):
            signal += float(np.square(r).sum())
            noise += float(np.square(q - r).sum())
            equal.append((r.argmax(axis=-1) == q.argmax(axis=-1)).ravel())
    sqnr = 10 * np.log10(signal / noise) if noise else np.inf
    return f"{sqnr:.2f}", f"{np.concatenate(equal).mean():.1%}"


def corrected(network: Path, quantized: Path, samples: Array, method: str) -> tuple[str, bytes]:
    """The method that corrected a file, and the result."""
    correction = biascorr.correct(network, samples, quantized=quantized, method=method)
    return correction.method, correction.model


def trained(network: Path, quantized: Path, samples: Array, learning_rate: float) -> tuple[str, bytes]:
    """The file with biases that litert-tunner trained."""
    import keras
    from litert_tunner import distillation, load_model, save_model

    keras.utils.set_random_seed(0)
    student, teacher = load_model(str(quantized)), load_model(str(network))
    distillation.prepare_for_finetuning(student, trainable_pattern=".*bias$")
    trainer = distillation.Trainer(student_model=student, teacher_model=teacher)
    trainer.compile(optimizer=keras.optimizers.Adam(learning_rate))
    trainer.fit(samples, epochs=EPOCHS, batch_size=BATCH_SIZE, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trained.tflite"
        save_model(student, str(path))
        return "", path.read_bytes()


def imported(options: argparse.Namespace) -> dict[str, Callable[..., tuple[str, bytes]]]:
    """The rows of the table: what changes a file, with all that is imported by it."""
    rows = {f"biascorr {method}": partial(corrected, method=method) for method in options.methods}
    if options.rival:
        import litert_tunner  # noqa: F401

        rows |= {f"litert-tunner, {rate:g}": partial(trained, learning_rate=rate) for rate in options.rival}
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)  # of methods that make outputs worse, which the table shows
    logging.disable(logging.WARNING)
    options = parse_options()
    samples, held_out = np.load(options.samples), np.load(options.held_out)
    expected = run(options.network.read_bytes(), held_out)
    table = Table(options.quantized.name, box=box.SIMPLE_HEAD)
    for heading in ("SQNR, dB", "top-1", "seconds", "chosen"):
        table.add_column(heading, justify="right")
    table.add_row("as given", *scores(expected, run(options.quantized.read_bytes(), held_out)))
    for name, change in imported(options).items():
        start = time.perf_counter()
        chosen, content = change(options.network, options.quantized, samples)
        seconds = f"{time.perf_counter() - start:.1f}"
        table.add_row(name, *scores(expected, run(content, held_out)), seconds, chosen)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
