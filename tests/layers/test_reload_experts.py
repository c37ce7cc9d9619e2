# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts' weights loaded into a model that serves."""

from types import SimpleNamespace

import pytest
import torch
from pytest_mock import MockerFixture
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.layers.quantized_experts import (
    SERVED,
    Sizes,
    build,
    compressed_experts,
    routing,
    run,
    tensors_of,
)
from tests.layers.quantized_layers import activations
from tools.make_checkpoint import FLOAT_SCHEMES

BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.mark.parametrize("scheme", SERVED)
def test_experts_are_those_of_the_new_weights(scheme: str) -> None:
    sizes = Sizes(4, hidden=256, intermediate=256, top_k=2)
    x, routed = activations(5, 256, BF16), routing(sizes, 5)
    (first, config, _), (second, _, _) = (
        compressed_experts(sizes, scheme, BF16) for _ in range(2)
    )
    outputs = []
    for tensors in (first, second):
        runner = build(sizes, config, BF16)
        model = torch.nn.Sequential(runner)
        record_metadata_for_reloading(model)
        list(runner.load_weights(tensors_of(tensors)))
        layer = runner.routed_experts
        layer.quant_method.process_weights_after_loading(layer)
        outputs.append(run(runner, x, routed))
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    initialize_layerwise_reload(model)
    list(runner.load_weights(tensors_of(first)))
    finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
    assert not torch.equal(*outputs)
    assert torch.equal(run(runner, x, routed), outputs[0])
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before


@pytest.mark.parametrize("scheme", FLOAT_SCHEMES)
def test_resolved_experts_have_the_new_weights(
    scheme: str, mocker: MockerFixture
) -> None:
    """But for what vLLM's CPU experts do with them, which a reload does not do."""
    mocker.patch.object(UnquantizedFusedMoEMethod, "process_weights_after_loading")
    sizes = Sizes(4, hidden=256, intermediate=256, top_k=2)
    (first, config, _), (second, _, _) = (
        compressed_experts(sizes, scheme, BF16) for _ in range(2)
    )
    weights = []
    for tensors in (first, second):
        runner = build(sizes, config, BF16)
        model = torch.nn.Sequential(runner)
        record_metadata_for_reloading(model)
        list(runner.load_weights(tensors_of(tensors)))
        layer = runner.routed_experts
        layer.quant_method.process_weights_after_loading(layer)
        weights.append({n: p.clone() for n, p in layer.named_parameters()})
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    initialize_layerwise_reload(model)
    list(runner.load_weights(tensors_of(first)))
    finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
    assert before.keys() == weights[0].keys() == {"w13_weight", "w2_weight"}
    for name, parameter in layer.named_parameters():
        assert parameter.data_ptr() == before[name]
        assert not torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(parameter, weights[0][name])
