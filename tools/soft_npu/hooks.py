# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What happens when a process of the software NPU imports something.

`site/sitecustomize.py` calls `install` in each. Nothing else acts: what is imported is
what is installed, but for the stand-ins that `stand_ins.py` lists.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from tools.soft_npu import covered, stand_ins


def _after_torch_npu() -> None:
    from tools.soft_npu import device

    device.install()


def _after_custom_operators() -> None:
    from tools.soft_npu import device

    device.install_custom()


AFTER: dict[str, Callable[[], None]] = {
    "torch_npu": _after_torch_npu,
    "vllm_ascend.vllm_ascend_C": _after_custom_operators,
    **stand_ins.AFTER,
}


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, and then does something more."""

    def __init__(self, loader: Any, after: Callable[[], None]) -> None:
        self.loader, self.after = loader, after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.loader.exec_module(module)
        self.after()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Loader(spec.loader, AFTER[name])
        return spec


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last to be asked for modules that nobody has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in stand_ins.MODULES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return stand_ins.Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def install() -> None:
    """Watch imports of this process, and what it runs if that is asked for."""
    sys.meta_path.insert(0, _Finder())
    sys.meta_path.append(_StandIns())
    if directory := os.environ.get(covered.VARIABLE):
        covered.start(directory)
