# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Products in float32 of narrower operands, on CPU."""

import torch

# float32 holds every integer up to here.
EXACT_INTEGERS = 1 << 24
# Values widened at once: 4 MB, which stay in the cache until they are multiplied. That
# is faster than to read a widened copy of the whole weight from memory.
_VALUES = 1 << 20


def float_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply `[M, K]` by `[K, N]` in float32, whatever both are held in."""
    x = x.float()
    columns = max(1, _VALUES // len(weight))
    if columns >= weight.shape[1]:
        return x @ weight.float()
    result = x.new_empty((len(x), weight.shape[1]))
    for part, out in zip(weight.split(columns, dim=1), result.split(columns, dim=1)):
        torch.mm(x, part.float(), out=out)
    return result
