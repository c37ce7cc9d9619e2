# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""FP8 (E4M3) on A5, compared with float64, for every value of the format."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.formula import relative_error
from tests.ops.calls import (
    CALLS_A5,
    Call,
    K,
    M,
    N,
    changed,
    fp8,
    fp8_grouped_call,
    fp8_matmul_call,
    int8,
    scales,
    x,
)
from tests.ops.test_refusals import to_meta
from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops.dtypes import FP8
from vllm_ascend_ct.ops.emulated import float_matmul

REAL = find_spec("torch_npu") is not None
# Tolerance of one rounding.
TOLERANCES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def on_a5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")


def e4m3(code: int) -> float:
    """Decode by the format's definition: 4 exponent bits, 3 mantissa bits."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa * 2**-9 if not exponent else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 128 else size


VALUES = torch.tensor([e4m3(code) for code in range(0x7F)], dtype=torch.float64)


def decoded(q: torch.Tensor) -> torch.Tensor:
    codes = q.view(torch.uint8).flatten().tolist()
    return torch.tensor(list(map(e4m3, codes)), dtype=torch.float64).view(q.shape)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Round float64 to E4M3, ties to the even mantissa."""
    sizes = values.abs().clamp(max=448)
    above = torch.searchsorted(VALUES, sizes).clamp(1, len(VALUES) - 1)
    below = above - 1
    middle = (VALUES[above] + VALUES[below]) / 2
    goes_up = (sizes > middle) | ((sizes == middle) & (above % 2 == 0))
    return VALUES[torch.where(goes_up, above, below)].copysign(values)


def quantize(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = torch.ops.npu.npu_dynamic_quant(x, dst_type=FP8, **options)
    assert q.dtype == FP8 and scale.dtype == torch.float32
    assert q.shape == x.shape and scale.shape == x.shape[:-1]
    return q, scale


@DTYPES
def test_dynamic_quant(dtype: torch.dtype) -> None:
    x = torch.randn(7, 3, 96).to(dtype)
    q, scale = quantize(x)
    amax = x.double().abs().amax(-1)
    torch.testing.assert_close(scale.double(), amax / 448, rtol=2**-22, atol=0)
    # Divide in fp32, like the operator.
    exact = nearest((x.float() / scale.unsqueeze(-1)).double())
    assert torch.equal(decoded(q), exact)
    assert (decoded(q).abs().amax(-1) == 448).all()
    assert relative_error(decoded(q) * scale.unsqueeze(-1), x.double()) < 2**-4


def test_dynamic_quant_rounds_half_to_even() -> None:
    # With amax 448, the quotients are the values themselves.
    middles = (VALUES[1:] + VALUES[:-1]) / 2
    row = torch.cat((middles, -middles, torch.tensor([448.0]).double())).half()
    assert torch.equal(row[:-1].double(), torch.cat((middles, -middles)))
    q, _ = quantize(row.unsqueeze(0))
    assert torch.equal(decoded(q)[0], nearest(row.double()))
    codes = q.view(torch.uint8)[0, : len(middles)]
    assert not (codes & 1).any()


def test_dynamic_quant_saturates() -> None:
    """If a subnormal scale is rounded down, the largest quotient exceeds 448."""
    x = (torch.arange(1, 257) * 2.0**-133).bfloat16().unsqueeze(1)
    q, scale = quantize(x)
    assert (x.float() / scale.unsqueeze(1) > 448).any()
    assert (q.float() == 448).all()


def test_dynamic_quant_of_zeros() -> None:
    q, scale = quantize(torch.zeros(2, 8).half())
    assert not q.float().any() and not scale.any()


def test_dynamic_quant_smooths_first() -> None:
    x, smooth = torch.randn(4, 32).half(), (torch.rand(32) + 0.5).half()
    q, scale = quantize(x, smooth_scales=smooth)
    exact = nearest(((x.float() * smooth.float()) / scale.unsqueeze(1)).double())
    assert torch.equal(decoded(q), exact)


@DTYPES
@pytest.mark.parametrize("size", [N, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul(dtype: torch.dtype, size: int, transposed: bool) -> None:
    weight = fp8(N, K).t() if transposed else fp8(K, N)
    scale = scales(size) * 1e-3
    call = changed(fp8_matmul_call(dtype), {1: weight, 2: scale})
    y = call.run()
    x1, pertoken = call.args[0], call.kwargs["pertoken_scale"]
    expected = decoded(x1) @ decoded(weight.t().contiguous()).t()
    expected = expected * scale.double() * pertoken.double().unsqueeze(1)
    assert y.dtype == dtype and y.shape == (M, N)
    assert relative_error(y, expected) < TOLERANCES[dtype]


def test_matmul_some_columns_at_once(mocker: Any) -> None:
    call = fp8_matmul_call()
    whole = call.run()
    mocker.patch.object(float_matmul, "_VALUES", 1000)
    torch.testing.assert_close(call.run(), whole, rtol=2**-7, atol=1e-6)


@DTYPES
def test_grouped_matmul(dtype: torch.dtype) -> None:
    call = fp8_grouped_call(dtype, spare=2)
    counts, (rows,), (weight,) = call.kwargs["group_list"], *call.args
    (scale,), (of_rows,) = call.kwargs["scale"], call.kwargs["per_token_scale"]
    (y,) = call.run()
    assert y.dtype == dtype and y[-2:].isnan().all()
    expected = torch.cat(
        [
            part @ decoded(weight[e].contiguous()) * scale[e].double()
            for e, part in enumerate(decoded(rows)[:-2].split(counts.tolist()))
        ]
    )
    expected *= of_rows[:-2].double().unsqueeze(1)
    assert relative_error(y[:-2], expected) < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token_scale": None}, "per_token_scale is missing"),
        ({"scale": None}, "scale is missing"),
        ({"bias": [torch.zeros(4, N)]}, "bias is float32"),
        ({"output_dtype": None}, "output dtype torch.float8_e4m3fn"),
    ],
)
def test_grouped_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OperatorLimitError, match=message):
        changed(fp8_grouped_call(), **changes).run()


