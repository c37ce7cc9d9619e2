# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run tests of other projects on software NPUs, and say what became of each."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tools.soft_npu import environment
from tools.soft_npu.environment import Device
from tools.upstream import patch_tree

# Kinds of outcomes by the failure's text; the first that matches. Others are wrong.
KINDS = {
    # The emulation and the runtime name what they refuse.
    "refused": re.compile(
        r"OperatorLimitError|NotImplementedError|soft_npu: |software NPU"
    ),
    "slow": re.compile(r"Failed: Timeout \(>|^slow: "),
    "missing": re.compile(
        r"No module named|FileNotFoundError|Invalid repository ID|in the cached path|"
        r"offline mode|LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect"
    ),
}
# What differs between failures of one reason.
_VARIES = re.compile(r"0x[0-9a-f]+|(?<!\w)\d+(\.\d+)?(e[+-]?\d+)?")
# An engine's process prints what its parent refers to.
_ELSEWHERE = "See root cause above"
_ROOT_CAUSE = re.compile(r"^\(.* ((?:\w+\.)*\w+(?:Error|Exception): .*)$", re.MULTILINE)
_WIDTH, _LONGEST = 160, 4000


@dataclass(frozen=True)
class Suite:
    """How to run some tests.

    Attributes:
        root: The directory to run pytest in.
        device: The software NPUs.
        variables: Environment variables to add.
        seconds_of_test: Limit for one test.
        seconds: Limit for one run of pytest.

    """

    root: Path
    device: Device
    variables: dict[str, str] = field(default_factory=dict)
    seconds_of_test: int = 120
    seconds: int = 600

    def outcomes(self, paths: Sequence[str]) -> patch_tree.Outcomes:
        """Run test files in one process; one by one if they end without a report."""
        with tempfile.TemporaryDirectory(prefix="soft-npu-") as state:
            report = Path(state) / "report.xml"
            said = self._run([*paths, f"--junitxml={report}"], Path(state))
            if report.exists():
                return read(report)
        if len(paths) == 1:
            return {paths[0]: (kind_of("failed", said), said)}
        each = map(self.outcomes, ([path] for path in paths))
        return {name: outcome for found in each for name, outcome in found.items()}

    def _run(self, arguments: Sequence[str], state: Path) -> str:
        """Run pytest, and stop all that it started; returns why there is no report."""
        variables = environment.variables(self.device, state) | self.variables
        environment.add_packages(variables, "test_packages")
        # Last: the tests' packages do not hide this project's of the same name.
        variables["PYTHONPATH"] += f"{os.pathsep}{self.root}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", str(self.root), "--tb=short"]
        command += ["-o", "junit_logging=out-err", "--continue-on-collection-errors"]
        command += [f"--timeout={self.seconds_of_test}", *arguments]
        log = state / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                # Not a session: tests that fork make themselves leaders of a group.
                process_group=0,
            )
            try:
                process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                return f"slow: over {self.seconds} s"
            finally:
                # The tests' own servers and workers, too.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"no report, exit code {process.returncode}: {(lines or [''])[-1]}"


def read(report: Path) -> patch_tree.Outcomes:
    """Read pytest's report, with our kinds."""
    found = patch_tree.outcomes(report)
    return {name: (kind_of(*outcome), outcome[1]) for name, outcome in found.items()}


def kind_of(kind: str, text: str) -> str:
    """Sort failures into kinds."""
    if kind != "failed":
        return kind
    return next((name for name, said in KINDS.items() if said.search(text)), "wrong")


def describe(counts: Mapping[str, int]) -> str:
    """Format counts."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def count(found: patch_tree.Outcomes) -> Counter[str]:
    """The number of outcomes of each kind."""
    return Counter(kind for kind, _ in found.values())


def first_line(text: str) -> str:
    """The first line of a failure's message."""
    said = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    line, *more = said or text.strip().splitlines() or [""]
    if more and ("validation error" in line or line.endswith(":")):
        line = more[0]
    if _ELSEWHERE in line and (found := _ROOT_CAUSE.search(text)):
        line = found[1]
    return line[:_WIDTH]


def reasons(found: patch_tree.Outcomes) -> str:
    """A table of what failed for which reason, as Markdown."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, (kind, text) in _failures(found):
        reason = _VARIES.sub("N", first_line(text)).replace("|", "\\|")
        names[kind, reason].append(name)
    lines = ["| tests | outcome | reason | one of them |", "| --- | --- | --- | --- |"]
    for (kind, reason), of_reason in sorted(names.items(), key=lambda x: -len(x[1])):
        lines.append(f"| {len(of_reason)} | {kind} | {reason} | `{of_reason[0]}` |")
    return "\n".join(lines)


def details(found: patch_tree.Outcomes) -> str:
    """The end of each failure's text, as Markdown."""
    parts = (
        f"### {name}: {kind}\n\n```\n{text.strip()[-_LONGEST:]}\n```"
        for name, (kind, text) in _failures(found)
    )
    return "\n\n".join(parts)


def _failures(
    found: patch_tree.Outcomes,
) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, outcome in found.items():
        if outcome[0] not in ("passed", "skipped"):
            yield name, outcome


def run(
    suites: Iterable[tuple[Suite, Sequence[str]]],
) -> Iterator[patch_tree.Outcomes]:
    """Run suites of test files one after the other, and print their outcomes.

    Yields:
        The outcomes of all suites until now.

    """
    total: patch_tree.Outcomes = {}
    for suite, paths in suites:
        found = suite.outcomes(paths)
        print(f"{os.path.commonpath(paths)}: {describe(count(found))}", flush=True)
        for name, (kind, text) in found.items():
            if kind == "wrong":
                print(f"  {name}: {first_line(text)}", flush=True)
        total |= found
        yield total
    print(f"All: {describe(count(total))}\n{reasons(total)}")
