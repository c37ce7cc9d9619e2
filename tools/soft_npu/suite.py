# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run the tests of the software NPU, with the checkpoints that they serve."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import stacks
from tools.soft_npu import build, environment
from tools.soft_npu.environment import Device

CHECKPOINTS = build.ROOT / "checkpoints"
# Name -> scheme and, for experts, the model of `tools.tiny_moe`.
MODELS = {
    "dense-w4a16": ("w4a16-g128", ""),
    "dense-w8a8": ("w8a8-channel-dynamic", ""),
    "moe-w4a16": ("w4a16-g128", "qwen3-moe"),
}


def prepare() -> None:
    """Make models and checkpoints, and their float32 log-probabilities, once.

    In the plain environment: nothing of what is tested computes them.
    """
    from tools import make_checkpoint, tiny_model

    tiny_model.make_once(make_checkpoint.DEFAULT_BASE)
    for name, (scheme, model) in MODELS.items():

        def make(directory: Path, scheme: str = scheme, model: str = model) -> None:
            arguments = [scheme, model, str(directory)]
            command = [sys.executable, "-m", "tools.soft_npu.suite", *arguments]
            subprocess.run(command, check=True)

        stacks.once(CHECKPOINTS / name, f"{scheme} {model}", make)


def make_one(scheme: str, model: str, directory: Path) -> None:
    """Make a checkpoint, and `reference.json` in it."""
    from tools import make_checkpoint, tiny_moe
    from tools.logprobs import reference

    if model:
        base = build.ROOT / "base" / model
        if not base.exists():
            tiny_moe.make(base, model)
        make_checkpoint.make(directory, {"re:.*proj": scheme}, base)
    else:
        make_checkpoint.make(directory, {"re:.*proj": scheme})
    (directory / "reference.json").write_text(json.dumps(reference(directory)))


def test(arguments: Sequence[str]) -> int:
    """Run tests/soft_npu; all that it needs is made if missing."""
    prepare()
    options = ["-m", "soft_npu and not long", "tests/soft_npu", *arguments]
    command = [sys.executable, "-m", "pytest", *options]
    print("soft_npu:", " ".join(command[1:]), flush=True)
    with tempfile.TemporaryDirectory(prefix="soft-npu-") as state:
        variables = environment.variables(Device(devices=2), Path(state))
        return subprocess.run(command, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    make_one(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
