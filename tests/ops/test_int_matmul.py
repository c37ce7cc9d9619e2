# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Integer matmul is exact with every method.

Which method an operator uses depends on the CPU, so the tests force each of them.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_mock import MockerFixture

from tests.ops.calls import int8, packed_int4, quant_matmul_call
from vllm_ascend_ct.ops.emulated import (
    float_matmul,
    int_matmul,
    packed_int8,
    scaled_int8,
)
from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.ops.limits import LIMITS
from vllm_ascend_ct.ops.soc import Soc

MAX_K = LIMITS[Soc.A2].quant_matmul.max_size
MAX_INT4_K = LIMITS[Soc.A2].a8w4.max_k
PATHS = {
    "int_mm": {"int_mm_is_fast": True, "packing_pays": False},
    "packed": {"int_mm_is_fast": False, "packing_pays": True, "saturates": False},
    "split": {"int_mm_is_fast": False, "packing_pays": True, "saturates": True},
    "float": {"int_mm_is_fast": False, "packing_pays": False},
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, mocker: MockerFixture) -> Iterator[str]:
    """Force a method, if this CPU supports it."""
    if request.param == "int_mm" and not packed_int8.is_exact(
        torch._int_mm, packed_int8.EXTREMES
    ):
        pytest.skip("torch._int_mm is not exact on this CPU, so it is never taken")
    if request.param == "packed" and packed_int8.saturates():
        pytest.skip("oneDNN saturates on this CPU, so weights are split")
    for name, value in PATHS[request.param].items():
        module = packed_int8 if name == "saturates" else int_matmul
        mocker.patch.object(module, name, return_value=value)
    mocker.patch.object(int_matmul, "packs_scaled", return_value=False)
    derived.clear()
    yield request.param
    derived.clear()


def normal(n: int, k: int) -> torch.Tensor:
    """int8 values like weights of models: hardly any neighbours overflow 16 bits."""
    values = torch.randn(n, k)
    scale = 127 / values.abs().amax(1, keepdim=True)
    return (values * scale).round().to(torch.int8)


