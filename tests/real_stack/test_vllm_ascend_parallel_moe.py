# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's experts on two ranks, by each of its ways to send tokens to experts."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.utils.network_utils import get_open_port

from tests.formula import relative_error
from tests.layers.quantized_experts import (
    ROUNDINGS,
    is_weight_only,
    routing,
)
from tests.layers.quantized_layers import activations
from tests.real_stack.ascend_experts import (
    ROUNDED_TOLERANCE,
    SIZES,
    load,
    own_operators,
    run,
)

pytestmark = pytest.mark.vllm_ascend

BF16 = torch.bfloat16
# One for each layout of weights and of what is sent.
SENT = (
    *("w4a16-g32", "w4a16-channel-asym", "w8a16-channel"),
    *("w8a8-channel-dynamic", "w4a8-channel", "w4a8-g256"),
)
RANKS, TOKENS = 2, 40
# The first three gather tokens; the third of ranks that have a part of them each.
METHODS = (
    *("tensor parallel", "expert parallel", "sequence parallel"),
    *("ALLTOALL", "MC2"),
)


def run_in_parallel(
    method: str, rank: int, layer: Any, x: torch.Tensor, routed: Any, vllm_config: Any
) -> tuple[torch.Tensor, slice]:
    """Run a layer.

    Args:
        method: One of `METHODS`.
        rank: This one.
        layer: vllm-ascend's.
        x: All tokens.
        routed: Weights and ids of all.
        vllm_config: The engine's.

    Returns:
        The output, and which tokens' it is.

    """
    from vllm_ascend.ascend_forward_context import MoECommType

    every, part = slice(TOKENS), slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    sequence_parallel = method == "sequence parallel"
    own_part = method in ("ALLTOALL", "MC2")
    kind = MoECommType[method if own_part else "ALLGATHER"]
    # Each rank routes what it sends, or what it was sent.
    routed = tuple(t[part if own_part else every] for t in routed)
    given = part if sequence_parallel else every
    context = "vllm_ascend.ascend_forward_context"
    prepare = "vllm_ascend.ops.fused_moe.prepare_finalize"
    with (
        patch(f"{context}.select_moe_comm_method", return_value=kind),
        patch(f"{context}.enable_sp", return_value=sequence_parallel),
        patch(f"{prepare}.enable_sp", return_value=sequence_parallel),
    ):
        output = run(layer, x[given].clone(), routed, vllm_config, num_tokens=TOKENS)
    if method in ("tensor parallel", "expert parallel"):
        output = tensor_model_parallel_all_reduce(output)
    return output, given


def failures(rank: int, method: str, vllm_config: Any) -> dict[str, Any]:
    """The schemes whose output is not the formula's, and how far it is off."""
    found: dict[str, Any] = {}
    for scheme in SENT:
        torch.manual_seed(0)
        if method == "tensor parallel" and "-g256" in scheme:
            # No whole group of the second product's 128 a rank.
            continue
        layer, formula = load(scheme, vllm_config)
        x = formula.without_ties(activations(TOKENS, SIZES.hidden, BF16))
        weights, ids = routing(SIZES, TOKENS)
        output, given = run_in_parallel(
            method, rank, layer, x, (weights, ids), vllm_config
        )
        expected = formula(x, weights.to(BF16), ids)[given]
        limit = ROUNDINGS[BF16] * 1.1 if is_weight_only(scheme) else ROUNDED_TOLERANCE
        if not (error := relative_error(output, expected)) < limit:
            found[scheme] = error
    return found


def _run(rank: int, port: int, model: Path, method: str) -> None:
    from vllm_ascend import ascend_forward_context
    from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel

    from tests.real_stack.ascend_layers import ascend_layers
    from tests.real_stack.communication import emulated_communication

    torch.set_num_threads(1)
    options = {"enable_expert_parallel": method != "tensor parallel"}
    with (
        emulated_communication(),
        ascend_layers(model, rank, RANKS, port, **options) as vllm_config,
    ):
        init_ascend_model_parallel(vllm_config.parallel_config)
        ascend_forward_context.set_mc2_tokens_capacity(vllm_config, TOKENS, 1)
        ascend_forward_context.set_mc2_mask(vllm_config, "cpu")
        found = failures(rank, method, vllm_config)
        with own_operators():
            found |= failures(rank, method, vllm_config)
    assert not found, found


@pytest.mark.parametrize("method", METHODS)
def test_output_is_the_formula(method: str, model: Path) -> None:
    arguments = (get_open_port(), model, method)
    torch.multiprocessing.spawn(_run, args=arguments, nprocs=RANKS)
