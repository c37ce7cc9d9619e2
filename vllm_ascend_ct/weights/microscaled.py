# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layouts of MXFP8 and MXFP4 weights."""

import torch


def paired(scale: torch.Tensor) -> torch.Tensor:
    """Pair the scales of a row; an odd number of them is padded with a 0.

    Args:
        scale: uint8 `[..., B]`, one E8M0 scale for each block of 32.

    Returns:
        `[..., ceil(B / 2), 2]`.

    """
    if scale.shape[-1] % 2:
        scale = torch.nn.functional.pad(scale, (0, 1))
    return scale.unflatten(-1, (-1, 2))


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out an MXFP8 weight as vllm-ascend does by default.

    Args:
        weight: FP8 `[N, K]`.
        scale: uint8 `[N, K / 32]`.

    Returns:
        `[K, N]` and `[ceil(K / 64), N, 2]`, both contiguous.

    """
    return weight.t().contiguous(), paired(scale).transpose(0, 1).contiguous()


def fp4(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out an MXFP4 weight, which stays packed along K.

    Args:
        weight: uint8 `[N, K / 2]`.
        scale: uint8 `[N, K / 32]`.

    Returns:
        `[K / 2, N]` and `[ceil(K / 64), N, 2]`, both transposed views.

    """
    return weight.t(), paired(scale).transpose(0, 1)
