# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts in vllm-ascend's layer, with its communication methods."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from torch.nn.functional import silu
from vllm.config import LoRAConfig
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.formula import relative_error
from tests.layers.quantized_experts import (
    INT8_TOLERANCE,
    PREFIX,
    ROUNDINGS,
    SERVED,
    FormulaExperts,
    compressed_experts,
    is_weight_only,
    routing,
)
from tests.layers.quantized_layers import activations
from tests.real_stack.ascend_experts import (
    ROUNDED_TOLERANCE,
    SIZES,
    build,
    load,
    load_tensors,
    own_operators,
    run,
)
from tests.real_stack.meta import MetaChecked
from tools.checkpoints.make_checkpoint import SCHEMES
from tools.numerics import check_npu, record_npu_calls
from vllm_ascend_ct.errors import PlatformError, Remedy, UnsupportedCheckpointError

pytestmark = pytest.mark.vllm_ascend
BF16, FP16 = torch.bfloat16, torch.float16


def check(
    layer: Any,
    formula: FormulaExperts,
    vllm_config: Any,
    int8_tolerance: float = INT8_TOLERANCE,
) -> None:
    dtype = layer.moe_config.in_dtype
    quantized = layer.quant_method.weights.experts_cls.quantizes_activations
    tolerance = int8_tolerance if quantized else ROUNDINGS[dtype] * 1.1
    for tokens in (20, 64):
        x = formula.without_ties(activations(tokens, SIZES.hidden, dtype))
        routed = routing(SIZES, tokens)
        output = run(layer, x.clone(), routed, vllm_config)
        expected = formula(x, routed[0].to(dtype), routed[1])
        assert relative_error(output, expected) < tolerance


@pytest.mark.parametrize("scheme", SERVED)
def test_output_is_the_formula(scheme: str, vllm_config: Any) -> None:
    layer, formula = load(scheme, vllm_config)
    name = "AscendWNA16Experts"
    if not is_weight_only(scheme):
        name = "AscendWNA8Experts"
    assert type(layer.quant_method.experts).__name__ == name
    int4 = SCHEMES[scheme].weights.num_bits <= 4
    tolerance = ROUNDED_TOLERANCE if int4 else INT8_TOLERANCE
    with MetaChecked() as checked:
        check(layer, formula, vllm_config, tolerance)
    assert checked.calls and checked.faults == []


@pytest.mark.parametrize(
    "scheme", ["w4a16-g64-asym", "w8a16-channel", "w8a8-channel-dynamic"]
)
def test_float16(scheme: str, vllm_config: Any, mocker: MockerFixture) -> None:
    """vllm-ascend supports int8 activations in bfloat16 models only."""
    mocker.patch.object(vllm_config.model_config, "dtype", FP16)
    layer, formula = load(scheme, vllm_config, FP16)
    assert type(layer.quant_method.experts).__name__ == "AscendWNA16Experts"
    check(layer, formula, vllm_config)


@pytest.mark.parametrize("scheme", SERVED)
def test_with_its_own_operators(
    scheme: str, vllm_config: Any, mocker: MockerFixture
) -> None:
    """If they can be loaded, per-channel int4 uses a fused one."""
    spy = mocker.spy(torch.ops._C_ascend, "grouped_matmul_swiglu_quant_v2")
    with own_operators():
        layer, formula = load(scheme, vllm_config)
        check(layer, formula, vllm_config, ROUNDED_TOLERANCE)
    weights = SCHEMES[scheme].weights
    fused = weights.num_bits <= 4 and weights.group_size is None
    assert bool(spy.call_count) is (fused and not is_weight_only(scheme))


def test_calls_can_be_checked_on_an_npu(vllm_config: Any, tmp_path: Path) -> None:
    """Recorded calls run on both sides of the check, which are both emulated here."""
    schemes = ["w4a16-g32-asym", "w4a8-channel", "w8a8-channel-dynamic"]
    layers = record_npu_calls.vllm_ascend_layers(vllm_config)
    path = tmp_path / "calls.pt"
    record_npu_calls.save(record_npu_calls.record(layers, schemes, [BF16]), path)
    calls = check_npu.recorded(path)
    assert {call.operator for call in calls.values()} == {
        "npu_dynamic_quant",
        "npu_format_cast",
        "npu_grouped_matmul",
        "npu_moe_token_unpermute",
        "npu_swiglu",
        "npu_trans_quant_param",
        "_C_ascend.npu_moe_init_routing_custom",
        "_C_ascend.grouped_matmul_swiglu_quant_weight_nz",
        "_C_ascend.grouped_matmul_swiglu_quant_v2",
    }
    check_npu.load_vllm_ascend("cpu")
    report = check_npu.check(calls, "cpu")
    assert {call["verdict"] for call in report["calls"]} == {"equal"}


