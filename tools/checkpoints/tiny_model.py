# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A small language model, trained in a minute or two on Python's own documentation.

    python -m tools.checkpoints.tiny_model

The demo and the tests quantize it. It is small enough for a CPU, and trained enough
that a wrong weight shows in its perplexity.
"""

import pydoc_data.topics
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

DIRECTORY = Path("build/tiny-model")
VOCABULARY = 1024
END = "<|endoftext|>"
STEPS = 600
BATCH, LENGTH = 8, 128
HELD_OUT = 0.05


def corpus() -> str:
    """The topics of the reference manual, which every CPython includes."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def held_out_text() -> str:
    """The end of the corpus, which training does not see."""
    text = corpus()
    return text[-int(len(text) * HELD_OUT) :]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    )


def new_model() -> PreTrainedModel:
    """Make an untrained Qwen2: biases on q, k and v, none elsewhere."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int) -> None:
    """Train for next-token prediction on random windows of `tokens`."""
    rate = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        # Train in float32: on CPUs without bfloat16 instructions it is 30 times faster.
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            message = f"trained {step + 1} of {steps} steps, loss {loss.item():.2f}"
            print(message, flush=True)
    model.eval()


def make(directory: Path, steps: int = STEPS) -> None:
    """Train model and tokenizer and save them in bfloat16."""
    tokenizer = train_tokenizer()
    text = corpus().removesuffix(held_out_text())
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    model = new_model()
    train(model, tokens, steps)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_once(directory: Path) -> None:
    """Make the model if it is missing; safe to call from several processes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not (directory / "config.json").exists():
            print(f"Training the model to quantize, once, into {directory}", flush=True)
            make(directory)


if __name__ == "__main__":
    make_once(DIRECTORY)
