# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run code in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run(
    script: str, *, path: Path | None = None, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run `script`, with environment `variables` (None unsets one).

    Args:
        script: Python code.
        path: Directory to import from, before all others.
        variables: Environment variables, in addition to this process's, from which this
            package's own are removed.

    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VLLM_")
    }
    environment.update({k: v for k, v in variables.items() if v is not None})
    if path is not None:
        others = filter(None, [environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *others])
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


def run_ok(script: str, *, path: Path | None = None, **variables: str | None) -> str:
    """Like `run`; returns the output, and fails with the process's errors."""
    result = run(script, path=path, **variables)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()
