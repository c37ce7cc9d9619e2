# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The runtime: memory, unwritten memory, streams, properties, faults."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch_npu

from tools.soft_npu import environment

pytestmark = pytest.mark.soft_npu
MIB = 1 << 20


def memory() -> tuple[int, int, int]:
    """Bytes of device 0: total, used, and peak."""
    total, used, peak = torch.ops.soft_npu.memory(0)
    return total, used, peak


def release() -> None:
    gc.collect()
    torch_npu.npu.empty_cache()


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import torch, torch_npu\n{script}"]
    return subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=120
    )


def test_memory_is_counted_exactly() -> None:
    release()
    total, before, _ = memory()
    torch.ops.soft_npu.reset_peak(0)
    # Larger than torch_npu's pools, so it is a separate allocation.
    size = 50 * MIB
    tensor = torch.empty(size - 32, dtype=torch.int8, device="npu")
    assert memory() == (total, before + size, before + size)
    assert torch_npu.npu.mem_get_info() == (total - before - size, total)
    del tensor
    release()
    assert memory() == (total, before, before + size)


def transfers(function: Callable[[], object]) -> tuple[int, ...]:
    """Synchronizations; copies to the host, bytes, copies to the device, bytes."""
    before = torch.ops.soft_npu.transfers()
    function()
    return tuple(n - b for n, b in zip(torch.ops.soft_npu.transfers(), before))


def test_copies_and_synchronizations_are_counted() -> None:
    host, pinned = torch.ones(1000), torch.ones(500).pin_memory()
    device = host.to("npu")
    size = 4 * len(host)
    assert transfers(lambda: host.to("npu")) == (1, 0, 0, 1, size)
    assert transfers(device.cpu) == (1, 1, size, 0, 0)
    assert transfers(lambda: host.copy_(device)) == (1, 1, size, 0, 0)
    assert transfers(lambda: device.copy_(host)) == (1, 0, 0, 1, size)
    half = device[:500]
    assert transfers(lambda: half.copy_(pinned, non_blocking=True)) == (
        *(0, 0, 0),
        *(1, size // 2),
    )
    assert transfers(lambda: device.sum().item())[0] == 1
    assert transfers(lambda: device[device > 0])[0] == 1
    assert transfers(torch_npu.npu.synchronize)[0] == 1
    assert transfers(lambda: device.mul_(2)) == (0, 0, 0, 0, 0)


def test_operator_that_torch_npu_lacks_runs_on_the_host() -> None:
    """As torch_npu 2.10 does it: argument and `out` there, the result back."""
    values = torch.arange(100, dtype=torch.int8)
    device, results = values.npu(), []
    shift = lambda: results.append(torch.bitwise_left_shift(device, 1))  # noqa: E731
    assert transfers(shift) == (3, 2, 2 * len(values), 1, len(values))
    assert torch.equal(results[0].cpu(), values << 1)


def test_out_of_memory_is_the_error_of_a_chip() -> None:
    release()
    total, used, _ = memory()
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(total - used + MIB, dtype=torch.int8, device="npu")
    assert memory()[1] == used
    assert torch.ones(3, device="npu").sum().item() == 3


def test_planted_leak_shows() -> None:
    """Memory that each step keeps shows as less free memory."""
    kept: list[torch.Tensor] = []

    def step(leak: bool) -> None:
        result = torch.zeros(30 * MIB, dtype=torch.int8, device="npu") + 1
        if leak:
            kept.append(result)

    def growth(leak: bool) -> int:
        step(leak)
        release()
        before = memory()[1]
        for _ in range(3):
            step(leak)
        release()
        return memory()[1] - before

    assert growth(leak=False) == 0
    assert growth(leak=True) >= 3 * 30 * MIB


def test_processes_share_a_device() -> None:
    script = """
import os, torch
tensor = torch.empty(100 << 20, dtype=torch.int8, device="npu")
print(torch.ops.soft_npu.memory(0)[1], flush=True)
os._exit(0)  # without giving anything back
"""
    release()
    before = memory()[1]
    result = run(script)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) >= before + 100 * MIB
    assert memory()[1] == before, "what a dead process held is free"


