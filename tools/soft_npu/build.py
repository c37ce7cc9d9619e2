# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compile the runtime, the libraries over it, and vllm-ascend's own library."""

import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.soft_npu.cpu_torch import SOURCES, strip_cuda
from tools.stacks import elf, stacks
from tools.stacks.real_stack import LIBRARIES

ROOT = Path("build/soft-npu")
DISPATCH = "libsoft_npu.so"
# Parts of every release's stack, which the libraries are compiled against.
_PACKAGES = ("torch", "torch_npu_production")
# Directories of sources, of a library each.
_PARTS = ("runtime", "hccl", "dispatch", "opapi")
_MISSING = "long soft_npu_missing(const char *);\n"
_STUB = 'return soft_npu_missing("{name}");'


def libraries() -> Path:
    """Compile the runtime, named like CANN's libraries, and the libraries over it.

    Checkouts with other sources that share `build` do not replace each other's.
    """
    torch, torch_npu = _packages()
    strip_cuda(torch)

    def make(directory: Path) -> None:
        print("soft_npu: compiling the runtime and the dispatch library", flush=True)
        include = _include(torch, torch_npu)
        runtime, hccl, dispatch, opapi = (
            compile_objects(directory, sorted((SOURCES / part).glob("*.cpp")), include)
            for part in _PARTS
        )
        own = [*torch_npu.glob("_C*.so"), *torch_npu.glob("lib/*.so")]
        missing = set(elf.missing_symbols(own, torch.glob("lib/*.so*")))
        runtime += _stubs(directory, missing - _defined([*runtime, *hccl]))
        link(directory / "libascendcl.so", runtime)
        link(directory / "libhccl.so", hccl, [directory], ["ascendcl"])
        for name in {*LIBRARIES} - {"libascendcl", "libhccl"}:
            (directory / f"{name}.so").symlink_to("libascendcl.so")
        places = (directory, torch / "lib", torch_npu / "lib")
        needs = ("ascendcl", "hccl", "torch_npu", "torch_cpu", "c10")
        link(directory / DISPATCH, dispatch, places, needs)
        link(directory / "libopapi.so", opapi, places, ("ascendcl", "torch_cpu", "c10"))

    code = [path for part in _PARTS for path in sorted((SOURCES / part).iterdir())]
    packages = [stacks.REQUIREMENTS[part][0] for part in _PACKAGES]
    contents = "\n".join([*(path.read_text() for path in code), *packages])
    return stacks.once(ROOT / f"lib-{stacks.digest(contents)[:12]}", contents, make)


def _stubs(directory: Path, names: Iterable[str]) -> list[Path]:
    """Compile stub functions that print their name and fail."""
    source = directory / "stubs.c"
    source.write_text(_MISSING + elf.stub_source(sorted(names), _STUB))
    return compile_objects(directory, [source], [])


def custom_operators(part: str) -> Path:
    """Compile vllm-ascend's own library from its source distribution.

    It has its operators' schemas and meta functions. The kernels of the chip are stubs,
    in a library of their own: what the runtime implements later comes first.

    Args:
        part: One of `stacks.SOURCES`.

    Returns:
        The directory of the library, which is a package next to vllm-ascend's.

    """
    torch, torch_npu = _packages()
    source = stacks.install(part) / "source" / "csrc"

    def make(directory: Path) -> None:
        print(f"soft_npu: compiling the operators of {part}, some minutes", flush=True)
        sources = [*source.glob("*.cpp"), *source.glob("aclnn_torch_adapter/*.cpp")]
        include = [*_include(torch, torch_npu), SOURCES / "cann", source]
        objects = compile_objects(
            directory,
            sources,
            include,
            "-O0",
            "-w",
            "-DVLLM_ENABLE_ATB_AND_DIRECT_KERNELS",
            "-DTORCH_EXTENSION_NAME=vllm_ascend_C",
        )
        target = directory / f"vllm_ascend_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        places = [torch / "lib", torch_npu / "lib", libraries()]
        needs = ["torch_npu", "torch_python", "torch", "c10", "ascendcl"]
        link(target, objects, places, needs)
        known = [path for place in places for path in place.glob("*.so*")]
        stubs = _stubs(directory, elf.missing_symbols([target], known))
        link(directory / "libstubs.so", stubs)
        own = f"-Wl,-rpath,{directory.resolve()}"
        link(target, objects, [*places, directory], [*needs, "stubs"], own)
        for path in [*objects, *stubs]:
            path.unlink()

    return stacks.once(ROOT / f"operators-{part}", stacks.SOURCES[part], make)


def _packages() -> tuple[Path, Path]:
    torch, torch_npu = map(stacks.install, _PACKAGES)
    return torch / "torch", torch_npu / "torch_npu"


def _include(torch: Path, torch_npu: Path) -> list[Path]:
    return [
        torch / "include",
        torch / "include/torch/csrc/api/include",
        torch_npu / "include",
        torch_npu / "include/third_party/acl/inc",
        Path(sysconfig.get_path("include")),
    ]


def compile_objects(
    directory: Path, sources: Sequence[Path], include: Iterable[Path], *options: str
) -> list[Path]:
    """Compile C and C++ files, two at a time."""
    headers = [f"-isystem{path}" for path in include]

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.parent.name}-{source.stem}.o"
        command = [elf.compiler("c"), "-w", "-fPIC"]
        if source.suffix != ".c":
            command = [elf.compiler("c++"), "-std=c++17", "-O2", "-fPIC", "-Wall"]
        command += [*headers, *options, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(
    target: Path,
    objects: Sequence[Path],
    places: Iterable[Path] = (),
    needs: Iterable[str] = (),
    *options: str,
) -> None:
    """Link a shared library, which looks into those it needs in the given order."""
    command = [elf.compiler("c++"), "-shared", "-o", str(target), *map(str, objects)]
    command += [f"-L{place}" for place in places] + [f"-l{name}" for name in needs]
    command += options
    subprocess.run(command, check=True)


def _defined(objects: Iterable[Path]) -> set[str]:
    command = ["nm", "--defined-only", *map(str, objects)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in output.splitlines() if len(line.split()) == 3}
