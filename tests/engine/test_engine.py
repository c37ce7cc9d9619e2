# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme in the vLLM engine, against a float32 reference.

There are three checkpoints with eight schemes each: the model has two layers, and
layers that upstream fuses must share a scheme. A wrong scale, zero point or layout in
any of them moves the mean difference far above the tolerance.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pytest_mock import MockerFixture

from tests.engine.selection import mostly_long
from tools.checkpoints.make_checkpoint import SCHEMES
from tools.numerics.logprobs import mean_difference, reference, served
from vllm_ascend_ct.compare_layouts.layer import on_fp8_grid, on_mx_grid

MODULES = ("[qkv]_proj", "o_proj", "(gate|up)_proj", "down_proj")
TARGETS = [f"re:.*layers.{layer}.*{module}" for layer in (0, 1) for module in MODULES]
FAMILIES = {
    "w4a16": [s for s in SCHEMES if s.startswith("w4a16")],
    "w8a16": [s for s in SCHEMES if s.startswith("w8a16")],
    "w8a8": [s for s in SCHEMES if s.startswith("w8a8") and "packed" not in s][:8],
    # Low widths only in layers that matter least; otherwise the model is ruined.
    "wna16": ["w5a16-g64", "w6a16-channel-asym", "w3a16-g64-asym", "w7a16-channel"]
    + ["w5a16-channel-asym", "w2a16-g64-asym", "w7a16-g64-asym", "w6a16-g64"],
    "w4a8": ["w4a8-channel", "w4a8-g256-packed", "w4a8-g128", "w4a8-g256"]
    + ["w6a8-channel-packed", "w4a8-channel-packed", "w4a8-channel-asym-inputs"]
    + ["w8a8-channel-packed"],
    "w8a8o8": ["w8a8o8-channel-int", "w4a8o8-channel", "w8a16-channel", "w8a16-g128"]
    + ["w8a16-channel", "w8a8o8-channel-int", "w4a8o8-g32-int", "w8a16-g32"],
    "float": ["fp8-channel-dynamic", "fp8-block", "mxfp8", "nvfp4"]
    + ["fp8-tensor-static", "fp8-channel-a16", "mxfp4", "nvfp4-a16"],
}
RECIPES = {
    family: dict(zip(TARGETS, schemes, strict=True))
    for family, schemes in FAMILIES.items()
}
# Mean absolute difference of log-probabilities, due to 16-bit arithmetic and to
# activations that the reference does not quantize.
TOLERANCES = {
    "w4a16": 0.015,
    "w8a16": 0.015,
    "w8a8": 0.04,
    "wna16": 0.015,
    "w4a8": 0.04,
    "w8a8o8": 0.08,
    "float": 0.015,
}
OPERATORS = {
    "w4a16": {"npu_weight_quant_batchmatmul"},
    "w8a16": {"npu_weight_quant_batchmatmul"},
    "w8a8": {
        "npu_dynamic_quant",
        "npu_dynamic_quant_asymmetric",
        "npu_quantize",
        "npu_quant_matmul",
    },
    "wna16": {"npu_weight_quant_batchmatmul"},
    "w4a8": {
        "npu_dynamic_quant",
        "npu_quant_matmul",
        "npu_weight_quant_batchmatmul",
    },
    "w8a8o8": {"npu_quantize", "npu_weight_quant_batchmatmul"},
    "float": set(),
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def reference_of(checkpoint: MakeCheckpoint) -> Callable[[str], list[float]]:
    known: dict[str, list[float]] = {}

    def compute(family: str) -> list[float]:
        if family not in known:
            known[family] = reference(checkpoint(RECIPES[family]))
        return known[family]

    return compute


@pytest.mark.parametrize("family", RECIPES)
def test_eager(
    mocker: MockerFixture,
    checkpoint: MakeCheckpoint,
    reference_of: Callable[[str], list[float]],
    family: str,
) -> None:
    spies = {
        name: mocker.spy(torch.ops.npu, name)
        for names in OPERATORS.values()
        for name in names
    }
    logprobs = served(checkpoint(RECIPES[family]), eager=True)
    difference = mean_difference(logprobs, reference_of(family))
    assert difference < TOLERANCES[family]
    called = {name for name, spy in spies.items() if spy.call_count}
    assert called == OPERATORS[family]


@pytest.mark.parametrize("family", mostly_long(RECIPES, "w4a16", "w8a8"))
def test_compiled(
    checkpoint: MakeCheckpoint,
    reference_of: Callable[[str], list[float]],
    family: str,
) -> None:
    """Compiled, vLLM's default."""
    logprobs = served(checkpoint(RECIPES[family]), eager=False)
    assert mean_difference(logprobs, reference_of(family)) < TOLERANCES[family]


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w8a8-tensor-static-asym"])
def test_float16(checkpoint: MakeCheckpoint, scheme: str) -> None:
    path = checkpoint({"Linear": scheme}, dtype=torch.float16)
    family = scheme.partition("-")[0]
    difference = mean_difference(served(path), reference(path))
    assert difference < TOLERANCES[family] / 2


class OnA5(NamedTuple):
    """A scheme that A5 multiplies as it is.

    Attributes:
        operator: The operator that quantizes activations.
        dtype: Dtype of the weights.
        on_grid: How the reference rounds activations.
        tolerance: Mean difference of log-probabilities. Activations of 4 bits amplify
            what 16 bits round before.

    """

    operator: str
    dtype: torch.dtype
    on_grid: Callable[[torch.Tensor], torch.Tensor]
    tolerance: float


ON_A5 = {
    "fp8-channel-dynamic": OnA5(
        "npu_dynamic_quant", torch.float8_e4m3fn, on_fp8_grid, 0.035
    ),
    "mxfp8": OnA5(
        "npu_dynamic_mx_quant", torch.float8_e4m3fn, partial(on_mx_grid, 8), 0.04
    ),
    "mxfp4": OnA5("npu_dynamic_mx_quant", torch.uint8, partial(on_mx_grid, 4), 0.12),
}


@pytest.mark.parametrize("scheme", ON_A5)
def test_floats_on_a5(
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
    checkpoint: MakeCheckpoint,
    scheme: str,
) -> None:
    """The output head is resolved; all other layers are multiplied as they are."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    path = checkpoint({"Linear": scheme}, ignore=())
    expected = ON_A5[scheme]
    quantized = mocker.spy(torch.ops.npu, expected.operator)
    multiplied = mocker.spy(torch.ops.npu, "npu_quant_matmul")
    logprobs = served(path, eager=True)
    difference = mean_difference(logprobs, reference(path, expected.on_grid))
    assert difference < expected.tolerance
    assert quantized.call_count == multiplied.call_count > 0
    dtypes = {call.args[1].dtype for call in multiplied.call_args_list}
    assert dtypes == {expected.dtype}


@pytest.mark.long
@pytest.mark.parametrize("scheme", ON_A5)
def test_floats_on_a5_compiled(
    monkeypatch: pytest.MonkeyPatch, checkpoint: MakeCheckpoint, scheme: str
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    path = checkpoint({"Linear": scheme}, ignore=())
    expected = ON_A5[scheme]
    logprobs = served(path, eager=False)
    difference = mean_difference(logprobs, reference(path, expected.on_grid))
    assert difference < expected.tolerance


@pytest.mark.parametrize(
    "eager",
    [True, pytest.param(False, marks=pytest.mark.long)],
    ids=["eager", "compiled"],
)
def test_embedding_and_output_head(checkpoint: MakeCheckpoint, eager: bool) -> None:
    """A class target includes the output head, which is a Linear in the checkpoint."""
    recipe = {"Embedding": "w8a16-g64-asym", "Linear": "w4a16-g32"}
    path = checkpoint(recipe, ignore=())
    difference = mean_difference(served(path, eager=eager), reference(path))
    assert difference < TOLERANCES["w4a16"]


def test_output_head_tied_to_a_quantized_embedding(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint({"Embedding": "w4a16-g32", "Linear": "w8a16-channel"}, tied=True)
    assert mean_difference(served(path), reference(path)) < TOLERANCES["w4a16"]


def test_a_wrong_scale_shows(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The comparison above can fail: one layer's scales, 10 % off."""
    from safetensors.torch import load_file, save_file

    path = checkpoint({"Linear": "w4a16-g128"})
    expected = reference(path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 1.1
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert mean_difference(served(path), expected) < TOLERANCES["w4a16"]
    assert mean_difference(served(broken), expected) > 2 * TOLERANCES["w4a16"]
