# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run vllm-ascend's own code on CPU with emulated operators; also a pytest plugin.

Moving a tensor to an NPU does nothing. Modules that are only imported are stand-ins:
CANN's acl, and fla_npu.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch

from vllm_ascend_ct.ops import emulated


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> str:
        return name


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


STAND_INS = {"acl", "fla_npu"}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def _stay(self: Any, *_: Any, **__: Any) -> Any:
    return self


# Asked last.
sys.meta_path.append(_Finder())
emulated.install()
torch.Tensor.npu = _stay  # type: ignore[attr-defined]
torch.nn.Module.npu = _stay  # type: ignore[assignment]
