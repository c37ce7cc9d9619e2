# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The real torch_npu against what is emulated."""

import sys

import pytest
import torch

from vllm_ascend_ct.ops.emulated.registry import OPERATORS, EmulatedOperator

pytestmark = pytest.mark.torch_npu


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_schema(operator: EmulatedOperator) -> None:
    assert "torch_npu" in sys.modules
    ours = torch._C.parse_schema(f"npu::{operator.schema}")
    theirs = getattr(torch.ops.npu, operator.name).default._schema
    assert str(ours) == str(theirs)
