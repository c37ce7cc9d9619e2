# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Limits of the NPU operators by chip. No other file holds these numbers.

Kernels check them before weights are loaded, the emulation checks them in each call.
Sources: the torch_npu operator documents (op-plugin, `docs/zh/custom_APIs/torch_npu`),
and the aclnn documents and host checks of CANN 9.1.0.
"""

from dataclasses import dataclass, field, replace

import torch

from vllm_ascend_ct.ops.dtypes import (
    FLOAT16,
    FLOAT16_BFLOAT16,
    FP8,
    INT4_PER_INT32,
    names,
)
from vllm_ascend_ct.ops.soc import Soc, current_soc


@dataclass(frozen=True)
class ActivationQuantLimits:
    """Limits of `npu_dynamic_quant`, `npu_dynamic_quant_asymmetric`, `npu_quantize`.

    Attributes:
        dst_dtypes: Output dtypes of the first two.

    """

    x_dtypes: tuple[torch.dtype, ...] = FLOAT16_BFLOAT16
    k_multiple: int = 1
    dst_dtypes: tuple[torch.dtype, ...] = (torch.int8,)

    def refusal(self, x_dtype: torch.dtype, k: int) -> str | None:
        """Why activations `[..., k]` of `x_dtype` cannot be quantized, or None."""
        if x_dtype not in self.x_dtypes:
            return f"x dtype {x_dtype}; supported: {names(self.x_dtypes)}"
        if k % self.k_multiple:
            return f"K={k}; supported: multiples of {self.k_multiple}"
        return None


@dataclass(frozen=True)
class WeightQuantBatchMatmulLimits:
    """Limits of `npu_weight_quant_batchmatmul`, the weight-only matmul (int8, int4).

    Attributes:
        groups: Whether per-group scales are supported; op-plugin's
            `LinearWeightQuant.md` excludes them on the 310P.

    """

    x_dtypes: tuple[torch.dtype, ...] = FLOAT16_BFLOAT16
    weight_bits: tuple[int, ...] = (4, 8)
    max_size: int = 65535
    group_multiple: int = 32
    groups: bool = True

    def refusal(
        self, x_dtype: torch.dtype, weight_bits: int, k: int, n: int, group_size: int
    ) -> str | None:
        """Why a `[k, n]` weight cannot be multiplied, or None.

        Args:
            x_dtype: dtype of the activations, scales and offsets.
            weight_bits: 4 or 8.
            k: Input features.
            n: Output features.
            group_size: Elements of K that share a scale; 0 for per-channel scales.

        """
        if x_dtype not in self.x_dtypes:
            return f"activation dtype {x_dtype}; supported: {names(self.x_dtypes)}"
        if weight_bits not in self.weight_bits:
            supported = ", ".join(map(str, self.weight_bits))
            return f"{weight_bits}-bit weights; supported: {supported}"
        for name, size in (("K", k), ("N", n)):
            if not 1 <= size <= self.max_size:
                return f"{name}={size}; supported: 1 to {self.max_size}"
        if weight_bits == 4 and k % INT4_PER_INT32:
            return f"K={k}; supported for int4: multiples of {INT4_PER_INT32}"
        if weight_bits == 4 and n == 1:
            # torch_npu's meta function mistakes the transposed view for a [K, 8]
            # weight.
            return "N=1; supported for int4: 2 and more"
        if group_size and not self.groups:
            return f"group_size={group_size}; supported: per channel"
        if group_size and not (
            group_size % self.group_multiple == 0
            and self.group_multiple <= group_size < k
        ):
            return (
                f"group_size={group_size}; supported: per channel, or a multiple of "
                f"{self.group_multiple} below K={k}"
            )
        return None

    def bias_dtype(self, x_dtype: torch.dtype) -> torch.dtype:
        """The required dtype of the bias, given the dtype of the activations."""
        return torch.float32 if x_dtype == torch.bfloat16 else x_dtype


@dataclass(frozen=True)
class QuantMatmulOperands:
    """Allowed dtypes of operands of `npu_quant_matmul`; the bias is optional."""

    scale: tuple[torch.dtype, ...]
    bias: tuple[torch.dtype, ...] = (torch.int32,)
    offset: tuple[torch.dtype, ...] = ()


_FLOAT32_BFLOAT16 = (torch.float32, torch.bfloat16)
# For int8 x int8, by output dtype and whether pertoken_scale is given.
OperandTable = dict[tuple[torch.dtype, bool], QuantMatmulOperands]
_OPERANDS: OperandTable = {
    (torch.float16, False): QuantMatmulOperands((torch.int64, torch.float32)),
    (torch.int8, False): QuantMatmulOperands(
        (torch.int64, torch.float32), offset=(torch.float32,)
    ),
    (torch.int32, False): QuantMatmulOperands(_FLOAT32_BFLOAT16),
    (torch.bfloat16, False): QuantMatmulOperands(
        _FLOAT32_BFLOAT16, (torch.int32, *_FLOAT32_BFLOAT16)
    ),
    (torch.float16, True): QuantMatmulOperands(
        (torch.float32,), (torch.int32, torch.float16, torch.float32)
    ),
    (torch.bfloat16, True): QuantMatmulOperands(
        _FLOAT32_BFLOAT16, (torch.int32, *_FLOAT32_BFLOAT16)
    ),
}
_OPERANDS_310P: OperandTable = {
    (torch.float16, False): _OPERANDS[torch.float16, False],
    (torch.int8, False): _OPERANDS[torch.int8, False],
    (torch.float16, True): QuantMatmulOperands((torch.float32,)),
}


def _inner_refusal(sizes: list[int], most: int) -> str | None:
    """Why operands cannot have these sizes along their contiguous axes, or None."""
    for size in sizes:
        if not 1 <= size <= most:
            return f"inner axis of size {size}; supported: 1 to {most}"
    return None


@dataclass(frozen=True)
class QuantMatmulLimits:
    """Limits of `npu_quant_matmul` with int8 activations and int8 weights.

    Attributes:
        operands: Allowed dtypes of the other operands, by output dtype and whether
            pertoken_scale is given.
        max_size: Largest size of an operand's contiguous axis.
        transposed_nz: Whether the weight must be the transposed view of a FRACTAL_NZ
            tensor.

    """

    operands: OperandTable = field(default_factory=lambda: _OPERANDS)
    max_size: int = 65535
    transposed_nz: bool = False

    def refusal(self, out_dtype: torch.dtype, inner_sizes: list[int]) -> str | None:
        """Why a product cannot be computed, or None.

        Args:
            out_dtype: dtype of the result.
            inner_sizes: Size of the contiguous axis of each operand.

        """
        out_dtypes = tuple(dict.fromkeys(dtype for dtype, _ in self.operands))
        if out_dtype not in out_dtypes:
            return f"output dtype {out_dtype}; supported: {names(out_dtypes)}"
        return _inner_refusal(inner_sizes, self.max_size)


@dataclass(frozen=True)
class Fp8MatmulLimits:
    """Limits of `npu_quant_matmul` with FP8 (E4M3) weights and per-token activations.

    No bias: according to the documents it is added before scaling, and vllm-ascend
    passes none because of a fault of the operator.
    """

    out_dtypes: tuple[torch.dtype, ...] = FLOAT16_BFLOAT16
    max_size: int = 65535

    def refusal(self, out_dtype: torch.dtype, inner_sizes: list[int]) -> str | None:
        """Why a product cannot be computed, or None; see `QuantMatmulLimits`."""
        if out_dtype not in self.out_dtypes:
            return f"output dtype {out_dtype}; supported: {names(self.out_dtypes)}"
        return _inner_refusal(inner_sizes, self.max_size)


@dataclass(frozen=True)
class MxMatmulLimits:
    """Limits of `npu_dynamic_mx_quant` and of the MX modes of the matmul operators.

    The modes of `npu_quant_matmul` and `npu_grouped_matmul` in which weights and
    activations are both in MXFP8 (E4M3) or both in MXFP4 (E2M1). The last block of K
    may be incomplete for the operators, but not in a checkpoint.
    """

    dtypes: tuple[torch.dtype, ...] = FLOAT16_BFLOAT16
    max_size: int = 65535
    max_experts: int = 1024

    def refusal(
        self, dtype: torch.dtype, k: int, n: int, experts: int = 1
    ) -> str | None:
        """Why a `[n, k]` weight cannot be multiplied by activations, or None.

        Args:
            dtype: dtype of the activations and of the result.
            k: Input features.
            n: Output features.
            experts: Number of such weights on this rank.

        """
        if not 1 <= experts <= self.max_experts:
            return f"{experts} experts; supported: 1 to {self.max_experts}"
        if dtype not in self.dtypes:
            return f"dtype {dtype}; supported: {names(self.dtypes)}"
        for name, size in (("K", k), ("N", n)):
            if not 1 <= size <= self.max_size:
                return f"{name}={size}; supported: 1 to {self.max_size}"
        return None


@dataclass(frozen=True)
class QuantMatmulDequantLimits:
    """Limits of `npu_quant_matmul_dequant` and `npu_quant_grouped_matmul_dequant`.

    These operators quantize activations per token and multiply.
    """

    x_dtypes: tuple[torch.dtype, ...] = FLOAT16
    multiple: int = 16

    def refusal(self, x_dtype: torch.dtype, k: int, n: int) -> str | None:
        """Why a `[n, k]` weight cannot be multiplied, or None."""
        if x_dtype not in self.x_dtypes:
            return f"x dtype {x_dtype}; supported: {names(self.x_dtypes)}"
        for name, size in (("K", k), ("N", n)):
            if size < 1 or size % self.multiple:
                return f"{name}={size}; supported: multiples of {self.multiple}"
        return None


@dataclass(frozen=True)
class A8W4Limits:
    """Limits of `npu_quant_matmul` with int8 activations and int4 weights (W4A8)."""

    out_dtypes: tuple[torch.dtype, ...] = FLOAT16_BFLOAT16
    group_sizes: tuple[int, ...] = (256,)
    max_k: int = 29575
    max_n: int = 65535

    def refusal(
        self, out_dtype: torch.dtype, k: int, n: int, group_size: int
    ) -> str | None:
        """Why a product cannot be computed, or None.

        Args:
            out_dtype: dtype of the result.
            k: Input features.
            n: Output features.
            group_size: Elements of K that share a scale; 0 for per-channel scales.

        """
        if out_dtype not in self.out_dtypes:
            return f"output dtype {out_dtype}; supported: {names(self.out_dtypes)}"
        if group_size not in (0, *self.group_sizes):
            sizes = ", ".join(map(str, self.group_sizes))
            return f"group_size={group_size}; supported: per channel, {sizes}"
        multiple = group_size or 2
        if not 1 <= k <= self.max_k or k % multiple:
            return f"K={k}; supported: multiples of {multiple} up to {self.max_k}"
        if not 1 <= n <= self.max_n or n % INT4_PER_INT32:
            return f"N={n}; supported: multiples of {INT4_PER_INT32} to {self.max_n}"
        return None


_Dtypes = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class GroupedMatmulOperands:
    """Allowed dtypes of the operands of `npu_grouped_matmul`; None means optional."""

    scale: _Dtypes = (None,)
    antiquant_scale: _Dtypes = (None,)
    antiquant_offset: _Dtypes = (None,)
    per_token_scale: _Dtypes = (None,)
    bias: _Dtypes = (None,)


@dataclass(frozen=True)
class GroupedMatmulMode:
    """Limits of `npu_grouped_matmul` for one pair of activation and weight dtypes.

    Attributes:
        by_output: Allowed dtypes of the operands, by output dtype.
        groups: Supported group sizes; None for any even number that divides K, empty
            for per-channel scales only.
        raw_scale: Whether the scale `[E, G, N]` is int64 that holds fp32 bits.
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
        """Why `[experts, k, n]` weights cannot be multiplied, or None.

        Args:
            experts: Number of experts on this rank.
            k: Input features.
            n: Output features.
            group_size: Elements of K that share a scale; 0 for per-channel scales.

        """
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
            # In a transposed weight, an odd group of int4 values ends within a byte.
            if group_size % 2:
                return f"group_size={group_size}; supported: even numbers"
        elif group_size and group_size not in self.groups:
            supported = ", ".join(map(str, ("per channel", *self.groups)))
            return f"group_size={group_size}; supported: {supported}"
        return None


