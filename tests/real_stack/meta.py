# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare emulated results with torch_npu's own meta functions, for each call."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vllm_ascend_ct.ops.dtypes import E2M1

# Faults of torch_npu 2.13.0's meta functions, for calls that the device's documents
# allow. Operators without a meta function:
WITHOUT_META = {
    "npu_convert_weight_to_int4pack": "no fake impl or Meta kernel",
    "npu_format_cast": "no fake impl or Meta kernel",
}
# Returns nothing for int4 weights with per-group scales.
WITHOUT_RESULT = ("npu_grouped_matmul_swiglu_quant_v2", "dequant_mode", 1)
# Counts bytes as if each held one value of E2M1.
TWICE_AS_WIDE = ("npu_grouped_matmul_swiglu_quant_v2", "quant_dtype", E2M1)


class MetaChecked(TorchDispatchMode):
    """Calls torch_npu's meta function for each call of an NPU operator.

    Attributes:
        calls: Number of compared calls, by operator.
        faults: Differences from the meta functions.
        without_result: Calls of `WITHOUT_RESULT`.

    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.faults: list[str] = []
        self.without_result = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "npu":
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        if name not in WITHOUT_META:
            self._compare(name, result, func, args, kwargs)
        return result

    def _compare(
        self, name: str, result: Any, func: Any, args: Any, kwargs: Any
    ) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        try:
            expected = func(*to_meta(args), **to_meta(kwargs))
        except Exception as error:
            self.faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            return
        ours, theirs = signature(result), signature(expected)
        if (name, kwargs.get(TWICE_AS_WIDE[1])) == TWICE_AS_WIDE[::2]:
            (dtype, (rows, width)), *scales = theirs
            theirs = [(dtype, (rows, width // 2)), *scales]
        operator, argument, value = WITHOUT_RESULT
        if not theirs and name == operator and kwargs.get(argument) == value:
            self.without_result += 1
        elif ours != theirs:
            self.faults.append(f"{name}: emulated {ours}, meta function {theirs}")


def to_meta(values: Any) -> Any:
    """The same arguments without data."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )

    return tree_map_only(torch.Tensor, change, values)


def signature(result: Any) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of an operator's results."""
    return [
        (value.dtype, tuple(value.shape))
        for value in tree_leaves(result)
        if isinstance(value, torch.Tensor)
    ]
