# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's engine on software NPUs that are Ascend 950 (A5).

A5 multiplies FP8 and MX formats as they are. Runs on each supported release.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run
from tests.soft_npu.test_engine import in_turn
from tools.bench.side_by_side import as_mixed
from tools.soft_npu import suite
from vllm_ascend_ct.ops.dtypes import E2M1

pytestmark = pytest.mark.soft_npu
CHIP = "A5"
# Each layer of the models has four linear layers, or two beside experts.
LAYERS, DENSE, EXPERTS = 2, 4, 2
QUANTIZE, MX_QUANTIZE = "npu::npu_dynamic_quant", "npu::npu_dynamic_mx_quant"
MULTIPLY, WEIGHT_ONLY = "npu::npu_quant_matmul", "npu::npu_weight_quant_batchmatmul"
GROUPED, GATE = "npu::npu_grouped_matmul", "npu::npu_grouped_matmul_swiglu_quant_v2"
# With graphs, norms that quantize.
FUSED = {
    "npu::npu_rms_norm_dynamic_mx_quant": MX_QUANTIZE,
    "npu::npu_add_rms_norm_dynamic_mx_quant": MX_QUANTIZE,
    "npu::npu_add_rms_norm_dynamic_quant": QUANTIZE,
}
EMBEDDING = "aten::embedding"


WNA16, INT8, FP8, MX8, MX4 = (
    f"Ascend{name}LinearKernel"
    for name in ("WNA16", "Int8ScaledMM", "FP8ScaledMM", "Mxfp8", "Mxfp4")
)
IS_030 = os.environ.get("SOFT_NPU_RELEASE", "").startswith("0.30.")


class Served(NamedTuple):
    """How a checkpoint is served.

    Attributes:
        kernels: Classes of the linear layers' kernels.
        calls: Number of calls of each operator that quantizes or multiplies, in a layer
            of the model.
        tolerance: Mean difference of log-probabilities from float32.
        resolved: Whether there are layers of which 16-bit weights are made.

    """

    kernels: list[str]
    calls: dict[str, float]
    tolerance: float
    resolved: bool = False


def quantized(kernel: str, operator: str, tolerance: float) -> Served:
    """A dense model whose activations are quantized."""
    return Served([kernel], {operator: DENSE, MULTIPLY: DENSE}, tolerance)


def latent_attention() -> Served:
    """Latent attention, and experts in one of two layers; `kv_b_proj` is resolved."""
    calls = {QUANTIZE: 5.0, MULTIPLY: 5.0, GROUPED: 1.0}
    if IS_030:
        calls |= {QUANTIZE: 5.5, GROUPED: 0.5, GATE: 0.5}
    return Served([FP8], calls, 0.12, resolved=True)


def experts(operator: str, tolerance: float) -> Served:
    """Experts beside W4A16 attention; with 0.23 they are resolved."""
    if not IS_030:
        calls = {WEIGHT_ONLY: EXPERTS, GROUPED: 2}
        return Served([WNA16], calls, tolerance, resolved=True)
    calls = {operator: 1, WEIGHT_ONLY: EXPERTS, GATE: 1, GROUPED: 1}
    return Served([WNA16], calls, tolerance)


# Tolerances are those of tests/engine, where operators are emulated below vLLM's CPU
# platform. The references of FP8, MXFP8 and MXFP4 dense models round activations.
SERVED = {
    "dense/fp8-channel-dynamic": quantized(FP8, QUANTIZE, 0.035),
    "dense/mxfp8": quantized(MX8, MX_QUANTIZE, 0.04),
    "dense/mxfp4": quantized(MX4, MX_QUANTIZE, 0.12),
    "dense/fp8-block": Served([], {}, 0.015, resolved=True),
    "dense/nvfp4": Served([], {}, 0.015, resolved=True),
    "dense-w4a16": Served([WNA16], {WEIGHT_ONLY: DENSE}, 0.015),
    "dense-w8a8": quantized(INT8, QUANTIZE, 0.04),
    "qwen3-moe/w4a16-g128+fp8-channel-dynamic": experts(QUANTIZE, 0.08),
    "qwen3-moe/w4a16-g128+mxfp8": experts(MX_QUANTIZE, 0.08),
    "qwen3-moe/w4a16-g128+mxfp4": experts(MX_QUANTIZE, 0.2),
    # The reference does not round activations.
    "deepseek-v2/fp8-channel-dynamic": latent_attention(),
    "moe-w4a16": Served([WNA16], {WEIGHT_ONLY: EXPERTS, GROUPED: 2}, 0.03),
    # With 0.23 the activations of experts stay in 16 bits.
    "moe-w8a8": Served(
        [INT8],
        {QUANTIZE: EXPERTS + 2 * IS_030, MULTIPLY: EXPERTS, GROUPED: 2},
        0.08,
    ),
}


