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
