# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A vision-language model in the vLLM engine, asked about images."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_mock import MockerFixture

from tools.checkpoints import tiny_vlm
from tools.numerics.logprobs import mean_difference, served

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("vLLM's Qwen2.5-VL needs torchvision", allow_module_level=True)

# Input features of the layers, in the tower and in the language model.
TOWER, LANGUAGE = {320, 340}, {256, 512}
# For each recipe: ignored layers, the operator that multiplies, and its input features.
RECIPES = {
    "whole": (
        {"Linear": "w8a8-channel-dynamic"},
        (),
        "npu_quant_matmul",
        TOWER | LANGUAGE,
    ),
    "language": (
        {"re:.*_proj": "w4a16-g32-asym"},
        (tiny_vlm.TOWER,),
        "npu_weight_quant_batchmatmul",
        LANGUAGE,
    ),
    "resolved": ({"Linear": "fp8-channel-dynamic"}, (), "npu_quant_matmul", set()),
}
# Mean absolute difference of log-probabilities. Another image differs by more than .3.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    tiny_vlm.make(directory)
    return directory


@pytest.mark.parametrize("name", RECIPES)
def test_image(
    mocker: MockerFixture, checkpoint: Callable[..., Path], base: Path, name: str
) -> None:
    recipe, ignore, operator, features = RECIPES[name]
    path = checkpoint(recipe, base=base, ignore=(*tiny_vlm.IGNORE, *ignore))
    spy = mocker.spy(torch.ops.npu, operator)
    pictures = tiny_vlm.image(0), tiny_vlm.image(1)
    expected, other = (tiny_vlm.reference(path, picture) for picture in pictures)
    assert mean_difference(expected, other) > 6 * TOLERANCE
    logprobs = served(path, prompt=tiny_vlm.prompt(path, pictures[0]))
    assert mean_difference(logprobs, expected) < TOLERANCE
    assert {call.args[0].shape[-1] for call in spy.call_args_list} == features
