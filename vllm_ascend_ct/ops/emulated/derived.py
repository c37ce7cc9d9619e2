# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What is derived from weights, kept as long as the weights live unchanged."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_ascend_ct import envs

_SAMPLES = 64


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Value = TypeVar("_Value", bound=_Sized)


class DerivedWeights:
    """A cache keyed by where tensors lie in memory, not by Python identity.

    An operator sees new tensor objects at each call, over storage that stays. An entry
    dies with any of its sources and is computed anew when one was written: torch counts
    writes, but for those through `.data`, so some values are compared as well.

    All values together have at most `envs.emulate_keep_bytes`. Nothing is dropped to
    make room: layers take turns, so each would find its own dropped.
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
        """Return `compute()`, from the cache if `sources` are as they were.

        Args:
            key: Tells apart what is derived from the same sources.
            sources: Contiguous, or transposed views.
            nbytes: The least that the value has.
            compute: Makes the value, which may not share memory with the sources.

        Returns:
            None if there is no room.

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
        """What is kept."""
        return sum(entry.value.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


class _Entry:
    def __init__(self, sources: list[torch.Tensor], value: object) -> None:
        self.storages = [StorageWeakRef(s.untyped_storage()) for s in sources]
        self.versions = list(map(_version, sources))
        self.samples = [_sample(source).clone() for source in sources]
        self.value: Any = value

    def is_of(self, sources: list[torch.Tensor]) -> bool:
        return not self.expired() and all(
            version == _version(source) and torch.equal(sample, _sample(source))
            for source, version, sample in zip(sources, self.versions, self.samples)
        )

    def expired(self) -> bool:
        return any(storage.expired() for storage in self.storages)


# What all operators of a process keep: one bound for them together.
derived = DerivedWeights()


def _place(tensor: torch.Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    # Contiguous or transposed, its elements lie side by side.
    step = max(1, tensor.numel() // _SAMPLES)
    return tensor.as_strided((tensor.numel() // step,), (step,))
