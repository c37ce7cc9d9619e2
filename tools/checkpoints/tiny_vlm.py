# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A small vision-language model with random weights, and what to ask it of an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
)

from tools.checkpoints import tiny_model, tiny_moe

if TYPE_CHECKING:
    from PIL.Image import Image

# Layers that no recipe here quantizes.
IGNORE = ("lm_head", "re:.*merger.*")
TOWER = "re:.*visual.*"
_SPECIAL = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
# Prefixes in checkpoints and in the model.
_NAMES = {"visual.": "model.visual.", "model.": "model.language_model."}
_BEFORE, _AFTER = 20, 100


def has_vision(config: Any) -> bool:
    """Whether a model has a vision tower."""
    return hasattr(config, "vision_config")


def auto_class(config: Any) -> Any:
    """The class of Hugging Face that makes a model from a config."""
    return AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM


def in_model(name: str, model: Any) -> str:
    """The name in the model of a parameter in checkpoints."""
    if has_vision(model.config):
        for theirs, ours in _NAMES.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
    return name


def config() -> Qwen2_5_VLConfig:
    """The sizes of its vision tower are as uneven as those of published models."""
    token_ids = range(tiny_model.VOCABULARY, tiny_model.VOCABULARY + len(_SPECIAL))
    text = {
        **tiny_moe.COMMON,
        "vocab_size": tiny_model.VOCABULARY + 16,
        "intermediate_size": 512,
        "rope_scaling": {
            "type": "mrope",
            "rope_type": "default",
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 320,
        "intermediate_size": 340,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "patch_size": 14,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **dict(zip(_SPECIAL, token_ids)),
    )


def make(directory: Path) -> None:
    """Make the model with random weights, in bfloat16, and its processor."""
    # These need torchvision.
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config())
    tiny_moe.randomize(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.bfloat16().save_pretrained(directory)
    tokenizer = tiny_model.train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*_SPECIAL.values()]})
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template="{{ messages }}",
    ).save_pretrained(directory)


def image(seed: int = 0) -> "Image":
    """A random picture of 10 by 8 patches."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (4, 5, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((140, 112), Image.Resampling.BILINEAR)


def tokens(checkpoint: Path) -> list[int]:
    """Text with one place for an image."""
    from tools.numerics.logprobs import held_out_tokens

    ids = AutoConfig.from_pretrained(checkpoint)
    text = held_out_tokens(checkpoint)[: _BEFORE + _AFTER]
    place = [ids.vision_start_token_id, ids.image_token_id, ids.vision_end_token_id]
    return [*text[:_BEFORE], *place, *text[_BEFORE:]]


def prompt(checkpoint: Path, picture: "Image") -> dict[str, Any]:
    """The text with an image, for vLLM."""
    return {
        "prompt_token_ids": tokens(checkpoint),
        "multi_modal_data": {"image": picture},
    }


def reference(checkpoint: Path, picture: "Image") -> list[float]:
    """As `tools.numerics.logprobs.reference`, of the text with an image."""
    from tools.numerics.logprobs import of_next, reference_model

    processor = AutoProcessor.from_pretrained(checkpoint).image_processor
    inputs: Any = processor(images=[picture], return_tensors="pt")
    count = int(inputs["image_grid_thw"].prod()) // processor.merge_size**2
    image_token = AutoConfig.from_pretrained(checkpoint).image_token_id
    given = tokens(checkpoint)
    place = given.index(image_token)
    given[place : place + 1] = [image_token] * count
    inputs["mm_token_type_ids"] = torch.tensor([given]).eq(image_token).int()
    return of_next(reference_model(checkpoint), given, **inputs)
