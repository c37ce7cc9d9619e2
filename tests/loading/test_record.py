# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layers that may lack tensors, or are loaded in other shards."""

from typing import Any

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from tests.layers.quantized_layers import FUSED, config_of
from vllm_ascend_ct.errors import UnsupportedCheckpointError

pytestmark = pytest.mark.usefixtures("single_rank")


def gate_up(load_format: str = "auto") -> Any:
    config = config_of("Linear", "w8a8-channel-dynamic")
    config.packed_modules_mapping = FUSED
    vllm_config = VllmConfig(load_config=LoadConfig(load_format=load_format))
    with set_current_vllm_config(vllm_config):
        return MergedColumnParallelLinear(
            64,
            [32, 32],
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=config,
            prefix="mlp.gate_up_proj",
        )


def process(layer: Any) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def load(layer: Any, rows: int, *shard: Any) -> None:
    tensors = {
        "weight": torch.ones(rows, 64, dtype=torch.int8),
        "weight_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
    }
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].weight_loader(parameters[name], tensor, *shard)


def test_nothing_given() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="weight is missing"):
        process(gate_up())


@pytest.mark.parametrize("load_format", ["dummy", "of_a_plugin"])
def test_filled_otherwise(load_format: str) -> None:
    """Some load formats fill parameters without their weight loaders."""
    layer = gate_up(load_format)
    layer.weight.data.fill_(1)
    layer.weight_scale.data.fill_(1)
    process(layer)


def test_nothing_given_by_a_loader_that_is_not_known() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="weight is missing"):
        process(gate_up("of_a_plugin"))


def test_one_shard_missing() -> None:
    layer = gate_up()
    load(layer, 32, 0)
    with pytest.raises(UnsupportedCheckpointError, match=r"missing for shards \[1\]"):
        process(layer)


def test_fused_on_disk() -> None:
    layer = gate_up()
    load(layer, 64)
    process(layer)


def test_each_load_is_checked() -> None:
    """A running engine loads other weights in this way."""
    layer = gate_up()
    load(layer, 32, 0)
    load(layer, 32, 1)
    layer.quant_method._record.check_complete()
    load(layer, 32, 1)
    with pytest.raises(UnsupportedCheckpointError, match=r"missing for shards \[0\]"):
        layer.quant_method._record.check_complete()
