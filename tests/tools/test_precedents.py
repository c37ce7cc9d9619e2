# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The table of precedents, compared with the calls of layers of every scheme."""

from collections.abc import Iterable

import pytest
import torch
from pytest_mock import MockerFixture

from tests.layers.quantized_layers import MULTIPLIED, MULTIPLIED_EXPERTS
from tools.checkpoints.make_checkpoint import SCHEMES
from tools.numerics.call_forms import form_of
from tools.numerics.record_npu_calls import layers, record
from vllm_ascend_ct.kernels import announce
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.ops.layouts import CHOICES
from vllm_ascend_ct.ops.precedents import PRECEDENTS, Form, precedent
from vllm_ascend_ct.ops.soc import Soc

pytestmark = pytest.mark.usefixtures("single_rank")

# The 310P supports no others.
DTYPES = {Soc.ASCEND_310P: torch.float16}
# Calls of a layer besides those that multiply and quantize.
UNANNOUNCED = ("routing", "activation", "loading")
IN_OTHER_LAYOUTS = ["w4a16-g64", "w4a8-channel", "w8a8-channel-dynamic"]
IN_OTHER_LAYOUTS += ["w8a8-channel-static"]
# One of each way to multiply, for a test that takes seconds.
SOME = ["w4a16-g64-asym", "w8a16-channel", "w4a8-channel", "w8a8-channel-static"]


def made_calls(
    schemes: Iterable[str],
    soc: Soc,
    dtype: torch.dtype | None = None,
    kinds: Iterable[str] = (),
) -> set[Form]:
    """Forms of the calls that layers make on a chip."""
    dtype = dtype or DTYPES.get(soc, torch.bfloat16)
    runs = {name: run for name, run in layers().items() if not kinds or name in kinds}
    calls = record(runs, list(schemes), [dtype])
    return {form_of(*call) for call in calls.values()}


def without_a_row(forms: set[Form], soc: Soc) -> set[Form]:
    """Forms that are not in the table."""
    known = {row.form for row in PRECEDENTS if soc in row.chips}
    return forms - known


def set_chip(
    soc: Soc, prefers_nz: bool, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc.value)
    mocker.patch("vllm_ascend_ct.ascend_base.prefers_nz", return_value=prefers_nz)


@pytest.mark.long
# A2 and A3 have the same limits and the same rows.
@pytest.mark.parametrize("soc", [Soc.A2, Soc.A5, Soc.ASCEND_310P])
def test_each_call_has_a_row_and_each_row_a_call(
    soc: Soc, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    """With and without FRACTAL_NZ in vllm-ascend's settings."""
    looked_up = mocker.spy(announce, "is_proven")
    made: set[Form] = set()
    quantizing = [name for name in SCHEMES if "a8" in name]
    for prefers_nz, schemes in ((True, SCHEMES), (False, quantizing)):
        set_chip(soc, prefers_nz, monkeypatch, mocker)
        made |= made_calls(schemes, soc)
    # Its scales are packed for float16 models only.
    made |= made_calls(["w8a8-channel-static"], soc, torch.float16)
    if soc is Soc.A5:
        made |= made_calls(MULTIPLIED, soc, kinds=["linear"])
        made |= made_calls(MULTIPLIED_EXPERTS, soc, kinds=["experts"])
    # The other layout, if there is a choice.
    others = (f"{k}={c.names[1]}" for k, c in CHOICES.items() if soc in c.chips)
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", ",".join(others))
    made |= made_calls(IN_OTHER_LAYOUTS, soc)
    assert without_a_row(made, soc) == set()
    assert {row.form for row in PRECEDENTS if soc in row.chips} - made == set()
    announced = {call.args[0] for call in looked_up.call_args_list}
    assert announced == {form for form in made if form.kind not in UNANNOUNCED}


def test_some_calls_have_rows(
    monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    set_chip(Soc.A2, True, monkeypatch, mocker)
    made = made_calls(SOME, Soc.A2)
    assert len(made) > 10 and without_a_row(made, Soc.A2) == set()


def test_calls_of_floats_have_proven_rows(
    monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    set_chip(Soc.A5, True, monkeypatch, mocker)
    looked_up = mocker.spy(announce, "is_proven")
    made = made_calls(MULTIPLIED, Soc.A5, kinds=["linear"])
    made |= made_calls(MULTIPLIED_EXPERTS, Soc.A5, kinds=["experts"])
    made = {form for form in made if form.kind not in UNANNOUNCED}
    assert made == {call.args[0] for call in looked_up.call_args_list}
    rows = [precedent(form, Soc.A5) for form in made]
    assert len(rows) == 12 and all(row and row.source for row in rows)


def test_a_call_without_a_row_is_found(mocker: MockerFixture) -> None:
    """A kernel with another layout, and one with an additional call."""
    name = "vllm_ascend_ct.kernels.linear.mixed_precision.ascend.weight_only_layout"

    def contiguous(*_: object) -> torch.Tensor:
        return torch.zeros(512, 12, dtype=torch.int32)

    mocker.patch(name, side_effect=contiguous)
    apply_weights = AscendWNA16LinearKernel.apply_weights

    def quantizing(
        kernel: AscendWNA16LinearKernel, layer: object, x: torch.Tensor, bias: object
    ) -> torch.Tensor:
        torch.ops.npu.npu_convert_weight_to_int4pack(x.new_zeros(8, 8).int())
        return apply_weights(kernel, layer, x, None)

    mocker.patch.object(AscendWNA16LinearKernel, "apply_weights", quantizing)
    kinds = {"linear": layers()["linear"]}
    calls = record(kinds, ["w4a16-channel"], [torch.bfloat16])
    forms = {form_of(*call) for call in calls.values()}
    assert without_a_row(forms, Soc.A2) == {
        Form("npu_weight_quant_batchmatmul", "w4a16-channel", "contiguous"),
        Form("npu_convert_weight_to_int4pack", "unknown", "unknown"),
    }


def test_rows() -> None:
    """One row for each form and chip; A2 and A3 share rows (same kernels)."""
    keys = [(row.form, chip) for row in PRECEDENTS for chip in row.chips]
    assert len(keys) == len(set(keys))
    for row in PRECEDENTS:
        assert (Soc.A2 in row.chips) == (Soc.A3 in row.chips)
        for chip in row.chips:
            assert precedent(row.form, chip) is row
    elsewhere = Form("npu_moe_finalize_routing", "routing", "rows")
    assert precedent(elsewhere, Soc.ASCEND_310P) is None


def test_defaults_come_first() -> None:
    """As `precedents.unproven`, which takes the first row of a kind, assumes."""
    choices = {
        ("npu_weight_quant_batchmatmul", "w4a16-group"): CHOICES["w4a16-group"],
        ("npu_quantize", "static"): CHOICES["w8a8-static"],
    }
    for chip in Soc:
        for kind, choice in choices.items():
            rows = (row for row in PRECEDENTS if row.form[:2] == kind)
            layouts = [row.form.layout for row in rows if chip in row.chips]
            assert not layouts or tuple(layouts) == choice.names
