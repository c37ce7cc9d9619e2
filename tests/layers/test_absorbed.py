# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The projection whose weight latent attention reads."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    get_and_maybe_dequant_weights,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.formula import relative_error
from tests.layers.quantized_layers import (
    TOLERANCES,
    Case,
    activations,
    compressed_modules,
    config_of,
    load,
    load_tensors,
)
from tools.checkpoints.make_checkpoint import SCHEMES, compress
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.dequantized_linear_method import (
    AscendCTDequantizedLinearMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)

K, N = 512, 96


def projection(**kwargs: Any) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(K, N, **kwargs)
    # As in vLLM's attention layer; otherwise the weight goes to a CPU library.
    layer._cpu_skip_gemm_dispatch = True
    # Its name up to vLLM 0.30.
    layer.skip_weight_relayout = True
    return layer


CASE = Case("kv_b_proj", K, {"kv_b_proj": N}, projection)
SERVED = [scheme for scheme in SCHEMES if "o8" not in scheme]
BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SERVED)
def test_weight_is_the_formula(scheme: str, dtype: torch.dtype) -> None:
    layer, (formula,) = load(CASE, scheme, dtype, bias=False)
    assert type(layer.quant_method) is AscendCTDequantizedLinearMethod
    # The latent attention of vLLM and that of vllm-ascend look for this.
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    weight = get_and_maybe_dequant_weights(layer, out_dtype=dtype)
    assert layer.weight.dtype == dtype and [*layer._parameters] == ["bias", "weight"]
    assert relative_error(weight, formula.weight) < TOLERANCES[dtype]
    formula.input_args = None
    x = activations(20, K, dtype)
    assert relative_error(layer(x)[0], formula(x)) < TOLERANCES[dtype]


@pytest.mark.parametrize("scheme", ["w3a16-channel", "w4a16-g32-asym", "w4a8-channel"])
def test_reload(scheme: str) -> None:
    tensors = [compressed_modules(CASE, scheme, BF16, bias=False) for _ in range(2)]
    layer = CASE.build(
        bias=False,
        params_dtype=BF16,
        quant_config=config_of("re:.*", scheme),
        prefix="kv_b_proj",
    )
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    for modules in tensors:
        compress(modules)
    load_tensors(CASE, layer, tensors[0])
    layer.quant_method.process_weights_after_loading(layer)
    first, address = layer.weight.clone(), layer.weight.data_ptr()
    for modules in reversed(tensors):
        initialize_layerwise_reload(model)
        load_tensors(CASE, layer, modules)
        finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
        assert layer.weight.data_ptr() == address
        assert torch.equal(layer.weight, first) is (modules is tensors[0])


def build(scheme: str, prefix: str = "model.layers.0.self_attn.kv_b_proj") -> Any:
    config = config_of("re:.*", scheme)
    return CASE.build(bias=False, params_dtype=BF16, quant_config=config, prefix=prefix)


def test_incomplete_checkpoints_are_refused() -> None:
    layer = build("w4a16-g32")
    with pytest.raises(UnsupportedCheckpointError, match="weight_packed is missing"):
        layer.quant_method.process_weights_after_loading(layer)


def test_quantized_outputs_are_refused() -> None:
    (scheme,) = [name for name in SCHEMES if "o8" in name][:1]
    with pytest.raises(
        UnsupportedCheckpointError, match="whose weight attention reads"
    ):
        build(scheme)


def test_other_layers_stay_quantized() -> None:
    layer = build("w4a16-g32", "model.layers.0.self_attn.q_b_proj")
    assert type(layer.quant_method) is AscendCTLinearMethod


def test_a_weight_that_an_operator_reads_is_refused() -> None:
    """A layer of DeepSeek-V4, whose attention passes the weight to an operator."""
    with pytest.raises(UnsupportedCheckpointError, match="passes to an operator"):
        build("w4a16-g32", "model.layers.0.attn.wo_a")
