# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layers of routed experts to compare, one of each kind."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from vllm_ascend_ct.compare_layouts.layer import (
    Layer,
    NotServed,
    Product,
    Sizes,
    on_fp8_grid,
    on_int8_grid,
    on_mx_grid,
    packed,
    random_fp8,
    random_integers,
    random_mx,
)
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.dtypes import MX_BLOCK
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import FUSED_GATE

EXPERTS, TOP_K = 8, 2
# Weight `[N, K]` of an expert in float64, by its number.
_Weight = Callable[[int], torch.Tensor]


def moe_config(
    experts: int, top_k: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> Any:
    """Make upstream's `FusedMoEConfig` of a layer on one rank."""
    from vllm.model_executor.layers.fused_moe import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        MoEActivation,
        RoutingMethodType,
    )

    names = {field.name for field in fields(FusedMoEConfig)}
    # vLLM before 0.27 takes the intermediate size of the rank.
    width = "intermediate_size"
    if width not in names:
        width = "intermediate_size_per_partition"
    sizes_of_rank: dict[str, Any] = {width: intermediate}
    return FusedMoEConfig(
        **sizes_of_rank,
        num_experts=experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        num_local_experts=experts,
        num_logical_experts=experts,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
    )


def run(runner: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Run experts like upstream's modular kernel, with equal weights of the choices.

    Args:
        runner: `AscendModularExperts`.
        x: `[T, H]`.
        ids: Chosen experts, int32 `[T, top-k]`.

    """
    # Arguments that the modular kernel passes and these experts do not read.
    unused = ("w2", "activation", "expert_map", "a1q_scale", "a2_scale")
    workspaces = ("workspace13", "workspace2", "expert_tokens_meta")
    count = runner.experts.moe.num_experts
    output = torch.empty_like(x)
    weights = torch.full(ids.shape, 1 / ids.shape[1], device=x.device)
    runner.apply(
        **dict.fromkeys((*unused, *workspaces)),
        output=output,
        hidden_states=x,
        w1=x.new_empty(count, 0, 0),
        topk_weights=weights,
        topk_ids=ids,
        global_num_experts=count,
        apply_router_weight_on_input=False,
    )
    return output


def choices(tokens: int) -> torch.Tensor:
    """Experts of each token, int32 `[tokens, TOP_K]`: all experts in turn."""
    ids = torch.arange(tokens * TOP_K, dtype=torch.int32) % EXPERTS
    return ids.view(tokens, TOP_K)


def _experts(bits: int, group_size: int, quantizes: bool, sizes: Sizes) -> Layer:
    """Experts of integers, with 16-bit or dynamically quantized activations.

    Args:
        bits: Width of the weights.
        group_size: Elements of K that share a scale; 0 for per-channel scales.
        quantizes: Whether activations are quantized to int8.
        sizes: Sizes, dtype and device.

    """

    def make(layer: Any, name: str, k: int, n: int) -> _Weight:
        groups = k // group_size if group_size else 1
        values = random_integers(bits, EXPERTS, n, k)
        scale = (torch.rand(EXPERTS, n, groups) / 100 + 0.01).to(sizes.dtype)
        if quantizes and bits == 8:
            set_parameter(layer, f"{name}_weight", values.to(torch.int8, copy=True))
        else:
            set_parameter(layer, f"{name}_weight_packed", packed(values, bits))
        # Laying out changes the scale in place.
        set_parameter(layer, f"{name}_weight_scale", scale.clone())
        integers = values.to(torch.int8)
        columns = k // groups

        def weight(number: int) -> torch.Tensor:
            scales = scale[number].double().repeat_interleave(columns, 1)
            return integers[number] * scales

        return weight

    on_grid = on_int8_grid if quantizes else torch.Tensor.double
    return _made(_class(quantizes), (bits, group_size), make, on_grid, sizes)


def _fp8(sizes: Sizes) -> Layer:
    """Experts in FP8 with dynamic activations."""
    from vllm_ascend_ct.fused_moe.experts.ascend_float_moe import AscendFp8Experts

    def make(layer: Any, name: str, k: int, n: int) -> _Weight:
        weight, scale = random_fp8(EXPERTS, n, k)
        set_parameter(layer, f"{name}_weight", weight)
        set_parameter(layer, f"{name}_weight_scale", scale)
        return lambda number: weight[number].double() * scale[number].double()

    return _made(AscendFp8Experts, (8, 0), make, on_fp8_grid, sizes)


def _mx(bits: int, sizes: Sizes) -> Layer:
    """Experts in MXFP8 or MXFP4, with activations in the same format."""
    from vllm_ascend_ct.fused_moe.experts.ascend_float_moe import AscendMxExperts

    def make(layer: Any, name: str, k: int, n: int) -> _Weight:
        weight, scale, exact = random_mx(bits, EXPERTS, n, k)
        set_parameter(layer, f"{name}_weight{'' if bits == 8 else '_packed'}", weight)
        set_parameter(layer, f"{name}_weight_scale", scale)
        return exact.__getitem__

    on_grid = partial(on_mx_grid, bits)
    return _made(AscendMxExperts, (bits, MX_BLOCK), make, on_grid, sizes)


def _made(
    kind: Any,
    scheme: tuple[int, int],
    make: Callable[[Any, str, int, int], _Weight],
    on_grid: Product,
    sizes: Sizes,
) -> Layer:
    """Lay out experts whose parameters `make` creates.

    Args:
        kind: A subclass of `AscendExperts`.
        scheme: Width of the weights and group size.
        make: Creates the parameters of a product on the host, given the layer and the
            product's prefix, K and N.
        on_grid: Quantizes activations, in float64.
        sizes: Sizes, dtype and device.

    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    from vllm_ascend_ct.fused_moe.modular_kernel import AscendModularExperts

    moe = moe_config(EXPERTS, TOP_K, sizes.k, sizes.n, sizes.dtype)
    if reason := kind.refusal(moe, *scheme, True):
        raise NotServed(reason)
    layer: Any = torch.nn.Module()
    layer.layer_name = "experts"
    weights = {
        name: make(layer, name, k, n) for name, (k, n) in kind.products(moe).items()
    }
    layer.to(sizes.device)
    experts = kind(layer, moe)
    experts.lay_out()
    runner: Any = AscendModularExperts(experts, FusedMoEQuantConfig.make())
    # Copied to the device once: a captured graph cannot copy.
    ids: dict[int, torch.Tensor] = {}

    def product(x: torch.Tensor) -> torch.Tensor:
        if len(x) not in ids:
            ids[len(x)] = choices(len(x)).to(x.device)
        return run(runner, x, ids[len(x)])

    # An operator that quantizes the product does not round it before.
    fused = any(form.operator == FUSED_GATE for form in experts.forms())
    dtype = torch.float64 if fused else sizes.dtype

    def formula(x: torch.Tensor) -> torch.Tensor:
        return _formula(x, weights, on_grid, dtype)

    return Layer(product, formula, runner.experts.announced)


def _class(quantizes: bool) -> Any:
    """The class that multiplies experts on the current chip."""
    from vllm_ascend_ct.fused_moe.experts import (
        ascend_wna8_dequant_moe,
        ascend_wna8_moe,
        ascend_wna16_moe,
    )

    if not quantizes:
        return ascend_wna16_moe.AscendWNA16Experts
    if current_limits().quant_grouped_matmul_dequant is not None:
        return ascend_wna8_dequant_moe.AscendWNA8DequantExperts
    return ascend_wna8_moe.AscendWNA8Experts


def _formula(
    x: torch.Tensor,
    weights: dict[str, _Weight],
    on_grid: Product,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute experts in float64.

    Args:
        x: `[T, H]`.
        weights: Weights of "w13" and "w2".
        on_grid: Quantizes activations.
        dtype: Dtype that the first product and its activation are rounded to.

    """

    def times(rows: torch.Tensor, name: str, number: int) -> torch.Tensor:
        return on_grid(rows) @ weights[name](number).t()

    ids = choices(len(x))
    total = torch.zeros(x.shape, dtype=torch.float64)
    for number in range(EXPERTS):
        tokens, _ = (ids == number).nonzero(as_tuple=True)
        if len(tokens):
            products = times(x[tokens], "w13", number).to(dtype).double()
            gate, up = products.chunk(2, dim=1)
            hidden = (torch.nn.functional.silu(gate) * up).to(dtype).double()
            total.index_add_(0, tokens, times(hidden, "w2", number))
    return total / TOP_K


def reference(sizes: Sizes) -> Product:
    """A 16-bit product of as many experts by as many rows."""
    shape = EXPERTS, sizes.k, 2 * sizes.n
    w13 = torch.randn(shape, dtype=sizes.dtype, device=sizes.device)
    w2 = torch.randn(EXPERTS, sizes.n, sizes.k, dtype=sizes.dtype, device=sizes.device)

    def product(x: torch.Tensor) -> torch.Tensor:
        rows = TOP_K * len(x)
        experts = min(EXPERTS, rows)
        tokens = x[:1].expand(rows // experts, -1).expand(experts, -1, -1)
        gate, up = torch.bmm(tokens, w13[:experts]).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(gate) * up, w2[:experts])

    return product


ROUTED: dict[str, Callable[[Sizes], Layer]] = {
    "w4a16-group experts": partial(_experts, 4, 128, False),
    "w4a16-channel experts": partial(_experts, 4, 0, False),
    "w8a16-channel experts": partial(_experts, 8, 0, False),
    "w4a8-group experts": partial(_experts, 4, 256, True),
    "w4a8-channel experts": partial(_experts, 4, 0, True),
    "w8a8-dynamic experts": partial(_experts, 8, 0, True),
    "fp8-dynamic experts": _fp8,
    "mxfp8 experts": partial(_mx, 8),
    "mxfp4 experts": partial(_mx, 4),
}
