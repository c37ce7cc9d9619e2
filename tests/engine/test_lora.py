# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""LoRA adapters on a model with quantized experts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.loading import models
from tools.checkpoints.tiny_moe import IGNORE
from tools.numerics.logprobs import (
    LENGTH,
    clean_up,
    held_out_tokens,
    mean_difference,
    of_prompt,
    reference,
)
from vllm_ascend_ct.errors import PlatformError, Remedy

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA = 8, 32
# As without adapters: 16-bit arithmetic, which routes some tokens to other experts.
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def experts(checkpoint: Callable[..., Path], moe_model: Callable[[str], Path]) -> Path:
    """A model with quantized experts and unquantized attention."""
    recipe = {r"re:.*mlp.experts.[0-9]+.\w+": "w4a16-g32"}
    return checkpoint(recipe, base=moe_model("qwen3-moe"), ignore=IGNORE)


def make_adapter(directory: Path, path: Path, merged: Path) -> None:
    """Write an adapter for attention, and the model with the adapter merged into it."""
    shutil.copytree(path, merged)
    tensors = load_file(merged / "model.safetensors")
    adapter = {}
    for layer in (0, 1):
        for name in ATTENTION:
            module = f"model.layers.{layer}.self_attn.{name}"
            n, k = tensors[f"{module}.weight"].shape
            a, b = torch.randn(RANK, k) * k**-0.5, torch.randn(n, RANK) * 0.2
            adapter[f"base_model.model.{module}.lora_A.weight"] = a
            adapter[f"base_model.model.{module}.lora_B.weight"] = b
            tensors[f"{module}.weight"] += (b @ a * ALPHA / RANK).bfloat16()
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    directory.mkdir()
    save_file(adapter, directory / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ATTENTION,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_adapters_of_other_modules_are_served(tmp_path: Path, experts: Path) -> None:
    make_adapter(tmp_path / "adapter", experts, tmp_path / "merged")
    llm = LLM(
        str(experts),
        max_model_len=LENGTH + 12,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=RANK,
        lora_target_modules=ATTENTION,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    tokens = held_out_tokens(experts)
    (output,) = llm.generate(
        {"prompt_token_ids": tokens},
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        lora_request=LoRARequest("adapter", 1, str(tmp_path / "adapter")),
        use_tqdm=False,
    )
    del llm
    clean_up()
    served = of_prompt(output)
    assert mean_difference(served, reference(tmp_path / "merged")) < TOLERANCE
    assert mean_difference(served, reference(experts)) > 3 * TOLERANCE


@pytest.mark.parametrize(
    "targets",
    [None, [*ATTENTION, "experts"], ["model.layers.1.mlp.experts"]],
    ids=["all", "experts", "experts-of-a-layer"],
)
@pytest.mark.usefixtures("single_rank")
def test_adapters_of_experts_are_refused(
    experts: Path, targets: list[str] | None
) -> None:
    arguments: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK}
    with pytest.raises(PlatformError) as error:
        models.load(experts, lora_target_modules=targets, **arguments)
    text = str(error.value)
    assert "layer model.layers." in text and ".mlp.experts" in text
    assert Remedy.LORA_TARGETS in text
