# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's int8 KV cache, which it calls C8.

Keys and values are divided by a scale per channel and rounded when they are written.
The attention operator multiplies by the scales when it decodes; new prompts attend to
keys and values that are not rounded.

Source: vllm-ascend `attention/attention_v1.py` (`AscendC8AttentionBackendImpl`), which
was tested on chips with Qwen3-32B; op-plugin
`torch_npu-npu_fused_infer_attention_score.md`, int8 keys and values in FRACTAL_NZ.
"""

from typing import Any, get_args

import torch

from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.soc import current_soc

_INT8 = "int8"


def refusal(config: Any) -> str | None:
    """Why vllm-ascend cannot store this engine's KV cache in int8, or None.

    Args:
        config: vLLM's `VllmConfig`.

    """
    if reason := _obstacle(config):
        return reason
    chosen = config.cache_config.cache_dtype
    return None if chosen == _dtype() else f"--kv-cache-dtype {chosen}"


def choose_dtype(config: Any) -> None:
    """Select int8 in an engine's config, if nothing else is chosen and it is possible.

    Args:
        config: vLLM's `VllmConfig`.

    """
    if config.cache_config.cache_dtype == "auto" and not _obstacle(config):
        config.cache_config.cache_dtype = _dtype()


def _obstacle(config: Any) -> str | None:
    """What forbids an int8 cache, whatever `--kv-cache-dtype` is, or None.

    vllm-ascend's int8 attention ignores windows, sinks, drafts and context parallelism,
    and assumes decoders.
    """
    if not runs_on_vllm_ascend():
        return "the emulated platform stores it in 16 bits"
    limits = current_limits().int8_attention
    if limits is None:
        return f"Ascend {current_soc().value}"
    model, text = config.model_config, config.model_config.hf_text_config
    kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention"}
    reasons = {
        "latent attention": model.use_mla,
        "attention of several kinds": bool(kinds) or model.is_hybrid,
        "a sliding window": model.get_sliding_window() is not None,
        f"runner={model.runner_type}": model.runner_type != "generate",
        "an encoder": model.is_encoder_decoder,
        "speculative decoding": config.speculative_config is not None,
        "transfers of the KV cache": config.kv_transfer_config is not None,
        "context parallelism": _splits_context(config.parallel_config),
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        return found
    # vllm-ascend chooses a size that the operator takes.
    block_size = config.cache_config.block_size or limits.block_sizes[0]
    return limits.refusal(model.dtype, model.get_head_size(), block_size)


def method(prefix: str) -> Any:
    """vllm-ascend's method of an attention layer with an int8 KV cache.

    Args:
        prefix: Name of the layer.

    """
    try:
        from vllm_ascend.quantization.methods.kv_cache import kv_c8
    except ImportError:
        # Until 0.26.
        from vllm_ascend.quantization.methods import kv_c8

    return kv_c8.AscendC8KVCacheAttentionMethod({}, prefix)


def _dtype() -> str:
    """The value of `--kv-cache-dtype` that an int8 cache needs.

    Until 0.28 vllm-ascend reads the layer's dtype only.
    """
    from vllm.config.cache import CacheDType

    return _INT8 if _INT8 in get_args(CacheDType) else "auto"


def _splits_context(ranks: Any) -> bool:
    sizes = ("prefill_context_parallel_size", "decode_context_parallel_size")
    return any(getattr(ranks, size, 1) > 1 for size in sizes)


def scales_per_channel(
    scale: torch.Tensor, layer: Any, total_heads: int, rank: int, ranks: int
) -> torch.Tensor:
    """Expand scales of a KV cache to one per channel of a rank's heads.

    Args:
        scale: One scale, or one for each of the model's heads.
        layer: The attention layer.
        total_heads: KV heads of the model.
        rank: This rank.
        ranks: Number of ranks (tensor parallelism). Heads are replicated if they are
            fewer.

    Returns:
        `[num_kv_heads * head_size]`.

    """
    heads: int = layer.num_kv_heads
    if scale.numel() > 1:
        first = rank * total_heads // ranks
        scale = scale.flatten()[first : first + heads]
    return scale.view(-1, 1).repeat(heads // scale.numel(), layer.head_size).flatten()


def derive(layer: Any) -> None:
    """Compute what the layer's implementation needs of its scales.

    vllm-ascend would do so in the first forward only. After a reload, the tensors stay
    where graphs read them.

    Args:
        layer: The attention layer, with scales per channel.

    """
    before = {name: x for name, x in vars(layer).items() if name.startswith("_c8_")}
    if before.pop("_c8_scales_prepared", False):
        del layer._c8_scales_prepared
    layer.impl._prepare_c8_scales(layer, layer.k_cache_scale.device)
    for name, tensor in before.items():
        setattr(layer, name, tensor.copy_(getattr(layer, name)))
