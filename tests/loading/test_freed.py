# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Nothing holds a model's layers and weights once the model is gone.

vLLM keeps what it needs of each layer for a reload.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.platforms import current_platform

from tests.loading import models
from tools.checkpoints import tiny_moe
from tools.checkpoints.malform import EXPERTS_RECIPE, FLOAT_RECIPE, RECIPE

pytestmark = pytest.mark.usefixtures("single_rank")

MODELS: dict[str, tuple[str | None, dict[str, str]]] = {
    "integers": (None, RECIPE),
    "floats": (None, FLOAT_RECIPE),
    "experts": ("qwen3-moe", EXPERTS_RECIPE),
    "float-experts": ("qwen3-moe", {"re:.*_proj": "nvfp4"}),
    "latent": ("deepseek-v3", {"re:.*_proj.*": "w8a8-channel-dynamic"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_freed(
    name: str, checkpoint: Callable[..., Path], moe_model: Callable[[str], Path]
) -> None:
    base, recipe = MODELS[name]
    if name == "latent" and current_platform.device_type == "npu":
        pytest.skip("vllm-ascend registers its latent attention in workers only")
    options = {} if base is None else {"base": moe_model(base)}
    path = checkpoint(recipe, ignore=tiny_moe.IGNORE, **options)
    vllm_config = models.config_of(path)
    model = models.load_with(vllm_config, vllm_config.model_config)
    # vllm-ascend holds the config, and the config the layers that its context names.
    vllm_config.compilation_config.static_forward_context.clear()
    quantized = [m for m in model.modules() if getattr(m, "quant_method", None)]
    assert len(quantized) > 8
    held: dict[str, weakref.ref[torch.nn.Module | torch.Tensor]] = {
        kind: weakref.ref(thing)
        for things in (
            model.named_modules(),
            model.named_parameters(),
            model.named_buffers(),
        )
        for kind, thing in things
        # vLLM shares these between models.
        if "rotary_emb" not in kind
    }
    del model, quantized
    gc.collect()
    left = [kind for kind, thing in held.items() if thing() is not None]
    assert not left, left
