# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Look-ups in a quantized table, as functions of tensors.

The table is in the layout of the weight-only matrix product, so that an embedding can
be an output head as well. No NPU operator reads it by rows.
"""

import torch

_BITS = 4
_WORD = 32


def dequantized_rows(
    ids: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantize the columns of a weight that `ids` name: `(weight + offset) * scale`.

    Args:
        ids: Integers of any shape, each below N.
        weight: Transposed view: int8 `[K, N]`, or int4 packed to int32 `[K / 8, N]`.
        scale: Transposed view `[G, N]`, G equal parts of K.
        offset: Like the scale.

    Returns:
        `[*ids.shape, K]`, dtype of the scale.

    """
    flat = ids.reshape(-1)
    values = weight.t().index_select(0, flat)
    if weight.dtype == torch.int32:
        device = values.device
        up = torch.arange(_WORD - _BITS, -1, -_BITS, dtype=torch.int32, device=device)
        # torch_npu copies a number to shift by from the host, which breaks a capture.
        down = torch.full_like(up, _WORD - _BITS)
        values = (values.unsqueeze(-1) << up >> down).flatten(1)
    groups = values.float().unflatten(1, (len(scale), -1))
    if offset is not None:
        groups = groups + offset.t().index_select(0, flat).float().unsqueeze(-1)
    groups = groups * scale.t().index_select(0, flat).float().unsqueeze(-1)
    return groups.flatten(1).to(scale.dtype).reshape(*ids.shape, -1)
