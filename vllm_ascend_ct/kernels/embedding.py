# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Embedding look-ups in a quantized table, as functions of tensors.

The table has the layout of the weight-only matmul, so that an output head can be tied
to the embedding. No NPU operator looks up rows in that layout.
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
    """Dequantize selected columns of a weight: `(weight + offset) * scale`.

    Args:
        ids: Column indices: integers of any shape, each below N.
        weight: Transposed view: int8 `[K, N]`, or int4 packed to int32 `[K / 8, N]`.
        scale: Transposed view `[G, N]`, for G groups of K.
        offset: Shape and layout of the scale.

    Returns:
        `[*ids.shape, K]`, dtype of the scale.

    """
    flat = ids.reshape(-1)
    values = weight.t().index_select(0, flat)
    if weight.dtype == torch.int32:
        device = values.device
        up = torch.arange(_WORD - _BITS, -1, -_BITS, dtype=torch.int32, device=device)
        # Shift by a tensor: torch_npu would copy a Python number from the host, which
        # cannot be captured in a graph.
        down = torch.full_like(up, _WORD - _BITS)
        values = (values.unsqueeze(-1) << up >> down).flatten(1)
    groups = values.float().unflatten(1, (len(scale), -1))
    if offset is not None:
        groups = groups + offset.t().index_select(0, flat).float().unsqueeze(-1)
    groups = groups * scale.t().index_select(0, flat).float().unsqueeze(-1)
    return groups.flatten(1).to(scale.dtype).reshape(*ids.shape, -1)
