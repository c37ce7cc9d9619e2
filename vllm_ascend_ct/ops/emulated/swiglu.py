# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The SwiGLU operator."""

import torch

from vllm_ascend_ct.ops.emulated.registry import describe, emulates, refuse

_NAME = "npu_swiglu"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _swiglu_fake(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    if dim not in (-1, input.dim() - 1):
        refuse(_NAME, f"dim={dim}; emulated: the last")
    if input.dtype not in _DTYPES or input.dim() == 0 or input.shape[-1] % 2:
        refuse(
            _NAME,
            f"input is {describe(input)}; supported: {_DTYPES}, an even last size",
        )
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))


@emulates("npu_swiglu(Tensor input, int dim=-1) -> Tensor", fake=_swiglu_fake)
def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Compute `silu(first half) * second half` in fp32, and round once.

    Source: ops-nn `activation/swi_glu`.

    Args:
        input: `[..., 2 * H]` fp16, bf16 or fp32.
        dim: The last.

    Returns:
        `[..., H]`, dtype of the input.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result = _swiglu_fake(input, dim)
    gate, up = input.float().chunk(2, dim=-1)
    return result.copy_(torch.nn.functional.silu(gate) * up)
