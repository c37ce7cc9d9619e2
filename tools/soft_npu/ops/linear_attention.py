# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's own operators of gated delta networks (Qwen3-Next).

Computed in fp32 and rounded once, unlike on the NPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tools.soft_npu.ops.registry import implements, only_defaults
from vllm_ascend_ct.ops.emulated.registry import describe, refuse

_CONVOLUTION, _RULE = "npu_causal_conv1d_custom", "npu_recurrent_gated_delta_rule"
_CHUNKS = "chunk_gated_delta_rule_fwd_h"
_PREFILL, _DECODE = range(2)


@implements(f"_C_ascend::{_CONVOLUTION}")
def npu_causal_conv1d_custom(
    output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    bias_opt: torch.Tensor | None,
    query_start_loc_opt: torch.Tensor | None,
    cache_indices_opt: torch.Tensor | None,
    initial_state_mode_opt: torch.Tensor | None,
    num_accepted_tokens_opt: torch.Tensor | None,
    activation_mode: int,
    pad_slot_id: int,
    run_mode: int,
) -> torch.Tensor:
    """Convolve each sequence with the tokens before, and keep its last ones.

    Source: vllm-ascend `csrc/moe/causal_conv1d`.

    Args:
        output: `[T, C]`, written; not for sequences of `pad_slot_id`.
        x: `[T, C]`.
        weight: `[width, C]`; the last row multiplies the token itself.
        conv_state: `[slots, S, C]` with S >= width - 1; written.
        bias_opt: `[C]`.
        query_start_loc_opt: First token of each sequence, and the end.
        cache_indices_opt: Slot of each sequence.
        initial_state_mode_opt: Whether each sequence has tokens before; None if all do.
        num_accepted_tokens_opt: Not emulated.
        activation_mode: 1 for SiLU, 0 for none.
        pad_slot_id: Marks sequences that are left out.
        run_mode: 0 for prompts, 1 for decoding.

    """
    if num_accepted_tokens_opt is not None or run_mode not in (_PREFILL, _DECODE):
        refuse(_CONVOLUTION, f"run_mode={run_mode} or accepted tokens: not emulated")
    if query_start_loc_opt is None or cache_indices_opt is None:
        refuse(_CONVOLUTION, "without starts or slots of sequences: not emulated")
    width, starts = len(weight), query_start_loc_opt.tolist()
    kernel = weight.float()
    for i, slot in enumerate(cache_indices_opt.flatten().tolist()):
        first, end = starts[i : i + 2]
        if slot == pad_slot_id or first == end:
            continue
        known = conv_state[slot, : width - 1]
        if initial_state_mode_opt is not None and not initial_state_mode_opt[i]:
            known = torch.zeros_like(known)
        rows = torch.cat((known, x[first:end].to(known.dtype)))
        result = (rows.float().unfold(0, width, 1) * kernel.T).sum(-1)
        if bias_opt is not None:
            result += bias_opt.float()
        if activation_mode:
            result = torch.nn.functional.silu(result)
        output[first:end] = result.to(output.dtype)
        conv_state[slot, : width - 1] = rows[-(width - 1) :]
    return output


@implements(f"_C_ascend::{_RULE}")
def npu_recurrent_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    *,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    actual_seq_lengths: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the gated delta rule token by token.

    Source: vllm-ascend `csrc/attention/recurrent_gated_delta_rule`, and its test.

    Args:
        query: bf16 `[T, heads, D]`.
        key: As `query`.
        value: `[T, value heads, D']`.
        state: `[slots, value heads, D', D]`, written.
        beta: `[T, value heads]`; None for ones.
        scale: Factor of the queries.
        actual_seq_lengths: int32, first token, then the length of each sequence.
        ssm_state_indices: int32 `[T]`, slot of the state after each token.
        num_accepted_tokens: int32, tokens of each sequence that were accepted: it goes
            on from the state after the last of them. None for 1.
        g: fp32 `[T, value heads]`, logarithms of the decay; None for zeros.
        gk: Not emulated.

    Returns:
        bf16 `[T, value heads, D']`.

    """
    if gk is not None:
        refuse(_RULE, "gk is not emulated")
    if query.dtype != torch.bfloat16 or scale is None:
        refuse(_RULE, f"query is {describe(query)}, scale={scale}; supported: bf16")
    assert actual_seq_lengths is not None and ssm_state_indices is not None
    slots = ssm_state_indices.flatten().tolist()
    token, *lengths = actual_seq_lengths.tolist()
    repeats = value.shape[1] // query.shape[1]
    q, k = (x.float().repeat_interleave(repeats, 1) for x in (query, key))
    result = torch.empty(value.shape, dtype=torch.bfloat16)
    accepted = [1] * len(lengths)
    if num_accepted_tokens is not None:
        accepted = num_accepted_tokens.tolist()
    for length, kept in zip(lengths, accepted, strict=True):
        if not length:
            continue
        memory = state[slots[token + kept - 1]].float()
        for t in range(token, token + length):
            if g is not None:
                memory = memory * g[t].float().exp()[:, None, None]
            change = value[t].float() - (memory @ k[t].unsqueeze(-1)).squeeze(-1)
            if beta is not None:
                change = change * beta[t].float().unsqueeze(-1)
            memory = memory + change.unsqueeze(-1) * k[t].unsqueeze(-2)
            state[slots[t]] = memory.to(state.dtype)
            rows = memory @ (q[t] * scale).unsqueeze(-1)
            result[t] = rows.squeeze(-1).to(result.dtype)
        token += length
    return result


@implements("_C_ascend::npu_fused_gdn_gating")
def npu_fused_gdn_gating(
    A_log: torch.Tensor,  # noqa: N803
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay and weight of the gated delta rule.

    Source: vllm-ascend `csrc/attention/fused_gdn_gating`.

    Args:
        A_log: `[heads]`.
        a: `[T, heads]`.
        b: As `a`.
        dt_bias: `[heads]`.
        beta: Of softplus.
        threshold: Of softplus.

    Returns:
        `-exp(A_log) * softplus(a + dt_bias)`, fp32 `[1, T, heads]`, and `sigmoid(b)` of
        b's dtype.

    """
    shifted = a.float() + dt_bias.float()
    steps = torch.nn.functional.softplus(shifted, beta, threshold)
    decay = -A_log.float().exp() * steps
    return decay.unsqueeze(0), b.float().sigmoid().to(b.dtype).unsqueeze(0)