@pytest.mark.parametrize("size", [7, 1 << 10, 5 << 20])
def test_unwritten_memory_is_poison(size: int) -> None:
    """Also if other data was there before."""
    for _ in range(2):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            unwritten = torch.empty(size, dtype=dtype, device="npu")
            assert unwritten.isnan().all()
            unwritten.fill_(1)
        for dtype in (torch.int32, torch.int64, torch.int8):
            unwritten = torch.empty(size, dtype=dtype, device="npu")
            assert (unwritten < 0).all() and not (unwritten == 0).any()
            unwritten.fill_(1)


@pytest.mark.parametrize("size", [3, 5 << 20])
def test_zeros(size: int) -> None:
    zeros = torch.zeros(size, device="npu")
    assert not zeros.any()
    zeros.fill_(3)
    assert (zeros == 3).all() and not zeros.zero_().any()
    assert not zeros.fill_(0).any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.int32])
def test_copies_into_views(dtype: torch.dtype) -> None:
    """As loaders do that fill a part of a parameter."""
    found = torch.zeros(2, 5, 8, dtype=dtype, device="npu")
    expected = torch.zeros(2, 5, 8, dtype=dtype)
    source = torch.arange(15).reshape(5, 3).to(dtype)
    for tensor in (found, expected):
        tensor[1].narrow(1, 2, 3).copy_(source)
        tensor[0].t()[4:7].copy_(source.t())
    assert torch.equal(found.cpu(), expected)


def test_zeros_are_not_pinned() -> None:
    """As op-plugin's, which ignores what torch's own refuses for a device."""
    zeros = torch.zeros(3, device="npu", pin_memory=True)
    assert zeros.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="can be pinned"):
        torch.empty(3, device="npu", pin_memory=True)


def test_pinned_memory() -> None:
    pinned = torch.arange(5).pin_memory()
    assert pinned.is_pinned() and not torch.arange(5).is_pinned()
    assert torch.equal(pinned.to("npu", non_blocking=True).cpu(), torch.arange(5))


def test_streams_and_events() -> None:
    side, event = torch_npu.npu.Stream(), torch_npu.npu.Event(enable_timing=True)
    start = torch_npu.npu.Event(enable_timing=True)
    start.record()
    x = torch.ones(4, device="npu")
    event.record()
    with torch_npu.npu.stream(side):
        side.wait_event(event)
        y = x * 2
    torch_npu.npu.current_stream().wait_stream(side)
    torch_npu.npu.synchronize()
    assert y.tolist() == [2, 2, 2, 2]
    assert event.query() and start.elapsed_time(event) >= 0


def test_threads_share_streams() -> None:
    """What one thread has just given a stream, another may be doing."""
    script = """
import threading

stop = threading.Event()

def copy():
    with torch.npu.stream(torch.npu.Stream()):
        here, there = torch.ones(8).pin_memory(), torch.zeros(8, device="npu")
        while not stop.is_set():
            there.copy_(here, non_blocking=True)

others = [threading.Thread(target=copy) for _ in range(2)]
for other in others:
    other.start()
try:
    x, one = torch.zeros(1 << 18, device="npu"), torch.ones(1 << 18).pin_memory()
    for _ in range(10_000):
        x.copy_(one, non_blocking=True)
        x.add_(1)
finally:
    stop.set()
assert (x == 2).all()
"""
    result = run(script)
    assert result.returncode == 0, result.stderr[-2000:]


def test_generators_repeat() -> None:
    torch.manual_seed(5)
    first, second = torch.rand(4, device="npu"), torch.rand(4, device="npu")
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, device="npu"), first)
    assert not torch.equal(first, second)


