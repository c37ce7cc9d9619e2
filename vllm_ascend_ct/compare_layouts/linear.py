# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Linear layers to compare, one of each kind."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from vllm_ascend_ct.compare_layouts.layer import (
    Layer,
    NotServed,
    Sizes,
    on_fp8_grid,
    on_int8_grid,
    on_mx_grid,
    packed,
    random_fp8,
    random_integers,
    random_mx,
    with_parameters,
)
from vllm_ascend_ct.ops.limits import current_limits

# Its reciprocal rounds to bfloat16 with an error of 0.1 %, like a typical random scale.
INPUT_SCALE = 1 / 27.03
PER_CHANNEL = -1


def _mixed_precision(
    bits: int, group_size: int, quantizes: bool, sizes: Sizes
) -> Layer:
    """A product by a packed weight.

    Args:
        bits: Width of the weights.
        group_size: Elements of K that share a scale, or `PER_CHANNEL`.
        quantizes: Whether activations are quantized to int8.
        sizes: Sizes, dtype and device.

    """
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )

    from vllm_ascend_ct.kernels.linear.mixed_precision import ascend, ascend_wna8

    kernel_class: Any = ascend.AscendWNA16LinearKernel
    if quantizes:
        kernel_class = ascend_wna8.AscendWNA8LinearKernel
    # A field of vLLM before 0.30.
    others: Any = {"has_g_idx": False}
    names = {field.name for field in fields(MPLinearLayerConfig)}
    k, n = sizes.k, sizes.n
    config = MPLinearLayerConfig(
        full_weight_shape=(k, n),
        partition_weight_shape=(k, n),
        weight_type=ascend.packed_type(bits, True),
        act_type=sizes.dtype,
        group_size=group_size,
        zero_points=False,
        **{name: value for name, value in others.items() if name in names},
    )
    serves, reason = kernel_class.can_implement(config)
    if not serves:
        raise NotServed(reason)
    groups = 1 if group_size == PER_CHANNEL else k // group_size
    values = random_integers(bits, n, k)
    scale = (torch.rand(n, groups) / 100 + 0.01).to(sizes.dtype)
    words = packed(values, bits)
    layer = with_parameters(sizes.device, weight_packed=words, weight_scale=scale)
    kernel = kernel_class(config, "weight_packed", "weight_scale")
    kernel.process_weights_after_loading(layer)
    weight = (values * scale.double().repeat_interleave(k // groups, 1)).t()

    def formula(x: torch.Tensor) -> torch.Tensor:
        return (on_int8_grid(x) if quantizes else x.double()) @ weight

    return Layer(lambda x: kernel.apply_weights(layer, x), formula, kernel.announced)


def _int8(is_static: bool, is_symmetric: bool, sizes: Sizes) -> Layer:
    """An int8 weight, with static or dynamic activations."""
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        Int8ScaledMMLinearLayerConfig,
    )

    from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
        AscendInt8ScaledMMLinearKernel,
    )

    config = Int8ScaledMMLinearLayerConfig(
        is_channelwise=True,
        is_static_input_scheme=is_static,
        input_symmetric=is_symmetric,
    )
    serves, reason = AscendInt8ScaledMMLinearKernel.can_implement(config)
    if not serves:
        raise NotServed(reason)
    weight = random_integers(8, sizes.n, sizes.k).to(torch.int8)
    scale = torch.rand(sizes.n, 1) / 1000 + 0.001
    tensors = {
        "weight": weight,
        "weight_scale": scale,
        "input_scale": torch.tensor([INPUT_SCALE]) if is_static else None,
        "input_zero_point": None,
        "azp_adj": None,
    }
    layer = with_parameters(sizes.device, **tensors)
    layer.params_dtype = sizes.dtype
    kernel: Any = AscendInt8ScaledMMLinearKernel(config, list(tensors))
    kernel.process_weights_after_loading(layer)
    exact = weight.t().double() * scale.t().double()
    on_grid = _on_asymmetric_grid
    if is_symmetric:
        on_grid = _on_static_grid if is_static else on_int8_grid
    return Layer(
        lambda x: kernel.apply_weights(layer, x),
        lambda x: on_grid(x) @ exact,
        kernel.announced,
    )


def _on_static_grid(x: torch.Tensor) -> torch.Tensor:
    step = torch.tensor(INPUT_SCALE).double()
    return (x.double() / step).round().clamp(-128, 127) * step


