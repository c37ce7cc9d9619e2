# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Dtypes and memory formats that the operators' limits refer to."""

import torch

FLOAT16 = (torch.float16,)
FLOAT16_BFLOAT16 = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
# torch_npu's number of the memory format.
FRACTAL_NZ = 29
# The operators take int4 tensors packed as int32.
INT4_PER_INT32 = 8


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """List dtypes for an error text."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
