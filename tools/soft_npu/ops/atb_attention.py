# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Attention operators of ATB, computed in fp32 and rounded once, unlike on the NPU."""

import torch

from tools.soft_npu.ops.attention import attend
from tools.soft_npu.ops.cache import by_token
from tools.soft_npu.ops.registry import implements
from vllm_ascend_ct.ops.emulated.registry import describe, refuse
from vllm_ascend_ct.ops.soc import Soc, current_soc

# Side of a mask that stands for one of any size, and its values in the upper triangle.
_COMPRESSED, _HIDDEN = 2048, -10000
# Values of `mask_type` that stand for a compressed mask.
_ENCODER, _PAGED = 3, 5


def _added(name: str, mask: torch.Tensor) -> torch.Tensor:
    """A mask that is added to scores, as `[rows, columns]`.

    On the 310P it is `[1, columns / 16, rows, 16]`: FRACTAL_NZ, whose tiles are its
    rows.
    """
    if current_soc() is not Soc.ASCEND_310P:
        if mask.dim() == 3 and len(mask) == 1:
            mask = mask[0]
        if mask.dim() != 2:
            refuse(name, f"mask is {describe(mask)}; supported: [rows, columns]")
        return mask
    if mask.dim() != 4 or mask.shape[0] != 1 or mask.shape[3] != 16:
        refuse(
            name, f"mask is {describe(mask)}; supported: [1, columns / 16, rows, 16]"
        )
    return mask[0].transpose(0, 1).flatten(1)


def _check_compressed(name: str, mask: torch.Tensor) -> None:
    shape = (_COMPRESSED, _COMPRESSED)
    upper = torch.ones(shape, dtype=torch.bool).triu(1)
    if mask.shape != shape or not torch.equal(mask <= _HIDDEN, upper):
        refuse(
            name,
            f"mask is {describe(mask)}; supported: {list(shape)}, at most {_HIDDEN} "
            "above the diagonal",
        )


def _causal(rows: int, columns: int) -> torch.Tensor:
    """The last rows of a causal mask, true for keys that are masked."""
    return torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)