def _on_asymmetric_grid(x: torch.Tensor) -> torch.Tensor:
    """Round rows to the operator's grid, whose offset is no integer."""
    low, high = x.double().aminmax(dim=1, keepdim=True)
    step = (high - low) / 255
    offset = 127 - high / step
    return ((x.double() / step + offset).round() - offset) * step


def _fp8(sizes: Sizes) -> Layer:
    """An FP8 weight with dynamic activations."""
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        FP8ScaledMMLinearLayerConfig,
    )
    from vllm.model_executor.layers.quantization.utils import quant_utils

    from vllm_ascend_ct.kernels.linear.scaled_mm.ascend_fp8 import (
        AscendFP8ScaledMMLinearKernel,
    )

    config = FP8ScaledMMLinearLayerConfig(
        weight_quant_key=quant_utils.kFp8StaticChannelSym,
        activation_quant_key=quant_utils.kFp8DynamicTokenSym,
        weight_shape=(sizes.n, sizes.k),
        input_dtype=sizes.dtype,
        out_dtype=sizes.dtype,
    )
    for serves, reason in (
        AscendFP8ScaledMMLinearKernel.is_supported(),
        AscendFP8ScaledMMLinearKernel.can_implement(config),
    ):
        if not serves:
            raise NotServed(reason)
    weight, scale = random_fp8(sizes.n, sizes.k)
    tensors = {
        "weight": weight.t(),
        "weight_scale": scale,
        "input_scale": None,
        "input_scale_ub": None,
    }
    layer = with_parameters(sizes.device, **tensors)
    kernel: Any = AscendFP8ScaledMMLinearKernel(config, list(tensors))
    kernel.process_weights_after_loading(layer)
    exact = weight.t().double() * scale.t().double()
    return Layer(
        lambda x: kernel.apply_weights(layer, x),
        lambda x: on_fp8_grid(x) @ exact,
        kernel.announced,
    )


def _mx(bits: int, sizes: Sizes) -> Layer:
    """A weight in MXFP8 or MXFP4, with activations in the same format."""
    from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import (
        Mxfp8LinearLayerConfig,
    )
    from vllm.model_executor.layers.quantization.utils import quant_utils

    from vllm_ascend_ct.kernels.linear.mxfp4.ascend import AscendMxfp4LinearKernel
    from vllm_ascend_ct.kernels.linear.mxfp8.ascend import AscendMxfp8LinearKernel

    k, n = sizes.k, sizes.n
    kernel_class: Any = AscendMxfp8LinearKernel
    make: Any = Mxfp8LinearLayerConfig
    if bits == 4:
        kernel_class = AscendMxfp4LinearKernel
        make = MxFp4LinearLayerConfig
    given = {"weight_shape": (n, k), "activation_quant_key": quant_utils.kMxfp4Dynamic}
    # Releases of vLLM before 0.27 say nothing of activations.
    names = {field.name for field in fields(make)}
    config = make(**{name: value for name, value in given.items() if name in names})
    limits = current_limits().mx_matmul
    _, reason = kernel_class.is_supported()
    reason = reason or (limits and limits.refusal(sizes.dtype, k, n))
    if reason:
        raise NotServed(reason)
    weight, scale, exact = random_mx(bits, n, k)
    layer = with_parameters(sizes.device, weight=weight, weight_scale=scale)
    kernel = kernel_class(config)
    kernel.process_weights_after_loading(layer)
    return Layer(
        lambda x: kernel.apply_weights(layer, x),
        lambda x: on_mx_grid(bits, x) @ exact.t(),
        kernel.announced,
    )


LINEAR: dict[str, Callable[[Sizes], Layer]] = {
    "w4a16-group": partial(_mixed_precision, 4, 128, False),
    "w4a16-channel": partial(_mixed_precision, 4, PER_CHANNEL, False),
    "w8a16-group": partial(_mixed_precision, 8, 128, False),
    "w8a16-channel": partial(_mixed_precision, 8, PER_CHANNEL, False),
    "w4a8-group": partial(_mixed_precision, 4, 256, True),
    "w4a8-channel": partial(_mixed_precision, 4, PER_CHANNEL, True),
    "w8a8-dynamic": partial(_int8, False, True),
    "w8a8-asymmetric": partial(_int8, False, False),
    "w8a8-static": partial(_int8, True, True),
    "fp8-dynamic": _fp8,
    "mxfp8": partial(_mx, 8),
    "mxfp4": partial(_mx, 4),
}
