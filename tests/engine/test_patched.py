# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The staged patches do not change the output of models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.checkpoints import tiny_moe
from tools.upstream import patch_tree
from tools.upstream.patch_series import target_of

MOE = {"base": "qwen3-moe", "ignore": tiny_moe.IGNORE}
RECIPES = {
    "w4a16-dense": ({"Linear": "w4a16-g128"}, {}),
    "w8a8-experts": ({"Linear": "w8a8-channel-dynamic"}, MOE),
    "w4a16-experts": ({"Linear": "w4a16-g32"}, MOE),
}


def logprobs(
    out: Path, checkpoints: list[Path], tree: Path | None
) -> list[list[float]]:
    """Log-probabilities of the held-out text, with the vLLM of a source tree."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if tree is not None:
        environment["PYTHONPATH"] = str(tree)
    command = [sys.executable, "-m", "tools.numerics.logprobs", str(out), "--eager"]
    command += map(str, checkpoints)
    subprocess.run(command, env=environment, check=True)
    found = json.loads(out.read_text())
    return [found[path.name] for path in checkpoints]


@pytest.mark.long
def test_same_log_probabilities(
    tmp_path: Path,
    checkpoint: Callable[..., Path],
    moe_model: Callable[[str], Path],
) -> None:
    tree = patch_tree.patched_vllm(target_of("vllm"), "compared")
    made = []
    for recipe, options in RECIPES.values():
        base = {"base": moe_model(str(options["base"]))} if options else {}
        made.append(checkpoint(recipe, **{**options, **base}))
    stock = logprobs(tmp_path / "stock.json", made, None)
    patched = logprobs(tmp_path / "patched.json", made, tree)
    for name, before, after in zip(RECIPES, stock, patched):
        assert isinstance(before, list) and len(before) > 100, (name, before)
        assert after == before, name