def _grouped_bias(x_dtype: torch.dtype) -> _Dtypes:
    return None, torch.float32 if x_dtype == torch.bfloat16 else x_dtype


def _grouped_weight_only(
    x_dtype: torch.dtype, groups: tuple[int, ...] | None = ()
) -> GroupedMatmulMode:
    bias = _grouped_bias(x_dtype)
    operands = GroupedMatmulOperands(
        antiquant_scale=(x_dtype,), antiquant_offset=(x_dtype,), bias=bias
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
    # Cumulative counts would be misread as counts, with at most a warning in a log.
    group_list_types=(1,),
    max_k=18432,
    k_multiple=64,
    n_multiple=INT4_PER_INT32,
)
# By dtype of x and dtype of the weight; packed int4 weights are int32.
GroupedModes = dict[tuple[torch.dtype, torch.dtype], GroupedMatmulMode]
_GROUPED_WEIGHT_ONLY: GroupedModes = {
    # Offsets are required: without one there is no kernel for int8 weights, and int4
    # weights are rejected (`aclnn_grouped_matmul.cpp`).
    **{(x, torch.int8): _grouped_weight_only(x) for x in FLOAT16_BFLOAT16},
    **{(x, torch.int32): _grouped_weight_only(x, None) for x in FLOAT16_BFLOAT16},
}
# Not called by this package, but by vllm-ascend for unquantized experts.
_UNQUANTIZED: GroupedModes = {
    (x, x): GroupedMatmulMode({x: GroupedMatmulOperands(bias=_grouped_bias(x))})
    for x in FLOAT16_BFLOAT16
}
_UNQUANTIZED_310P: GroupedModes = {
    (torch.float16, torch.float16): replace(
        _UNQUANTIZED[torch.float16, torch.float16], n_multiple=16
    )
}
GROUPED: GroupedModes = {
    **_GROUPED_WEIGHT_ONLY,
    (torch.int8, torch.int8): _GROUPED_A8W8,
    (torch.int8, torch.int32): _GROUPED_A8W4,
}
_GROUPED_FP8 = GroupedMatmulMode(
    dict.fromkeys(
        FLOAT16_BFLOAT16,
        GroupedMatmulOperands(scale=(torch.float32,), per_token_scale=(torch.float32,)),
    )
)
GROUPED_A5: GroupedModes = {
    (FP8, FP8): _GROUPED_FP8,
    **{
        (x, weight): replace(
            mode, groups=(32, 64, 128, 256) if mode.groups is None else ()
        )
        for (x, weight), mode in GROUPED.items()
        if mode is not _GROUPED_A8W4
    },
}


