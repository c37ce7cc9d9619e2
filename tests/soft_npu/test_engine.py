# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's engine, unmodified, on software NPUs; see `tools.soft_npu.serve`.

Runs on each supported release.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, OURS, SMALL, Result, Run
from tools.soft_npu import suite
from tools.soft_npu.environment import Device

pytestmark = pytest.mark.soft_npu
# As many engines as possible per process: vllm-ascend keeps global state of a model.
PROCESSES: dict[str, list[Run]] = {
    "dense": [
        {"checkpoint": "dense-w4a16", **EAGER},
        {"checkpoint": "dense-w8a8", **EAGER},
        {"checkpoint": "dense-w8a8"},
    ],
    "moe": [
        {"checkpoint": "moe-w4a16", **SMALL, **EAGER},
        {"checkpoint": "moe-w8a8", **SMALL, **EAGER},
        {"checkpoint": "moe-w4a16", **SMALL},
    ],
    "mla": [
        {"checkpoint": "mla-w4a16", **SMALL, **EAGER},
        {"checkpoint": "mla-w4a16", **SMALL},
    ],
    "two ranks": [{"checkpoint": "dense-w4a16", **EAGER, "tensor_parallel_size": 2}],
    "floats": [{"checkpoint": "dense/fp8-block", **EAGER}],
    "float experts": [
        {"checkpoint": "qwen3-moe/nvfp4", **SMALL, **EAGER},
        {"checkpoint": "qwen3-moe/fp8-channel-dynamic", **SMALL},
    ],
    "float graphs": [{"checkpoint": "dense/fp8-tensor-static"}],
    "float mla": [{"checkpoint": "deepseek-v2/mxfp8", **SMALL, **EAGER}],
    "floats on two ranks": [
        {"checkpoint": "dense/fp8-block", **EAGER, "tensor_parallel_size": 2}
    ],
    "whole float experts": [
        {
            "checkpoint": "qwen3-moe/mxfp4",
            **SMALL,
            **EAGER,
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
        }
    ],
    "graphs": [{"checkpoint": "dense-w4a16"}],
    "int8 graphs": [{"checkpoint": "moe-w8a8", **SMALL}],
}
# What vllm-ascend 0.30 calls by its own name, and torch_npu by another.
TORCH_NPU_NAMES = {
    "_C_ascend::grouped_matmul_swiglu_quant_weight_nz": (
        "npu::npu_grouped_matmul_swiglu_quant_v2"
    )
}
# Process and run with graphs -> process and run of the same without graphs.
GRAPHS = {
    ("dense", 2): ("dense", 1),
    ("moe", 2): ("moe", 0),
    ("mla", 1): ("mla", 0),
    ("graphs", 0): ("dense", 0),
    ("int8 graphs", 0): ("moe", 1),
}
IS_DEFAULT = os.environ.get("SOFT_NPU_RELEASE") == Device.release
IN_USUAL_RUN = (
    "dense",
    "moe",
    "float experts",
    *(("mla", "two ranks") if IS_DEFAULT else ()),
)
Results = Callable[..., list[Result]]


def in_turn(cases: Sequence[Any], usual: Sequence[Any]) -> list[Any]:
    """Parameters, of which all but the default ones are marked long."""
    return [
        pytest.param(case, marks=() if case in usual else pytest.mark.long)
        for case in cases
    ]


@pytest.fixture
def results(serve: Callable[..., list[Result]]) -> Results:
    """Results of the engines of a process."""

    def get(name: str, plugins: str = "ascend_ct") -> list[Result]:
        return serve(PROCESSES[name], plugins=plugins)

    return get


@pytest.mark.parametrize("name", in_turn([*PROCESSES], IN_USUAL_RUN))
def test_served_by_this_package(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        engines.check_served(given, result)


@pytest.mark.parametrize("name", in_turn([*PROCESSES], IN_USUAL_RUN))
def test_close_to_float32(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        engines.check_close(given, result)


@pytest.mark.parametrize(
    "case", in_turn([*GRAPHS], [case for case in GRAPHS if case[0] in IN_USUAL_RUN])
)
def test_graphs_say_what_eager_says(results: Results, case: tuple[str, int]) -> None:
    graphs, eager = (results(name)[run] for name, run in (case, GRAPHS[case]))
    assert graphs["tokens"] == eager["tokens"]


@pytest.mark.parametrize(
    "name", in_turn(["dense", "moe"], ["dense"] if IS_DEFAULT else [])
)
def test_bit_equal_to_vllm_ascends_own(
    results: Results, serve: Callable[..., list[Result]], name: str
) -> None:
    """With W8A8, which vllm-ascend serves by itself."""
    ours = results(name)[1]
    (theirs,) = serve(PROCESSES[name][1:2], plugins="ascend")
    assert [rank["platform"] for rank in theirs["ranks"]] == ["NPUPlatform"]
    assert theirs["config"].startswith("vllm_ascend.")
    assert theirs["logprobs"] == ours["logprobs"]
    assert theirs["tokens"] == ours["tokens"]
    more = operators(ours) - operators(theirs)
    assert not more, f"called more often than by vllm-ascend: {more}"


def operators(result: Result) -> Counter[str]:
    """Number of calls of each operator while the engine served."""
    (rank,) = result["ranks"]
    calls: Counter[str] = Counter()
    for name, count in rank["operators"].items():
        calls[TORCH_NPU_NAMES.get(name, name)] += count
    return calls


def test_norms_quantize(serve: Callable[..., list[Result]]) -> None:
    """With vllm-ascend's passes: all of four norms except the last, before the head."""
    run: Run = {"checkpoint": "dense/w8a8-channel-static"}
    (result,) = serve([run])
    engines.check_served(run, result)
    engines.check_close(run, result)
    calls = result["ranks"][0]["operators"]
    fused, norms = calls["npu::npu_add_rms_norm_quant"], calls["npu::npu_rms_norm"]
    assert fused == 3 * norms
    assert calls["_C_ascend::npu_add_rms_norm_bias"] == norms
    assert calls["npu::npu_quantize"] + fused == calls["npu::npu_quant_matmul"]


@pytest.mark.long
def test_beside_vllm_ascend(results: Results) -> None:
    """As a plugin of vllm-ascend's own platform, the results are the same."""
    ours = results("moe")
    for beside, alone in zip(results("moe", "ascend,ascend_ct"), ours, strict=True):
        assert [rank["platform"] for rank in beside["ranks"]] == ["NPUPlatform"]
        assert beside["config"] == f"{OURS}.AscendCTConfig"
        assert beside["logprobs"] == alone["logprobs"]


@pytest.mark.parametrize(
    ("name", "layer", "served_by"),
    [
        ("moe-w8a8", "experts", "AscendWNA8Experts"),
        pytest.param(
            *("dense-w4a16", "qkv_proj", "AscendWNA16LinearKernel"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("mla-w4a16", "kv_b_proj", "16 bits, dequantized at load"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_inspect(name: str, layer: str, served_by: str) -> None:
    """It builds vllm-ascend's layers, without values."""
    command = [sys.executable, "-m", "vllm_ascend_ct.cli.main", "inspect", "--json"]
    path = str(suite.checkpoint(name))
    result = subprocess.run([*command, path], capture_output=True, text=True)
    report = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert result.returncode == 0 and report["errors"] == []
    assert report["platform"] == "NPUAscendCTPlatform"
    (row,) = (row for row in report["rows"] if row["layers"].endswith(layer))
    assert row["served_by"].startswith(served_by)