def test_what_the_runner_asks_of_a_method(vllm_config: Any) -> None:
    """See vllm-ascend's `AscendFusedMoE`."""
    from vllm_ascend.quantization.quant_type import QuantType

    _, config, _ = compressed_experts(SIZES, "w4a8-channel", BF16)
    layer = build(config, vllm_config, BF16)
    assert layer.quant_type is QuantType.W4A8
    assert not layer.quant_method.supports_eplb
    layer.ensure_moe_quant_config_init()
    layer.maybe_init_modular_kernel()
    assert type(layer.quant_method).__name__ == "FusedMoEAscendMethod"
    # Otherwise the runner assumes that shared experts use its own W8A8.
    shared = torch.nn.Linear(2, 2)
    layer = build(config, vllm_config, BF16, shared_experts=shared)
    assert layer.quant_type is QuantType.NONE
    _, config, _ = compressed_experts(SIZES, "w4a16-g32", BF16)
    assert build(config, vllm_config, BF16).quant_type is QuantType.NONE


def test_routing_is_vllm_ascends(vllm_config: Any, mocker: MockerFixture) -> None:
    select = mocker.patch(
        "vllm_ascend.ops.fused_moe.experts_selector.select_experts",
        return_value=routing(SIZES, 20),
    )
    table = torch.zeros(5, 3)
    options = {
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "renormalize": False,
        "routed_scaling_factor": 2.5,
        "e_score_correction_bias": torch.ones(SIZES.experts),
    }
    layer, _ = load("w4a16-g32", vllm_config, tid2eid=table, **options)
    x = activations(20, SIZES.hidden, BF16)
    run(layer, x, None, vllm_config)
    given = select.call_args.kwargs
    for name, value in options.items():
        if name == "e_score_correction_bias":
            assert given[name].eq(1).all()
        else:
            assert given[name] == value, name
    assert given["tid2eid"] is table and given["top_k"] == SIZES.top_k
    assert given["num_experts"] == given["num_logical_experts"] == SIZES.experts


def test_profiling_spreads_tokens(vllm_config: Any, mocker: MockerFixture) -> None:
    layer, _ = load("w4a16-g32", vllm_config)
    compute = mocker.spy(torch.ops._C_ascend, "npu_moe_init_routing_custom")
    x = activations(200, SIZES.hidden, BF16)
    weights, ids = routing(SIZES, 200)
    run(layer, x, (weights, ids), vllm_config, in_profile_run=True)
    spread = compute.call_args.args[1]
    assert spread.shape == ids.shape and spread.dtype == ids.dtype
    # The fixed routing has no tokens for two of them.
    assert len(spread.unique()) == SIZES.experts > len(ids.unique())
    assert all(len(row.unique()) == SIZES.top_k for row in spread)


def test_routed_experts_are_returned(vllm_config: Any, mocker: MockerFixture) -> None:
    """`NPUModelRunner` requests them with `enable_return_routed_experts`."""
    layer, _ = load("w4a16-g32", vllm_config)
    layer._ascend_routed_experts_capturer = capturer = mocker.Mock()
    routed = routing(SIZES, 20)
    run(layer, activations(20, SIZES.hidden, BF16), routed, vllm_config)
    (call,) = capturer.capture.call_args_list
    assert call.kwargs["layer_id"] == layer.layer_id
    assert torch.equal(call.kwargs["topk_ids"], routed[1])


@pytest.mark.parametrize("targets", [None, ["q_proj", "experts"]])
def test_adapters_of_experts_are_refused(
    vllm_config: Any, mocker: MockerFixture, targets: list[str] | None
) -> None:
    adapters = LoRAConfig(max_lora_rank=8, target_modules=targets)
    mocker.patch.object(vllm_config, "lora_config", adapters)
    with pytest.raises(PlatformError, match=f"layer {PREFIX}, .*lora") as error:
        load("w4a16-g32", vllm_config)
    assert Remedy.LORA_TARGETS in str(error.value)


