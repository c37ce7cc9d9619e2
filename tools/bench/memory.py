# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Measure the tensor memory that a piece of code allocates."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are created while it is active.

    Args:
        held: Tensors that were created before; freeing them is subtracted.

    Attributes:
        current: Bytes of new tensors that are alive, minus freed bytes of `held`.
        peak: Maximum of `current`.

    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor.untyped_storage())
        self.current = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        for leaf in filter(_is_tensor, tree_leaves(result)):
            storage = leaf.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.current -= size


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)
