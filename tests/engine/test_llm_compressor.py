# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checkpoints of llm-compressor, served and compared with a float32 reference."""

import subprocess
from pathlib import Path

import pytest

from tools.numerics.logprobs import mean_difference, reference, served

# 16-bit arithmetic; and quantized activations that round to the other neighbour.
TOLERANCES = {
    "w4a16-gptq": 0.015,
    "w4a16-awq-asym": 0.015,
    "w8a16": 0.015,
    "w3a16-gptq": 0.015,
    "w8a8-smoothquant-gptq": 0.04,
    "w8a8-static": 0.04,
    "w8a8-asym": 0.04,
    "w8a8-static-asym": 0.04,
    # Served with 16-bit activations, but the reference quantizes them.
    "w4a8": 0.04,
    "w4a8-channel": 0.04,
    "mixed": 0.04,
    "w4a16-head": 0.015,
    "fp8-dynamic": 0.015,
    "fp8-static-kv": 0.015,
    "fp8-block": 0.015,
    "mxfp8": 0.015,
    "mxfp4": 0.015,
    "nvfp4": 0.015,
    "nvfp4-a16": 0.015,
    # Weights are random, and a little noise routes tokens to other experts.
    "qwen3-moe/fp8-dynamic": 0.03,
    "qwen3-moe/nvfp4-a16": 0.03,
    "qwen3-moe/w4a16-gptq": 0.03,
    "qwen3-moe/w4a16-asym": 0.03,
    "mixtral/w8a8": 0.08,
    "deepseek-v2/w4a8-channel": 0.08,
    "deepseek-v3/mixed": 0.08,
}

pytestmark = pytest.mark.llm_compressor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llm-compressor")
    root = Path(__file__).parents[2]
    subprocess.run([root / "tools/checkpoints/llm_compressor.sh", out], check=True)
    return out


@pytest.mark.parametrize("recipe", TOLERANCES)
def test_served(checkpoints: Path, recipe: str) -> None:
    path = checkpoints / recipe
    difference = mean_difference(served(path), reference(path))
    print(f"{recipe}: {difference:.4f}")
    assert difference < TOLERANCES[recipe]