def alternating(n: int, k: int) -> torch.Tensor:
    row = torch.tensor([-128, 127], dtype=torch.int8).repeat(-(-k // 2))[:k]
    return row.expand(n, k).contiguous()


FILLS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "lowest": lambda n, k: torch.full((n, k), -128, dtype=torch.int8),
    "highest": lambda n, k: torch.full((n, k), 127, dtype=torch.int8),
    "alternating": alternating,
    "normal": normal,
    "uniform": int8,
}


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Product in float64, which represents every such integer exactly."""
    return x.double() @ weight.double()


# Multiples of the block sizes 1024 (float32; packed) and 4096 (packed), less and more.
@pytest.mark.parametrize("k", [1, 62, 1023, 1024, 1025, 3072, 4098, 9000])
@pytest.mark.parametrize("m", [1, 2, 70])
def test_exact(path: str, m: int, k: int) -> None:
    for x_fill, weight_fill in itertools.product(FILLS.values(), FILLS.values()):
        x, rows = x_fill(m, k), weight_fill(40, k)
        expected = reference(x, rows.t())
        for weight in (rows.t(), rows.t().contiguous()):
            product = int_matmul.int_matmul(x, weight)
            assert product.dtype in (torch.int32, torch.float32)
            assert torch.equal(product.double(), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_exact_where_strides_tell_nothing(path: str, k: int, n: int) -> None:
    for m in (1, 2, 70):
        x, rows = int8(m, k), int8(n, k)
        for weight in (rows.t(), rows.t().contiguous()):
            product = int_matmul.int_matmul(x, weight)
            assert torch.equal(product.double(), reference(x, weight))


@pytest.mark.parametrize("k", [1, 1024, 9000])
@pytest.mark.parametrize("size", [1, 40])
def test_scaled_is_rounded_once(path: str, size: int, k: int) -> None:
    x, rows, scale = int8(3, k), normal(40, k), torch.rand(size)
    expected = (reference(x, rows.t()).float().double() * scale).float()
    assert torch.equal(int_matmul.scaled_int_matmul(x, rows.t(), scale), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 62, 1023, 9000, MAX_K])
@pytest.mark.parametrize("m", [1, 3, 70])
def test_vllms_scaled_product(m: int, k: int, dtype: torch.dtype) -> None:
    """The kernel of vLLM rounds in each step as the operator does."""
    import vllm._custom_ops  # noqa: F401

    if not scaled_int8.packs_scaled(dtype):
        pytest.skip("vLLM's int8 kernels are not exact on this CPU: never taken")
    scale, row_scale = torch.rand(40) / 1e4, torch.rand(m)
    for x_fill, fill in itertools.product(FILLS.values(), FILLS.values()):
        x, rows = x_fill(m, k), fill(40, k)
        product = reference(x, rows.t()).float()
        for weight in (rows.t(), rows.t().contiguous()):
            packed = scaled_int8.ScaledInt8(weight, dtype)
            for factor in (1, 2):
                result = packed.product(x, scale * factor, row_scale)
                expected = product * (scale * factor) * row_scale.unsqueeze(1)
                assert result.dtype == dtype
                assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("in_int32", [True, False])
def test_sums_that_a_cpu_rounds_are_not_packed(
    mocker: MockerFixture, in_int32: bool
) -> None:
    """A CPU that rounds before it shifts gets half as much to add."""
    mocker.patch.object(packed_int8, "saturates", return_value=False)
    mocker.patch.object(packed_int8, "shifts_in_int32", return_value=in_int32)
    most = (1 << 24) // (128 if in_int32 else 255) // 127
    for k, packs in ((most, True), (most + 1, False)):
        weight = torch.full((k, 8), 127, dtype=torch.int8)
        assert (packed_int8.pack(weight) is not None) == packs


def test_a_weight_is_packed_once(mocker: MockerFixture) -> None:
    """Scales that are computed in each call do not pack the weight again."""
    import vllm._custom_ops  # noqa: F401

    if not scaled_int8.packs_scaled(torch.float32):
        pytest.skip("vLLM's int8 kernels are not exact on this CPU: never taken")
    derived.clear()
    packs = mocker.spy(int_matmul, "ScaledInt8")
    x, weight, scale = int8(3, 64), normal(40, 64).t(), torch.rand(40)
    for _ in range(3):
        int_matmul.scaled_int_matmul(x, weight, scale.clone())
    assert packs.call_count == 1


@pytest.mark.parametrize("m", [1, 3])
def test_independent_of_the_default_dtype(m: int) -> None:
    """An engine sets the model's dtype as default while it loads weights."""
    import vllm._custom_ops  # noqa: F401

    x, weight, scale = int8(m, 64), normal(40, 64).t(), torch.rand(40)
    expected = reference(x, weight).float() * scale
    derived.clear()
    for probe in (
        packed_int8.packing_pays,
        packed_int8.saturates,
        packed_int8.shifts_in_int32,
    ):
        probe.cache_clear()
    for cached in (scaled_int8._is_exact, packed_int8._per_channel):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = int_matmul.scaled_int_matmul(x, weight, scale)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result, expected)


def test_scaled_products_follow_their_weight() -> None:
    """Writing to a weight or its scale is not missed by the packed copy."""
    import vllm._custom_ops  # noqa: F401

    derived.clear()
    x, weight, scale = int8(3, 64), normal(40, 64).t(), torch.rand(40)
    for source in (weight, scale):
        source.copy_(source.flip(1) if source.dim() == 2 else source + 1)
        expected = reference(x, weight).float() * scale
        assert torch.equal(int_matmul.scaled_int_matmul(x, weight, scale), expected)


@pytest.mark.parametrize("k", [MAX_K, MAX_K - 1])
def test_exact_at_the_largest_k(path: str, k: int) -> None:
    for fill in FILLS.values():
        x, rows = fill(3, k), fill(8, k)
        product = int_matmul.int_matmul(x, rows.t())
        assert torch.equal(product.double(), reference(x, rows.t()))


def test_exact_over_several_chunks(path: str, mocker: MockerFixture) -> None:
    """The float32 method widens a block of columns at a time."""
    mocker.patch.object(float_matmul, "_VALUES", 1000)
    x, rows = int8(5, 300), normal(41, 300)
    for weight in (rows.t(), rows.t().contiguous()):
        product = int_matmul.int_matmul(x, weight)
        assert torch.equal(product.double(), reference(x, weight))