def eager(*names: str) -> list[Run]:
    return [{"checkpoint": name, **SMALL, **EAGER} for name in names]


def graphs(name: str) -> list[Run]:
    """vllm-ascend 0.23 compiles one model per process."""
    return [{"checkpoint": name, **SMALL}]


PROCESSES = {
    "usual": eager("dense/fp8-channel-dynamic", "dense/mxfp8"),
    "dense": eager("dense/mxfp4", "dense/fp8-block", "dense/nvfp4"),
    "integers": eager("dense-w4a16", "dense-w8a8"),
    "float experts": eager(*(x for x in SERVED if x.startswith("qwen3-moe/"))),
    "int experts": eager("moe-w4a16", "moe-w8a8"),
    "latent attention": eager("deepseek-v2/fp8-channel-dynamic"),
    "fp8 graphs": graphs("dense/fp8-channel-dynamic"),
    "mxfp8 graphs": graphs("dense/mxfp8"),
    "mxfp4 graphs": graphs("dense/mxfp4"),
    "int graphs": graphs("dense-w8a8"),
    "fp8 expert graphs": graphs("qwen3-moe/w4a16-g128+fp8-channel-dynamic"),
    "mxfp8 expert graphs": graphs("qwen3-moe/w4a16-g128+mxfp8"),
}
USUAL = ["usual"]
FP8_EXPERTS = "qwen3-moe/w4a16-g128+fp8-channel-dynamic"
TWO_RANKS = ("dense/fp8-channel-dynamic", "dense/mxfp8", "dense/mxfp4", FP8_EXPERTS)
Serve = Callable[..., list[Result]]


def calls_in_a_layer(rank: dict[str, Any]) -> dict[str, float]:
    """Of operators that quantize or multiply; each forward embeds once."""
    calls: Counter[str] = Counter()
    for name, count in rank["operators"].items():
        calls[FUSED.get(name, name.removesuffix(".out"))] += count
    operators = (QUANTIZE, MX_QUANTIZE, MULTIPLY, WEIGHT_ONLY, GATE, GROUPED)
    layers = calls[EMBEDDING] * LAYERS
    return {name: calls[name] / layers for name in operators if calls[name]}


def check_served(run: Run, result: Result) -> None:
    engines.check_in_charge(run, result)
    expected = SERVED[run["checkpoint"]]
    for rank in result["ranks"]:
        assert rank["kernels"] == expected.kernels
        assert bool(rank["resolved"]) == expected.resolved
        assert calls_in_a_layer(rank) == expected.calls


def check_close(run: Run, result: Result) -> None:
    name = run["checkpoint"]
    found = engines.difference(name, result["logprobs"], suite.is_rounded(name))
    print(f"{name} {run}: {found:.4f}")
    assert found < SERVED[name].tolerance


@pytest.mark.parametrize("process", in_turn([*PROCESSES], USUAL))
def test_served(serve: Serve, process: str) -> None:
    runs = PROCESSES[process]
    for run, result in zip(runs, serve(runs, chip=CHIP), strict=True):
        check_served(run, result)


@pytest.mark.parametrize("process", in_turn([*PROCESSES], USUAL))
def test_close_to_float32(serve: Serve, process: str) -> None:
    runs = PROCESSES[process]
    for run, result in zip(runs, serve(runs, chip=CHIP), strict=True):
        check_close(run, result)


