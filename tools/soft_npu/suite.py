# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run the tests on software NPUs, and make the checkpoints that they serve."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.soft_npu import build, environment
from tools.soft_npu.environment import Device
from tools.stacks import stacks
from vllm_ascend_ct import releases

CHECKPOINTS = build.ROOT / "checkpoints"
# Tests that run on every release.
ENGINES, *OTHERS = (
    f"tests/soft_npu/test_{name}.py"
    for name in ("engine", "fusion", "ranks", "kv_cache", "310p", "a5", "sleep")
)
# Checkpoints of the default selection; others are named MODEL/RECIPE.
MODELS = {
    "dense-w4a16": "dense/w4a16-g128",
    "dense-w8a8": "dense/w8a8-channel-dynamic",
    "moe-w4a16": "qwen3-moe/w4a16-g128",
    "mla-w4a16": "deepseek-v2/w4a16-g128",
    "moe-w8a8": "qwen3-moe/w8a8-channel-dynamic",
}
# The model that is asked about an image.
VISION = "qwen2-5-vl"
# The head that drafts for the dense model.
EAGLE = "eagle"
# In the recipe of a DeepSeek model: it has a layer for multi-token prediction.
MTP = "mtp"
# Recipes of the dense model whose activations A5 rounds to a floating-point grid.
ROUNDED = ("fp8-channel-dynamic", "mxfp8", "mxfp4")


def checkpoint(name: str) -> Path:
    """The directory of a checkpoint: a name of `MODELS`, or MODEL/RECIPE."""
    return CHECKPOINTS / name.replace("/", "-")


def rounded(name: str) -> Path:
    """The directory of the reference whose activations are rounded as on A5."""
    return CHECKPOINTS / f"rounded-{name.replace('/', '-')}"


def is_rounded(name: str) -> bool:
    """Whether a checkpoint has such a reference."""
    model, _, recipe = contents(name).partition("/")
    return model == "dense" and recipe in ROUNDED


def prepare(names: Sequence[str] = tuple(MODELS)) -> None:
    """Make models and checkpoints with their float32 log-probabilities, once.

    Uses the plain environment, so that nothing under test computes the reference.
    """
    missing = [
        name
        for name in names
        if not stacks.is_made(checkpoint(name), contents(name))
        or (is_rounded(name) and not stacks.is_made(rounded(name), contents(name)))
    ]
    if missing:
        command = [sys.executable, "-m", "tools.soft_npu.checkpoints", *missing]
        subprocess.run(command, env=environment.plain(), check=True)


def contents(name: str) -> str:
    """Model and recipe of a checkpoint."""
    return MODELS.get(name, name)


def test(arguments: Sequence[str], release: str | None = None) -> int:
    """Run tests/soft_npu, and make what they need if it is missing.

    An engine computes on one core, so one part per core runs at a time.

    Args:
        arguments: Arguments of pytest. Files replace the default selection.
        release: vllm-ascend release; None for those that are tested end to end, of
            which all but the default run only the tests of engines.

    """
    prepare()
    names = end_to_end() if release is None else [release]
    for name in names:
        environment.set_up(name)
    has_files = any(argument.startswith("tests/") for argument in arguments)
    runs = [
        (name, [*paths, *arguments], not has_files)
        for name in names
        for paths in ([[]] if has_files else parts(name))
    ]
    with ThreadPoolExecutor(1 if has_files else os.cpu_count()) as pool:
        codes = list(pool.map(lambda run: _test(*run), runs))
    # After a crash the code is negative.
    return int(any(codes))


def end_to_end() -> list[str]:
    """The releases whose engines run by default."""
    rows = releases.served(on_npu=True)
    tested = releases.Tested.END_TO_END
    return [row.vllm_ascend[-1] for row in rows if row.tested is tested]


def parts(release: str) -> list[list[str]]:
    """The tests of a release, in parts that run beside each other."""
    found = [[ENGINES], OTHERS]
    if release == Device.release:
        ignored = [f"--ignore={path}" for path in (ENGINES, *OTHERS)]
        found.insert(0, ["tests/soft_npu", *ignored])
    return found


def _test(release: str, arguments: Sequence[str], capture: bool) -> int:
    """Run pytest once; if captured, print its output in one piece at the end."""
    options = ["-m", "soft_npu and not long", *arguments]
    command = [sys.executable, "-m", "pytest", *options]
    print(f"soft_npu: vllm-ascend {release}:", *command[1:], flush=True)
    with tempfile.TemporaryDirectory(prefix="soft-npu-") as state:
        result = subprocess.run(
            command,
            env=environment.variables(Device(release, devices=2), Path(state)),
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            text=True,
        )
    if capture:
        print(f"soft_npu: vllm-ascend {release}:\n{result.stdout}", flush=True)
    return result.returncode
