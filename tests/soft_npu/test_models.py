# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every supported scheme and kind of model, on software NPUs."""

import os
from collections.abc import Callable

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run
from vllm_ascend_ct import compat

pytestmark = [pytest.mark.soft_npu, pytest.mark.long]
# The trained dense model: each row of docs/support-matrix.md, and more groups.
DENSE = (
    "w2a16-g64",
    "w3a16-g64-asym",
    "w4a16-channel-asym",
    "w5a16-channel",
    "w6a16-g64",
    "w7a16-channel-asym",
    "w8a16-channel",
    "w8a16-g64-asym",
    "w8a8-tensor-dynamic",
    "w8a8-channel-dynamic-asym",
    "w8a8-channel-static",
    "w8a8-tensor-static-asym",
    "w4a8-channel",
    "w4a8-g256",
    "w4a8-g256-packed",
    "w4a8-g128",
    "w4a8-channel-asym-inputs",
    "w4a8-g64-asym-packed",
    "w2a8-g256-packed",
    "w3a8-channel-packed",
    "w6a8-channel-packed",
    "w8a8-g128-packed",
    "w2a8o8-g64",
    "w4a8o8-channel",
    "w8a8o8-channel-int",
)
# vLLM 0.30 has parameters for 4-bit and 8-bit zero points only, none with int8.
REFUSED = (
    *("dense/w3a16-g64-asym", "dense/w7a16-channel-asym"),
    "dense/w4a8-g64-asym-packed",
)
LACKS_ZERO_POINTS = not compat.ZERO_POINTS_BESIDE_INT8
# Name of a process -> checkpoints.
PROCESSES = {
    "weights": [f"dense/{name}" for name in DENSE if "a16" in name],
    "activations": [f"dense/{name}" for name in DENSE if "a16" not in name],
    "dense": [
        "llama/w4a16-g128",
        "llama/w8a8-channel-static",
        "qwen3/w8a8-channel-dynamic",
        "qwen3/w4a16-g64-asym",
    ],
    "experts": [
        "mixtral/w4a16-g128",
        "qwen3-moe/w4a16-channel-asym",
        "qwen3-moe/w3a16-g64",
        "qwen3-moe/w8a16-channel",
        "qwen3-moe/w8a8-channel-dynamic",
        "qwen3-moe/w8a8-channel-dynamic-asym",
        "qwen3-moe/w4a8-g256",
        # On A2 its activations stay in 16 bits.
        "qwen3-moe/w4a8-g128",
    ],
    "latent attention": [
        "deepseek-v2/w8a16-channel",
        "deepseek-v3/w4a16-g64",
        "deepseek-v3/w8a8-channel-dynamic+w4a16-g128",
        "deepseek-v3/w8a8-channel-dynamic",
    ],
}
# vllm-ascend 0.30 takes linear attention from a package that has a stand-in only.
if LINEAR_ATTENTION := os.environ.get("SOFT_NPU_RELEASE", "").startswith("0.23."):
    PROCESSES["linear attention"] = [
        "qwen3-next/w4a16-g128",
        "qwen3-next/w8a8-channel-dynamic",
    ]
if LACKS_ZERO_POINTS:
    PROCESSES = {
        process: [name for name in names if name not in REFUSED]
        for process, names in PROCESSES.items()
    }


def run(name: str) -> Run:
    return {"checkpoint": name, **EAGER, **SMALL}


@pytest.mark.parametrize(
    ("process", "name"),
    [(process, name) for process, names in PROCESSES.items() for name in names],
)
def test_close_to_float32(
    serve: Callable[..., list[Result]],
    process: str,
    name: str,
) -> None:
    names = PROCESSES[process]
    result = serve([run(x) for x in names])[names.index(name)]
    engines.check_served(run(name), result)
    engines.check_close(run(name), result)


@pytest.mark.skipif(not LINEAR_ATTENTION, reason="not on this release")
@pytest.mark.parametrize(
    "options", [{"max_num_batched_tokens": 32}, {"tensor_parallel_size": 2}]
)
def test_linear_attention(
    serve: Callable[..., list[Result]], options: dict[str, int]
) -> None:
    """Parts of a prompt go on from states of the cache; ranks have their heads."""
    given = {**run("qwen3-next/w4a16-g128"), **options}
    (result,) = serve([given])
    engines.check_served(given, result)
    engines.check_close(given, result)
    calls = result["ranks"][0]["operators"]
    assert calls["_C_ascend::chunk_fwd_o"]
    assert calls["_C_ascend::npu_recurrent_gated_delta_rule"]


@pytest.mark.skipif(not LACKS_ZERO_POINTS, reason="this vLLM has their parameters")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(serve: Callable[..., list[Result]], name: str) -> None:
    with pytest.raises(AssertionError, match="errors.UnsupportedCheckpointError"):
        serve([run(name)])
