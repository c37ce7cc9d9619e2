# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Use the real torch_npu and vllm-ascend on a machine without an NPU.

    python -m tools.stacks.real_stack test [pytest arguments]
    python -m tools.stacks.real_stack run COMMAND...

Downloads their wheels into `build/real-stack`, and compiles stubs of the CANN libraries
that torch_npu links to, whose functions return 0. Imports, operator schemas, meta
functions and all Python code then work; operators are emulated.

There are two stacks: `torch_npu` with this environment's vLLM, and `vllm_ascend`, which
is torch_npu and vllm-ascend with the Python files of vLLM 0.23.0 (its compiled files
need another torch).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tools.stacks import elf, stacks

STACKS = ("torch_npu", "vllm_ascend")

# The CANN libraries that torch_npu links to.
LIBRARIES = [
    *("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph"),
    *("libacl_tdt_channel", "libruntime", "libprofapi", "libatb"),
]


@cache
def environment(stack: str) -> dict[str, str]:
    """Environment variables to import a stack; installs the stack if it is missing."""
    paths = [stacks.install(name) for name in stacks.STACKS[stack]]
    stubs = make_stubs(paths[0])
    check = "import torch_npu; torch_npu.npu_format_cast"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*reversed(paths), Path.cwd()])),
        "LD_LIBRARY_PATH": str(stubs),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "REAL_STACK_EMULATE": "1" if stack == "torch_npu" else "0",
    }
    if stack == "torch_npu":
        variables["REAL_STACK_PRODUCTION"] = str(stacks.install("torch_npu_production"))
    command = [sys.executable, "-c", check]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"real_stack: importing torch_npu failed:\n{result.stderr}")
    return variables


def make_stubs(torch_npu: Path) -> Path:
    """Compile stubs of CANN's libraries."""

    def make(directory: Path) -> None:
        import torch

        package = torch_npu / "torch_npu"
        own = [*package.glob("_C*.so"), *package.glob("lib/*.so")]
        others = Path(torch.__file__).parent.glob("lib/*.so*")
        names = elf.missing_symbols(own, others)
        for library in LIBRARIES:
            code = elf.stub_source(names if library == LIBRARIES[0] else [])
            elf.compile_library(directory / f"{library}.so", code)

    contents = str(stacks.REQUIREMENTS["torch_npu"])
    return stacks.once(stacks.ROOT / "stubs", contents, make)


# Usual tests that also run on each stack. Both stacks have torch_npu, so tests that do
# not depend on its schemas run only with the vLLM of the `vllm_ascend` stack.
OTHER_TESTS = {
    "torch_npu": ("tests/ops",),
    "vllm_ascend": (
        "tests/weights",
        "tests/kernels",
        "tests/fused_moe",
        "tests/quantization",
        "tests/loading",
        "tests/layers/test_reload.py",
        "tests/layers/test_vocabulary.py",
    ),
}


# Tests that also run over the next release of vllm-ascend, without its compiled
# operators.
NEXT = "vllm_ascend_next"
NEXT_TESTS = "tests/real_stack/test_modelslim_bridge.py"

# vllm-ascend is installed for one chip; the default is A2.
OTHER_CHIPS = ("A5", "310P")
CHIP_TESTS = "tests/real_stack/test_vllm_ascend_chips.py"


def test(arguments: Sequence[str]) -> int:
    """Run the tests of each stack, and some of the usual tests on it."""
    runs = []
    for stack in STACKS:
        runs.append((stack, "", ["-m", stack, "tests/real_stack"]))
        runs.append((stack, "", list(OTHER_TESTS[stack])))
    runs.append((NEXT, "", ["-m", "vllm_ascend", NEXT_TESTS]))
    runs += [("vllm_ascend", c, ["-m", "vllm_ascend", CHIP_TESTS]) for c in OTHER_CHIPS]
    codes = []
    for stack, chip, options in runs:
        print(f"real_stack: {stack} {chip}", flush=True)
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        variables = environment(stack) | {"REAL_STACK_CHIP": chip}
        codes.append(subprocess.run(command, env=variables).returncode)
    # After a crash the code is negative.
    return int(any(codes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("test", "run"))
    parser.add_argument("--stack", choices=(*STACKS, NEXT), default="vllm_ascend")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.action == "test":
        sys.exit(test(arguments.arguments))
    variables = environment(arguments.stack)
    sys.exit(subprocess.run(arguments.arguments, env=variables).returncode)


if __name__ == "__main__":
    main()
