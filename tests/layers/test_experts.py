# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme through upstream's experts and loaders, against float64."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)

from tests import lacks
from tests.formula import relative_error
from tests.layers.quantized_experts import (
    INT8_TOLERANCE,
    ROUNDINGS,
    SERVED,
    WEIGHT_ONLY_TOLERANCE,
    Sizes,
    build_with,
    is_weight_only,
    load,
    routing,
    run,
)
from tests.layers.quantized_layers import activations, config_of
from tools.bench.launches import Launches
from tools.checkpoints.make_checkpoint import SCHEMES
from vllm_ascend_ct.compat import CompressedTensorsWNA16MoEMethod
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_dequant_moe import (
    AscendWNA8DequantExperts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.fused_moe.modular_kernel import (
    AscendModularExperts,
    ModularAscendMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_int8 import (  # noqa: E501
    AscendCTW4A8Int8MoEMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    AscendCTW8A8Int8MoEMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    AscendCTWNA16MoEMethod,
)

pytestmark = pytest.mark.usefixtures("single_rank")

BF16, FP16 = torch.bfloat16, torch.float16
SIZES = {
    "8-experts": Sizes(8, hidden=512, intermediate=256, top_k=2),
    "32-experts": Sizes(32, hidden=256, intermediate=768, top_k=8),
    "top-1": Sizes(4, hidden=256, intermediate=512, top_k=1),
    "odd": Sizes(5, hidden=320, intermediate=192, top_k=3),
}
BATCHES = (1, 7, 512)
REFUSED = {
    "w8a16-g128": "8-bit experts of K=512, N=512: group_size=128; supported: per chan",
    "w5a16-g64-asym": "5-bit experts .*: group_size=64; supported: per channel",
    "w8a8-g128-packed": "8-bit experts .*: group_size=128; supported: per channel",
    "w8a8-tensor-dynamic": "weights.strategy=tensor; supported for .*: channel",
    "w8a8-channel-static": "int8 inputs, static per tensor; supported: 16-bit",
    "w4a8o8-channel": "int8 inputs and outputs, static per tensor, symmetric; supp",
}


def sizes_of(scheme: str) -> list[str]:
    """Sizes with whole groups; for some schemes all sizes."""
    group_size = SCHEMES[scheme].weights.group_size or 1
    names = [
        name
        for name, sizes in SIZES.items()
        if sizes.hidden % group_size == sizes.intermediate % group_size == 0
    ]
    representative = ("w4a16-g32", "w4a16-g64-asym", "w8a16-channel", "w4a8-channel")
    representative += ("w8a8-channel-dynamic", "w4a8-g256")
    return names if scheme in representative else names[:1]


def weights_of(scheme: str) -> type:
    """The method that creates the parameters."""
    args = SCHEMES[scheme]
    if args.input_activations is None or args.format == "pack-quantized":
        return AscendCTWNA16MoEMethod
    if args.weights.num_bits == 4:
        return AscendCTW4A8Int8MoEMethod
    return AscendCTW8A8Int8MoEMethod


def inputs(formula: Any, tokens: int, sizes: Sizes, dtype: torch.dtype) -> torch.Tensor:
    x: torch.Tensor = formula.without_ties(activations(tokens, sizes.hidden, dtype))
    return x


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "size"), [(s, size) for s in SERVED for size in sizes_of(s)]
)
def test_output_is_the_formula(scheme: str, size: str, dtype: torch.dtype) -> None:
    sizes, weight_only = SIZES[size], is_weight_only(scheme)
    runner, formula = load(sizes, scheme, dtype, weight_only)
    method = runner.routed_experts.quant_method
    assert type(method) is ModularAscendMethod
    assert type(method.weights) is weights_of(scheme)
    kernel_experts = method.moe_kernel.fused_experts
    assert type(kernel_experts) is AscendModularExperts
    experts = AscendWNA16Experts if weight_only else AscendWNA8Experts
    assert type(kernel_experts.experts) is experts
    prepare = method.moe_kernel.prepare_finalize
    assert type(prepare) is MoEPrepareAndFinalizeNoDPEPModular
    for batch in BATCHES:
        x = inputs(formula, batch, sizes, dtype)
        routed = routing(sizes, batch, seed=batch)
        y = run(runner, x, routed)
        assert y.dtype == dtype and y.shape == x.shape
        expected = formula(x, *routed)
        if not weight_only:
            assert relative_error(y, expected) < INT8_TOLERANCE
            continue
        rounded = formula.rounded(dtype)(x, *routed)
        assert relative_error(y, rounded) < WEIGHT_ONLY_TOLERANCE
        assert relative_error(y, expected) < ROUNDINGS[dtype]


@pytest.mark.parametrize("scheme", REFUSED)
def test_refused(scheme: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=REFUSED[scheme]):
        load(SIZES["8-experts"], scheme, BF16)


