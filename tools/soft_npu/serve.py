# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Serve checkpoints one after the other in this process, and report what served them.

    python -m tools.soft_npu run -- python -m tools.soft_npu.serve OUT.json RUN...

A run is JSON: {"checkpoint": DIRECTORY, and arguments of vLLM's `LLM`}.
"""

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.checkpoints import tiny_vlm
from tools.numerics.logprobs import held_out_tokens, of_generated, of_prompt
from tools.soft_npu import sleeping

LENGTH = 128
PROMPTS = ["The function", "A class definition", "import", "def f(self, x):\n"]
NEW_TOKENS = 12
# An engine may fit into memory that torch keeps of an earlier one. vllm-ascend then
# finds as much free memory as before, and stops, unless the cache's size is given.
LATER = {"kv_cache_memory_bytes": 1 << 25}


def describe(model: Any) -> dict[str, Any]:
    """The classes with which a process computes its part of a model."""
    from vllm.platforms import current_platform

    from vllm_ascend_ct.quantization.compressed_tensors.resolved import ResolvedMixin

    methods, kernels, resolved = set(), set(), 0
    kv_caches: set[str] = set()
    for module in model.modules():
        # vLLM's layers hold one tensor, vllm-ascend's one for keys and one for values.
        for cache in getattr(module, "kv_cache", None) or ():
            kv_caches.add(str(cache.dtype))
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None)
        resolved += isinstance(method, ResolvedMixin)
        for found in (scheme, method, getattr(method, "quant_method", None)):
            methods.add(type(found).__name__)
            kernels.add(type(getattr(found, "kernel", None)).__name__)
    return {
        "platform": type(current_platform).__name__,
        "devices": sorted({p.device.type for p in model.parameters()}),
        "kv_caches": sorted(kv_caches),
        "methods": sorted(methods - {"NoneType"}),
        "kernels": sorted(kernels - {"NoneType"}),
        "resolved": resolved,
    }


def operators(_: Any = None) -> dict[str, int]:
    """Number of calls of each operator in this process."""
    import torch

    if not hasattr(torch.ops.soft_npu, "report"):
        return {}
    counts = (line.split(" ", 1) for line in torch.ops.soft_npu.report())
    return {name: int(count) for count, name in counts}


def describe_draft(worker: Any) -> dict[str, Any]:
    """`describe` of the draft model of a worker."""
    return describe(worker.model_runner.drafter.model)


def accepted(llm: Any) -> float:
    """The part of the draft model's tokens that were accepted."""
    prefix = "vllm:spec_decode_num_"
    counts = {metric.name: metric for metric in llm.get_metrics()}
    drafted = counts[f"{prefix}draft_tokens"].value
    return float(counts[f"{prefix}accepted_tokens"].value / drafted)


def answers(llm: Any, checkpoint: str) -> dict[str, Any]:
    """Log-probabilities of a given text; greedy tokens for `PROMPTS` with theirs."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0
    )
    outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
    (output,) = llm.generate(
        _prompt(llm, Path(checkpoint)),
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    return {
        "logprobs": of_prompt(output),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [output.prompt_token_ids for output in outputs],
        "token_logprobs": [of_generated(output) for output in outputs],
    }


def _prompt(llm: Any, checkpoint: Path) -> dict[str, Any]:
    """The held-out text, with an image if the model sees images."""
    if llm.llm_engine.model_config.is_multimodal_model:
        return tiny_vlm.prompt(checkpoint, tiny_vlm.image())
    return {"prompt_token_ids": held_out_tokens(checkpoint)[:LENGTH]}


def serve(
    checkpoint: str,
    reload: bool | str = False,
    sleep: Sequence[int] = (),
    **options: Any,
) -> dict[str, Any]:
    """Serve one checkpoint.

    Args:
        checkpoint: Its directory.
        reload: Whether to load the weights again before the results are made, or the
            directory to load them from.
        sleep: Levels at which to sleep, one after the other, before the results are
            made.
        options: Arguments of `LLM`.

    Returns:
        The config's class; the result of `describe` and the number of calls of each
        operator, by rank; `answers`; with `sleep` the answers before, and for each
        what `sleeping.sleep` returns, with the answers after it; and of a draft model
        the result of `describe`, by rank, and what was `accepted` of it.

    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    speculates = "speculative_config" in options
    defaults: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "dtype": "bfloat16",
        "disable_log_stats": not speculates,
        "gpu_memory_utilization": 0.5,
    }
    llm = LLM(checkpoint, **(defaults | options))
    result: dict[str, Any] = {}
    if reload:
        # Graphs and what is derived from weights exist before.
        llm.generate(PROMPTS, SamplingParams(max_tokens=2), use_tqdm=False)
        sleeping.reload(llm, reload if isinstance(reload, str) else None)
    if sleep:
        result["awake"] = answers(llm, checkpoint)
        result["sleeps"] = [
            sleeping.sleep(llm, level) | answers(llm, checkpoint) for level in sleep
        ]
    before = llm.apply_model(operators)
    result |= answers(llm, checkpoint)
    ranks = llm.apply_model(describe)
    for rank, earlier, all_ in zip(ranks, before, llm.apply_model(operators)):
        rank["operators"] = {
            name: count - earlier.get(name, 0)
            for name, count in all_.items()
            if count > earlier.get(name, 0)
        }
    if speculates:
        drafts = llm.collective_rpc(describe_draft)
        result |= {"drafts": drafts, "accepted": accepted(llm)}
    config = type(llm.llm_engine.vllm_config.quant_config)
    result |= {"config": f"{config.__module__}.{config.__name__}", "ranks": ranks}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", type=json.loads, metavar="RUN")
    arguments = parser.parse_args()
    # Import by name: `describe` is pickled to processes with another `__main__`.
    from tools.soft_npu.serve import serve

    first, *others = arguments.runs
    results = [serve(**first), *(serve(**(LATER | run)) for run in others)]
    arguments.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
