# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Reserved addresses, physical memory, and vllm-ascend's allocator over them."""

import ctypes
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.soft_npu.test_runtime import MIB, memory, run

pytestmark = pytest.mark.soft_npu
SIZE = 6 * MIB
TO_DEVICE, TO_HOST = 1, 2
INVALID, NO_MEMORY, NOT_SUPPORTED = 100000, 207001, 207000
ON_DEVICE = 1


class Properties(ctypes.Structure):
    """`aclrtPhysicalMemProp`."""

    _fields_ = [
        ("handle_type", ctypes.c_int),
        ("allocation_type", ctypes.c_int),
        ("attribute", ctypes.c_int),
        ("device", ctypes.c_uint32),
        ("location", ctypes.c_int),
        ("reserve", ctypes.c_uint64),
    ]


class Runtime:
    """The functions of virtual memory, which return an error code."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libascendcl.so")
        self.library.aclGetRecentErrMsg.restype = ctypes.c_char_p

    def error(self) -> str:
        return str(self.library.aclGetRecentErrMsg().decode())

    def reserve(self, size: int) -> int:
        address = ctypes.c_void_p()
        call = self.library.aclrtReserveMemAddress
        length = ctypes.c_size_t(size)
        assert call(ctypes.byref(address), length, 0, None, 0) == 0
        assert address.value
        return address.value

    def allocate(self, size: int, device: int = 0) -> tuple[int, ctypes.c_void_p]:
        handle, properties = ctypes.c_void_p(), Properties(device=device)
        code = self.library.aclrtMallocPhysical(
            ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(properties), 0
        )
        return code, handle

    def map(
        self, address: int, handle: ctypes.c_void_p, size: int = SIZE, offset: int = 0
    ) -> int:
        place, length = ctypes.c_void_p(address), ctypes.c_size_t(size)
        code: int = self.library.aclrtMapMem(place, length, offset, handle, 0)
        return code

    def unmap(self, address: int) -> int:
        code: int = self.library.aclrtUnmapMem(ctypes.c_void_p(address))
        return code

    def free(self, handle: ctypes.c_void_p) -> int:
        code: int = self.library.aclrtFreePhysical(handle)
        return code

    def release(self, address: int) -> int:
        code: int = self.library.aclrtReleaseMemAddress(ctypes.c_void_p(address))
        return code

    def location(self, address: int) -> int:
        attributes = (ctypes.c_uint32 * 8)()
        place = ctypes.c_void_p(address)
        assert self.library.aclrtPointerGetAttributes(place, attributes) == 0
        return attributes[1]


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def mapped(runtime: Runtime) -> Iterator[tuple[int, ctypes.c_void_p]]:
    """A range, and the memory that is mapped to all of it."""
    address = runtime.reserve(SIZE)
    code, handle = runtime.allocate(SIZE)
    assert code == runtime.map(address, handle) == 0
    yield address, handle
    runtime.unmap(address)
    runtime.free(handle)
    runtime.release(address)


def copy(target: int, source: int, kind: int) -> int:
    from acl.rt import memcpy

    code: int = memcpy(target, SIZE, source, SIZE, kind)
    return code


def test_granularity(runtime: Runtime) -> None:
    found = ctypes.c_size_t()
    granularity = runtime.library.aclrtMemGetAllocationGranularity
    assert granularity(ctypes.byref(Properties()), 0, ctypes.byref(found)) == 0
    assert found.value == 2 * MIB
    assert runtime.reserve(SIZE) % found.value == 0


def test_physical_memory_is_counted(runtime: Runtime) -> None:
    """Not the addresses, and not the mapping."""
    _, before, _ = memory()
    address = runtime.reserve(SIZE)
    assert memory()[1] == before and runtime.location(address) != ON_DEVICE
    code, handle = runtime.allocate(SIZE)
    assert code == 0 and memory()[1] == before + SIZE
    assert runtime.map(address, handle) == 0 and memory()[1] == before + SIZE
    assert runtime.location(address) == ON_DEVICE
    assert runtime.location(address + SIZE - 1) == ON_DEVICE
    assert runtime.unmap(address) == 0 and memory()[1] == before + SIZE
    assert runtime.location(address) != ON_DEVICE
    assert runtime.free(handle) == 0 and memory()[1] == before
    assert runtime.release(address) == 0 and memory()[1] == before


def test_copies(runtime: Runtime, mapped: tuple[int, ctypes.c_void_p]) -> None:
    """Memory that is mapped anew holds nothing of what was there before."""
    address, handle = mapped
    here = torch.empty(SIZE // 2, dtype=torch.bfloat16)
    assert copy(here.data_ptr(), address, TO_HOST) == 0 and here.isnan().all()
    given = torch.arange(SIZE // 2).to(torch.bfloat16)
    assert copy(address, given.data_ptr(), TO_DEVICE) == 0
    assert copy(here.data_ptr(), address, TO_HOST) == 0 and torch.equal(here, given)
    assert runtime.unmap(address) == runtime.free(handle) == 0
    _, other = runtime.allocate(SIZE)
    assert runtime.map(address, other) == 0
    assert copy(here.data_ptr(), address, TO_HOST) == 0 and here.isnan().all()
    assert runtime.unmap(address) == runtime.free(other) == 0


@pytest.mark.parametrize("kind", [TO_DEVICE, TO_HOST])
@pytest.mark.parametrize("is_released", [False, True])
def test_copy_of_what_is_not_mapped(
    runtime: Runtime, capfd: pytest.CaptureFixture[str], kind: int, is_released: bool
) -> None:
    here = torch.empty(SIZE, dtype=torch.int8)
    address = runtime.reserve(SIZE)
    if is_released:
        assert runtime.release(address) == 0
    places = (address, here.data_ptr())
    assert copy(*(places if kind == TO_DEVICE else places[::-1]), kind) == INVALID
    said = f"aclrtMemcpy: {SIZE} bytes at {address:#x} are not mapped to memory"
    assert said in runtime.error() and said in capfd.readouterr().err


def test_copy_beyond_what_is_mapped(
    runtime: Runtime, mapped: tuple[int, ctypes.c_void_p]
) -> None:
    """A range in two pieces, of which one is mapped, and then both are."""
    address = runtime.reserve(2 * SIZE)
    handles = [runtime.allocate(SIZE)[1] for _ in range(2)]
    here = torch.empty(SIZE, dtype=torch.int8)
    middle = address + SIZE // 2
    assert runtime.map(address, handles[0]) == 0
    assert copy(here.data_ptr(), middle, TO_HOST) == INVALID
    assert runtime.map(address + SIZE, handles[1]) == 0
    assert copy(here.data_ptr(), middle, TO_HOST) == 0
    for i, handle in enumerate(handles):
        assert runtime.unmap(address + i * SIZE) == runtime.free(handle) == 0


def test_access_of_what_is_not_mapped() -> None:
    script = f"""
