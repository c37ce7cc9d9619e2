# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Add scales for a quantized KV cache to a checkpoint, named as by LLM Compressor."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.numerics.logprobs import held_out_tokens, reference_model

# Names in recipes, and type and strategy of the scheme.
SCHEMES = {
    "kv-int8-tensor": ("int", "tensor"),
    "kv-int8-head": ("int", "attn_head"),
    "kv-fp8-tensor": ("float", "tensor"),
}
_LARGEST = {"int": 127, "float": 448}


def add(directory: Path, name: str) -> None:
    """Calibrate scales on the held-out text and add them with their scheme.

    Args:
        directory: The checkpoint, with one file of weights.
        name: One of `SCHEMES`.

    """
    kind, strategy = SCHEMES[name]
    tokens = torch.tensor(held_out_tokens(directory))
    with torch.no_grad():
        result = reference_model(directory)(tokens.unsqueeze(0), use_cache=True)
    scales = {}
    for number, layer in enumerate(result.past_key_values.layers):
        for name, states in (("k", layer.keys), ("v", layer.values)):
            largest = states.abs().amax((0, 2, 3))
            if strategy == "tensor":
                largest = largest.amax(0, keepdim=True)
            else:
                largest = largest.view(-1, 1, 1)
            scale = (largest / _LARGEST[kind]).to(torch.bfloat16)
            scales[f"model.layers.{number}.self_attn.{name}_scale"] = scale
    change_scales(directory, scales)
    file = directory / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }
    file.write_text(json.dumps(config))


def change_scales(directory: Path, scales: dict[str, torch.Tensor]) -> None:
    """Write scales to a checkpoint's file."""
    file = directory / "model.safetensors"
    save_file(load_file(file) | scales, file, {"format": "pt"})
