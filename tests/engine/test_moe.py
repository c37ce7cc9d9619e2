# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Mixture-of-experts models in the vLLM engine, compared with a float32 reference."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_mock import MockerFixture
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.engine.selection import mostly_long
from tools.checkpoints.tiny_moe import IGNORE
from tools.numerics.compare_logprobs import two_ranks
from tools.numerics.logprobs import mean_difference, reference, served

ATTENTION = "re:.*self_attn.*_proj.*"


def experts(layer: int) -> str:
    return rf"re:.*layers.{layer}.mlp.experts.[0-9]+.\w+"


RECIPES = {
    "qwen3-moe": {
        experts(0): "w4a16-g32-asym",
        experts(1): "w8a8-channel-dynamic",
        ATTENTION: "w8a8-channel-dynamic",
    },
    "mixtral": {experts(0): "w4a8-g256", experts(1): "w8a16-channel"},
    # Its first layer has linear attention.
    "qwen3-next": {
        experts(0): "w4a16-g32-asym",
        experts(1): "w8a8-channel-dynamic",
        "re:.*linear_attn.*_(qkvz|proj)": "w4a16-g128",
        ATTENTION: "w8a8-channel-dynamic",
    },
    # The first layers of these models are dense.
    "deepseek-v2": {
        experts(1): "w4a16-g128",
        "re:.*shared_experts.*_proj": "w8a8-channel-dynamic",
    },
    "deepseek-v3": {experts(1): "w8a8-channel-dynamic", ATTENTION: "w4a16-g64"},
}
FLOAT_RECIPES = {
    "qwen3-moe": {
        experts(0): "fp8-block",
        experts(1): "mxfp4",
        ATTENTION: "fp8-channel-dynamic",
    },
    # These have latent attention and shared experts.
    "deepseek-v3": {"Linear": "nvfp4"},
}
ON_A5 = {
    "mx": {experts(0): "mxfp8", experts(1): "mxfp4", ATTENTION: "mxfp8"},
    "fp8": {experts(0): "fp8-channel-dynamic", experts(1): "fp8-channel-dynamic"},
}
OPERATORS = {
    "qwen3-moe": {"npu_grouped_matmul_swiglu_quant_v2", "npu_swiglu"},
    "mixtral": {"npu_grouped_matmul_swiglu_quant_v2", "npu_swiglu"},
    "qwen3-next": {"npu_grouped_matmul_swiglu_quant_v2", "npu_swiglu"},
    "deepseek-v2": {"npu_swiglu"},
    "deepseek-v3": {"npu_grouped_matmul_swiglu_quant_v2"},
}
# Mean absolute difference of log-probabilities, due to 16-bit arithmetic, quantized
# activations, and tokens that either routes to other experts.
TOLERANCE = 0.08
WEIGHT_ONLY_TOLERANCE = 0.03
MXFP4_TOLERANCE = 0.2
FLOAT16_TOLERANCE = 0.01

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def make(
    checkpoint: MakeCheckpoint, moe_model: Callable[[str], Path]
) -> Callable[..., Path]:
    def make(name: str, recipe: dict[str, str] | None = None) -> Path:
        recipe = RECIPES[name] if recipe is None else recipe
        return checkpoint(recipe, base=moe_model(name), ignore=IGNORE)

    return make


def tolerance(name: str) -> float:
    return WEIGHT_ONLY_TOLERANCE if name == "deepseek-v2" else TOLERANCE


@pytest.mark.parametrize("name", RECIPES)
def test_eager(mocker: MockerFixture, make: MakeCheckpoint, name: str) -> None:
    spies = {
        operator: mocker.spy(torch.ops.npu, operator)
        for operators in OPERATORS.values()
        for operator in operators
    }
    path = make(name)
    assert mean_difference(served(path), reference(path)) < tolerance(name)
    called = {operator for operator, spy in spies.items() if spy.call_count}
    assert called == OPERATORS[name]


@pytest.mark.parametrize("name", mostly_long(RECIPES, "qwen3-moe"))
def test_compiled(make: MakeCheckpoint, name: str) -> None:
    path = make(name)
    difference = mean_difference(served(path, eager=False), reference(path))
    assert difference < tolerance(name)


@pytest.mark.parametrize("name", FLOAT_RECIPES)
def test_resolved(make: MakeCheckpoint, name: str) -> None:
    path = make(name, FLOAT_RECIPES[name])
    found = mean_difference(served(path, dtype="float16"), reference(path))
    assert found < FLOAT16_TOLERANCE


@pytest.mark.parametrize("kind", ON_A5)
def test_floats_on_a5(
    make: MakeCheckpoint,
    mocker: MockerFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The reference does not quantize activations."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    grouped = mocker.spy(torch.ops.npu, "npu_grouped_matmul")
    path = make("qwen3-moe", ON_A5[kind])
    limit = MXFP4_TOLERANCE if kind == "mx" else TOLERANCE
    assert mean_difference(served(path), reference(path)) < limit
    weights = {call.args[1][0].dtype for call in grouped.call_args_list}
    packed = {torch.uint8} if kind == "mx" else set()
    assert weights == {torch.float8_e4m3fn} | packed


def test_unquantized_experts(make: MakeCheckpoint) -> None:
    path = make("qwen3-moe", {ATTENTION: "w4a16-g32"})
    found = mean_difference(served(path, dtype="float16"), reference(path))
    assert found < FLOAT16_TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [("float16", AttentionBackendEnum.CPU_MLA), ("bfloat16", None)],
)
def test_backend_of_latent_attention(
    make: MakeCheckpoint, dtype: str, backend: AttentionBackendEnum | None
) -> None:
    """With AMX, vLLM takes AMX_MLA, which is right with bfloat16 only."""
    arguments = EngineArgs(str(make("deepseek-v3")), dtype=dtype)
    assert arguments.create_engine_config().attention_config.backend is backend


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "recipe", "arguments"),
    [
        # Compiled, so that torch's scheduler could move the router ahead of its gate.
        ("deepseek-v3", {"Linear": "w8a8-channel-dynamic"}, []),
        ("qwen3-moe", None, ["--eager", "--experts"]),
    ],
    ids=["split", "whole"],
)
def test_two_ranks(
    tmp_path: Path,
    make: MakeCheckpoint,
    name: str,
    recipe: dict[str, str] | None,
    arguments: list[str],
) -> None:
    path, out = make(name, recipe), tmp_path / "logprobs.json"
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": two_ranks(),
    }
    command = [sys.executable, "-m", "tools.numerics.logprobs", str(out), str(path)]
    command += ["--ranks", "2", *arguments]
    subprocess.run(command, env=environment, check=True)
    logprobs = json.loads(out.read_text())[path.name]
    assert isinstance(logprobs, list), logprobs
    assert mean_difference(logprobs, reference(path)) < TOLERANCE


def test_a_wrong_scale_shows(make: MakeCheckpoint, tmp_path: Path) -> None:
    """The comparison above can fail: one layer's scales, 10 % off.

    In float16, because bfloat16 alone may be as far from float32 on some CPUs.
    """
    path = make("qwen3-moe", {experts(0): "w4a16-g32", experts(1): "w4a16-g32"})
    expected = reference(path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    for name in tensors:
        if "layers.1" in name and name.endswith("down_proj.weight_scale"):
            tensors[name] *= 1.1
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    sound, wrong = (
        mean_difference(served(x, dtype="float16"), expected) for x in (path, broken)
    )
    assert sound < FLOAT16_TOLERANCE and wrong > 3 * FLOAT16_TOLERANCE
