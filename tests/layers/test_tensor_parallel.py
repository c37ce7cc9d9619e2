# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme on two ranks, with upstream's layers and loaders."""

import math
import os
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from vllm.plugins import load_general_plugins
from vllm.utils.network_utils import get_open_port

from tests.formula import FormulaLinear, relative_error
from tests.layers.quantized_layers import (
    MULTIPLIED,
    Case,
    activations,
    gate_up_case,
    load,
    load_embedding,
    load_head,
    qkv_case,
    row_case,
    tolerance,
)
from tools.checkpoints.make_checkpoint import ALL_SCHEMES, FLOAT_SCHEMES
from tools.stacks.ranks import tensor_parallel
from vllm_ascend_ct.errors import UnsupportedCheckpointError

WORLD_SIZE = 2
COLUMN_CASES = (qkv_case(256, heads=4, kv_heads=2), gate_up_case(256, 320))
# The second size leaves one group of 128 per rank.
ROW_CASES = (row_case(512, 192), row_case(256, 192))


# The tolerance covers two roundings, of the weights and of the result. What ranks
# exchange is rounded once more.
REDUCED = math.sqrt(3 / 2)


def _column_error(rank: int, case: Case, scheme: str, dtype: torch.dtype) -> float:
    layer, formulas = load(case, scheme, dtype, bias=True)
    x = formulas[0].without_ties(activations(5, case.k, dtype))
    shares = [formula(x).chunk(WORLD_SIZE, dim=-1)[rank] for formula in formulas]
    return relative_error(layer(x)[0], torch.cat(shares, dim=-1))


def _undivided_error(rank: int, case: Case, scheme: str, dtype: torch.dtype) -> float:
    layer, formulas = load(case, scheme, dtype, bias=True, disable_tp=True)
    x = formulas[0].without_ties(activations(5, case.k, dtype))
    expected = torch.cat([formula(x) for formula in formulas], dim=-1)
    return relative_error(layer(x)[0], expected)


def _row_inputs(
    case: Case, formula: FormulaLinear, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each rank's input, and its product in float64."""
    share = case.k // WORLD_SIZE
    parts = [formula.narrow(start, share) for start in range(0, case.k, share)]
    inputs = [part.without_ties(activations(5, share, dtype)) for part in parts]
    return inputs, [part(x) for part, x in zip(parts, inputs)]


def _row_error(rank: int, case: Case, scheme: str, dtype: torch.dtype) -> float:
    layer, (formula,) = load(case, scheme, dtype, bias=False, reduce_results=False)
    inputs, products = _row_inputs(case, formula, dtype)
    return relative_error(layer(inputs[rank])[0], products[rank])


def _reduced_error(rank: int, case: Case, scheme: str, dtype: torch.dtype) -> float:
    layer, (formula,) = load(case, scheme, dtype, bias=True)
    assert formula.bias is not None
    inputs, products = _row_inputs(case, formula, dtype)
    expected = sum(products, formula.bias.double())
    return relative_error(layer(inputs[rank])[0], expected)


def _is_served(scheme: str, check: Any, k: int) -> bool:
    if check in (_column_error, _undivided_error):
        share = k
    elif scheme in FLOAT_SCHEMES:
        # Resolved weights can always be split.
        return True
    elif ALL_SCHEMES[scheme].output_activations is not None:
        return False
    else:
        share = k // WORLD_SIZE
    return share % (ALL_SCHEMES[scheme].weights.group_size or 1) == 0


# What is checked, for which layers, with how much of the tolerance.
CHECKS = (
    (_column_error, COLUMN_CASES, 1),
    (_undivided_error, (*COLUMN_CASES, ROW_CASES[0]), 1),
    (_row_error, ROW_CASES, 1),
    (_reduced_error, ROW_CASES, REDUCED),
)


def _run(rank: int, port: int) -> None:
    # Spawned processes do not run fixtures.
    load_general_plugins()
    torch.set_num_threads(1)
    with tensor_parallel(rank, WORLD_SIZE, port):
        found = failures(rank, ALL_SCHEMES)
        os.environ["VLLM_ASCEND_CT_SOC"] = "A5"
        found += failures(rank, MULTIPLIED)
        del os.environ["VLLM_ASCEND_CT_SOC"]
        check_vocabulary(rank)
        _check_refusals()
    assert not found, found


def failures(rank: int, schemes: Iterable[str]) -> list[tuple[Any, ...]]:
    """Check all layers on a rank; return those that are too far from the formula."""
    found = []
    for scheme, dtype in product(schemes, (torch.bfloat16, torch.float16)):
        for check, cases, roundings in CHECKS:
            for case in cases:
                if not _is_served(scheme, check, case.k):
                    continue
                torch.manual_seed(0)
                error = check(rank, case, scheme, dtype)
                if not error < tolerance(scheme, dtype) * roundings:
                    found.append((scheme, dtype, check.__name__, error))
    return found


def check_vocabulary(rank: int) -> None:
    torch.manual_seed(0)
    embedding, formula = load_embedding(1000, 256, "w4a16-g32-asym", torch.bfloat16)
    ids = torch.tensor([0, 999, 512, 511])
    assert torch.equal(embedding(ids), formula.weight[ids].float().bfloat16())
    torch.manual_seed(0)
    head, formula = load_head(1024, 256, "w4a16-g32-asym", torch.bfloat16)
    x = activations(5, 256, torch.bfloat16)
    expected = formula(x).chunk(WORLD_SIZE, dim=-1)[rank]
    y = head.quant_method.apply(head, x)
    assert relative_error(y, expected) < tolerance("w4a16", torch.bfloat16)


REFUSED = {
    # scheme -> K of a layer whose input is split, and the reason
    "w4a16-g128": (384, "is not divisible by group_size=128"),
    "w8a8o8-channel-int": (512, "each rank would quantize its partial sum"),
    "w3a16-channel": (272, "shards that begin on an int32 boundary"),
}


def _check_refusals() -> None:
    for scheme, (k, reason) in REFUSED.items():
        with pytest.raises(UnsupportedCheckpointError, match=reason):
            load(row_case(k, 192), scheme, torch.bfloat16, bias=False)
    # 20 zero points of 5 bits per shard.
    with pytest.raises(UnsupportedCheckpointError, match="zero points fill whole"):
        load(gate_up_case(256, 2 * 20), "w5a16-g64-asym", torch.bfloat16, bias=False)


@pytest.mark.long
def test_output_is_the_formula_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Name of the shared memory that CPU ranks reduce through.
    monkeypatch.setenv("VLLM_DIST_IDENT", "test_tensor_parallel")
    torch.multiprocessing.spawn(_run, args=(get_open_port(),), nprocs=WORLD_SIZE)


@pytest.mark.usefixtures("single_rank")
def test_narrowed_formulas_add_up() -> None:
    """Tests the reference itself, for a scheme with unquantized activations."""
    _, (formula,) = load(ROW_CASES[0], "w4a16-g32", torch.bfloat16, bias=False)
    x = activations(5, 512, torch.bfloat16)
    halves = formula.narrow(0, 256)(x[:, :256]) + formula.narrow(256, 256)(x[:, 256:])
    torch.testing.assert_close(halves, formula(x))
