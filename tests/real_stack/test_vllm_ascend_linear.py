# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's own layers with this package's config and kernels, against float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.utils.network_utils import get_open_port

from tests.formula import relative_error
from tests.layers import test_tensor_parallel as tensor_parallel
from tests.layers.quantized_layers import (
    TOLERANCES,
    activations,
    config_of,
    load,
    load_embedding,
    load_head,
    replicated_case,
)
from tests.layers.test_linear import CASES, cases_of, expected_classes, tolerance
from tools.checkpoints.make_checkpoint import SCHEMES
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)

pytestmark = [pytest.mark.vllm_ascend, pytest.mark.usefixtures("vllm_config")]

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [(BF16, True), (torch.float16, False)],
    ids=["bfloat16-bias", "float16-no-bias"],
)
@pytest.mark.parametrize(
    ("scheme", "case"),
    [(s, case) for s in SCHEMES for case in cases_of(s)],
)
def test_output_is_the_formula(
    scheme: str, case: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, formulas = load(CASES[case], scheme, dtype, bias)
    assert type(layer).__module__ == "vllm_ascend.ops.linear", type(layer)
    # vllm-ascend treats a layer as unquantized if this is None.
    assert type(layer.quant_method) is AscendCTLinearMethod
    assert layer.quant_method.quant_method is layer.scheme
    classes = type(layer.scheme), type(layer.scheme.kernel)
    assert classes == expected_classes(scheme, CASES[case].k)
    x = formulas[0].without_ties(activations(64, CASES[case].k, dtype))
    y, _ = layer(x)
    expected = torch.cat([formula(x) for formula in formulas], dim=-1)
    assert relative_error(y, expected) < tolerance(scheme, dtype)


def test_rows_that_end_in_a_word_are_refused() -> None:
    """That vLLM release would round down the size of the parameter."""
    with pytest.raises(UnsupportedCheckpointError, match="rows that fill whole int32"):
        load(replicated_case(272, 96), "w3a16-channel", BF16, bias=False)


def _run(rank: int, port: int, model: Path) -> None:
    from tests.real_stack.ascend_layers import ascend_layers

    torch.set_num_threads(1)
    with ascend_layers(model, rank, tensor_parallel.WORLD_SIZE, port):
        layer, _ = load(CASES["row"], "w4a16-g32", BF16, bias=False)
        assert type(layer).__module__ == "vllm_ascend.ops.linear", type(layer)
        found = tensor_parallel.failures(rank, SCHEMES)
        tensor_parallel.check_vocabulary(rank)
    assert not found, found


def test_two_ranks(model: Path) -> None:
    ranks = tensor_parallel.WORLD_SIZE
    torch.multiprocessing.spawn(_run, args=(get_open_port(), model), nprocs=ranks)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-channel"])
def test_embedding_and_head(scheme: str) -> None:
    embedding, formula = load_embedding(1024, 256, scheme, BF16)
    assert type(embedding).__module__.startswith("vllm_ascend.")
    rows = embedding(torch.arange(1024))
    assert relative_error(rows, formula.weight) < TOLERANCES[BF16]
    head, formula = load_head(1024, 256, scheme, BF16)
    assert type(head).__module__.startswith("vllm_ascend.")
    x = activations(7, 256, BF16)
    y = head.quant_method.apply(head, x)
    assert relative_error(y, formula(x)) < TOLERANCES[BF16]


def test_norm_has_no_bias(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norm iterates over the config's quant_description."""
    monkeypatch.setattr(vllm_config, "quant_config", config_of("re:.*", "w4a16-g32"))
    norm = RMSNorm(256)
    assert type(norm).__name__ == "AscendRMSNorm" and norm.bias is None


@pytest.mark.parametrize(
    "layer_class", [ColumnParallelLinear, MergedColumnParallelLinear]
)
def test_layers_that_are_not_quantized(layer_class: Any) -> None:
    """They use vllm-ascend's method, which its layers expect."""
    config = config_of("re:none", "w4a16-g32")
    sizes = 64 if layer_class is ColumnParallelLinear else [32, 32]
    layer = layer_class(256, sizes, quant_config=config, prefix="model.layers.0.fc")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert type(layer.quant_method).__module__ == "vllm_ascend.ops.linear"
