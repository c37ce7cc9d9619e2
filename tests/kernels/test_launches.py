# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operator launches of a linear layer's forward, through upstream's layers."""

import pytest
import torch

from tests.layers.quantized_layers import activations, load, row_case
from tools.bench.launches import Launches
from vllm_ascend_ct import ascend_base

pytestmark = pytest.mark.usefixtures("single_rank")

ELEMENTWISE = ["aten._to_copy", "aten.addcmul", "aten.mul", "aten.mul"]
FAKE_QUANT = ["npu.npu_quantize", "aten.mul", "aten._to_copy"]
EXPECTED = {
    "w4a16-g128": ["npu.npu_weight_quant_batchmatmul"],
    "w4a16-g32-asym": ["npu.npu_weight_quant_batchmatmul"],
    "w8a16-channel": ["npu.npu_weight_quant_batchmatmul"],
    "w8a8-channel-dynamic": ["npu.npu_dynamic_quant", "npu.npu_quant_matmul"],
    "w8a8-tensor-dynamic": ["npu.npu_dynamic_quant", "npu.npu_quant_matmul"],
    "w8a8-channel-static": ["npu.npu_quantize", "npu.npu_quant_matmul"],
    "w3a16-g64": ["npu.npu_weight_quant_batchmatmul"],
    "w6a16-channel-asym": ["npu.npu_weight_quant_batchmatmul"],
    "w4a8-g128": ["npu.npu_weight_quant_batchmatmul"],
    # The bias is added by a separate operator.
    "w4a8-channel": ["npu.npu_dynamic_quant", "npu.npu_quant_matmul", "aten.add"],
    "w4a8-g256-packed": ["npu.npu_dynamic_quant", "npu.npu_quant_matmul", "aten.add"],
    "w8a8-channel-packed": ["npu.npu_dynamic_quant", "npu.npu_quant_matmul"],
    "w8a8o8-channel-int": [
        *FAKE_QUANT,
        "npu.npu_weight_quant_batchmatmul",
        *FAKE_QUANT,
    ],
    "w8a8-channel-static-asym": ["npu.npu_quantize", "npu.npu_quant_matmul"],
    # No operator takes per-token offsets: int32 output, corrected in fp32.
    "w8a8-channel-dynamic-asym": [
        "npu.npu_dynamic_quant_asymmetric",
        "npu.npu_quant_matmul",
        *ELEMENTWISE,
        "aten.add",
        "aten._to_copy",
    ],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", EXPECTED)
def test_launches(scheme: str, dtype: torch.dtype) -> None:
    layer, _ = load(row_case(512, 96), scheme, dtype, bias=True)
    x = activations(3, 512, dtype)
    with Launches() as launches:
        layer(x)
    expected = EXPECTED[scheme]
    if scheme.startswith("w8a8-") and ascend_base.fuses_norms(dtype):
        # The operator of vllm-ascend that its graph passes match.
        own = {"npu.npu_quantize": "vllm.quantize"}
        expected = [own.get(name, name) for name in expected]
    assert launches.names == expected


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_launches_of_float8(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    layer, _ = load(row_case(512, 96), "fp8-channel-dynamic", torch.bfloat16, bias)
    x = activations(3, 512, torch.bfloat16)
    with Launches() as launches:
        layer(x)
    products = ["npu.npu_dynamic_quant", "npu.npu_quant_matmul"]
    assert launches.names == products + ["aten.add"] * bias