@pytest.mark.parametrize(
    ("scheme", "sizes", "reason"),
    [
        ("w5a16-channel-asym", Sizes(4, 256, 520, 2), "N=520, .* fill whole int32"),
        ("w4a16-channel", Sizes(4, 256, 252, 2), "K=252; supported for int4: mult"),
        ("w4a16-g32", Sizes(1025, 32, 32, 2), "1025 experts; supported: 1 to 1024"),
        ("w4a16-g128", Sizes(4, 256, 320, 2), "320 per rank, group_size=128; .*whole"),
    ],
)
def test_sizes_are_refused_before_loading(
    scheme: str, sizes: Sizes, reason: str
) -> None:
    config = config_of("Linear", scheme)
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        build_with(sizes, config, BF16)


def test_chip_without_quantized_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    with pytest.raises(UnsupportedCheckpointError, match="no operator that multiplies"):
        build_with(SIZES["8-experts"], config_of("Linear", "w8a16-channel"), FP16)


@pytest.mark.parametrize("size", ["8-experts", "top-1"])
@pytest.mark.parametrize("scheme", ["w8a8-channel-dynamic", "w6a8-channel-packed"])
def test_chip_that_quantizes_in_the_product(
    scheme: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    sizes = SIZES[size]
    runner, formula = load(sizes, scheme, FP16)
    experts = runner.routed_experts.quant_method.experts
    assert type(experts) is AscendWNA8DequantExperts
    for batch in BATCHES:
        x, routed = inputs(formula, batch, sizes, FP16), routing(sizes, batch)
        y = run(runner, x, routed)
        assert relative_error(y, formula(x, *routed)) < INT8_TOLERANCE
    with Launches() as launches:
        run(runner, x, routed)
    product = "npu.npu_quant_grouped_matmul_dequant"
    found = [name for name in launches.names if name.startswith("npu.")]
    assert found == [SORT, product, "npu.npu_swiglu", product, BACK]


@pytest.mark.parametrize(
    ("scheme", "sizes", "reason"),
    [
        ("w4a8-channel", Sizes(4, 256, 256, 2), "only symmetric int8 experts"),
        ("w8a8-channel-dynamic-asym", Sizes(4, 256, 256, 2), "asymmetric activations"),
        (
            "w8a8-channel-dynamic",
            Sizes(4, 256, 264, 2),
            "K=264; supported: multiples of 16",
        ),
    ],
)
def test_refused_by_that_chip(
    scheme: str, sizes: Sizes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        build_with(sizes, config_of("Linear", scheme), FP16)


@pytest.mark.parametrize("scheme", ["w8a8-channel-dynamic", "w6a8-channel-packed"])
def test_chip_without_fused_gate(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    sizes = SIZES["8-experts"]
    runner, formula = load(sizes, scheme, BF16)
    x, routed = inputs(formula, 64, sizes, BF16), routing(sizes, 64)
    with Launches() as launches:
        y = run(runner, x, routed)
    assert relative_error(y, formula(x, *routed)) < INT8_TOLERANCE
    unfused = [PRODUCT, "npu.npu_swiglu", "npu.npu_dynamic_quant", PRODUCT]
    assert launches.names == [SORT, *unfused, BACK, *COPY]


GATES = {
    "gelu": lambda gate, up: torch.nn.functional.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: (
        torch.nn.functional.gelu(gate, approximate="tanh") * up
    ),
    "swiglustep": lambda gate, up: (
        torch.nn.functional.silu(gate).clamp(max=7) * up.clamp(-7, 7)
    ),
}


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-channel-dynamic", "w4a8-g256"])
@pytest.mark.parametrize("activation", GATES)
def test_other_activations(scheme: str, activation: str) -> None:
    sizes = SIZES["8-experts"]
    runner, formula = load(sizes, scheme, FP16, activation=activation)
    x, routed = inputs(formula, 64, sizes, FP16), routing(sizes, 64)
    expected = formula(x, *routed, activation=GATES[activation])
    tolerance = INT8_TOLERANCE if "a8" in scheme else 2 * ROUNDINGS[FP16]
    assert relative_error(run(runner, x, routed), expected) < tolerance


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-channel-dynamic"])
def test_clamped_swiglu(scheme: str) -> None:
    sizes = SIZES["8-experts"]
    runner, formula = load(sizes, scheme, FP16, swiglu_limit=0.5)

    def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
        return torch.nn.functional.silu(gate) * up

    x, routed = inputs(formula, 64, sizes, FP16), routing(sizes, 64)
    expected = formula(x, *routed, activation=gate)
    tolerance = INT8_TOLERANCE if "a8" in scheme else 2 * ROUNDINGS[FP16]
    assert relative_error(run(runner, x, routed), expected) < tolerance


@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g32", "w8a16-channel-asym", "w4a8-channel", "w8a8-channel-dynamic"],
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_biases_and_interleaved_gates(scheme: str, dtype: torch.dtype) -> None:
    """As in gpt-oss. int8 activations would need a different kind of bias."""
    sizes = SIZES["8-experts"]
    runner, formula = load(
        sizes, scheme, dtype, weight_only=True, has_bias=True, activation="swigluoai"
    )
    assert type(runner.routed_experts.quant_method.experts) is AscendWNA16Experts
    x, routed = inputs(formula, 64, sizes, dtype), routing(sizes, 64)

    def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        # Rows of gate and up alternate in the checkpoint's tensor; separate them.
        rows = torch.cat((gate, up), dim=-1)
        gate, up = rows[..., ::2].clamp(max=7), rows[..., 1::2].clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    expected = formula(x, *routed, activation=gate)
    assert relative_error(run(runner, x, routed), expected) < 2 * ROUNDINGS[dtype]


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-channel-dynamic"])
def test_router_weight_on_input(scheme: str) -> None:
    sizes = SIZES["top-1"]
    runner, formula = load(sizes, scheme, FP16, apply_router_weight_on_input=True)
    x, (_, ids) = activations(64, sizes.hidden, FP16), routing(sizes, 64)
    weights = torch.rand(64, 1) + 0.5
    weighted = x * weights.to(FP16)
    expected = formula(weighted, torch.ones(64, 1), ids)
    tolerance = INT8_TOLERANCE if "a8" in scheme else ROUNDINGS[FP16]
    assert relative_error(run(runner, x, (weights, ids)), expected) < tolerance


SORT, BACK = "npu.npu_moe_init_routing_v2", "npu.npu_moe_token_unpermute"
# Up to vLLM 0.30 its kernel copies what experts return.
COPY = ["aten.copy_"] if lacks.is_older() else []
PRODUCT = "npu.npu_grouped_matmul"
GATE = "npu.npu_grouped_matmul_swiglu_quant_v2"
LAUNCHES = {
    "w8a8-channel-dynamic": [SORT, "aten.cumsum", GATE, PRODUCT, BACK],
    "w8a8-channel-packed": [SORT, "aten.cumsum", GATE, PRODUCT, BACK],
    "w4a8-channel": [SORT, GATE, PRODUCT, BACK],
    "w4a8-g256": [SORT, GATE, PRODUCT, BACK],
    "w4a16-g32": [SORT, PRODUCT, "npu.npu_swiglu", PRODUCT, BACK],
    "w4a16-g128-asym": [SORT, PRODUCT, "npu.npu_swiglu", PRODUCT, BACK],
    "w8a16-channel": [SORT, PRODUCT, "npu.npu_swiglu", PRODUCT, BACK],
}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("scheme", LAUNCHES)
def test_launches(scheme: str, dtype: torch.dtype) -> None:
    sizes = SIZES["8-experts"]
    runner, formula = load(sizes, scheme, dtype)
    x, routed = inputs(formula, 5, sizes, dtype), routing(sizes, 5)
    run(runner, x, routed)
    with Launches() as launches:
        run(runner, x, routed)
    assert launches.names == [*LAUNCHES[scheme], *COPY]


@pytest.mark.parametrize("targets", ["Linear", "re:none"])
def test_method_is_the_same_if_asked_again(targets: str) -> None:
    """As vllm-ascend 0.24 to 0.26 do; it has recorded what was loaded."""
    made = config_of(targets, "w4a16-g32")
    layer = build_with(SIZES["8-experts"], made, BF16).routed_experts
    method = layer.quant_method
    assert made.get_quant_method(layer, "experts", tid2eid=None) is method


def test_symmetric_experts_share_offsets() -> None:
    """The operator requires offsets: all layers share the same zeros."""
    sizes = SIZES["8-experts"]
    zeros = []
    for scheme in ("w4a16-g32", "w8a16-channel", "w8a16-channel"):
        layer = load(sizes, scheme, BF16)[0].routed_experts
        zeros.append([layer.w13_zero_offset, layer.w2_zero_offset])
    int4, *int8 = zeros
    for alike in (int4, [zero for of_layer in int8 for zero in of_layer]):
        assert len({zero.untyped_storage().data_ptr() for zero in alike}) == 1
    assert not any(zero.any() for each in zeros for zero in each)


def test_biases_that_this_vllm_would_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM 0.30 they have no parameters, and its loader silently skips them."""
    create_weights = CompressedTensorsWNA16MoEMethod.create_weights

    def without_biases(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        create_weights(self, layer, *args, **kwargs)
        for name in {"w13_bias", "w2_bias"} & layer._parameters.keys():
            delattr(layer, name)

    monkeypatch.setattr(
        CompressedTensorsWNA16MoEMethod, "create_weights", without_biases
    )
    with pytest.raises(UnsupportedCheckpointError, match="Biases of experts"):
        load(SIZES["8-experts"], "w4a16-g32", BF16, has_bias=True)
