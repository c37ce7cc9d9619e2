# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Install the software NPU below torch_npu, in a process that has imported it."""

import os
from functools import cache

import torch

NAMESPACES = ("aten", "npu", "atb", "_C_ascend", "soft_npu")
# Operators that torch_npu implements itself on the runtime: allocation, metadata,
# views, and copying the results of what it leaves to the CPU.
KEPT = {
    "aten::empty_with_swapped_memory",
    "aten::resize_",
    "aten::_copy_from_and_resize",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
    "aten::is_set_to",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::record_stream",
    "aten::_has_compatible_shallow_copy_type",
    "npu::get_npu_format",
    "npu::get_storage_size",
    "npu::npu_change_data_ptr",
    "npu::copy_memory_",
    # Copies what memory holds, for tensors of one layout.
    "npu::npu_reshape.out",
}
# What torch_npu composes of operators that this device computes.
COMPOSED_BY_TORCH_NPU = {"aten::scaled_dot_product_attention"}
# Arguments of matmul operators that may be in FRACTAL_NZ.
READ_NZ = [
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::matmul",
    "aten::linear",
    "npu::npu_linear",
    "npu::npu_quant_matmul",
    "npu::npu_quant_matmul_dequant",
    "npu::npu_quant_grouped_matmul_dequant",
    "npu::npu_weight_quant_batchmatmul",
    "npu::npu_grouped_matmul",
    "npu::npu_grouped_matmul.List",
    "npu::npu_grouped_matmul_swiglu_quant",
    "npu::npu_grouped_matmul_swiglu_quant_v2",
    "npu::npu_grouped_matmul_finalize_routing",
    "npu::npu_transpose_batchmatmul",
    "_C_ascend::grouped_matmul_swiglu_quant_weight_nz",
    "_C_ascend::grouped_matmul_swiglu_quant_weight_nz_tensor_list",
    "_C_ascend::grouped_matmul_swiglu_quant_v2",
]
# For a slice of this weight, op-plugin passes the offset in units of int32, and aclnn
# interprets it in units of int4 (WeightQuantBatchMatmulKernelNpuOpApi.cpp;
# aclnn_weight_quant_batch_matmul_v2.cpp).
PACKED_INT4 = ["npu::npu_weight_quant_batchmatmul weight"]
# Operators that synchronize: their results are numbers, or have data-dependent sizes.
SYNCHRONIZE = [
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
]


@cache
def install() -> None:
    """Load the dispatch library, and replace the kernels that torch_npu registers."""
    from tools.soft_npu import ops, triton_kernels
    from vllm_ascend_ct.ops import emulated
    from vllm_ascend_ct.ops.soc import Soc, set_default_soc

    torch.ops.load_library(os.environ["SOFT_NPU_LIBRARY"])
    # Also without this package's platform, which would say it.
    set_default_soc(Soc(os.environ["SOFT_NPU_SOC"]))
    _library().impl("decoded", _mark_nz, "CPU")
    _library().impl("launch_triton", triton_kernels.launch, "CPU")
    emulated.install()
    ops.install("aten", "npu", "atb")
    _take_over()
    _compose()


def install_custom() -> None:
    """Replace the kernels of vllm-ascend's own operators after their import."""
    from tools.soft_npu import ops

    ops.install("_C_ascend")
    _take_over()


def _mark_nz(tensor: torch.Tensor) -> None:
    """Mark a tensor as FRACTAL_NZ for the package's emulated operators."""
    from vllm_ascend_ct.ops.emulated.registry import mark_nz

    mark_nz(tensor)


@cache
def _library() -> torch.library.Library:
    return torch.library.Library("soft_npu", "FRAGMENT")


def _take_over() -> None:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    new = [
        name
        for name in [*names, "soft_npu::launch_triton"]
        if name.partition("::")[0] in NAMESPACES
        and name not in KEPT
        and name not in _taken
    ]
    _taken.update(new)
    torch.ops.soft_npu.install(new, READ_NZ, PACKED_INT4, SYNCHRONIZE)


def _compose() -> None:
    """Take over what torch_npu computes above the dispatcher, by calls of CANN."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("AutogradPrivateUse1")
    composite = "CompositeImplicitAutograd"
    torch.ops.soft_npu.compose(
        [
            name
            for name in names
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, composite)
            and name not in COMPOSED_BY_TORCH_NPU
        ]
    )


_taken: set[str] = set()
