# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the NPU operators accept, by chip: the one place that holds these numbers.

Kernels ask before weights are read, the emulation asks at each call. Sources: the
torch_npu operator documents (op-plugin, `docs/zh/custom_APIs/torch_npu`) and the
CANN 9.1.0 aclnn documents and host checks.
"""

from dataclasses import dataclass, field

import torch

from vllm_ascend_ct.ops.dtypes import (
    FLOAT16,
    FLOAT16_BFLOAT16,
    INT4_PER_INT32,
    names,
)
from vllm_ascend_ct.ops.moe_limits import (
    GROUPED,
    GROUPED_A5,
    GroupedMatmulSwigluQuantLimits,
    GroupedModes,
    MoeFinalizeRoutingLimits,
    MoeInitRoutingLimits,
    MoeTokenUnpermuteLimits,
)
from vllm_ascend_ct.ops.soc import Soc, current_soc


@dataclass(frozen=True)
class ActivationQuantLimits:
    """`npu_dynamic_quant`, `npu_dynamic_quant_asymmetric`, `npu_quantize`."""

    x_dtypes: tuple[torch.dtype, ...] = FLOAT16_BFLOAT16
    k_multiple: int = 1

    def refusal(self, x_dtype: torch.dtype, k: int) -> str | None:
        """Why rows of `k` elements of `x_dtype` cannot be quantized, or None."""
        if x_dtype not in self.x_dtypes:
            return f"x dtype {x_dtype}; supported: {names(self.x_dtypes)}"
        if k % self.k_multiple:
            return f"K={k}; supported: multiples of {self.k_multiple}"
        return None


@dataclass(frozen=True)
class WeightQuantBatchMatmulLimits:
    """`npu_weight_quant_batchmatmul`: 16-bit activations, int8 or int4 weights.

    Attributes:
        groups: Whether elements of K may share a scale; op-plugin's
            `LinearWeightQuant.md` excludes the 310P.

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
            k: input features.
            n: output features.
            group_size: elements of K that share a scale; 0 for one per channel.

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
            # torch_npu's meta function takes the transposed view for a [K, 8] weight.
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
        """Dtype that the bias must have."""
        return torch.float32 if x_dtype == torch.bfloat16 else x_dtype


@dataclass(frozen=True)
class QuantMatmulOperands:
    """Dtypes that the operands of `npu_quant_matmul` may have; bias may be absent."""

    scale: tuple[torch.dtype, ...]
    bias: tuple[torch.dtype, ...] = (torch.int32,)
    offset: tuple[torch.dtype, ...] = ()


_FLOAT32_BFLOAT16 = (torch.float32, torch.bfloat16)
# int8 x int8, by output dtype and whether there is a pertoken_scale.
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


@dataclass(frozen=True)
class QuantMatmulLimits:
    """`npu_quant_matmul` with int8 activations and int8 weights.

    Attributes:
        operands: What the other operands may be, by output dtype and whether there is
            a pertoken_scale.
        max_size: Of the axis of an operand that is contiguous in memory.
        transposed_nz: Whether the weight has to be the transposed view of a
            FRACTAL_NZ tensor.

    """

    operands: OperandTable = field(default_factory=lambda: _OPERANDS)
    max_size: int = 65535
    transposed_nz: bool = False

    def refusal(self, out_dtype: torch.dtype, inner_sizes: list[int]) -> str | None:
        """Why a product cannot be computed, or None.

        Args:
            out_dtype: dtype of the result.
            inner_sizes: size of the contiguous axis of each operand.

        """
        out_dtypes = tuple(dict.fromkeys(dtype for dtype, _ in self.operands))
        if out_dtype not in out_dtypes:
            return f"output dtype {out_dtype}; supported: {names(out_dtypes)}"
        for size in inner_sizes:
            if not 1 <= size <= self.max_size:
                return f"inner axis of size {size}; supported: 1 to {self.max_size}"
        return None


@dataclass(frozen=True)
class QuantMatmulDequantLimits:
    """`npu_quant_matmul_dequant`, activations quantized per token by the operator."""

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
    """`npu_quant_matmul` with int8 activations and int4 weights packed along N."""

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
            k: input features.
            n: output features.
            group_size: elements of K that share a scale; 0 for one per channel.

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


@dataclass(frozen=True)
class Limits:
    """The operators of one chip; None where the chip lacks one.

    Attributes:
        float_weights: Floating-point weight formats that the chip multiplies.

    """

    weight_quant_batchmatmul: WeightQuantBatchMatmulLimits = field(
        default_factory=WeightQuantBatchMatmulLimits
    )
    quant_matmul: QuantMatmulLimits = field(default_factory=QuantMatmulLimits)
    dynamic_quant: ActivationQuantLimits = field(default_factory=ActivationQuantLimits)
    dynamic_quant_asymmetric: ActivationQuantLimits | None = field(
        default_factory=ActivationQuantLimits
    )
    quantize: ActivationQuantLimits = field(default_factory=ActivationQuantLimits)
    quant_matmul_dequant: QuantMatmulDequantLimits | None = None
    a8w4: A8W4Limits | None = field(default_factory=A8W4Limits)
    float_weights: tuple[str, ...] = ()
    grouped_matmul: GroupedModes = field(default_factory=lambda: GROUPED)
    grouped_matmul_swiglu_quant: GroupedMatmulSwigluQuantLimits | None = field(
        default_factory=GroupedMatmulSwigluQuantLimits
    )
    moe_init_routing: MoeInitRoutingLimits = field(default_factory=MoeInitRoutingLimits)
    moe_token_unpermute: MoeTokenUnpermuteLimits = field(
        default_factory=MoeTokenUnpermuteLimits
    )
    moe_finalize_routing: MoeFinalizeRoutingLimits = field(
        default_factory=MoeFinalizeRoutingLimits
    )


LIMITS = {
    Soc.A2: Limits(),
    Soc.A3: Limits(),
    Soc.A5: Limits(
        weight_quant_batchmatmul=WeightQuantBatchMatmulLimits(max_size=2**31 - 1),
        a8w4=None,
        grouped_matmul=GROUPED_A5,
        grouped_matmul_swiglu_quant=None,
        float_weights=("FP8", "MXFP8", "MXFP4"),
    ),
    Soc.ASCEND_310P: Limits(
        weight_quant_batchmatmul=WeightQuantBatchMatmulLimits(
            x_dtypes=FLOAT16, weight_bits=(8,), groups=False
        ),
        quant_matmul=QuantMatmulLimits(_OPERANDS_310P, transposed_nz=True),
        quant_matmul_dequant=QuantMatmulDequantLimits(),
        dynamic_quant=ActivationQuantLimits(x_dtypes=FLOAT16, k_multiple=32),
        dynamic_quant_asymmetric=None,
        quantize=ActivationQuantLimits(x_dtypes=FLOAT16),
        a8w4=None,
        grouped_matmul={},
        grouped_matmul_swiglu_quant=None,
        moe_init_routing=MoeInitRoutingLimits(quant_modes=(-1,)),
    ),
}


def current_limits() -> Limits:
    """The limits of the chip in use (`current_soc`)."""
    return LIMITS[current_soc()]
