# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's own operators that are neither norms nor experts."""

import torch

from tools.soft_npu.ops.registry import implements


@implements("_C_ascend::get_masked_input_and_mask")
def get_masked_input_and_mask(
    input: torch.Tensor,
    org_vocab_start_index: int,
    org_vocab_end_index: int,
    num_org_vocab_padding: int,
    added_vocab_start_index: int,
    added_vocab_end_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this rank's shard of an embedding; 0, and masked, for other ids.

    Source: vllm-ascend `csrc/kernels/get_masked_input_and_mask_kernel.cpp`.
    """
    own = (input >= org_vocab_start_index) & (input < org_vocab_end_index)
    added = (input >= added_vocab_start_index) & (input < added_vocab_end_index)
    width = org_vocab_end_index - org_vocab_start_index
    offset = added_vocab_start_index - width - num_org_vocab_padding
    here = own | added
    return here * (input - org_vocab_start_index * own - offset * added), ~here


@implements("_C_ascend::weak_ref_tensor")
def weak_ref_tensor(input: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory; here it keeps a reference to the memory.

    Source: vllm-ascend `csrc/torch_binding.cpp`.
    """
    return input


@implements("atb::_npu_matmul_add_fp32")
def _npu_matmul_add_fp32(
    x: torch.Tensor, weight: torch.Tensor, C: torch.Tensor
) -> None:  # noqa: N803
    """Add `x^T @ weight` to C in fp32, in place.

    Source: op-plugin `atb/MatmulAddFp32KernelNpuOpAtb.cpp`.
    """
    C.add_(x.float().T @ weight.float())


@implements("_C_ascend::npu_copy_and_expand_eagle_inputs")
def npu_copy_and_expand_eagle_inputs(
    target_token_ids: torch.Tensor,
    target_positions: torch.Tensor,
    next_token_ids: torch.Tensor,
    query_start_loc: torch.Tensor,
    query_end_loc: torch.Tensor,
    padding_token_id: int,
    parallel_drafting_token_id: int,
    num_padding_slots_per_request: int,
    shift_input_ids: bool,
    total_draft_tokens: int,
) -> tuple[torch.Tensor, ...]:
    """A draft model's inputs: each request's tokens, with slots for new ones behind.

    A request has its accepted tokens, without the first if they are shifted; the token
    that was sampled next; tokens to draft at once; and a slot for each rejected token.

    Source: vllm-ascend `csrc/copy_and_expand_eagle_inputs`.

    Returns:
        Per slot: token, position, whether it was rejected, whether it is drafted at
        once, int32 and int8 `[total_draft_tokens]`; slots of each request's new tokens,
        int32 `[requests * slots]`; slot of each given token if shifted, int32
        `[tokens]`.

    """
    slots = num_padding_slots_per_request
    ids, positions = torch.zeros(2, total_draft_tokens, dtype=torch.int32)
    rejected, drafted = torch.zeros(2, total_draft_tokens, dtype=torch.int8)
    new = torch.arange(slots, dtype=torch.int32).repeat(len(next_token_ids), 1)
    slot_of = torch.zeros_like(target_token_ids, dtype=torch.int32)
    starts = query_start_loc.tolist()
    for request, (start, stop, end) in enumerate(
        zip(starts, starts[1:], query_end_loc.tolist())
    ):
        valid = max(end - start + (not shift_input_ids), 0)
        first = start + request * (slots - shift_input_ids)
        last, behind = first + valid, first + valid + slots
        rest = slice(behind, behind + max(stop - end - 1, 0))
        given = target_token_ids[start + shift_input_ids :][:valid]
        if len(given):
            # Behind the last of all tokens it is repeated.
            ids[first:last] = given[torch.arange(valid).clamp(max=len(given) - 1)]
        ids[last] = next_token_ids[request]
        ids[last + 1 : behind], ids[rest] = parallel_drafting_token_id, padding_token_id
        count = torch.arange(valid + slots, dtype=torch.int32)
        positions[first:behind], positions[rest] = target_positions[start] + count, 0
        # A request may begin where the one before has its last slot.
        for mask, part in ((rejected, rest), (drafted, slice(last + 1, behind))):
            mask[first : rest.stop] = 0
            mask[part] = 1
        new[request] += last
        if shift_input_ids:
            slot_of[start:stop] = torch.arange(first, first + stop - start)
    return ids, positions, rejected, drafted, new.flatten(), slot_of
