# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare this package with vllm-ascend's own quantization, in the same engine.

    python -m tools.bench.side_by_side [CHECKPOINT...] [--release R] [--write]

Serves each checkpoint on a software NPU, once by this package and once by vllm-ascend
alone, or the unquantized model where vllm-ascend does not serve it. Counts what does
not depend on the machine: operators that are launched, synchronizations, copies,
allocations, and memory while weights are loaded. `--write` puts the table into
docs/performance.md. Also prints the time that Python takes for a call of a linear layer
beside its operators; compare it within one run only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tools.docs import section
from tools.soft_npu import environment, suite
from tools.soft_npu.environment import Device

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
START = "<!-- side by side: tools/bench/side_by_side.py -->\n"
END = "<!-- end of side by side -->\n"
CHECKPOINTS = (
    *("dense-w8a8", "moe-w8a8", "qwen3-moe/w8a8-channel-dynamic+w4a16-g32"),
    *("dense-w4a16", "moe-w4a16"),
)
# vllm-ascend's error for a scheme that it does not serve.
REFUSED = "No compressed-tensors compatible"
OURS, OWN = "ascend_ct", "ascend"
PROMPT, GENERATED = 16, 8
# Operators of linear layers.
STUBBED = (
    *("npu_dynamic_quant", "npu_quantize", "npu_quant_matmul"),
    "npu_weight_quant_batchmatmul",
)
CALLS, ROUNDS = 2000, 7
HEADER = (
    "| checkpoint | vllm-ascend | served by | launches: prefill | decode | waits | "
    "copies to host | to device | allocations | load: peak / resident | copied to host "
    "|\n|" + " --- |" * 11 + "\n"
)


class Counts(NamedTuple):
    """What an engine did in one phase.

    Attributes:
        launches: Number of launches, by operator.
        waits: How often the host waited for the device.
        to_host: Copies to the host.
        to_host_bytes: Their bytes.
        to_device: Copies to the device.
        to_device_bytes: Their bytes.
        allocations: Allocations of device memory, most of them from torch's cache.

    """

    launches: dict[str, int]
    waits: int
    to_host: int
    to_host_bytes: int
    to_device: int
    to_device_bytes: int
    allocations: int

    def __sub__(self, other: "Counts") -> "Counts":
        launches = Counter(self.launches)
        launches.subtract(other.launches)
        numbers = (a - b for a, b in zip(self[1:], other[1:]))
        return Counts({k: n for k, n in launches.items() if n}, *numbers)


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
        def load_model(self, *args: Any, **options: Any) -> Any:
            before, memory = counts(), torch_npu.npu.memory_allocated()
            torch_npu.npu.reset_peak_memory_stats()
            model = super().load_model(*args, **options)
            measured["load"] = counts() - before
            measured["peak"] = torch_npu.npu.max_memory_allocated() - memory
            measured["resident"] = torch_npu.npu.memory_allocated() - memory
            return model


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


def measure(checkpoint: str) -> dict[str, Any]:
    """Serve a checkpoint in this process; return counts and bytes by phase."""
    measured: dict[str, Any] = {}
    watch_loading(measured)
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        max_model_len=64,
        max_num_seqs=4,
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 25,
    )

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
    config = llm.llm_engine.vllm_config.quant_config
    measured["config"] = "" if config is None else type(config).__module__
    return measured


class Row(NamedTuple):
    """A line of the table."""

    checkpoint: str
    release: str
    server: str
    measured: dict[str, Any]


def run(checkpoint: Path, release: str, plugins: str) -> dict[str, Any] | None:
    """Measure a checkpoint in a process of its own; None if it is refused.

    Raises:
        RuntimeError: The process failed otherwise.

    """
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as state:
        out = Path(state) / "out.json"
        variables = environment.variables(Device(release), Path(state)) | {
            "VLLM_PLUGINS": plugins,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(Path(state) / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tools.bench.side_by_side"]
        result = subprocess.run(
            [*command, "--measure", str(out), str(checkpoint)],
            env=variables,
            capture_output=True,
            text=True,
        )
        if result.returncode == 0:
            measured: dict[str, Any] = json.loads(out.read_text())
            return measured
    output = result.stdout + result.stderr
    if plugins == OWN and REFUSED in output:
        return None
    raise RuntimeError(output[-4000:])


def rows(names: Sequence[str], releases: Sequence[str]) -> Iterator[Row]:
    """Measure each checkpoint by this package and by vllm-ascend."""
    suite.prepare(names)
    for release in releases:
        for name in names:
            path = suite.checkpoint(name)
            ours = run(path, release, OURS)
            assert ours is not None and ours["config"].startswith("vllm_ascend_ct.")
            yield Row(name, release, "this package", ours)
            own = run(path, release, OWN)
            if own is not None:
                assert own["config"].startswith("vllm_ascend.")
                yield Row(name, release, "vllm-ascend", own)
                continue
            model = suite.contents(name).partition("/")[0]
            suite.prepare([model])
            base = run(suite.checkpoint(model), release, OWN)
            assert base is not None and not base["config"]
            yield Row(name, release, "16-bit model", base)


def line(row: Row) -> str:
    """A row as Markdown."""
    load, prefill, decode = (
        Counts(*row.measured[phase]) for phase in ("load", "prefill", "decode")
    )
    peak, resident = row.measured["peak"], row.measured["resident"]
    cells = (
        *(suite.contents(row.checkpoint), row.release, row.server),
        *(sum(prefill.launches.values()), sum(decode.launches.values())),
        decode.waits,
        f"{decode.to_host}, {decode.to_host_bytes} B",
        f"{decode.to_device}, {decode.to_device_bytes} B",
        decode.allocations,
        f"{peak / 2**20:.2f} / {resident / 2**20:.2f} MiB",
        f"{load.to_host_bytes} B",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def differences(ours: Row, other: Row) -> str:
    """Operators that one launches more often than the other in a decode step."""
    a, b = (Counts(*row.measured["decode"]).launches for row in (ours, other))
    changed = [
        f"{name} {a.get(name, 0)}:{b.get(name, 0)}"
        for name in sorted({*a, *b})
        if a.get(name, 0) != b.get(name, 0)
    ]
    return ", ".join(changed) or "the same"


def with_table(page: str, lines: Sequence[str]) -> str:
    """Replace the table in the page's text."""
    table = f"Measured on {date.today()}:\n\n{HEADER}{''.join(lines)}"
    return section.replace(page, START, END, table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = suite.end_to_end()
    parser.add_argument("checkpoints", nargs="*", default=CHECKPOINTS)
    parser.add_argument("--release", choices=known, help="all by default")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measured = measure(*arguments.checkpoints)
        arguments.measure.write_text(json.dumps(measured))
        return
    releases = [arguments.release] if arguments.release else known
    lines: list[str] = []
    previous = None
    print(HEADER, end="")
    for row in rows(arguments.checkpoints, releases):
        lines.append(line(row))
        print(lines[-1], end="", flush=True)
        if row.server == "vllm-ascend" and previous is not None:
            print(f"  decode, this package:vllm-ascend: {differences(previous, row)}")
            calls = (found.measured["call"] for found in (previous, row))
            print(f"  Python of a linear call, us: {' : '.join(map(str, calls))}")
        previous = row
    if arguments.write:
        PAGE.write_text(with_table(PAGE.read_text(), lines))


if __name__ == "__main__":
    main()
