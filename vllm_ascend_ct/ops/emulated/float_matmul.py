# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""float32 matmul of narrower operands on CPU."""

import torch

# float32 represents every integer up to this exactly.
EXACT_INTEGERS = 1 << 24
# Values to widen at once: 4 MB, which stay in the CPU's cache until they are
# multiplied. This is faster than reading a widened copy of the whole weight from
# memory.
_VALUES = 1 << 20


def float_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply in float32.

    Args:
        x: `[M, K]` of any dtype.
        weight: `[K, N]` of any dtype.

    Returns:
        fp32 `[M, N]`.

    """
    x = x.float()
    columns = max(1, _VALUES // len(weight))
    if columns >= weight.shape[1]:
        return x @ weight.float()
    result = x.new_empty((len(x), weight.shape[1]))
    for part, out in zip(weight.split(columns, dim=1), result.split(columns, dim=1)):
        torch.mm(x, part.float(), out=out)
    return result
