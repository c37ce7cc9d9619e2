# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Stand-ins for modules and functions that this machine lacks.

`python -m tools.soft_npu stand-ins` prints the list.
"""

import os
import types
from collections.abc import Callable
from typing import Any

# Modules that are imported but hardly used.
MODULES = {
    "fla_npu": "operators of linear attention, which vllm-ascend 0.30 asks for by name",
}
# Modules that a chip's host lacks.
MISSING = {"310P": {"triton": "vllm-ascend's image for the 310P uninstalls it"}}


class AnyAttribute(type):
    """A class whose attributes have their own names as values."""

    def __getattr__(cls, name: str) -> str:
        return name


class Module(types.ModuleType):
    """A module that has every attribute."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyAttribute(name, (), {})


def _after_torch() -> None:
    import torch

    # A build without CUDA does not have it.
    del torch._C._host_emptyCache


def _after_triton() -> None:
    # First, because it loads torch_npu, which needs the next import.
    import torch  # noqa: F401

    from tools.soft_npu import triton_kernels

    triton_kernels.provide_extension()
    triton_kernels.install()


def _after_build_info() -> None:
    from vllm_ascend import _build_info

    soc = os.environ["SOFT_NPU_SOC"]
    _build_info.__device_type__ = f"_{soc}" if soc[0].isdigit() else soc


# Functions that replace something in a module after its import.
AFTER: dict[str, Callable[[], None]] = {
    "torch": _after_torch,
    "triton": _after_triton,
    "vllm_ascend._build_info": _after_build_info,
}
REPLACED = {
    "acl": "of CANN's Python interface, the copy that vllm-ascend's sleep mode calls",
    "torch._C._host_emptyCache": "removed, as in a build without CUDA",
    "triton.runtime.driver.active": "names the chip's cores; there is no compiler",
    "triton.runtime.interpreter.GridExecutor": "launches through the dispatcher",
    "triton.runtime.interpreter.InterpreterBuilder": "what it lacks, and bfloat16",
    "triton.language": "functions for the interpreter, before modules take them",
    "triton.language.extra.cann": "three functions, for the interpreter; libdevice",
    "vllm_ascend._build_info.__device_type__": "the chip that --soc names",
    "torchvision": "its build for CUDA, without the operators that it compiles",
    "vllm-*.dist-info": "identifies vLLM as the build for no device, as on NPU hosts",
}


def missing() -> dict[str, str]:
    """Modules that the host of this process's chip lacks, with the reason."""
    return MISSING.get(os.environ["SOFT_NPU_SOC"], {})


def describe() -> list[str]:
    """One line for each difference from a production host."""
    from tools.soft_npu.triton_kernels import FAST

    kernels = dict.fromkeys(FAST, "the same results, without the interpreter")
    lines = {**MODULES, **REPLACED, **kernels}
    lines |= {
        f"{name}, absent on {chip}": reason
        for chip, modules in MISSING.items()
        for name, reason in modules.items()
    }
    return [f"{name}: {reason}" for name, reason in lines.items()]