PROPERTIES = {
    "A2": ("Ascend910B1", 24, 48),
    "A3": ("Ascend910_9391", 24, 48),
    "310P": ("Ascend310P3", 8, 8),
    "A5": ("Ascend950PR_9589", 32, 64),
}


@pytest.mark.parametrize("soc", PROPERTIES)
def test_properties_by_chip(soc: str) -> None:
    script = """
p = torch.npu.get_device_properties(1)
print(torch.npu.device_count(), p.name, p.cube_core_num, p.vector_core_num)
"""
    result = run(script, SOFT_NPU_SOC=soc, SOFT_NPU_DEVICES="2")
    assert result.returncode == 0, result.stderr[-2000:]
    expected = " ".join(map(str, (2, *PROPERTIES[soc])))
    assert result.stdout.strip().splitlines()[-1] == expected


def test_what_is_not_implemented_says_its_name(
    capfd: pytest.CaptureFixture[str],
) -> None:
    runtime = ctypes.CDLL("libascendcl.so")
    runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert runtime.aclrtMemExportToShareableHandle() != 0
    name = "aclrtMemExportToShareableHandle"
    assert f"{name} was called and is not implemented" in capfd.readouterr().err
    assert name in runtime.aclGetRecentErrMsg().decode()


def test_operator_that_is_not_emulated_says_its_name() -> None:
    x = torch.ones(2, 2, device="npu")
    with pytest.raises(RuntimeError, match="npu::npu_geglu is not emulated"):
        torch_npu.npu_geglu(x)


def test_operator_that_torch_npu_leaves_to_the_cpu() -> None:
    """op-plugin lacks this one. A graph cannot hold the copies to the host and back."""
    x = torch.arange(6, dtype=torch.int32, device="npu").view(2, 3)
    assert (1 << x).tolist() == [[1, 2, 4], [8, 16, 32]]
    empty = torch.empty(0, dtype=torch.int32, device="npu")
    torch.bitwise_left_shift(x, 1, out=empty)
    assert empty.tolist() == [[0, 2, 4], [6, 8, 10]]
    x[:, 1].bitwise_left_shift_(4)
    assert x.tolist() == [[0, 16, 2], [3, 64, 5]]
    with (
        pytest.raises(RuntimeError, match="a copy to the host waits for it"),
        torch_npu.npu.graph(torch_npu.npu.NPUGraph()),
    ):
        1 << x


def test_fault_of_an_allocation() -> None:
    release()
    torch.ops.soft_npu.set_faults("allocate@2")
    size = 30 * MIB
    first = torch.empty(size, dtype=torch.int8, device="npu")
    # torch_npu frees its cache and tries again, which succeeds.
    second = torch.empty(size, dtype=torch.int8, device="npu")
    torch.ops.soft_npu.set_faults("allocate@1+")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(size, dtype=torch.int8, device="npu")
    assert first.numel() == second.numel() == size


def test_fault_of_an_operator() -> None:
    torch.ops.soft_npu.set_faults("operator:aten::mm@2")
    x = torch.eye(2, device="npu")
    assert torch.equal(torch.mm(x, x).cpu(), torch.eye(2))
    with pytest.raises(RuntimeError, match="aten::mm: the kernel failed"):
        torch.mm(x, x)
    assert torch.equal(torch.mm(x, x).cpu(), torch.eye(2))


def test_device_that_does_not_answer() -> None:
    script = """
x = torch.ones(2, device="npu")
torch.ops.soft_npu.set_faults("hang@1")
torch.npu.synchronize()
"""
    result = run(script, ACL_DEVICE_SYNC_TIMEOUT="1")
    assert result.returncode != 0
    assert "the device does not answer" in result.stderr


def test_version_of_cann() -> None:
    """From the installation, which vllm-ascend reads, and from the runtime."""
    installed = torch.version.cann  # type: ignore[attr-defined]
    assert installed == torch_npu.npu.utils.get_cann_version() == environment.CANN
