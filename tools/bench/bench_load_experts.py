# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Measure time and memory of repacking a layer's experts after loading.

    python -m tools.bench.bench_load_experts [--experts 16] [--hidden 2048]
        [--intermediate 768]

Times are relative to copying the loaded bytes in the same run; compare only ratios.
`peak` and `new` are the memory in addition to the loaded tensors, at its maximum and at
the end, divided by the loaded bytes; the third column is `peak` divided by the bytes of
one expert. The rows "whole layer" repack like vllm-ascend 0.23: all experts at once,
and int4 by way of one int32 per value.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEQuantConfig, MoEActivation

from tools.bench.bench_load import Result, measure, packed_weight, parameters
from vllm_ascend_ct.compare_layouts.experts import moe_config
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.fused_moe.modular_kernel import AscendModularExperts
from vllm_ascend_ct.ops import emulated
from vllm_ascend_ct.weights import int4, pack_quantized
from vllm_ascend_ct.weights.int_quantized import to_nz

TOP_K = 8
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    experts: int
    hidden: int
    intermediate: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """`(K, N)` of the two products, by prefix of their parameters."""
        h, i = self.hidden, self.intermediate
        return {"w13": (h, 2 * i), "w2": (i, h)}

    @property
    def weights(self) -> int:
        return self.experts * sum(k * n for k, n in self.products.values())


@dataclass(frozen=True)
class Scheme:
    """The scheme of the loaded weights; 8 bits without `packed` means int8."""

    name: str
    experts_cls: type[AscendExperts]
    bits: int
    group_size: int = 0
    packed: bool = True
    asymmetric: bool = False


SCHEMES = (
    Scheme("w4a16-g32", AscendWNA16Experts, 4, 32),
    Scheme("w4a16-g128", AscendWNA16Experts, 4, 128),
    Scheme("w4a16-g128-asym", AscendWNA16Experts, 4, 128, asymmetric=True),
    Scheme("w4a16-channel", AscendWNA16Experts, 4),
    Scheme("w3a16-g128", AscendWNA16Experts, 3, 128),
    Scheme("w8a16-channel", AscendWNA16Experts, 8),
    Scheme("w8a8-channel", AscendWNA8Experts, 8, packed=False),
    Scheme("w4a8-channel", AscendWNA8Experts, 4),
    Scheme("w4a8-g256", AscendWNA8Experts, 4, 256),
    Scheme("w3a8-channel", AscendWNA8Experts, 3),
)


def loaded(sizes: Sizes, scheme: Scheme) -> AscendExperts:
    """Make the experts of a layer as it is after loading."""
    tensors = {}
    for name, (k, n) in sizes.products.items():
        groups = k // scheme.group_size if scheme.group_size else 1
        shape = (sizes.experts, n)
        if scheme.packed:
            packed = packed_weight(scheme.bits, k, sizes.experts * n)
            tensors[f"{name}_weight_packed"] = packed.unflatten(0, shape)
        else:
            weight = torch.randint(-128, 128, (*shape, k), dtype=torch.int8)
            tensors[f"{name}_weight"] = weight
        tensors[f"{name}_weight_scale"] = torch.rand(*shape, groups).to(DTYPE) + 0.1
        if scheme.asymmetric:
            words = packed_weight(scheme.bits, n, sizes.experts * groups)
            zero_point = words.unflatten(0, (sizes.experts, groups)).transpose(1, 2)
            tensors[f"{name}_weight_zero_point"] = zero_point.contiguous()
    moe = moe_config(sizes.experts, TOP_K, sizes.hidden, sizes.intermediate, DTYPE)
    return scheme.experts_cls(parameters(**tensors), moe)


def expert_by_expert(experts: AscendExperts) -> None:
    """Repack a layer as this package does."""
    experts.lay_out()


def forward(sizes: Sizes) -> Callable[[AscendExperts], None]:
    """Make a function that runs one token like upstream's modular kernel."""
    weights = torch.full((1, TOP_K), 1 / TOP_K)
    # Arguments that the kernel passes and these experts do not read.
    unused = ("output", "w2", "expert_map", "a1q_scale", "a2_scale", "workspace13")
    arguments: dict[str, Any] = {
        **dict.fromkeys((*unused, "workspace2", "expert_tokens_meta")),
        "hidden_states": torch.randn(1, sizes.hidden).to(DTYPE),
        "w1": torch.empty(sizes.experts, 0, 0),
        "topk_weights": weights,
        "topk_ids": torch.arange(TOP_K, dtype=torch.int32).view(1, TOP_K),
        "activation": MoEActivation.SILU,
        "global_num_experts": sizes.experts,
        "apply_router_weight_on_input": False,
    }

    def run(experts: AscendExperts) -> None:
        runner = AscendModularExperts(experts, FusedMoEQuantConfig.make())
        runner.defers_finalize = True
        rows = runner.apply(**arguments)
        index = rows.expanded_idx_to_permuted_idx
        topk_ids = arguments["topk_ids"]
        runner.finalize(rows.gemm2_permuted, index, rows.expert_weights, topk_ids)

    return run


def whole_layer(sizes: Sizes, kind: str) -> Callable[[Any], object]:
    """Make a function that repacks all experts at once."""

    def run(experts: AscendExperts) -> list[torch.Tensor]:
        layer = experts.layer
        kept = []
        for name, (k, _) in sizes.products.items():
            if kind == "w8a8":
                weight = getattr(layer, f"{name}_weight").data
                kept.append(to_nz(weight.transpose(1, 2).contiguous()))
                continue
            packed = getattr(layer, f"{name}_weight_packed").data
            values = pack_quantized.unpack(packed.flatten(0, 1), 4, k)
            values = values.unflatten(0, packed.shape[:2])
            if kind == "w4a8":
                transposed = values.transpose(1, 2).contiguous()
                kept.append(int4.pack(transposed.flatten(0, 1)))
                continue
            widened = values.int().transpose(1, 2).contiguous()
            kept.append(
                torch.ops.npu.npu_convert_weight_to_int4pack(widened.flatten(0, 1))
            )
            kept.append(torch.zeros_like(getattr(layer, f"{name}_weight_scale").data))
        return kept

    return run


def routes(sizes: Sizes) -> Iterator[Result]:
    """Measure every scheme."""
    whole = {"w4a16-g128": "w4a16", "w8a8-channel": "w8a8", "w4a8-channel": "w4a8"}
    for scheme in SCHEMES:
        make = functools.partial(loaded, sizes, scheme)
        size = sizes.weights * scheme.bits // 8
        yield measure(scheme.name, size, make, expert_by_expert, forward(sizes))
        if scheme.name in whole:
            run = whole_layer(sizes, whole[scheme.name])
            yield measure(f"{scheme.name}, whole layer", size, make, run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    arguments = parser.parse_args()
    sizes = Sizes(arguments.experts, arguments.hidden, arguments.intermediate)
    emulated.install()
    print(
        f"{sizes}\n{'':28}  seconds  x copy  peak/loaded  new/loaded  peak/expert"
        "  launches"
    )
    for r in routes(sizes):
        print(
            f"{r.route:28}  {r.seconds:7.4f}  {r.copies:6.1f}  {r.peak:11.3f}  "
            f"{r.resident:10.3f}  {r.peak * sizes.experts:11.3f}  "
            f"{r.launches or '':>8}"
        )


if __name__ == "__main__":
    main()
