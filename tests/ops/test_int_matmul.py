# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Products of integers are exact by every way to compute them.

Which one an operator takes is measured, so each is forced here on any CPU.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_mock import MockerFixture

from tests.ops.calls import int8, packed_int4, quant_matmul_call
from vllm_ascend_ct.ops.emulated import float_matmul, int_matmul, packed_int8
from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.ops.limits import LIMITS
from vllm_ascend_ct.ops.soc import Soc

MAX_K = LIMITS[Soc.A2].quant_matmul.max_size
MAX_INT4_K = LIMITS[Soc.A2].a8w4.max_k
PATHS = {
    "int_mm": {"_prefers_int_mm": True, "packing_pays": False},
    "packed": {"_prefers_int_mm": False, "packing_pays": True},
    "float": {"_prefers_int_mm": False, "packing_pays": False},
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, mocker: MockerFixture) -> Iterator[str]:
    """Force a way to multiply, if this CPU computes it right."""
    if request.param == "int_mm" and not int_mm_is_exact():
        pytest.skip("torch._int_mm is not exact on this CPU, so it is never taken")
    for name, value in PATHS[request.param].items():
        mocker.patch.object(int_matmul, name, return_value=value)
    derived.clear()
    yield request.param
    derived.clear()


def int_mm_is_exact() -> bool:
    x, weight = torch.full((2, 64), -128), torch.full((64, 16), -128)
    product = torch._int_mm(x.to(torch.int8), weight.to(torch.int8))
    return torch.equal(product.long(), x @ weight)


def normal(n: int, k: int) -> torch.Tensor:
    """int8 as weights of models are: hardly any neighbours overflow 16 bits."""
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
    """In float64, which holds every such integer."""
    return x.double() @ weight.double()


# Of blocks of 1024 (float32) and 4096 (packed): whole ones, and less and more.
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


@pytest.mark.parametrize("k", [MAX_K, MAX_K - 1])
def test_exact_at_the_largest_k(path: str, k: int) -> None:
    for fill in FILLS.values():
        x, rows = fill(3, k), fill(8, k)
        product = int_matmul.int_matmul(x, rows.t())
        assert torch.equal(product.double(), reference(x, rows.t()))


def test_exact_over_several_chunks(path: str, mocker: MockerFixture) -> None:
    """Float32 widens some columns of a weight at a time."""
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


def test_weights_of_models_are_packed(mocker: MockerFixture) -> None:
    """With a rest, and where a sum could pass 2**24, in blocks or not at all."""
    mocker.patch.object(packed_int8, "packing_pays", return_value=True)
    weight = normal(64, 4096).t()
    packed = packed_int8.pack(weight)
    assert packed is not None and packed.rest is not None
    assert 0 < packed.rest.values().numel() < 0.02 * weight.numel()
    assert weight.numel() < packed.nbytes < 1.2 * weight.numel()
    assert packed_int8.pack(FILLS["lowest"](8, 1024).t()) is None
    assert packed_int8.pack(normal(8, 1023).t()) is None
    wide = torch.full((8, 2048), 64, dtype=torch.int8)
    assert packed_int8.pack(wide[:, ::2].t()) is not None
    assert packed_int8.pack(torch.cat((wide, wide), dim=1).t()) is None


def test_the_rest_keeps_neighbours_from_overflowing() -> None:
    """By what oneDNN is given: 255 times two of one sign fits into 16 bits."""
    every = torch.arange(-128, 128, dtype=torch.int16)
    pairs = torch.cartesian_prod(every, every)
    bounded, rest = packed_int8.split_pairs(pairs.unsqueeze(0))
    assert torch.equal(bounded + rest, pairs.unsqueeze(0))
    for sign in (bounded.clamp(min=0), bounded.clamp(max=0)):
        assert 255 * sign.long().sum(-1).abs().max() < 2**15
    sums = pairs.clamp(min=0).int().sum(1), -pairs.clamp(max=0).int().sum(1)
    needed = (sums[0] > 128) | (sums[1] > 128)
    assert torch.equal(rest[0].any(-1), needed)


def test_the_choice_is_made_once(mocker: MockerFixture) -> None:
    measured = [mocker.spy(module, "is_faster") for module in (int_matmul, packed_int8)]
    for choice in (int_matmul._prefers_int_mm, packed_int8.packing_pays):
        choice.cache_clear()
    weight = normal(64, 256).t()

    def count() -> int:
        for rows in (1, 2, 16, 500):
            int_matmul.int_matmul(int8(rows, 256), weight)
        return sum(spy.call_count for spy in measured)

    # Two ways beside float32, with one row and with more.
    first = count()
    assert first <= 4
    assert count() == first


def test_a_packed_weight_follows_changes(path: str) -> None:
    call = quant_matmul_call(torch.int32, pertoken=False)
    call.args[1] = normal(48, 128).t()
    for data in (call.args[1], call.args[1].data):
        call.run()
        data.copy_(normal(48, 128).t())
        assert torch.equal(call.run().double(), reference(*call.args[:2]))
    assert len(derived) == (path == "packed")
