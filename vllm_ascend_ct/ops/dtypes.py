# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Dtypes and formats that the limits of operators are stated in."""

import torch

FLOAT16 = (torch.float16,)
FLOAT16_BFLOAT16 = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
# What torch_npu calls the memory format.
FRACTAL_NZ = 29
# An int4 tensor is handed over as int32.
INT4_PER_INT32 = 8


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes, for an error text."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