from tests.soft_npu.test_virtual_memory import Runtime
runtime = Runtime()
torch.npu.set_device(0)
address, (_, handle) = runtime.reserve({SIZE}), runtime.allocate({SIZE})
runtime.map(address, handle)
import ctypes
print(ctypes.string_at(address, 1), flush=True)
runtime.unmap(address)
ctypes.string_at(address, 1)
"""
    result = run(script)
    assert result.returncode == -signal.SIGSEGV and result.stdout


def test_no_memory(runtime: Runtime) -> None:
    total, used, _ = memory()
    size = (total - used + SIZE) // SIZE * SIZE
    code, _ = runtime.allocate(size)
    assert code == NO_MEMORY and memory()[1] == used
    assert f"out of memory: {size} bytes asked for" in runtime.error()


def test_what_cannot_be_allocated(runtime: Runtime) -> None:
    assert runtime.allocate(SIZE + 4096)[0] == INVALID
    assert "is not a multiple of 2097152" in runtime.error()
    assert runtime.allocate(SIZE, device=7)[0] == INVALID
    assert "there is no device 7" in runtime.error()


def test_what_cannot_be_mapped(
    runtime: Runtime, mapped: tuple[int, ctypes.c_void_p]
) -> None:
    address, handle = mapped
    free, (_, other) = runtime.reserve(SIZE), runtime.allocate(SIZE)

    def refused(code: int, error: str, expected: int = INVALID) -> None:
        assert code == expected and error in runtime.error()

    refused(runtime.map(address, other), f"memory is mapped at {address:#x}")
    refused(runtime.map(free, handle), f"the memory is mapped at {address:#x}")
    refused(runtime.map(free, other, SIZE // 3), f"{SIZE // 3} bytes from 0")
    refused(runtime.map(free, other, SIZE, 4096), f"{SIZE} bytes from 4096")
    refused(runtime.map(free + 4096, other), "not in a reserved range, or not aligned")
    refused(runtime.map(free + 2 * MIB, other), "not in a reserved range")
    here = torch.empty(SIZE, dtype=torch.int8).data_ptr()
    refused(runtime.map(here, other), "not in a reserved range")
    refused(runtime.map(free, ctypes.c_void_p(here)), "the memory is not allocated")
    assert runtime.map(free, other) == runtime.unmap(free) == 0
    refused(runtime.map(free, other), "memory that was unmapped", NOT_SUPPORTED)
    assert runtime.free(other) == runtime.release(free) == 0


def test_what_cannot_be_given_back(
    runtime: Runtime, mapped: tuple[int, ctypes.c_void_p]
) -> None:
    address, handle = mapped
    assert runtime.free(handle) == INVALID and "is mapped at" in runtime.error()
    assert runtime.release(address) == INVALID and "memory is mapped" in runtime.error()
    assert runtime.unmap(address + 2 * MIB) == INVALID
    assert runtime.unmap(address) == 0
    assert runtime.unmap(address) == INVALID and "nothing is mapped" in runtime.error()
    assert runtime.free(handle) == 0
    assert runtime.free(handle) == INVALID and "not allocated" in runtime.error()
    assert runtime.release(address) == 0
    assert runtime.release(address) == INVALID
    assert "not the start of a range" in runtime.error()


SLEEPER = """
import gc
from vllm_ascend.device_allocator.camem import CaMemAllocator

