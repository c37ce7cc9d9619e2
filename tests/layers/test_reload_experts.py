# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Reloading the weights of experts in a model that is serving.

Before, all but buffers is lost, as after a sleep of level 2.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.layers.discarding import discard
from tests.layers.quantized_experts import (
    SERVED,
    Sizes,
    build,
    compressed_experts,
    routing,
    run,
    tensors_of,
)
from tests.layers.quantized_layers import MULTIPLIED_EXPERTS, activations
from tools.checkpoints.make_checkpoint import FLOAT_SCHEMES
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import shared_zeros

BF16 = torch.bfloat16

SIZES = Sizes(4, hidden=256, intermediate=256, top_k=2)

pytestmark = pytest.mark.usefixtures("single_rank")


def loaded(config: Any, tensors: torch.nn.ModuleDict) -> tuple[Any, torch.nn.Module]:
    """Build and load experts; returns the runner, and the model for a reload."""
    runner = build(SIZES, config, BF16)
    model = torch.nn.Sequential(runner)
    record_metadata_for_reloading(model)
    list(runner.load_weights(tensors_of(tensors)))
    layer = runner.routed_experts
    layer.quant_method.process_weights_after_loading(layer)
    return runner, model


def reload(runner: Any, model: torch.nn.Module, tensors: torch.nn.ModuleDict) -> None:
    initialize_layerwise_reload(model)
    list(runner.load_weights(tensors_of(tensors)))
    finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))


@pytest.mark.parametrize(
    ("scheme", "soc"),
    [
        *((scheme, "A2") for scheme in SERVED),
        *((scheme, "A5") for scheme in MULTIPLIED_EXPERTS),
    ],
)
def test_experts_are_those_of_the_new_weights(
    scheme: str, soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    x, routed = activations(5, 256, BF16), routing(SIZES, 5)
    (first, config, _), (second, _, _) = (
        compressed_experts(SIZES, scheme, BF16) for _ in range(2)
    )
    outputs = []
    for tensors in (first, second):
        runner, model = loaded(config, tensors)
        layer = runner.routed_experts
        outputs.append(run(runner, x, routed))
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    discard(model)
    reload(runner, model, first)
    assert not torch.equal(*outputs)
    assert torch.equal(run(runner, x, routed), outputs[0])
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before


@pytest.mark.parametrize("scheme", FLOAT_SCHEMES)
def test_resolved_experts_have_the_new_weights(
    scheme: str, mocker: MockerFixture
) -> None:
    """A reload does not repeat the processing of vLLM's CPU experts."""
    mocker.patch.object(UnquantizedFusedMoEMethod, "process_weights_after_loading")
    (first, config, _), (second, _, _) = (
        compressed_experts(SIZES, scheme, BF16) for _ in range(2)
    )
    weights = []
    for tensors in (first, second):
        runner, model = loaded(config, tensors)
        layer = runner.routed_experts
        weights.append({n: p.clone() for n, p in layer.named_parameters()})
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    discard(model)
    reload(runner, model, first)
    assert before.keys() == weights[0].keys() == {"w13_weight", "w2_weight"}
    for name, parameter in layer.named_parameters():
        assert parameter.data_ptr() == before[name]
        assert not torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(parameter, weights[0][name])


def test_shared_zeros_survive_a_sleep() -> None:
    """Of memory that two models share, a sleep restores what one of them covers."""
    large, small = torch.ones(64), torch.ones(8)
    shared_zeros(large)
    model = torch.nn.Module()
    model.register_buffer("zero_offset", shared_zeros(small))
    discard(model)
    assert not shared_zeros(large).any()
