# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""MXFP8 and MXFP4 on A5, compared with float64, value by value."""

import math
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.formula import relative_error
from tests.ops.calls import (
    EXPERTS,
    GROUPED_ROWS,
    Call,
    K,
    M,
    N,
    changed,
    e2m1,
    exponents,
    fp8,
    int8,
    mx_grouped_call,
    mx_matmul_call,
    scales,
    x,
)
from tests.ops.test_float8 import TOLERANCES, e4m3
from tests.ops.test_refusals import to_meta
from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops.dtypes import E2M1, E8M0, FP8
from vllm_ascend_ct.ops.emulated import quant_matmul_mx

REAL = find_spec("torch_npu") is not None
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
BITS = pytest.mark.parametrize("bits", [8, 4])
# Finite values of each format, from its definition, by code and without the sign.
GRIDS = {
    8: [e4m3(code) for code in range(0x7F)],
    4: [0, 0.5, 1, 1.5, 2, 3, 4, 6],
}


@pytest.fixture(autouse=True)
def on_a5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")


def quantize(
    x: torch.Tensor, bits: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    dst_type = FP8 if bits == 8 else E2M1
    q, scale = torch.ops.npu.npu_dynamic_mx_quant(x, dst_type=dst_type, **options)
    assert q.dtype == (FP8 if bits == 8 else torch.uint8)
    assert q.shape == (*x.shape[:-1], x.shape[-1] * bits // 8)
    assert scale.dtype == torch.uint8
    assert scale.shape == (*x.shape[:-1], math.ceil(x.shape[-1] / 64), 2)
    return q, scale


def codes_of(q: torch.Tensor, bits: int) -> list[int]:
    stored = q.view(torch.uint8).flatten().tolist()
    if bits == 8:
        return stored
    return [half for byte in stored for half in (byte % 16, byte // 16)]


def decoded(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Values before they are scaled, float64 `[R, K]`."""
    sign = 1 << (bits - 1)
    values = [
        GRIDS[bits][code % sign] * (-1 if code & sign else 1)
        for code in codes_of(q, bits)
    ]
    return torch.tensor(values, dtype=torch.float64).view(len(q), -1)


def factors(scale: torch.Tensor, k: int) -> torch.Tensor:
    """Scales `[R, ceil(K / 64), 2]` of each element, float64 `[R, K]`."""
    powers = 2.0 ** (scale.flatten(1).double() - 127)
    return powers.repeat_interleave(32, 1)[:, :k]


def nearest(value: float, bits: int, half_to_even: bool = True) -> int:
    """Code of the nearest value, without the sign."""
    grid = [Fraction(entry) for entry in GRIDS[bits]]
    size = min(abs(Fraction(value)), grid[-1])
    distance = min(abs(size - entry) for entry in grid)
    nearby = [c for c, entry in enumerate(grid) if abs(size - entry) == distance]
    if half_to_even:
        return next((code for code in nearby if code % 2 == 0), nearby[0])
    return nearby[-1]


@BITS
@DTYPES
@pytest.mark.parametrize("k", [32, 96, 128, 40])
def test_dynamic_mx_quant(dtype: torch.dtype, bits: int, k: int) -> None:
    """Also with an odd number of blocks, and an incomplete one."""
    rows = (torch.randn(6, k) * 10.0 ** torch.randint(-3, 4, (6, 1))).to(dtype)
    q, scale = quantize(rows, bits)
    largest = math.floor(math.log2(GRIDS[bits][-1]))
    for row, codes, stored in zip(rows, q, scale):
        expected = [
            math.floor(math.log2(float(block.abs().max()))) - largest + 127
            for block in row.split(32)
        ]
        expected += [0] * (len(expected) % 2)
        assert stored.flatten().tolist() == expected
        quotients = (row.double() / factors(stored.unsqueeze(0), k)[0]).tolist()
        signs = [1 << (bits - 1) if value < 0 else 0 for value in quotients]
        nearby = [nearest(value, bits) for value in quotients]
        made = codes_of(codes, bits)
        assert made == [code | sign for code, sign in zip(nearby, signs)]


@BITS
def test_dynamic_mx_quant_of_more_axes(bits: int) -> None:
    rows = torch.randn(2, 3, 64).half()
    q, scale = quantize(rows, bits)
    flat, flat_scale = quantize(rows.view(6, 64), bits)
    assert torch.equal(q.view(torch.uint8).flatten(), flat.view(torch.uint8).flatten())
    assert torch.equal(scale.flatten(), flat_scale.flatten())


def middles(bits: int) -> torch.Tensor:
    """Middles of adjacent values in one block of 32, whose scale is 1."""
    grid = torch.tensor(GRIDS[bits])
    between = ((grid[1:] + grid[:-1]) / 2)[-15:]
    row = torch.cat((between, -between, grid[-1:]))
    return torch.cat((row, torch.zeros(32 - len(row)))).half().unsqueeze(0)


@BITS
def test_rounds_half_to_even(bits: int) -> None:
    row = middles(bits)
    q, scale = quantize(row, bits)
    assert scale[0, 0, 0] == 127
    sign = (1 << (bits - 1)) - 1
    codes = [code & sign for code in codes_of(q, bits)]
    assert codes == [nearest(float(value), bits) for value in row[0]]
    assert not any(code % 2 for code in codes[: 30 if bits == 8 else 14])


def test_rounds_half_away_from_zero() -> None:
    row = middles(4)
    q, _ = quantize(row, 4, round_mode="round")
    codes = [code & 7 for code in codes_of(q, 4)]
    assert codes == [nearest(float(value), 4, False) for value in row[0]]
    assert codes[:7] == [1, 2, 3, 4, 5, 6, 7]


@BITS
def test_saturates(bits: int) -> None:
    """The largest power of two is below the largest value."""
    largest = GRIDS[bits][-1]
    row = torch.full((1, 32), 2.0 ** math.ceil(math.log2(largest)) * 0.99).bfloat16()
    q, scale = quantize(row, bits)
    assert scale[0, 0, 0] == 127 and float(row[0, 0]) > largest
    assert (decoded(q, bits) == largest).all()


@BITS
def test_blocks_without_an_exponent(bits: int) -> None:
    """Zeros, values below the smallest scale, and what is not finite."""
    rows = torch.zeros(4, 32).bfloat16()
    rows[1] = 2.0**-126
    rows[2, 5], rows[3, 7] = math.inf, math.nan
    q, scale = quantize(rows, bits)
    assert scale[:, 0, 0].tolist() == [0, 0, 255, 255]
    assert not any(codes_of(q[:2], bits))
    if bits == 8:
        assert q[2:].float().isnan().all()


@BITS
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [K, 96, 40])
def test_matmul(dtype: torch.dtype, bits: int, k: int, bias: bool) -> None:
    call = mx_matmul_call(bits, dtype, k)
    if not bias:
        call.kwargs["bias"] = None
    check(call, bits, k, dtype)


def check(call: Call, bits: int, k: int, dtype: torch.dtype) -> None:
    y = call.run()
    x1, x2, scale = call.args
    rows = decoded(x1, bits) * factors(call.kwargs["pertoken_scale"], k)
    stored = x2.t().contiguous(), scale.transpose(0, 1).contiguous()
    expected = rows @ (decoded(stored[0], bits) * factors(stored[1], k)).t()
    if call.kwargs["bias"] is not None:
        expected = expected + call.kwargs["bias"].double()
    assert y.dtype == dtype and y.shape == (M, N)
    assert relative_error(y, expected) < TOLERANCES[dtype]


def test_transposed_float8() -> None:
    scale = exponents(N, 2, 2).transpose(0, 1)
    call = changed(mx_matmul_call(8), {1: fp8(N, K).t(), 2: scale})
    check(call, 8, K, torch.bfloat16)


@BITS
def test_scale_that_is_not_a_number(bits: int) -> None:
    call = mx_matmul_call(bits)
    call.args[2][1, 3, 0] = 255
    assert call.run().isnan().any(0).nonzero().flatten().tolist() == [3]


@BITS
def test_matmul_some_outputs_at_once(mocker: Any, bits: int) -> None:
    call = mx_matmul_call(bits)
    whole = call.run()
    mocker.patch.object(quant_matmul_mx, "_VALUES", 1000)
    torch.testing.assert_close(call.run(), whole, rtol=2**-7, atol=1e-3)


def quant(*, input: torch.Tensor | None = None, **options: Any) -> Call:
    return Call("npu_dynamic_mx_quant", [x() if input is None else input], options)


def product(
    bits: int, args: dict[int, Any] | None = None, k: int = K, **kwargs: Any
) -> Call:
    return changed(mx_matmul_call(bits, k=k), args, **kwargs)


PAIRED = exponents(N, 2, 2).transpose(0, 1)
REFUSED: dict[str, Callable[[], Call]] = {
    "input is float32": lambda: quant(input=x(torch.float32)),
    "input is bfloat16 .0, 64.*not empty": lambda: quant(input=x()[:0, :64]),
    "axis=0, block_size=32": lambda: quant(axis=0),
    "axis=-1, block_size=64": lambda: quant(block_size=64),
    "scale_alg, dst_type_max": lambda: quant(dst_type=FP8, scale_alg=1),
    "dst_type_max and max_low": lambda: quant(dst_type_max=6.0),
    "max_low_bound are": lambda: quant(dst_type=FP8, scale_alg=1, max_low_bound=1.0),
    "dtype number 297": lambda: quant(dst_type=297),
    "dst_type=1; emulated": lambda: quant(dst_type=torch.int8),
    "round_mode=floor; emulated: rint, round": lambda: quant(round_mode="floor"),
    "round_mode=round; emulated: rint": lambda: quant(dst_type=FP8, round_mode="round"),
    "even last size": lambda: quant(input=torch.randn(2, 33).half()),
    "offset and y_scale": lambda: product(8, offset=torch.zeros(N)),
    "y_scale of MX": lambda: product(8, y_scale=torch.zeros(1, N)),
    "without scale_dtype": lambda: product(8, scale_dtype=None),
    f"dtypes of scales .{E8M0}, None.; emulated": lambda: product(
        8, pertoken_scale_dtype=None
    ),
    r"group_sizes=\[1, 1, 64\]": lambda: product(8, group_sizes=[1, 1, 64]),
    "group_sizes=None": lambda: product(8, group_sizes=None),
    "x is int8": lambda: product(8, {0: int8(M, K)}),
    "x is float8.*given dtypes .296, None": lambda: product(8, x1_dtype=E2M1),
    "weight is uint8 .*dtypes .None": lambda: product(
        8, {1: e2m1(N, K // 2).t()}, x2_dtype=None
    ),
    "x is uint8 .1, 5, 64.": lambda: product(4, {0: e2m1(1, M, K // 2)}),
    "x is float8.* emulated: contiguous": lambda: product(8, {0: fp8(K, M).t()}),
    "weight is uint8 .*emulated for E2M1: a view": lambda: product(
        4, {1: e2m1(K // 2, N)}
    ),
    "K of x1 is 128, of x2 64": lambda: product(4, {1: e2m1(N, K // 4).t()}),
    "dtype torch.int8": lambda: product(8, output_dtype=None),
    "dtype torch.float32": lambda: product(8, output_dtype=torch.float32),
    "K=65568; supported: 1 to 65535": lambda: product(4, k=65568),
    "N=65536; supported": lambda: product(4, {1: e2m1(65536, K // 2).t()}),
    "bias is bfloat16": lambda: product(8, bias=torch.zeros(N).bfloat16()),
    r"bias is float32 \(1, 48\)": lambda: product(8, bias=torch.zeros(1, N)),
    "pertoken_scale is missing": lambda: product(8, pertoken_scale=None),
    "pertoken_scale is float32": lambda: product(8, pertoken_scale=scales(M)),
    r"pertoken_scale is uint8 \(5, 4\)": lambda: product(
        8, pertoken_scale=exponents(M, 4)
    ),
    "^(?!.*pertoken).* scale is uint8 .*contiguous": lambda: product(8, {2: PAIRED}),
    "scale is uint8 .*, transposed": lambda: product(4, {2: PAIRED.contiguous()}),
    r"scale is uint8 \(48, 2, 2\)": lambda: product(8, {2: exponents(N, 2, 2)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    call = REFUSED[message]()
    with pytest.raises(OperatorLimitError, match=message):
        call.run()
    if REAL:
        # torch_npu's meta functions check less.
        return
    call.args = [to_meta(value) for value in call.args]
    call.kwargs = {name: to_meta(value) for name, value in call.kwargs.items()}
    with pytest.raises(OperatorLimitError, match=message):
        call.run()


@BITS
@pytest.mark.parametrize("k", [K, 96])
@pytest.mark.parametrize("list_type", [0, 1])
def test_grouped_matmul(bits: int, k: int, list_type: int) -> None:
    call = mx_grouped_call(bits, spare=2, k=k)
    counts = call.kwargs["group_list"]
    if list_type == 0:
        call.kwargs.update(group_list=counts.cumsum(0), group_list_type=0)
    (x1,), (weight,) = call.args
    (scale,), (of_rows,) = call.kwargs["scale"], call.kwargs["per_token_scale"]
    (y,) = call.run()
    assert y.shape == (counts.sum() + 2, N) and y[-2:].isnan().all()
    rows = decoded(x1, bits) * factors(of_rows, k)
    expected = torch.cat(
        [
            part
            @ (
                decoded(weight[e].t().contiguous(), bits)
                * factors(scale[e].transpose(0, 1).contiguous(), k)
            ).t()
            for e, part in enumerate(rows[:-2].split(counts.tolist()))
        ]
    )
    assert relative_error(y[:-2], expected) < TOLERANCES[torch.bfloat16]


def test_grouped_matmul_contiguous() -> None:
    call = mx_grouped_call(8)
    (transposed,) = call.run()
    call.args[1] = [call.args[1][0].contiguous()]
    call.kwargs["scale"] = [call.kwargs["scale"][0].contiguous()]
    torch.testing.assert_close(call.run()[0], transposed, equal_nan=True)


def grouped(bits: int = 8, args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    return changed(mx_grouped_call(bits), args, **kwargs)


ROWS = sum(GROUPED_ROWS) + 1
REFUSED_GROUPED: dict[str, Callable[[], Call]] = {
    "bias and antiquant": lambda: grouped(bias=[torch.zeros(EXPERTS, N)]),
    "dtypes of scales .293, None.": lambda: grouped(per_token_scale_dtype=None),
    "weight is .*emulated: 3-D": lambda: grouped(args={1: [fp8(K, N)]}),
    "x is uint8 .*given dtypes .None": lambda: grouped(args={0: [e2m1(ROWS, K // 2)]}),
    "weight is uint8 .* a view": lambda: grouped(4, {1: [e2m1(EXPERTS, K // 2, N)]}),
    "weight is .*contiguous, or views": lambda: grouped(
        args={1: [fp8(EXPERTS * 2, N, K)[::2].transpose(1, 2)]}
    ),
    "K of x is 128, of the weight 64": lambda: grouped(
        args={1: [fp8(EXPERTS, N, 64).transpose(1, 2)]}
    ),
    "dtype torch.float8_e4m3fn; supported": lambda: grouped(output_dtype=None),
    "group_list; supported: int64 .4,": lambda: grouped(
        group_list=torch.ones(3).long()
    ),
    "scale is uint8 .*, transposed": lambda: grouped(
        scale=[exponents(EXPERTS, 2, N, 2)]
    ),
    "scale is missing": lambda: grouped(scale=None),
    "per_token_scale is float32": lambda: grouped(per_token_scale=[scales(ROWS)]),
}


@pytest.mark.parametrize("message", REFUSED_GROUPED)
def test_grouped_refused(message: str) -> None:
    with pytest.raises(OperatorLimitError, match=message):
        REFUSED_GROUPED[message]().run()
