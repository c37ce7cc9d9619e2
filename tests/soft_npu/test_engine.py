# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's engine, unmodified, on software NPUs; see `tools.soft_npu.serve`."""

from collections.abc import Callable

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run

pytestmark = pytest.mark.soft_npu
# In one process what can be: vllm-ascend keeps some globals of a model and its graphs.
PROCESSES: dict[str, list[Run]] = {
    "dense": [
        {"checkpoint": "dense-w4a16", **EAGER},
        {"checkpoint": "dense-w8a8", **EAGER},
        {"checkpoint": "dense-w8a8"},
    ],
    "moe": [
        {"checkpoint": "moe-w4a16", **SMALL, **EAGER},
        {"checkpoint": "moe-w4a16", **SMALL},
    ],
    "mla": [
        {"checkpoint": "mla-w4a16", **SMALL, **EAGER},
        {"checkpoint": "mla-w4a16", **SMALL},
    ],
    "vllm-ascend's own": [{"checkpoint": "dense-w8a8", **EAGER}],
    "two ranks": [{"checkpoint": "dense-w4a16", **EAGER, "tensor_parallel_size": 2}],
}


@pytest.fixture
def results(serve: Callable[..., list[Result]]) -> Callable[[str], list[Result]]:
    """What the engines of a process said."""

    def get(name: str) -> list[Result]:
        plugins = "ascend" if name == "vllm-ascend's own" else "ascend_ct"
        return serve(PROCESSES[name], plugins=plugins)

    return get


Results = Callable[[str], list[Result]]
OUR_PROCESSES = [name for name in PROCESSES if name != "vllm-ascend's own"]


@pytest.mark.parametrize("name", OUR_PROCESSES)
def test_served_by_this_package(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        engines.check_served(given, result)


@pytest.mark.parametrize("name", OUR_PROCESSES)
def test_close_to_float32(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        engines.check_close(given, result)


def test_graphs_say_what_eager_says(results: Results) -> None:
    for eager, graphs in (
        results("dense")[1:],
        results("moe"),
        results("mla"),
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
def test_experts_are_bit_equal_to_vllm_ascends_own(
    serve: Callable[..., list[Result]],
) -> None:
    runs: list[Run] = [{"checkpoint": "moe-w8a8", **SMALL, **EAGER}]
    (ours,), (theirs,) = (serve(runs, plugins=name) for name in ("ascend_ct", "ascend"))
    engines.check_served(runs[0], ours)
    assert theirs["config"].startswith("vllm_ascend.")
    assert theirs["logprobs"] == ours["logprobs"]
    assert theirs["tokens"] == ours["tokens"]
