# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""CPU kernels of the operators that engines use and the package does not emulate."""

from tools.soft_npu.ops import (  # noqa: F401
    atb_attention,
    attention,
    cache,
    communication,
    custom,
    experts,
    gating,
    linear_attention,
    norm,
    norm_mx,
    rotary,
)
from tools.soft_npu.ops.registry import install

__all__ = ["install"]
