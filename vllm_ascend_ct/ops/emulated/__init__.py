# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Emulation of the NPU operators on CPU, with the same names and schemas.

Integer results are exact, like the NPU's. A call that the NPU would reject raises an
error (`ops/limits.py`).
"""

import contextlib
import importlib.util
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated import (  # noqa: F401
    dynamic_mx_quant,
    grouped_matmul,
    grouped_matmul_swiglu_quant,
    moe_combine,
    moe_routing,
    quant_matmul,
    quant_matmul_dequant,
    quantize,
    swiglu,
    weight_quant_batchmatmul,
    weights,
)
from vllm_ascend_ct.ops.emulated.registry import OPERATORS


@cache
def install() -> torch.library.Library:
    """Make the emulated operators available as `torch.ops.npu.*` on CPU tensors.

    If torch_npu can be imported, its operator definitions and meta functions stay, and
    only CPU kernels are added. Further calls do nothing.

    Returns:
        The library that holds the registrations and keeps them alive.

    """
    if importlib.util.find_spec("torch_npu") is not None:
        # Without CANN the import fails, and torch_npu defines nothing.
        with contextlib.suppress(ImportError):
            import torch_npu  # noqa: F401
    library = torch.library.Library("npu", "FRAGMENT")
    for operator in OPERATORS:
        name = f"npu::{operator.name}"
        if not hasattr(torch.ops.npu, operator.name):
            library.define(operator.schema)
            torch.library.register_fake(name, operator.fake, lib=library)
        library.impl(operator.name, operator.cpu, "CPU")
    return library
