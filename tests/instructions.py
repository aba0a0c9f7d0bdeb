"""Instructions that each kernel takes per element, as valgrind counts them: the same number however busy the machine is.

    make instructions    writes them to tests/instructions.json

The kernels run in the AVX2 tier: it is the highest that valgrind knows.
"""

import itertools
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

PROJECT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".json")
PROGRAM = PROJECT / "target" / "release" / "examples" / "instructions"
TIER = "avx2"
# It takes one option of a pattern: so these are two.
CALLGRIND = ("valgrind", "--tool=callgrind", "--toggle-collect=*measured*", "--dump-after=instructions::measured*")

# What a call takes whatever its size cancels in their difference. No sample of the program is larger than the smaller.
FEW, MANY = 1 << 19, 1 << 20


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BIASCORR_MAX_ISA": TIER}
    result = subprocess.run(
        [str(word) for word in command], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def build() -> None:
    features = ("--no-default-features", "--example", "instructions")
    run("cargo", "build", "--quiet", "--release", *features, "--target-dir", PROJECT / "target")


def cases() -> list[str]:
    return run(PROGRAM, "--list").stdout.split()


def tier(*tool: str) -> str:
    """The CPU tier of the program, as it is or inside a tool."""
    return run(*tool, PROGRAM, cases()[0], 1).stdout.split()[0]


def count(runs: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """Instructions of each run of a case with so many elements, and its elements."""
    with TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"  # callgrind numbers the file of each call
        result = run(*CALLGRIND, f"--callgrind-out-file={counts}", PROGRAM, *itertools.chain(*runs))
        assert counts.with_suffix(f".{len(runs)}").exists(), "callgrind found no function named measured"
        texts = [counts.with_suffix(f".{k}").read_text() for k in range(1, len(runs) + 1)]
    instructions = [int(re.search(r"^summary: (\d+)", text, re.M)[1]) for text in texts]
    return list(zip(instructions, (int(line.split()[1]) for line in result.stdout.splitlines()), strict=True))


def count_all() -> dict[str, float]:
    """Instructions per element of each case."""
    names = cases()
    found = count(list(itertools.product(names, (FEW, MANY))))
    pairs = zip(found[::2], found[1::2])
    return {name: float(f"{(b[0] - a[0]) / (b[1] - a[1]):.3g}") for name, (a, b) in zip(names, pairs)}


def main() -> None:
    build()
    assert tier("valgrind", "--tool=none") == TIER, "valgrind needs a CPU with AVX2"
    TABLE.write_text(json.dumps(count_all(), indent=2) + "\n")


if __name__ == "__main__":
    main()