def _chunks(
    tokens: int, starts: Sequence[int] | None, size: int
) -> Iterator[list[slice]]:
    """The chunks of each sequence."""
    starts = [0, tokens] if starts is None else starts
    for first, end in zip(starts, starts[1:]):
        yield [slice(i, min(i + size, end)) for i in range(first, end, size)]


@implements(f"_C_ascend::{_CHUNKS}")
def chunk_gated_delta_rule_fwd_h(
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool | None = False,
    chunk_size: int | None = None,
    cu_seqlens: Sequence[int] | None = None,
    chunk_indices: Sequence[int] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of the gated delta rule before each chunk, and values without them.

    Source: vllm-ascend `csrc/moe/chunk_gated_delta_rule_fwd_h`, and its Triton kernel
    `ops/triton/fla/chunk_delta_h.py`.

    Args:
        k: bf16 `[1, heads, T, D]`.
        w: `[1, value heads, T, D]`.
        u: `[1, value heads, T, D']`.
        g: fp32 `[1, value heads, T]`, logarithms of the decay, summed in each chunk.
        initial_state: `[sequences, value heads, D, D']`; None for zeros.
        output_final_state: True.
        chunk_size: Tokens of a chunk, 64 by default.
        cu_seqlens: First token of each sequence, and the end; none is empty.
        chunk_indices: Sequence and number of each chunk, as follows from `cu_seqlens`.
        options: Not emulated.

    Returns:
        bf16 `[1, value heads, chunks, D, D']`, bf16 as `u`, and the states after each
        sequence.

    """
    only_defaults(_CHUNKS, options, save_new_value=True)
    if g is None or len(k) > 1 or not output_final_state:
        refuse(_CHUNKS, f"k is {describe(k)}, without g or final states: not emulated")
    repeats, values = w.shape[1] // k.shape[1], torch.zeros_like(u)
    keys = k[0].float().repeat_interleave(repeats, 0)
    before, after = [], []
    chunks = _chunks(k.shape[2], cu_seqlens, chunk_size or 64)
    for number, sequence in enumerate(chunks):
        state = keys.new_zeros(w.shape[1], k.shape[-1], u.shape[-1])
        if initial_state is not None:
            state = initial_state[number].float()
        for part in sequence:
            before.append(state.to(k.dtype))
            rounded = before[-1].float()
            new = u[0, :, part].float() - w[0, :, part].float() @ rounded
            values[0, :, part] = new
            decay = g[0, :, part].float()
            last = decay[:, -1:]
            new = (new * (last - decay).exp().unsqueeze(-1)).to(k.dtype).float()
            state = state * last.exp().unsqueeze(-1)
            state = state + keys[:, part].transpose(1, 2) @ new
        after.append(state)
    dtype = k.dtype if initial_state is None else initial_state.dtype
    return torch.stack(before, 1).unsqueeze(0), values, torch.stack(after).to(dtype)


@implements("_C_ascend::chunk_fwd_o")
def chunk_fwd_o(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    h: torch.Tensor,
    scale: float,
    *,
    g: torch.Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    chunk_indices: Sequence[int] | None = None,
    chunk_size: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Outputs of the gated delta rule, from the states before each chunk.

    Source: vllm-ascend `csrc/moe/chunk_fwd_o`, and its Triton kernel
    `ops/triton/fla/chunk_o.py`.

    Args:
        q: bf16 `[1, heads, T, D]`.
        k: As `q`.
        v: Values of `chunk_gated_delta_rule_fwd_h`.
        h: States of `chunk_gated_delta_rule_fwd_h`.
        scale: Factor of the result.
        g: As for `chunk_gated_delta_rule_fwd_h`.
        cu_seqlens: As for `chunk_gated_delta_rule_fwd_h`.
        chunk_indices: As for `chunk_gated_delta_rule_fwd_h`.
        chunk_size: As for `chunk_gated_delta_rule_fwd_h`.
        options: Not emulated.

    Returns:
        As `v`.

    """
    only_defaults("chunk_fwd_o", options)
    assert g is not None, "chunk_fwd_o without g is not emulated"
    repeats, result = v.shape[1] // q.shape[1], torch.zeros_like(v)
    queries, keys = (x[0].float().repeat_interleave(repeats, 0) for x in (q, k))
    sequences = _chunks(q.shape[2], cu_seqlens, chunk_size or 64)
    parts = [part for sequence in sequences for part in sequence]
    for number, part in enumerate(parts):
        decay = g[0, :, part].float()
        rows = queries[:, part]
        scores = rows @ keys[:, part].transpose(1, 2)
        scores *= (decay.unsqueeze(-1) - decay.unsqueeze(-2)).exp()
        inside = scores.tril().to(v.dtype).float() @ v[0, :, part].float()
        earlier = (rows @ h[0, :, number].float()) * decay.exp().unsqueeze(-1)
        result[0, :, part] = (earlier + inside) * scale
    return result
