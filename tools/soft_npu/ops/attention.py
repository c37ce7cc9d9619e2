# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Attention operators, computed in fp32 and rounded once, unlike on the NPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tools.soft_npu.ops.registry import implements, only_defaults
from vllm_ascend_ct.ops.emulated.registry import describe, refuse
from vllm_ascend_ct.ops.limits import current_limits

_FIA = "npu_fused_infer_attention_score"
_COMPRESSED_MASK = 2048
_FAR = 2147483647
# Values of `sparse_mode`: which keys a query attends to.
_DEFAULT, _ALL, _LEFT_UP, _RIGHT_DOWN, _BAND = range(5)
# Axes of the arguments, and of the result if it has another layout.
_LAYOUTS = {
    **{name: (name, name) for name in ("BSH", "BSND", "BNSD", "TND")},
    **{name: tuple(name.split("_")) for name in ("BNSD_BSND", "TND_NTD", "NTD_TND")},
    **{f"{name}_NBSD": (name, "NBSD") for name in ("BSH", "BSND", "BNSD")},
}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence.

    Args:
        q: `[T, N, D]`.
        k: `[S, n, D]`; N is a multiple of n.
        v: `[S, n, D']`.
        scale: Factor of `q @ k`.
        hidden: `[T, S]`: bool, true for keys that are masked; or float, added to the
            scores.

    Returns:
        fp32 `[T, N, D']` and log-sum-exp `[T, N]`; 0 if all keys are masked.

    """
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = (x.float().transpose(0, 1) for x in (q, k, v))
    keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
    scores = queries @ keys.transpose(1, 2) * scale
    if hidden is not None and hidden.dtype == torch.bool:
        scores = scores.masked_fill(hidden, -torch.inf)
    elif hidden is not None:
        scores = scores + hidden.float()
    weights = scores.softmax(-1).nan_to_num(0)
    return (weights @ values).transpose(0, 1), scores.logsumexp(-1).T


def _hidden(
    mode: int,
    mask: torch.Tensor | None,
    tokens: tuple[int, int],
    window: tuple[int, int],
) -> torch.Tensor | None:
    """The mask of one sequence, `[T, S]`, true for masked keys."""
    rows, columns = tokens
    if mode in (_DEFAULT, _ALL):
        if mask is None:
            return None
        full = mask.reshape(-1, *mask.shape[-2:])[0].bool()
        return full[:rows, :columns]
    _check_compressed(mask)
    first = columns - rows if mode != _LEFT_UP else 0
    ahead = torch.arange(columns) - (torch.arange(rows).unsqueeze(1) + first)
    if mode == _BAND:
        before, after = window
        return (ahead > after) | (-ahead > before)
    return ahead > 0


def _check_compressed(mask: torch.Tensor | None) -> None:
    """Check that a compressed mask is the upper triangle: the NPU reads parts of it."""
    size = _COMPRESSED_MASK
    if mask is None or mask.shape[-2:] != (size, size) or mask.numel() != size**2:
        given = "None" if mask is None else describe(mask)
        refuse(_FIA, f"atten_mask is {given}; supported: [{size}, {size}]")
    if mask.dtype not in (torch.bool, torch.int8, torch.uint8):
        refuse(_FIA, f"atten_mask is {describe(mask)}; supported: bool, int8, uint8")
    triangle = torch.ones(size, size, dtype=torch.bool).triu(1)
    if not torch.equal(mask.view(size, size).bool(), triangle):
        refuse(_FIA, "atten_mask is not the upper triangle")


def _by_sequence(
    x: torch.Tensor, layout: str, heads: int, ends: Sequence[int] | None
) -> list[torch.Tensor]:
    """Rows `[T, heads, D]` of each sequence."""
    if layout in ("TND", "NTD"):
        if ends is None:
            refuse(_FIA, f"input_layout={layout} without actual sequence lengths")
        rows = x if layout == "TND" else x.transpose(0, 1)
        starts = [0, *ends[:-1]]
        return [rows[start:end] for start, end in zip(starts, ends)]
    if layout == "BSH":
        x = x.unflatten(-1, (heads, -1))
    elif layout == "BNSD":
        x = x.transpose(1, 2)
    lengths = [x.shape[1]] * len(x) if ends is None else list(ends)
    if len(lengths) == 1:
        lengths *= len(x)
    return [sequence[:length] for sequence, length in zip(x, lengths)]


def _paged(
    cache: torch.Tensor, heads: int, block_size: int, blocks: torch.Tensor, length: int
) -> torch.Tensor:
    """Gather the rows `[length, heads, D]` of a sequence from a paged cache.

    Args:
        cache: `[blocks, block_size, heads * D]`, `[blocks, heads, block_size, D]`, or
            `[blocks, heads, D / nz, block_size, nz]`.
        heads: Number of KV heads.
        block_size: Rows per block.
        blocks: Blocks of the sequence.
        length: Length of the sequence.

    """
    count = -(-length // block_size)
    rows = cache[blocks[:count].long()]
    if cache.dim() == 5 and cache.shape[1] == heads and cache.shape[3] == block_size:
        rows = rows.permute(0, 3, 1, 2, 4).flatten(3)
    elif cache.dim() == 3 and cache.shape[1] == block_size:
        rows = rows.unflatten(-1, (heads, -1))
    elif cache.dim() == 4 and cache.shape[1:3] == (heads, block_size):
        rows = rows.transpose(1, 2)
    else:
        refuse(
            _FIA,
            f"a cache is {describe(cache)} with block_size={block_size}, {heads} "
            "heads; supported: [blocks, block_size, heads * D], [blocks, heads, "
            "block_size, D], [blocks, heads, D / nz, block_size, nz]",
        )
    return rows.flatten(0, 1)[:length]


def _check_int8(query: torch.Tensor, key: torch.Tensor, o: dict[str, Any]) -> None:
    """Check a call with int8 keys and values in FRACTAL_NZ, and a scale per channel."""
    limits = current_limits().int8_attention
    if limits is None or key.dim() != 5:
        refuse(_FIA, f"int8 keys are {describe(key)}; supported on A2: FRACTAL_NZ, 5-D")
    width = key.shape[2] * key.shape[4]
    if reason := limits.refusal(query.dtype, width, o["block_size"]):
        refuse(_FIA, f"{reason} with int8 keys")
    if o["sparse_mode"] != _DEFAULT or o["atten_mask"] is not None:
        refuse(_FIA, "int8 keys with a mask are not emulated")
    if o["input_layout"] != "BNSD" or query.shape[2] != 1 or o["block_table"] is None:
        refuse(_FIA, "int8 keys are emulated for BNSD, one query and paged caches")
    for name in ("key_antiquant_scale", "value_antiquant_scale"):
        scale = o[name]
        if scale is None or scale.dtype != query.dtype:
            given = "None" if scale is None else describe(scale)
            refuse(_FIA, f"{name} is {given}; supported for int8: {query.dtype}")
        if scale.numel() != key.shape[1] * width:
            refuse(_FIA, f"{name} is {describe(scale)}; supported: [1, heads, 1, D]")


def _keys(
    cache: torch.Tensor | None, count: int, layout: str, heads: int, o: dict[str, Any]
) -> list[torch.Tensor | None]:
    """Rows of each sequence's keys or values; None for each if there is no tensor."""
    if cache is None:
        return [None] * count
    lengths, table = o["actual_seq_lengths_kv"], o["block_table"]
    if table is None:
        return list(_by_sequence(cache, layout, heads, lengths))
    if lengths is None:
        refuse(_FIA, "block_table without actual_seq_lengths_kv")
    size = o["block_size"]
    return [
        _paged(cache, heads, size, blocks, int(n)) for blocks, n in zip(table, lengths)
    ]


