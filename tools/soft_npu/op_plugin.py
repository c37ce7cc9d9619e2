# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""op-plugin's own tests of the operators that are emulated, on software NPUs.

    python -m tools.soft_npu op-plugin DIRECTORY

DIRECTORY is `test/test_custom_ops` of Ascend/op-plugin. Each test passes, is refused by
an error that names what is not emulated, is skipped by itself, or is wrong. Needs the
package `expecttest`, which torch's own test cases import.
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

# How the emulation and the runtime say that they do not have something.
REFUSED = re.compile(r"OperatorLimitError|NotImplementedError|soft_npu: ")
SECONDS = 600


def run(directory: Path, release: str) -> int:
    """Run the files of operators that are emulated, and print what became of each test.

    Args:
        directory: Of the tests.
        release: Of vllm-ascend, whose torch_npu runs.

    Returns:
        1 if a test is wrong.

    Raises:
        SystemExit: The directory has no test of an operator that is emulated, or a
            package is missing.

    """
    if find_spec("expecttest") is None:
        raise SystemExit("soft_npu: op-plugin's tests need `pip install expecttest`.")
    total: Counter[str] = Counter()
    paths = files(directory)
    if not paths:
        raise SystemExit(f"soft_npu: {directory} has no test of what is emulated.")
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
    """The tests of operators that are emulated."""
    from tools.soft_npu.ops.registry import KERNELS
    from vllm_ascend_ct.ops import emulated  # noqa: F401
    from vllm_ascend_ct.ops.emulated.registry import OPERATORS

    names = {operator.name for operator in OPERATORS}
    names |= {name.partition("::")[2].partition(".")[0] for name in KERNELS}
    found = [directory / f"test_{name}.py" for name in sorted(names)]
    return [path for path in found if path.exists()]


def outcomes(path: Path, release: str) -> dict[str, tuple[str, str]]:
    """What became of a file's tests, and why."""
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
    """Counts for people."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def first_line(text: str) -> str:
    """What a failure says first."""
    said = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (said or text.strip().splitlines() or [""])[0][:160]