@dataclass(frozen=True)
class GroupedMatmulSwigluQuantLimits:
    """Limits of `npu_grouped_matmul_swiglu_quant_v2`; packed int4 weights are int32."""

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
        """Why `[E, k, n]` weights cannot be multiplied, or None.

        Args:
            weight_dtype: int8, or int32 for packed int4.
            k: Input features.
            n: Output features, gate and up together.
            group_size: Elements of K that share a scale; 0 for per-channel scales.

        """
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
class FloatSwigluQuantLimits:
    """Limits of `npu_grouped_matmul_swiglu_quant_v2` with FP8, MXFP8 and MXFP4.

    Those of the product apply, too.
    """

    mx_n_multiple: int = 128

    def refusal(self, n: int, is_mx: bool) -> str | None:
        """Why a product with `n` outputs, gate and up together, is not fused, or None.

        Args:
            n: Output features.
            is_mx: Whether blocks share a scale.

        """
        multiple = self.mx_n_multiple if is_mx else 2
        if n % multiple:
            return f"N={n}; supported: multiples of {multiple}"
        return None


@dataclass(frozen=True)
class MoeInitRoutingLimits:
    """Limits of `npu_moe_init_routing_v2`.

    Attributes:
        counts: Whether it can return int64 counts, for any range of experts. Otherwise
            it returns int32 cumulative counts of all experts (op-plugin then calls
            another aclnn operator).

    """

    x_dtypes: tuple[torch.dtype, ...] = (*FLOAT16_BFLOAT16, torch.float32)
    # For quant_mode -1, which does not quantize.
    copied_dtypes: tuple[torch.dtype, ...] = (*x_dtypes, torch.int8)
    quant_modes: tuple[int, ...] = (-1, 1)
    max_experts: int = 10240
    counts: bool = True

    def refusal(
        self,
        x_dtype: torch.dtype,
        quant_mode: int,
        expert_num: int,
        active: tuple[int, ...],
    ) -> str | None:
        """Why tokens cannot be sorted by expert, or None.

        Args:
            x_dtype: dtype of the tokens.
            quant_mode: -1 to copy tokens, 1 to quantize them dynamically.
            expert_num: Number of experts of all ranks.
            active: Range `(start, end)` of this rank's experts.

        """
        dtypes = self.copied_dtypes if quant_mode == -1 else self.x_dtypes
        if x_dtype not in dtypes:
            return f"x dtype {x_dtype}; supported: {names(dtypes)}"
        most = min(expert_num, self.max_experts)
        if len(active) != 2 or not 0 <= active[0] < active[1] <= most:
            return f"active_expert_range={active}; supported: within [0, {most}]"
        if not self.counts and active != (0, expert_num):
            return f"active_expert_range={active}; supported: all {expert_num}"
        return None


