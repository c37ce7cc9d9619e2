# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Scaled int8 matmul with the CPU kernels of vLLM, where they are exact.

They call oneDNN, which needs VNNI to be exact. Its `scaled_mm` accumulates in int32,
then multiplies by the weight's scale and by the activations' in fp32, like the NPU.
"""

import weakref
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.packed_int8 import EXTREMES, is_exact

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# oneDNN's primitives to keep for a weight, one for each number of rows.
_PRIMITIVES = 32


class ScaledInt8:
    """An int8 weight in oneDNN's layout.

    Args:
        weight: int8 `[K, N]`.
        dtype: Output dtype of the product.

    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        # The handler reads this memory in each call.
        self._scale = torch.empty(weight.shape[1], dtype=torch.float32, device="cpu")
        columns = weight.t().contiguous().t()
        handler = torch.ops._C.create_onednn_scaled_mm_handler(
            columns, self._scale, dtype, True, False, _PRIMITIVES
        )
        weakref.finalize(self, torch.ops._C.release_dnnl_matmul_handler, handler)
        self._dtype = dtype
        self._handler = torch.tensor(handler, dtype=torch.int64, device="cpu")
        self.nbytes = weight.numel() + self._scale.nbytes

    def product(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        row_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute `(x @ weight) * scale * row_scale`, each step rounded in fp32.

        Args:
            x: int8 `[M, K]`.
            scale: fp32 `[N]`.
            row_scale: fp32 `[M]`; None for ones.

        Returns:
            `[M, N]` of the output dtype.

        """
        if row_scale is None:
            row_scale = torch.ones(len(x), dtype=torch.float32, device="cpu")
        self._scale.copy_(scale)
        result = x.new_empty((len(x), len(scale)), dtype=self._dtype)
        torch.ops._C.onednn_scaled_mm(
            result,
            x.contiguous(),
            row_scale.unsqueeze(1),
            None,
            None,
            None,
            self._handler,
        )
        return result


def packs_scaled(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU kernels are loaded, and exact with this output dtype."""
    loaded = hasattr(torch.ops._C, "create_onednn_scaled_mm_handler")
    return loaded and dtype in _DTYPES and _is_exact()


@cache
def _is_exact() -> bool:
    return torch.cpu._is_vnni_supported() and is_exact(_multiply, EXTREMES)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale = torch.ones(weight.shape[1], dtype=torch.float32, device="cpu")
    return ScaledInt8(weight, torch.float32).product(x, scale)
