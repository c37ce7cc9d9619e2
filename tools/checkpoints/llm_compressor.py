# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make checkpoints with llm-compressor, in a separate environment.

    tools/checkpoints/llm_compressor.sh OUT [RECIPE...]

llm-compressor needs a different version of compressed-tensors from vLLM's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.checkpoints import tiny_model, tiny_moe

BASE = Path("build/tiny-model")
SAMPLES, LENGTH = 64, 128
HEAD = ["lm_head"]


def _int8(strategy: str, **fields: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, strategy=strategy, **fields)


def _scheme(
    bits: int,
    inputs: QuantizationArgs | None = None,
    targets: str = "Linear",
    group_size: int = 0,
    symmetric: bool = True,
) -> dict[str, QuantizationScheme]:
    layout = {"strategy": "group", "group_size": group_size}
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        **layout if group_size else {"strategy": "channel"},
    )
    scheme = QuantizationScheme(
        targets=[targets], weights=weights, input_activations=inputs
    )
    return {f"group_{targets}": scheme}


def _gptq(
    config_groups: dict[str, QuantizationScheme], ignore: Sequence[str] = HEAD
) -> GPTQModifier:
    return GPTQModifier(config_groups=config_groups, ignore=list(ignore))


def _rounded(
    scheme: str, ignore: Sequence[str] = tiny_moe.IGNORE, **options: Any
) -> QuantizationModifier:
    return QuantizationModifier(
        targets="Linear", scheme=scheme, ignore=list(ignore), **options
    )


def recipes() -> dict[str, list[Any]]:
    """Recipes of modifiers, by name of the checkpoint."""
    token, tensor = _int8("token", dynamic=True), _int8("tensor")
    smooth = {"smoothing_strength": 0.5}
    return {
        "w4a16-gptq": [GPTQModifier(targets="Linear", scheme="W4A16", ignore=HEAD)],
        "w4a16-awq-asym": [
            AWQModifier(),
            QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=HEAD),
        ],
        "w8a16": [QuantizationModifier(targets="Linear", scheme="W8A16", ignore=HEAD)],
        "w3a16-gptq": [_gptq(_scheme(3, group_size=64))],
        "w8a8-smoothquant-gptq": [
            SmoothQuantModifier(**smooth),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=HEAD),
        ],
        "w8a8-static": [SmoothQuantModifier(**smooth), _gptq(_scheme(8, tensor))],
        "w8a8-asym": [_gptq(_scheme(8, _int8("token", dynamic=True, symmetric=False)))],
        "w8a8-static-asym": [_gptq(_scheme(8, _int8("tensor", symmetric=False)))],
        "w4a8": [GPTQModifier(targets="Linear", scheme="W4A8", ignore=HEAD)],
        "w4a8-channel": [_gptq(_scheme(4, token))],
        "mixed": [
            _gptq(
                {
                    **_scheme(8, token, "re:.*self_attn.*_proj"),
                    **_scheme(4, None, "re:.*(gate|up)_proj", 64, symmetric=False),
                    **_scheme(8, None, "re:.*down_proj", 128),
                }
            )
        ],
        "w4a16-head": [
            QuantizationModifier(config_groups=_scheme(4, group_size=32), ignore=[])
        ],
        "fp8-dynamic": [_rounded("FP8_DYNAMIC", HEAD)],
        "fp8-static-kv": [
            _rounded(
                "FP8",
                HEAD,
                kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"},
            )
        ],
        "fp8-block": [_rounded("FP8_BLOCK", HEAD)],
        "mxfp8": [_rounded("MXFP8", HEAD)],
        "mxfp4": [_rounded("MXFP4", HEAD)],
        "nvfp4": [_rounded("NVFP4", HEAD)],
        "nvfp4-a16": [_rounded("NVFP4A16", HEAD)],
        "qwen3-moe/fp8-dynamic": [_rounded("FP8_DYNAMIC")],
        "qwen3-moe/nvfp4-a16": [_rounded("NVFP4A16")],
        "qwen3-moe/w4a16-gptq": [
            GPTQModifier(targets="Linear", scheme="W4A16", ignore=list(tiny_moe.IGNORE))
        ],
        "qwen3-moe/w4a16-asym": [_rounded("W4A16_ASYM")],
        "mixtral/w8a8": [_rounded("W8A8")],
        "deepseek-v2/w4a8-channel": [_gptq(_scheme(4, token), tiny_moe.IGNORE)],
        "deepseek-v3/mixed": [
            _gptq(
                {
                    **_scheme(8, token, "re:.*(self_attn|shared_experts).*_proj.*"),
                    **_scheme(4, None, "re:.*mlp.experts.*_proj", 32),
                    **_scheme(8, token, "re:.*layers.0.mlp.*_proj"),
                },
                tiny_moe.IGNORE,
            )
        ],
    }


def base_of(recipe: str) -> Path:
    """The model that a recipe quantizes; made if it is missing."""
    name, slash, _ = recipe.partition("/")
    base = Path("build") / name if slash else BASE
    if not slash:
        tiny_model.make_once(base)
    elif not (base / "config.json").exists():
        tiny_moe.make(base, name)
    return base


def make(out: Path, base: Path, recipe: list[Any]) -> None:
    """Quantize a model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer(tiny_model.corpus())["input_ids"]
    starts = range(0, LENGTH * SAMPLES, LENGTH)
    rows = [tokens[start : start + LENGTH] for start in starts]
    data = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * LENGTH] * SAMPLES}
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    # AWQ pins memory, which needs an accelerator.
    with patch.object(torch.Tensor, "pin_memory", torch.Tensor.contiguous):
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=recipe,
            max_seq_length=LENGTH,
            num_calibration_samples=SAMPLES,
            output_dir=str(out),
        )


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=list(known))
    arguments = parser.parse_args()
    for name in arguments.recipes:
        make(arguments.out / name, base_of(name), known[name])
        print(f"Wrote {arguments.out / name}")


if __name__ == "__main__":
    main()
