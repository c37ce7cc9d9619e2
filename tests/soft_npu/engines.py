# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Engines in separate processes; see `tools.soft_npu.serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.checkpoints.make_checkpoint import FLOAT_SCHEMES
from tools.numerics.logprobs import (
    difference_of_generated,
    mean_difference,
    reference_model,
)
from tools.soft_npu import suite

OURS = "vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors"
# Classes of experts in vllm-ascend 0.23 and 0.30.
METHODS = {"FusedMoEAscendMethod", "RoutedExpertsAscendMethod"}
KERNELS = {
    "w4a16": "AscendWNA16LinearKernel",
    "w8a8": "AscendInt8ScaledMMLinearKernel",
}
EAGER = {"enforce_eager": True}
# vllm-ascend keeps the KV cache of a model with experts until another is loaded.
SMALL = {"kv_cache_memory_bytes": 1 << 25}
Result = dict[str, Any]
# One run is one engine: a checkpoint's name and arguments of `LLM`.
Run = dict[str, Any]
Serve = Callable[..., list[Result]]


def run(
    runs: Sequence[Run],
    out: Path,
    plugins: str = "ascend_ct",
    chip: str = "A2",
) -> list[Result]:
    """Serve one engine after the other in a process.

    Args:
        runs: The runs to serve.
        out: The file to write.
        plugins: `VLLM_PLUGINS`; "ascend" is vllm-ascend's own.
        chip: One of `environment.SOCS`.

    """
    names = [run["checkpoint"] for run in runs]
    names += [draft for run in runs if (draft := _draft(run))]
    suite.prepare([name for name in names if not Path(name).is_dir()])
    named = [_with_directories(run) for run in runs]
    ranks = any(name.endswith("parallel_size") for run in runs for name in run)
    variables = {
        **os.environ,
        "VLLM_PLUGINS": plugins,
        "SOFT_NPU_SOC": chip,
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks)),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CACHE_ROOT": str(out.parent / "cache"),
        # `vllm serve` sets it: vllm-ascend 0.30 starts the device before it forks.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tools.soft_npu.serve", str(out)]
    result = subprocess.run(
        [*command, *map(json.dumps, named)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    results: list[Result] = json.loads(out.read_text())
    return results


def _draft(run: Run) -> str | None:
    """The checkpoint of a run's draft model, if it has one of its own."""
    draft: str | None = run.get("speculative_config", {}).get("model")
    return draft


def _with_directories(run: Run) -> Run:
    named = {**run, "checkpoint": _directory(run["checkpoint"])}
    if draft := _draft(run):
        speculation = {**run["speculative_config"], "model": _directory(draft)}
        named["speculative_config"] = speculation
    return named


def _directory(name: str) -> str:
    return name if Path(name).is_dir() else str(suite.checkpoint(name))


def served(serve: Serve, name: str, *groups: dict[str, Run]) -> Result:
    """The result of a run; those of its group are served one after the other."""
    (runs,) = (group for group in groups if name in group)
    return serve([*runs.values()])[[*runs].index(name)]


def check_in_charge(run: Run, result: Result) -> None:
    """Check that this package is in charge, on each of its NPUs."""
    assert result["config"] == f"{OURS}.AscendCTConfig"
    sizes = [x for name, x in run.items() if name.endswith("parallel_size")]
    assert len(result["ranks"]) == (sizes[0] if sizes else 1)
    for rank in result["ranks"]:
        assert rank["platform"] == "NPUAscendCTPlatform"
        assert rank["devices"] == ["npu"]


def check_served(run: Run, result: Result) -> None:
    """Check that this package serves, on A2, A3 or 310P."""
    check_in_charge(run, result)
    for rank in result["ranks"]:
        if is_float(run["checkpoint"]):
            # All unquantized layers use vllm-ascend's methods.
            assert rank["resolved"] and not rank["kernels"], rank
            assert "AscendUnquantizedLinearMethod" in rank["methods"]
            continue
        assert rank["kernels"], "nothing is quantized"
        assert all(kernel.startswith("Ascend") for kernel in rank["kernels"]), rank
        model, _, scheme = run["checkpoint"].partition("-")
        if scheme in KERNELS and model in ("dense", "moe"):
            assert rank["kernels"] == [KERNELS[scheme]]
        if is_moe(run["checkpoint"]):
            assert METHODS & set(rank["methods"]), rank


def difference(name: str, logprobs: Sequence[float], rounded: bool = False) -> float:
    """Mean absolute difference of a checkpoint's log-probabilities from float32.

    Args:
        name: The checkpoint.
        logprobs: Log-probabilities of its held-out text.
        rounded: Whether the reference rounds activations as A5 does.

    """
    directory = suite.rounded(name) if rounded else suite.checkpoint(name)
    path = directory / "reference.json"
    reference = json.loads(path.read_text())[: len(logprobs)]
    return mean_difference(list(logprobs), reference)


def difference_of_tokens(name: str, result: Result) -> float:
    """Mean difference of the generated tokens' log-probabilities from float32."""
    model = reference_model(suite.checkpoint(name))
    texts = zip(
        result["prompts"], result["tokens"], result["token_logprobs"], strict=True
    )
    return difference_of_generated(model, texts)


def is_float(name: str) -> bool:
    """Whether a checkpoint has floating-point weights."""
    return suite.contents(name).partition("/")[2] in FLOAT_SCHEMES


def is_moe(name: str) -> bool:
    """Whether a checkpoint has experts."""
    model = suite.contents(name).partition("/")[0]
    return model not in ("dense", "llama", "qwen3", "qwen3-128", suite.VISION)


def tolerance(name: str) -> float:
    """Tolerance for 16-bit arithmetic and for activations that are quantized from it.

    It is larger for random weights: they do not damp rounding differences, and route
    tokens to other experts. The emulated platform differs by the same amount.
    """
    model, _, recipe = suite.contents(name).partition("/")
    if "a8o8" in recipe or ("a8" in recipe and model != "dense"):
        return 0.08
    if "a8" in recipe:
        return 0.04
    return 0.03 if is_moe(name) or model == suite.VISION else 0.015


def check_close(run: Run, result: Result) -> None:
    """Check that the results are close to the model in float32."""
    name = run["checkpoint"]
    found = difference(name, result["logprobs"])
    print(f"{name} {run}: {found:.4f}")
    assert found < tolerance(name), run
