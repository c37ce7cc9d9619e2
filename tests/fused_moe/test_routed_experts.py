# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The methods that vllm-ascend 0.30's runner calls, tested without vllm-ascend."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture

from tests.layers import quantized_experts
from tests.layers.quantized_experts import factory_needed
from tests.layers.quantized_layers import MULTIPLIED_EXPERTS
from tools.bench.bench_load_experts import SCHEMES, Sizes, loaded
from vllm_ascend_ct.ascend_base import routed_experts
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.fused_moe_ascend_method import (
    RoutedExpertsAscendMethod,
)

SIZES = Sizes(experts=4, hidden=256, intermediate=256)
COUNTS = torch.tensor([3, 0, 2, 4])
# Rows after the last group, which MC2 leaves unwritten.
ROOM = 12


def call(**changes: Any) -> Any:
    """A `MoEMlpComputeInput` with the fields that are read."""
    fields = {
        "layer": SimpleNamespace(layer_name="model.layers.0.mlp.experts"),
        "hidden_states": torch.randn(ROOM, SIZES.hidden).bfloat16(),
        "dynamic_scale": None,
        "group_list": COUNTS,
        "group_list_type": 1,
        "topk_scales": None,
        "need_trans": False,
        "dynamic_eplb": False,
        "lora_context": None,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture
def laid_out(request: pytest.FixtureRequest) -> AscendExperts:
    (scheme,) = (scheme for scheme in SCHEMES if scheme.name == request.param)
    torch.manual_seed(0)
    experts = loaded(SIZES, scheme)
    experts.lay_out()
    return experts


@pytest.fixture(autouse=True)
def without_vllm_ascend(mocker: MockerFixture) -> None:
    """Replace vllm-ascend's `QuantType`, which its runner reads from a method."""
    mocker.patch("vllm_ascend_ct.ascend_base.fused_moe.QuantTypeHolder")


def method_of(experts: AscendExperts) -> RoutedExpertsAscendMethod:
    weights = SimpleNamespace(moe=experts.moe, experts_cls=type(experts), num_bits=8)
    method = RoutedExpertsAscendMethod(weights)
    method.experts = experts
    return method


@pytest.mark.parametrize(
    ("groups", "kind"),
    [
        (COUNTS, 1),
        (COUNTS.int(), 1),
        (COUNTS.cumsum(0), 0),
        (COUNTS.cumsum(0).int(), 0),
    ],
)
def test_counts(groups: torch.Tensor, kind: int) -> None:
    counts = routed_experts.counts(call(group_list=groups, group_list_type=kind))
    assert counts.dtype == torch.int64 and torch.equal(counts, COUNTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_context", object()),
        ("dynamic_eplb", True),
        ("need_trans", True),
        ("topk_scales", torch.ones(1)),
    ],
)
def test_what_is_not_computed_is_refused(field: str, value: Any) -> None:
    routed_experts.check(call())
    with pytest.raises(PlatformError, match=f"experts, {field}="):
        routed_experts.check(call(**{field: value}))


@factory_needed
@pytest.mark.parametrize(
    "laid_out", ["w4a16-g128", "w8a8-channel", "w4a8-channel"], indirect=True
)
def test_rows_as_each_way_of_sending_brings_them(laid_out: AscendExperts) -> None:
    """In 16 bits, in 16 bits with an unwritten scale, and already quantized."""
    method = method_of(laid_out)
    plain = call()
    rows = plain.hidden_states
    expected = laid_out.down(*laid_out.gate(rows, None, COUNTS), COUNTS)
    expected = expected[: COUNTS.sum()]
    assert expected.isfinite().all() and expected.count_nonzero()
    cumulative = {"group_list": COUNTS.cumsum(0), "group_list_type": 0}
    garbage = torch.full((ROOM,), torch.nan)
    ways = [plain, call(hidden_states=rows, dynamic_scale=garbage, **cumulative)]
    if laid_out.quantizes_activations:
        values, scale = torch.ops.npu.npu_dynamic_quant(rows)
        ways.append(call(hidden_states=values, dynamic_scale=scale, **cumulative))
    for way in ways:
        y = method.apply_gmm2(way, *method.apply_gmm1_act_quant(way))
        assert torch.equal(y[: COUNTS.sum()], expected)


@factory_needed
@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_rows_of_mx_experts(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sent in 16 bits, and quantized where they are multiplied."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    sizes = quantized_experts.Sizes(len(COUNTS), 256, 256, top_k=2)
    runner, _ = quantized_experts.load(sizes, scheme, torch.bfloat16)
    experts = runner.routed_experts.quant_method.experts
    method, way = method_of(experts), call()
    assert method.sent_as == "NONE"
    y = method.apply_gmm2(way, *method.apply_gmm1_act_quant(way))
    hidden, scale = experts.gate(way.hidden_states, None, COUNTS)
    expected = experts.down(hidden, scale, COUNTS)[: COUNTS.sum()]
    assert expected.isfinite().all() and expected.count_nonzero()
    assert torch.equal(y[: COUNTS.sum()], expected)


@factory_needed
@pytest.mark.parametrize("laid_out", ["w8a8-channel"], indirect=True)
def test_adapters_are_refused(laid_out: AscendExperts) -> None:
    method = method_of(laid_out)
    with pytest.raises(PlatformError, match="lora_context="):
        method.apply_gmm1_act_quant(call(lora_context=object()))
