# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""`npu_dynamic_mx_quant`, which quantizes activations to MXFP8 and MXFP4."""

import torch

from vllm_ascend_ct.ops.dtypes import E2M1, FP8, FP8_MAX, MX_BLOCK
from vllm_ascend_ct.ops.emulated.mx_values import (
    E8M0_NAN,
    encode_e2m1,
    scale_pairs,
)
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    describe,
    emulates,
    refuse,
)
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_dynamic_mx_quant"
# Exponents of the formats' largest powers of two.
_E4M3_EXPONENT, _E2M1_EXPONENT = 8, 2
_ROUND_MODES = {"rint": True, "round": False}


def _dynamic_mx_quant_fake(
    input: torch.Tensor,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = E2M1,
    block_size: int = MX_BLOCK,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    limits = current_limits().mx_matmul
    if limits is None:
        refuse(_NAME, "the chip does not have this operator")
    if input.dtype not in limits.dtypes or not 1 <= input.dim() <= 7:
        refuse(
            _NAME, f"input is {describe(input)}; emulated: 1-D to 7-D {limits.dtypes}"
        )
    *leading, k = input.shape
    if axis not in (-1, len(leading)) or block_size != MX_BLOCK:
        refuse(
            _NAME,
            f"axis={axis}, block_size={block_size}; emulated: the last axis of an "
            f"input that is {describe(input)}, in blocks of {MX_BLOCK}",
        )
    if scale_alg != 0 or dst_type_max or max_low_bound:
        refuse(_NAME, "scale_alg, dst_type_max and max_low_bound are not emulated")
    is_packed = dst_type == E2M1
    if not is_packed and as_dtype(_NAME, dst_type) != FP8:
        refuse(_NAME, f"dst_type={dst_type}; emulated: E4M3, E2M1 ({E2M1})")
    modes = ("rint", "round") if is_packed else ("rint",)
    if round_mode not in modes:
        refuse(_NAME, f"round_mode={round_mode}; emulated: {', '.join(modes)}")
    if is_packed and k % 2:
        refuse(_NAME, f"input is {describe(input)}; supported for E2M1: even last size")
    if input.numel() == 0:
        refuse(_NAME, f"input is {describe(input)}; emulated: not empty")
    return (
        input.new_empty((*leading, k // 2), dtype=torch.uint8)
        if is_packed
        else input.new_empty(input.shape, dtype=FP8),
        input.new_empty((*leading, scale_pairs(k), 2), dtype=torch.uint8),
    )


@emulates(
    "npu_dynamic_mx_quant(Tensor input, *, int axis=-1, str round_mode='rint', "
    "int dst_type=296, int block_size=32, int? scale_alg=0, float dst_type_max=0., "
    "float max_low_bound=0.) -> (Tensor, Tensor)",
    fake=_dynamic_mx_quant_fake,
)
def npu_dynamic_mx_quant(
    input: torch.Tensor,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = E2M1,
    block_size: int = MX_BLOCK,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks of a row to E4M3 or E2M1, with a power of two for each block. A5.

    The scale's exponent is `floor(log2(amax))` less the exponent of the format's
    largest power of two, 8 or 2. Quotients above the largest value saturate. A block
    whose exponent would be below that of the smallest scale gets this scale, `2**-127`,
    and zeros; one with an infinity or NaN gets the scale NaN.

    Source: ops-nn `quant/dynamic_mx_quant`, `aclnnDynamicMxQuantV2.md` and
    `op_kernel/arch35`.

    Args:
        input: `[..., K]` fp16 or bf16.
        axis: The last axis.
        round_mode: "rint", half to even. For E2M1 also "round", half away from zero.
        dst_type: E4M3, or 296 for E2M1.
        block_size: 32.
        scale_alg: Only the default is emulated.
        dst_type_max: Only the default is emulated.
        max_low_bound: Only the default is emulated.

    Returns:
        FP8 `[..., K]`, or uint8 `[..., K / 2]` with two E2M1 values each; and uint8
        scales `[..., ceil(K / 64), 2]`, E8M0. If the number of blocks is odd, the last
        scale is 0.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    _dynamic_mx_quant_fake(
        input, axis, round_mode, dst_type, block_size, scale_alg, dst_type_max
    )
    half_to_even = _ROUND_MODES[round_mode]
    return quantize_blocks(input.float(), dst_type == E2M1, half_to_even)


def quantize_blocks(
    values: torch.Tensor, is_packed: bool, half_to_even: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as `npu_dynamic_mx_quant` does.

    Args:
        values: fp32 `[..., K]`.
        is_packed: Whether to E2M1, two to a byte, or to E4M3.
        half_to_even: Whether ties of E2M1 go to the even mantissa, or away from zero.

    Returns:
        The values, and their scales uint8 `[..., ceil(K / 64), 2]`.

    """
    k, missing = values.shape[-1], -values.shape[-1] % MX_BLOCK
    padded = torch.nn.functional.pad(values, (0, missing))
    blocks = padded.unflatten(-1, (-1, MX_BLOCK))
    amax = blocks.abs().amax(dim=-1)
    # frexp's mantissa is in [0.5, 1), and its exponent 0 for 0. E8M0's bias is 127.
    exponent = torch.frexp(amax).exponent + 126
    codes = exponent - (_E2M1_EXPONENT if is_packed else _E4M3_EXPONENT)
    codes = torch.where(amax > 0, codes.clamp_(min=0), 0)
    factor = torch.ldexp(torch.ones_like(amax), 127 - codes)
    factor.masked_fill_(codes == 0, 0.0)
    unfinished = ~amax.isfinite()
    codes.masked_fill_(unfinished, E8M0_NAN)
    factor.masked_fill_(unfinished, torch.nan)
    quotients = (blocks * factor.unsqueeze(-1)).flatten(-2)[..., :k]
    if is_packed:
        q = encode_e2m1(quotients, half_to_even)
    else:
        q = quotients.clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    scale = torch.zeros((*values.shape[:-1], scale_pairs(k), 2), dtype=torch.uint8)
    scale.flatten(-2)[..., : codes.shape[-1]] = codes.to(torch.uint8)
    return q, scale
