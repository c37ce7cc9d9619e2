# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operators that prepare weights and scales at load time."""

import torch

from vllm_ascend_ct.ops.dtypes import FRACTAL_NZ
from vllm_ascend_ct.ops.emulated.registry import (
    describe,
    emulates,
    mark_nz,
    refuse,
)

_INT4_PER_INT32 = 8
_FP19_MASK = 0xFFFFE000
_SCALE_FLAG = 1 << 46
_ND = 2


def _trans_quant_param_fake(
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    round_mode: int | None = 0,
) -> torch.Tensor:
    name = "npu_trans_quant_param"
    if round_mode not in (0, 1):
        refuse(name, f"round_mode={round_mode}; supported: 0, 1")
    for tensor in (scale, offset):
        if tensor is not None and (
            tensor.dtype != torch.float32
            or tensor.dim() not in (1, 2)
            or tensor.shape[:-1].numel() != 1
            or tensor.numel() == 0
            or not tensor.is_contiguous()
        ):
            supported = "contiguous float32 (n,) or (1, n)"
            refuse(name, f"got {describe(tensor)}; supported: {supported}")
    sizes = [scale.numel(), scale.numel() if offset is None else offset.numel()]
    if sizes[0] != sizes[1] and 1 not in sizes:
        refuse(name, f"sizes {sizes}; supported: the same, or one of them 1")
    longest = scale if offset is None or offset.numel() <= scale.numel() else offset
    return scale.new_empty(longest.shape, dtype=torch.int64)


@emulates(
    "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) "
    "-> Tensor",
    fake=_trans_quant_param_fake,
)
def npu_trans_quant_param(
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    round_mode: int | None = 0,
) -> torch.Tensor:
    """Pack a dequantization scale, and the offset of an int8 output, for the fixpipe.

    The fixpipe uses 10 mantissa bits: `round_mode` 0 truncates to them, 1 rounds to
    nearest even.

    Source: op-plugin `torch_npu-npu_trans_quant_param.md`; ops-nn
    `quant/trans_quant_param_v2`.

    Args:
        scale: fp32 `(n,)` or `(1, n)`.
        offset: fp32, same shape or one element.
        round_mode: 0 or 1.

    Returns:
        int64, shape of the longer argument.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    packed = _trans_quant_param_fake(scale, offset, round_mode)
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        bits = bits + 0xFFF + ((bits >> 13) & 1)
    packed.copy_((bits & _FP19_MASK) | _SCALE_FLAG)
    if offset is not None:
        nine_bits = offset.round().clamp(-256, 255).to(torch.int64) & 0x1FF
        packed.copy_((packed & 0x4000FFFFFFFF) | (nine_bits << 37))
    return packed


def unpack_quant_param(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Extract the fp32 scale and offset from a result of `npu_trans_quant_param`."""
    scale = (packed & _FP19_MASK).to(torch.int32).view(torch.float32)
    nine_bits = (packed >> 37) & 0x1FF
    return scale, ((nine_bits ^ 0x100) - 0x100).to(torch.float32)


def unpack_raw_scale(packed: torch.Tensor) -> torch.Tensor:
    """Extract the fp32 scale from int64 that holds its bits, as the fixpipe uses it."""
    return truncate_to_fp19((packed & 0xFFFFFFFF).to(torch.int32).view(torch.float32))


def truncate_to_fp19(scale: torch.Tensor) -> torch.Tensor:
    """Clear the 13 mantissa bits that the fixpipe does not use."""
    return (scale.view(torch.int32) & -8192).view(torch.float32)


def _convert_weight_to_int4pack_fake(
    weight: torch.Tensor, inner_k_tiles: int = 0
) -> torch.Tensor:
    if (
        weight.dtype != torch.int32
        or weight.dim() != 2
        or weight.shape[-1] % _INT4_PER_INT32
        or not weight.is_contiguous()
    ):
        refuse(
            "npu_convert_weight_to_int4pack",
            f"weight is {describe(weight)}; supported: contiguous int32, 2-D (A2 packs "
            "only the first matrix of a 3-D one), last size a multiple of 8",
        )
    return weight.new_empty((len(weight), weight.shape[1] // _INT4_PER_INT32))


@emulates(
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    fake=_convert_weight_to_int4pack_fake,
)
def npu_convert_weight_to_int4pack(
    weight: torch.Tensor, inner_k_tiles: int = 0
) -> torch.Tensor:
    """Pack eight int4 values of the last axis into one int32, lowest nibble first.

    Source: op-plugin `ConvertWeightToINT4PackKernelNpuOpApi.cpp`.

    Args:
        weight: int32 `[R, C]`, one value in [-8, 7] per element; only the low 4 bits
            are used.
        inner_k_tiles: Ignored.

    Returns:
        int32 `[R, C / 8]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    packed = _convert_weight_to_int4pack_fake(weight, inner_k_tiles)
    nibbles = (weight & 0xF).to(torch.int64).unflatten(-1, (-1, _INT4_PER_INT32))
    shifts = torch.arange(0, 32, 4)
    return packed.copy_((nibbles << shifts).sum(-1).to(torch.uint32).view(torch.int32))


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int4 along the last axis: int32 `[R, C / 8]` to int8 `[R, C]`."""
    pairs = packed.contiguous().view(torch.int8)
    return torch.stack((pairs << 4 >> 4, pairs >> 4), dim=-1).flatten(-2)


def _format_cast_fake(
    input: torch.Tensor,
    acl_format: int,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    if acl_format not in (_ND, FRACTAL_NZ):
        refuse(
            "npu_format_cast",
            f"acl_format={acl_format}; emulated: {_ND} (ND), {FRACTAL_NZ} (FRACTAL_NZ)",
        )
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@emulates(
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, "
    "int? input_dtype=None) -> Tensor",
    fake=_format_cast_fake,
)
def npu_format_cast(
    input: torch.Tensor,
    acl_format: int,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """Copy to another memory format. It is only recorded: CPU tensors have no formats.

    Source: op-plugin `(beta)torch_npu-npu_format_cast.md`.

    Args:
        input: Any tensor.
        acl_format: 2 (ND) or 29 (FRACTAL_NZ).
        customize_dtype: Ignored.
        input_dtype: Ignored.

    Returns:
        The same values in a new tensor.

    Raises:
        OperatorLimitError: The format is not one of these.

    """
    result = _format_cast_fake(input, acl_format, customize_dtype, input_dtype)
    result.copy_(input)
    return mark_nz(result) if acl_format == FRACTAL_NZ else result
