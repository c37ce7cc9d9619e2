# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    ColumnParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
    AscendCTLinearMethod,
)

PREFIX = "model.layers.3.mlp.down_proj"

pytestmark = pytest.mark.usefixtures("single_rank")


def ints(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


def floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {**ints(bits, strategy, **more), "type": "float"}


W4 = ints(4, "group", group_size=128)
W8 = ints(8, "channel")
TOKEN = ints(8, "token", dynamic=True)


def config(
    weights: Any, inputs: Any = None, fmt: str = "pack-quantized", **more: Any
) -> AscendCTConfig:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    made = get_quantization_config("compressed-tensors").from_config(
        {"config_groups": {"group_0": group}, "format": fmt, **more}
    )
    assert type(made) is AscendCTConfig
    return made


def linear(quant_config: Any, k: int = 256, **more: Any) -> ReplicatedLinear:
    return ReplicatedLinear(
        k,
        64,
        params_dtype=torch.bfloat16,
        quant_config=quant_config,
        prefix=PREFIX,
        **more,
    )


def test_what_vllm_ascend_reads_off_any_config() -> None:
    made = config(W4)
    assert made.quant_description == {}
    assert made.enable_fa_quant is made.enable_c8_quant is False
    assert made.c8_quant_layers == made.kvcache_quant_layers == ()
    assert not hasattr(made, "get_kv_quant_dtype")
    layer = ReplicatedLinear(8, 8)
    method = made.get_quant_method(layer, PREFIX, tid2eid=None)
    assert isinstance(method, AscendCTLinearMethod)


def test_linear_method_is_what_vllm_ascend_expects() -> None:
    layer = linear(config(W8, TOKEN, "int-quantized"))
    # None there means "not quantized"; one object a layer, never shared.
    assert layer.quant_method.quant_method is layer.scheme
    assert type(layer.quant_method).__name__ in WEIGHT_LOADER_V2_SUPPORTED


def test_parameters_follow_a_layer_that_does_not_split() -> None:
    """vllm-ascend's constructors do not correct the rank as upstream's do."""
    layer = ColumnParallelLinear(256, 64, params_dtype=torch.bfloat16, disable_tp=True)
    layer.tp_rank, layer.tp_size = 5, 8
    made = config(W4)
    layer.scheme = made.get_scheme(layer, PREFIX)
    del layer.weight
    AscendCTLinearMethod(made).create_weights(
        layer,
        input_size_per_partition=256,
        output_partition_sizes=[64],
        input_size=256,
        output_size=64,
        params_dtype=torch.bfloat16,
        weight_loader=layer.weight_loader_v2,
    )
    assert layer.weight_packed.tp_rank == layer.weight_scale.tp_rank == 5
    assert layer.weight_packed.tp_size == layer.weight_scale.tp_size == 8


def test_ignored_and_unmatched_layers_stay_unquantized() -> None:
    ignored = linear(config(W4, ignore=[PREFIX]))
    assert type(ignored.quant_method) is UnquantizedLinearMethod
    made = config(W4)
    made.target_scheme_map = {"re:.*q_proj": made.target_scheme_map["Linear"]}
    assert type(linear(made).quant_method) is UnquantizedLinearMethod


REFUSED: dict[str, tuple[Any, ...]] = {
    # weights, activations, format -> what the message says
    "w3a16": (
        ints(3, "channel"),
        None,
        "pack-quantized",
        "uint3b4; supported: uint4b8",
    ),
    "w4a16-g16": (
        ints(4, "group", group_size=16),
        None,
        "pack-quantized",
        "group_size=16; supported: per channel, or a multiple of 32",
    ),
    "w4a8-packed": (W4, TOKEN, "pack-quantized", "CompressedTensorsWNA8Int has no"),
    "w4a8-int": (W4, TOKEN, "int-quantized", "CompressedTensorsW4A8Int has no NPU"),
    "w8a8-fp8": (
        floats(8, "channel"),
        floats(8, "token", dynamic=True),
        "float-quantized",
        "weights of type=float",
    ),
    "w4a4": (W4, ints(4, "token", dynamic=True), "int-quantized", "No compressed-ten"),
    "w8a8-group-weights": (
        ints(8, "group", group_size=128),
        TOKEN,
        "int-quantized",
        "No compressed-tensors compatible scheme",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    weights, inputs, fmt, message = REFUSED[name]
    with pytest.raises(UnsupportedCheckpointError) as error:
        linear(config(weights, inputs, fmt))
    text = str(error.value)
    for part in (message, f"layer {PREFIX}", "Supported: ", "Quantize the model again"):
        assert part in text


@pytest.mark.parametrize(("k", "n"), [(65536, 8), (8, 65536)])
def test_int8_layers_too_large_are_refused(k: int, n: int) -> None:
    """Before memory for their weights is asked for."""
    with pytest.raises(UnsupportedCheckpointError, match="inner axis of size 65536"):
        ReplicatedLinear(
            k,
            n,
            params_dtype=torch.bfloat16,
            quant_config=config(W8, TOKEN, "int-quantized"),
            prefix=PREFIX,
        )


@pytest.mark.parametrize(
    ("soc", "dtypes"),
    [("A2", [torch.float16, torch.bfloat16]), ("310P", [torch.float16])],
)
def test_model_dtypes(
    monkeypatch: pytest.MonkeyPatch, soc: str, dtypes: list[torch.dtype]
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    assert config(W4).get_supported_act_dtypes() == dtypes


def test_refusals_are_not_taken_for_an_unquantized_lm_head() -> None:
    """Upstream drops the ValueErrors of an lm_head and serves it unquantized."""
    assert not issubclass(UnsupportedCheckpointError, ValueError)


def test_bias_that_does_not_fit_names_the_layer() -> None:
    static = config(W8, ints(8, "tensor", dynamic=False), "int-quantized")
    layer = linear(static)
    for name, value in (("weight", 1), ("weight_scale", 1e-9), ("input_scale", 1e-9)):
        getattr(layer, name).data.fill_(value)
    layer.bias.data.fill_(100)
    with pytest.raises(UnsupportedCheckpointError, match=f"reaches .* .layer {PREFIX}"):
        layer.quant_method.process_weights_after_loading(layer)


def test_transforms_are_refused() -> None:
    transform = {
        "config_groups": {
            "R1": {
                "type": "hadamard",
                "apply": [{"targets": ["Linear"], "location": "weight_input"}],
            }
        }
    }
    with pytest.raises(UnsupportedCheckpointError, match=r"transform_config=\['R1'\]"):
        config(W4, transform_config=transform)


def test_empty_transform_config_is_none() -> None:
    assert config(W4, transform_config={}).transform_config is None


def test_kv_cache_scheme_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    with caplog.at_level("WARNING", logger="vllm.ascend_ct.quantization"):
        made = config(W4, kv_cache_scheme=scheme)
    assert made.kv_cache_scheme is None
    assert "kv_cache_scheme is not honoured" in caplog.text
