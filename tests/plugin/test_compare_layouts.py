# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The comparison of layouts, with emulated operators."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture

from vllm_ascend_ct import compare_layouts
from vllm_ascend_ct.cli.main import main
from vllm_ascend_ct.compare_layouts import Result
from vllm_ascend_ct.compare_layouts.layer import Layer
from vllm_ascend_ct.ops.layouts import CHOICES
from vllm_ascend_ct.ops.precedents import PRECEDENTS
from vllm_ascend_ct.ops.soc import Soc
from vllm_ascend_ct.weights import int4

# Calls of a layer besides those that multiply and quantize.
UNANNOUNCED = ("routing", "activation", "loading")


def run(out: Path) -> tuple[int, Any]:
    arguments = ["--k", "512", "--n", "256", "--tokens", "1", "16", "--out", str(out)]
    return main(["check-npu", *arguments]), json.loads(out.read_text())


@pytest.mark.parametrize("soc", [Soc.A2, Soc.A5, Soc.ASCEND_310P], ids=str)
def test_each_call_of_the_chip_is_made_and_right(
    soc: Soc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    """Both with and without FRACTAL_NZ in vllm-ascend's settings."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc.value)
    made = {}
    for prefers_nz in (False, True):
        mocker.patch("vllm_ascend_ct.ascend_base.prefers_nz", return_value=prefers_nz)
        code, report = run(tmp_path / "report.json")
        assert code == 0 and report["soc"] == soc.value
        for found in report["results"]:
            assert found["fault"] is None and found["error"] > 0
            assert found["ratios"].keys() == {"1", "16"}
            made |= found["calls"]
        kinds = {(found["kind"], found["layout"]) for found in report["results"]}
        for kind, choice in CHOICES.items():
            if soc in choice.chips:
                assert {(kind, name) for name in choice.names} <= kinds
    assert made == {
        compare_layouts.call(row.form): row.source
        for row in PRECEDENTS
        if soc in row.chips and row.form.kind not in UNANNOUNCED
    }


def test_a_wrong_one_is_found(
    tmp_path: Path,
    mocker: MockerFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nibbles are swapped in one of two layouts."""
    pack = int4.pack_outputs

    def swapped(*arguments: Any) -> torch.Tensor:
        words = pack(*arguments)
        return ((words >> 4) & 0x0F0F0F0F) | ((words & 0x0F0F0F0F) << 4)

    mocker.patch.object(int4, "pack_outputs", swapped)
    code, report = run(tmp_path / "report.json")
    faults = {(r["kind"], r["layout"]): r["fault"] for r in report["results"]}
    assert code == 1 and faults.pop(("w4a16-group", "contiguous")) == "wrong"
    assert faults["w4a16-group", "transposed"] is None
    out = capsys.readouterr().out
    assert "VLLM_ASCEND_CT_LAYOUT=w4a16-group=transposed" in out


def test_one_that_raises_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    """A chip may reject an unproven call."""
    raising = mocker.patch.object(torch.ops.npu, "npu_quantize")
    raising.side_effect = RuntimeError("not supported")
    code, report = run(tmp_path / "report.json")
    faults = {(r["kind"], r["layout"]): r["fault"] for r in report["results"]}
    assert code == 1
    assert faults["w8a8-static", "reciprocal"] == "RuntimeError: not supported"
    assert faults["w4a16-group", "contiguous"] is None


def test_nan_is_wrong() -> None:
    """Also if only the results of many rows are NaN."""
    rows = {m: torch.ones(m, 4) for m in (1, 16)}

    def product(x: torch.Tensor) -> torch.Tensor:
        return x * torch.nan if len(x) > 1 else x

    layer = Layer(product, torch.Tensor.double, ())
    found = compare_layouts.measured(layer, rows, dict.fromkeys(rows, 1.0), "cpu")
    assert found["fault"] == "wrong" and found["error"] is None


def result(layout: str, fault: str | None, ratio: float, error: float) -> Result:
    times = {1: ratio, 64: ratio}
    return Result("kind", layout, fault, error, times, times)


RIGHT, SLOW, FAST = (None, 1.0, 1e-3), (None, 0.99, 1e-3), (None, 0.5, 1e-3)
WRONG, INEXACT = ("wrong", 0.5, 1.0), (None, 0.5, 4e-3)
NOTHING = "Every default is correct"


@pytest.mark.parametrize(
    ("default", "other", "text"),
    [
        (RIGHT, FAST, "Better than the default: VLLM_ASCEND_CT_LAYOUT=kind=second"),
        (WRONG, RIGHT, "Better than the default: VLLM_ASCEND_CT_LAYOUT=kind=second"),
        (RIGHT, SLOW, NOTHING),
        (RIGHT, WRONG, NOTHING),
        (RIGHT, INEXACT, NOTHING),
        (WRONG, WRONG, "kind: no layout gives correct results; do not serve"),
    ],
)
def test_advice(default: Any, other: Any, text: str) -> None:
    found = [result("first", *default), result("second", *other)]
    assert compare_layouts.advice(found, "npu").startswith(text)


def test_sizes_that_some_layouts_do_not_take() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["check-npu", "--k", "4100"])
    assert exit_.value.code == 2
