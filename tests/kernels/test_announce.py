# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Log lines that name a kernel's operator calls."""

import pytest
import torch
from pytest_mock import MockerFixture

from tests.layers.quantized_layers import load, row_case
from vllm_ascend_ct import ascend_base
from vllm_ascend_ct.kernels import announce

pytestmark = pytest.mark.usefixtures("single_rank")

WEIGHT_ONLY = (
    "AscendWNA16LinearKernel calls npu_weight_quant_batchmatmul (w4a16-group, {})."
)
STATIC = (
    "AscendInt8ScaledMMLinearKernel calls npu_quantize (static, reciprocal), "
    "npu_quant_matmul (w8a8-static, {})."
)


@pytest.mark.parametrize(
    ("soc", "layout", "scheme", "text"),
    [
        ("A2", "", "w4a16-g64", WEIGHT_ONLY.format("contiguous")),
        ("A5", "", "w4a16-g64", WEIGHT_ONLY.format("contiguous, unproven on A5")),
        (
            "A2",
            "w4a16-group=transposed",
            "w4a16-g64",
            WEIGHT_ONLY.format("transposed, unproven on A2"),
        ),
        ("A2", "", "w8a8-channel-static-asym", STATIC),
    ],
)
def test_one_line_names_calls_and_what_is_unproven(
    soc: str,
    layout: str,
    scheme: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", layout)
    info = mocker.spy(announce.logger, "info_once")
    load(row_case(512, 96), scheme, torch.bfloat16, bias=True)
    (line,) = info.call_args_list
    # vllm-ascend stores int8 weights in FRACTAL_NZ.
    int8 = "nz" if ascend_base.prefers_nz() else "transposed, unproven on A2"
    assert line.args[0] % line.args[1:] == text.format(int8)
