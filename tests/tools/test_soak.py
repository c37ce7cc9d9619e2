# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the soak measures and judges, without a server."""

import os
import subprocess
import sys

import pytest

from tools.bench.soak import canary, load, memory, report
from tools.bench.soak.report import Result, Sample
from tools.bench.soak.requests import Client, Tally

READING = canary.Reading(["a", "b"], [-1.0, -2.0], 0.5)


def result(growth: float = 0, device: float | None = None) -> Result:
    """Ten minutes in which memory grows by some MiB a minute."""
    samples = [
        Sample(
            minute,
            {"server": int((100 + growth * minute) * memory.MIB)},
            [] if device is None else [int(device * minute * memory.MIB)] * 2,
        )
        for minute in range(10)
    ]
    return Result("model", "emulated", 10, Tally(), samples, [0.0])


def test_slope() -> None:
    assert memory.slope([(0, 1), (1, 3), (2, 5)]) == 2
    assert memory.slope([(0, 0), (1, 1), (2, -1), (3, 0)]) == pytest.approx(-0.2)


def test_growth_is_found() -> None:
    bounds = report.BOUNDS
    assert result(bounds["RSS"] * 0.9).failures() == []
    (failure,) = result(bounds["RSS"] * 1.1).failures()
    assert failure.startswith("RSS grows by 6.6")
    # It includes the device's memory.
    assert result(100, device=0).failures() == []
    assert len(result(device=bounds["device"] * 1.1).failures()) == 2


def test_warm_up_does_not_count() -> None:
    found = result()
    found.samples[0].processes["server"] = 0
    assert found.failures() == []


@pytest.mark.parametrize(
    ("changed", "is_found"),
    [
        (READING, False),
        (READING._replace(logprobs=[-1.0005, -2.0]), False),
        (READING._replace(logprobs=[-1.005, -2.0]), True),
        (READING._replace(tokens=["a", "c"]), True),
    ],
)
def test_changed_canary_is_found(changed: canary.Reading, is_found: bool) -> None:
    client = Client(0, Tally())
    canary.compare(client, "model", changed, READING)
    assert client.tally.failed == is_found


def test_what_is_left_out_is_not_asked() -> None:
    paths = {path for path, _ in load.refused("model", ()).values()}
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} < paths
    asked = load.refused("model", ("lora", "not an object"))
    assert not any("lora" in path for path, _ in asked.values())
    assert "not an object" not in asked and "bad JSON" in asked


def test_lost_request_is_found() -> None:
    client = Client(9, Tally())  # Nobody listens there.
    assert client.ask("completion", "/v1/completions") is None
    assert client.tally.failed == 1 and "lost" in client.tally.failures[0]


def test_processes_of_a_process() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as one:
        while len(found := memory.tree(one.pid)) < 2:
            assert one.poll() is None
        assert [p.parent for p in found] == [os.getpid(), one.pid]
        assert all(p.rss > 0 for p in found)
    assert memory.tree(one.pid) == []


def test_rows_replace_those_of_the_same() -> None:
    page = f"before\n{report.START}{report.END}after\n"
    once = report.with_rows(page, [result()])
    assert once.count("| model | emulated |") == 1 and once.endswith("after\n")
    other = result()._replace(checkpoint="other")
    twice = report.with_rows(report.with_rows(once, [other]), [result(3)])
    assert twice.count("emulated") == 2 and "+3.00" in twice
