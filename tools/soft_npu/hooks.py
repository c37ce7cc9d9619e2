# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Import hooks of a process with software NPUs.

`site/sitecustomize.py` calls `install` in each process. Packages are imported as they
are installed, except for the stand-ins that `stand_ins.py` lists.
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
    """Loads a module with its own loader, and then runs a function."""

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
    """Last finder, which provides stand-ins for modules that are not installed."""

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
    """Install the hooks in this process, and start coverage if requested."""
    sys.meta_path.insert(0, _Finder())
    sys.meta_path.append(_StandIns())
    for name in stand_ins.missing():
        # It cannot be imported, and `find_spec` does not find it.
        sys.modules[name] = None  # type: ignore[assignment]
    if directory := os.environ.get(covered.VARIABLE):
        covered.start(directory)
