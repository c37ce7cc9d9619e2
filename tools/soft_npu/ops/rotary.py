# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Rotary position embeddings."""

import torch

from tools.soft_npu.ops.registry import implements
from vllm_ascend_ct.ops.emulated.registry import describe, refuse


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool
) -> torch.Tensor:
    """Rotate pairs in fp32, rounded once.

    Args:
        x: `[T, heads, D]`; values from R on are not rotated.
        cos: `[T, R / 2]`.
        sin: As `cos`.
        halves: Whether pairs are `(i, i + R / 2)`; otherwise `(2 i, 2 i + 1)`.

    """
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    if halves:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
        turned = pairs.flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)


@implements("atb::_npu_rotary_embedding")
def _npu_rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> None:
    """Rotate query and key in place, like vLLM's `rotary_embedding`.

    Source: op-plugin `atb/RopeKernelNpuOpAtb.cpp`; ATB `RopeParam`.

    Args:
        positions: `[T]`.
        query: `[T, heads * head_size]` or `[T, heads, head_size]`.
        key: As `query`.
        head_size: Head size of query and key.
        cos_sin_cache: `[positions, R]`, cosines then sines.
        is_neox_style: Whether pairs are `(i, i + R / 2)`.

    """
    if positions.dim() != 1 or cos_sin_cache.dim() != 2:
        refuse(
            "_npu_rotary_embedding",
            f"positions is {describe(positions)}, cos_sin_cache is "
            f"{describe(cos_sin_cache)}; emulated: 1-D, 2-D",
        )
    cos, sin = cos_sin_cache[positions.long()].chunk(2, -1)
    for x in (query, key):
        heads = x.view(len(x), -1, head_size)
        heads.copy_(_rotate(heads, cos, sin, is_neox_style))


@implements("npu::npu_mrope")
def npu_mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key by one position per token.

    Source: op-plugin `torch_npu-npu_mrope.md`.

    Args:
        positions: `[T]`, or `[1, T]`.
        query: `[T, heads * head_size]`.
        key: As `query`.
        cos_sin_cache: `[positions, R]`.
        head_size: Head size of query and key.
        mrope_section: None or zeros; several positions per token are not emulated.
        rotary_mode: "half" or "interleave".
        cache_mode: Has no effect without sections.

    """
    name = "npu_mrope"
    if mrope_section is not None and any(mrope_section):
        refuse(name, f"mrope_section={mrope_section}; emulated: none")
    if rotary_mode not in (None, "half", "interleave"):
        refuse(name, f"rotary_mode={rotary_mode}; supported: half, interleave")
    if cache_mode not in (None, "default", "interleave"):
        refuse(name, f"{cache_mode=}; cache_mode only support default or interleave")
    results = query.clone(), key.clone()
    halves = rotary_mode != "interleave"
    _npu_rotary_embedding(
        positions.reshape(-1), *results, head_size, cos_sin_cache, halves
    )
    return results


def interleaved_to_halves(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Reorder interleaved pairs to halves, and rotate them, in fp32."""
    even, odd = x[..., ::2].float(), x[..., 1::2].float()
    straight, turned = torch.cat((even, odd), -1), torch.cat((-odd, even), -1)
    return (straight * cos.float() + turned * sin.float()).to(x.dtype)


@implements("npu::npu_interleave_rope")
def npu_interleave_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotate interleaved pairs of `[B, N, S, 64]`; the result has them as halves.

    Source: op-plugin `torch_npu-npu_interleave_rope.md`.

    Args:
        x: fp16 or bf16.
        cos: `[B, 1, S or 1, 64]`, each value twice.
        sin: As `cos`.

    """
    shape = x.shape
    if x.dim() != 4 or shape[-1] != 64 or cos.dim() != 4 or cos.shape[1] != 1:
        refuse(
            "npu_interleave_rope",
            f"x is {describe(x)}, cos is {describe(cos)}; supported: [B, N, S, 64], "
            "[B, 1, S, 64]",
        )
    return interleaved_to_halves(x, cos, sin)


@implements("npu::npu_rotary_mul")
def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `x * r1 + rotate(x) * r2` in fp32.

    Source: op-plugin `torch_npu-npu_rotary_mul.md`.

    Args:
        input: 4-D.
        r1: Cosines, which broadcast to `input`.
        r2: Sines.
        rotary_mode: "half" or "interleave".
        rotate: Not emulated.

    """
    if rotate is not None or rotary_mode not in ("half", "interleave"):
        refuse("npu_rotary_mul", f"rotary_mode={rotary_mode}, rotate: not emulated")
    x = input.float()
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)
