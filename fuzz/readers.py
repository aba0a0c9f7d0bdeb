"""Fuzzes what reads files, guided by coverage (atheris): `make fuzz TARGET=onnx SECONDS=600`.

A process reads file after file. What is raised and may not be is written to a folder, once for each place; a process that
crashes or does not come to an end leaves the file that it read, and another process goes on. At the end there are the numbers.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
TARGETS = ("config", "keras", "npy", "npz", "onnx", "tflite")
MEGABYTES, HANG = 4096, 60
"""More memory or more seconds than these are a finding."""


def fuzz(target: str, seconds: int, folder: Path) -> int:
    """Runs processes one after the other; returns how many files were lost."""
    shutil.rmtree(folder / "findings", ignore_errors=True)
    (folder / "findings").mkdir(parents=True)
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "lost").write_text("")
    end, executions, edges = time.monotonic() + seconds, 0, 0
    while (left := round(end - time.monotonic())) > 0:
        command = [sys.executable, __file__, target, "--seconds", str(left), "--folder", str(folder), "--child"]
        said = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False).stderr.decode(
            errors="replace"
        )
        (folder / "log.txt").write_text(said)
        counts = [int(found) for found in re.findall(r"^#(\d+)\s", said, re.MULTILINE)]
        if not counts:
            raise SystemExit(f"{said[-2000:]}\nnothing was run")
        executions += max(counts)
        edges = max(edges, *map(int, re.findall(r" cov: (\d+)", said)), 0)
    findings = sorted(
        each.name for each in (folder / "findings").iterdir() if each.suffix != ".txt" and not each.name.startswith("slow-")
    )
    ended = sum(each.startswith(("crash-", "oom-", "timeout-")) for each in findings)
    lost = ended + len((folder / "lost").read_text().splitlines())
    print(f"{target}: {executions} files in {seconds} seconds, {edges} edges, {lost} lost", *findings, sep="\n  ")
    return lost


def _run(target: str, seconds: int, folder: Path) -> None:
    """One process."""
    import atheris

    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(include=["biascorr"]):
        import biascorr.adapters.onnx.network
        import biascorr.cli.app
        import biascorr.correction.correct
        import biascorr.inspection.inspect

        if target == "keras":
            import biascorr.adapters.keras.network
        if target == "tflite":
            import biascorr.adapters.tflite.network  # noqa: F401
    import hostile

    reader = hostile.READERS[target]
    if target == "tflite":
        hostile.try_in_forks()
    for k, seed in enumerate(reader.seeds()):
        (folder / "corpus" / f"seed_{k}").write_bytes(seed)

    def test(content: bytes) -> None:
        error = reader.finding(content)
        if error is not None:
            _keep(content, error, folder)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = reader.changed(content, rng) if rng.random() < 0.7 else atheris.Mutate(content, most)
        return changed[:most]

    most = 4 * max(map(len, reader.seeds()))
    limits = [f"-max_total_time={seconds}", f"-timeout={HANG}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={most}"]
    options = ["-len_control=0", f"-artifact_prefix={folder / 'findings'}/"]
    atheris.Setup([sys.argv[0], *limits, *options, str(folder / "corpus")], test, custom_mutator=mutate)
    atheris.Fuzz()


def _keep(content: bytes, error: BaseException, folder: Path) -> None:
    """The first file for each place that raises."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if f"biascorr{os.sep}" in each.filename]
    place = f"{Path(frames[-1].filename).stem}-{frames[-1].lineno}" if frames else "nowhere"
    file = folder / "findings" / f"{type(error).__name__}-{place}"
    with (folder / "lost").open("a") as lost:
        lost.write(f"{file.name}\n")
    if not file.exists():
        file.write_bytes(content)
        file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--folder", type=Path, help="where files go that were worth keeping: build/fuzz/TARGET")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = (given.folder or Path("build") / "fuzz" / given.target).resolve()
    if given.child:
        _run(given.target, given.seconds, folder)
    sys.exit(fuzz(given.target, given.seconds, folder) > 0)


if __name__ == "__main__":
    main()
