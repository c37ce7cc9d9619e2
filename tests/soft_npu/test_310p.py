# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's engine on software NPUs that are 310P.

Models are in float16, KV caches in FRACTAL_NZ, and attention is computed by ATB.
"""

from collections.abc import Callable

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, Result, Run

pytestmark = pytest.mark.soft_npu
CHIP = "310P"
FLOAT16 = {"dtype": "float16"}
ATTENTION = {
    "atb::_npu_reshape_and_cache",
    "atb::_npu_flash_attention_v3",
    "atb::_npu_paged_attention",
}
# Of linear layers in W8A8, and of experts, which one operator quantizes and multiplies.
INT8 = {"npu::npu_dynamic_quant", "npu::npu_quant_matmul"}
INT8_EXPERTS = "npu::npu_quant_grouped_matmul_dequant"
DENSE, EXPERTS = "dense-w8a8", "moe-w8a8"
NAMES = (
    *(DENSE, EXPERTS, "dense/w8a16-channel", "dense/w6a16-channel"),
    *("dense/w8a8-channel-static", "dense/w8a8-tensor-static-asym"),
    *("dense/w6a8-channel-packed", "dense/w8a8o8-channel-int"),
    *("dense/fp8-channel-dynamic", "dense/fp8-tensor-static", "dense/fp8-block"),
    *("dense/mxfp8", "dense/mxfp4", "dense/nvfp4"),
    *("qwen3-moe/fp8-channel-dynamic", "qwen3-moe/mxfp4"),
)
# One to a process: the worker of 0.23 has no way around its check that a model takes
# memory of the device that no earlier one has left to torch.
RUNS: dict[str, Run] = {
    **{name: {"checkpoint": name, **EAGER, **FLOAT16} for name in NAMES},
    "graphs": {"checkpoint": DENSE, **FLOAT16},
    "graphs of experts": {"checkpoint": EXPERTS, **FLOAT16},
    "two ranks": {
        "checkpoint": "qwen3-moe/w8a8-channel-dynamic",
        **EAGER,
        **FLOAT16,
        "tensor_parallel_size": 2,
    },
}
IN_USUAL_RUN = (EXPERTS, "graphs")
Serve = Callable[..., list[Result]]


def serve_one(serve: Serve, name: str) -> Result:
    (result,) = serve([RUNS[name]], chip=CHIP)
    return result


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_USUAL_RUN else pytest.mark.long)
        for name in RUNS
    ],
)
def test_close_to_float32(serve: Serve, name: str) -> None:
    result = serve_one(serve, name)
    engines.check_served(RUNS[name], result)
    engines.check_close(RUNS[name], result)
    for rank in result["ranks"]:
        assert rank["operators"].keys() >= ATTENTION


@pytest.mark.long
@pytest.mark.parametrize(
    ("graphs", "eager"), [("graphs", DENSE), ("graphs of experts", EXPERTS)]
)
def test_graphs_say_what_eager_says(serve: Serve, graphs: str, eager: str) -> None:
    captured, called = serve_one(serve, graphs), serve_one(serve, eager)
    assert captured["tokens"] == called["tokens"]
    assert captured["logprobs"] == called["logprobs"]


def test_operators(serve: Serve) -> None:
    counts: dict[str, int] = serve_one(serve, EXPERTS)["ranks"][0]["operators"]
    # Two products of experts, qkv and o in each forward of a layer.
    assert counts[INT8_EXPERTS] == 2 * counts["npu::npu_swiglu"]
    assert {counts[name] for name in INT8} == {counts[INT8_EXPERTS]}


@pytest.mark.long
def test_int4_is_refused(serve: Serve) -> None:
    run = {"checkpoint": "dense-w4a16", **EAGER, **FLOAT16}
    with pytest.raises(AssertionError) as refused:
        serve([run], chip=CHIP)
    error = str(refused.value)
    assert "4-bit weights; supported: 8" in error
    assert "on Ascend 310P" in error and "Quantize the model again" in error
