# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Time what this package adds to the start of an engine.

    python -m tools.bench.bench_start [--runs 3] [CHECKPOINT]

Starts engines for a quantized model in turn on the emulated platform and on vLLM's own
CPU platform, and times the import of the plugin. Prints the least of the CPU's seconds,
which other processes disturb less than the clock's. Fails above 50 ms for the import
and a ratio of 1.02 for the engine.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.soft_npu import suite

CHECKPOINT = "dense-w4a16"
IMPORT_BOUND, RATIO_BOUND = 0.05, 1.02
IMPORT = "import vllm_ascend_ct; vllm_ascend_ct.platform_plugin()"
START = """
import sys, time
from vllm import LLM
LLM(sys.argv[1], max_model_len=64, enforce_eager=True, dtype="bfloat16")
print("SECONDS", time.process_time())
"""


def run(plugins: str, *arguments: str) -> str:
    """Output of a Python process."""
    variables = os.environ | {
        "VLLM_PLUGINS": plugins,
        "VLLM_ASCEND_CT_EMULATE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        env=variables,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.stdout


def import_seconds() -> float:
    """Seconds that the plugin's modules take, as `-X importtime` says."""
    output = run("ascend_ct", "-X", "importtime", "-c", IMPORT)
    own = re.findall(r"import time: +(\d+) \| +\d+ \| +vllm_ascend_ct", output)
    return sum(map(int, own)) / 1e6


def start_seconds(plugins: str, checkpoint: Path) -> float:
    """CPU seconds until an engine is ready, with all imports."""
    output = run(plugins, "-c", START, str(checkpoint))
    platform = "EmulatedAscendCTPlatform"
    assert (platform in output) == (plugins == "ascend_ct"), output[-3000:]
    (seconds,) = re.findall(r"^SECONDS (\S+)$", output, re.MULTILINE)
    return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help=f"{CHECKPOINT}, made")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint
    if checkpoint is None:
        suite.prepare([CHECKPOINT])
        checkpoint = suite.checkpoint(CHECKPOINT)
    plugin = min(import_seconds() for _ in range(arguments.runs))
    print(f"import of the plugin: {1000 * plugin:.1f} ms", flush=True)
    pairs = [
        [start_seconds(name, checkpoint) for name in ("none", "ascend_ct")]
        for _ in range(arguments.runs)
    ]
    print("runs, without and with:", pairs)
    without, with_us = (min(times) for times in zip(*pairs))
    ratio = with_us / without
    print(f"engine: {without:.2f} s without, {with_us:.2f} s with: {ratio:.3f}")
    sys.exit(plugin > IMPORT_BOUND or ratio > RATIO_BOUND)


if __name__ == "__main__":
    main()
