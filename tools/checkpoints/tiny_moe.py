# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Small mixture-of-experts models with random weights.

They are not trained. The weights have a large enough variance that routing and
predictions vary, so that a wrong weight shows.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from tools.checkpoints import tiny_model

COMMON: dict[str, Any] = {
    "vocab_size": tiny_model.VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Latent attention with the head sizes that the attention kernels need.
_DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def configs() -> dict[str, PretrainedConfig]:
    """The models, by name."""
    return {
        "qwen3-moe": Qwen3MoeConfig(
            **COMMON,
            head_dim=64,
            intermediate_size=512,
            moe_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        ),
        "qwen3-next": Qwen3NextConfig(
            **COMMON,
            head_dim=128,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
        "mixtral": MixtralConfig(
            **COMMON,
            intermediate_size=512,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
        "deepseek-v2": DeepseekV2Config(
            **_DEEPSEEK,
            n_routed_experts=12,
            routed_scaling_factor=1.0,
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
        ),
        "deepseek-v3": DeepseekV3Config(
            **_DEEPSEEK,
            n_routed_experts=16,
            routed_scaling_factor=1.5,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
        ),
    }


class LinearExperts(torch.nn.ModuleDict):
    """Experts as three `torch.nn.Linear` each, as in checkpoints."""

    def __init__(self, experts: Any) -> None:
        """Take the sizes from a model's experts, which share one tensor."""
        super().__init__()
        hidden, intermediate = experts.hidden_dim, experts.intermediate_dim
        sizes = {"gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate)}
        sizes["down_proj"] = (intermediate, hidden)
        for number in range(experts.num_experts):
            self[str(number)] = torch.nn.ModuleDict(
                {
                    name: torch.nn.Linear(*size, bias=False)
                    for name, size in sizes.items()
                }
            )
        self.act_fn = experts.act_fn

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros_like(hidden_states)
        for number, expert in self.experts():
            tokens, choices = (top_k_index == number).nonzero(as_tuple=True)
            x = hidden_states[tokens]
            rows = expert["down_proj"](
                self.act_fn(expert["gate_proj"](x)) * expert["up_proj"](x)
            )
            rows = rows * top_k_weights[tokens, choices, None].to(rows.dtype)
            total.index_add_(0, tokens, rows)
        return total

    def experts(self) -> Iterator[tuple[int, Any]]:
        for name, expert in self.items():
            if name != "act_fn":
                yield int(name), expert


def is_moe(config: Any) -> bool:
    """Whether a model is one of those in `configs`."""
    known = {known.model_type for known in configs().values()}
    return config.model_type in known


def new_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model from a config, with experts as in checkpoints."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for block in model.model.layers:
        if hasattr(block.mlp, "experts"):
            block.mlp.experts = LinearExperts(block.mlp.experts).to(dtype)
    return model


def _on_disk(name: str, model_type: str) -> str:
    """The name of a parameter in checkpoints."""
    if model_type != "mixtral":
        return name
    for ours, theirs in _MIXTRAL.items():
        name = name.replace(ours, theirs)
    return name


_MIXTRAL = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj": ".w1",
    ".up_proj": ".w3",
    ".down_proj": ".w2",
}


def in_model(name: str, model_type: str) -> str:
    """The name in the model of a parameter in checkpoints."""
    if model_type == "mixtral":
        for ours, theirs in _MIXTRAL.items():
            name = name.replace(theirs, ours)
    return name


def quantization_in_model(config: Any) -> dict[str, Any]:
    """A checkpoint's quantization config, with the layers' names in the model."""
    text = json.dumps(dict(config.quantization_config))
    quantization: dict[str, Any] = json.loads(in_model(text, config.model_type))
    return quantization


def save(model: PreTrainedModel, directory: Path) -> None:
    """Write the config, and the weights under their names in checkpoints."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(directory)
    model_type = model.config.model_type
    tensors = {
        _on_disk(name, model_type): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def adapt_config(directory: Path, ignore: Sequence[str]) -> None:
    """Rename layers in a quantization config to their names in the checkpoint.

    Args:
        directory: Directory of the checkpoint.
        ignore: Patterns to add. The library lists only ignored `torch.nn.Linear`, and
            routers are not.

    """
    path = directory / "config.json"
    config = json.loads(path.read_text())
    quantization = json.dumps(config["quantization_config"])
    quantization = json.loads(_on_disk(quantization, config["model_type"]))
    quantization["ignore"] = sorted({*quantization["ignore"], *ignore})
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=2))


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load what `save` wrote."""
    config = AutoConfig.from_pretrained(directory)
    model = new_model(config, dtype)
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict(
        {in_model(name, config.model_type): value for name, value in tensors.items()}
    )
    return model.eval()


# Layers that no recipe here quantizes.
IGNORE = ("lm_head", "re:.*gate$")


def make(directory: Path, name: str) -> None:
    """Make one of the models; see `make_random`."""
    make_random(directory, configs()[name])


def make_random(directory: Path, config: PretrainedConfig) -> None:
    """Make a model with random weights, in bfloat16, and a tokenizer."""
    torch.manual_seed(0)
    model = new_model(config, torch.float32)
    randomize(model)
    directory.mkdir(parents=True, exist_ok=True)
    save(model.bfloat16(), directory)
    tiny_model.train_tokenizer().save_pretrained(directory)


def randomize(model: torch.nn.Module) -> None:
    """Set the weights so that routing and predictions vary."""
    for key, parameter in model.named_parameters():
        if key.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() > 1:
            scale = 3.0 if "embed_tokens" in key else 1.0
            std = scale * parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.05)
