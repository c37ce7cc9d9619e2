# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme's experts on two ranks, with tensor and with expert parallelism."""

import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.plugins import load_general_plugins
from vllm.utils.network_utils import get_open_port

from tests.formula import FormulaLinear, relative_error
from tests.layers.quantized_experts import (
    INT8_TOLERANCE,
    ROUNDINGS,
    SERVED,
    WEIGHT_ONLY_TOLERANCE,
    FormulaExperts,
    Sizes,
    is_weight_only,
    load,
    routing,
    run,
)
from tests.layers.quantized_layers import MULTIPLIED_EXPERTS, activations
from tools.bench.launches import Launches
from tools.checkpoints.make_checkpoint import ALL_SCHEMES, FLOAT_SCHEMES
from tools.stacks.ranks import tensor_parallel
from vllm_ascend_ct.errors import UnsupportedCheckpointError

WORLD_SIZE = 2
SIZES = Sizes(8, hidden=256, intermediate=512, top_k=3)
DTYPE = torch.bfloat16
# The router's weights are rounded too if some experts are on other ranks.
TOLERANCE = ROUNDINGS[DTYPE] * 1.1
EP_LAUNCHES = {"w8a8-channel-dynamic": 6, "w4a16-g32": 6, "w4a8-g256": 5}


def set_parallel(experts: bool, placement: str = "linear") -> None:
    config: Any = get_current_vllm_config().parallel_config
    config.enable_expert_parallel = experts
    config.expert_placement_strategy = placement


def split(formula: FormulaExperts, rank: int) -> FormulaExperts:
    """A rank's shard of each expert."""
    share = SIZES.intermediate // WORLD_SIZE
    start = rank * share

    def rows(linear: FormulaLinear) -> FormulaLinear:
        bias = None if linear.bias is None else linear.bias[start : start + share]
        return replace(linear, weight=linear.weight[start : start + share], bias=bias)

    def columns(linear: FormulaLinear) -> FormulaLinear:
        narrowed = linear.narrow(start, share)
        return replace(narrowed, bias=linear.bias if rank == 0 else None)

    return FormulaExperts(
        [
            {
                "gate_proj": rows(expert["gate_proj"]),
                "up_proj": rows(expert["up_proj"]),
                "down_proj": columns(expert["down_proj"]),
            }
            for expert in formula.experts
        ]
    )


def is_split(scheme: str) -> bool:
    """Whether a rank's shard has whole groups."""
    if scheme in FLOAT_SCHEMES:
        # Resolved weights can always be split.
        return True
    group_size = ALL_SCHEMES[scheme].weights.group_size or 1
    return SIZES.intermediate // WORLD_SIZE % group_size == 0


def local_experts(rank: int, placement: str) -> list[int]:
    here = SIZES.experts // WORLD_SIZE
    if placement == "linear":
        return list(range(rank * here, (rank + 1) * here))
    return list(range(rank, SIZES.experts, WORLD_SIZE))


def _tolerance(scheme: str, check: str) -> float:
    if scheme.startswith("fp8") and check.endswith("A5"):
        return INT8_TOLERANCE
    return TOLERANCE if is_weight_only(scheme) else INT8_TOLERANCE


def _check_split(rank: int, scheme: str, **options: Any) -> float:
    set_parallel(experts=False)
    weight_only = is_weight_only(scheme) or "has_bias" in options
    runner, formula = load(SIZES, scheme, DTYPE, weight_only, **options)
    x = formula.without_ties(activations(20, SIZES.hidden, DTYPE))
    routed = routing(SIZES, 20)
    expected = split(formula, rank)(x, *routed)
    return relative_error(run(runner, x, routed), expected)


