# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checkpoints with KV cache scales; the KV cache stays unquantized."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from tests.loading import models
from vllm_ascend_ct.quantization.compressed_tensors import compressed_tensors

pytestmark = pytest.mark.usefixtures("single_rank")

HEADS = {"tensor": [1], "attn_head": [2, 1, 1]}
# Names of LLM Compressor and of other tools.
NAMES = {
    "attention": ("self_attn.k_scale", "self_attn.v_scale"),
    "projections": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
}


def with_scales(path: Path, names: tuple[str, ...], strategy: str, where: str) -> None:
    """Add KV cache scales to a checkpoint, with their scheme."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for number in (0, 1):
        for name in names:
            shape = HEADS[strategy]
            tensors[f"model.layers.{number}.{name}"] = torch.full(shape, 0.5)
        if where == "group":
            zero = torch.zeros(HEADS[strategy])
            tensors[f"model.layers.{number}.self_attn.k_zero_point"] = zero
            tensors[f"model.layers.{number}.self_attn.q_scale"] = zero + 1
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    quantization = config["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if where == "group":
        group = {"targets": ["Qwen3Attention"], "input_activations": scheme}
        quantization["config_groups"]["group_1"] = group
    else:
        quantization["kv_cache_scheme"] = {**scheme, "dynamic": False}
    (path / "config.json").write_text(json.dumps(config))


def load(path: Path, model: str, names: str, strategy: str, where: str) -> Any:
    linears = models.linears(model)
    quantized = models.matching([r"self_attn\.o_proj$"], linears)
    models.make(path, model, quantized, ["re:.*self_attn.o_proj$"])
    with_scales(path, NAMES[names], strategy, where)
    return models.load(path)


@pytest.mark.parametrize("where", ["scheme", "group"])
@pytest.mark.parametrize("strategy", HEADS)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("model", ["qwen3", "qwen3-moe", "deepseek-v3"])
def test_scales_are_not_used(
    tmp_path: Path,
    mocker: MockerFixture,
    model: str,
    names: str,
    strategy: str,
    where: str,
) -> None:
    if model == "deepseek-v3" and current_platform.device_type == "npu":
        pytest.skip("vllm-ascend registers its latent attention in workers only")
    warning_once = mocker.patch.object(compressed_tensors.logger, "warning_once")
    loaded = load(tmp_path / "checkpoint", model, names, strategy, where)
    said = [c for c in warning_once.call_args_list if "kv_cache_scheme" in c.args[0]]
    assert len(said) == (where == "scheme")
    for module in loaded.modules():
        if isinstance(module, Attention):
            assert module.kv_cache_dtype == "auto"
            if strategy == "attn_head":
                assert float(module._k_scale) == float(module._v_scale) == 1
