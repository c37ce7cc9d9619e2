# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Registry of the software NPU's operators, in addition to the package's emulation.

torch_npu and vllm-ascend's library provide the schemas and meta functions.
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
    """Register the decorated function as the CPU kernel of operators."""

    def decorate(kernel: Kernel) -> Kernel:
        for name in names:
            KERNELS[name] = kernel
        return kernel

    return decorate


def install(*namespaces: str) -> None:
    """Register the kernels of namespaces, except for operators this release lacks."""
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
    """Refuse options that are not emulated.

    Args:
        operator: Name of the operator.
        options: Given values, by name.
        allowed: Further allowed values, besides None, 0, False and "".

    Raises:
        OperatorLimitError: An option has another value.

    """
    for name, value in options.items():
        if isinstance(value, torch.Tensor) or (
            value not in (None, 0, False, "", [], ()) and value != allowed.get(name)
        ):
            refuse(operator, f"{name} is not emulated")
