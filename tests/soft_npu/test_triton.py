# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Triton kernels on the software NPU's memory."""

import os

import pytest
import torch
from vllm.triton_utils import tl, triton

from tools.soft_npu import triton_kernels

pytestmark = pytest.mark.soft_npu
# vLLM and vllm-ascend take this name, too, before they launch the first kernel.
exp = tl.exp


@pytest.fixture(autouse=True)
def cores() -> None:
    from vllm_ascend.ops.triton.triton_utils import init_device_properties_triton

    init_device_properties_triton()


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("rope_dim", [32, 64])
def test_rope_is_the_interpreters(
    monkeypatch: pytest.MonkeyPatch, halves: bool, by_position: bool, rope_dim: int
) -> None:
    """The replacement of the kernel gives bit-identical results."""
    from vllm_ascend.ops.triton.rope import rope_forward_triton

    q, k = (
        torch.randn(5, 4, 64).bfloat16().npu(),
        torch.randn(5, 2, 64).bfloat16().npu(),
    )
    if by_position:
        options = {
            "cos_sin_cache": torch.randn(50, rope_dim).npu(),
            "positions": torch.tensor([3, 1, 49, 1, 0]).npu(),
        }
    else:
        table = torch.randn(2, 5, rope_dim // 2).npu()
        options = {"cos": table[0], "sin": table[1]}

    def turn() -> list[torch.Tensor]:
        results = rope_forward_triton(
            q.clone(), k.clone(), rope_dim=rope_dim, is_neox_style=halves, **options
        )
        return [result.cpu() for result in results]

    fast = turn()
    monkeypatch.setattr(triton_kernels, "FAST", {})
    interpreted = turn()
    assert all(map(torch.equal, fast, interpreted))
    assert not torch.equal(fast[0], q.cpu())


def test_rounds_as_a_chip() -> None:
    """To nearest even in bfloat16; triton's own interpreter truncates."""

    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        tl.store(y + offsets, tl.load(x + offsets) * 1.5)

    x = torch.cat((torch.randn(61), torch.tensor([0, torch.inf, torch.nan])))
    y = torch.empty(64, dtype=torch.bfloat16, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=64)
    expected = (x * 1.5).bfloat16()
    assert torch.equal(y.cpu().nan_to_num(7), expected.nan_to_num(7))


def test_computes_with_bfloat16() -> None:
    """Triton's own interpreter computes with its bits."""

    @triton.jit
    def kernel(x, y, z, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        a, b = tl.load(x + offsets), tl.load(y + offsets)
        tl.store(z + offsets, a * b)
        tl.store(z + SIZE + offsets, a - b)
        tl.store(z + 2 * SIZE + offsets, tl.where(a > b, a, b))
        tl.store(z + 3 * SIZE + offsets, offsets.to(tl.bfloat16))
        tl.store(z + 4 * SIZE + offsets, tl.abs(a) + 0.5)

    x, y = torch.randn(2, 64).bfloat16()
    z = torch.empty(5, 64, dtype=torch.bfloat16, device="npu")
    kernel[(1,)](x.npu(), y.npu(), z, SIZE=64)
    numbers = torch.arange(64).bfloat16()
    expected = torch.stack((x * y, x - y, x.maximum(y), numbers, x.abs() + 0.5))
    assert torch.equal(z.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_saturates(dtype: torch.dtype, target: torch.dtype) -> None:
    """Triton's own interpreter wraps around."""

    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        a = tl.load(x + offsets)
        kind = y.dtype.element_ty
        tl.store(y + offsets, a.cast(kind, overflow_mode="saturate"))
        tl.store(y + SIZE + offsets, tl.cast(a, kind, overflow_mode="saturate"))

    values = [0, -1.5, 127.5, 128, 255, 300, -128, -129, 4e4, -4e4, 1e10, -1e10]
    x = torch.tensor([*values, torch.inf, -torch.inf, 2**31, 3]).to(dtype)
    y = torch.empty(2, 16, dtype=target, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=16)
    limits = torch.iinfo(target)
    expected = x.double().trunc().clamp(limits.min, limits.max).to(target)
    assert torch.equal(y.cpu(), expected.expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_slice_beyond_the_end(dtype: torch.dtype) -> None:
    """Kernels read it if a block is longer than a row, and mask it when they store."""

    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        a = tl.load(x + tl.arange(0, SIZE))
        part = triton_kernels.extract_slice(a, (6,), (BLOCK,), (1,))
        tl.store(y + tl.arange(0, BLOCK), part)

    x, y = torch.arange(8).to(dtype), torch.empty(4, dtype=dtype, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=8, BLOCK=4)
    assert y[:2].tolist() == [6, 7]
    rest = y[2:].cpu()
    written = rest == rest if dtype.is_floating_point else rest != -(2**31)
    assert not written.any()


@pytest.mark.parametrize("axis", [1, -1])
def test_reduces_from_the_end(axis: int) -> None:
    """Triton's own interpreter returns a matrix for a negative axis."""

    @triton.jit
    def kernel(x, y, AXIS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        a = tl.load(x + offsets[:, None] * SIZE + offsets[None, :])
        tl.store(y + offsets, tl.argmax(a, axis=AXIS))

    x, y = torch.randn(8, 8), torch.empty(8, dtype=torch.int32, device="npu")
    kernel[(1,)](x.npu(), y, AXIS=axis, SIZE=8)
    assert torch.equal(y.cpu(), x.argmax(-1).int())


@pytest.mark.parametrize("mode", ["trunc", "saturate"])
def test_casts_integers(mode: str) -> None:
    @triton.jit
    def kernel(x, y, z, MODE: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        a = tl.load(x + offsets)
        tl.store(y + offsets, a.cast(tl.int8, overflow_mode=MODE))
        tl.store(z + offsets, a.cast(tl.uint8, overflow_mode=MODE))

    x = torch.tensor([0, 5, -5, 127, 128, -129, 300, -(2**31)], dtype=torch.int32)
    y = torch.empty(8, dtype=torch.int8, device="npu")
    z = torch.empty(8, dtype=torch.uint8, device="npu")
    kernel[(1,)](x.npu(), y, z, MODE=mode, SIZE=8)
    for result in (y, z):
        limits = torch.iinfo(result.dtype)
        kept = x.clamp(limits.min, limits.max) if mode == "saturate" else x
        assert torch.equal(result.cpu(), kept.to(result.dtype))


def test_calls_what_a_module_took_from_the_language() -> None:
    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        tl.store(y + offsets, exp(tl.load(x + offsets)))

    x, y = torch.randn(8), torch.empty(8, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=8)
    assert torch.allclose(y.cpu(), x.exp())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.int64])
def test_inverts(dtype: torch.dtype) -> None:
    """Triton-ascend's own interpreter has no booleans to invert."""

    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        a = tl.load(x + offsets)
        tl.store(y + offsets, ~(a > 0))
        tl.store(y + SIZE + offsets, (~a) > 0)

    x = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0]).to(dtype)
    y = torch.empty(2, 8, dtype=torch.bool, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=8)
    assert torch.equal(y.cpu(), torch.stack((~(x > 0), (~x) > 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_calls_libdevice(dtype: torch.dtype) -> None:
    """Triton's own interpreter calls no library."""

    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        a = tl.load(x + offsets)
        tl.store(y + offsets, tl.extra.cann.libdevice.isnan(a))
        tl.store(y + SIZE + offsets, tl.extra.cann.libdevice.isinf(a))

    values = [0, -1.5, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-7, 6e4]
    x = torch.tensor(values).to(dtype)
    y = torch.empty(2, 8, dtype=torch.bool, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=8)
    assert torch.equal(y.cpu(), torch.stack((x.isnan(), x.isinf())))


def test_rounds_by_libdevice() -> None:
    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        tl.store(y + offsets, tl.extra.cann.libdevice.nearbyint(tl.load(x + offsets)))

    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.4, -2.6, 7])
    y = torch.empty(8, device="npu")
    kernel[(1,)](x.npu(), y, SIZE=8)
    assert torch.equal(y.cpu(), x.round())


def test_function_of_libdevice_that_is_not_emulated_says_its_name() -> None:
    @triton.jit
    def kernel(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        tl.store(x + offsets, tl.extra.cann.libdevice.reciprocal(tl.load(x + offsets)))

    with pytest.raises(Exception, match="__hmf_recipf is not emulated"):
        kernel[(1,)](torch.ones(8).npu(), SIZE=8)


@pytest.mark.skipif(
    not os.environ.get("SOFT_NPU_RELEASE", "").startswith("0.23."),
    reason="vllm-ascend 0.30 replaced this kernel",
)
def test_normalizes_and_rotates() -> None:
    """The kernel of models whose heads have 128 channels, like Qwen3."""
    heads, kv_heads, size, tokens = 4, 2, 128, 5
    table = torch.randn(50, size).bfloat16()
    positions = torch.tensor([3, 1, 49, 1, 0])
    weights = torch.rand(2, size).bfloat16() + 0.5
    x = torch.randn(tokens, (heads + 2 * kv_heads) * size).bfloat16()
    q, k, v = x.split([heads * size, kv_heads * size, kv_heads * size], -1)
    found = torch.ops.vllm.qkv_rmsnorm_rope(
        *(t.npu() for t in (x, table, positions, *weights)),
        *(heads * size, kv_heads * size, size, 1e-6),
    )
    cos, sin = table[positions].double().unsqueeze(1).chunk(2, -1)
    for rows, weight, result in ((q, weights[0], found[0]), (k, weights[1], found[1])):
        rows = rows.double().view(tokens, -1, size)
        rows = rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        a, b = (rows * weight.double()).chunk(2, -1)
        expected = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(1)
        assert (result.cpu().double() - expected).abs().max() < 0.05
    assert torch.equal(found[2].cpu(), v)


def test_kernel_in_a_graph() -> None:
    @triton.jit
    def kernel(x, y, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        mask = offsets < count
        tl.store(y + offsets, tl.load(x + offsets, mask=mask) + 1, mask=mask)

    import torch_npu

    x, y = torch.zeros(10, device="npu"), torch.zeros(10, device="npu")
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        kernel[(3,)](x, y, 10, SIZE=4)
    x.copy_(torch.arange(10.0))
    graph.replay()
    assert torch.equal(y.cpu(), torch.arange(1.0, 11.0))


def test_small_product() -> None:
    """The chip's compiler has no smallest size; the interpreter's is 16."""

    @triton.jit
    def kernel(x, y, z, M: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
        rows, columns = tl.arange(0, M)[:, None], tl.arange(0, K)
        a = tl.load(x + rows * K + columns[None, :])
        b = tl.load(y + columns[:, None] * M + tl.arange(0, M)[None, :])
        tl.store(z + rows * M + tl.arange(0, M)[None, :], tl.dot(a, b))

    x, y = torch.randint(9, (4, 8)).float(), torch.randint(9, (8, 4)).float()
    z = torch.empty(4, 4, device="npu")
    kernel[(1,)](x.npu(), y.npu(), z, M=4, K=8)
    assert torch.equal(z.cpu(), x @ y)
