# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""How an operator of the software NPU is declared.

Beside those that the package emulates: what only an engine asks for. torch_npu has the
schemas and meta functions, vllm-ascend's library those of its own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from vllm_ascend_ct.ops.emulated.registry import refuse

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
KERNELS: dict[str, Callable[..., Any]] = {}
_libraries: dict[str, torch.library.Library] = {}
_implemented: set[str] = set()


def implements(*names: str) -> Callable[[Kernel], Kernel]:
    """Declare the decorated function to be the CPU kernel of operators."""

    def decorate(kernel: Kernel) -> Kernel:
        for name in names:
            KERNELS[name] = kernel
        return kernel

    return decorate


def install(*namespaces: str) -> None:
    """Register the kernels of namespaces, but those that this release has not."""
    defined = {
        (schema.name, schema.overload_name)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.partition("::")[0] in namespaces
    }
    for name, kernel in KERNELS.items():
        namespace = name.partition("::")[0]
        base, _, overload = name.partition(".")
        if (base, overload) not in defined or name in _implemented:
            continue
        if namespace not in _libraries:
            _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        _libraries[namespace].impl(
            name.partition("::")[2], kernel, "CPU", allow_override=True
        )
        _implemented.add(name)


def only_defaults(operator: str, options: dict[str, Any], **allowed: Any) -> None:
    """Refuse options that ask for what is not emulated.

    Args:
        operator: Its name.
        options: By name, as they were given.
        allowed: Values besides None, 0, False and "" that change nothing.

    Raises:
        OperatorLimitError: One of them has another value.

    """
    for name, value in options.items():
        if isinstance(value, torch.Tensor) or (
            value not in (None, 0, False, "", [], ()) and value != allowed.get(name)
        ):
            refuse(operator, f"{name} is not emulated")
