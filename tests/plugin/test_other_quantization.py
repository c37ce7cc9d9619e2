# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Models of other quantization methods."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform

from tests.kernels.test_selection import mp_config
from tests.loading import models
from vllm_ascend_ct.errors import PlatformError, Remedy, UnsupportedCheckpointError
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "sym": True},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}

pytestmark = pytest.mark.usefixtures("single_rank")


def checkpoint(path: Path, quantization: dict[str, Any] | None) -> Path:
    models.make(path, "qwen3", [])
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_refused_when_the_engine_is_configured(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path / "checkpoint", OTHERS[name])
    with pytest.raises(PlatformError) as error:
        models.config_of(path)
    text = str(error.value)
    assert "quantization=" in text and name in text
    assert "Supported: compressed-tensors" in text
    assert Remedy.WITHOUT_PLUGIN in text


def test_online_quantization_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint", None)
    with pytest.raises(PlatformError, match="quantization=fp8"):
        models.config_of(path, quantization="fp8")


def test_the_platform_lists_what_it_serves() -> None:
    assert current_platform.supported_quantization == ["compressed-tensors"]


def test_unquantized_models_are_served(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint", None)
    model: Any = models.load(path)
    method = model.model.layers[0].mlp.down_proj.quant_method
    assert type(method) is UnquantizedLinearMethod


def test_an_unquantized_model_that_is_said_to_be_quantized(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint", None)
    with pytest.raises(UnsupportedCheckpointError) as error:
        models.config_of(path, quantization="compressed-tensors")
    text = str(error.value)
    assert "not quantized by compressed-tensors" in text and "config.json" in text
    assert Remedy.NO_QUANTIZATION in text and "\n" not in text


def gptq() -> Any:
    config_class = get_quantization_config("gptq")
    # Without names of layers, vLLM 0.31 quantizes none.
    named = {"lm_head": False, "modules_in_block_to_quantize": [["layer"]]}
    return config_class.from_config(OTHERS["gptq"] | named)


@pytest.fixture
def vllm_config() -> VllmConfig:
    """Config of a model whose quantization method the platform accepts."""
    vllm_config = VllmConfig()
    vllm_config.quant_config = gptq()
    return vllm_config


@pytest.mark.parametrize(
    "kernel",
    [AscendWNA16LinearKernel, AscendWNA8LinearKernel, AscendInt8ScaledMMLinearKernel],
)
def test_kernels_take_no_other_layout(vllm_config: VllmConfig, kernel: Any) -> None:
    with set_current_vllm_config(vllm_config):
        can_implement, reason = kernel.can_implement(mp_config())
    assert not can_implement
    assert reason is not None and "supported: compressed-tensors" in reason


def test_a_layer_of_another_layout_finds_no_kernel(vllm_config: VllmConfig) -> None:
    with set_current_vllm_config(vllm_config), pytest.raises(ValueError) as error:
        ReplicatedLinear(
            256,
            64,
            params_dtype=torch.bfloat16,
            quant_config=vllm_config.quant_config,
            prefix="layer",
        )
    assert "AscendWNA16LinearKernel cannot implement" in str(error.value)


@pytest.mark.parametrize("kernel", [AscendWNA16LinearKernel, AscendWNA8LinearKernel])
def test_kernels_take_no_parameters_of_others(kernel: Any) -> None:
    """Also without an engine's config that tells the method."""
    config: MPLinearLayerConfig = mp_config()
    with pytest.raises(ValueError, match="does not support `qweight`"):
        kernel(config, "qweight", "scales", "qzeros")
