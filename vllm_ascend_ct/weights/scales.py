# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Scales of shards that vLLM fuses into one layer."""

from collections.abc import Sequence

import torch


def per_channel(scale: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Repeat one scale per shard for each output of the shard.

    Args:
        scale: One value for each shard, `[S]`.
        widths: Output features of each shard.

    Returns:
        `[N]`, N the sum of the widths.

    """
    counts = torch.tensor(widths, device=scale.device)
    return scale.repeat_interleave(counts, output_size=sum(widths))