@pytest.mark.parametrize(
    ("k", "group_size"), [(512, 256), (1024, 1024), (MAX_INT4_K - 1, MAX_INT4_K - 1)]
)
@pytest.mark.parametrize("m", [1, 70])
def test_int4_products_are_exact(path: str, m: int, k: int, group_size: int) -> None:
    lowest = torch.full((k, 2), 0x88888888 - (1 << 32), dtype=torch.int32)
    for packed in (lowest, packed_int4(k, 2)):
        weight = unpack_int4(packed)
        for x in (
            torch.full((m, k), -8, dtype=torch.int8),
            torch.randint(-8, 8, (m, k), dtype=torch.int8),
        ):
            products = list(int_matmul.int4_products(x, packed, group_size))
            groups = zip(
                products,
                x.split(group_size, dim=1),
                weight.split(group_size),
                strict=True,
            )
            for product, x_part, part in groups:
                assert torch.equal(product.double(), reference(x_part, part))


@pytest.mark.parametrize("in_int32", [True, False])
def test_weights_of_models_are_packed(mocker: MockerFixture, in_int32: bool) -> None:
    """With a rest; and if a sum could exceed 2**24, in blocks or not at all."""
    mocker.patch.object(packed_int8, "saturates", return_value=True)
    mocker.patch.object(packed_int8, "shifts_in_int32", return_value=in_int32)
    k = packed_int8.block_size()
    weight = normal(64, k).t()
    packed = packed_int8.pack(weight)
    assert packed is not None and packed.rest is not None
    assert 0 < packed.rest.values().numel() < 0.02 * weight.numel()
    assert weight.numel() < packed.nbytes < 1.2 * weight.numel()
    assert packed_int8.pack(FILLS["lowest"](8, 1024).t()) is None
    assert packed_int8.pack(normal(8, 1023).t()) is None
    wide = torch.full((8, k // 2), 64, dtype=torch.int8)
    assert packed_int8.pack(wide[:, ::2].t()) is not None
    assert packed_int8.pack(torch.cat((wide, wide, wide), dim=1).t()) is None


def test_the_rest_keeps_neighbours_from_overflowing() -> None:
    """Within oneDNN's inputs: 255 times two weights of one sign fits into 16 bits."""
    every = torch.arange(-128, 128, dtype=torch.int16)
    pairs = torch.cartesian_prod(every, every)
    bounded, rest = packed_int8.split_pairs(pairs.unsqueeze(0))
    assert torch.equal(bounded + rest, pairs.unsqueeze(0))
    for sign in (bounded.clamp(min=0), bounded.clamp(max=0)):
        assert 255 * sign.long().sum(-1).abs().max() < 2**15
    sums = pairs.clamp(min=0).int().sum(1), -pairs.clamp(max=0).int().sum(1)
    needed = (sums[0] > 128) | (sums[1] > 128)
    assert torch.equal(rest[0].any(-1), needed)


def test_without_instructions_nothing_is_asked_of_onednn(mocker: MockerFixture) -> None:
    mocker.patch("torch.cpu._is_avx2_supported", return_value=False)
    mocker.patch("torch.cpu._is_vnni_supported", return_value=False)
    for choice in (int_matmul.int_mm_is_fast, packed_int8.packing_pays):
        assert not choice.__wrapped__()


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE"])
def test_exact_with_fewer_instructions(isa: str) -> None:
    """Where oneDNN uses fewer instructions than torch reports, its kernels saturate."""
    script = """
import torch
from tests.ops.test_int_matmul import FILLS, reference
from vllm_ascend_ct.ops.emulated.int_matmul import int_matmul
for k, n in ((512, 64), (1024, 1100)):
    rows = [fill(n, k) for fill in FILLS.values()]
    for x in (fill(m, k) for fill in FILLS.values() for m in (1, 8)):
        for weight in (row.t() for row in rows):
            for copy in (weight, weight.contiguous()):
                assert torch.equal(int_matmul(x, copy).double(), reference(x, copy))
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_a_packed_weight_follows_changes(path: str) -> None:
    call = quant_matmul_call(torch.int32, pertoken=False)
    call.args[1] = normal(48, 128).t()
    for data in (call.args[1], call.args[1].data):
        call.run()
        data.copy_(normal(48, 128).t())
        assert torch.equal(call.run().double(), reference(*call.args[:2]))
    assert len(derived) == (path in ("packed", "split"))
