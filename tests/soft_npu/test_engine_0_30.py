# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The engine of vllm-ascend 0.30.0rc2, unmodified, on software NPUs."""

from collections.abc import Callable

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, OURS, SMALL, Result, Run

pytestmark = pytest.mark.soft_npu
RELEASE = "0.30.0rc2"
SCHEMES = ("w4a16", "w8a8")
TWO = {"tensor_parallel_size": 2, **EAGER}
PROCESSES: dict[str, list[Run]] = {
    "dense": [{"checkpoint": f"dense-{scheme}", **EAGER} for scheme in SCHEMES],
    "moe": [{"checkpoint": f"moe-{scheme}", **SMALL, **EAGER} for scheme in SCHEMES],
    "mla": [{"checkpoint": "mla-w4a16", **SMALL, **EAGER}],
    # vllm-ascend keeps a process's graphs. In full ones its own compiler is used.
    **{
        f"{model}-{scheme} graphs": [{"checkpoint": f"{model}-{scheme}", **SMALL}]
        for model in ("dense", "moe")
        for scheme in SCHEMES
    },
    **{
        f"{name} ranks": [{"checkpoint": name, **TWO, **SMALL}]
        for name in ("dense-w4a16", "moe-w4a16", "moe-w8a8")
    },
    "moe-w8a8 experts": [
        {"checkpoint": "moe-w8a8", **TWO, **SMALL, "enable_expert_parallel": True}
    ],
}
IN_USUAL_RUN = ("dense", "moe")
NAMES = [
    pytest.param(name, marks=() if name in IN_USUAL_RUN else pytest.mark.long)
    for name in PROCESSES
]
Results = Callable[..., list[Result]]


@pytest.fixture
def results(serve: Callable[..., list[Result]]) -> Results:
    """What the engines of a process said."""

    def get(name: str, plugins: str = "ascend_ct") -> list[Result]:
        return serve(PROCESSES[name], plugins=plugins, release=RELEASE)

    return get


@pytest.mark.parametrize("name", NAMES)
def test_served_by_this_package(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        engines.check_served(given, result)


@pytest.mark.parametrize("name", NAMES)
def test_close_to_float32(results: Results, name: str) -> None:
    for given, result in zip(PROCESSES[name], results(name), strict=True):
        engines.check_close(given, result)


@pytest.mark.long
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_graphs_say_what_eager_says(results: Results, model: str) -> None:
    for eager, scheme in zip(results(model), SCHEMES, strict=True):
        (graphs,) = results(f"{model}-{scheme} graphs")
        assert graphs["tokens"] == eager["tokens"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_bit_equal_to_vllm_ascends_own(
    results: Results, serve: Callable[..., list[Result]], model: str
) -> None:
    """Of W8A8, which it serves itself."""
    ours = results(model)[1]
    (theirs,) = serve(PROCESSES[model][1:], plugins="ascend", release=RELEASE)
    assert [rank["platform"] for rank in theirs["ranks"]] == ["NPUPlatform"]
    assert theirs["config"].startswith("vllm_ascend.")
    assert theirs["logprobs"] == ours["logprobs"]
    assert theirs["tokens"] == ours["tokens"]


@pytest.mark.long
def test_beside_vllm_ascend(results: Results) -> None:
    """As a plugin of vllm-ascend's own platform: the same."""
    ours = results("moe")
    for beside, alone in zip(results("moe", "ascend,ascend_ct"), ours, strict=True):
        assert [rank["platform"] for rank in beside["ranks"]] == ["NPUPlatform"]
        assert beside["config"] == f"{OURS}.AscendCTConfig"
        assert beside["logprobs"] == alone["logprobs"]
