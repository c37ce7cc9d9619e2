# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare vLLM's log-probabilities with a float32 reference, one row per scheme.

    python -m tools.numerics.compare_logprobs [SCHEME...] [--model qwen3-moe]

For each scheme: the reference's mean log-probability on held-out text, then the mean
absolute difference from it on the emulated platform (eager, compiled, two ranks, two
ranks with expert parallelism) and on vLLM's own CPU platform.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tools.checkpoints import tiny_moe
from tools.checkpoints.make_checkpoint import DEFAULT_BASE, SCHEMES, make
from tools.numerics.logprobs import mean_difference, reference

CHECKPOINTS = Path("build/checkpoints")
# column -> (VLLM_PLUGINS, arguments of tools.numerics.logprobs)
COLUMNS = {
    "eager": ("ascend_ct", ["--eager"]),
    "compiled": ("ascend_ct", []),
    "tp2": ("ascend_ct", ["--ranks", "2"]),
    "tp2 eager": ("ascend_ct", ["--ranks", "2", "--eager"]),
    "ep2": ("ascend_ct", ["--ranks", "2", "--experts"]),
    "cpu eager": ("", ["--eager"]),
    "cpu compiled": ("", []),
}


def two_ranks() -> str:
    """This process's cores in two halves, for `VLLM_CPU_OMP_THREADS_BIND`."""
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    return "|".join(
        ",".join(map(str, half)) for half in (cores[:middle], cores[middle:])
    )


def run_column(column: str, checkpoints: list[Path]) -> dict[str, list[float] | str]:
    """Serve the checkpoints one after the other in a separate process."""
    plugins, arguments = COLUMNS[column]
    out = CHECKPOINTS / f"{column.replace(' ', '-')}.json"
    environment = {
        **os.environ,
        "VLLM_PLUGINS": plugins,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if "--ranks" in arguments:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = two_ranks()
    else:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    subprocess.run(
        [sys.executable, "-m", "tools.numerics.logprobs", str(out), *arguments]
        + [str(checkpoint) for checkpoint in checkpoints],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    results: dict[str, list[float] | str] = json.loads(out.read_text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", default=list(SCHEMES))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--model", choices=tiny_moe.configs(), help="with experts")
    arguments = parser.parse_args()
    model = arguments.model
    checkpoints = [CHECKPOINTS / (model or "") / name for name in arguments.schemes]
    base, ignore = DEFAULT_BASE, ["lm_head"]
    if model is not None:
        base, ignore = Path("build") / model, list(tiny_moe.IGNORE)
        tiny_moe.make(base, model)
    for checkpoint in checkpoints:
        make(checkpoint, {"Linear": checkpoint.name}, base=base, ignore=ignore)
    expected = {checkpoint.name: reference(checkpoint) for checkpoint in checkpoints}
    columns = {name: run_column(name, checkpoints) for name in arguments.columns}
    width = max(map(len, arguments.schemes))
    print(f"{'scheme':{width}}  reference  " + "  ".join(f"{c:>12}" for c in columns))
    reasons = []
    for scheme, logprobs in expected.items():
        cells = [f"{scheme:{width}}  {sum(logprobs) / len(logprobs):9.4f}"]
        for name, column in columns.items():
            result = column[scheme]
            if isinstance(result, str):
                reasons.append(f"{scheme}, {name}: {result}")
                cells.append(f"{'not served':>12}")
            else:
                cells.append(f"{mean_difference(result, logprobs):12.5f}")
        print("  ".join(cells))
    print(*reasons, sep="\n")


if __name__ == "__main__":
    main()