@pytest.mark.long
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(serve: Serve, name: str) -> None:
    run = {"checkpoint": name, "tensor_parallel_size": 2, **SMALL, **EAGER}
    (result,) = serve([run], chip=CHIP)
    check_served(run, result)
    check_close(run, result)


def check_own(theirs: Result) -> None:
    """Check that vllm-ascend's own config serves."""
    assert [rank["platform"] for rank in theirs["ranks"]] == ["NPUPlatform"]
    assert theirs["config"].startswith("vllm_ascend.")


DENSE_FP8, MOE_FP8 = (f"{x}/fp8-channel-dynamic" for x in ("dense", "qwen3-moe"))
OWN_FP8 = {"eager": (DENSE_FP8, EAGER)}
if IS_030:
    # With graphs, 0.23 quantizes to int8 what it multiplies in FP8, and its config has
    # no FP8 experts.
    OWN_FP8 |= {"graphs": (DENSE_FP8, {}), "experts": (MOE_FP8, EAGER)}


@pytest.mark.long
@pytest.mark.parametrize(("checkpoint", "options"), OWN_FP8.values(), ids=OWN_FP8)
def test_fp8_is_bit_equal_to_vllm_ascends_own(
    serve: Serve, checkpoint: str, options: dict[str, bool]
) -> None:
    runs = [{"checkpoint": checkpoint, **SMALL, **options}]
    (ours,), (theirs,) = (
        serve(runs, plugins=plugins, chip=CHIP) for plugins in ("ascend_ct", "ascend")
    )
    check_own(theirs)
    assert theirs["logprobs"] == ours["logprobs"]
    assert theirs["tokens"] == ours["tokens"]
    calls, own = (Counter(x["ranks"][0]["operators"]) for x in (ours, theirs))
    assert not calls - own, f"called more often than by vllm-ascend: {calls - own}"


@pytest.mark.long
@pytest.mark.skipif(not IS_030, reason="its config reads no MX formats")
@pytest.mark.parametrize("name", ["dense/mxfp8", "dense/mxfp4"])
def test_mx_beside_vllm_ascends_own(serve: Serve, tmp_path: Path, name: str) -> None:
    """It reads MX activations of checkpoints of mixed formats only.

    Of MXFP4 it rounds halves away from zero, and this package to even.
    """
    suite.prepare([name])
    checkpoint = as_mixed(suite.checkpoint(name), tmp_path)
    runs = [{"checkpoint": str(checkpoint), **SMALL, **EAGER}]
    ours, theirs = (
        engines.run(runs, tmp_path / f"{plugins}.json", plugins, CHIP)[0]
        for plugins in ("ascend_ct", "ascend")
    )
    check_own(theirs)
    engines.check_in_charge(runs[0], ours)
    assert (ours["logprobs"] == theirs["logprobs"]) == (name == "dense/mxfp8")
    for result in (ours, theirs):
        assert calls_in_a_layer(result) == SERVED[name].calls
        found = engines.difference(name, result["logprobs"], rounded=True)
        print(f"{name} {result['config']}: {found:.4f}")
        assert found < SERVED[name].tolerance


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, E2M1], ids=["fp8", "fp4"])
def test_norms_that_quantize(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """As the two operators which they replace; a sum that 16 bits hold."""
    import torch_npu

    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", CHIP)
    torch.manual_seed(0)
    x1, x2 = (torch.randint(-9, 9, (5, 96)).bfloat16().npu() for _ in range(2))
    gamma = torch.rand(96).bfloat16().npu()
    normal = torch_npu.npu_rms_norm(x1 + x2, gamma, 1e-6)[0]
    expected = torch_npu.npu_dynamic_mx_quant(normal, dst_type=dtype)
    found = torch_npu.npu_rms_norm_dynamic_mx_quant(x1 + x2, gamma, dst_type=dtype)
    q, total, scale, rstd = torch_npu.npu_add_rms_norm_dynamic_mx_quant(
        x1, x2, gamma, dst_type=dtype
    )
    for one, other in zip((*found[:2], q, scale), expected * 2, strict=True):
        assert torch.equal(one.view(torch.uint8).cpu(), other.view(torch.uint8).cpu())
    assert torch.equal(total, x1 + x2)
    assert rstd.numel() == found[2].numel() == 0