def _join(parts: list[torch.Tensor], shape: torch.Size, layout: str) -> torch.Tensor:
    """Concatenate the results `[T, N, D]` of sequences, padded with 0.

    Args:
        parts: Results of the sequences.
        shape: `[B, S]`, or `[T]` if sequences are concatenated.
        layout: Layout of the result.

    """
    heads, width = parts[0].shape[1:]
    rows = parts[0].new_zeros((*shape, heads, width))
    if len(shape) == 1:
        joined = torch.cat(parts)
        rows[: len(joined)] = joined
        return rows if layout == "TND" else rows.transpose(0, 1).contiguous()
    for row, part in zip(rows, parts):
        row[: len(part)] = part
    if layout == "BSH":
        return rows.flatten(2)
    axes = {"BSND": (0, 1, 2, 3), "BNSD": (0, 2, 1, 3), "NBSD": (2, 0, 1, 3)}
    return rows.permute(axes[layout]).contiguous()


def _check(query: torch.Tensor, o: dict[str, Any]) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        refuse(_FIA, f"query is {describe(query)}; supported: float16, bfloat16")
    if o["input_layout"] not in _LAYOUTS:
        refuse(_FIA, f"input_layout={o['input_layout']}; emulated: {[*_LAYOUTS]}")
    if o["sparse_mode"] not in range(5):
        refuse(_FIA, f"sparse_mode={o['sparse_mode']}; supported: 0 to 4")
    heads = o["num_key_value_heads"] or o["num_heads"]
    if o["num_heads"] % heads or o["num_heads"] // heads > 64 and not o["query_rope"]:
        refuse(_FIA, f"{o['num_heads']} heads of queries and {heads} of keys")
    if o["block_table"] is not None and not 0 < o["block_size"] <= 512:
        refuse(_FIA, f"block_size={o['block_size']}; supported: 16 to 512")


