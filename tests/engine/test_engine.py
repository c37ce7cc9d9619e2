# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme in the vLLM engine, against a float32 reference.

Three checkpoints of eight schemes each: the model has two layers, and what upstream
fuses has to share a scheme. A wrong scale, zero point or layout in any one of them
moves the mean difference far over the tolerance.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_mock import MockerFixture

from tools.compare_logprobs import two_ranks
from tools.logprobs import mean_difference, reference, served
from tools.make_checkpoint import SCHEMES

MODULES = ("[qkv]_proj", "o_proj", "(gate|up)_proj", "down_proj")
TARGETS = [f"re:.*layers.{layer}.*{module}" for layer in (0, 1) for module in MODULES]
RECIPES = {
    family: dict(
        zip(TARGETS, [s for s in SCHEMES if s.startswith(family)], strict=True)
    )
    for family in ("w4a16", "w8a16", "w8a8")
}
# One layer of each kernel; a rank's share of the second module is one group of 128.
TWO_RANKS = dict(
    zip(
        TARGETS,
        ["w4a16-g32-asym", "w4a16-g128", "w8a16-g64-asym", "w4a16-channel-asym"]
        + ["w8a8-channel-dynamic", "w8a8-tensor-static-asym"]
        + ["w8a8-channel-dynamic-asym", "w8a8-channel-static"],
        strict=True,
    )
)
# Mean absolute difference of log-probabilities: 16-bit arithmetic, and activations that
# the reference does not quantize.
TOLERANCES = {"w4a16": 0.015, "w8a16": 0.015, "w8a8": 0.04}
OPERATORS = {
    "w4a16": {"npu_weight_quant_batchmatmul"},
    "w8a16": {"npu_weight_quant_batchmatmul"},
    "w8a8": {
        "npu_dynamic_quant",
        "npu_dynamic_quant_asymmetric",
        "npu_quantize",
        "npu_quant_matmul",
    },
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def reference_of(checkpoint: MakeCheckpoint) -> Callable[[str], list[float]]:
    known: dict[str, list[float]] = {}

    def compute(family: str) -> list[float]:
        if family not in known:
            known[family] = reference(checkpoint(RECIPES[family]))
        return known[family]

    return compute


@pytest.mark.parametrize("family", RECIPES)
def test_eager(
    mocker: MockerFixture,
    checkpoint: MakeCheckpoint,
    reference_of: Callable[[str], list[float]],
    family: str,
) -> None:
    spies = {
        name: mocker.spy(torch.ops.npu, name)
        for names in OPERATORS.values()
        for name in names
    }
    logprobs = served(checkpoint(RECIPES[family]), eager=True)
    difference = mean_difference(logprobs, reference_of(family))
    assert difference < TOLERANCES[family]
    called = {name for name, spy in spies.items() if spy.call_count}
    assert called == OPERATORS[family]


@pytest.mark.parametrize("family", RECIPES)
def test_compiled(
    checkpoint: MakeCheckpoint,
    reference_of: Callable[[str], list[float]],
    family: str,
) -> None:
    """As vLLM runs by default."""
    logprobs = served(checkpoint(RECIPES[family]), eager=False)
    assert mean_difference(logprobs, reference_of(family)) < TOLERANCES[family]


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w8a8-tensor-static-asym"])
def test_float16(checkpoint: MakeCheckpoint, scheme: str) -> None:
    path = checkpoint({"Linear": scheme}, dtype=torch.float16)
    family = scheme.partition("-")[0]
    difference = mean_difference(served(path), reference(path))
    assert difference < TOLERANCES[family] / 2


def test_two_ranks(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    path, out = checkpoint(TWO_RANKS), tmp_path / "logprobs.json"
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": two_ranks(),
    }
    command = [sys.executable, "-m", "tools.logprobs", str(out), str(path), "--tp", "2"]
    subprocess.run(command, env=environment, check=True)
    logprobs = json.loads(out.read_text())[path.name]
    assert isinstance(logprobs, list), logprobs
    assert mean_difference(logprobs, reference(path)) < TOLERANCES["w8a8"]


def test_a_wrong_scale_shows(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The comparison above can fail: one layer's scales, 10 % off."""
    from safetensors.torch import load_file, save_file

    path = checkpoint({"Linear": "w4a16-g128"})
    expected = reference(path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 1.1
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert mean_difference(served(path), expected) < TOLERANCES["w4a16"]
    assert mean_difference(served(broken), expected) > 2 * TOLERANCES["w4a16"]
