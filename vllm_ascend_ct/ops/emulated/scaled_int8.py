# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Scaled int8 matmul with the CPU kernels of vLLM, where they are exact.

They call oneDNN, which needs VNNI to be exact. Its `scaled_mm` accumulates in int32,
then multiplies by the weight's scale and by the activations' in fp32, like the NPU.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vllm_ascend_ct.ops.emulated.packed_int8 import EXTREMES, is_exact

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# oneDNN's primitives to keep for a weight, one for each number of rows.
_PRIMITIVES = 32


@dataclass(frozen=True)
class ScaledInt8:
    """An int8 weight `[K, N]` with its scales, in oneDNN's layout.

    Attributes:
        handler: vLLM's handler of the packed weight.
        scale: fp32 `[N]`, which the handler reads but does not keep.
        nbytes: Size in bytes.

    """

    handler: Any
    scale: torch.Tensor
    nbytes: int

    def product(
        self, x: torch.Tensor, row_scale: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """Compute `(x @ weight) * scale * row_scale`, each step rounded in fp32.

        Args:
            x: int8 `[M, K]`.
            row_scale: fp32 `[M]`.
            result: `[M, N]` of the dtype that the weight was packed for, contiguous,
                to write to.

        """
        torch.ops._C.onednn_scaled_mm(
            result,
            x.contiguous(),
            row_scale.unsqueeze(1),
            None,
            None,
            None,
            self.handler.handler_tensor,
        )
        return result


def pack_scaled(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> ScaledInt8:
    """Pack an int8 weight `[K, N]` with fp32 scales `[N]` for an output dtype."""
    from vllm._custom_ops import create_onednn_scaled_mm

    columns = weight.t().contiguous().t()
    scale = scale.clone()
    handler = create_onednn_scaled_mm(columns, scale, dtype, True, False, _PRIMITIVES)
    return ScaledInt8(handler, scale, weight.numel() + scale.nbytes)


def packs_scaled(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU kernels are loaded, and exact with this output dtype."""
    loaded = hasattr(torch.ops._C, "create_onednn_scaled_mm_handler")
    return loaded and dtype in _DTYPES and _is_exact()


@cache
def _is_exact() -> bool:
    return torch.cpu._is_vnni_supported() and is_exact(_multiply, EXTREMES)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    m, n = len(x), weight.shape[1]
    packed = pack_scaled(weight, torch.ones(n), torch.float32)
    return packed.product(x, torch.ones(m), torch.empty(m, n))
