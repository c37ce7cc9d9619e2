# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Other code of vllm-ascend that reads a config, a method or a layer's weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)

from tests.formula import relative_error
from tests.layers.quantized_layers import (
    TOLERANCES,
    Case,
    activations,
    config_of,
    load,
)
from tests.layers.test_linear import CASES
from tools.checkpoints.make_checkpoint import SCHEMES
from vllm_ascend_ct.errors import UnsupportedCheckpointError

pytestmark = [pytest.mark.vllm_ascend, pytest.mark.usefixtures("vllm_config")]

BF16 = torch.bfloat16
HEADS, NOPE, VALUE, RANK = 4, 32, 16, 512
KINDS = ("w4a16-g32", "w8a16-channel", "w4a8-channel", "w8a8-channel-dynamic")


def projection(**kwargs: Any) -> Any:
    return ColumnParallelLinear(RANK, HEADS * (NOPE + VALUE), **kwargs)


def compressor(**kwargs: Any) -> Any:
    kwargs["prefix"] = "model.layers.0.attn.compressor.wkv"
    return ReplicatedLinear(RANK, 96, **kwargs)


KV_B_PROJ = Case("kv_b_proj", RANK, {"kv_b_proj": HEADS * (NOPE + VALUE)}, projection)
COMPRESSOR = Case("wkv", RANK, {"wkv": 96}, compressor)


def attention(kv_b_proj: Any) -> Any:
    """The part of an attention backend that its weights need."""
    return SimpleNamespace(
        kv_b_proj=kv_b_proj,
        kv_lora_rank=RANK,
        num_heads=HEADS,
        local_num_heads=HEADS,
        qk_nope_head_dim=NOPE,
        v_head_dim=VALUE,
        enable_mlapo=False,
        fa_quant_layer=False,
        layer_sharding_kwargs=None,
        enable_dsa_cp=False,
        enable_sfa_prolog_v3=False,
        enable_sparse_li_c8=False,
        has_indexer=False,
    )


@pytest.mark.parametrize("backend", ["mla", "sfa"])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "o8" not in s])
def test_latent_attention(scheme: str, backend: str) -> None:
    """It asserts that the method is an unquantized one."""
    from vllm_ascend.attention.mla_v1 import AscendMLAImpl
    from vllm_ascend.attention.sfa_v1 import AscendSFAImpl

    layer, (formula,) = load(KV_B_PROJ, scheme, BF16, bias=False)
    formula.input_args = None
    x = activations(7, RANK, BF16)
    assert relative_error(layer(x)[0], formula(x)) < TOLERANCES[BF16]
    impl = attention(layer)
    backends: dict[str, Any] = {"mla": AscendMLAImpl, "sfa": AscendSFAImpl}
    backends[backend].process_weights_after_loading(impl, BF16)
    keys, values = formula.weight.view(HEADS, NOPE + VALUE, RANK).split(
        [NOPE, VALUE], 1
    )
    assert relative_error(impl.W_UK_T, keys) < TOLERANCES[BF16]
    assert relative_error(impl.W_UV, values.transpose(1, 2)) < TOLERANCES[BF16]


@pytest.mark.parametrize("scheme", KINDS)
def test_compressors(scheme: str) -> None:
    """DeepSeek-V4 passes their weights to an operator."""
    layer, (formula,) = load(COMPRESSOR, scheme, BF16, bias=False)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert relative_error(layer.weight, formula.weight) < TOLERANCES[BF16]


