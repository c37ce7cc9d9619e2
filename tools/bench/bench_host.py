# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare tokens per second of the emulated platform with vLLM's own CPU platform.

    python -m tools.bench.bench_host [ROW...] [--eager] [--rounds 5]

A row is a scheme and a model with more than 100M random weights. It runs two engines,
each in its own process, which measure in turns. Both serve the same checkpoint if
vLLM's CPU platform supports it; otherwise vLLM's engine serves the unquantized model.
Compare only ratios within one run; those of CPU time hold even if other processes
compete for the cores.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

PROMPT, GENERATED = 512, 32
# Concurrent prompts, and tokens to generate for each.
PHASES = {"prefill": (1, 1), "decode 1": (1, GENERATED), "decode 8": (8, GENERATED)}
CHECKPOINTS = Path("build/bench-host")


@dataclass(frozen=True)
class Row:
    """A checkpoint, and the kernels that must serve it on the emulated platform."""

    model: str
    scheme: str
    kernels: tuple[str, ...]


_WNA16, _INT8 = "AscendWNA16LinearKernel", "AscendInt8ScaledMMLinearKernel"
ROWS = {
    "w4a16": Row("dense", "w4a16-g128", (_WNA16,)),
    "w8a8": Row("dense", "w8a8-channel-dynamic", (_INT8,)),
    "w4a8": Row("dense", "w4a8-channel", ("AscendWNA8LinearKernel",)),
    "moe-w4a16": Row("moe", "w4a16-g128", (_WNA16, "AscendWNA16Experts")),
    "moe-w8a8": Row("moe", "w8a8-channel-dynamic", (_INT8, "AscendWNA8Experts")),
}


def configs() -> dict[str, Any]:
    """Configs of the models, with 121M and 113M parameters in quantized layers."""
    from transformers import Qwen2Config, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": 8192,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {
        "dense": Qwen2Config(
            **common,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=10,
            num_attention_heads=16,
        ),
        "moe": Qwen3MoeConfig(
            **common,
            hidden_size=512,
            head_dim=64,
            num_hidden_layers=6,
            num_attention_heads=8,
            moe_intermediate_size=768,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        ),
    }


def make_checkpoints(row: Row) -> tuple[Path, Path]:
    """Make a row's checkpoint and the unquantized model, unless they exist."""
    from tools.checkpoints import tiny_moe
    from tools.checkpoints.make_checkpoint import make

    base = CHECKPOINTS / row.model
    quantized = CHECKPOINTS / f"{row.model}-{row.scheme}"
    if not (base / "config.json").exists():
        tiny_moe.make_random(base, configs()[row.model])
    if not (quantized / "config.json").exists():
        make(quantized, {"Linear": row.scheme}, base, tiny_moe.IGNORE)
    return quantized, base


class Measurement(NamedTuple):
    """Time per token."""

    seconds: float
    cpu_seconds: float


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, checkpoint: Path, eager: bool) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(checkpoint),
            max_model_len=PROMPT + GENERATED,
            max_num_seqs=8,
            enforce_eager=eager,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            disable_log_stats=False,
        )
        for phase in PHASES:
            self.measure(phase)

    def serving(self) -> dict[str, str | list[str] | None]:
        """The platform, quantization config and kernels that the engine selected."""
        from vllm.platforms import current_platform

        config = self.llm.llm_engine.vllm_config.quant_config
        (kernels,) = self.llm.apply_model(kernels_of)
        return {
            "platform": type(current_platform).__name__,
            "config": type(config).__name__ if config is not None else None,
            "kernels": kernels,
        }

    def measure(self, phase: str) -> Measurement:
        """Time prompts until their first token, or from there to their last token.

        The CPU time covers both parts.
        """
        from vllm import SamplingParams

        batch, generated = PHASES[phase]
        length = PROMPT if generated == 1 else 16
        prompts: Any = [
            {"prompt_token_ids": [(7 * i + j) % 1000 + 1 for j in range(length)]}
            for i in range(batch)
        ]
        cpu_start = time.process_time()
        outputs = self.llm.generate(
            prompts,
            SamplingParams(max_tokens=generated, temperature=0, ignore_eos=True),
            use_tqdm=False,
        )
        cpu_seconds = time.process_time() - cpu_start
        times: list[Any] = [output.metrics for output in outputs]
        first = max(metrics.first_token_ts for metrics in times)
        if generated == 1:
            seconds, tokens = first - times[0].scheduled_ts, length
        else:
            seconds = max(metrics.last_token_ts for metrics in times) - first
            tokens = batch * (generated - 1)
        return Measurement(seconds / tokens, cpu_seconds / tokens)


def kernels_of(model: Any) -> list[str]:
    """Class names of the kernels and experts of a model's quantized layers."""
    found = set()
    for module in model.modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        experts = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            found.add(type(kernel).__name__)
        if experts is not None:
            fused = experts.fused_experts
            found.add(type(getattr(fused, "experts", fused)).__name__)
    return sorted(found)


