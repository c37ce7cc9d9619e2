# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The script for NPU hosts, emulated on both sides."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.calls import CALLS
from tools import check_npu


def test_both_sides_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["check_npu", "--out", str(out)])
    monkeypatch.setattr(check_npu, "REPEATS", 1)
    assert check_npu.main() == 0
    report = json.loads(out.read_text())
    assert report["machine"]["device"] == "cpu"
    assert [call["call"] for call in report["calls"]] == list(CALLS)
    assert {call["verdict"] for call in report["calls"]} == {"equal"}


X = torch.randn(8, 64)


@pytest.mark.parametrize(
    ("expected", "result", "verdict"),
    [
        (X, X + 1e-7, "equal"),
        (X, X * 1.001, "different"),
        (X.bfloat16(), (X * 1.001).bfloat16(), "equal"),
        (X.bfloat16(), (X * 1.05).bfloat16(), "different"),
        (X.char(), X.char() + 1, "different"),
        (X.char(), X.char(), "equal"),
        (X.int(), X.int() + (X > 2.5), "different"),
        (X, X[1:], "other form"),
        (X, X.half(), "other form"),
    ],
)
def test_verdicts(expected: torch.Tensor, result: torch.Tensor, verdict: str) -> None:
    assert check_npu.compare((expected,), (result,))[0] == verdict


def test_unwritten_memory_is_not_compared() -> None:
    expected = torch.tensor([1.0, float("nan")])
    assert check_npu.compare(expected, torch.tensor([1.0, 7.0]))[0] == "equal"


def test_what_raises_is_reported() -> None:
    call = CALLS["npu_dynamic_quant"]()
    call.args = [call.args[0].float()]
    with pytest.raises(Exception, match="float32"):
        check_npu.check_call(call, "cpu")
    assert check_npu.check_call(CALLS["npu_swiglu"](), "meta")["verdict"] == "raised"