_OPTIONS: dict[str, Any] = {
    "atten_mask": None,
    "actual_seq_lengths": None,
    "actual_seq_lengths_kv": None,
    "block_table": None,
    "query_rope": None,
    "key_rope": None,
    "num_heads": 1,
    "scale": 1.0,
    "pre_tokens": _FAR,
    "next_tokens": _FAR,
    "input_layout": "BSH",
    "num_key_value_heads": 0,
    "sparse_mode": 0,
    "block_size": 0,
    "softmax_lse_flag": False,
    "key_antiquant_scale": None,
    "value_antiquant_scale": None,
}


@implements("npu::npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each sequence.

    Source: op-plugin `torch_npu-npu_fused_infer_attention_score.md`. Not emulated:
    quantization other than of keys and values to int8 with a scale per channel, shared
    prefixes, padding on the left, shifts of scores.

    Args:
        query: fp16 or bf16, in `input_layout`.
        key: In `input_layout`, or blocks of a cache.
        value: As `key`.
        options: Options of torch_npu's operator.

    Returns:
        The attention, and log-sum-exp fp32: `[T, N, 1]` or `[B, N, S, 1]`, or one 0
        without `softmax_lse_flag`.

    Raises:
        OperatorLimitError: The call is not emulated.

    """
    o = _OPTIONS | {k: x for k, x in options.items() if k in _OPTIONS}
    rest = {k: x for k, x in options.items() if k not in _OPTIONS}
    only_defaults(_FIA, rest, inner_precise=1)
    _check(query, o)
    if key.dtype == torch.int8:
        _check_int8(query, key, o)
    layout, result_layout = _LAYOUTS[o["input_layout"]]
    heads = o["num_heads"]
    kv_heads = o["num_key_value_heads"] or heads
    queries = _by_sequence(query, layout, heads, o["actual_seq_lengths"])
    keys, ropes, values = (
        _keys(x, len(queries), layout, kv_heads, o) for x in (key, o["key_rope"], value)
    )
    if o["query_rope"] is not None:
        turned = _by_sequence(o["query_rope"], layout, heads, o["actual_seq_lengths"])
        queries = [torch.cat(pair, -1) for pair in zip(queries, turned)]
    outputs, sums = [], []
    for q, k, rope, v in zip(queries, keys, ropes, values, strict=True):
        assert k is not None and v is not None
        if key.dtype == torch.int8:
            k, v = (
                x.float() * o[f"{name}_antiquant_scale"].float().view(kv_heads, -1)
                for x, name in ((k, "key"), (v, "value"))
            )
        k = k if rope is None else torch.cat((k, rope), -1)
        window = o["pre_tokens"], o["next_tokens"]
        tokens = len(q), len(k)
        # A single query sees all keys.
        hidden = None
        if len(q) > 1 or o["query_rope"] is not None or o["sparse_mode"] == _BAND:
            hidden = _hidden(o["sparse_mode"], o["atten_mask"], tokens, window)
        output, lse = attend(q, k, v, o["scale"], hidden)
        outputs.append(output.to(query.dtype))
        sums.append(lse.unsqueeze(-1))
    rows = query.shape[:1] if layout == "TND" else query.shape[1:2]
    if layout not in ("TND", "NTD"):
        rows = torch.Size((len(query), query.shape[2 if layout == "BNSD" else 1]))
    result = _join(outputs, rows, result_layout)
    if not o["softmax_lse_flag"]:
        return result, torch.zeros(1)
    return result, _join(sums, rows, "TND" if len(rows) == 1 else "BNSD")


_V2_NAMES = {
    "softmax_scale": "scale",
    "num_query_heads": "num_heads",
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "return_softmax_lse": "softmax_lse_flag",
}


@implements("npu::npu_fused_infer_attention_score_v2")
def npu_fused_infer_attention_score_v2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `npu_fused_infer_attention_score`, with other names.

    Source: op-plugin `torch_npu-npu_fused_infer_attention_score_v2.md`.
    """
    renamed = {_V2_NAMES.get(name, name): x for name, x in options.items()}
    return npu_fused_infer_attention_score(query, key, value, **renamed)


def _into(
    results: tuple[torch.Tensor, ...], out: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    for target, result in zip(out, results):
        if target.numel() == result.numel():
            target.copy_(result.view_as(target))
    return out[0], out[1]


def _implement_out(function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Register the `out` variant of an operator."""

    @implements(f"npu::{function.__name__}.out")
    def with_out(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        workspace: torch.Tensor | None = None,
        out: list[torch.Tensor],
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _into(function(query, key, value, **options), out)


_implement_out(npu_fused_infer_attention_score)
_implement_out(npu_fused_infer_attention_score_v2)


@implements(
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace",
    "atb::_npu_paged_attention_get_workspace",
)
def get_workspace(*_: Any, **__: Any) -> torch.Tensor:
    """An empty workspace; nothing here needs one."""
    return torch.zeros(32, dtype=torch.uint8)


@implements("npu::npu_fusion_attention_v3")
def npu_fusion_attention_v3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _FAR,
    next_tockens: int = _FAR,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: torch.Tensor | None = None,
    actual_seq_kvlen: torch.Tensor | None = None,
    sparse_mode: int = 0,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    """PyTorch's `scaled_dot_product_attention`, as torch_npu calls it.

    Source: op-plugin `torch_npu-npu_fusion_attention_v3.md`. Not emulated: other
    layouts, dropout, shifts of scores, and what only the backward pass reads.

    Args:
        query: fp16, bf16 or fp32 `[B, N, S, D]`.
        key: `[B, n, S', D]`; N is a multiple of n.
        value: As `key`.
        head_num: N.
        input_layout: "BNSD".
        pse: None.
        padding_mask: None.
        atten_mask: Masked keys: `[S, S']` or `[B, 1, S, S']`, or compressed.
        scale: Factor of `q @ k`.
        keep_prob: 1.
        pre_tockens: Has no effect in these modes.
        next_tockens: Has no effect in these modes.
        inner_precise: Has no effect.
        prefix: None.
        actual_seq_qlen: None.
        actual_seq_kvlen: None.
        sparse_mode: 0, or 2 for a compressed mask of the keys after the query.

    """
    name = "npu_fusion_attention_v3"
    unused = (pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen)
    if any(x is not None for x in unused) or keep_prob != 1:
        refuse(name, "pse, padding_mask, prefix, lengths and dropout: not emulated")
    if input_layout != "BNSD" or sparse_mode not in (_DEFAULT, _LEFT_UP):
        refuse(name, f"{input_layout=}, {sparse_mode=}; emulated: BNSD, 0 and 2")
    if pre_tockens < _FAR or next_tockens < (_FAR if sparse_mode == _DEFAULT else 0):
        refuse(name, f"{pre_tockens=}, {next_tockens=}: not emulated")
    masks: Sequence[torch.Tensor | None] = [atten_mask] * len(query)
    if atten_mask is not None and atten_mask.dim() == 4:
        if atten_mask.shape[1] != 1:
            refuse(name, f"atten_mask is {describe(atten_mask)}; emulated: one head")
        masks = list(atten_mask.expand(len(query), -1, -1, -1))
    outputs = []
    for q, k, v, mask in zip(query, key, value, masks):
        hidden = _hidden(sparse_mode, mask, (q.shape[1], k.shape[1]), (_FAR, _FAR))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        output, _lse = attend(q, k, v, scale, hidden)
        outputs.append(output.to(query.dtype).transpose(0, 1))
    nothing = torch.full((1,), torch.nan)
    return torch.stack(outputs), *[nothing] * 3, *[nothing.long()] * 2


@implements("npu::npu_attention_update")
def npu_attention_update(
    lse: list[torch.Tensor], local_out: list[torch.Tensor], update_type: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over parts of the keys.

    Source: op-plugin `torch_npu-npu_attention_update.md`.

    Args:
        lse: fp32 `[R]` each.
        local_out: `[R, D]` each.
        update_type: 0, or 1 to return log-sum-exp as well.

    """
    sums = torch.stack(list(lse))
    weights = sums.softmax(0).nan_to_num(0).unsqueeze(-1)
    result = (weights * torch.stack(list(local_out)).float()).sum(0)
    together = sums.logsumexp(0) if update_type else torch.full((1,), torch.nan)
    return result.to(local_out[0].dtype), together


@implements("npu::npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    perm_x1: list[int] | None = None,
    perm_x2: list[int] | None = None,
    perm_y: list[int] | None = None,
    batch_split_factor: int | None = 1,
) -> torch.Tensor:
    """Batched matmul with permuted axes of the input and the result.

    Source: op-plugin `torch_npu-npu_transpose_batchmatmul.md`.

    Args:
        input: 3-D.
        weight: `[B, K, N]`.
        bias: Not emulated.
        scale: Not emulated.
        perm_x1: Permutation of `input` to `[B, M, K]`.
        perm_x2: None, or the identity.
        perm_y: Permutation of the result.
        batch_split_factor: 1.

    """
    name = "npu_transpose_batchmatmul"
    if bias is not None or scale is not None or batch_split_factor not in (None, 1):
        refuse(name, "bias, scale and batch_split_factor are not emulated")
    if perm_x2 not in (None, [], [0, 1, 2]):
        refuse(name, f"perm_x2={perm_x2}; supported: [0, 1, 2]")
    x = input.permute(perm_x1) if perm_x1 else input
    # By default the operator swaps the first two axes.
    return (
        (x.float() @ weight.float())
        .to(input.dtype)
        .permute(perm_y or [1, 0, 2])
        .contiguous()
    )
