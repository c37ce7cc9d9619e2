# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the NPU operators of mixture-of-experts layers accept, for `limits.py`."""

from dataclasses import dataclass, field, replace

import torch

from vllm_ascend_ct.ops.dtypes import FLOAT16_BFLOAT16, INT4_PER_INT32, names

_Dtypes = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class GroupedMatmulOperands:
    """Dtypes that the operands may have; None in them where one may be absent."""

    scale: _Dtypes = (None,)
    antiquant_scale: _Dtypes = (None,)
    antiquant_offset: _Dtypes = (None,)
    per_token_scale: _Dtypes = (None,)
    bias: _Dtypes = (None,)


@dataclass(frozen=True)
class GroupedMatmulMode:
    """`npu_grouped_matmul` for one pair of dtypes: rows split among experts.

    Attributes:
        by_output: What the operands may be, by output dtype.
        groups: Elements of K that may share a scale; None for any even number that
            divides K, empty for scales per channel only.
        raw_scale: Whether the scale is int64 that holds fp32 bits, `[E, G, N]`.
        transposable: Whether the weight may be the transposed view of `[E, N, K]`.
        group_list_types: 0 for cumulative counts, 1 for counts.

    """

    by_output: dict[torch.dtype, GroupedMatmulOperands]
    groups: tuple[int, ...] | None = ()
    raw_scale: bool = False
    transposable: bool = True
    group_list_types: tuple[int, ...] = (0, 1)
    max_k: int = 65535
    max_n: int = 65535
    k_multiple: int = 1
    n_multiple: int = 1
    max_experts: int = 1024

    def refusal(self, experts: int, k: int, n: int, group_size: int) -> str | None:
        """Why `[experts, k, n]` weights cannot be multiplied, or None."""
        if not 1 <= experts <= self.max_experts:
            return f"{experts} experts; supported: 1 to {self.max_experts}"
        for name, size, most, multiple in (
            ("K", k, self.max_k, self.k_multiple),
            ("N", n, self.max_n, self.n_multiple),
        ):
            if not 1 <= size <= most or size % multiple:
                return f"{name}={size}; supported: multiples of {multiple} to {most}"
        if group_size and k % group_size:
            return f"group_size={group_size} of K={k}; supported: whole groups"
        if self.groups is None:
            # An odd number of int4 values ends within a byte of a transposed weight.
            if group_size % 2:
                return f"group_size={group_size}; supported: even numbers"
        elif group_size and group_size not in self.groups:
            supported = ", ".join(map(str, ("per channel", *self.groups)))
            return f"group_size={group_size}; supported: {supported}"
        return None


def _grouped_weight_only(
    x_dtype: torch.dtype, groups: tuple[int, ...] | None = ()
) -> GroupedMatmulMode:
    bias = torch.float32 if x_dtype == torch.bfloat16 else x_dtype
    operands = GroupedMatmulOperands(
        antiquant_scale=(x_dtype,), antiquant_offset=(x_dtype,), bias=(None, bias)
    )
    return GroupedMatmulMode({x_dtype: operands}, groups)


_GROUPED_A8W8 = GroupedMatmulMode(
    {
        output: GroupedMatmulOperands(
            scale=(scale,),
            per_token_scale=(None, torch.float32),
            bias=(None, torch.int32),
        )
        for output, scale in (
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float32),
        )
    }
)
_GROUPED_A8W4 = GroupedMatmulMode(
    dict.fromkeys(
        FLOAT16_BFLOAT16,
        GroupedMatmulOperands(
            scale=(torch.int64,),
            per_token_scale=(torch.float32,),
            bias=(torch.float32,),
        ),
    ),
    groups=(256,),
    raw_scale=True,
    transposable=False,
    # Cumulative counts are taken for counts, with a warning in a log at most.
    group_list_types=(1,),
    max_k=18432,
    k_multiple=64,
    n_multiple=INT4_PER_INT32,
)
# By the dtypes of x and of the weight; int4 weights are int32.
GroupedModes = dict[tuple[torch.dtype, torch.dtype], GroupedMatmulMode]
_GROUPED_WEIGHT_ONLY: GroupedModes = {
    # Without an offset the kernel of int8 weights is missing, and int4 weights are
    # refused (`aclnn_grouped_matmul.cpp`).
    **{(x, torch.int8): _grouped_weight_only(x) for x in FLOAT16_BFLOAT16},
    **{(x, torch.int32): _grouped_weight_only(x, None) for x in FLOAT16_BFLOAT16},
}
GROUPED: GroupedModes = {
    **_GROUPED_WEIGHT_ONLY,
    (torch.int8, torch.int8): _GROUPED_A8W8,
    (torch.int8, torch.int32): _GROUPED_A8W4,
}
GROUPED_A5: GroupedModes = {
    (x, weight): replace(mode, groups=(32, 64, 128, 256) if mode.groups is None else ())
    for (x, weight), mode in GROUPED.items()
    if mode is not _GROUPED_A8W4
}


