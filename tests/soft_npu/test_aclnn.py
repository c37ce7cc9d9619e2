# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What torch_npu computes itself: by aclnn, and on A5 by nothing else."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.soft_npu
SETUP = """
import torch, torch_npu

x = torch.arange(-12.0, 12.0).reshape(4, 6)
device, fp8 = x.npu(), torch.float8_e4m3fn
"""
# Above the dispatcher, torch_npu computes some operators if it records for gradients.
COMPOSED = """
for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with mode():
        for function in (
            lambda x: x.softmax(-1),
            lambda x: torch.matmul(x, x.t()),
            lambda x: torch.where(x > 0)[0],
            lambda x: x.repeat_interleave(2, 0),
            lambda x: torch.nn.functional.one_hot(x.long().abs(), 13),
            lambda x: x.argsort(descending=True),
            lambda x: x.t().contiguous(),
        ):
            torch.testing.assert_close(function(x.npu()).cpu(), function(x))
device.requires_grad_()
device.softmax(-1)[:, 0].sum().backward()
x.requires_grad_().softmax(-1)[:, 0].sum().backward()
torch.testing.assert_close(device.grad.cpu(), x.grad)
"""
COPIES = """
for dtype in (torch.float32, torch.bfloat16, torch.int8, fp8):
    there = torch.zeros(6, 4, dtype=dtype, device="npu")
    for source in (x.to(dtype), x, x[0].to(dtype), x.to(dtype).t().contiguous().t()):
        expected = torch.zeros(4, 6, dtype=dtype).copy_(source)
        assert torch.equal(there.t().copy_(source).cpu(), expected), (dtype, source)
    here = torch.zeros(6, 4, dtype=dtype).copy_(device.t())
    assert torch.equal(here, x.t().to(dtype))
    pinned = torch.zeros(6, 4).pin_memory().copy_(here)
    there.copy_(pinned, non_blocking=True)
    assert torch.equal(there.cpu(), here)
    assert there.t().tolist() == here.t().tolist()
    for dimensions in range(1, 6):
        there = torch.zeros(4, *[6] * (dimensions - 1), 2, device="npu")[..., 1]
        there.copy_(x[0, 0])
        assert (there == x[0, 0]).all()
"""
FORMATS = """
for dtype in (torch.int8, torch.bfloat16, torch.float16, fp8):
    rows = torch.arange(2 * 33 * 70).reshape(2, 33, 70).remainder(100).to(dtype)
    tiled = torch_npu.npu_format_cast(rows.npu(), 29)
    assert torch_npu.get_npu_format(tiled) == 29
    columns = 32 // rows.element_size()
    size = 2 * -(-70 // columns) * columns * 48 * rows.element_size()
    assert tiled.untyped_storage().nbytes() == size
    assert torch.equal(tiled.cpu(), rows)
    assert torch.equal(torch_npu.npu_format_cast(tiled, 2).cpu(), rows)
"""
REFUSED = """
torch_npu.npu_format_cast(device, 29)
"""


def run(script: str, soc: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SETUP + script]
    variables = os.environ | {"SOFT_NPU_SOC": soc}
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("soc", ["A5", "A2"])
@pytest.mark.parametrize("script", [COMPOSED, COPIES], ids=["composed", "copies"])
def test_as_on_the_cpu(script: str, soc: str) -> None:
    result = run(script, soc)
    assert result.returncode == 0, result.stderr[-2000:]


def test_formats() -> None:
    """A5 casts whether internal formats are allowed or not."""
    result = run(FORMATS, "A5")
    assert result.returncode == 0, result.stderr[-2000:]


def test_what_is_refused_says_its_name() -> None:
    result = run(REFUSED, "A5")
    assert result.returncode != 0
    assert "aclnnNpuFormatCast: of type 0 in format 2 to format 29" in result.stderr