def serve(
    connection: Connection, ours: bool, checkpoint: Path, eager: bool, threads: int
) -> None:
    """Run an engine in this process and answer requests for measurements.

    Args:
        connection: Receives phases; sends measurements, or the text of an error.
        ours: Whether to use the emulated platform, or vLLM's CPU platform.
        checkpoint: The model.
        eager: Whether to skip compilation.
        threads: Number of threads; 0 for vLLM's default.

    """
    os.environ.pop("VLLM_PLUGINS", None)
    if ours:
        os.environ["VLLM_PLUGINS"] = "ascend_ct"
    if threads:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with redirect_stdout(sys.stderr):
        try:
            engine = Engine(checkpoint, eager)
            connection.send(engine.serving())
            while True:
                connection.send(engine.measure(connection.recv()))
        except EOFError:
            return
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


@contextmanager
def engine(*arguments: Any) -> Iterator[Connection]:
    """Start `serve` in its own process, and stop it on exit."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, *arguments))
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join()


def check(row: Row, ours: Any, stock: Any, quantized: bool) -> None:
    """Check that both engines use the expected platform, config and kernels.

    Args:
        row: The row of the table.
        ours: `Engine.serving` on the emulated platform.
        stock: `Engine.serving` on vLLM's CPU platform.
        quantized: Whether vLLM's engine serves the quantized checkpoint.

    Raises:
        RuntimeError: An engine uses something else.

    """
    expected: Any = {
        "platform": "EmulatedAscendCTPlatform",
        "config": "AscendCTConfig",
        "kernels": sorted(row.kernels),
    }
    if ours != expected:
        raise RuntimeError(f"expected {expected}, got {ours}")
    config = "CompressedTensorsConfig" if quantized else None
    if (stock["platform"], stock["config"]) != ("CpuPlatform", config) or any(
        kernel.startswith("Ascend") for kernel in stock["kernels"]
    ):
        raise RuntimeError(f"expected vLLM's CPU platform, {config}; got {stock}")


@contextmanager
def stock_engine(
    name: str, quantized: Path, base: Path, *arguments: Any
) -> Iterator[tuple[Connection, Any, bool]]:
    """Start an engine on vLLM's CPU platform, if need be on the unquantized model.

    Yields:
        Its connection, its `Engine.serving`, and whether it serves the checkpoint.

    Raises:
        RuntimeError: It serves neither the checkpoint nor the unquantized model.

    """
    with engine(False, quantized, *arguments) as stock:
        serving = answer(stock)
        if not isinstance(serving, str):
            yield stock, serving, True
            return
    print(f"{name}: vLLM's CPU platform does not serve this: {serving.strip()}")
    with engine(False, base, *arguments) as stock:
        serving = answer(stock)
        if isinstance(serving, str):
            raise RuntimeError(serving)
        yield stock, serving, False


def answer(connection: Connection) -> Any:
    """Receive an engine's answer, or describe how its process ended."""
    try:
        return connection.recv()
    except EOFError:
        return "the process died"


def measure_row(name: str, rounds: int, *arguments: Any) -> Iterator[str]:
    """Measure both engines in turns; yield lines of the table with medians."""
    row = ROWS[name]
    quantized, base = make_checkpoints(row)
    with (
        engine(True, quantized, *arguments) as ours,
        stock_engine(name, quantized, base, *arguments) as (stock, serving, same),
    ):
        check(row, answer(ours), serving, same)
        beside = ", ".join(serving["kernels"]) if same else "16-bit model"
        for phase in PHASES:
            times: list[list[Measurement]] = [[], []]
            for _ in range(rounds):
                for connection, measured in zip((ours, stock), times):
                    connection.send(phase)
                    result = answer(connection)
                    if isinstance(result, str):
                        raise RuntimeError(f"{name}, {phase}: {result}")
                    measured.append(result)
            (a, a_cpu), (b, b_cpu) = (
                map(statistics.median, zip(*measured)) for measured in times
            )
            yield (
                f"{name:10}  {phase:8}  {1 / a:8.1f}  {1 / b:8.1f}  {b / a:5.2f}  "
                f"{b_cpu / a_cpu:8.2f}  {beside}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="all cores by default")
    arguments = parser.parse_args()
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{os.cpu_count()} CPUs, {capability}, load average {load_average()}")
    print(
        "tokens/s    phase         ours     stock  ratio  CPU time  stock serves with"
    )
    for name in arguments.rows or ROWS:
        lines = measure_row(name, arguments.rounds, arguments.eager, arguments.threads)
        for line in lines:
            print(line, flush=True)
    print(f"load average {load_average()}")


def load_average() -> str:
    """Load average of the last minute and of the last 15 minutes."""
    minute, _, quarter = os.getloadavg()
    return f"{minute:.1f} and {quarter:.1f}"


if __name__ == "__main__":
    main()
