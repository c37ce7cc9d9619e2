# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The comparison for whoever has a chip; here the operators are emulated."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture

from vllm_ascend_ct import compare_layouts
from vllm_ascend_ct.compare_layouts import Result
from vllm_ascend_ct.weights import int4

CHOSEN = {
    "A2": ["w4a16-group", "w4a8-channel", "w8a8-dynamic", "w8a8-static"],
    "A5": ["w4a16-group", "w8a8-dynamic", "w8a8-static"],
    "310P": ["w8a8-dynamic", "w8a8-static"],
}


def run(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, Any]:
    arguments = ["--k", "512", "--n", "256", "--tokens", "1", "16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["compare_layouts", *arguments])
    monkeypatch.setattr(compare_layouts, "REPEATS", 1)
    return compare_layouts.main(), json.loads(out.read_text())


@pytest.mark.parametrize("soc", CHOSEN)
def test_each_layout_is_right(
    soc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    code, report = run(monkeypatch, tmp_path / "report.json")
    assert code == 0 and report["soc"] == soc
    results = report["results"]
    assert list(dict.fromkeys(found["kind"] for found in results)) == CHOSEN[soc]
    assert all(found["is_right"] and found["error"] > 0 for found in results)
    assert all(found["ratios"].keys() == {"1", "16"} for found in results)


def test_a_wrong_one_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nibbles the other way round, in one of two layouts."""
    pack = int4.pack_outputs

    def swapped(*arguments: Any) -> torch.Tensor:
        words = pack(*arguments)
        return ((words >> 4) & 0x0F0F0F0F) | ((words & 0x0F0F0F0F) << 4)

    mocker.patch.object(int4, "pack_outputs", swapped)
    code, report = run(monkeypatch, tmp_path / "report.json")
    wrong = [r["layout"] for r in report["results"] if not r["is_right"]]
    assert code == 1 and "contiguous" in wrong and "transposed" not in wrong
    assert "WRONG" in capsys.readouterr().out


def result(kind: str, layout: str, is_right: bool, ratio: float) -> Result:
    return Result(kind, layout, 0.0, is_right, {1: 1.0, 64: 1.0}, {1: ratio, 64: ratio})


@pytest.mark.parametrize(
    ("default", "other", "proposed"),
    [
        ((True, 1.0), (True, 0.5), True),
        ((True, 1.0), (True, 0.99), False),
        ((True, 1.0), (False, 0.5), False),
        ((False, 1.0), (True, 2.0), True),
        ((False, 1.0), (False, 0.5), False),
    ],
)
def test_advice(
    default: tuple[bool, float], other: tuple[bool, float], proposed: bool
) -> None:
    found = [result("kind", "first", *default), result("kind", "second", *other)]
    text = compare_layouts.advice(found)
    assert ("VLLM_ASCEND_CT_LAYOUT=kind=second," in text) is proposed