@dataclass(frozen=True)
class MoeTokenUnpermuteLimits:
    """Limits of `npu_moe_token_unpermute`."""

    dtypes: tuple[torch.dtype, ...] = (*FLOAT16_BFLOAT16, torch.float32)
    max_top_k: int = 512

    def refusal(self, dtype: torch.dtype, top_k: int) -> str | None:
        """Why rows of `dtype` cannot be summed for each token, or None."""
        if dtype not in self.dtypes:
            return f"dtype {dtype}; supported: {names(self.dtypes)}"
        if not 1 <= top_k <= self.max_top_k:
            return f"top-k={top_k}; supported: 1 to {self.max_top_k}"
        return None


@dataclass(frozen=True)
class MoeFinalizeRoutingLimits:
    """Limits of `npu_moe_finalize_routing`."""

    dtypes: tuple[torch.dtype, ...] = (*FLOAT16_BFLOAT16, torch.float32)

    def refusal(self, dtype: torch.dtype, experts: int, top_k: int) -> str | None:
        """Why rows `[experts, C, H]` cannot be summed for each token, or None."""
        if dtype not in self.dtypes:
            return f"dtype {dtype}; supported: {names(self.dtypes)}"
        if experts < top_k:
            return f"{experts} experts, top-k={top_k}; supported: experts >= top-k"
        return None