torch_npu.npu.config.allow_internal_format = True
x = torch.eye(64, dtype=torch.bfloat16, device="npu")
small = torch.ones(3, device="npu")
allocator = CaMemAllocator.get_instance()
with allocator.use_memory_pool(tag="weights"):
    weights = torch.arange(8 << 20, dtype=torch.int32, device="npu")
    nz = torch_npu.npu_format_cast(torch.ones(64, 64, dtype=torch.bfloat16).npu(), 29)
with allocator.use_memory_pool(tag="kv_cache"):
    cache = torch.zeros(64 << 20, dtype=torch.int8, device="npu")
assert (x @ nz == 1).all()
size = allocator.get_current_usage()
assert size >= weights.nbytes + nz.nbytes + cache.nbytes
info = torch.npu.mem_get_info

def used():
    free, total = info()
    assert torch.ops.soft_npu.memory(0)[1] == total - free
    return total - free

awake = used()
for _ in range(2):
    allocator.sleep(offload_tags=LEVEL)
    assert used() == awake - size, (used(), awake, size)
    allocator.wake_up(tags=["weights"])
    assert awake - size < used() < awake
    allocator.wake_up(tags=["kv_cache"])
    assert used() == awake
assert (small == 1).all()
"""


def test_sleep_that_keeps_weights() -> None:
    script = """
assert torch.equal(weights.cpu(), torch.arange(8 << 20, dtype=torch.int32))
assert (x @ nz == 1).all()
assert (cache != 0).all()
"""
    result = run(SLEEPER.replace("LEVEL", "('weights',)") + script)
    assert result.returncode == 0, result.stderr[-3000:]


def test_sleep_that_discards_weights() -> None:
    """Nothing that was read or decoded before may be found again."""
    script = """
assert (weights < 0).all() and (cache != 0).all()
assert (x @ nz).isnan().all()
weights.fill_(7), nz.copy_(torch.full((64, 64), 2, dtype=torch.bfloat16).npu())
assert (weights == 7).all() and (x @ nz == 2).all()
"""
    result = run(SLEEPER.replace("LEVEL", "()") + script)
    assert result.returncode == 0, result.stderr[-3000:]


def test_what_a_sleep_loses_is_found() -> None:
    script = """
from tools.soft_npu import sleeping
from vllm_ascend.device_allocator.camem import CaMemAllocator

class Kernel:
    pass

model = torch.nn.Linear(8, 8, device="meta")
model.kernel = Kernel()
with CaMemAllocator.get_instance().use_memory_pool(tag="weights"):
    model.to_empty(device="npu")
    model.register_buffer("ids", torch.ones(8, device="npu"), persistent=False)
    model.kernel.table = torch.ones(8, device="npu")
    freed = torch.ones(8, device="npu")
    del freed
model.kernel.part, model.kernel.weight = model.kernel.table[2:], model.weight.t()
gc.freeze()
found = sleeping.unowned(model)
assert found == [["part", "table"]], found
"""
    result = run(f"import gc\n{script}")
    assert result.returncode == 0, result.stderr[-3000:]
