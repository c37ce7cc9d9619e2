# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checkpoints with KV cache scales."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from tests.loading import models
from vllm_ascend_ct.ascend_base import kv_cache
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors import compressed_tensors
from vllm_ascend_ct.quantization.compressed_tensors.kv_cache import (
    SCALE_NAMES,
    is_int8,
)

pytestmark = pytest.mark.usefixtures("single_rank")

on_npu = pytest.mark.skipif(
    current_platform.device_type != "npu",
    reason="vllm-ascend stores the int8 KV cache",
)
HEADS = {"tensor": [1], "attn_head": [2, 1, 1]}
# Names of LLM Compressor and of other tools.
NAMES = {
    "attention": ("self_attn.k_scale", "self_attn.v_scale"),
    "projections": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
}


def with_scales(
    path: Path,
    names: tuple[str, ...],
    strategy: str,
    where: str = "scheme",
    kind: str = "float",
    value: float = 0.5,
) -> None:
    """Add KV cache scales to a checkpoint, with their scheme."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for number in (0, 1):
        for name in names:
            scale = torch.full(HEADS[strategy], value)
            scale[-1] *= 2
            tensors[f"model.layers.{number}.{name}"] = scale
        if where == "group":
            zero = torch.zeros(HEADS[strategy])
            tensors[f"model.layers.{number}.self_attn.k_zero_point"] = zero
            tensors[f"model.layers.{number}.self_attn.q_scale"] = zero + 1
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    quantization = config["quantization_config"]
    scheme = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
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
            assert module._k_scale_float == module._v_scale_float == 1


def with_int8_scales(
    path: Path, strategy: str, names: tuple[str, ...], value: float = 0.5
) -> Path:
    linears = models.linears("qwen3-128")
    quantized = models.matching([r"self_attn\.o_proj$"], linears)
    models.make(path, "qwen3-128", quantized, ["re:.*self_attn.o_proj$"])
    with_scales(path, names, strategy, kind="int", value=value)
    return path


@pytest.mark.parametrize("strategy", HEADS)
@pytest.mark.parametrize("names", NAMES)
def test_int8_scales(tmp_path: Path, names: str, strategy: str) -> None:
    """vllm-ascend gets one for each channel; emulated, the cache is unquantized."""
    path = with_int8_scales(tmp_path / "checkpoint", strategy, NAMES[names])
    layers = [x for x in models.load(path).modules() if isinstance(x, Attention)]
    assert len(layers) == 2
    for layer in layers:
        if current_platform.device_type != "npu":
            assert layer.kv_cache_torch_dtype == torch.bfloat16
            continue
        assert layer.kv_cache_torch_dtype == torch.int8
        assert layer.impl.enable_c8_quant
        expected = torch.tensor([0.5, 1] if strategy == "attn_head" else [1, 1])
        for name in ("k_cache_scale", "v_cache_scale"):
            scale = getattr(layer, name)
            assert scale.dtype == torch.bfloat16
            assert torch.equal(
                scale.view(2, 128).float(), expected[:, None].expand(2, 128)
            )


@on_npu
@pytest.mark.parametrize(
    ("names", "value", "what"),
    [
        (("self_attn.k_scale",), 0.5, "is missing .*v_scale"),
        (NAMES["attention"], 0.0, "is not a positive number .*k_scale"),
        (NAMES["attention"], -1.0, "is not a positive number .*k_scale"),
        (NAMES["attention"], float("inf"), "is not a positive number .*k_scale"),
    ],
)
def test_wrong_int8_scales(
    tmp_path: Path, names: tuple[str, ...], value: float, what: str
) -> None:
    path = with_int8_scales(tmp_path / "checkpoint", "tensor", names, value)
    with pytest.raises(UnsupportedCheckpointError, match=what) as refusal:
        models.load(path)
    assert "layer model.layers.0.self_attn.attn" in str(refusal.value)
    assert "--kv-cache-dtype bfloat16" in str(refusal.value)
    models.load(path, kv_cache_dtype="bfloat16")


@on_npu
def test_another_number_of_int8_scales(tmp_path: Path) -> None:
    path = with_int8_scales(tmp_path / "checkpoint", "attn_head", NAMES["attention"])
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "tensor"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpointError, match="has 2 values"):
        models.load(path)


@on_npu
@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        ("qwen3-128", {}, None),
        ("qwen3-128", {"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16"),
        ("qwen3-128", {"dtype": "float16"}, "dtype=torch.float16"),
        ("qwen3", {}, "head_size=32"),
        ("deepseek-v3", {}, "latent attention"),
    ],
)
def test_what_an_int8_cache_needs(
    tmp_path: Path, model: str, arguments: dict[str, Any], reason: str | None
) -> None:
    quantized = models.matching([r"self_attn\.o_proj$"], models.linears(model))
    path = models.make(
        tmp_path / "checkpoint", model, quantized, ["re:.*self_attn.o_proj$"]
    )
    with_scales(path, NAMES["attention"], "tensor", kind="int")
    config = models.config_of(path, **arguments)
    assert kv_cache.refusal(config) == reason
    quantization: Any = config.quant_config
    with set_current_vllm_config(config):
        assert quantization.enable_c8_quant == (reason is None)
        # vllm-ascend changes some sizes that are asked for.
        config.cache_config.block_size = 64
        assert not quantization.enable_c8_quant


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"strategy": "attn_head"}, True),
        ({"strategy": "token"}, False),
        ({"type": "float"}, False),
        ({"num_bits": 4}, False),
        ({"symmetric": False}, False),
        ({"dynamic": True}, False),
    ],
)
def test_schemes_for_int8(changes: dict[str, Any], expected: bool) -> None:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
    assert is_int8(scheme | changes) == expected
    assert not is_int8(None)


@pytest.mark.parametrize(
    "name", ["k_scale", "attn.k_scale", "k_proj.k_scale", "qkv_proj.k_scale"]
)
def test_names_of_scales(name: str) -> None:
    names = [f"model.layers.0.self_attn.{name}", "a.q_scale", "a.k_zero_point"]
    assert SCALE_NAMES.apply_list(names) == [
        "model.layers.0.self_attn.attn.k_cache_scale"
    ]


@pytest.mark.parametrize(
    ("total", "ranks", "expected"),
    [
        (4, 1, [[1, 2, 3, 4]]),
        (4, 2, [[1, 2], [3, 4]]),
        (2, 4, [[1], [1], [2], [2]]),
    ],
)
def test_scales_of_a_ranks_heads(
    total: int, ranks: int, expected: list[list[int]]
) -> None:
    layer = SimpleNamespace(num_kv_heads=max(1, total // ranks), head_size=3)
    scales = torch.arange(1, total + 1).view(-1, 1, 1)
    for rank, heads in enumerate(expected):
        found = kv_cache.scales_per_channel(scales, layer, total, rank, ranks)
        assert found.view(-1, 3).tolist() == [[head] * 3 for head in heads]
        one = kv_cache.scales_per_channel(torch.tensor([7]), layer, total, rank, ranks)
        assert one.tolist() == [7] * len(heads) * 3
