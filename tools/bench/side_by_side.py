# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare this package with vllm-ascend's own quantization, in the same engine.

    python -m tools.bench.side_by_side [CHECKPOINT...] [--release R] [--write]

Serves each checkpoint on a software NPU, once by this package and once by vllm-ascend
alone, or the unquantized model where vllm-ascend does not serve it. Counts what does
not depend on the machine: operators that are launched, synchronizations, copies,
allocations, memory while weights are loaded, and graphs. Then says which goals are met;
the status is not 0 if one is missed for which `comparison.KNOWN` has no reason.
`--write` puts the tables and a plot into docs/performance.md. Also prints the time that
Python takes for a call of a linear layer beside its operators; compare it within one
run only.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file, save_file

from tools.bench import comparison
from tools.bench.comparison import (
    FP8_BLOCK,
    ITSELF,
    MIXED,
    MXFP8,
    PACKAGE,
    UNQUANTIZED,
    Counts,
    Row,
)
from tools.docs import section
from tools.soft_npu import environment, suite
from tools.soft_npu.environment import Device

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
START = "<!-- side by side: tools/bench/side_by_side.py -->\n"
END = "<!-- end of side by side -->\n"
# Names of checkpoints, with `@CHIP` for others than A2.
CHECKPOINTS = (
    *("dense-w8a8", "moe-w8a8", f"{MIXED}w4a16-g32", f"{MIXED}w4a8-channel"),
    *("dense-w4a16", "moe-w4a16", FP8_BLOCK, "qwen3-moe/fp8-channel-dynamic"),
    *("dense/fp8-channel-dynamic@A5", MXFP8, "qwen3-moe/fp8-channel-dynamic@A5"),
)
# Those that are served with graphs, too.
WITH_GRAPHS = ("dense-w8a8", "moe-w8a8")
# vllm-ascend's errors for schemes that it does not serve, on a chip without FP8.
REFUSED = (
    *("No compressed-tensors compatible", "dst_type=24; emulated: int8"),
    # vllm-ascend 0.23 takes native FP8 of DeepSeek V4 alone.
    "object has no attribute 'o_groups'",
)
OURS, OWN = "ascend_ct", "ascend"
PROMPT, GENERATED = 16, 8
# Operators of linear layers.
STUBBED = (
    *("npu_dynamic_quant", "npu_quantize", "npu_quant_matmul"),
    *("npu_weight_quant_batchmatmul", "npu_dynamic_mx_quant"),
)
CALLS, ROUNDS = 2000, 7


def counts() -> Counts:
    """Counts of this process until now."""
    import torch
    import torch_npu

    from tools.soft_npu.serve import operators

    allocations = torch_npu.npu.memory_stats().get("allocation.all.allocated", 0)
    transfers = torch.ops.soft_npu.transfers()
    return Counts._make([operators(), *transfers, allocations])


def during(function: Callable[[], Any]) -> Counts:
    """Counts of a function."""
    before = counts()
    function()
    return counts() - before


def watch_loading(measured: dict[str, Any]) -> None:
    """Register a loader that measures vLLM's default one while it loads weights."""
    import torch_npu
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader("auto")
    class Loader(DefaultModelLoader):
        def load_weights(self, *args: Any, **options: Any) -> Any:
            measured["clock"].append(time.process_time())
            super().load_weights(*args, **options)
            measured["clock"].append(time.process_time())

        def load_model(self, *args: Any, **options: Any) -> Any:
            measured["clock"].append(time.process_time())
            before, memory = counts(), torch_npu.npu.memory_allocated()
            torch_npu.npu.reset_peak_memory_stats()
            model = super().load_model(*args, **options)
            measured["load"] = counts() - before
            measured["peak"] = torch_npu.npu.max_memory_allocated() - memory
            # Placeholders of tensors that were loaded may be in cycles.
            gc.collect()
            measured["resident"] = torch_npu.npu.memory_allocated() - memory
            measured["clock"].append(time.process_time())
            return model


