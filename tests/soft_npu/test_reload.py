# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Weights that are loaded again into a running engine of vllm-ascend."""

import os
from collections.abc import Callable

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result

pytestmark = [
    pytest.mark.soft_npu,
    pytest.mark.long,
    pytest.mark.skipif(
        os.environ.get("SOFT_NPU_RELEASE", "").startswith("0.23."),
        reason="the worker of vllm-ascend 0.23 does not reload weights",
    ),
]


@pytest.mark.parametrize(
    "name",
    ["dense-w4a16", "moe-w4a16", "dense/w8a16-channel", "dense-w8a8", "moe-w8a8"],
)
def test_reload(serve: Callable[..., list[Result]], name: str) -> None:
    run = {"checkpoint": name, **SMALL, **EAGER}
    (once,) = serve([run])
    (again,) = serve([run | {"reload": True}])
    engines.check_served(run, again)
    assert again["logprobs"] == once["logprobs"]
    assert again["tokens"] == once["tokens"]
