# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Engines with two software NPUs."""

from collections.abc import Callable

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run

pytestmark = pytest.mark.soft_npu
W8A8 = "qwen3-moe/w8a8-channel-dynamic"
EXPERTS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
# Methods that exchange tokens; vllm-ascend chooses by chip and number of tokens.
ALL_GATHER = {"npu::npu_moe_token_unpermute"}
MC2 = {"npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"}
ALL_TO_ALL = {"npu::npu_moe_token_permute", "npu::npu_moe_token_unpermute"}
# Name -> chip, engine, operators that must be called.
CASES: dict[str, tuple[str, Run, set[str]]] = {
    "tensor": ("A2", {"checkpoint": "dense-w8a8", "tensor_parallel_size": 2}, set()),
    "pipeline": (
        "A2",
        {"checkpoint": "dense-w8a8", "pipeline_parallel_size": 2},
        set(),
    ),
    "pipeline of experts": (
        "A2",
        {"checkpoint": "moe-w4a16", "pipeline_parallel_size": 2},
        set(),
    ),
    "latent attention": (
        "A2",
        {"checkpoint": "mla-w4a16", "tensor_parallel_size": 2},
        set(),
    ),
    "all-gather": ("A2", {"checkpoint": "moe-w4a16", **EXPERTS}, ALL_GATHER),
    "all-gather of int8": ("A2", {"checkpoint": W8A8, **EXPERTS}, ALL_GATHER),
    "all-to-all and MC2": (
        "A3",
        {"checkpoint": "moe-w4a16", **EXPERTS},
        ALL_TO_ALL | MC2,
    ),
    "all-to-all and MC2 of int8": (
        "A3",
        {"checkpoint": W8A8, **EXPERTS},
        ALL_TO_ALL | MC2,
    ),
    # Other layouts of weights and of sent tokens.
    **{
        f"{name} of {scheme}": (
            chip,
            {"checkpoint": f"qwen3-moe/{scheme}", **EXPERTS},
            operators,
        )
        for scheme in ("w4a16-channel-asym", "w8a16-channel", "w4a8-channel")
        for name, chip, operators in (
            ("all-gather", "A2", ALL_GATHER),
            ("all-to-all and MC2", "A3", ALL_TO_ALL | MC2),
        )
    },
}
IN_USUAL_RUN = "all-to-all and MC2 of int8"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name != IN_USUAL_RUN))
        for name in CASES
    ],
)
def test_close_to_float32(serve: Callable[..., list[Result]], name: str) -> None:
    chip, case, operators = CASES[name]
    run = {**case, **EAGER, **SMALL}
    (result,) = serve([run], chip=chip)
    engines.check_served(run, result)
    engines.check_close(run, result)
    for rank in result["ranks"]:
        assert operators <= rank["operators"].keys()
