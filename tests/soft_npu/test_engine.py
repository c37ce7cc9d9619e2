# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's engine, unmodified, on software NPUs; see `tools.soft_npu.serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.logprobs import mean_difference
from tools.soft_npu import environment
from tools.soft_npu.suite import CHECKPOINTS

pytestmark = pytest.mark.soft_npu
OURS = "vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors"
# Of log-probabilities from float32: arithmetic in 16 bits, and activations that are
# quantized from it.
TOLERANCES = {"dense-w4a16": 0.015, "dense-w8a8": 0.04, "moe-w4a16": 0.04}
KERNELS = {
    "dense-w4a16": "AscendWNA16LinearKernel",
    "dense-w8a8": "AscendInt8ScaledMMLinearKernel",
}
Result = dict[str, Any]
# In one process what can be: vllm-ascend keeps some globals of a model and its graphs.
PROCESSES: dict[str, list[dict[str, Any]]] = {
    "dense": [
        {"checkpoint": "dense-w4a16", "enforce_eager": True},
        {"checkpoint": "dense-w8a8", "enforce_eager": True},
        {"checkpoint": "dense-w8a8"},
    ],
    "graphs": [{"checkpoint": "dense-w4a16"}],
    "moe": [{"checkpoint": "moe-w4a16", "enforce_eager": True}],
    "moe graphs": [{"checkpoint": "moe-w4a16"}],
    "vllm-ascend's own": [{"checkpoint": "dense-w8a8", "enforce_eager": True}],
    "two ranks": [
        {
            "checkpoint": "dense-w4a16",
            "enforce_eager": True,
            "tensor_parallel_size": 2,
        }
    ],
}


def run(runs: list[Result], out: Path, base: dict[str, str], plugins: str) -> Any:
    """Serve in a process of its own."""
    variables = base | {
        "VLLM_PLUGINS": plugins,
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int("tensor_parallel_size" in runs[-1])),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CACHE_ROOT": str(out.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tools.soft_npu.serve", str(out)]
    command += map(json.dumps, runs)
    result = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Result]]:
    """What the engines of a process said; it runs once."""
    directory = tmp_path_factory.mktemp("engines")
    known: dict[str, list[Result]] = {}

    def get(name: str) -> list[Result]:
        if name not in known:
            runs = [
                {**run, "checkpoint": str(CHECKPOINTS / run["checkpoint"])}
                for run in PROCESSES[name]
            ]
            plugins = "ascend" if name == "vllm-ascend's own" else "ascend_ct"
            out = directory / f"{len(known)}.json"
            known[name] = run(runs, out, dict(os.environ), plugins)
        return known[name]

    return get


Results = Callable[[str], list[Result]]
OUR_PROCESSES = [name for name in PROCESSES if name != "vllm-ascend's own"]


@pytest.mark.parametrize("name", OUR_PROCESSES)
def test_served_by_this_package(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        assert result["config"] == f"{OURS}.AscendCTConfig"
        assert len(result["ranks"]) == given.get("tensor_parallel_size", 1)
        for rank in result["ranks"]:
            assert rank["platform"] == "NPUAscendCTPlatform"
            assert rank["devices"] == ["npu"]
            if given["checkpoint"] in KERNELS:
                assert rank["kernels"] == [KERNELS[given["checkpoint"]]]
            else:
                assert any("MoE" in method for method in rank["methods"]), rank


@pytest.mark.parametrize("name", OUR_PROCESSES)
def test_close_to_float32(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        checkpoint = given["checkpoint"]
        path = CHECKPOINTS / checkpoint / "reference.json"
        logprobs = result["logprobs"]
        expected = json.loads(path.read_text())[: len(logprobs)]
        difference = mean_difference(logprobs, expected)
        print(name, given, f"{difference:.4f}")
        assert difference < TOLERANCES[checkpoint], given


def test_graphs_say_what_eager_says(results: Results) -> None:
    for eager, graphs in (
        (results("dense")[0], results("graphs")[0]),
        (results("dense")[1], results("dense")[2]),
        (results("moe")[0], results("moe graphs")[0]),
    ):
        assert graphs["tokens"] == eager["tokens"]


def test_bit_equal_to_vllm_ascends_own(results: Results) -> None:
    """Of W8A8, which it serves itself."""
    ours, (theirs,) = results("dense")[1], results("vllm-ascend's own")
    for rank in theirs["ranks"]:
        assert rank["platform"] == "NPUPlatform"
    assert theirs["config"].startswith("vllm_ascend.")
    assert theirs["logprobs"] == ours["logprobs"]
    assert theirs["tokens"] == ours["tokens"]


@pytest.mark.long
def test_release_to_come(tmp_path: Path) -> None:
    """vllm-ascend 0.30.0rc2 alone, not quantized: this package refuses to serve it."""
    device = environment.Device("0.30.0rc2")
    base = environment.variables(device)
    runs = [{"checkpoint": "build/tiny-model", "enforce_eager": True}]
    (result,) = run(runs, tmp_path / "out.json", base, "ascend")
    (rank,) = result["ranks"]
    assert rank["platform"] == "NPUPlatform" and rank["devices"] == ["npu"]
    # A model that guesses is at 6.9.
    assert -sum(result["logprobs"]) / len(result["logprobs"]) < 5