@dataclass(frozen=True)
class GroupedMatmulSwigluQuantLimits:
    """`npu_grouped_matmul_swiglu_quant_v2`; int4 weights are int32."""

    scale_dtypes: dict[torch.dtype, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: {
            torch.int8: (torch.float32, *FLOAT16_BFLOAT16),
            torch.int32: (torch.int64,),
        }
    )
    max_k: dict[torch.dtype, int] = field(
        default_factory=lambda: {torch.int8: 65535, torch.int32: 19999}
    )
    max_n: int = 10240
    group_sizes: tuple[int, ...] = (256,)

    def refusal(
        self, weight_dtype: torch.dtype, k: int, n: int, group_size: int
    ) -> str | None:
        """Why experts of `[k, n]` weights cannot be multiplied, or None."""
        if weight_dtype not in self.max_k:
            return f"weight {weight_dtype}; supported: {names(tuple(self.max_k))}"
        if not 1 <= k <= self.max_k[weight_dtype]:
            return f"K={k}; supported: up to {self.max_k[weight_dtype]}"
        if not 2 <= n <= self.max_n or n % 2:
            return f"N={n}; supported: even, up to {self.max_n}"
        if group_size and (group_size not in self.group_sizes or k % group_size):
            supported = ", ".join(map(str, ("per channel", *self.group_sizes)))
            return f"group_size={group_size} of K={k}; supported: {supported}"
        return None


@dataclass(frozen=True)
class MoeInitRoutingLimits:
    """`npu_moe_init_routing_v2`."""

    x_dtypes: tuple[torch.dtype, ...] = (*FLOAT16_BFLOAT16, torch.float32)
    # Without quantization, mode -1.
    copied_dtypes: tuple[torch.dtype, ...] = (*x_dtypes, torch.int8)
    quant_modes: tuple[int, ...] = (-1, 1)
    max_experts: int = 10240

    def refusal(
        self,
        x_dtype: torch.dtype,
        quant_mode: int,
        expert_num: int,
        active: tuple[int, ...],
    ) -> str | None:
        """Why tokens cannot be sorted to the experts in `[start, end)`, or None."""
        dtypes = self.copied_dtypes if quant_mode == -1 else self.x_dtypes
        if x_dtype not in dtypes:
            return f"x dtype {x_dtype}; supported: {names(dtypes)}"
        most = min(expert_num, self.max_experts)
        if len(active) != 2 or not 0 <= active[0] < active[1] <= most:
            return f"active_expert_range={active}; supported: within [0, {most}]"
        return None


@dataclass(frozen=True)
class MoeTokenUnpermuteLimits:
    """`npu_moe_token_unpermute`."""

    dtypes: tuple[torch.dtype, ...] = (*FLOAT16_BFLOAT16, torch.float32)
    max_top_k: int = 512

    def refusal(self, dtype: torch.dtype, top_k: int) -> str | None:
        """Why rows cannot be brought back to their tokens, or None."""
        if dtype not in self.dtypes:
            return f"dtype {dtype}; supported: {names(self.dtypes)}"
        if not 1 <= top_k <= self.max_top_k:
            return f"top-k={top_k}; supported: 1 to {self.max_top_k}"
        return None


@dataclass(frozen=True)
class MoeFinalizeRoutingLimits:
    """`npu_moe_finalize_routing`."""

    dtypes: tuple[torch.dtype, ...] = (*FLOAT16_BFLOAT16, torch.float32)

    def refusal(self, dtype: torch.dtype, experts: int, top_k: int) -> str | None:
        """Why rows `[experts, C, H]` cannot be brought back, or None."""
        if dtype not in self.dtypes:
            return f"dtype {dtype}; supported: {names(self.dtypes)}"
        if experts < top_k:
            return f"{experts} experts, top-k={top_k}; supported: as many experts"
        return None