def test_adapters_of_other_modules_are_not(
    vllm_config: Any, mocker: MockerFixture
) -> None:
    adapters = LoRAConfig(max_lora_rank=8, target_modules=["q_proj"])
    mocker.patch.object(vllm_config, "lora_config", adapters)
    check(*load("w4a16-g32", vllm_config), vllm_config)


def test_adapters_are_not_left_out(vllm_config: Any, mocker: MockerFixture) -> None:
    """vllm-ascend stores them on the layer, and expects the method to apply them."""
    layer, _ = load("w4a16-g32", vllm_config)
    layer.set_lora_context(mocker.Mock())
    x = activations(20, SIZES.hidden, BF16)
    with pytest.raises(PlatformError, match=f"layer {PREFIX}, a LoRA context"):
        run(layer, x, routing(SIZES, 20), vllm_config)


def test_weights_of_the_router_on_the_input(vllm_config: Any) -> None:
    layer, formula = load(
        "w4a16-g32", vllm_config, top_k=1, apply_router_weight_on_input=True
    )
    x = activations(20, SIZES.hidden, BF16)
    weights, ids = routing(SIZES, 20)
    weights, ids = weights[:, :1].contiguous(), ids[:, :1].contiguous()
    scaled = x * weights.bfloat16()
    expected = formula(scaled, torch.ones_like(weights), ids)
    output = run(layer, x, (weights, ids), vllm_config)
    assert relative_error(output, expected) < ROUNDINGS[BF16] * 1.1


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("w4a16-g32", {"activation": "gelu"}, "activation gelu; vllm-ascend supports"),
        ("w8a8-channel-dynamic", {"has_bias": True}, "biases of experts, which vllm"),
        (
            "w4a16-g32",
            {"swiglu_limit": 7.0},
            "swiglu_limit=7.0, which vllm-ascend ignores",
        ),
    ],
)
def test_what_it_would_not_compute_is_refused(
    scheme: str, options: dict[str, Any], reason: str, vllm_config: Any
) -> None:
    _, config, _ = compressed_experts(SIZES, scheme, BF16)
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        build(config, vllm_config, BF16, **options)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("enable_fused_mc2", 1, "enable_fused_mc2=1.*: 0. Change enable_fused"),
        ("eplb_config.config", {"dynamic_eplb": True}, "dynamic_eplb=True.*: False"),
    ],
)
def test_settings_that_are_refused(
    path: str, value: Any, reason: str, vllm_config: Any, mocker: MockerFixture
) -> None:
    from tests.real_stack.ascend_layers import set_setting

    set_setting(mocker, path, value)
    _, config, _ = compressed_experts(SIZES, "w8a8-channel-dynamic", BF16)
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        build(config, vllm_config, BF16)


def test_swiglu_step(vllm_config: Any) -> None:
    layer, formula = load("w4a16-g32", vllm_config, activation="swiglustep")
    x = activations(20, SIZES.hidden, BF16)
    routed = routing(SIZES, 20)

    def step(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return silu(gate).clamp(max=7) * up.clamp(-7, 7)

    expected = formula(x, routed[0].bfloat16(), routed[1], activation=step)
    output = run(layer, x, routed, vllm_config)
    assert relative_error(output, expected) < ROUNDINGS[BF16] * 1.1


@pytest.mark.parametrize("scheme", SERVED)
def test_reload(scheme: str, vllm_config: Any) -> None:
    """The output follows the new weights, which are at the old addresses."""
    (first, config, _), (second, _, _) = (
        compressed_experts(SIZES, scheme, BF16) for _ in range(2)
    )
    layer = build(config, vllm_config, BF16)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load_tensors(layer, first)
    layer.quant_method.process_weights_after_loading(layer)
    x, routed = activations(20, SIZES.hidden, BF16), routing(SIZES, 20)
    addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
    outputs = [run(layer, x.clone(), routed, vllm_config)]
    for modules in (second, first):
        initialize_layerwise_reload(model)
        load_tensors(layer, modules)
        finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
        outputs.append(run(layer, x.clone(), routed, vllm_config))
    assert torch.equal(outputs[2], outputs[0])
    assert not torch.equal(outputs[1], outputs[0])
    assert {n: p.data_ptr() for n, p in layer.named_parameters()} == addresses
