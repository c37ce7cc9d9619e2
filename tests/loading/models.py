# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Small random models of vLLM's architectures in which any layer can be quantized.

Checkpoints are made from tensors and not from modules, so that the files and the config
may disagree.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from tools.checkpoints import tiny_model, tiny_moe
from tools.checkpoints.drafts import add_mtp_layer
from tools.checkpoints.make_checkpoint import SCHEMES, compress, prepare

SCHEME = "w4a16-g32"
_TEXT: dict[str, Any] = {
    "vocab_size": tiny_model.VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 128,
}

Tensors = dict[str, torch.Tensor]


def _qwen3(**changes: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_TEXT | changes))


def _paligemma() -> Any:
    text = transformers.Gemma2Config(**_TEXT, query_pre_attn_scalar=32)
    vision = transformers.SiglipVisionConfig(**_TOWER, vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=128, image_token_id=5
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _modernbert() -> Any:
    special = ("pad", "bos", "eos", "cls", "sep")
    config = transformers.ModernBertConfig(
        **{**_TEXT, **{f"{token}_token_id": 0 for token in special}}
    )
    return transformers.ModernBertModel(config)


def _qwen2_5_vl() -> Any:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "patch_size": 14,
    }
    tokens = ("vision_start", "vision_end", "vision", "image", "video")
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_scaling": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **{f"{token}_token_id": 1 + number for number, token in enumerate(tokens)},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _gpt_oss() -> Any:
    """With one module per projection of an expert, as llm-compressor creates them."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model: Any = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**_TEXT, **experts)
    )
    for layer in model.model.layers:
        given = layer.mlp.experts
        layer.mlp.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    name: torch.nn.Linear(*weight.shape)
                    for name, weight in (
                        ("gate_proj", gate_up[:, ::2]),
                        ("up_proj", gate_up[:, 1::2]),
                        ("down_proj", down),
                    )
                }
            )
            for gate_up, down in zip(given.gate_up_proj, given.down_proj)
        )
    return model


_MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": _qwen3,
    # An int8 KV cache needs heads of this size.
    "qwen3-128": lambda: _qwen3(head_dim=128),
    "gpt_oss": _gpt_oss,
    "paligemma": _paligemma,
    "modernbert": _modernbert,
    "qwen2_5_vl": _qwen2_5_vl,
}


def renamed(name: str) -> str:
    """A name in a model with a vision tower, as in transformers since 4.52."""
    if name.startswith(("vision_tower", "multi_modal_projector", "visual")):
        return f"model.{name}"
    for old in ("language_model.model.", "model."):
        if name.startswith(old):
            return f"model.language_model.{name.removeprefix(old)}"
    return name


def _with_vision_model(name: str) -> str:
    if "vision_model" in name:
        return name
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@cache
def unquantized(name: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config of an unquantized model."""
    torch.manual_seed(0)
    with TemporaryDirectory() as directory:
        path = Path(directory)
        if name in _MODELS:
            model = _MODELS[name]().bfloat16()
            model.config.architectures = [type(model).__name__]
            model.save_pretrained(path)
        else:
            tiny_moe.make(path, name.removesuffix("-mtp"))
        tensors = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
    if name == "paligemma":
        # The head is tied to the embedding, and names are as in published checkpoints.
        tensors.pop("language_model.lm_head.weight", None)
        tensors = {_with_vision_model(key): value for key, value in tensors.items()}
    if name.endswith("-mtp"):
        add_mtp_layer(tensors, config)
    return tensors, config


@cache
def _compressed(model: str, layer: str, scheme: str) -> Tensors:
    weight = unquantized(model)[0][f"{layer}.weight"]
    module: Any = torch.nn.Linear(*reversed(weight.shape), bias=False)
    module.to(weight.dtype).weight.data.copy_(weight)
    modules = torch.nn.ModuleDict({"layer": module})
    prepare(modules, {"Linear": scheme})
    compress(modules)
    return {
        name: parameter.data for name, parameter in modules["layer"].named_parameters()
    }


def linears(model: str) -> list[str]:
    """Layers of a model that can be quantized, including embeddings and heads."""
    return [
        name.removesuffix(".weight")
        for name, tensor in unquantized(model)[0].items()
        if name.endswith(".weight") and tensor.dim() == 2
    ]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if any(re.search(p, name) for p in patterns)]


def make(
    out: Path,
    model: str,
    quantized: Iterable[str],
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = (),
    *,
    scheme: str = SCHEME,
    rename: Callable[[str], str] = lambda name: name,
) -> Path:
    """Write a checkpoint.

    Args:
        out: Directory to create.
        model: One of `_MODELS` or of `tools.checkpoints.tiny_moe`; with "-mtp", it has
            a layer for multi-token prediction.
        quantized: Layers that are quantized in the file.
        targets: `targets` of the config's only group, which has `scheme`.
        ignore: `ignore` of the config.
        scheme: One of `SCHEMES`.
        rename: Maps names of tensors to their names in the file.

    """
    tensors, config = unquantized(model)
    tensors = dict(tensors)
    for layer in quantized:
        del tensors[f"{layer}.weight"]
        for kind, tensor in _compressed(model, layer, scheme).items():
            tensors[f"{layer}.{kind}"] = tensor
    out.mkdir(parents=True)
    named = {rename(name): tensor.clone() for name, tensor in tensors.items()}
    save_file(named, out / "model.safetensors", {"format": "pt"})
    group = SCHEMES[scheme].model_copy(update={"targets": list(targets)})
    is_packed = "a16" in scheme or scheme.endswith("packed")
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group.model_dump(mode="json")},
        "format": "pack-quantized" if is_packed else "int-quantized",
        "ignore": list(ignore),
    }
    config = {**config, "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    _tokenizer().save_pretrained(out)
    return out


@cache
def _tokenizer() -> Any:
    return tiny_model.train_tokenizer()


def load(path: Path, **arguments: Any) -> torch.nn.Module:
    """Load a model like a worker, but without one."""
    vllm_config = config_of(path, **arguments)
    return load_with(vllm_config, vllm_config.model_config)


def config_of(path: Path, **arguments: Any) -> VllmConfig:
    options = {"enforce_eager": True, "max_model_len": 128, **arguments}
    return EngineArgs(str(path), **options).create_engine_config()


def load_with(vllm_config: VllmConfig, model_config: Any) -> torch.nn.Module:
    """Load a model, or a draft model in addition to it."""
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config, model_config=model_config)
        loader = get_model_loader(vllm_config.load_config)
        loader.load_weights(model, model_config)
        process_weights_after_loading(model, model_config, torch.device("cpu"))
    return model


def load_draft(path: Path) -> torch.nn.Module:
    """Load a draft model for multi-token prediction, after its main model."""
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    vllm_config = config_of(path, speculative_config=speculation)
    load_with(vllm_config, vllm_config.model_config)
    assert vllm_config.speculative_config is not None
    return load_with(vllm_config, vllm_config.speculative_config.draft_model_config)


def load_model(path: Path) -> None:
    """Load a checkpoint like a worker, but without one."""
    arguments = EngineArgs(str(path), enforce_eager=True, max_model_len=128)
    vllm_config = arguments.create_engine_config()
    model_config = vllm_config.model_config
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config)
        loader = get_model_loader(vllm_config.load_config)
        loader.load_weights(model, model_config)
        process_weights_after_loading(model, model_config, torch.device("cpu"))