def _encode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    added: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of whole sequences; causal if no mask is added."""
    start = 0
    for length in lengths.tolist():
        part = slice(start, start + length)
        q, k, v = query[part], key[part], value[part]
        hidden = _causal(length, length) if added is None else added[:length, :length]
        out[part] = attend(q, k, v, scale, hidden)[0].to(out.dtype)
        start += length


@implements("atb::_npu_flash_attention")
def _npu_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: torch.Tensor,
) -> None:
    """Attention of whole sequences.

    Source: op-plugin `atb/SelfAttentionAtb.cpp`; ATB `SelfAttentionParam`, whose
    `PA_ENCODER`.

    Args:
        query: `[T, N, D]`.
        key: `[T, n, D]`.
        value: As `key`.
        mask: `[S, S]`, added to the scores; see `_added`.
        seq_len: int32 `[B]`.
        scale_value: Factor of `q @ k`.
        num_heads: N.
        num_kv_heads: n.
        out: `[T, N, D]`, written.

    """
    added = _added("_npu_flash_attention", mask)
    _encode(query, key, value, seq_len, added, scale_value, out)


@implements("atb::_npu_flash_attention_v3")
def _npu_flash_attention_v3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    *,
    mask_type: int | None = _ENCODER,
    out: torch.Tensor,
) -> None:
    """As `_npu_flash_attention`, with a causal mask of 2048 for any length.

    Source: op-plugin `atb/SelfAttentionAtbV3.cpp`, and its test.
    """
    name = "_npu_flash_attention_v3"
    if mask_type not in (None, _ENCODER):
        refuse(name, f"mask_type={mask_type}; supported: {_ENCODER}")
    _check_compressed(name, _added(name, mask))
    _encode(query, key, value, seq_len, None, scale_value, out)


@implements("atb::_npu_paged_attention")
def _npu_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    workspace: torch.Tensor | None = None,
) -> None:
    """Decode attention: one query per sequence.

    Source: op-plugin `atb/PagedAttentionAtb.cpp`; ATB `PagedAttentionParam`.

    Args:
        query: `[B, N, D]`.
        key_cache: `[blocks, block_size, n, D]`; on the 310P
            `[blocks, n * D / 16, block_size, 16]`.
        value_cache: As `key_cache`.
        num_kv_heads: n.
        num_heads: N.
        scale_value: Factor of `q @ k`.
        block_table: int32 `[B, blocks per sequence]`.
        context_lens: int32 `[B]`; 0 for padding.
        out: `[B, N, D]`, written.
        workspace: Not read.

    """
    caches = by_token(key_cache), by_token(value_cache)
    for i, length in enumerate(context_lens.tolist()):
        k, v = (_gather(x, block_table[i], length, num_kv_heads) for x in caches)
        out[i] = attend(query[i : i + 1], k, v, scale_value, None)[0][0].to(out.dtype)


def _gather(
    cache: torch.Tensor, blocks: torch.Tensor, length: int, heads: int
) -> torch.Tensor:
    """Rows `[length, heads, D]` of a sequence."""
    blocks = blocks[: -(-length // cache.shape[1])].long()
    rows = cache[blocks].flatten(0, 1)[:length]
    return rows.reshape(length, heads, -1)


def _splitfuse(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor],
    added: torch.Tensor | None,
    heads: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of the last tokens of sequences; causal if no mask is added."""
    key_cache, value_cache = map(by_token, caches)
    start = 0
    of_queries, of_contexts = (x.tolist() for x in lengths)
    for i, (count, length) in enumerate(zip(of_queries, of_contexts)):
        part = slice(start, start + count)
        k = _gather(key_cache, block_table[i], length, heads)
        v = _gather(value_cache, block_table[i], length, heads)
        hidden = _causal(count, length) if added is None else added[part, :length]
        out[part] = attend(query[part], k, v, scale, hidden)[0].to(out.dtype)
        start += count


@implements("atb::_npu_paged_attention_splitfuse")
def _npu_paged_attention_splitfuse(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: torch.Tensor,
) -> None:
    """Attention of prompts in parts.

    Source: op-plugin `atb/PagedAttentionSplitfuse.cpp`.

    Args:
        query: `[T, N, D]`.
        key_cache: As in `_npu_paged_attention`.
        value_cache: As `key_cache`.
        block_table: int32 `[B, blocks per sequence]`.
        context_lens: int32 `[B]`, the sequences' lengths.
        mask: `[T, S]`, added to the scores; see `_added`.
        seq_len: int32 `[B]`, the sequences' queries.
        num_kv_heads: n.
        num_heads: N.
        scale_value: Factor of `q @ k`.
        out: `[T, N, D]`, written.

    """
    added = _added("_npu_paged_attention_splitfuse", mask)
    lengths = seq_len, context_lens
    caches = key_cache, value_cache
    _splitfuse(
        query, caches, block_table, lengths, added, num_kv_heads, scale_value, out
    )


@implements("atb::_npu_paged_attention_splitfuse_v2")
def _npu_paged_attention_splitfuse_v2(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    *,
    mask_type: int | None = _PAGED,
    out: torch.Tensor,
) -> None:
    """As `_npu_paged_attention_splitfuse`, with a causal mask of 2048 for any length.

    Source: op-plugin `atb/PagedAttentionSplitfuseV2.cpp`, and its test.
    """
    name = "_npu_paged_attention_splitfuse_v2"
    if mask_type not in (None, _PAGED):
        refuse(name, f"mask_type={mask_type}; supported: {_PAGED}")
    _check_compressed(name, mask)
    lengths = seq_len, context_lens
    caches = key_cache, value_cache
    _splitfuse(
        query, caches, block_table, lengths, None, num_kv_heads, scale_value, out
    )
