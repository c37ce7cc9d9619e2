# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's engine on software NPUs that are Ascend 950 (A5).

A5 multiplies FP8 and MX formats as they are. Runs on each supported release.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run
from tests.soft_npu.test_engine import in_turn
from tools.soft_npu import suite

pytestmark = pytest.mark.soft_npu
CHIP = "A5"
# Two layers of the model have four linear layers each, or two beside experts.
DENSE, EXPERTS = 4, 2
QUANTIZE, MX_QUANTIZE = "npu::npu_dynamic_quant", "npu::npu_dynamic_mx_quant"
MULTIPLY, WEIGHT_ONLY = "npu::npu_quant_matmul", "npu::npu_weight_quant_batchmatmul"
GROUPED = "npu::npu_grouped_matmul"
# With graphs, norms that quantize.
FUSED = {
    "npu::npu_rms_norm_dynamic_mx_quant": MX_QUANTIZE,
    "npu::npu_add_rms_norm_dynamic_mx_quant": MX_QUANTIZE,
    "npu::npu_add_rms_norm_dynamic_quant": QUANTIZE,
}
ATTENTION = "npu::npu_fused_infer_attention_score"


class Served(NamedTuple):
    """How a checkpoint is served.

    Attributes:
        kernels: Classes of the linear layers' kernels; empty if they are resolved.
        calls: Number of calls of each operator that quantizes or multiplies, in a layer
            of the model.
        tolerance: Mean difference of log-probabilities from float32.

    """

    kernels: list[str]
    calls: dict[str, int]
    tolerance: float


def quantized(kernel: str, operator: str, tolerance: float) -> Served:
    """A dense model whose activations are quantized."""
    return Served([kernel], {operator: DENSE, MULTIPLY: DENSE}, tolerance)


def experts(operator: str, tolerance: float) -> Served:
    """Experts whose activations are quantized, with W4A16 attention."""
    calls = {WEIGHT_ONLY: EXPERTS, operator: 2, GROUPED: 2}
    return Served(["AscendWNA16LinearKernel"], calls, tolerance)


FP8, MX8, MX4 = (
    f"Ascend{name}LinearKernel" for name in ("FP8ScaledMM", "Mxfp8", "Mxfp4")
)
# Tolerances are those of tests/engine, where operators are emulated below vLLM's CPU
# platform. The references of FP8, MXFP8 and MXFP4 dense models round activations.
SERVED = {
    "dense/fp8-channel-dynamic": quantized(FP8, QUANTIZE, 0.035),
    "dense/mxfp8": quantized(MX8, MX_QUANTIZE, 0.04),
    "dense/mxfp4": quantized(MX4, MX_QUANTIZE, 0.12),
    "dense/fp8-block": Served([], {}, 0.015),
    "dense/nvfp4": Served([], {}, 0.015),
    "dense-w4a16": Served(["AscendWNA16LinearKernel"], {WEIGHT_ONLY: DENSE}, 0.015),
    "dense-w8a8": quantized("AscendInt8ScaledMMLinearKernel", QUANTIZE, 0.04),
    "qwen3-moe/w4a16-g128+fp8-channel-dynamic": experts(QUANTIZE, 0.08),
    "qwen3-moe/w4a16-g128+mxfp8": experts(MX_QUANTIZE, 0.08),
    "qwen3-moe/w4a16-g128+mxfp4": experts(MX_QUANTIZE, 0.2),
    "moe-w4a16": Served(
        ["AscendWNA16LinearKernel"], {WEIGHT_ONLY: EXPERTS, GROUPED: 2}, 0.03
    ),
    "moe-w8a8": Served(
        ["AscendInt8ScaledMMLinearKernel"],
        {QUANTIZE: 4, MULTIPLY: EXPERTS, GROUPED: 2},
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
    "fp8 graphs": graphs("dense/fp8-channel-dynamic"),
    "mxfp8 graphs": graphs("dense/mxfp8"),
    "mxfp4 graphs": graphs("dense/mxfp4"),
    "int graphs": graphs("dense-w8a8"),
    "fp8 expert graphs": graphs("qwen3-moe/w4a16-g128+fp8-channel-dynamic"),
    "mxfp8 expert graphs": graphs("qwen3-moe/w4a16-g128+mxfp8"),
}
USUAL = ["usual"]
RELEASE = os.environ.get("SOFT_NPU_RELEASE", "")
Serve = Callable[..., list[Result]]


def calls_in_a_layer(result: Result) -> dict[str, float]:
    """Of operators that quantize or multiply; each layer attends once."""
    (rank,) = result["ranks"]
    calls: Counter[str] = Counter()
    for name, count in rank["operators"].items():
        calls[FUSED.get(name, name.removesuffix(".out"))] += count
    operators = (QUANTIZE, MX_QUANTIZE, MULTIPLY, WEIGHT_ONLY, GROUPED)
    return {name: calls[name] / calls[ATTENTION] for name in operators if calls[name]}


@pytest.mark.parametrize("process", in_turn([*PROCESSES], USUAL))
def test_served(serve: Serve, process: str) -> None:
    runs = PROCESSES[process]
    for run, result in zip(runs, serve(runs, chip=CHIP), strict=True):
        engines.check_in_charge(run, result)
        expected = SERVED[run["checkpoint"]]
        (rank,) = result["ranks"]
        assert rank["kernels"] == expected.kernels
        assert bool(rank["resolved"]) != bool(expected.kernels)
        assert calls_in_a_layer(result) == expected.calls


@pytest.mark.parametrize("process", in_turn([*PROCESSES], USUAL))
def test_close_to_float32(serve: Serve, process: str) -> None:
    runs = PROCESSES[process]
    for run, result in zip(runs, serve(runs, chip=CHIP), strict=True):
        name = run["checkpoint"]
        found = engines.difference(name, result["logprobs"], suite.is_rounded(name))
        print(f"{name} {run}: {found:.4f}")
        assert found < SERVED[name].tolerance
