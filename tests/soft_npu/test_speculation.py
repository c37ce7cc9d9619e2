# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Speculative decoding in vllm-ascend's engine, with quantized draft models."""

from typing import Any

import pytest

from tests.engine.selection import mostly_long
from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, KERNELS, SMALL, Result, Run, Serve
from tools.soft_npu import suite

pytestmark = pytest.mark.soft_npu
DEEPSEEK = f"deepseek-v3/w4a16-g128+{suite.MTP}"


def drafting(checkpoint: str, method: str, draft: str | None = None) -> Run:
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 2}
    if draft is not None:
        config["model"] = draft
    return {"checkpoint": checkpoint, "speculative_config": config, **SMALL}


# vllm-ascend remembers whether the first model of a process has experts.
DENSE: dict[str, Run] = {
    "smaller": {**drafting("dense-w8a8", "draft_model", "dense-w4a16"), **EAGER},
    "eagle": {**drafting("dense-w8a8", "eagle3", f"{suite.EAGLE}/w4a16-g128"), **EAGER},
}
# With graphs.
EXPERTS: dict[str, Run] = {"mtp": drafting(DEEPSEEK, "mtp")}
RUNS = DENSE | EXPERTS


def served(serve: Serve, name: str) -> Result:
    return engines.served(serve, name, DENSE, EXPERTS)


@pytest.mark.parametrize("name", mostly_long(RUNS, *EXPERTS))
def test_close_to_float32(serve: Serve, name: str) -> None:
    run, result = RUNS[name], served(serve, name)
    engines.check_served(run, result)
    engines.check_close(run, result)
    found = engines.difference_of_tokens(run["checkpoint"], result)
    print(f"{name}: {found:.4f}")
    assert found < engines.tolerance(run["checkpoint"])


@pytest.mark.parametrize("name", mostly_long(RUNS, *EXPERTS))
def test_the_draft_model_is_quantized(serve: Serve, name: str) -> None:
    (draft,) = served(serve, name)["drafts"]
    assert draft["devices"] == ["npu"]
    assert draft["kernels"] == [KERNELS["w4a16"]]
    has_experts = engines.METHODS & set(draft["methods"])
    assert bool(has_experts) == (name in EXPERTS)


@pytest.mark.long
def test_proposals_are_accepted(serve: Serve) -> None:
    """Those of the same model in another scheme; random weights propose others."""
    assert served(serve, "smaller")["accepted"] > 0.8
