# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A cache of values derived from weights, valid while the weights are unchanged."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_ascend_ct import envs

# Each is a cache miss in every call.
_SAMPLES = 16


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Value = TypeVar("_Value", bound=_Sized)


class DerivedWeights:
    """A cache keyed by the memory addresses of tensors, not by Python identity.

    An operator gets new tensor objects in each call, over the same storage. An entry
    expires with the storage of any of its sources, and is recomputed if a source was
    written to. torch counts writes except those through `.data`, so the cache compares
    some sampled values as well.

    All values together take at most `envs.emulate_keep_bytes`. Nothing is evicted to
    make room: layers run in turn, so each would find its own entry evicted.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def get(
        self,
        key: Hashable,
        sources: list[torch.Tensor],
        nbytes: int,
        compute: Callable[[], _Value],
    ) -> _Value | None:
        """Return `compute()`, from the cache if the sources have not changed.

        Args:
            key: Distinguishes values derived from the same sources.
            sources: Tensors that the value depends on, contiguous or transposed views.
            nbytes: Lower bound of the value's size in bytes.
            compute: Computes the value, which must not share memory with the sources.

        Returns:
            The value; None if it is not cached and there is no room for it.

        """
        places = (key, *map(_place, sources))
        entry = self._entries.get(places)
        if entry is not None and entry.is_of(sources):
            value: _Value = entry.value
            return value
        self._entries.pop(places, None)
        self._entries = {
            known: other
            for known, other in self._entries.items()
            if not other.expired()
        }
        room = envs.emulate_keep_bytes() - self.nbytes
        if nbytes > room:
            return None
        value = compute()
        if value.nbytes <= room:
            self._entries[places] = _Entry(sources, value)
        return value

    @property
    def nbytes(self) -> int:
        """Size of all cached values in bytes."""
        return sum(entry.value.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()


class _Entry:
    def __init__(self, sources: list[torch.Tensor], value: object) -> None:
        self.storages = [StorageWeakRef(s.untyped_storage()) for s in sources]
        self.versions = list(map(_version, sources))
        self.samples = [_sample(source).clone() for source in sources]
        self.value: Any = value

    def is_of(self, sources: list[torch.Tensor]) -> bool:
        if self.expired():
            return False
        for source, version, sample in zip(sources, self.versions, self.samples):
            if version != _version(source) or not torch.equal(sample, _sample(source)):
                return False
        return True

    def expired(self) -> bool:
        return any(storage.expired() for storage in self.storages)


# Shared by all operators of a process, so that they have one limit together.
derived = DerivedWeights()


def _place(tensor: torch.Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    # Contiguous or transposed, the tensor's elements fill one range of memory.
    step = max(1, tensor.numel() // _SAMPLES)
    return tensor.as_strided((tensor.numel() // step,), (step,))
