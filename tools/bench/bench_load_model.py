# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Time loading of large checkpoints, beside reading their files.

    python -m tools.bench.bench_load_model [--gb 1 4] [--directory DIR]

Writes checkpoints of random weights, experts and dense layers, and loads each with
vLLM's loader on the emulated platform: reading headers, checking them, loading and
laying out. Times are the CPU's, in one process on one thread, and the files are in the
page cache. A ratio that does not grow with the size is linear in bytes. What is written
is deleted; it takes as much disk as the largest checkpoint, and loading twice that of
memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from tools.checkpoints import tiny_moe
from tools.checkpoints.make_checkpoint import ALL_SCHEMES

SCHEMES = ("w4a16-g128", "w8a8-channel-dynamic")
HEADER = (
    "| layers | scheme | GB | tensors | read, s | build, reads | load | lay out | all |"
    "\n|" + " --- |" * 9
)
GROUP = 128
HIDDEN, HEADS, HEAD = 2048, 16, 128
EXPERTS, OF_EXPERT, OF_DENSE = 64, 768, 8192
_SIZES = tiny_moe.COMMON | {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
}


def config(kind: str, scheme: str, layers: int) -> PretrainedConfig:
    """The config of a model with experts, or of a dense one."""
    sizes = _SIZES | {"num_hidden_layers": layers}
    group = ALL_SCHEMES[scheme].model_dump(mode="json") | {"targets": ["Linear"]}
    packed = scheme.startswith("w4")
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": group | {"format": None}},
    }
    made: PretrainedConfig
    if kind == "experts":
        made = Qwen3MoeConfig(
            **sizes,
            intermediate_size=OF_EXPERT,
            moe_intermediate_size=OF_EXPERT,
            num_experts=EXPERTS,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            architectures=["Qwen3MoeForCausalLM"],
        )
    else:
        made = Qwen3Config(
            **sizes, intermediate_size=OF_DENSE, architectures=["Qwen3ForCausalLM"]
        )
    made.quantization_config = quantization
    made.dtype = torch.bfloat16
    return made


def linear(name: str, n: int, k: int, scheme: str) -> dict[str, torch.Tensor]:
    """Random tensors of a layer."""
    if scheme.startswith("w4"):
        words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32)
        return {
            f"{name}.weight_packed": words,
            f"{name}.weight_scale": torch.rand(n, k // GROUP).bfloat16() + 0.1,
            f"{name}.weight_shape": torch.tensor([n, k]),
        }
    return {
        f"{name}.weight": torch.randint(-128, 128, (n, k), dtype=torch.int8),
        f"{name}.weight_scale": torch.rand(n, 1).bfloat16() + 0.1,
    }


def block(kind: str, scheme: str) -> dict[str, torch.Tensor]:
    """Random tensors of one block, without its prefix."""
    width = HEADS * HEAD
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    shapes = dict.fromkeys(names, (width, HIDDEN))
    shapes["self_attn.o_proj"] = (HIDDEN, width)
    tensors = {
        f"{name}.weight": torch.ones(size, dtype=torch.bfloat16)
        for name, size in (
            *(("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)),
            *(("self_attn.q_norm", HEAD), ("self_attn.k_norm", HEAD)),
        )
    }
    prefixes, inner = ["mlp"], OF_DENSE
    if kind == "experts":
        prefixes = [f"mlp.experts.{number}" for number in range(EXPERTS)]
        inner = OF_EXPERT
        tensors["mlp.gate.weight"] = torch.rand(EXPERTS, HIDDEN).bfloat16()
    for prefix in prefixes:
        shapes |= {
            f"{prefix}.gate_proj": (inner, HIDDEN),
            f"{prefix}.up_proj": (inner, HIDDEN),
            f"{prefix}.down_proj": (HIDDEN, inner),
        }
    for name, (n, k) in shapes.items():
        tensors |= linear(name, n, k, scheme)
    return tensors


def write(directory: Path, kind: str, scheme: str, size: int) -> int:
    """Write a checkpoint of about `size` bytes, a file for each block.

    Returns:
        Number of tensors.

    """
    tensors = block(kind, scheme)
    layers = max(1, round(size / sum(t.nbytes for t in tensors.values())))
    made = config(kind, scheme, layers)
    table = torch.rand(made.vocab_size, HIDDEN).bfloat16()
    others = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    others["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    files = {"others.safetensors": others}
    files |= {
        f"block-{layer:04}.safetensors": {
            f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()
        }
        for layer in range(layers)
    }
    for name, content in files.items():
        save_file(content, directory / name, {"format": "pt"})
    names = {name: file for file, content in files.items() for name in content}
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    made.save_pretrained(directory)
    return len(names)


def read(directory: Path) -> float:
    """CPU seconds to read the files, once they are in the page cache."""
    paths = sorted(directory.glob("*.safetensors"))
    buffer = bytearray(max(path.stat().st_size for path in paths))
    seconds = 0.0
    for _ in range(2):
        start = time.process_time()
        for path in paths:
            with path.open("rb", buffering=0) as file:
                file.readinto(buffer)
        seconds = time.process_time() - start
    return seconds


def load(directory: Path) -> list[float]:
    """CPU seconds to read the files; to build the model; to load; to lay out."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.plugins import load_general_plugins
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_ascend_ct.cli.ranks import first_of_ranks

    load_general_plugins()
    vllm_config = EngineArgs(
        str(directory), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64
    ).create_engine_config()
    assert type(vllm_config.quant_config).__module__.startswith("vllm_ascend_ct.")
    torch.set_num_threads(1)
    of_reading = read(directory)
    model_config = vllm_config.model_config
    dtype: Any = model_config.dtype
    # What `BaseModelLoader.load_model` does, which asks for an accelerator then.
    with first_of_ranks(vllm_config), set_default_torch_dtype(dtype):
        clock = [time.process_time()]
        model = initialize_model(vllm_config)
        clock.append(time.process_time())
        get_model_loader(vllm_config.load_config).load_weights(model, model_config)
        clock.append(time.process_time())
        process_weights_after_loading(model, model_config, torch.device("cpu"))
        clock.append(time.process_time())
    return [of_reading, *(b - a for a, b in pairwise(clock))]


def results(
    sizes: list[float], directory: Path | None, schemes: Sequence[str] = SCHEMES
) -> Iterator[str]:
    """Measure each model, in a process of its own, as lines of a table."""
    variables = os.environ | {
        "VLLM_PLUGINS": "ascend_ct",
        "VLLM_ASCEND_CT_EMULATE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for kind in ("experts", "dense"):
        for scheme in schemes:
            for size in sizes:
                with tempfile.TemporaryDirectory(dir=directory) as made:
                    count = write(Path(made), kind, scheme, int(size * 1e9))
                    files = Path(made).glob("*.safetensors")
                    written = sum(path.stat().st_size for path in files)
                    output = subprocess.run(
                        [sys.executable, "-m", __spec__.name, "--load", made],
                        env=variables,
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    ).stdout
                reading, *parts = map(float, output.split()[-4:])
                ratios = " | ".join(f"{part / reading:.1f}" for part in parts)
                yield (
                    f"| {kind} | {scheme} | {written / 1e9:.2f} | {count} | "
                    f"{reading:.2f} | {ratios} | {sum(parts) / reading:.1f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", nargs="+", type=float, default=[1, 4])
    parser.add_argument("--directory", type=Path, help="where to write")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(*load(arguments.load))
        return
    print(HEADER)
    for line in results(arguments.gb, arguments.directory):
        print(line, flush=True)


if __name__ == "__main__":
    main()
