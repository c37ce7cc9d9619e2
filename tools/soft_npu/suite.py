# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run the tests of the software NPU, with the checkpoints that they serve."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import stacks
from tools.soft_npu import build, environment
from tools.soft_npu.environment import Device
from vllm_ascend_ct import releases

CHECKPOINTS = build.ROOT / "checkpoints"
# Those of the usual selection; others are named MODEL/RECIPE.
MODELS = {
    "dense-w4a16": "dense/w4a16-g128",
    "dense-w8a8": "dense/w8a8-channel-dynamic",
    "moe-w4a16": "qwen3-moe/w4a16-g128",
    "mla-w4a16": "deepseek-v2/w4a16-g128",
    "moe-w8a8": "qwen3-moe/w8a8-channel-dynamic",
}


def checkpoint(name: str) -> Path:
    """The directory of a checkpoint: a name of `MODELS`, or MODEL/RECIPE."""
    return CHECKPOINTS / name.replace("/", "-")


def prepare(names: Sequence[str] = tuple(MODELS)) -> None:
    """Make models and checkpoints, and their float32 log-probabilities, once.

    In the plain environment: nothing of what is tested computes them.
    """
    missing = [
        name for name in names if not stacks.is_made(checkpoint(name), contents(name))
    ]
    if missing:
        command = [sys.executable, "-m", "tools.soft_npu.checkpoints", *missing]
        subprocess.run(command, env=environment.plain(), check=True)


def contents(name: str) -> str:
    """Model and recipe of a checkpoint."""
    return MODELS.get(name, name)


def test(arguments: Sequence[str]) -> int:
    """Run tests/soft_npu, or the files that are named; what they need is made."""
    prepare()
    # Here, as pip would import what the tests' processes shadow.
    for release in releases.served(on_npu=True):
        environment.set_up(release.vllm_ascend[-1])
    named = any(argument.startswith("tests/") for argument in arguments)
    paths = [] if named else ["tests/soft_npu"]
    options = ["-m", "soft_npu and not long", *paths, *arguments]
    command = [sys.executable, "-m", "pytest", *options]
    print("soft_npu:", " ".join(command[1:]), flush=True)
    with tempfile.TemporaryDirectory(prefix="soft-npu-") as state:
        variables = environment.variables(Device(devices=2), Path(state))
        return subprocess.run(command, env={**os.environ, **variables}).returncode
