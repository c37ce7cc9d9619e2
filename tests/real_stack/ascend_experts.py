# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's MoE layer with random compressed-tensors weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tests.layers.quantized_experts import (
    PREFIX,
    FormulaExperts,
    Sizes,
    compressed_experts,
    tensors_of,
)

SIZES = Sizes(8, hidden=512, intermediate=256, top_k=3)
# Without vllm-ascend's own operators, the products and the activation are rounded to
# bfloat16 before the result is quantized to int8.
ROUNDED_TOLERANCE = 1.5e-2


def build(config: Any, vllm_config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Build vllm-ascend's layer."""
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm_ascend.utils import is_310p

    made = get_quantization_config("compressed-tensors").from_config(config)
    vllm_config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(dtype):
        layer = FusedMoE(
            num_experts=SIZES.experts,
            hidden_size=SIZES.hidden,
            intermediate_size=SIZES.intermediate,
            quant_config=made,
            prefix=PREFIX,
            **{"top_k": SIZES.top_k, **options},
        )
    assert type(layer).__name__ == f"AscendFusedMoE{'310' if is_310p() else ''}"
    return layer


def load_tensors(layer: Any, modules: Any) -> None:
    """Load a checkpoint's tensors into the layer, like a model's loader."""
    shards = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, tensor in tensors_of(modules):
        expert, projection, kind = name.split(".")
        shard = shards[projection]
        param = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{kind}")
        param.weight_loader(param, tensor, name, shard, int(expert))


def load(
    scheme: str, vllm_config: Any, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Any, FormulaExperts]:
    """Build and load vllm-ascend's layer."""
    modules, config, formulas = compressed_experts(SIZES, scheme, dtype)
    layer = build(config, vllm_config, dtype, **options)
    load_tensors(layer, modules)
    layer.quant_method.process_weights_after_loading(layer)
    if not layer.quant_method.weights.experts_cls.quantizes_activations:
        for expert in formulas:
            for formula in expert.values():
                formula.input_args = None
    return layer, FormulaExperts(formulas)


def run(
    layer: Any,
    x: torch.Tensor,
    routed: tuple[torch.Tensor, torch.Tensor] | None,
    vllm_config: Any,
    **context: Any,
) -> torch.Tensor:
    """Run the layer, with fixed routing if given."""
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context
    from vllm_ascend.utils import is_310p

    package = "_310p" if is_310p() else "ops"
    select = f"vllm_ascend.{package}.fused_moe.experts_selector.select_experts"
    logits = torch.randn(len(x), SIZES.experts)
    with ExitStack() as stack:
        # Events of streams, which do not exist here.
        stack.enter_context(patch("torch.npu.current_stream"))
        if routed is not None:
            stack.enter_context(patch(select, return_value=routed))
        context = {"num_tokens": len(x), **context}
        stack.enter_context(set_ascend_forward_context(None, vllm_config, **context))
        result: torch.Tensor = layer.forward_impl(x, logits)
    return result


@contextmanager
def own_operators() -> Iterator[None]:
    """Make vllm-ascend find its own operators, as on an NPU."""
    mlp = "vllm_ascend.ops.fused_moe.moe_mlp.enable_custom_op"
    with (
        patch("vllm_ascend.utils.enable_custom_op", return_value=True),
        patch(mlp, return_value=True),
    ):
        yield
