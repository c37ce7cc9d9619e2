# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Following the remedy of an error helps."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import QKVParallelLinear

from tests import lacks
from tests.layers import quantized_experts
from tests.layers.quantized_layers import FUSED, config_of, gate_up_case, row_case
from tests.loading import models
from tools.checkpoints import tiny_moe
from tools.checkpoints.make_checkpoint import SCHEMES
from tools.checkpoints.malform import (
    EXPERT_KINDS,
    EXPERTS_RECIPE,
    KINDS,
    RECIPE,
    malform,
)
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe,
)
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)

BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("single_rank")

# Kinds of broken checkpoints by remedy. If a wrong config can explain the error, the
# remedy is about the config; if no config can, it is about the files.
BROKEN: dict[Remedy, str] = {
    Remedy.DOWNLOAD_AGAIN: """
        packed-missing packed-missing-of-one-shard scale-missing
        scale-missing-of-one-shard zero-point-missing-of-one-shard int8-missing
        bias-missing biases-missing-of-all-shards layer-missing
    """,
    Remedy.EXPORT_AGAIN: """
        packed-int64 packed-float packed-rows-fewer packed-rows-more packed-transposed
        packed-3d scale-int scale-float64 scale-transposed zero-point-int8
        zero-point-not-packed shape-lies shape-swapped shape-of-three int8-is-bfloat16
        int8-is-uint8 int8-rows-more input-scale-of-two input-scale-int
        input-zero-point-float bias-longer layer-not-quantized
    """,
    Remedy.CORRECT_FIELD: """
        packed-words-fewer packed-words-more packed-with-gaps scale-1d scale-per-tensor
        scale-groups-fewer scale-groups-10000 zero-point-groups-fewer
        zero-point-of-symmetric input-scale-missing input-zero-point-missing
        config-more-bits config-fewer-bits config-other-group-size config-per-channel
        config-symmetric config-asymmetric config-dynamic-inputs config-symmetric-inputs
    """,
    Remedy.CALIBRATE_AGAIN: """
        scale-nan scale-zero scale-negative scale-infinite int4-out-of-range
        input-scale-zero input-scale-negative input-scale-nan
        input-zero-point-out-of-range
    """,
    Remedy.QUANTIZE_AGAIN: "index-of-groups config-group-size-that-splits",
    Remedy.ADD_TO_TARGETS: "config-target-matches-nothing config-shards-differ",
    Remedy.REMOVE_FROM_IGNORE: "config-shard-ignored config-layer-ignored",
}
BROKEN_EXPERTS: dict[Remedy, str] = {
    Remedy.DOWNLOAD_AGAIN: """
        expert-missing expert-packed-missing expert-scale-missing
        expert-int8-missing expert-int8-scale-missing
    """,
    Remedy.EXPORT_AGAIN: """
        expert-packed-rows-fewer expert-packed-int64 expert-zero-point-fewer
        expert-shape-lies expert-int8-is-bfloat16 expert-int8-transposed
    """,
    Remedy.EXPORT_ALIKE: "expert-not-quantized",
    Remedy.CORRECT_FIELD: """
        expert-packed-words-fewer expert-more-bits expert-groups-fewer
        expert-groups-fewer-down expert-zero-point-missing config-symmetric
        config-other-group-size config-more-bits config-fewer-bits
    """,
    Remedy.CALIBRATE_AGAIN: "expert-scale-nan expert-scale-zero",
    Remedy.QUANTIZE_AGAIN: """
        expert-index-of-groups config-static-inputs config-int8-per-tensor
    """,
    Remedy.ADD_TO_TARGETS: "config-projections-differ",
    Remedy.REMOVE_FROM_IGNORE: "config-expert-ignored",
}
# Refused by field, before any layer is built.
OF_CONFIG = {"config-without-groups", "config-format-unknown"}


def by_kind(broken: dict[Remedy, str]) -> list[tuple[str, Remedy]]:
    return [
        (kind, remedy) for remedy, kinds in broken.items() for kind in kinds.split()
    ]


def said(error: BaseException) -> Remedy:
    """The remedy at the end of an error."""
    text = str(error)
    for remedy in Remedy:
        parts = map(re.escape, re.split(r"\{\w+\}", remedy))
        if re.search(rf"\. {'.+'.join(parts)}\.$", text, re.DOTALL):
            return remedy
    raise AssertionError(text)


def test_every_kind_has_a_remedy() -> None:
    kinds = {name for name, kind in KINDS.items() if kind.file is None}
    assert {name for name, _ in by_kind(BROKEN)} == kinds - OF_CONFIG
    assert {name for name, _ in by_kind(BROKEN_EXPERTS)} == EXPERT_KINDS.keys()


@pytest.mark.parametrize(("name", "remedy"), by_kind(BROKEN))
def test_broken_layers(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, remedy: Remedy
) -> None:
    malform(checkpoint(RECIPE), KINDS[name], tmp_path / "broken")
    with pytest.raises(UnsupportedCheckpointError) as error:
        models.load(tmp_path / "broken")
    lacks.skip_if_named(error.value)
    assert said(error.value) is remedy


