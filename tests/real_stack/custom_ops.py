# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's operators on CPU.

Its own operators are those of the software NPU. vLLM's operators are registered for the
device of its platform.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from tools.soft_npu.ops.experts import (
    grouped_matmul_swiglu_quant_v2,
    grouped_matmul_swiglu_quant_weight_nz,
    npu_moe_init_routing_custom,
)

LIBRARY = torch.library.Library("_C_ascend", "FRAGMENT")
VLLM = torch.library.Library("vllm", "FRAGMENT")


OWN = (
    npu_moe_init_routing_custom,
    grouped_matmul_swiglu_quant_weight_nz,
    grouped_matmul_swiglu_quant_v2,
)


def find_schema(name: str, libraries: bytes) -> str:
    """The schema of an operator, which libraries contain as a string."""
    pattern = rb"(?<![\w:.])" + name.encode() + rb"\([^\0]*?\)\s*->\s*[^\0]+"
    (schema,) = {" ".join(s.decode().split()) for s in re.findall(pattern, libraries)}
    return schema


@cache
def install_own() -> None:
    """Define and implement vllm-ascend's own operators.

    Its library, which defines them, needs the torch that it was built for.
    """
    package = find_spec("vllm_ascend")
    assert package is not None and package.origin is not None
    paths = Path(package.origin).parent.glob("vllm_ascend_C*.so")
    libraries = b"".join(path.read_bytes() for path in paths)
    for function in OWN:
        name = function.__name__
        if not hasattr(torch.ops._C_ascend, name):
            LIBRARY.define(find_schema(name, libraries))
        LIBRARY.impl(name, function, "CPU")


@cache
def install_quantize() -> None:
    """Implement vllm-ascend's operator for static activations."""
    from vllm_ascend.ops import register_custom_ops

    VLLM.impl("quantize", register_custom_ops._quantize_impl, "CPU")


@cache
def install() -> None:
    """Implement the operators that vllm-ascend's layers call."""
    from vllm.distributed import parallel_state
    from vllm_ascend.ops import linear, register_custom_ops

    install_own()
    install_quantize()
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        VLLM.impl(name, getattr(parallel_state, name), "CPU")
    VLLM.impl("unquantized_gemm", linear.unquantized_gemm, "CPU")
    for name in ("maybe_pad_and_reduce", "maybe_all_gather_and_maybe_unpad"):
        VLLM.impl(name, getattr(register_custom_ops, f"_{name}_impl"), "CPU")
