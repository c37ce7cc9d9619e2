# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Tensors derived from weights, kept as long as the weights live unchanged."""

from collections.abc import Callable, Hashable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_SAMPLES = 64
_State = tuple[int, float]


class DerivedTensors:
    """A cache keyed by where tensors lie in memory, not by Python identity.

    An operator sees new tensor objects at each call, over storage that stays. An entry
    dies with any of its sources and is computed anew when one was written: torch counts
    writes, but for those through `.data`, so some values are compared as well.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def get(
        self,
        key: Hashable,
        sources: list[torch.Tensor],
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Return `compute()`, from the cache if `sources` are as they were."""
        places = (key, *(_place(source) for source in sources))
        states = [_state(source) for source in sources]
        entry = self._entries.get(places)
        if entry is None or entry.expired() or entry.states != states:
            self._entries = {
                known: other
                for known, other in self._entries.items()
                if not other.expired()
            }
            entry = _Entry(sources, states, compute())
            self._entries[places] = entry
        return entry.value

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


class _Entry:
    def __init__(
        self, sources: list[torch.Tensor], states: list[_State], value: torch.Tensor
    ) -> None:
        self.storages = [StorageWeakRef(s.untyped_storage()) for s in sources]
        self.states = states
        self.value = value

    def expired(self) -> bool:
        return any(storage.expired() for storage in self.storages)


def _place(tensor: torch.Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _state(tensor: torch.Tensor) -> _State:
    version = 0 if tensor.is_inference() else tensor._version
    # Contiguous or transposed, its elements lie side by side.
    step = max(1, tensor.numel() // _SAMPLES)
    sample = tensor.as_strided((tensor.numel() // step,), (step,))
    return version, sample.double().sum().item()
