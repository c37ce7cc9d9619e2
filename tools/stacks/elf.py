# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compile stubs of shared libraries that define the symbols other libraries need."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def compiler(language: str) -> str:
    """Find the compiler for "c" or "c++".

    Raises:
        SystemExit: The compiler or nm is missing.

    """
    name = {"c": "gcc", "c++": "g++"}[language]
    if shutil.which(name) is None or shutil.which("nm") is None:
        raise SystemExit(f"No {name} or no nm found. Install {name} and binutils.")
    return name


def symbols(option: str, files: Iterable[Path], kind: str = "") -> set[str]:
    """Names in the dynamic symbol tables of libraries.

    Args:
        option: Option of `nm` that selects symbols.
        files: The libraries.
        kind: Symbol types to keep; all if empty.

    """
    command = ["nm", "--dynamic", "--without-symbol-versions", option]
    output = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True
    ).stdout
    fields = [line.split() for line in output.splitlines()]
    return {f[-1] for f in fields if len(f) > 1 and (not kind or f[-2] == kind)}


def missing_symbols(libraries: Sequence[Path], others: Iterable[Path]) -> list[str]:
    """Symbols that libraries use and none of the known libraries define.

    Args:
        libraries: The libraries.
        others: Libraries that define symbols, in addition to those of C, C++ and
            Python.

    """
    loaded = re.findall(r"/\S+\.so[.\d]*$", Path("/proc/self/maps").read_text(), re.M)
    known = [*others, *map(Path, set(loaded)), Path(sys.executable).resolve()]
    known += [_of_compiler(name) for name in _LANGUAGE]
    defined = symbols("--defined-only", [*libraries, *known])
    undefined = symbols("--undefined-only", libraries, kind="U")
    return sorted(undefined - defined)


_LANGUAGE = ("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6")


def _of_compiler(library: str) -> Path:
    command = [compiler("c++"), f"-print-file-name={library}"]
    return Path(subprocess.check_output(command, text=True).strip())


def stub_source(names: Sequence[str], body: str = "return 0;") -> str:
    """C code of stub functions.

    Args:
        names: Their names in symbol tables.
        body: Their body; "{name}" in it is replaced.

    """
    return "".join(
        f'long stub{number}(void) __asm__("{name}");\n'
        f"long stub{number}(void) {{ {body.replace('{name}', name)} }}\n"
        for number, name in enumerate(names)
    )


def compile_library(target: Path, code: str, *options: str) -> None:
    """Compile C code into a shared library, and keep the code next to it."""
    source = target.with_suffix(".c")
    source.write_text(code)
    command = [compiler("c"), "-w", "-shared", "-fPIC", "-o", str(target), str(source)]
    subprocess.run([*command, *options], check=True)
