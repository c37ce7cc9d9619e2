# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Int8 KV caches, which vllm-ascend stores and multiplies."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run
from tools.checkpoints.kv_scales import change_scales
from tools.soft_npu import suite

pytestmark = pytest.mark.soft_npu
TENSOR, HEAD = (f"qwen3-128/w4a16-g128+kv-int8-{kind}" for kind in ("tensor", "head"))
# The text is computed in parts: all but the first attend to what the cache has.
PARTS = {"max_num_batched_tokens": 32, **SMALL}
# vllm-ascend 0.23 compiles one model per process.
QUANTIZED: list[Run] = [
    {"checkpoint": TENSOR, **PARTS, **EAGER},
    {"checkpoint": HEAD, **PARTS},
]
# Its head_size is 64.
PLAIN: list[Run] = [
    {"checkpoint": "dense/w4a16-g128+kv-int8-tensor", **PARTS, **EAGER},
    {"checkpoint": "dense/w4a16-g128+kv-fp8-tensor", **PARTS, **EAGER},
    {"checkpoint": HEAD, **PARTS, **EAGER, "kv_cache_dtype": "bfloat16"},
]
TWO_RANKS: Run = {"checkpoint": HEAD, **PARTS, **EAGER, "tensor_parallel_size": 2}
Serve = Callable[..., list[Result]]


def check(run: Run, result: Result, dtype: str = "torch.int8") -> None:
    engines.check_served(run, result)
    is_int8 = dtype == "torch.int8"
    for rank in result["ranks"]:
        assert rank["kv_caches"] == [dtype]
        assert ("Int8KVCacheMethod" in rank["methods"]) == is_int8
    # Keys and values are rounded to 8 bits.
    bound = 0.03 if is_int8 else engines.tolerance(run["checkpoint"])
    for found in (
        engines.difference(run["checkpoint"], result["logprobs"]),
        engines.difference_of_tokens(run["checkpoint"], result),
    ):
        print(f"{run}: {found:.4f}")
        assert found < bound


def test_scales_are_used(serve: Serve) -> None:
    for run, result in zip(QUANTIZED, serve(QUANTIZED), strict=True):
        check(run, result)


def test_cache_stays_unquantized(serve: Serve) -> None:
    """If the scales or the model do not fit, or as the user chooses."""
    for run, result in zip(PLAIN, serve(PLAIN), strict=True):
        check(run, result, dtype="torch.bfloat16")


@pytest.mark.long
def test_ranks_have_their_heads_scales(serve: Serve) -> None:
    check(TWO_RANKS, *serve([TWO_RANKS]))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with scales that keys and values exceed."""
    path = tmp_path_factory.mktemp("wrong") / "checkpoint"
    shutil.copytree(suite.checkpoint(TENSOR), path)
    scales = load_file(path / "model.safetensors")
    change_scales(
        path,
        {n: x / 8 for n, x in scales.items() if n.endswith(("k_scale", "v_scale"))},
    )
    return path


def test_wrong_scales_show(serve: Serve, wrong: Path) -> None:
    (result,) = serve([{**QUANTIZED[0], "checkpoint": str(wrong)}])
    assert engines.difference(TENSOR, result["logprobs"]) > 0.1
    assert engines.difference_of_tokens(TENSOR, result) > 0.1


@pytest.mark.long
@pytest.mark.skipif(
    os.environ.get("SOFT_NPU_RELEASE", "").startswith("0.23."),
    reason="the worker of vllm-ascend 0.23 does not reload weights",
)
def test_reloaded_scales_are_used(serve: Serve, wrong: Path) -> None:
    """In graphs, too, which are captured before."""
    run = {"checkpoint": TENSOR, **PARTS}
    path = str(suite.checkpoint(TENSOR))
    (right,) = serve([run])
    (again,) = serve([{**run, "checkpoint": str(wrong), "reload": path}])
    check(run, right)
    assert again["logprobs"] == right["logprobs"]
    assert again["tokens"] == right["tokens"]
