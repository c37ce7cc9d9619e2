# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from vllm_ascend_ct.ops.emulated.graph_pass import SOCS, InlineDynamicQuant
from vllm_ascend_ct.ops.soc import Soc


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = torch.ops.npu.npu_dynamic_quant(x + 1)
    return q, scale * 2


def compiled(x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], str]:
    """Results of the compiled function, and the code that inductor wrote."""
    torch.compiler.reset()
    options = {"post_grad_custom_pre_pass": InlineDynamicQuant()}
    run = torch.compile(quantize, options=options, dynamic=True, fullgraph=True)
    results, (code, *_) = run_and_get_code(run, x)
    return results, code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soc", SOCS)
def test_equals_the_operator(
    dtype: torch.dtype, soc: Soc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the operator that makes the rows is fused with it."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc.value)
    torch.manual_seed(0)
    magnitudes = torch.logspace(-6, 4, 33).unsqueeze(1)
    x = (torch.randn(33, 200) * magnitudes - 1).to(dtype)
    x[3] = -1
    results, code = compiled(x)
    for result, expected in zip(results, quantize(x)):
        assert torch.equal(result, expected)
    assert "torch.ops.npu" not in code


@pytest.mark.parametrize("soc", sorted(set(Soc) - set(SOCS), key=str))
def test_leaves_chips_that_round_otherwise(
    soc: Soc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc.value)
    results, code = compiled(torch.randn(3, 64).half())
    assert "torch.ops.npu.npu_dynamic_quant" in code


def test_caches_know_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    for soc in Soc:
        monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc.value)
        ids.add(InlineDynamicQuant().uuid())
    assert len(ids) == len(Soc)
