# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Quantized linear layers as functions of tensors.

They quantize activations and multiply, and know neither layers nor file formats, so
that the linear methods of any quantization tool can call them. They flatten the leading
axes of x, because the operators take matrices.
"""

import torch

from vllm_ascend_ct.ops.dtypes import E2M1, E8M0, FP8, MX_BLOCK
from vllm_ascend_ct.ops.traced import weight_quant_batchmatmul


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """Flatten the leading axes. Leaves a matrix as is: graph passes match no views."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _with_axes_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def weight_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    group_size: int = 0,
    max_n: int | None = None,
) -> torch.Tensor:
    """Weight-only matmul: `x @ ((weight + offset) * scale) + bias`.

    One launch; if N exceeds `max_n`, one for each part of N and one to concatenate.
    See the document of `npu_weight_quant_batchmatmul` for the layouts.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: int8 `[K, N]`, or int4 packed eight to an int32 along the axis that is
            contiguous in memory: a transposed view `[K / 8, N]`, or `[K, N / 8]`.
        scale: Dtype of x; `[1, N]`, or `[K / group_size, N]`, contiguous or transposed
            like the weight.
        offset: Dtype, shape and layout of the scale.
        bias: `[N]`, fp32 for bf16 x, fp16 for fp16 x.
        group_size: Elements of K that share a scale; 0 for per-channel scales.
        max_n: Largest N that the operator supports; None for no limit. If N is larger,
            the weight must be int8, and scale and offset transposed views like it.

    Returns:
        `[..., N]`, dtype of x.

    """
    n = scale.shape[-1]
    if max_n is not None and n > max_n:
        size = -(-n // -(-n // max_n))
        ys = []
        for start in range(0, n, size):
            part = slice(start, start + size)
            ys.append(
                weight_quant_matmul(
                    x,
                    weight[:, part],
                    scale[:, part],
                    None if offset is None else offset[:, part],
                    None if bias is None else bias[part],
                    group_size,
                )
            )
        return torch.cat(ys, dim=-1)
    y = weight_quant_batchmatmul(_matrix(x), weight, scale, offset, bias, group_size)
    return _with_axes_of(x, y)


def dynamic_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """W8A8 matmul with dynamic per-token symmetric activations. Two launches.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: int8 `[K, N]`, contiguous or a transposed view.
        weight_scale: fp32 `[N]`.
        bias: `[N]`, dtype of x or fp32.

    Returns:
        `[..., N]`, dtype of x.

    """
    q, x_scale = torch.ops.npu.npu_dynamic_quant(_matrix(x))
    y = torch.ops.npu.npu_quant_matmul(
        q,
        weight,
        weight_scale,
        pertoken_scale=x_scale,
        bias=bias,
        output_dtype=x.dtype,
    )
    return _with_axes_of(x, y)


def dynamic_fp8_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """FP8 (E4M3) matmul with dynamic per-token activations.

    Two launches, and one to add a bias: vllm-ascend documents a fault of the operator's
    bias argument.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: FP8 `[K, N]`, contiguous.
        weight_scale: fp32 `[N]`.
        bias: `[N]`, dtype of x.

    Returns:
        `[..., N]`, dtype of x.

    """
    rows = _matrix(x)
    if torch.compiler.is_compiling():
        # With one axis more: vllm-ascend's graph passes fuse a norm and a quantization
        # of its rows into one to int8, whatever dst_type is.
        q, x_scale = torch.ops.npu.npu_dynamic_quant(rows.unsqueeze(0), dst_type=FP8)
        q, x_scale = _matrix(q), x_scale.view(-1)
    else:
        q, x_scale = torch.ops.npu.npu_dynamic_quant(rows, dst_type=FP8)
    y = torch.ops.npu.npu_quant_matmul(
        q, weight, weight_scale, pertoken_scale=x_scale, output_dtype=x.dtype
    )
    if bias is not None:
        y = y + bias
    return _with_axes_of(x, y)


def dynamic_mx_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """MXFP8 or MXFP4 matmul with activations dynamically quantized alike. Two launches.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: FP8 (E4M3) `[K, N]`, contiguous; or two FP4 (E2M1) to a uint8 along K,
            the transposed view `[K / 2, N]`.
        weight_scale: uint8 (E8M0) `[ceil(K / 64), N, 2]`, contiguous or a transposed
            view like the weight.
        bias: fp32 `[N]`.

    Returns:
        `[..., N]`, dtype of x.

    """
    packed = E2M1 if weight.dtype == torch.uint8 else None
    q, x_scale = torch.ops.npu.npu_dynamic_mx_quant(
        _matrix(x), dst_type=FP8 if packed is None else packed
    )
    y = torch.ops.npu.npu_quant_matmul(
        q,
        weight,
        weight_scale,
        pertoken_scale=x_scale,
        bias=bias,
        output_dtype=x.dtype,
        x1_dtype=packed,
        x2_dtype=packed,
        pertoken_scale_dtype=E8M0,
        scale_dtype=E8M0,
        group_sizes=[1, 1, MX_BLOCK],
    )
    return _with_axes_of(x, y)


def quant_matmul_dequant(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """W8A8 matmul with dynamic per-token activations in one operator. 310P only.

    One launch, and one to add a bias.

    Args:
        x: `[..., K]` fp16.
        weight: int8 `[N, K]`, contiguous.
        weight_scale: fp32 `[N]`.
        bias: `[N]`, dtype of x.

    Returns:
        `[..., N]`, dtype of x.

    """
    y = torch.ops.npu.npu_quant_matmul_dequant(
        _matrix(x), weight, weight_scale, quant_mode="pertoken"
    )
    if bias is not None:
        y = y + bias
    return _with_axes_of(x, y)


def dynamic_quant_int4_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    assist: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """W4A8 matmul with dynamic per-token symmetric activations.

    Two launches, and one to add a bias: this mode of the operator takes none.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: int4 packed eight to an int32 along N: `[K, N / 8]`, contiguous.
        weight_scale: int64 from `npu_trans_quant_param`, `[N]` or
            `[K / group_size, N]`.
        assist: fp32 `[N]`, from `weights.int4.pack_outputs_with_assist`.
        bias: `[N]`, dtype of x.
        group_size: Elements of K that share a scale; 0 for per-channel scales.

    Returns:
        `[..., N]`, dtype of x.

    """
    q, x_scale = torch.ops.npu.npu_dynamic_quant(_matrix(x))
    y = torch.ops.npu.npu_quant_matmul(
        q,
        weight,
        weight_scale,
        offset=assist,
        pertoken_scale=x_scale.unsqueeze(1) if group_size else x_scale,
        output_dtype=x.dtype,
        group_sizes=[0, 0, group_size],
    )
    if bias is not None:
        y = y + bias
    return _with_axes_of(x, y)


def static_fake_quant(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize to a static symmetric int8 grid and dequantize. Three launches.

    Args:
        x: `[..., K]` fp16 or bf16.
        scale: fp32 `[1]` per tensor, or `[K]` per channel.

    Returns:
        Shape and dtype of x.

    """
    q = torch.ops.npu.npu_quantize(_matrix(x), scale, None, torch.qint8, -1, True)
    return _with_axes_of(x, (q * scale).to(x.dtype))


def dynamic_asymmetric_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """W8A8 matmul with dynamic per-token asymmetric activations.

    A token's zero point is a float. Its contribution `offset * weight_sum` is
    subtracted from the int32 product in fp32: subtracting it from a product that is
    already rounded to x's dtype would cancel most of the significant digits.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: int8 `[K, N]`, contiguous or a transposed view.
        weight_scale: fp32 `[N]`.
        weight_sum: fp32 `[N]`, the integer weight summed over K.
        bias: `[N]`.

    Returns:
        `[..., N]`, dtype of x.

    """
    q, x_scale, x_offset = torch.ops.npu.npu_dynamic_quant_asymmetric(_matrix(x))
    product = torch.ops.npu.npu_quant_matmul(
        q, weight, weight_scale, output_dtype=torch.int32
    )
    y = torch.addcmul(product.float(), x_offset.unsqueeze(1), weight_sum, value=-1)
    y = y * x_scale.unsqueeze(1) * weight_scale
    if bias is not None:
        y = y + bias
    return _with_axes_of(x, y.to(x.dtype))


def static_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    dequant_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    divides: bool = True,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """W8A8 matmul with static per-tensor activations.

    Two launches; one if vllm-ascend's compiler fuses the quantization into the
    preceding norm.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: int8 `[K, N]`, contiguous or a transposed view.
        dequant_scale: `[N]`, the activations' scale times the weight's: fp32 for bf16
            x, int64 from `npu_trans_quant_param` for fp16 x.
        x_scale: fp32 `[1]`, the scale, if `divides`; otherwise its reciprocal, `[K]`
            and dtype of x.
        x_zero_point: int32 `[1]` if `divides`; otherwise `[K]` and dtype of x.
        bias: int32 `[N]`, added to the int32 product.
        divides: Whether x is divided by `x_scale`, or multiplied by it.
        divisor: `[K]`, dtype of x: the scale itself, for norms that quantize. If given,
            `x_scale` must be a reciprocal, and `x_zero_point` must be given.

    Returns:
        `[..., N]`, dtype of x.

    """
    if divisor is None:
        q = torch.ops.npu.npu_quantize(
            _matrix(x), x_scale, x_zero_point, torch.qint8, -1, divides
        )
    else:
        # vllm-ascend's operator, which its graph passes match.
        q = torch.ops.vllm.quantize(_matrix(x), divisor, x_scale, x_zero_point)
    y = torch.ops.npu.npu_quant_matmul(
        q, weight, dequant_scale, bias=bias, output_dtype=x.dtype
    )
    return _with_axes_of(x, y)
