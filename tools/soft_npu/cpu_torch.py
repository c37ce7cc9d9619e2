# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Reduce an installed torch to its CPU part.

Package indexes have torch for Linux built for CUDA, and it is installed here without
its dependencies. Its CUDA libraries, two thirds of its size, are replaced by stubs that
report that there is no device.
"""

import re
import subprocess
from pathlib import Path

from tools.stacks import elf

SOURCES = Path(__file__).parent / "src"
_REMOVED = ("libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so")
_STUBS = _REMOVED[0]
# Stubs of CUDA's own functions return the error cudaErrorNoDevice. Other stubs return a
# pointer to zeros; read as a number, its last byte is 0.
_NO_DEVICE = "return 100;"
_ZEROS = "static char zeros[1 << 16] __attribute__((aligned(4096)));\n"


def strip_cuda(torch: Path) -> None:
    """Replace the CUDA libraries of an installed torch by stubs, once."""
    libraries = torch / "lib"
    if not (libraries / _REMOVED[1]).exists():
        return
    for name in _REMOVED:
        (libraries / name).unlink()
    kept = sorted(libraries.glob("*.so*"))
    names = elf.missing_symbols(kept, [])
    # Type information is data and not a function; it is in torch_cuda.cpp.
    functions = [name for name in names if not re.match("_ZT[IV]", name)]
    own = [name for name in functions if re.match("(cu|nv)[A-Za-z]", name)]
    others = [name for name in functions if name not in own]
    code = elf.stub_source(own, _NO_DEVICE)
    code += _ZEROS + elf.stub_source(others, "return (long)zeros;").replace(
        "stub", "other"
    )
    compiled = libraries / "stubs.o"
    source = compiled.with_suffix(".c")
    source.write_text(code)
    run = (elf.compiler("c"), "-w", "-fPIC", "-c", str(source), "-o", str(compiled))
    subprocess.run(run, check=True)
    link = (elf.compiler("c++"), "-shared", "-fPIC", "-o", str(libraries / _STUBS))
    classes = str(SOURCES / "torch_cuda.cpp")
    subprocess.run([*link, str(compiled), classes], check=True)
    for library in _needed(kept):
        if not (libraries / library).exists() and re.match("lib(cu|nv)", library):
            (libraries / library).symlink_to(_STUBS)


def _needed(libraries: list[Path]) -> set[str]:
    command = ["readelf", "--dynamic", *map(str, libraries)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return set(re.findall(r"Shared library: \[([^\]]+)", output))
