# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Registry of the emulated operators, and checks that several of them share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops.soc import current_soc


@dataclass(frozen=True)
class EmulatedOperator:
    """One operator of the `npu` namespace."""

    schema: str
    cpu: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


OPERATORS: list[EmulatedOperator] = []


def emulates(
    schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the CPU kernel of an operator.

    Args:
        schema: torch_npu's schema of the operator.
        fake: Checks the arguments and allocates the results, on any device. The CPU
            kernel calls it first.

    """

    def decorate(cpu: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.append(EmulatedOperator(schema, cpu, fake))
        return cpu

    return decorate


# Calls that a checker remembers before it forgets them all.
_MOST_CALLS = 4096


def checker(fake: Callable[..., torch.Tensor]) -> Callable[..., torch.dtype]:
    """Make a function that checks a call by `fake`, if nothing like it passed before.

    Calls are alike if they differ only in the values of their tensors. For operators of
    layers, where checking each call takes as long as multiplying by a small matrix.

    Returns:
        A function with the arguments of `fake` that returns its result's dtype.

    """
    passed: dict[Hashable, torch.dtype] = {}

    def check(*arguments: Any, **options: Any) -> torch.dtype:
        key: list[Hashable] = [current_soc()]
        for value in (*arguments, *options.values()) if options else arguments:
            if isinstance(value, torch.Tensor):
                key += (value.dtype, value.shape, value.stride())
            else:
                key.append(tuple(value) if isinstance(value, list) else value)
        call = (*key, *options)
        dtype = passed.get(call)
        if dtype is None:
            dtype = fake(*arguments, **options).dtype
            if len(passed) == _MOST_CALLS:
                passed.clear()
            passed[call] = dtype
        return dtype

    return check


def refuse(operator: str, reason: str) -> NoReturn:
    """Refuse a call.

    Args:
        operator: Name of the operator.
        reason: The argument with its value, and what is supported.

    Raises:
        OperatorLimitError: Always. The NPU would reject the call, or the emulation does
            not cover it.

    """
    raise OperatorLimitError(
        f"{operator} on {current_soc().value} ({envs.SOC}): {reason}. A kernel must "
        "not make this call: see vllm_ascend_ct/ops/limits.py."
    )


# The dispatcher passes dtypes as ScalarType numbers to `int dtype` arguments.
_SCALAR_TYPES: dict[int, torch.dtype] = {
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
    24: torch.float8_e4m3fn,
}


def as_dtype(operator: str, code: int | torch.dtype) -> torch.dtype:
    """Convert an `int dtype` argument of an operator to a dtype.

    Args:
        operator: Name of the operator.
        code: A dtype, or a ScalarType number.

    Raises:
        OperatorLimitError: The number is not that of an emulated dtype.

    """
    if isinstance(code, torch.dtype):
        return code
    if code not in _SCALAR_TYPES:
        refuse(operator, f"dtype number {code} is not emulated")
    return _SCALAR_TYPES[code]


def describe(tensor: torch.Tensor) -> str:
    """Describe a tensor's dtype, shape and strides for an error text."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill memory that the NPU leaves unwritten with NaN or the smallest integer."""
    value = (
        float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    )
    return tensor.fill_(value)


# Storage in FRACTAL_NZ, by address: a CPU tensor has no memory format of its own.
_nz: dict[int, StorageWeakRef] = {}


def mark_nz(tensor: torch.Tensor) -> torch.Tensor:
    """Record that a tensor's storage is in FRACTAL_NZ."""
    for address in [address for address, storage in _nz.items() if storage.expired()]:
        del _nz[address]
    storage = tensor.untyped_storage()
    _nz[storage.data_ptr()] = StorageWeakRef(storage)
    return tensor


def is_nz(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage is in FRACTAL_NZ."""
    storage = _nz.get(tensor.untyped_storage().data_ptr())
    return storage is not None and not storage.expired()


def only(
    operator: str, argument: str, tensors: list[torch.Tensor] | None
) -> torch.Tensor | None:
    """The only tensor of a list; None if there is no list.

    Args:
        operator: Name of the operator.
        argument: Name of the argument.
        tensors: Its value.

    Raises:
        OperatorLimitError: The list has another length than 1.

    """
    if tensors is not None and len(tensors) != 1:
        refuse(operator, f"{argument} has {len(tensors)} tensors; emulated: 1")
    return None if tensors is None else tensors[0]


def is_transposed(tensor: torch.Tensor) -> bool:
    """Whether the last two axes are a transposed view, by op-plugin's rule."""
    rows, columns = tensor.shape[-2:]
    return (
        tensor.stride(-2) == 1
        and tensor.stride(-1) == rows
        and not rows == columns == 1
    )


def check_layout(name: str, argument: str, tensor: torch.Tensor) -> None:
    """Refuse tensors that the matmul operators would copy, misread or not support.

    Args:
        name: Name of the operator.
        argument: Name of the argument.
        tensor: Its value.

    Raises:
        OperatorLimitError: The tensor is empty, or neither contiguous nor a transposed
            view.

    """
    if tensor.numel() == 0:
        refuse(name, f"{argument} is {describe(tensor)}; supported: not empty")
    if not (tensor.is_contiguous() or is_transposed(tensor)):
        refuse(
            name,
            f"{argument} is {describe(tensor)}; supported: contiguous, or a transposed "
            "view of a contiguous tensor",
        )
