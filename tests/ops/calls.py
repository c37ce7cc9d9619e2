# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A valid call of each emulated operator, for tests to vary."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_ascend_ct.ops.dtypes import E2M1, E8M0, FP8, FRACTAL_NZ
from vllm_ascend_ct.ops.emulated.weights import unpack_int4

M, K, N, GROUP = 5, 128, 48, 32


@dataclass
class Call:
    """A call of an operator of `torch.ops.npu`, or of `namespace.name`."""

    operator: str
    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Any]:
        namespace, _, name = self.operator.rpartition(".")
        function: Callable[..., Any]
        function = getattr(getattr(torch.ops, namespace or "npu"), name)
        return function

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def changed(call: Call, args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    """Replace arguments of a call, by position or name."""
    for position, value in (args or {}).items():
        call.args[position] = value
    call.kwargs.update(kwargs)
    return call


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def packed_int4(*shape: int) -> torch.Tensor:
    """Random int32 words, each of which holds eight valid int4 values."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def x(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(M, K).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape) + 0.1).to(dtype)


def weight_quant_call(
    dtype: torch.dtype = torch.bfloat16, bits: int = 4, group: int = GROUP
) -> Call:
    """A transposed weight with per-group scales and offsets."""
    weight = packed_int4(N, K // 8) if bits == 4 else int8(N, K)
    groups = K // group if group else 1
    offset = torch.randint(-8, 8, (N, groups)).to(dtype)
    return Call(
        "npu_weight_quant_batchmatmul",
        [x(dtype), weight.t(), scales(N, groups, dtype=dtype).t(), offset.t()],
        {"antiquant_group_size": group},
    )


def quant_matmul_call(
    out_dtype: torch.dtype = torch.bfloat16, pertoken: bool = True
) -> Call:
    return Call(
        "npu_quant_matmul",
        [int8(M, K), int8(N, K).t(), scales(N)],
        {
            "output_dtype": out_dtype,
            "pertoken_scale": scales(M) if pertoken else None,
        },
    )


def fp8(*shape: int) -> torch.Tensor:
    """Every E4M3 value except NaN."""
    codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8)
    return (codes | torch.randint(0, 2, shape, dtype=torch.uint8) << 7).view(FP8)


def fp8_matmul_call(out_dtype: torch.dtype = torch.bfloat16) -> Call:
    return Call(
        "npu_quant_matmul",
        [fp8(M, K), fp8(K, N), scales(N) * 1e-3],
        {"output_dtype": out_dtype, "pertoken_scale": scales(M) * 1e-2},
    )


def exponents(*shape: int) -> torch.Tensor:
    """E8M0 scales from 1/32 to 1/4."""
    return torch.randint(122, 126, shape, dtype=torch.uint8)


def e2m1(*shape: int) -> torch.Tensor:
    """Two random values to a byte."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def mx_matmul_call(
    bits: int, out_dtype: torch.dtype = torch.bfloat16, k: int = K
) -> Call:
    """As layers make it: MXFP8 contiguous, MXFP4 transposed."""
    pairs, options = -(-k // 64), {}
    weight, scale, x1 = fp8(k, N), exponents(pairs, N, 2), fp8(M, k)
    if bits == 4:
        weight, x1 = e2m1(N, k // 2).t(), e2m1(M, k // 2)
        scale = exponents(N, pairs, 2).transpose(0, 1)
        options = {"x1_dtype": E2M1, "x2_dtype": E2M1}
    return Call(
        "npu_quant_matmul",
        [x1, weight, scale],
        {
            "pertoken_scale": exponents(M, pairs, 2),
            "bias": torch.randn(N),
            "output_dtype": out_dtype,
            **options,
            "pertoken_scale_dtype": E8M0,
            "scale_dtype": E8M0,
            "group_sizes": [1, 1, 32],
        },
    )


def quant_matmul_dequant_call() -> Call:
    return Call(
        "npu_quant_matmul_dequant",
        [x(torch.float16), int8(N, K), scales(N) * 1e-2],
        {"quant_mode": "pertoken"},
    )


def fp8_grouped_call(out_dtype: torch.dtype = torch.bfloat16, spare: int = 1) -> Call:
    """Like `grouped_call`."""
    m = sum(GROUPED_ROWS) + spare
    return Call(
        "npu_grouped_matmul",
        [[fp8(m, K)], [fp8(EXPERTS, K, N)]],
        {
            "scale": [scales(EXPERTS, N) * 1e-3],
            "per_token_scale": [scales(m) * 1e-2],
            "group_list": torch.tensor(GROUPED_ROWS),
            "group_list_type": 1,
            "group_type": 0,
            "split_item": 2,
            "output_dtype": out_dtype,
        },
    )


def mx_grouped_call(bits: int, spare: int = 1, k: int = K, n: int = N) -> Call:
    """As layers make it, with transposed weights; see `grouped_call`."""
    m, pairs = sum(GROUPED_ROWS) + spare, -(-k // 64)
    make, options = (fp8, {}) if bits == 8 else (e2m1, {})
    width = k * bits // 8
    if bits == 4:
        options = {"x_dtype": E2M1, "weight_dtype": E2M1}
    return Call(
        "npu_grouped_matmul",
        [[make(m, width)], [make(EXPERTS, n, width).transpose(1, 2)]],
        {
            "scale": [exponents(EXPERTS, n, pairs, 2).transpose(1, 2)],
            "per_token_scale": [exponents(m, pairs, 2)],
            "group_list": torch.tensor(GROUPED_ROWS),
            "group_list_type": 1,
            "group_type": 0,
            "split_item": 2,
            "output_dtype": torch.bfloat16,
            **options,
            "scale_dtype": E8M0,
            "per_token_scale_dtype": E8M0,
        },
    )


def quant_grouped_matmul_dequant_call(spare: int = 1) -> Call:
    """Like `grouped_call`."""
    rows = torch.randn(sum(GROUPED_ROWS) + spare, K).half()
    ends = torch.tensor(GROUPED_ROWS).cumsum(0)
    weight = torch.ops.npu.npu_format_cast(int8(EXPERTS, N, K), FRACTAL_NZ)
    return Call(
        "npu_quant_grouped_matmul_dequant",
        [rows, weight, scales(EXPERTS, N) * 1e-2, ends],
        {"quant_mode": "pertoken"},
    )


def a8w4_call(
    out_dtype: torch.dtype = torch.bfloat16, group: int = 256, k: int = 512
) -> Call:
    """A W4A8 call whose assist term makes it the exact product."""
    weight = packed_int4(k, N // 8)
    scale = (torch.rand(k // group if group else 1, N) * 1e-2).bfloat16().float()
    packed = torch.ops.npu.npu_trans_quant_param(scale.flatten())
    grouped = unpack_int4(weight).double().view(len(scale), -1, N)
    assist = 8 * (grouped.sum(1) * scale.double()).sum(0)
    return Call(
        "npu_quant_matmul",
        [int8(M, k), weight, packed.reshape(scale.shape if group else (N,))],
        {
            "offset": assist.float(),
            "pertoken_scale": scales(*((M, 1) if group else (M,))),
            "output_dtype": out_dtype,
            "group_sizes": [0, 0, group],
        },
    )


TOKENS, TOP_K, EXPERTS = 6, 2, 4


def init_routing_call(quant_mode: int = 1, **options: Any) -> Call:
    return Call(
        "npu_moe_init_routing_v2",
        [torch.randn(TOKENS, K).bfloat16(), choices()],
        {
            "active_num": TOKENS * TOP_K,
            "expert_num": EXPERTS,
            "active_expert_range": [0, EXPERTS],
            "expert_tokens_num_type": 1,
            "expert_tokens_num_flag": True,
            "quant_mode": quant_mode,
            **options,
        },
    )


def choices() -> torch.Tensor:
    """Experts of each token; no token chooses the last expert."""
    rows = [torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(TOKENS)]
    return torch.stack(rows).int()


def unpermute_call(dtype: torch.dtype = torch.bfloat16) -> Call:
    order = torch.randperm(TOKENS * TOP_K, dtype=torch.int32)
    rows = torch.randn(TOKENS * TOP_K, K).to(dtype)
    return Call("npu_moe_token_unpermute", [rows, order, torch.rand(TOKENS, TOP_K)])


def finalize_call(dtype: torch.dtype = torch.bfloat16) -> Call:
    """Like `unpermute_call`, with every third row missing."""
    order = torch.randperm(TOKENS * TOP_K, dtype=torch.int32)
    order[::3] = -1
    rows = torch.randn(TOKENS * TOP_K, 1, K).to(dtype)
    weights = torch.rand(TOKENS, TOP_K).to(dtype)
    return Call(
        "npu_moe_finalize_routing",
        [rows, None, None, None, weights, order, choices()],
        {"drop_pad_mode": 3},
    )


GROUPED_ROWS = [3, 0, 4, 1]


def grouped_call(
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
    group: int = 0,
    k: int = 512,
    spare: int = 1,
) -> Call:
    """All experts but one have rows; `spare` rows belong to no expert."""
    m = sum(GROUPED_ROWS) + spare
    packed = weight_dtype == torch.int32
    shape = (EXPERTS, k, N // 8) if packed else (EXPERTS, k, N)
    weight = packed_int4(*shape) if packed else int8(*shape)
    counts = torch.tensor(GROUPED_ROWS)
    kwargs: dict[str, Any] = {
        "group_list": counts,
        "group_list_type": 1,
        "group_type": 0,
        "split_item": 2,
        "output_dtype": out_dtype,
    }
    groups = k // group if group else 1
    if x_dtype != torch.int8:
        x = torch.randn(m, k).to(x_dtype)
        shape = (EXPERTS, groups, N) if group else (EXPERTS, N)
        offset = torch.randint(-8, 8, shape).to(x_dtype)
        kwargs["antiquant_scale"] = [scales(*shape, dtype=x_dtype)]
        kwargs["antiquant_offset"] = [offset]
        return Call("npu_grouped_matmul", [[x], [weight]], kwargs)
    kwargs["per_token_scale"] = [scales(m)]
    if packed:
        scale = (torch.rand(EXPERTS, groups, N) * 1e-2).bfloat16().float()
        kwargs["scale"] = [scale.view(torch.int32).long()]
        grouped = unpack_int4(weight).double().view(EXPERTS, groups, -1, N)
        assist = 8 * (grouped.sum(2) * scale.double()).sum(1)
        kwargs["bias"] = [assist.float()]
    else:
        dtype = torch.float32 if out_dtype == torch.float16 else torch.bfloat16
        kwargs["scale"] = [scales(EXPERTS, N, dtype=dtype) * 1e-2]
    return Call("npu_grouped_matmul", [[int8(m, k)], [weight]], kwargs)


def swiglu_quant_call(
    weight_dtype: torch.dtype, group: int = 0, spare: int = 1
) -> Call:
    """Like `grouped_call`."""
    like = grouped_call(torch.int8, weight_dtype, torch.float16, group, spare=spare)
    scale = like.kwargs["scale"][0]
    # The operator rejects the default of torch_npu 2.10.
    options: dict[str, Any] = {"group_list_type": 1, "dequant_dtype": torch.float32}
    if weight_dtype == torch.int32:
        options["weight_assist_matrix"] = like.kwargs["bias"]
        options["dequant_mode"] = int(group > 0)
        scale = scale if group else scale[:, 0]
    (x,), weight = like.args
    if weight_dtype == torch.int8:
        weight = [torch.ops.npu.npu_format_cast(weight[0], FRACTAL_NZ)]
    tokens = like.kwargs["per_token_scale"][0]
    return Call(
        "npu_grouped_matmul_swiglu_quant_v2",
        [x, weight, [scale], tokens, like.kwargs["group_list"]],
        options,
    )


def float_swiglu_quant_call(kind: str, spare: int = 1) -> Call:
    """As layers make it; `kind` is "fp8", "mxfp8" or "mxfp4"."""
    is_mx, n = kind != "fp8", 128
    like = (
        mx_grouped_call(int(kind[-1]), spare, n=n)
        if is_mx
        else fp8_grouped_call(spare=spare)
    )
    (rows,), weight = like.args
    options: dict[str, Any] = {"dequant_dtype": torch.float32, "quant_dtype": FP8}
    if is_mx:
        options |= {"dequant_mode": 2, "quant_mode": 2}
        options |= {"weight_scale_dtype": E8M0, "x_scale_dtype": E8M0}
    if kind == "mxfp4":
        options |= {"quant_dtype": E2M1, "x_dtype": E2M1, "weight_dtype": E2M1}
    (of_rows,) = like.kwargs["per_token_scale"]
    counts = like.kwargs["group_list"].cumsum(0)
    return Call(
        "npu_grouped_matmul_swiglu_quant_v2",
        [rows, weight, like.kwargs["scale"], of_rows, counts],
        options,
    )


CALLS: dict[str, Callable[[], Call]] = {
    "npu_dynamic_quant": lambda: Call("npu_dynamic_quant", [x()]),
    "npu_dynamic_quant_asymmetric": lambda: Call("npu_dynamic_quant_asymmetric", [x()]),
    "npu_quantize": lambda: Call(
        "npu_quantize",
        [x(), scales(1), torch.tensor([3], dtype=torch.int32), torch.qint8, -1, True],
    ),
    "npu_trans_quant_param": lambda: Call("npu_trans_quant_param", [scales(N)]),
    "npu_convert_weight_to_int4pack": lambda: Call(
        "npu_convert_weight_to_int4pack",
        [torch.randint(-8, 8, (N, K), dtype=torch.int32)],
    ),
    "npu_format_cast": lambda: Call("npu_format_cast", [int8(K, N), 29]),
    "npu_weight_quant_batchmatmul": weight_quant_call,
    "npu_quant_matmul": quant_matmul_call,
    "npu_quant_matmul, int4": a8w4_call,
    "npu_grouped_matmul, A16W4": lambda: grouped_call(
        torch.bfloat16, torch.int32, torch.bfloat16, 64, spare=0
    ),
    "npu_grouped_matmul, A8W8": lambda: grouped_call(
        torch.int8, torch.int8, torch.bfloat16, spare=0
    ),
    "npu_grouped_matmul, A8W4": lambda: grouped_call(
        torch.int8, torch.int32, torch.bfloat16, 256, spare=0
    ),
    "npu_grouped_matmul_swiglu_quant_v2, A8W8": lambda: swiglu_quant_call(
        torch.int8, spare=0
    ),
    "npu_grouped_matmul_swiglu_quant_v2, A8W4": lambda: swiglu_quant_call(
        torch.int32, 256, spare=0
    ),
    "npu_moe_init_routing_v2": init_routing_call,
    "npu_moe_token_unpermute": unpermute_call,
    "npu_moe_finalize_routing": finalize_call,
    "npu_swiglu": lambda: Call("npu_swiglu", [x()]),
}
# Operators that the other chips lack.
CALLS_A5: dict[str, Callable[[], Call]] = {
    "npu_dynamic_quant, FP8": lambda: Call(
        "npu_dynamic_quant", [x()], {"dst_type": FP8}
    ),
    "npu_quant_matmul, FP8": fp8_matmul_call,
    "npu_dynamic_mx_quant, MXFP8": lambda: Call(
        "npu_dynamic_mx_quant", [x()], {"dst_type": FP8}
    ),
    "npu_dynamic_mx_quant, MXFP4": lambda: Call("npu_dynamic_mx_quant", [x()]),
    "npu_grouped_matmul, FP8": fp8_grouped_call,
    "npu_grouped_matmul, MXFP8": lambda: mx_grouped_call(8),
    "npu_grouped_matmul, MXFP4": lambda: mx_grouped_call(4),
    **{
        f"npu_grouped_matmul_swiglu_quant_v2, {kind}": partial(
            float_swiglu_quant_call, kind
        )
        for kind in ("fp8", "mxfp8", "mxfp4")
    },
    "npu_quant_matmul, MXFP8": lambda: mx_matmul_call(8),
    "npu_quant_matmul, MXFP4": lambda: mx_matmul_call(4),
}
CALLS_310P: dict[str, Callable[[], Call]] = {
    "npu_quant_matmul_dequant": quant_matmul_dequant_call,
    "npu_quant_grouped_matmul_dequant": lambda: quant_grouped_matmul_dequant_call(0),
}