@dataclass(frozen=True)
class Int8AttentionLimits:
    """Limits of `npu_fused_infer_attention_score` with int8 keys in FRACTAL_NZ.

    The keys and values are paged, with a scale per channel. Source: op-plugin
    `torch_npu-npu_fused_infer_attention_score.md`.
    """

    x_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    head_size: int = 128
    block_sizes: tuple[int, ...] = (128, 512)

    def refusal(
        self, dtype: torch.dtype, head_size: int, block_size: int
    ) -> str | None:
        """Why queries of `dtype` cannot be multiplied by int8 keys, or None."""
        if dtype not in self.x_dtypes:
            return f"dtype={dtype}"
        if head_size != self.head_size:
            return f"head_size={head_size}"
        if block_size not in self.block_sizes:
            return f"block_size={block_size}"
        return None


@dataclass(frozen=True)
class Limits:
    """Limits of all operators on one chip; None if the chip lacks the operator."""

    weight_quant_batchmatmul: WeightQuantBatchMatmulLimits = field(
        default_factory=WeightQuantBatchMatmulLimits
    )
    quant_matmul: QuantMatmulLimits = field(default_factory=QuantMatmulLimits)
    fp8_matmul: Fp8MatmulLimits | None = None
    mx_matmul: MxMatmulLimits | None = None
    dynamic_quant: ActivationQuantLimits = field(default_factory=ActivationQuantLimits)
    dynamic_quant_asymmetric: ActivationQuantLimits | None = field(
        default_factory=ActivationQuantLimits
    )
    quantize: ActivationQuantLimits = field(default_factory=ActivationQuantLimits)
    quant_matmul_dequant: QuantMatmulDequantLimits | None = None
    quant_grouped_matmul_dequant: QuantMatmulDequantLimits | None = None
    a8w4: A8W4Limits | None = field(default_factory=A8W4Limits)
    grouped_matmul: GroupedModes = field(default_factory=lambda: GROUPED)
    unquantized_grouped_matmul: GroupedModes = field(
        default_factory=lambda: _UNQUANTIZED
    )
    grouped_matmul_swiglu_quant: GroupedMatmulSwigluQuantLimits | None = field(
        default_factory=GroupedMatmulSwigluQuantLimits
    )
    float_swiglu_quant: FloatSwigluQuantLimits | None = None
    moe_init_routing: MoeInitRoutingLimits = field(default_factory=MoeInitRoutingLimits)
    moe_token_unpermute: MoeTokenUnpermuteLimits = field(
        default_factory=MoeTokenUnpermuteLimits
    )
    moe_finalize_routing: MoeFinalizeRoutingLimits = field(
        default_factory=MoeFinalizeRoutingLimits
    )
    int8_attention: Int8AttentionLimits | None = field(
        default_factory=Int8AttentionLimits
    )

    def fp8_refusal(self, dtype: torch.dtype, k: int, n: int) -> str | None:
        """Why an FP8 `[n, k]` weight cannot be multiplied by activations, or None."""
        if self.fp8_matmul is None:
            return "FP8 weights; supported: none"
        reason = self.dynamic_quant.refusal(dtype, k)
        return reason or self.fp8_matmul.refusal(dtype, [k, n])


