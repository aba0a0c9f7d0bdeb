"""Instructions that each kernel takes per element, as valgrind counts them: the same number however busy the machine is.

    make instructions    writes them to tests/instructions.json

The kernels run in the AVX2 tier: it is the highest that valgrind knows.
"""

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".json")
PROGRAM = PROJECT / "target" / "release" / "examples" / "instructions"
TIER = "avx2"
CALLGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured*")

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


def count(case: str, elements: int) -> tuple[int, int]:
    """Instructions of one run, and its elements."""
    result = run(*CALLGRIND, PROGRAM, case, elements)
    instructions = int(re.search(r"Collected : (\d+)", result.stderr)[1])
    assert instructions > 0, f"{case}: callgrind found no function named measured"
    return instructions, int(result.stdout.split()[1])


def instructions_per_element(case: str) -> float:
    (few, few_elements), (many, many_elements) = count(case, FEW), count(case, MANY)
    return float(f"{(many - few) / (many_elements - few_elements):.3g}")


def count_all() -> dict[str, float]:
    """Instructions per element of each case."""
    names = cases()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(instructions_per_element, names)))


def main() -> None:
    build()
    assert tier(*CALLGRIND) == TIER, "valgrind needs a CPU with AVX2"
    TABLE.write_text(json.dumps(count_all(), indent=2) + "\n")


if __name__ == "__main__":
    main()
