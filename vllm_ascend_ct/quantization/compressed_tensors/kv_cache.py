# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Int8 KV caches with the scales of a checkpoint.

Upstream's method supports FP8 only, which vllm-ascend's cache does not.
"""

import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import WeightsMapper

from vllm_ascend_ct.ascend_base import kv_cache
from vllm_ascend_ct.compat import load_format
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError

_SCALES = ("k_cache_scale", "v_cache_scale")
_PROJECTION = r"(?:\.[kv]_proj|\.qk(?:qk)?v_proj)?"
# Names of the checkpoint, and those of vllm-ascend's parameters.
SCALE_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(
            _PROJECTION + r"(?:\.attn)?\.([kv])_scale$"
        ): r".attn.\1_cache_scale",
        re.compile(r"\.(q_scale|[qkv]_zero_point)$"): None,
    }
)
# Without a quantized cache.
NO_SCALES = WeightsMapper(
    orig_to_new_regex={re.compile(r"\.(kv|[qkv])_(scale|zero_point)$"): None}
)


def is_int8(scheme: dict[str, Any] | None) -> bool:
    """Whether a `kv_cache_scheme` is one that an int8 KV cache can take."""
    if not scheme:
        return False
    return (
        scheme.get("type", "int") == "int"
        and scheme.get("num_bits") == 8
        and scheme.get("symmetric", True)
        and not scheme.get("dynamic")
        and scheme.get("strategy") in ("tensor", "attn_head")
    )


class Int8KVCacheMethod(BaseKVCacheMethod):
    """vllm-ascend's int8 KV cache, with a scale per tensor or per head.

    Args:
        quant_config: The checkpoint's config.
        prefix: Name of the attention layer.
        strategy: "tensor" or "attn_head".

    """

    def __init__(self, quant_config: Any, prefix: str, strategy: str) -> None:
        super().__init__(quant_config)
        self.prefix = prefix
        self.is_dummy = load_format() == "dummy"
        self.base = kv_cache.method(prefix)
        config = get_current_vllm_config()
        self.ranks = config.parallel_config.tensor_parallel_size
        self.total_heads = config.model_config.get_total_num_kv_heads()
        self.scales = self.total_heads if strategy == "attn_head" else 1

    def create_weights(self, layer: torch.nn.Module) -> None:
        """Create vllm-ascend's parameters, and mark the scales as not loaded."""
        self.base.create_weights(layer)
        for name in _SCALES:
            parameter = getattr(layer, name)
            parameter.data = parameter.new_full((self.scales,), torch.nan)
            parameter.weight_loader = self._load

    def _load(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Load scales in place, so that vLLM's reload notices it.

        vllm-ascend's loader replaces the parameter by a tensor on the host.
        """
        if (count := loaded_weight.numel()) != self.scales:
            raise self._refused("k_scale or v_scale", f"has {count} values")
        param.data.copy_(loaded_weight.flatten())

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check the scales, and expand them to one per channel.

        Raises:
            UnsupportedCheckpointError: A scale was not loaded, or is not positive.

        """
        for name in _SCALES:
            parameter = getattr(layer, name)
            if self.is_dummy:
                parameter.data.fill_(1)
            elif not bool((parameter > 0).all()) or not bool(
                parameter.isfinite().all()
            ):
                is_missing = bool(parameter.isnan().all())
                what = "is missing" if is_missing else "is not a positive number"
                raise self._refused(name.replace("_cache", ""), what)
            rank = get_tensor_model_parallel_rank()
            parameter.data = kv_cache.scales_per_channel(
                parameter.data, layer, self.total_heads, rank, self.ranks
            )
        self.base.process_weights_after_loading(layer)
        kv_cache.derive(layer)

    def _refused(self, name: str, what: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(
            f"A scale of the KV cache {what} in the checkpoint",
            where=f"layer {self.prefix}, {name}",
            supported=f"in each layer, k_scale and v_scale of {self.scales} positive "
            "numbers each",
            remedy=Remedy.KV_CACHE,
        )
