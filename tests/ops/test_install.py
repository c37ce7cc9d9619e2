# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import itertools
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from pytest_mock import MockerFixture

from tests.ops.calls import CALLS, CALLS_310P, CALLS_A5
from vllm_ascend_ct.ops.emulated import (
    grouped_matmul_swiglu_quant,
    install,
    int_matmul,
    packed_int8,
)
from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.registry import OPERATORS

REAL = find_spec("torch_npu") is not None


def test_every_operator_has_a_call_here() -> None:
    calls = [make() for make in (CALLS | CALLS_310P | CALLS_A5).values()]
    assert {operator.name for operator in OPERATORS} == {
        call.operator for call in calls
    }


@pytest.mark.skipif(REAL, reason="tests/real_stack asks torch_npu's meta functions")
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(mocker: MockerFixture, name: str) -> None:
    """Schema, fake tensors and tracing with dynamic shapes agree with the kernel."""
    call = CALLS[name]()
    # opcheck runs on clones, whose memory is not marked as FRACTAL_NZ.
    mocker.patch.object(grouped_matmul_swiglu_quant, "is_nz", return_value=True)
    torch.library.opcheck(
        getattr(torch.ops.npu, call.operator).default, tuple(call.args), call.kwargs
    )


@pytest.mark.parametrize("name", CALLS)
def test_result_is_on_its_own(name: str) -> None:
    """No operator returns or writes its inputs."""
    call = CALLS[name]()
    flat = [arg if isinstance(arg, list) else [arg] for arg in call.args]
    inputs = [arg for args in flat for arg in args if isinstance(arg, torch.Tensor)]
    before = [tensor.clone() for tensor in inputs]
    results = call.run()
    results = (results,) if isinstance(results, torch.Tensor) else results
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert all(r.untyped_storage().data_ptr() not in storages for r in results)
    assert all(map(torch.equal, inputs, before))


@pytest.fixture
def nothing_derived() -> Iterator[None]:
    derived.clear()
    yield
    derived.clear()


@pytest.mark.usefixtures("nothing_derived")
@pytest.mark.parametrize("name", CALLS)
def test_what_is_faster_changes_no_number(name: str, mocker: MockerFixture) -> None:
    """Otherwise machines with other instructions would compute other integers."""
    call, found = CALLS[name](), []
    own = int_matmul.int_mm_is_fast(), packed_int8.packing_pays()
    for choices in itertools.product((False, own[0]), (False, own[1])):
        for choice, value in zip(("int_mm_is_fast", "packing_pays"), choices):
            mocker.patch.object(int_matmul, choice, return_value=value)
        for saturates in (True, packed_int8.saturates()):
            mocker.patch.object(packed_int8, "saturates", return_value=saturates)
            derived.clear()
            results = call.run()
            found.append((results,) if isinstance(results, torch.Tensor) else results)
            mocker.stop(packed_int8.saturates)
    for results in found[1:]:
        assert all(map(torch.equal, found[0], results))


def test_install_is_idempotent() -> None:
    assert install() is install()


def test_install_needs_neither_vllm_nor_a_platform() -> None:
    script = """
import sys
import torch
from vllm_ascend_ct.ops import emulated
emulated.install()
emulated.install()
q, scale = torch.ops.npu.npu_dynamic_quant(torch.ones(2, 8).half())
assert q.eq(127).all()
assert "vllm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(REAL, reason="they exist")
def test_operators_that_exist_keep_their_definition() -> None:
    """With torch_npu's definitions present, only CPU kernels are added."""
    script = """
import torch
library = torch.library.Library("npu", "DEF")
library.define("npu_trans_quant_param(Tensor scale, Tensor? offset=None, "
               "int? round_mode=0) -> Tensor")
torch.library.register_fake("npu::npu_trans_quant_param",
                            lambda scale, *rest: scale.new_empty(7),
                            lib=library)
from vllm_ascend_ct.ops import emulated
emulated.install()
packed = torch.ops.npu.npu_trans_quant_param(torch.ones(1))
assert packed.item() == 0x3F800000 | 1 << 46
meta = torch.ops.npu.npu_trans_quant_param(torch.ones(1, device="meta"))
assert meta.shape == (7,)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