def _check_whole(rank: int, scheme: str, placement: str, **options: Any) -> float:
    set_parallel(experts=True, placement=placement)
    runner, formula = load(SIZES, scheme, DTYPE, is_weight_only(scheme), **options)
    layer = runner.routed_experts
    assert layer.local_num_experts == SIZES.experts // WORLD_SIZE
    x = formula.without_ties(activations(20, SIZES.hidden, DTYPE))
    routed = routing(SIZES, 20)
    here = local_experts(rank, placement)
    expected = formula(x, *routed, experts=here)
    error = relative_error(run(runner, x, routed), expected)
    # No token is routed to this rank, so all of its rows are unwritten memory.
    elsewhere = torch.tensor(local_experts(1 - rank, placement)[: SIZES.top_k])
    weights, ids = routed[0], elsewhere.expand(20, -1).int().contiguous()
    assert run(runner, x, (weights, ids)).eq(0).all()
    if placement == "linear" and scheme in EP_LAUNCHES:
        with Launches() as launches:
            run(runner, x, routed)
        assert len(launches.names) == EP_LAUNCHES[scheme], launches.names
    return error


def _check_resolved(rank: int, scheme: str, placement: str) -> float:
    """Checks only loaded weights: vLLM's CPU experts need all experts on one rank."""
    set_parallel(experts=True, placement=placement)
    processing = "process_weights_after_loading"
    with patch.object(UnquantizedFusedMoEMethod, processing):
        runner, formula = load(SIZES, scheme, DTYPE)
    here = [formula.experts[number] for number in local_experts(rank, placement)]
    expected = [
        torch.cat([expert[name].weight for name in ("gate_proj", "up_proj")])
        for expert in here
    ]
    layer = runner.routed_experts
    down = torch.stack([expert["down_proj"].weight for expert in here])
    assert relative_error(layer.w2_weight, down) < WEIGHT_ONLY_TOLERANCE
    return relative_error(layer.w13_weight, torch.stack(expected))


def _run(rank: int, port: int) -> None:
    # Spawned processes do not run fixtures.
    load_general_plugins()
    torch.set_num_threads(1)
    errors: dict[tuple[str, str], float] = {}
    grouped = {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1}
    with tensor_parallel(rank, WORLD_SIZE, port):
        for scheme in (*SERVED, *FLOAT_SCHEMES):
            torch.manual_seed(0)
            if is_split(scheme):
                errors[scheme, "split"] = _check_split(rank, scheme)
            check = _check_resolved if scheme in FLOAT_SCHEMES else _check_whole
            errors[scheme, "whole"] = check(rank, scheme, "linear")
        for scheme in EP_LAUNCHES:
            placement = "round_robin"
            errors[scheme, placement] = _check_whole(rank, scheme, placement, **grouped)
        os.environ["VLLM_ASCEND_CT_SOC"] = "A5"
        for scheme in MULTIPLIED_EXPERTS:
            errors[scheme, "split on A5"] = _check_split(rank, scheme)
            errors[scheme, "whole on A5"] = _check_whole(rank, scheme, "linear")
            error = _check_whole(rank, scheme, "round_robin", **grouped)
            errors[scheme, "round_robin on A5"] = error
        del os.environ["VLLM_ASCEND_CT_SOC"]
        errors["w4a16-g32", "biases"] = _check_split(rank, "w4a16-g32", has_bias=True)
        _check_refusals()
    failures = {k: e for k, e in errors.items() if not e < _tolerance(*k)}
    assert not failures, failures


REFUSED = {
    "w4a16-g128": "product is 192 per rank, group_size=128; supported: whole groups",
    "w3a16-channel": "product is 232 of 464 per rank, weights.num_bits=3; supported",
}


def _check_refusals() -> None:
    set_parallel(experts=False)
    for scheme, reason in REFUSED.items():
        intermediate = 384 if scheme == "w4a16-g128" else 464
        sizes = replace(SIZES, intermediate=intermediate)
        with pytest.raises(UnsupportedCheckpointError, match=reason):
            load(sizes, scheme, DTYPE)


@pytest.mark.long
def test_output_is_the_formula_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Name of the shared memory that CPU ranks reduce through.
    monkeypatch.setenv("VLLM_DIST_IDENT", "test_experts_parallel")
    torch.multiprocessing.spawn(_run, args=(get_open_port(),), nprocs=WORLD_SIZE)
