# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A vision-language model in vllm-ascend's engine, asked about an image."""

import pytest

from tests.engine.selection import mostly_long
from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL, Result, Run, Serve
from tools.soft_npu import suite

pytestmark = pytest.mark.soft_npu
INT8 = f"{suite.VISION}/w8a8-channel-dynamic"
MIXED = f"{suite.VISION}/w4a16-g128-asym+w8a8-channel-dynamic"
FP8 = f"{suite.VISION}/fp8-channel-dynamic"
USUAL: dict[str, Run] = {
    "int8": {"checkpoint": INT8, **EAGER, **SMALL},
    "graphs": {"checkpoint": INT8, **SMALL},
}
LONG: dict[str, Run] = {
    "mixed": {"checkpoint": MIXED, **EAGER, **SMALL},
    "resolved": {"checkpoint": FP8, **EAGER, **SMALL},
}
RUNS = USUAL | LONG
# Layers and blocks of the language model and of the tower, and their quantized linear
# layers: the recipes leave attention in the tower alone.
LAYERS, LINEAR, LINEAR_IN_TOWER = 2, 4, 2


def served(serve: Serve, name: str) -> Result:
    return engines.served(serve, name, USUAL, LONG)


@pytest.mark.parametrize("name", mostly_long(RUNS, *USUAL))
def test_close_to_float32(serve: Serve, name: str) -> None:
    result = served(serve, name)
    engines.check_served(RUNS[name], result)
    engines.check_close(RUNS[name], result)


def test_the_tower_is_quantized(serve: Serve) -> None:
    calls = served(serve, "int8")["ranks"][0]["operators"]
    forwards = calls["aten::embedding"]
    assert calls["npu::npu_quant_matmul"] == LAYERS * (
        LINEAR * forwards + LINEAR_IN_TOWER
    )


@pytest.mark.parametrize("name", USUAL)
def test_tokens_after_the_prompt(serve: Serve, name: str) -> None:
    """Random weights have many likely tokens, so graphs may generate others."""
    result = served(serve, name)
    found = engines.difference_of_tokens(INT8, result)
    print(f"{name}: {found:.4f}")
    assert found < engines.tolerance(INT8)


@pytest.mark.long
def test_two_ranks(serve: Serve) -> None:
    run = {**USUAL["int8"], "tensor_parallel_size": 2}
    (result,) = serve([run])
    engines.check_served(run, result)
    engines.check_close(run, result)
