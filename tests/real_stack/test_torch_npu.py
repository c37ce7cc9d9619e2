# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The real torch_npu's schemas, compared with the emulated operators."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.real_stack.custom_ops import find_schema
from vllm_ascend_ct.ops.emulated.registry import OPERATORS, EmulatedOperator

pytestmark = pytest.mark.torch_npu


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_schema(operator: EmulatedOperator) -> None:
    assert "torch_npu" in sys.modules
    ours = torch._C.parse_schema(f"npu::{operator.schema}")
    theirs = getattr(torch.ops.npu, operator.name).default._schema
    assert str(ours) == str(theirs)


# Differences of the release that production uses, and why they do not matter.
DIFFERENCES = {
    # Always passed.
    "npu_grouped_matmul_swiglu_quant_v2": ("dequant_dtype=6", "dequant_dtype=0"),
    # Never passed.
    "npu_moe_finalize_routing": (", int? k=1", ""),
    "npu_dynamic_mx_quant": (", float max_low_bound=0.", ""),
}


@pytest.fixture(scope="module")
def libraries() -> bytes:
    package = Path(os.environ["REAL_STACK_PRODUCTION"]) / "torch_npu"
    return b"".join(path.read_bytes() for path in package.rglob("*.so"))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_schema_of_production(operator: EmulatedOperator, libraries: bytes) -> None:
    """That release needs another torch; its libraries contain schemas as strings."""
    schema = find_schema(operator.name, libraries)
    new, old = DIFFERENCES.get(operator.name, ("", ""))
    expected = operator.schema.replace(new, old)
    assert (operator.schema != expected) == (operator.name in DIFFERENCES)
    theirs, ours = map(torch._C.parse_schema, (schema, expected))
    assert str(theirs) == str(ours)
