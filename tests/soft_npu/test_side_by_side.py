# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""This package does no more than vllm-ascend's own quantization; see the benchmark."""

import os

import pytest

from tools.bench import side_by_side
from tools.bench.side_by_side import OURS, OWN, Counts
from tools.soft_npu import suite

pytestmark = [pytest.mark.soft_npu, pytest.mark.long]
BOTH = side_by_side.CHECKPOINTS[:4]


@pytest.mark.parametrize("name", BOTH)
def test_no_more_than_vllm_ascend(name: str) -> None:
    suite.prepare([name])
    release = os.environ["SOFT_NPU_RELEASE"]
    path = suite.checkpoint(name)
    ours, own = (side_by_side.run(path, release, by) for by in (OURS, OWN))
    assert ours is not None and own is not None
    assert ours["config"].startswith("vllm_ascend_ct.")
    assert own["config"].startswith("vllm_ascend.")
    for phase in ("prefill", "decode"):
        a, b = Counts(*ours[phase]), Counts(*own[phase])
        assert sum(a.launches.values()) <= sum(b.launches.values()) > 0
        assert all(x <= y for x, y in zip(a[1:], b[1:])), phase
    # To load, this package waits to check scales, and they have 32 bits.
    load = Counts(*ours["load"])
    assert load.to_host_bytes <= Counts(*own["load"]).to_host_bytes
    assert 0 < ours["resident"] <= own["resident"]
    assert ours["peak"] <= own["peak"]
