# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A LoRA adapter with random weights, for attention of a model with these sizes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, ALPHA = 8, 32


def make(directory: Path, config: dict[str, Any], modules: Sequence[str]) -> None:
    """Write an adapter.

    Args:
        directory: Where to; made if it is missing.
        config: The model's config.json.
        modules: Of `q_proj`, `o_proj`.

    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    inner = heads * (config.get("head_dim") or hidden // heads)
    shapes = {"q_proj": (inner, hidden), "o_proj": (hidden, inner)}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            n, k = shapes[module]
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, k) * k**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, RANK) * 0.2
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))
