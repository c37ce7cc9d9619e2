# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make the checkpoints that software NPUs serve, in the plain environment.

python -m tools.soft_npu.checkpoints NAME...
"""

import json
import sys
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from tools.checkpoints import make_checkpoint, tiny_model, tiny_moe
from tools.numerics.logprobs import reference
from tools.soft_npu import build, suite
from tools.stacks import stacks

# Layers that a recipe's schemes apply to: the first to attention, the last to the rest.
_LAYERS = ("re:.*self_attn.*_proj.*", "re:.*.mlp.*(_proj|w[123])")


def dense_configs() -> dict[str, PretrainedConfig]:
    """Configs of dense models with random weights."""
    sizes = tiny_moe.COMMON | {"intermediate_size": 512, "head_dim": 64}
    return {"llama": LlamaConfig(**sizes), "qwen3": Qwen3Config(**sizes)}


def make(name: str) -> None:
    """Make a checkpoint with its `reference.json`, unless it exists."""
    model, _, recipe = suite.contents(name).partition("/")

    def make_one(directory: Path) -> None:
        schemes = recipe.split("+")
        pairs = dict(zip(_LAYERS, (schemes[0], schemes[-1])))
        make_checkpoint.make(directory, pairs, _base(model), tiny_moe.IGNORE)
        (directory / "reference.json").write_text(json.dumps(reference(directory)))

    stacks.once(suite.checkpoint(name), suite.contents(name), make_one)


def _base(model: str) -> Path:
    """The unquantized model; made if it is missing."""
    if model == "dense":
        tiny_model.make_once(make_checkpoint.DEFAULT_BASE)
        return make_checkpoint.DEFAULT_BASE
    config = (tiny_moe.configs() | dense_configs())[model]

    def make_random(directory: Path) -> None:
        tiny_moe.make_random(directory, config)

    return stacks.once(
        build.ROOT / "base" / model, config.to_json_string(), make_random
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
