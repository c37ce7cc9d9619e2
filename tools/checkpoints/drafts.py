# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Small draft models for speculative decoding, with random weights.

They seldom guess a token. What they propose is compared instead.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tools.checkpoints import tiny_moe
from tools.checkpoints.dequantize import dequantized_state
from tools.checkpoints.make_checkpoint import compress, prepare


def add_mtp_layer(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Add a layer for multi-token prediction to a DeepSeek model.

    Args:
        tensors: The model's tensors. The new layer is a copy of the last one, quantized
            if that is.
        config: Its config.

    """
    number, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{number - 1}.", f"model.layers.{number}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, new)] = tensors[name].clone()
    tensors[f"{new}eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{new}{norm}.weight"] = torch.ones(hidden).bfloat16()
    tensors[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    config["num_nextn_predict_layers"] = 1


def add_mtp(directory: Path) -> None:
    """Add a layer for multi-token prediction to a checkpoint of a DeepSeek model."""
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    torch.manual_seed(0)
    add_mtp_layer(tensors, config)
    if quantization := config.get("quantization_config"):
        quantization["ignore"] += ["re:.*eh_proj$", "re:.*shared_head[.]head$"]
    _write(directory, tensors, config)


def make_eagle(directory: Path, scheme: str | None = None) -> None:
    """Make an EAGLE-3 head for the tiny model.

    Args:
        directory: Directory to make.
        scheme: How to quantize its linear layers; None for not at all.

    """
    config: dict[str, Any] = {
        **tiny_moe.COMMON,
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "draft_vocab_size": tiny_moe.COMMON["vocab_size"],
        # Before each of the model's layers.
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
    }
    torch.manual_seed(0)
    head = _eagle_head(config)
    if scheme is not None:
        prepare(head, {"Linear": scheme}, ["lm_head"])
        compressor = compress(head)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory, head.state_dict(), config)
    if scheme is not None:
        compressor.update_config(str(directory))


def _eagle_head(config: dict[str, Any]) -> nn.Module:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    size = hidden // config["num_attention_heads"]
    keys = size * config["num_key_value_heads"]
    sizes = {
        # Attention reads the token and the model's hidden states side by side.
        "self_attn.q_proj": (2 * hidden, hidden),
        "self_attn.k_proj": (2 * hidden, keys),
        "self_attn.v_proj": (2 * hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    layer = nn.Module()
    for group in ("self_attn", "mlp"):
        layer.add_module(group, nn.Module())
    for name, (inputs, outputs) in sizes.items():
        parent, _, child = name.partition(".")
        linear = nn.Linear(inputs, outputs, bias=False)
        layer.get_submodule(parent).add_module(child, linear)
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        layer.add_module(norm, nn.RMSNorm(hidden))
    head = nn.Module()
    head.add_module("midlayer", layer)
    head.add_module("fc", nn.Linear(2 * hidden, hidden, bias=False))
    head.add_module("norm", nn.RMSNorm(hidden))
    head.add_module("lm_head", nn.Linear(hidden, config["vocab_size"], bias=False))
    tiny_moe.randomize(head)
    return head.bfloat16()


def dequantize(directory: Path, out: Path) -> None:
    """Write a checkpoint with its dequantized weights."""
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    out.mkdir()
    for file in directory.glob("*token*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    _write(out, dequantized_state(directory), config)


def _write(
    directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
