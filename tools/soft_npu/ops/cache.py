# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that write to and read from KV caches."""

import torch

from tools.soft_npu.ops.norm import npu_rms_norm
from tools.soft_npu.ops.registry import implements
from tools.soft_npu.ops.rotary import interleaved_to_halves
from vllm_ascend_ct.ops.emulated.registry import describe, refuse
from vllm_ascend_ct.ops.soc import Soc, current_soc

_NZ_BYTES = 32


def _scatter(
    name: str, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write rows `[T, ...]` to `[blocks, block_size, ...]`; skip negative slots."""
    slots = slots.long()
    blocks, size = cache.shape[:2]
    if slots.numel() and int(slots.max()) >= blocks * size:
        refuse(name, f"slot {int(slots.max())} of {blocks} blocks of {size}")
    here = slots >= 0
    slots = slots[here]
    values = rows[here].reshape(-1, *cache.shape[2:])
    cache[slots // size, slots % size] = values


def by_token(cache: torch.Tensor) -> torch.Tensor:
    """A paged cache of ATB as a view `[blocks, block_size, ...]`.

    On the 310P it is `[blocks, heads * D / 16, block_size, 16]`: FRACTAL_NZ, whose
    tiles are its rows.
    """
    if current_soc() is not Soc.ASCEND_310P:
        return cache
    return cache.transpose(1, 2)


@implements("atb::_npu_reshape_and_cache")
def _npu_reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    """Write keys and values `[T, heads, D]` to caches; see `by_token`.

    Source: op-plugin `atb/ReshapeAndCacheKernelNpuOpAtb.cpp`; ATB
    `ReshapeAndCacheParam`.

    Args:
        key: Keys of the tokens.
        value: As `key`.
        key_cache: `[blocks, block_size, heads, D]`, or as `by_token` says; written.
        value_cache: As `key_cache`.
        slot_indices: int32 `[T]`; negative for padding tokens.

    """
    name = "_npu_reshape_and_cache"
    if slot_indices.dtype != torch.int32 or slot_indices.shape != key.shape[:1]:
        refuse(
            name,
            f"slot_indices is {describe(slot_indices)}, key is {describe(key)}; "
            "supported: int32 [T], [T, heads, D]",
        )
    _scatter(name, by_token(key_cache), key, slot_indices)
    _scatter(name, by_token(value_cache), value, slot_indices)


@implements("npu::npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    compress_lens: torch.Tensor | None = None,
    compress_seq_offsets: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write keys and values `[T, heads, D]` to caches.

    Source: op-plugin `torch_npu-npu_scatter_pa_kv_cache.md`, first case, and its test.

    Args:
        key: Keys of the tokens.
        value: As `key`.
        key_cache: `[blocks, block_size, heads, D]`; in mode "PA_NZ"
            `[blocks, heads * D / nz, block_size, nz]`, where nz is 32 bytes; the second
            axis may be split into two. Blocks are contiguous; the document demands all
            of it, but vllm-ascend 0.30 puts those of keys and values in turn.
        value_cache: As `key_cache`.
        slot_mapping: int32 or int64 `[T]`.
        compress_lens: Not emulated.
        compress_seq_offsets: Not emulated.
        seq_lens: Not emulated.
        cache_mode: "PA_NZ", or "Norm" or None.

    """
    name = "npu_scatter_pa_kv_cache"
    if any(x is not None for x in (compress_lens, compress_seq_offsets, seq_lens)):
        refuse(name, "compressed sequences are not emulated")
    for cache, rows in ((key_cache, key), (value_cache, value)):
        if rows.dtype != cache.dtype:
            refuse(name, f"{describe(rows)} into {describe(cache)}")
        if cache_mode == "PA_NZ":
            width = _NZ_BYTES // cache.element_size()
            if not cache[0].is_contiguous() or cache.shape[-1] != width:
                refuse(
                    name, f"a cache is {describe(cache)}; [..., block_size, {width}]"
                )
            cache = cache.flatten(1, -3).transpose(1, 2)
        elif cache_mode not in (None, "Norm"):
            refuse(name, f"cache_mode={cache_mode}; emulated: PA_NZ, Norm")
        _scatter(name, cache, rows, slot_mapping)


@implements("npu::npu_scatter_nd_update_", "npu::npu_scatter_nd_update")
def npu_scatter_nd_update_(
    input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor
) -> torch.Tensor:
    """Write rows to the indices `[T, 1]`; skip negative indices.

    Source: op-plugin `ScatterNdUpdateKernelNpu.cpp`; ops-nn `index/scatter_nd_update`.
    """
    if indices.dim() != 2 or indices.shape[1] != 1:
        refuse("npu_scatter_nd_update_", f"indices is {describe(indices)}; [T, 1]")
    places = indices[:, 0].long()
    here = places >= 0
    input[places[here]] = updates[here].to(input.dtype)
    return input


@implements("atb::npu_paged_cache_load.out")
def npu_paged_cache_load_out(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    seq_starts: torch.Tensor | None = None,
    cumsum: bool = False,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the rows of sequences from caches.

    Source: op-plugin `atb/PagedCacheLoadKernelNpuOpAtb.cpp`; ATB
    `PagedCacheLoadParam`.

    Args:
        key_cache: `[blocks, block_size, heads, D]`.
        value_cache: As `key_cache`.
        block_table: int32 `[B, blocks per sequence]`.
        context_lens: int32 `[B]`, number of rows of each sequence.
        seq_starts: int32 `[B]`, the first row; None for 0.
        cumsum: False.
        key: Output, `[rows, heads, D]`.
        value: As `key`.

    """
    if cumsum:
        refuse("npu_paged_cache_load", "cumulative lengths are not emulated")
    for cache, result in ((key_cache, key), (value_cache, value)):
        size, parts = cache.shape[1], []
        for i, length in enumerate(context_lens.tolist()):
            first = 0 if seq_starts is None else int(seq_starts[i])
            rows = torch.arange(first, first + length)
            parts.append(cache[block_table[i].long()[rows // size], rows % size])
        result.copy_(torch.cat(parts).view(result.shape))
    return key, value


@implements("npu::npu_kv_rmsnorm_rope_cache")
def npu_kv_rmsnorm_rope_cache(
    kv: torch.Tensor,
    gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    k_cache: torch.Tensor,
    ckv_cache: torch.Tensor,
    *,
    k_rope_scale: torch.Tensor | None = None,
    c_kv_scale: torch.Tensor | None = None,
    k_rope_offset: torch.Tensor | None = None,
    c_kv_offset: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize the latent part, rotate the rotary part, and write both to caches.

    The chip supports only sizes of 512 and 64; here small models may have other sizes.
    Source: op-plugin `torch_npu-npu_kv_rmsnorm_rope_cache.md`.

    Args:
        kv: `[B, 1, S, R + P]`, latent then rotary.
        gamma: `[R]`.
        cos: `[B, 1, S, P]`, each value twice.
        sin: As `cos`.
        index: int64, slot of each token; negative to skip it.
        k_cache: `[blocks, block_size, 1, P]`, written.
        ckv_cache: `[blocks, block_size, 1, R]`, written.
        k_rope_scale: Not emulated.
        c_kv_scale: Not emulated.
        k_rope_offset: Not emulated.
        c_kv_offset: Not emulated.
        v: Not emulated.
        epsilon: Epsilon of the norm.
        cache_mode: "PA".
        is_output_kv: Whether to return the written rows as well.

    Returns:
        The caches, and the tokens' rotary and latent parts, which are unwritten without
        `is_output_kv`.

    """
    name = "npu_kv_rmsnorm_rope_cache"
    scales = (k_rope_scale, c_kv_scale, k_rope_offset, c_kv_offset, v)
    if cache_mode != "PA" or any(scale is not None for scale in scales):
        refuse(name, f"cache_mode={cache_mode}; emulated: PA, without quantization")
    if index.dtype != torch.int64 or kv.dim() != 4 or kv.shape[1] != 1:
        refuse(
            name,
            f"index is {describe(index)}, kv is {describe(kv)}; supported: int64, "
            "[B, 1, S, latent + rotary]",
        )
    latent, rotary = kv.split([len(gamma), kv.shape[-1] - len(gamma)], -1)
    ckv = npu_rms_norm(latent.contiguous(), gamma, epsilon)[0]
    k = interleaved_to_halves(rotary, cos, sin)
    slots = index.reshape(-1)
    _scatter(name, ckv_cache, ckv.reshape(len(slots), -1), slots)
    _scatter(name, k_cache, k.reshape(len(slots), -1), slots)
    if is_output_kv:
        return k_cache, ckv_cache, k, ckv
    nothing = torch.full((1,), torch.nan, dtype=kv.dtype)
    return k_cache, ckv_cache, nothing, nothing.clone()
