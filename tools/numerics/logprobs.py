# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Log-probabilities of a fixed text, by vLLM or by a float32 reference.

VLLM_PLUGINS=ascend_ct python -m tools.numerics.logprobs OUT.json CHECKPOINT...
"""

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 500


def held_out_tokens(checkpoint: Path) -> list[int]:
    """The text that the tiny model was not trained on."""
    from transformers import AutoTokenizer

    from tools.checkpoints.tiny_model import held_out_text

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens: list[int] = tokenizer(held_out_text())["input_ids"][:LENGTH]
    return tokens


def reference(
    checkpoint: Path, on_grid: Callable[["Tensor"], "Tensor"] | None = None
) -> list[float]:
    """Log-probabilities by Hugging Face's model in float32, with dequantized weights.

    Activations are rounded to the config's integer grid, even if they are served in 16
    bits. They are not rounded to a floating-point grid, except by `on_grid`.

    Args:
        checkpoint: Its directory.
        on_grid: Rounds the inputs `[M, K]` of linear layers except the output head and
            routers.

    Returns:
        Log-probability of each token except the first, given the tokens before it.

    """
    model = reference_model(checkpoint)
    if on_grid is not None:
        _round_inputs(model, on_grid)
    return of_next(model, held_out_tokens(checkpoint))


def of_next(model: Any, tokens: list[int], **inputs: "Tensor") -> list[float]:
    """Log-probability of each token except the first, by a model of Hugging Face.

    Args:
        model: The model.
        tokens: The tokens, with an image's if `inputs` have one.
        inputs: Further arguments of the model.

    """
    import torch

    given = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(given.unsqueeze(0), **inputs).logits
    logprobs = logits[0].log_softmax(dim=-1)
    found: list[float] = logprobs[:-1].gather(1, given[1:, None])[:, 0].tolist()
    return found


def reference_model(checkpoint: Path) -> Any:
    """Hugging Face's model in float32, as described for `reference`."""
    import torch
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
    )
    from transformers import AutoConfig

    from tools.checkpoints import tiny_moe, tiny_vlm
    from tools.checkpoints.dequantize import dequantized_state

    config = AutoConfig.from_pretrained(checkpoint)
    quantization = tiny_moe.quantization_in_model(config)
    del config.quantization_config
    if tiny_moe.is_moe(config):
        model = tiny_moe.new_model(config, torch.float32)
    else:
        model = tiny_vlm.auto_class(config).from_config(config, dtype=torch.float32)
    quantization["config_groups"] = {
        name: {**group, "weights": None}
        for name, group in quantization["config_groups"].items()
        # Activations stay in 16 bits with floating-point weights.
        if (group["input_activations"] or {}).get("type", "float") != "float"
    }
    # The KV cache is served unquantized.
    quantization["kv_cache_scheme"] = None
    apply_quantization_config(model, QuantizationConfig.model_validate(quantization))
    # Layers for multi-token prediction, which only draft models have.
    drafts = f"model.layers.{getattr(config, 'num_hidden_layers', '-')}."
    state = {
        tiny_vlm.in_model(tiny_moe.in_model(name, config.model_type), model): tensor
        for name, tensor in dequantized_state(checkpoint).items()
        if not name.endswith((".k_scale", ".v_scale")) and not name.startswith(drafts)
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name == "lm_head.weight" or "zero_point" in name for name in missing)
    model.tie_weights()
    return model


def _round_inputs(model: Any, on_grid: Callable[["Tensor"], "Tensor"]) -> None:
    import torch

    def hook(_: Any, inputs: tuple["Tensor"]) -> "Tensor":
        (x,) = inputs
        return on_grid(x.flatten(0, -2)).view(x.shape).to(x.dtype)

    for name, module in model.named_modules():
        is_quantized = name != "lm_head" and not name.endswith(".gate")
        if isinstance(module, torch.nn.Linear) and is_quantized:
            module.register_forward_pre_hook(hook)


def served(
    checkpoint: Path,
    *,
    eager: bool = True,
    ranks: int = 1,
    experts: bool = False,
    dtype: str = "auto",
    prompt: dict[str, Any] | None = None,
) -> list[float]:
    """Log-probabilities by vLLM, on the platform of this process.

    Args:
        checkpoint: The model.
        eager: Whether to skip compilation.
        ranks: Number of ranks (tensor parallelism).
        experts: Whether to use expert parallelism.
        dtype: Dtype of what is not quantized; "auto" for the checkpoint's.
        prompt: vLLM's prompt; None for the text.

    Returns:
        As `reference`, of the prompt.

    """
    from vllm import LLM, SamplingParams

    in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        max_model_len=LENGTH + 12,
        enforce_eager=eager,
        tensor_parallel_size=ranks,
        enable_expert_parallel=experts,
        distributed_executor_backend="uni" if in_process else None,
        disable_log_stats=True,
    )
    given: Any = prompt or {"prompt_token_ids": held_out_tokens(checkpoint)}
    (output,) = llm.generate(
        given,
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    del llm
    clean_up()
    return of_prompt(output)


def of_prompt(output: Any) -> list[float]:
    """Log-probability, by vLLM, of each token of a prompt except the first."""
    return [
        of_position[token].logprob
        for token, of_position in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:]
        )
    ]


def of_generated(output: Any) -> list[float]:
    """Log-probability, by vLLM, of each generated token."""
    (one,) = output.outputs
    return [step[token].logprob for token, step in zip(one.token_ids, one.logprobs)]


def difference_of_generated(
    model: Any, texts: Iterable[tuple[list[int], list[int], list[float]]]
) -> float:
    """Mean difference of generated tokens' log-probabilities from a model's.

    Args:
        model: A model of Hugging Face.
        texts: For each, the prompt, the tokens generated after it, and theirs.

    """
    found, expected = [], []
    for prompt, tokens, logprobs in texts:
        found += logprobs
        expected += of_next(model, prompt + tokens)[-len(tokens) :]
    return mean_difference(found, expected)


def clean_up() -> None:
    """Clean up after an engine of this process, as newer releases of vLLM do."""
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    if torch.distributed.is_initialized():
        gc.collect()
        cleanup_dist_env_and_memory()


def mean_difference(some: list[float], others: list[float]) -> float:
    """Mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(some, others, strict=True)) / len(some)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--ranks", type=int, default=1, help="to split a model over")
    parser.add_argument("--experts", action="store_true", help="ranks have whole ones")
    arguments = parser.parse_args()
    results: dict[str, list[float] | str] = {}
    for checkpoint in arguments.checkpoints:
        try:
            results[checkpoint.name] = served(
                checkpoint,
                eager=arguments.eager,
                ranks=arguments.ranks,
                experts=arguments.experts,
            )
        except Exception as error:
            results[checkpoint.name] = f"{type(error).__name__}: {error}"
        arguments.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