@pytest.mark.parametrize(("name", "remedy"), by_kind(BROKEN_EXPERTS))
def test_broken_experts(
    checkpoint: Callable[..., Path],
    moe_model: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    remedy: Remedy,
) -> None:
    base = moe_model("qwen3-moe")
    valid = checkpoint(EXPERTS_RECIPE, base=base, ignore=tiny_moe.IGNORE)
    malform(valid, EXPERT_KINDS[name], tmp_path / "broken")
    with pytest.raises(UnsupportedCheckpointError) as error:
        models.load(tmp_path / "broken")
    assert said(error.value) is remedy


def test_zero_points_of_a_symmetric_config_name_the_field(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    kind = KINDS["zero-point-of-symmetric"]
    malform(checkpoint(RECIPE), kind, tmp_path / "broken")
    with pytest.raises(UnsupportedCheckpointError) as error:
        models.load(tmp_path / "broken")
    assert "Correct weights.symmetric in config.json" in str(error.value)


def build(scheme: str, k: int, n: int = 96) -> Any:
    return row_case(k, n).build(
        params_dtype=BF16, quant_config=config_of("re:.*", scheme), prefix="layer"
    )


def build_rank(scheme: str, k: int, part: int, n: int = 96, rank_n: int = 96) -> None:
    """Create one rank's part of a layer."""
    config = config_of("re:.*", scheme)
    layer = build(scheme, k, n)
    layer.scheme = config.get_scheme(layer, "layer")
    for name in list(layer._parameters):
        delattr(layer, name)
    AscendCTLinearMethod(config, config.get_scheme_dict(layer, "layer")).create_weights(
        layer,
        input_size_per_partition=part,
        output_partition_sizes=[rank_n],
        input_size=k,
        output_size=n,
        params_dtype=BF16,
        weight_loader=layer.weight_loader_v2,
    )


def build_merged() -> None:
    config = config_of("re:.*", "w4a16-channel-asym")
    config.packed_modules_mapping = FUSED
    gate_up_case(256, 12).build(quant_config=config, prefix="mlp.gate_up_proj")


def choose_experts(ranks: int, group_size: int) -> None:
    """Choose the class for experts that are split among ranks."""
    sizes = quantized_experts.Sizes(experts=4, hidden=256, intermediate=256, top_k=2)
    _, config, _ = quantized_experts.compressed_experts(sizes, "w4a16-g32", BF16)
    moe = quantized_experts.build(sizes, config, BF16).routed_experts.moe_config
    moe = dataclasses.replace(
        moe,
        intermediate_size_per_partition=256 // ranks,
        moe_parallel_config=dataclasses.replace(moe.moe_parallel_config, tp_size=ranks),
    )
    weights = SCHEMES[f"w4a16-g{group_size}"].weights
    compressed_tensors_moe.choose_experts(weights, None, moe, "layer")


def build_shards() -> None:
    config = config_of("re:.*[qk]_proj", "w4a16-g32")
    config.packed_modules_mapping = FUSED
    QKVParallelLinear(256, 64, 4, quant_config=config, prefix="layers.0.qkv_proj")


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        (lambda: build("w4a16-g128", 320), Remedy.QUANTIZE_AGAIN),
        (lambda: build("w8a8-channel-dynamic", 65536, 8), Remedy.QUANTIZE_AGAIN),
        (build_merged, Remedy.QUANTIZE_AGAIN),
        (lambda: build_rank("w4a16-channel", 264, 132), Remedy.CHANGE_RANKS),
        (lambda: build_rank("w4a16-g128", 256, 64), Remedy.CHANGE_RANKS),
        (lambda: build_rank("w8a8o8-channel-int", 256, 128), Remedy.CHANGE_RANKS),
        (build_shards, Remedy.ONE_SCHEME),
    ],
    ids=[
        "groups-that-split",
        "size-of-the-operator",
        "zero-points-within-a-word",
        "ranks-within-a-word",
        "ranks-within-a-group",
        "ranks-of-static-outputs",
        "shards-that-differ",
    ],
)
def test_layers(cause: Callable[[], object], remedy: Remedy) -> None:
    with pytest.raises(UnsupportedCheckpointError) as error:
        cause()
    assert said(error.value) is remedy


@quantized_experts.factory_needed
def test_experts_of_ranks() -> None:
    choose_experts(ranks=2, group_size=128)
    with pytest.raises(UnsupportedCheckpointError, match="64 per rank") as error:
        choose_experts(ranks=4, group_size=128)
    assert said(error.value) is Remedy.CHANGE_RANKS


def test_remedies_are_of_one_line_and_told_apart() -> None:
    assert all("\n" not in remedy and not remedy.endswith(".") for remedy in Remedy)
    assert len({remedy.partition("{")[0] for remedy in Remedy}) > len(Remedy) - 3