LIMITS = {
    Soc.A2: Limits(),
    Soc.A3: Limits(),
    Soc.A5: Limits(
        weight_quant_batchmatmul=WeightQuantBatchMatmulLimits(max_size=2**31 - 1),
        fp8_matmul=Fp8MatmulLimits(),
        mx_matmul=MxMatmulLimits(),
        dynamic_quant=ActivationQuantLimits(dst_dtypes=(torch.int8, FP8)),
        a8w4=None,
        grouped_matmul=GROUPED_A5,
        grouped_matmul_swiglu_quant=None,
        float_swiglu_quant=FloatSwigluQuantLimits(),
        int8_attention=None,
    ),
    Soc.ASCEND_310P: Limits(
        weight_quant_batchmatmul=WeightQuantBatchMatmulLimits(
            x_dtypes=FLOAT16, weight_bits=(8,), groups=False
        ),
        quant_matmul=QuantMatmulLimits(_OPERANDS_310P, transposed_nz=True),
        quant_matmul_dequant=QuantMatmulDequantLimits(),
        quant_grouped_matmul_dequant=QuantMatmulDequantLimits(),
        dynamic_quant=ActivationQuantLimits(x_dtypes=FLOAT16, k_multiple=32),
        dynamic_quant_asymmetric=None,
        quantize=ActivationQuantLimits(x_dtypes=FLOAT16),
        a8w4=None,
        grouped_matmul={},
        unquantized_grouped_matmul=_UNQUANTIZED_310P,
        grouped_matmul_swiglu_quant=None,
        moe_init_routing=MoeInitRoutingLimits(quant_modes=(-1,), counts=False),
        int8_attention=None,
    ),
}


def current_limits() -> Limits:
    """The limits of the current chip (`current_soc`)."""
    return LIMITS[current_soc()]