def parts(model: Any) -> tuple[int, int]:
    """Number of layers with experts, and bytes of an expert or the largest layer."""
    from vllm.model_executor.layers.linear import LinearBase

    def own(module: Any, prefix: str = "") -> list[Any]:
        named = module.named_parameters(recurse=False)
        return [parameter for name, parameter in named if name.startswith(prefix)]

    def size(module: Any) -> int:
        return sum(parameter.nbytes for parameter in own(module))

    modules = list(model.modules())
    experts = [m for m in modules if own(m, "w13_")]
    layers = [size(m) for m in modules if isinstance(m, LinearBase)]
    of_experts = [size(m) // len(own(m, "w2_")[0]) for m in experts]
    return len(experts), max(of_experts or layers)


def call_microseconds(model: Any) -> float | None:
    """Time that a linear layer's method takes for one row beside its operators.

    The operators are replaced by functions that return what they returned before.

    Returns:
        Microseconds of the model's first linear layer; None if it calls none of
        `STUBBED`.

    """
    import torch
    import torch_npu
    from vllm.model_executor.layers.linear import LinearBase

    layer = next(found for found in model.modules() if isinstance(found, LinearBase))
    x = torch.zeros(1, layer.input_size, dtype=torch.bfloat16, device="npu")

    def call() -> Any:
        return layer.quant_method.apply(layer, x)

    def stub(operator: Any) -> Any:
        known: list[Any] = []

        def stubbed(*arguments: Any, **options: Any) -> Any:
            if not known:
                known.append(operator(*arguments, **options))
            return known[0]

        stubs.append(known)
        return stubbed

    stubs: list[list[Any]] = []
    with ExitStack() as patches, torch.inference_mode():
        for namespace, name in product((torch.ops.npu, torch_npu), STUBBED):
            stubbed = stub(getattr(namespace, name))
            patches.enter_context(mock.patch.object(namespace, name, stubbed))
        call()
        if not any(stubs):
            return None
        return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def start(checkpoint: str, measured: dict[str, Any], graphs: bool) -> Any:
    """Start an engine, and measure its start."""
    measured["clock"] = [0.0]
    watch_loading(measured)
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter

    llm = LLM(
        checkpoint,
        max_model_len=64,
        max_num_seqs=4,
        dtype="bfloat16",
        enforce_eager=not graphs,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 25,
    )
    clock = [*measured.pop("clock"), time.process_time()]
    measured["phases"] = [b - a for a, b in pairwise(clock)]
    if graphs:
        measured["graphs"] = {
            name: getattr(compilation_counter, name) for name in comparison.GRAPHS
        }
    config = llm.llm_engine.vllm_config.quant_config
    measured["config"] = "" if config is None else type(config).__module__
    return llm


def measure(checkpoint: str) -> dict[str, Any]:
    """Serve a checkpoint in this process; return counts and bytes by phase."""
    measured: dict[str, Any] = {}
    llm = start(checkpoint, measured, graphs=False)
    from vllm import SamplingParams

    def generate(tokens: int) -> None:
        prompt: Any = {"prompt_token_ids": list(range(1, PROMPT + 1))}
        parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        llm.generate(prompt, parameters, use_tqdm=False)

    generate(GENERATED)
    shorter = during(partial(generate, GENERATED))
    longer = during(partial(generate, GENERATED + 1))
    measured["prefill"] = during(partial(generate, 1))
    measured["decode"] = longer - shorter
    (measured["call"],) = llm.apply_model(call_microseconds)
    ((measured["experts"], measured["part"]),) = llm.apply_model(parts)
    return measured


def run(
    checkpoint: Path, device: Device, plugins: str, graphs: bool = False
) -> dict[str, Any] | None:
    """Measure a checkpoint in a process of its own; None if it is refused.

    Raises:
        RuntimeError: The process failed otherwise.

    """
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as state:
        out = Path(state) / "out.json"
        variables = environment.variables(device, Path(state)) | {
            "VLLM_PLUGINS": plugins,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(Path(state) / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tools.bench.side_by_side", str(checkpoint)]
        command += ["--measure", str(out), *(["--graphs"] if graphs else [])]
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
        if result.returncode == 0:
            measured: dict[str, Any] = json.loads(out.read_text())
            return measured
    output = result.stdout + result.stderr
    if plugins == OWN and any(text in output for text in REFUSED):
        return None
    raise RuntimeError(output[-4000:])


def as_native_fp8(checkpoint: Path, directory: Path) -> Path:
    """Write FP8 weights in blocks in the format that vllm-ascend 0.30 resolves."""
    copy = directory / "native-fp8"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    given = config["quantization_config"]["config_groups"]
    block = next(iter(given.values()))["weights"]["block_structure"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
        "modules_to_not_convert": ["lm_head"],
    }
    (copy / "config.json").write_text(json.dumps(config))
    for path in copy.glob("*.safetensors"):
        tensors = {
            name.replace("weight_scale", "weight_scale_inv"): tensor.float()
            if name.endswith("weight_scale")
            else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    return copy


def as_mixed(checkpoint: Path, directory: Path) -> Path:
    """Write MX weights in the format in which vllm-ascend 0.30 reads activations."""
    copy = directory / "mixed"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format"] = "mixed-precision"
    (copy / "config.json").write_text(json.dumps(config))
    return copy


# Other forms of the same weights, for vllm-ascend.
FORMS = {FP8_BLOCK: ("fp8", as_native_fp8), MXFP8: ("mixed-precision", as_mixed)}


def beside(entry: str, device: Device) -> tuple[str, Path, dict[str, Any]]:
    """What to compare with: vllm-ascend, or the 16-bit model if it refuses.

    Returns:
        What serves, the checkpoint that it serves, and what was measured.

    """
    name = entry.partition("@")[0]
    path = suite.checkpoint(name)
    own = run(path, device, OWN)
    if own is not None:
        assert own["config"].startswith("vllm_ascend.")
        return ITSELF, path, own
    if entry in FORMS:
        form, write = FORMS[entry]
        with tempfile.TemporaryDirectory(prefix="side-by-side-") as directory:
            copy = write(path, Path(directory))
            own = run(copy, device, OWN)
        if own is not None:
            assert own["config"].startswith("vllm_ascend.")
            return f"{ITSELF}, as `{form}`", copy, own
    model = suite.contents(name).partition("/")[0]
    suite.prepare([model])
    base = run(suite.checkpoint(model), device, OWN)
    assert base is not None and not base["config"]
    return UNQUANTIZED, suite.checkpoint(model), base


def rows(entry: str, release: str) -> Iterator[Row]:
    """Measure a checkpoint by this package and by vllm-ascend."""
    name, _, chip = entry.partition("@")
    device = Device(release, chip or Device.soc)
    path = suite.checkpoint(name)
    ours = run(path, device, OURS)
    assert ours is not None and ours["config"].startswith("vllm_ascend_ct.")
    server, its_path, other = beside(entry, device)
    found = ((PACKAGE, OURS, path, ours), (server, OWN, its_path, other))
    for server, plugins, served, measured in found:
        graphs = {}
        if entry in WITH_GRAPHS:
            graphs = run(served, device, plugins, graphs=True) or {}
        yield Row(entry, release, server, measured | graphs)


def with_report(page: str, rows: Sequence[Row]) -> str:
    """Replace the tables in the page's text."""
    text = f"Measured on {date.today()}:\n\n{comparison.report(rows)}"
    return section.replace(page, START, END, f"{text}\n{comparison.IMAGE}\n")


def judge(found: Sequence[Row]) -> int:
    """Print the goals and what they were measured by; return the exit status."""
    for pair in comparison.pairs(found):
        calls = [row.measured["call"] for row in pair]
        print(pair.ours.title, "beside", pair.other.server)
        for phase in ("prefill", "decode"):
            print(f"  {phase}, ours : its: {comparison.differences(pair, phase)}")
        if None not in calls:
            print("  Python of a linear call, us, ours : its:", *calls)
    missed = False
    for verdict in comparison.verdicts(comparison.pairs(found)):
        print(*comparison.goals_line(verdict), sep=" | ")
        missed |= bool(verdict.unknown)
    return int(missed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = suite.end_to_end()
    parser.add_argument("checkpoints", nargs="*", default=CHECKPOINTS)
    parser.add_argument("--release", choices=known, help="all by default")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--keep", type=Path, help="go on with the rows of this JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--graphs", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        (checkpoint,) = arguments.checkpoints
        measured: dict[str, Any] = {}
        if arguments.graphs:
            start(checkpoint, measured, graphs=True)
            measured = {k: measured[k] for k in ("graphs", "phases")}
        else:
            measured = measure(checkpoint)
        arguments.measure.write_text(json.dumps(measured))
        return
    releases = [arguments.release] if arguments.release else known
    found = []
    if arguments.keep and arguments.keep.exists():
        found = [Row(*row) for row in json.loads(arguments.keep.read_text())]
    kept = {(row.release, row.checkpoint) for row in found}
    suite.prepare([entry.partition("@")[0] for entry in arguments.checkpoints])
    for release, name in product(releases, arguments.checkpoints):
        if (release, name) in kept:
            continue
        for row in rows(name, release):
            print(*comparison.counts_line(row), sep=" | ", flush=True)
            found.append(row)
        if arguments.keep:
            arguments.keep.write_text(json.dumps(found))
    if arguments.write:
        page = with_report(PAGE.read_text(), found)
        PAGE.write_text(page)
        (PAGE.parent / comparison.PLOT).write_text(comparison.plot(page))
    sys.exit(judge(found))


if __name__ == "__main__":
    main()
