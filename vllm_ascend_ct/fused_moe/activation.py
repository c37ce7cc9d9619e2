# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Activations of gated experts; counterpart of upstream's `fused_moe/activation.py`."""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers import activation as layers
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_ascend_ct.fused_moe.functional import Activation

# NPU operators exist for SiLU only. Upstream composes the others of torch operators.
_MODULES: dict[str, Callable[[Any], Any]] = {
    "silu": lambda c: layers.SiluAndMulWithClamp(c.clamp_limit),
    "gelu": lambda c: layers.GeluAndMul(),
    "gelu_tanh": lambda c: layers.GeluAndMul("tanh"),
    "swigluoai": lambda c: layers.SwigluOAIAndMul(),
    "swigluoai_uninterleave": lambda c: layers.SiluAndMulWithClamp(
        c.clamp_limit, c.alpha, c.beta
    ),
    "swiglustep": lambda c: layers.SwigluStepAndMul(),
    "situ": lambda c: layers.SituAndMul(
        c.activation_situ_beta, c.activation_situ_linear_beta
    ),
}


def supports(activation: MoEActivation) -> bool:
    """Whether this package can compute the activation between the two products."""
    return activation.value in _MODULES


def activation_function(
    moe: FusedMoEConfig, quant_config: FusedMoEQuantConfig
) -> Activation | None:
    """Make the function that computes a layer's activation.

    Args:
        moe: The layer's config.
        quant_config: Has the activation's clamp limit, alpha and beta.

    Returns:
        A function from `[M, 2 * I]` to `[M, I]`; None for SwiGLU without a clamp limit,
        which the NPU operators compute.

    """
    # vLLM 0.23 does not have it; there vllm-ascend computes the activation.
    from vllm.model_executor.layers.fused_moe import ApplyMoEActivationConfig

    config = ApplyMoEActivationConfig.from_configs(moe, quant_config)
    if moe.activation == MoEActivation.SILU and config.clamp_limit is None:
        return None
    function: Activation = _MODULES[moe.activation.value](config).forward_native
    return function
