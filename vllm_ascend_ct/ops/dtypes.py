# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Dtypes and memory formats that the operators' limits refer to."""

import torch

FLOAT16 = (torch.float16,)
FLOAT16_BFLOAT16 = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# torch_npu's numbers of formats that torch has no tensors of on an NPU: ACL's numbers
# plus 256. Scales of E8M0 are bytes; two E2M1 values share a byte, the first in its low
# half.
E8M0, E2M1 = 293, 296
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Elements that share a scale in the MX formats.
MX_BLOCK = 32
# torch_npu's number of the memory format.
FRACTAL_NZ = 29
# The operators take int4 tensors packed as int32.
INT4_PER_INT32 = 8


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """List dtypes for an error text."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