@pytest.mark.parametrize("scheme", KINDS)
def test_weights_are_prefetched(
    scheme: str, vllm_config: Any, mocker: MockerFixture
) -> None:
    """Latent attention reads `o_proj.weight` even if nothing is prefetched."""
    from vllm_ascend import ascend_forward_context
    from vllm_ascend.ascend_config import WeightPrefetchConfig
    from vllm_ascend.ops import weight_prefetch

    prefetch = mocker.patch.object(torch.ops.vllm, "prefetch_preprocess")
    config = WeightPrefetchConfig({"enabled": True})
    method = weight_prefetch.WeightPrefetchMethod(config)
    layer, _ = load(CASES["row"], scheme, BF16, bias=False)
    x = activations(7, 640, BF16)
    method.maybe_prefetch_mla_or_sla_weight_in_current_stream(
        inputs=layer.weight, dependency=x, linear_layer=layer
    )
    block = SimpleNamespace(mlp=SimpleNamespace(gate_up_proj=layer, down_proj=layer))
    model = SimpleNamespace(model=SimpleNamespace(layers=[block]))
    method.mlp.is_active_this_forward = True
    with ascend_forward_context.set_ascend_forward_context(
        None, vllm_config, num_tokens=7, model_instance=model
    ):
        extra = ascend_forward_context._EXTRA_CTX
        extra.layer_idx = 0
        context = mocker.Mock()
        method._maybe_prefetch_mlp_gate_up_weight_preprocess(
            x, context, "model.layers.0.self_attn.o_proj"
        )
        method._maybe_prefetch_mlp_down_weight_preprocess(x, context)
    bits = SCHEMES[scheme].weights.num_bits
    assert prefetch.call_count == 3
    for call in prefetch.call_args_list:
        assert call.kwargs["weight"] is layer.weight
        assert call.kwargs["max_weight_size"] == 640 * 192 * bits // 8


@pytest.mark.parametrize("scheme", ["w8a8-channel-dynamic", "w8a8-channel-static"])
def test_its_fused_paths_are_not_taken(scheme: str) -> None:
    """They assume the layouts of its own methods."""
    from vllm_ascend.attention.dsa_v1 import _is_w8a8_dynamic
    from vllm_ascend.attention.sfa_v1 import AscendSFAImpl
    from vllm_ascend.ops.cv_linear import CVLinearWrapper

    layer, _ = load(CASES["replicated"], scheme, BF16, bias=False)
    assert layer.quant_method.quant_method is not None
    assert not _is_w8a8_dynamic(layer)
    assert not AscendSFAImpl._is_w8a8_dynamic_linear(layer)
    assert not CVLinearWrapper(layer)._is_w8a8_dynamic


def test_config(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.ascend_config import AscendConfig
    from vllm_ascend.compilation.passes import norm_quant_fusion_pass
    from vllm_ascend.quantization.utils import enable_fa_quant

    config = config_of("re:.*", "w4a16-g32")
    monkeypatch.setattr(vllm_config, "quant_config", config)
    made = AscendConfig(vllm_config)
    assert not made._sparse_li_c8_layer_filter_enabled
    assert not enable_fa_quant(vllm_config)
    assert not norm_quant_fusion_pass._model_uses_w4a4_quant(vllm_config)
    # With a rotated draft model it reads this, and catches one kind of error.
    with pytest.raises(KeyError):
        config.quant_description["optional"]
    # KV connectors read these without checking that they exist.
    assert config.enable_fa_quant is config.enable_c8_quant is False
    assert config.c8_quant_layers == config.kvcache_quant_layers == ()
    # If it is callable, tensors that it names bypass the model's loader.
    assert not hasattr(config, "get_cache_scale")


def build(name: str) -> Any:
    return ReplicatedLinear(
        RANK,
        96,
        params_dtype=BF16,
        quant_config=config_of("re:.*", "w8a8-channel-dynamic"),
        prefix=f"model.layers.0.attn.{name}",
    )


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("xlite_graph_config.enabled", True, "xlite_graph_config.enabled=True"),
        ("enable_matmul_allreduce", True, "enable_matmul_allreduce=True"),
        ("layer_sharding", ["o_proj"], r"layer_sharding=\['o_proj'\]"),
    ],
)
def test_settings_that_read_its_own_layouts(
    path: str, value: Any, reason: str, mocker: MockerFixture
) -> None:
    from tests.real_stack.ascend_layers import set_setting

    build("o_proj")
    set_setting(mocker, path, value)
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        build("o_proj")


def test_layers_that_are_put_together_of_ranks(mocker: MockerFixture) -> None:
    build("o_proj")
    mocker.patch("vllm_ascend.utils.enable_dsa_cp_with_o_proj_tp", return_value=True)
    build("q_b_proj")
    for name in ("o_proj", "wo_b"):
        with pytest.raises(UnsupportedCheckpointError, match="enable_dsa_cp=True"):
            build(name)
