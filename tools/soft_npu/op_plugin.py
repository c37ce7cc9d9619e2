# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run op-plugin's own tests of the emulated operators on software NPUs.

    python -m tools.soft_npu op-plugin DIRECTORY

DIRECTORY is `test/test_custom_ops` of Ascend/op-plugin. Each test passes, is refused
with an error that names what is not emulated, skips itself, or is wrong. Needs the
package `expecttest`, which torch's test cases import.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tools.soft_npu import environment
from tools.soft_npu.environment import Device
from tools.upstream import patch_tree

# Errors by which the emulation and the runtime refuse something.
REFUSED = re.compile(r"OperatorLimitError|NotImplementedError|soft_npu: ")
SECONDS = 600


def run(directory: Path, release: str) -> int:
    """Run the test files of emulated operators, and print the outcome of each test.

    Args:
        directory: Directory of the tests.
        release: vllm-ascend release whose torch_npu to use.

    Returns:
        1 if a test is wrong.

    Raises:
        SystemExit: The directory has no tests of emulated operators, or a package is
            missing.

    """
    if find_spec("expecttest") is None:
        raise SystemExit("soft_npu: op-plugin's tests need `pip install expecttest`.")
    total: Counter[str] = Counter()
    paths = files(directory)
    if not paths:
        raise SystemExit(f"soft_npu: {directory} has no tests of emulated operators.")
    for path in paths:
        found = outcomes(path.resolve(), release)
        counts = Counter(kind for kind, _ in found.values())
        total += counts
        print(f"{path.stem}: {describe(counts)}", flush=True)
        for name, (kind, text) in found.items():
            if kind == "wrong":
                print(f"  {name.rpartition('.')[2]}: {first_line(text)}")
    print(f"All: {describe(total)}")
    return int(total["wrong"] > 0)


def files(directory: Path) -> list[Path]:
    """The test files of emulated operators."""
    from tools.soft_npu.ops.registry import KERNELS
    from vllm_ascend_ct.ops import emulated  # noqa: F401
    from vllm_ascend_ct.ops.emulated.registry import OPERATORS

    names = {operator.name for operator in OPERATORS}
    names |= {name.partition("::")[2].partition(".")[0] for name in KERNELS}
    found = [directory / f"test_{name}.py" for name in sorted(names)]
    return [path for path in found if path.exists()]


def outcomes(path: Path, release: str) -> dict[str, tuple[str, str]]:
    """The outcomes of a file's tests, with reasons."""
    with tempfile.TemporaryDirectory(prefix="soft-npu-") as state:
        report = Path(state) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-c", "/dev/null", "--rootdir", str(path.parent), str(path)]
        variables = environment.variables(Device(release), Path(state))
        try:
            subprocess.run(
                [*command, f"--junitxml={report}"],
                env=variables,
                capture_output=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {path.stem: ("slow", f"over {SECONDS} s")}
        if not report.exists():
            return {path.stem: ("wrong", "pytest wrote no report")}
        found = patch_tree.outcomes(report)
    return {name: (_kind(*given), given[1]) for name, given in found.items()}


def _kind(kind: str, text: str) -> str:
    if kind != "failed":
        return kind
    return "refused" if REFUSED.search(text) else "wrong"


def describe(counts: Counter[str]) -> str:
    """Format counts."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def first_line(text: str) -> str:
    """The first line of a failure's message."""
    said = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (said or text.strip().splitlines() or [""])[0][:160]
