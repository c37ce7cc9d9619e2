# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The script for NPU hosts, with both sides emulated."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.calls import CALLS
from tools.numerics import check_npu, record_npu_calls


@pytest.mark.usefixtures("single_rank")
def test_both_sides_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of each operator, and calls of some layers."""
    out, path = tmp_path / "report.json", tmp_path / "calls.pt"
    schemes = ["w4a16-g32-asym", "w4a8-channel", "w8a8-channel-dynamic"]
    calls = record_npu_calls.record(
        record_npu_calls.layers(), schemes, [torch.bfloat16]
    )
    record_npu_calls.save(calls, path)
    arguments = ["check_npu", "--calls", str(path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(check_npu, "REPEATS", 1)
    assert check_npu.main() == 0
    report = json.loads(out.read_text())
    assert report["machine"]["device"] == "cpu"
    assert [call["call"] for call in report["calls"]] == [*CALLS, *calls]
    # All omitted rows are for other chips or schemes.
    assert {operator for operator, *_ in calls.values()} == {
        "npu_dynamic_quant",
        "npu_format_cast",
        "npu_grouped_matmul",
        "npu_grouped_matmul_swiglu_quant_v2",
        "npu_moe_finalize_routing",
        "npu_moe_init_routing_v2",
        "npu_moe_token_unpermute",
        "npu_quant_matmul",
        "npu_swiglu",
        "npu_trans_quant_param",
        "npu_weight_quant_batchmatmul",
    }
    assert {call["verdict"] for call in report["calls"]} == {"equal"}


@pytest.mark.usefixtures("single_rank")
def test_calls_for_another_chip_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calls.pt"
    record_npu_calls.save({}, path)
    assert check_npu.recorded(path) == {}
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    with pytest.raises(SystemExit, match="calls for A2, and this is 310P"):
        check_npu.recorded(path)


X = torch.randn(8, 64)
X[0, 0] = 3


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
    result = check_npu.check_call(call, "cpu")
    assert result["verdict"] == "not on this chip" and "float32" in result["difference"]
    assert check_npu.check_call(CALLS["npu_swiglu"](), "meta")["verdict"] == "raised"
