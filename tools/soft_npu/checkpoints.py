# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make the checkpoints that software NPUs serve, in the plain environment.

python -m tools.soft_npu.checkpoints NAME...
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import DeepseekV2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from tools.checkpoints import (
    drafts,
    kv_scales,
    make_checkpoint,
    tiny_model,
    tiny_moe,
    tiny_vlm,
)
from tools.numerics.logprobs import reference
from tools.soft_npu import build, suite
from tools.stacks import stacks
from vllm_ascend_ct.compare_layouts.layer import on_fp8_grid, on_mx_grid

# Layers that a recipe's schemes apply to: the first to attention, the last to the rest.
_LAYERS = ("re:.*(self|linear)_attn.*(_proj|_qkvz)", "re:.*.mlp.*(_proj|w[123])")

# How A5 rounds activations, for each of `suite.ROUNDED`.
_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8-channel-dynamic": on_fp8_grid,
    "mxfp8": partial(on_mx_grid, 8),
    "mxfp4": partial(on_mx_grid, 4),
}


def more_configs() -> dict[str, PretrainedConfig]:
    """Configs of further models with random weights."""
    sizes = tiny_moe.COMMON | {"intermediate_size": 512, "head_dim": 64}
    latent = tiny_moe.configs()["deepseek-v2"].to_dict()
    return {
        "llama": LlamaConfig(**sizes),
        "qwen3": Qwen3Config(**sizes),
        # The size of heads that an int8 KV cache needs.
        "qwen3-128": Qwen3Config(**sizes | {"head_dim": 128}),
        "deepseek-v2-latent-query": DeepseekV2Config(**latent | {"q_lora_rank": 256}),
    }


def make(name: str) -> None:
    """Make a checkpoint with its `reference.json`, unless it exists.

    Without a recipe it is the unquantized model.
    """
    model, _, recipe = suite.contents(name).partition("/")

    def make_one(directory: Path) -> None:
        if not recipe:
            shutil.copytree(_base(model), directory, dirs_exist_ok=True)
            return
        if model == suite.EAGLE:
            drafts.make_eagle(directory, recipe)
            return
        parts = recipe.split("+")
        others = {suite.MTP, *kv_scales.SCHEMES}
        schemes = [part for part in parts if part not in others]
        pairs = dict(zip(_LAYERS, (schemes[0], schemes[-1])))
        ignore = {*tiny_moe.IGNORE, *tiny_vlm.IGNORE}
        make_checkpoint.make(directory, pairs, _base(model), sorted(ignore))
        for part in kv_scales.SCHEMES.keys() & parts:
            kv_scales.add(directory, part)
        if model == suite.VISION:
            logprobs = tiny_vlm.reference(directory, tiny_vlm.image())
        else:
            logprobs = reference(directory)
        (directory / "reference.json").write_text(json.dumps(logprobs))
        if suite.MTP in parts:
            drafts.add_mtp(directory)

    def make_rounded(directory: Path) -> None:
        logprobs = reference(suite.checkpoint(name), _GRIDS[recipe])
        (directory / "reference.json").write_text(json.dumps(logprobs))

    stacks.once(suite.checkpoint(name), suite.contents(name), make_one)
    if suite.is_rounded(name):
        stacks.once(suite.rounded(name), suite.contents(name), make_rounded)


def _base(model: str) -> Path:
    """The unquantized model; made if it is missing."""
    if model == "dense":
        tiny_model.make_once(make_checkpoint.DEFAULT_BASE)
        return make_checkpoint.DEFAULT_BASE
    configs = {**tiny_moe.configs(), **more_configs(), suite.VISION: tiny_vlm.config()}
    config = configs[model]

    def make_random(directory: Path) -> None:
        if model == suite.VISION:
            tiny_vlm.make(directory)
        else:
            tiny_moe.make_random(directory, config)

    return stacks.once(
        build.ROOT / "base" / model, config.to_json_string(), make_random
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