def quant(**options: Any) -> Call:
    return Call("npu_dynamic_quant", [x()], {"dst_type": FP8, **options})


def product(args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    return changed(fp8_matmul_call(), args, **kwargs)


REFUSED: dict[str, Callable[[], Call]] = {
    "dst_type=16; emulated: int8, float8_e4m3fn": lambda: quant(
        dst_type=torch.quint4x2
    ),
    "dtype number 23 is not emulated": lambda: quant(dst_type=torch.float8_e5m2),
    "dtype number 292 is not emulated": lambda: quant(dst_type=292),
    "dst_type_max are not emulated": lambda: quant(dst_type_max=240.0),
    "offset, bias and group_sizes": lambda: product(bias=torch.zeros(N)),
    "x1 is int8": lambda: product({0: int8(M, K)}),
    "x1 is bfloat16": lambda: product({0: x()}),
    "x1 is float8_e4m3fn .1, 5, 128.": lambda: product({0: fp8(1, M, K)}),
    "x1 is float8_e4m3fn .0, 128.*not empty": lambda: product({0: fp8(0, K)}),
    "x2 is .* transposed view of a contiguous": lambda: product(
        {1: fp8(K, 2 * N)[:, ::2]}
    ),
    "K of x1 is 128, of x2 64": lambda: product({1: fp8(64, N)}),
    "output dtype torch.int8": lambda: product(output_dtype=None),
    "output dtype torch.float32": lambda: product(output_dtype=torch.float32),
    "inner axis of size 65536": lambda: product(
        {0: fp8(M, 1), 1: fp8(1, 65536), 2: scales(1)}
    ),
    "scale is bfloat16": lambda: product({2: scales(N, dtype=torch.bfloat16)}),
    r"scale is float32 \(48, 1\)": lambda: product({2: scales(N, 1)}),
    "pertoken_scale is missing": lambda: product(pertoken_scale=None),
    r"pertoken_scale is float32 \(5, 1\)": lambda: product(pertoken_scale=scales(M, 1)),
    "x1 is float8_e4m3fn .* 2-D int8": lambda: product({1: int8(K, N)}),
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


@pytest.mark.skipif(REAL, reason="tests/real_stack asks torch_npu's meta functions")
@pytest.mark.parametrize("name", CALLS_A5)
def test_opcheck(name: str) -> None:
    """Fake tensors agree with the kernel; opcheck's other tests do not support FP8."""
    call = CALLS_A5[name]()
    operator = getattr(torch.ops.npu, call.operator).default
    checks = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, tuple(call.args), call.kwargs, test_utils=checks)


@pytest.mark.parametrize("name", CALLS_A5)
@pytest.mark.parametrize("soc", ["A2", "A3", "310P"])
def test_other_chips_refuse(
    monkeypatch: pytest.MonkeyPatch, soc: str, name: str
) -> None:
    call = CALLS_A5[name]()
    call.run()
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    if call.operator == "npu_dynamic_quant":
        call.args[0] = call.args[0].half()
    reason = "dst_type=24|does not multiply|does not have|weight torch.float8_e4m3fn"
    with pytest.raises(OperatorLimitError, match=f"on {soc} .*({reason})"):
        call.run()
