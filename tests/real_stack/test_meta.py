# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every call of the layers, compared with torch_npu's own meta functions."""

import pytest
import torch

from tests.layers.quantized_experts import SERVED, Sizes, routing, run
from tests.layers.quantized_experts import load as load_experts
from tests.layers.quantized_layers import MULTIPLIED, activations, load, row_case
from tests.ops.calls import CALLS, CALLS_A5
from tests.real_stack.meta import WITHOUT_META, MetaChecked, to_meta
from tools.checkpoints.make_checkpoint import SCHEMES

pytestmark = [pytest.mark.torch_npu, pytest.mark.usefixtures("single_rank")]

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_operator_tests(name: str) -> None:
    call = (CALLS | CALLS_A5)[name]()
    with MetaChecked() as checked:
        call.run()
    assert checked.faults == []


@pytest.mark.parametrize("name", CALLS_A5)
def test_calls_on_a5(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    test_calls_of_the_operator_tests(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_float8_layers_on_a5(
    monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    test_linear_layers(scheme, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers(scheme: str, dtype: torch.dtype) -> None:
    with MetaChecked() as checked:
        layer, _ = load(row_case(512, 96), scheme, dtype, bias=True)
        for batch in (1, 7):
            layer(activations(batch, 512, dtype))
    assert checked.calls and checked.faults == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SERVED)
def test_experts(scheme: str, dtype: torch.dtype) -> None:
    sizes = Sizes(4, hidden=512, intermediate=512, top_k=2)
    with MetaChecked() as checked:
        runner, _ = load_experts(sizes, scheme, dtype)
        for batch in (1, 7):
            run(runner, activations(batch, 512, dtype), routing(sizes, batch))
    assert checked.calls and checked.faults == []
    in_groups = scheme.startswith(("w4a8-g256", "w2a8-g256"))
    assert bool(checked.without_result) == in_groups


def test_more_than_two_axes_of_weight_only_inputs() -> None:
    """The wheel's meta function drops leading axes, so kernels pass matrices."""
    call = CALLS["npu_weight_quant_batchmatmul"]()
    x = torch.empty(2, 3, call.args[0].shape[-1], dtype=torch.bfloat16, device="meta")
    result = torch.ops.npu.npu_weight_quant_batchmatmul(
        x, *to_meta(call.args[1:]), **to_meta(call.kwargs)
    )
    assert result.shape[:-1] == (2,)


@pytest.mark.parametrize("name", WITHOUT_META)
def test_these_have_no_meta_function(name: str) -> None:
    (call,) = (make for make in CALLS.values() if make().operator == name)
    made = call()
    with pytest.raises(NotImplementedError, match=WITHOUT_META[name]):
        getattr(torch.ops.npu, name)(*to_meta(made.args), **to_meta(made.kwargs))
